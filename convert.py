"""Turn a pre-trained autoregressive (AR) language model into a masked-diffusion language model, in three stages.

  python convert.py config/tiny.py                             # a laptop, 4 minutes, downloads nothing
  python convert.py config/phi2.py config/single_a6000.py      # Phi-2 on one 48 GB card
  python convert.py config/phi2.py --dry_run                   # what it would cost: hours, memory, disk
  python convert.py config/phi2.py --resume                    # go on after a kill, bit for bit
  python convert.py --model_name=./my_model --dataset_name=my_text.txt --batch_size=4

Config files and --name=value override the settings below, left to right. out_dir/final is then a plain Hugging Face
folder (the AR model, recovered) with diffusion.safetensors and diffusion.json beside it; sample.py writes with it.
"""
import contextlib
import copy
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import statistics
import sys
import time
import warnings
import weakref
from collections import Counter
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before transformers is imported, which reads it once
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from configurator import UserError, configure, names_of, nearest

# ----------------------------------------------------------------------------------------------------------------------
# model
model_name = "openai-community/gpt2"  # a hub name, a local folder, a .gguf file, or the final/ of an earlier run
model_config = ""  # JSON of a Hugging Face config with model_type: random weights instead of model_name, for stage 0
tokenizer_name = ""  # "": the model's own; "bytes": one token a byte; else a hub name or a folder
use_bidirectional_attention = True  # False: attention stays causal, to see what the other direction is worth
use_time_embedding = True  # tell the masked positions how noisy the window is
logit_shift = True  # token i is read from the hidden state at i-1, as the AR model was trained to; False: at i
block_size = 0  # 0: the whole window is noisy; else tokens in a block, which sees clean text before it and itself
# adapters
use_lora = False  # freeze the model (bfloat16 on CUDA) and train adapters for diffusion alone: the AR model stays exact
lora_rank = 32  # of each adapter
lora_alpha = 64.0  # what an adapter adds is scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # of what goes into an adapter
lora_targets = "auto"  # auto: every linear layer; attention: those of attention; or names, comma-separated
# data
dataset_name = "Salesforce/wikitext"  # a hub name, a .txt .jsonl .json .csv .parquet file or folder, or "pydoc"
dataset_config = "wikitext-103-raw-v1"  # the hub data set's configuration; "": its default
text_column = "text"  # of a table; one with messages, prompt and response, or prompt alone, is read as chat instead
on_policy_tokens = 0  # train on so many tokens that the AR model itself writes after prompts from the data; 0: off
on_policy_share = 1.0  # of each step's windows, the rest are the data's; with use_lora 1, else less, as 0.25
cache_dir = "model_cache"  # tokens land here, keyed by all they depend on
max_seq_length = 512  # tokens in a window
max_train_samples = 50000  # windows; no more is tokenised than needed
eval_samples = 128  # held-out windows
num_proc = 0  # threads that tokenise; 0: one a core
# optimizer
batch_size = 2  # windows in a micro-batch; halved by itself when memory runs out
gradient_accumulation_steps = 16  # micro-batches in an optimizer step
learning_rate = 1e-4  # peak, before a stage's scale
lr_schedule = "cosine"  # after the warm-up, to zero within each stage: cosine | linear | constant
warmup_steps = 100  # of each stage, a fifth of its steps at most
weight_decay = 0.01  # of matrices; vectors have none
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW; below 0.999, as the loss of a step is noisy
max_grad_norm = 1.0  # 0: no clipping
use_8bit_adam = True  # bitsandbytes: 2 bytes of optimizer state a parameter instead of 8; slow on a CPU
optimizer_in_backward = False  # update as soon as a gradient is there and free it; clips by the norm of the step before
# stages
stage0_epochs = 0.0  # AR pre-training, for a model_config without weights
stage1_epochs = 2.0  # attention adaptation
stage2_epochs = 4.0  # diffusion
stage3_epochs = 2.0  # recovery of the causal ability
stage0_lr_scale = 1.0  # of learning_rate, like those below
stage1_lr_scale = 0.5  # little at first, as attention has just been turned
stage2_lr_scale = 1.0  # everything trains
stage3_lr_scale = 0.3  # lower, as it mends what stage 2 bent
lm_loss_weight = 0.5  # of the causal loss
lm_loss_stages = "3"  # where it counts, e.g. 123: with a block_size the clean copy gives it for free
diffusion_loss_weight = 1.0  # of the diffusion loss, in stages 1 to 3
distill_weight = 0.0  # with a block_size: of the KL from the clean copy's own prediction, beside each masked token
full_mask_share = 0.0  # with a block_size: share of blocks that are masked entirely, which is what drafts start from
max_steps = 0  # optimizer steps of all stages together, in proportion to their epochs; 0: by epochs
# diffusion
num_timesteps = 1000  # T; only the time embedding and the ends of the schedule notice it
noise_schedule = "cosine"  # cosine | linear | polynomial | sqrt
# machine
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "bfloat16"  # of autocast: bfloat16 | float16 | float32; trained weights are always float32
compile_model = True  # torch.compile, decoder layer by decoder layer
use_gradient_checkpointing = True  # a third more compute for far less activation memory
checkpoint_share = 1.0  # of the layers that do so, the rest keep their activations
max_memory_gb = 0.0  # warns at 90 % of it, a cap on CUDA; 0: the device's, less 3
auto_memory = False  # choose the means that save memory, the cheapest first, until the run fits max_memory_gb
# run
out_dir = ""  # "": outputs/<name of the config file>_diffusion
save_steps = 2500  # optimizer steps between checkpoints, one at the end of each stage too; 0: only there
eval_steps = 1000  # optimizer steps between evaluations
log_steps = 10  # optimizer steps between log lines
keep_checkpoints = 2  # newest ones kept on disk
resume = False  # from the newest whole checkpoint of out_dir
checkpoint = ""  # from this one
sample_prompt = "The meaning of"  # continued at each evaluation
use_wandb = False  # the same numbers to Weights & Biases; nothing leaves the machine otherwise
wandb_project = "diffusion-converter"  # only with use_wandb
dry_run = False  # estimate memory, measure three steps a stage, print what the run would cost, write no out_dir
debug = False  # 20 steps with anomaly detection, shapes and finite checks
seed = 1337  # of data order, noise, dropout and random weights

# a set of values or (lowest, highest); a number without an entry must not be negative
allowed = {
    "noise_schedule": {"cosine", "linear", "polynomial", "sqrt"}, "lr_schedule": {"cosine", "linear", "constant"},
    "dtype": {"bfloat16", "float16", "float32"}, "learning_rate": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.999999),
    "full_mask_share": (0, 1), "checkpoint_share": (0, 1), "on_policy_share": (1e-6, 1), "lora_dropout": (0, 0.99),
    "lora_rank": (1, 10**4),
    "max_seq_length": (2, 10**6), "num_timesteps": (1, 10**6), "seed": (0, 2**31),
    **dict.fromkeys(("max_train_samples", "eval_samples", "batch_size", "gradient_accumulation_steps", "eval_steps",
                     "log_steps", "keep_checkpoints"), (1, 10**9)),
}


# ----------------------------------------------------------------------------------------------------------------------
# The diffusion. Absorbing-state masked diffusion in discrete time (MDLM, https://arxiv.org/abs/2406.07524; LLaDA,
# https://arxiv.org/abs/2502.09992): at step t of T each token has become a mask with probability 1 - alpha(t).
def alpha(t, num_timesteps, schedule):
    """Share of tokens still clean at step t (LongTensor, 0..T), float64; alpha(0) = 1 and alpha(T) = 0."""
    u = t.double() / num_timesteps
    return {
        "cosine": torch.cos(math.pi * u / 2) ** 2,  # https://arxiv.org/abs/2102.09672, eq. 17 without its offset
        "linear": 1 - u,
        "polynomial": 1 - u**2,
        "sqrt": 1 - u.sqrt(),
    }[schedule]


def elbo_weight(t, num_timesteps, schedule):
    """Weight of a masked token in the discrete NELBO (MDLM, eq. 8): T (alpha(t-1) - alpha(t)) / (1 - alpha(t))."""
    now, before = alpha(t, num_timesteps, schedule), alpha(t - 1, num_timesteps, schedule)
    return num_timesteps * (before - now) / (1 - now)


# names the parts of a step in a profile; bench.py and estimate() put their own in its place
phase = record_function


def derived_seed(*parts):
    """One seed from (seed, purpose, stage, step): random state is a function of where we are, so nothing is saved."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


def draw_noise(n, length, num_timesteps, noise_seed, block_size=0, full_mask_share=0.0):
    """t (n, blocks), one in each of n * blocks equal strata, shuffled; uniform noise (n, length) float64. On the CPU.

    t is in 1..T, or T + 1 in the share of blocks that are fully masked, for a term of their own. block_size 0: one
    block, the whole window.
    """
    generator, blocks = torch.Generator().manual_seed(noise_seed), length // (block_size or length)
    u = torch.randperm(n * blocks, generator=generator)
    u = ((u + torch.rand(len(u), generator=generator, dtype=torch.float64)) / len(u)).view(n, blocks)
    t = (1 + (u / max(1 - full_mask_share, 1e-9) * num_timesteps).long()).clamp(max=num_timesteps)
    t = torch.where(u < 1 - full_mask_share, t, num_timesteps + 1)
    return t, torch.rand(n, length, generator=generator, dtype=torch.float64)


def mask_tokens(ids, t, noise, maskable, mask_id, num_timesteps, schedule):
    """ids (B, T) with each maskable token masked with probability 1 - alpha(t); and which were, bool (B, T).

    t: (B, n), each for T / n tokens.
    """
    rate = 1 - alpha(t, num_timesteps, schedule).repeat_interleave(ids.shape[1] // t.shape[1], 1)
    masked = maskable & (noise < rate)
    return ids.masked_fill(masked, mask_id), masked


def layout(ids, t, noise, model, diffusion=1.0, lm=0.0, distill=0.0, own=0):
    """The runs of the model that a loss is made of: [(view, inputs, t, targets, weights, distill)], all on the CPU.

    ids (B, T): a token, or ~token where it is context only: never masked, never scored. t (B, n) and noise (B, T) come
    from draw_noise. view: how the run looks at its inputs (B, L), causal | bidirectional | blocks. Each hidden state
    predicts one token, targets (B, L), and counts with weights (B, L), 0 if it is not read; distill (B, L) is the
    weight of the KL to what the clean copy says of that token. own: the first so many windows are the model's own text,
    of which it learns to draft but no language, so nothing clean is scored in them. Weights are shares of the tokens of
    all B windows (the causal loss's: of all but its own text), so that the losses of a batch's parts add up to nats a
    token. Packed documents see one another, as they did when the AR model was pre-trained.
    """
    T, shift = ids.shape[1], model.logit_shift
    k = model.block_size or T
    scored = ids >= 0
    ids = torch.maximum(ids, ~ids)
    ahead = ids.roll(-1, 1)  # what the state at i predicts if logits are shifted: token i + 1
    predicted = scored & (torch.arange(T) > 0)  # by a causal model: nothing stands before the first token
    heard = predicted & (torch.arange(len(ids)) >= own)[:, None]
    clean = lm * heard / heard.sum().clamp(min=1)  # (B, T), by token
    causal = "causal", ids, torch.zeros_like(t), ahead, clean.roll(-1, 1), torch.zeros_like(clean)
    if not diffusion:
        return [causal]

    # Which position reads which. A masked token i: its own, noisy position i, or with the shift i-1, noisy too. The
    # first token of a block with the shift: the clean i-1 whose prediction is the AR model's, always, and with weight
    # 1, which is what a masked token weighs on average. A causal loss: the clean i-1.
    full, times = t > model.num_timesteps, t.clamp(max=model.num_timesteps)
    starts = torch.arange(T) % k == 0
    known = starts & full.repeat_interleave(k, 1)
    maskable = predicted if shift else scored & ~known  # drafts without the shift start from a known token
    noisy, masked = mask_tokens(ids, times, noise, maskable, model.mask_id, model.num_timesteps, model.noise_schedule)
    share = diffusion / (predicted if shift else scored).sum().clamp(min=1)
    weight = torch.where(full, 1.0, elbo_weight(times, model.num_timesteps, model.noise_schedule))
    weight = masked * share * weight.repeat_interleave(k, 1)  # (B, T), by token
    if shift and model.block_size:
        weight, clean = weight.masked_fill(starts, 0), clean + share * (starts & heard)
    teach = distill * weight * (torch.arange(T) > 0)
    if shift:
        weight, teach, targets = weight.roll(-1, 1), teach.roll(-1, 1), ahead
    else:
        targets = ids
    if not model.block_size:
        noisy = "bidirectional" if model.bidirectional else "causal", noisy, times, targets, weight, teach
        return [noisy, causal] if lm else [noisy]
    pairs = [(ids, noisy), (torch.zeros_like(t), times), (ahead, targets), (clean.roll(-1, 1), weight),
             (torch.zeros_like(teach), teach)]
    return [("blocks", *(torch.cat(pair, 1) for pair in pairs))]


def reads(targets, weights, distill, shift):
    """Which hidden states a loss reads: rows (N,), their targets and weights (N,), and for the first M of them that
    have a teacher its rows and its weights (M,). targets, weights, distill: (B, L) of layout(); rows: of B * L."""
    L, rows = weights.shape[1], weights.flatten().nonzero()[:, 0]
    rows = rows[distill.flatten()[rows].argsort(descending=True, stable=True)]
    taught = distill.flatten()[rows]
    taught = taught[taught > 0]
    teachers = rows[:len(taught)] - L // 2 - int(not shift)  # the clean state that predicts the same token
    return rows, targets.flatten()[rows], weights.flatten()[rows].float(), teachers, taught.float()


def runs_of(model, ids, t, noise, weights, micro_batch):
    """What layout() lays out, micro-batch by micro-batch: the arguments of each call of model.loss(), on the CPU."""
    runs = []
    with phase("data"):
        laid_out = layout(ids, t, noise, model, *weights)
        for i in range(0, len(ids), micro_batch):
            for view, *run in laid_out:
                inputs, times, *rest = (x[i:i + micro_batch] for x in run)
                if view != "causal" or rest[1].any():  # else of its own text
                    runs.append((view, inputs, times, *reads(*rest, model.logit_shift)))
    return runs


def backpropagate(model, runs, scaler, amp, dropout_seed):
    """The loss of an optimizer step, a scalar on the device, its gradients in place (or used up: update_in_backward).

    Each run is backpropagated before the next one changes anything. Failure if memory runs out among the updates.
    """
    model.zero_grad(set_to_none=True)
    torch.manual_seed(dropout_seed)
    total = torch.zeros((), device=model.mask_embedding.device)
    try:
        for i, run in enumerate(runs):
            if model.updates:
                model.updates["last"] = i == len(runs) - 1
            with amp:
                loss = model.loss(*run)
            with phase("backward"):
                scaler.scale(loss).backward()
            total += loss.detach()
    except RuntimeError as error:
        if out_of_memory(error) and model.updates and model.updates["norms"]:
            raise Failure("out of memory in the middle of an update (optimizer_in_backward); a smaller batch_size, and "
                          "--resume goes on from the last checkpoint") from None
        raise
    return total


# ----------------------------------------------------------------------------------------------------------------------
# The way back: writing, from masks to text
def predictive(logits, temperature=0.0, top_k=0, top_p=1.0):
    """The distribution (N, V) that tokens are drawn from; all of it on the likeliest at temperature 0.

    top_k: only the k likeliest; top_p: the fewest that make up this share (https://arxiv.org/abs/1904.09751).
    """
    if not temperature:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # the likeliest at 0: no overflow
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -math.inf)
    if top_p < 1:
        best, order = logits.softmax(-1).sort(-1, descending=True)
        drop = best.cumsum(-1) - best >= top_p  # never the first
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return logits.softmax(-1)


def draw(logits, sampling=None, generator=None):
    """A token (N,) for each of logits (N, V); sampling: of predictive()."""
    if not (sampling or {}).get("temperature"):
        return logits.argmax(-1)
    return torch.multinomial(predictive(logits.float(), **sampling), 1, generator=generator)[:, 0]


def best_first(keys, among, count):
    """bool (B, T): in each row the `count` (B,) entries with the highest keys of those `among`."""
    rank = keys.masked_fill(~among, -math.inf).argsort(1, descending=True).argsort(1)
    return among & (rank < count[:, None])


@torch.no_grad()
def unmask(predict, ids, mask_id, steps, sampling=None, order="confidence", threshold=0.0, remask=0, generator=None,
           watch=None):
    """Fill the masks of ids (B, T), the surest first; returns (ids, forward passes). What was no mask is not touched.

    predict(ids, left (B,), rows, places) -> logits (N, V) at [rows, places], where the masks are; left counts them.
    steps: forward passes at most (MaskGIT, https://arxiv.org/abs/2202.04200; LLaDA). threshold: instead, in each pass
    all tokens that are so sure, at least one a row (Fast-dLLM, https://arxiv.org/abs/2505.22618). remask: so many
    tokens a row may be taken back, those set with least confidence in an earlier pass (ReMDM,
    https://arxiv.org/abs/2503.00307); with a threshold only those below it. watch(ids, confidence) after each pass.
    """
    given, confidence = ids != mask_id, torch.ones(ids.shape, device=ids.device)
    budget, most = torch.full_like(ids[:, 0], remask), int((ids == mask_id).sum(1).max())  # masks a row, at most
    limit, forwards = most + remask if threshold else min(steps, most + remask), 0
    while most:
        masked = ids == mask_id
        left = masked.sum(1)
        places = torch.argsort(masked.byte(), dim=1, descending=True, stable=True)[:, :most].flatten()  # (N,), no mask
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(most)  # in some, which changes none
        logits = predict(ids, left, rows, places).float()  # (N, V)
        tokens = draw(logits, sampling, generator)  # (N,)
        probs = logits.softmax(-1)
        sure = probs.gather(1, tokens[:, None])[:, 0]
        if order == "confidence":
            key = sure
        elif order == "entropy":
            key = torch.special.xlogy(probs, probs).sum(-1)
        elif order == "margin":
            key = probs.topk(2).values.diff().neg()[:, 0]
        elif order == "random":
            key = torch.rand(len(rows), generator=generator, device=ids.device)
        else:  # left_to_right
            key = -places.float()
        forwards += 1
        keys = confidence.index_put((rows, places), key)
        count = (left + limit - forwards) // (limit - forwards + 1)  # rounded up, so the last pass takes what is left
        take = best_first(keys, masked, torch.ones_like(left) if threshold else count)
        new = confidence.index_put((rows, places), sure)
        take |= masked & (new >= (threshold or math.inf))
        ids = torch.where(take, ids.index_put((rows, places), tokens), ids)
        confidence = torch.where(take, new, confidence)
        if remask and forwards < limit:
            among = ~given & ~masked & (confidence < (threshold or math.inf))
            count = budget if threshold else (budget + limit - forwards - 1) // (limit - forwards)
            back = best_first(-confidence, among, count)
            ids, budget = ids.masked_fill(back, mask_id), budget - back.sum(1)
        if threshold or remask:  # waits for the device; else it is known without
            most = int((ids == mask_id).sum(1).max())
        else:
            most -= math.ceil(most / (limit - forwards + 1))
        if watch:
            watch(ids, confidence)
    return ids, forwards


@torch.no_grad()
def write(model, prompts, new_tokens, steps, end=None, watch=None, **how):
    """Continue prompts, or fill their holes (ids of masks), in the way that the model was trained.

    prompts: lists of ids, of any lengths. how: of unmask(). A whole-sequence model fills prompt and new_tokens masks in
    at most `steps` passes. A block model writes block after block in its share of them, each behind a cache that it
    enters once, until every text has its `end`. Returns (lists of ids, forward passes, positions computed).
    """
    lengths = torch.tensor([len(p) for p in prompts], device=model.mask_embedding.device)
    if model.block_size:
        return write_blocks(model, prompts, lengths, new_tokens, steps, end, watch, how)
    total, T = lengths + new_tokens, max(map(len, prompts)) + new_tokens
    rows = [[*p, *[model.mask_id] * new_tokens, *[0] * (T - len(p) - new_tokens)] for p in prompts]
    ids, view = torch.tensor(rows, device=lengths.device), {}
    if model.bidirectional and len({len(p) for p in prompts}) > 1:  # else nobody sees the padding, or there is none
        i = torch.arange(T, device=ids.device).expand(ids.shape)
        view = model.look(torch.stack([i, torch.where(i < total[:, None], 1, -1), 0 * i]))
    model.set_causal(not model.bidirectional)

    def predict(ids, left, rows, places):
        return model(ids, model.time_of(left / total), rows * T + places - int(model.logit_shift), **view)
    ids, forwards = unmask(predict, ids, model.mask_id, steps, watch=watch, **how)
    return [row[:n] for row, n in zip(ids.tolist(), total.tolist(), strict=True)], forwards, forwards * T


def write_blocks(model, prompts, lengths, new_tokens, steps, end, watch, how):
    """write() of a block model."""
    P, k, device = max(map(len, prompts)), model.block_size, lengths.device
    ids = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)  # (B, P), padded on the left
    past, forwards, computed, blocks = new_past(), 0, 0, math.ceil(new_tokens / k)
    past["places"] = past["places"].to(device)

    def run(new, start, group, t=None, rows=None):
        at = torch.arange(start, start + new.shape[1], device=device) - (P - lengths)[:, None]
        horizon = at + 1 if group == 0 else at[:, :1].expand_as(at)
        places = torch.stack([at.clamp(min=0), torch.where(at < 0, -1, group), horizon])
        model.set_causal(False)  # look() says who sees whom
        return model(new, t, rows, **model.look(places, past))

    last = torch.arange(1, len(ids) + 1, device=device)
    ahead = run(ids, 0, 0, rows=last * P - 1)  # (B, V), what the clean text says of the token after it
    for start in range(P, P + blocks * k, k):
        block, sure = torch.full((len(ids), k), model.mask_id, device=device), torch.ones(len(ids), 0, device=device)
        if model.logit_shift:
            block[:, 0] = draw(ahead, how.get("sampling"), how.get("generator"))
            sure = ahead.float().softmax(-1).gather(1, block[:, :1])

        def predict(block, left, rows, places, start=start):
            logits = run(block, start, 1, model.time_of(left / k), rows * k + places - int(model.logit_shift))
            forget(past, k)
            return logits
        show = watch and (lambda block, confidence, ids=ids, sure=sure: watch(
            torch.cat([ids, block], 1), torch.cat([sure, confidence[:, sure.shape[1]:]], 1)))
        block, n = unmask(predict, block, model.mask_id, max(1, round(steps / blocks)), watch=show, **how)
        ids = torch.cat([ids, block], 1)
        forwards, computed = forwards + n + 1, computed + (n + 1) * k
        if start + k == P + blocks * k or end is not None and (ids[:, P:] == end).any(1).all():
            break
        ahead = run(block, start, 0, rows=last * k - 1)
    texts = [row[P - len(p):][:len(p) + new_tokens] for row, p in zip(ids.tolist(), prompts, strict=True)]
    return texts, forwards, computed


# ----------------------------------------------------------------------------------------------------------------------
# The surgery. Nothing of the Hugging Face model is resized, subclassed or copied: it gets one embedding more, a causal
# switch and a gathered head, and with no masked position in causal mode it is exactly what it was.
def sees(query, key, window):
    """Whether a query sees a key, each (position, group, horizon), of shapes that broadcast.

    A clean key (group 0) is seen by who has its horizon behind it: the causal order, where a clean token's horizon is
    the position after its own, and a noisy one's the start of its block; a sliding window bounds how far back. A noisy
    key is seen by all of its own group.
    """
    clean = key[0] < query[2]
    if window:
        clean = clean & (query[0] - key[0] < window)
    return torch.where(key[1] == 0, clean, key[1] == query[1])


def clean_places(length):
    """Places (3, 1, length) of clean tokens from position 0 on, for DiffusionLM.look()."""
    i = torch.arange(length)
    return torch.stack([i, 0 * i, i + 1])[:, None]


def block_places(T, block_size):
    """Places (3, 1, 2T) of a clean copy and, at the same positions, a noisy one in blocks, for DiffusionLM.look()."""
    i = torch.arange(T)
    noisy = torch.stack([i, 1 + i // block_size, i // block_size * block_size])[:, None]
    return torch.cat([clean_places(T), noisy], 2)


def new_past():
    """Nothing seen yet: a cache that keeps every token, sliding windows or not, and where its tokens stand."""
    return {"cache": DynamicCache(), "places": torch.zeros(3, 1, 0, dtype=torch.long)}


def forget(past, n):
    """Drop the last n tokens of a past."""
    if not n:  # plain AR decoding, at every token
        return
    past["places"] = past["places"][:, :, :past["places"].shape[2] - n]
    for layer in past["cache"].layers:  # DynamicCache.crop has changed its meaning between versions
        layer.keys, layer.values = (x[:, :, :x.shape[2] - n] for x in (layer.keys, layer.values))


class DiffusionLM(nn.Module):
    """A masked-diffusion LM around any AutoModelForCausalLM.

    The mask token is a parameter of its own (id vocab_size, unknown to the tokenizer and to the head), so that the AR
    model is exact throughout. num_timesteps, noise_schedule, logit_shift, bidirectional, block_size, lora: how it was
    or will be trained; lora: the settings of its adapters, None without.
    """

    def __init__(self, lm, num_timesteps, noise_schedule, logit_shift, use_time_embedding, bidirectional, block_size=0,
                 lora=None):
        super().__init__()
        self.lm, self.logit_shift, self.bidirectional, self.block_size = lm, logit_shift, bidirectional, block_size
        self.num_timesteps, self.noise_schedule = num_timesteps, noise_schedule
        embedding = lm.get_input_embeddings()
        self.mask_id = embedding.weight.shape[0]
        with torch.no_grad():  # the mean of its outputs, not of its rows: some families scale them
            ids = torch.arange(self.mask_id, device=embedding.weight.device)
            mean = sum(embedding(part).float().sum(0) for part in ids.split(8192)) / self.mask_id
        self.mask_embedding = nn.Parameter(mean.clone())  # (C,)
        self.time_mlp = None
        if use_time_embedding:
            self.time_mlp = nn.Sequential(nn.Linear(256, len(mean)), nn.SiLU(), nn.Linear(len(mean), len(mean)))
            nn.init.zeros_(self.time_mlp[2].weight)  # starts as if it were not there
            nn.init.zeros_(self.time_mlp[2].bias)
        self.positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.switches, self.attention = causal_switches(lm), lm.config._attn_implementation
        self.window = next((w for _, name, w, _ in self.switches if name == "sliding_window"), None)
        rates = 1 - alpha(torch.arange(num_timesteps + 1), num_timesteps, noise_schedule)
        self.register_buffer("rates", rates.float(), persistent=False)  # share of masks by time, for time_of()
        self.context_apart = False  # blocks: the clean copy in a run of its own, without gradient, as nothing trains it
        self.views, self.gate, self.adapters, self.lora_config = {}, None, [], None
        self.updates = None  # of update_in_backward()
        self.head_floats = 2**26  # a chunk of the head has so many logits, 256 MB
        if lora:
            self.add_adapters(**lora)

    # -- the surgery
    def set_causal(self, causal):
        """Turn attention. Not between a run and its backward pass: gradient checkpointing runs it again."""
        for owner, name, if_causal, if_bidirectional in self.switches:
            setattr(owner, name, if_causal if causal else if_bidirectional)

    def embed(self, ids, t):
        """ids (B, L), t (B, n), each for L / n tokens -> (B, L, C): masks get the mask embedding and the time."""
        masked = (ids == self.mask_id)[..., None]
        mask = self.mask_embedding
        if self.time_mlp is not None and t is not None:
            time = self.time_mlp(sinusoid(t / self.num_timesteps))  # (B, n, C)
            mask = mask + time.repeat_interleave(ids.shape[1] // t.shape[1], 1)
        tokens = self.lm.get_input_embeddings()(ids.masked_fill(masked[..., 0], 0))
        return torch.where(masked, mask.to(tokens.dtype), tokens)
    # -- end of the surgery

    def add_adapters(self, rank, alpha, dropout, targets):
        """LoRA (https://arxiv.org/abs/2106.09685) by peft: off in causal mode, else on where self.gate is 1, or None.

        targets: auto | attention | names, comma-separated. Raises UserError if peft finds nothing to adapt.
        """
        from peft import LoraConfig, inject_adapter_in_model  # slow to import
        from peft.tuners.lora import LoraLayer
        wanted = targets.replace(" ", "").split(",")
        if targets in ("auto", "attention"):
            wanted = sorted({name for layer in decoder_layers(self.lm) for name, m in layer.named_modules()
                             if isinstance(m, (nn.Linear, Conv1D)) and (targets == "auto" or any(
                                 name.startswith(f"{a}.") for a, _ in attention_modules(layer)))})
        for name in wanted:
            if not any(f".{there}".endswith(f".{name}") for there, _ in self.lm.named_modules()):
                raise UserError(f"lora_targets: '{name}' is no layer of this model; auto, attention, or its names")
        self.lora_config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted,
                                      task_type="CAUSAL_LM", base_model_name_or_path=self.lm.name_or_path)
        try:
            with warnings.catch_warnings(action="ignore"):  # of fan_in_fan_out, which it then sets as it should
                inject_adapter_in_model(self.lora_config, self.lm)
        except ValueError as error:
            raise UserError(f"lora_targets: '{targets}': {first_line(error)}") from None
        for parent in list(self.lm.modules()):
            self.adapters += [(parent, child, m) for child, m in parent.named_children() if isinstance(m, LoraLayer)]
        inside = set(self.lm.get_decoder().modules())
        for _, name, m in self.adapters:
            if "default" not in m.lora_B or m not in inside:
                raise UserError(f"lora_targets: only linear layers of the decoder take adapters, not '{name}'")
            m.lora_B["default"].register_forward_hook(self.gated)
            self.switches.append((m, "_disable_adapters", True, False))
        for p in self.adapter_state().values():
            p.data = p.data.float()  # whatever the base's type is

    def time_of(self, share):
        """The time t (B, 1) at which a share (B,) of the tokens is masked."""
        return torch.searchsorted(self.rates, share[:, None]).clamp(1, self.num_timesteps)

    def gated(self, module, args, output):
        """The hook on each adapter: nothing comes out of it where the gate (B or 1, L, 1) is 0."""
        if self.gate is None:
            return output
        gate = self.gate
        if output.dim() == 2:  # some layers flatten their tokens
            gate = gate.expand(len(output) // gate.shape[1], -1, -1).reshape(-1, 1)
        return output * gate

    def own_state(self):
        """The mask and the time embedding, by name: what trains beside the Hugging Face model."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("lm.")}

    def adapter_state(self):
        """The adapters' parameters, by the names that peft gives them in its files."""
        return {f"base_model.model.{name.replace('.default', '')}": p for name, p in self.lm.named_parameters()
                if "lora_" in name}

    @contextlib.contextmanager
    def as_it_came(self):
        """The Hugging Face model in causal mode (else what is saved reloads as not causal), without adapters, and with
        the attention that it came with."""
        self.set_causal(True)
        attention = self.lm.config._attn_implementation
        if attention != self.attention:
            self.lm.set_attn_implementation(self.attention)
        for parent, child, m in self.adapters:
            setattr(parent, child, m.base_layer)
        try:
            yield self.lm
        finally:
            for parent, child, m in self.adapters:
                setattr(parent, child, m)
            if attention != self.attention:
                self.lm.set_attn_implementation(attention)

    def look(self, places, past=None):
        """What hidden() is to be told of inputs at places (3, B or 1, L): position_ids, attention_mask, gate and past.

        Rows of places: the position of each token, its group (0: clean, from 1 on: a noisy block, -1: padding) and its
        horizon; sees() says what they mean. past: of new_past(), what earlier runs left; this one sees it and adds to.
        """
        seen, flex = places, self.lm.config._attn_implementation == "flex_attention"
        if past is not None:
            seen = past["places"] = torch.cat([past["places"].expand(3, places.shape[1], -1), places], 2)

        def mask(window):
            if flex:
                return create_block_mask(lambda b, h, q, k: sees(places[:, b, q], seen[:, b, k], window),
                                         places.shape[1], None, places.shape[2], seen.shape[2], places.device)
            see = sees(places[..., None], seen[:, :, None], window)[:, None]  # (B, 1, L, keys)
            if self.lm.config._attn_implementation != "eager":
                return see
            return torch.zeros_like(see, dtype=torch.float32).masked_fill(~see, torch.finfo(torch.float32).min)

        masks = mask(self.window)
        if self.window and "sliding_attention" in (getattr(self.lm.config, "layer_types", None) or ()):
            masks = {"full_attention": mask(None), "sliding_attention": masks}
        return {"position_ids": places[0], "attention_mask": masks, "past": past,
                "gate": (places[1] > 0)[..., None] if self.adapters else None}

    def hidden_of_blocks(self, ids, t):
        """hidden() of [clean copy | noisy copy], ids (B, 2T), t (B, 2n)."""
        T, n = ids.shape[1] // 2, t.shape[1] // 2
        if T not in self.views:  # a mask is built once
            places, past = block_places(T, self.block_size).to(ids.device), None
            if self.context_apart:
                past, places = {"places": places[:, :, :T]}, places[:, :, T:]
            self.views[T] = self.look(places, past)
        if not self.context_apart:
            self.set_causal(False)
            return self.hidden(ids, t, **self.views[T])
        past = new_past()
        self.set_causal(True)
        with torch.no_grad():
            _, clean = self.hidden(ids[:, :T], None, past=past)
        self.set_causal(False)
        output, noisy = self.hidden(ids[:, T:], t[:, n:], **self.views[T] | {"past": past})
        return output, torch.cat([clean, noisy], 1)

    def hidden(self, ids, t, rows=None, gate=None, past=None, **kwargs):
        """The decoder's own output; the rows (N,) of its flat hidden states, (1, N, C), or all, (B, L, C)."""
        self.gate = gate
        if past is not None:
            kwargs |= {"past_key_values": past["cache"], "use_cache": True}
        output = self.lm.get_decoder()(inputs_embeds=self.embed(ids, t), **{"use_cache": False} | kwargs)
        states = output[0]
        return output, states if rows is None else states.flatten(0, 1)[rows][None]

    def head(self, output, states):
        """Logits of hidden states (.., N, C): the model's own forward with its decoder's result put in place.

        So scaling, soft-capping and bias are the model's, for every family, and only the rows that are read cost.
        """
        decoder, output = self.lm.get_decoder(), copy.copy(output)
        output.last_hidden_state = states
        decoder.forward = lambda *args, **kwargs: output
        try:
            return self.lm(inputs_embeds=states, use_cache=False).logits
        finally:
            del decoder.forward

    def forward(self, ids, t=None, rows=None, **kwargs):
        """Logits (N, V) of the rows, or (B, L, V) of all. ids: (B, L); t: (B, n) in 1..T, needed where ids has masks;
        kwargs: of look()."""
        output, states = self.hidden(ids, t, rows, **kwargs)
        logits = self.head(output, states)
        return logits if rows is None else logits[0]

    def loss(self, view, ids, t, rows, targets, weights, teachers, taught):
        """Weighted sum of cross-entropies, and of the KL from the teachers' rows to the first rows, a scalar.

        What layout() lays out and reads() finds, on the CPU still. Turns attention as the view asks.
        """
        tensors = ids, t, rows, targets, weights, teachers, taught
        device = self.mask_embedding.device
        with phase("data"):
            if device.type == "cuda":  # from pinned memory nothing waits
                tensors = [x.pin_memory() for x in tensors]
            ids, t, rows, targets, weights, teachers, taught = (x.to(device, non_blocking=True) for x in tensors)
        with phase("forward"):
            if view == "blocks":
                output, states = self.hidden_of_blocks(ids, t)
            else:
                self.set_causal(view == "causal")
                output, states = self.hidden(ids, t)
            states = states.flatten(0, 1)

        def chunk_loss(states, targets, weights, teachers, taught):
            logits = self.head(output, states[None])[0].float()
            loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
            if len(taught):
                with torch.no_grad():
                    teacher = self.head(output, teachers[None])[0].float().log_softmax(-1)
                kl = F.kl_div(logits[:len(taught)].log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)
                loss = loss + (kl * taught).sum()
            return loss

        size = max(1, self.head_floats // self.mask_id)  # rows; more are computed again in the backward pass
        with phase("head"):
            parts = states[rows], targets, weights, states[teachers].detach(), taught
            if len(rows) <= size:
                return chunk_loss(*parts)
            chunks = itertools.zip_longest(*(x.split(size) for x in parts), fillvalue=taught[:0])
            return sum(recompute(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks)

    def attention_parameters(self):
        """The parameters of every attention module, whatever the family calls them."""
        return {id(p): p for _, m in attention_modules(self.lm) for p in m.parameters()}.values()


def attention_modules(module):
    """[(name, module)] of attention, whatever the family calls it."""
    return [(name, m) for name, m in module.named_modules() if type(m).__name__.endswith("Attention")]


def decoder_layers(lm):
    """The layers of a decoder."""
    return next(m for m in lm.get_decoder().modules() if isinstance(m, nn.ModuleList))


def sinusoid(u):
    """u (B, n) in 0..1 -> (B, n, 256) sines and cosines (https://arxiv.org/abs/1706.03762, section 3.5, on 1000 u)."""
    frequencies = torch.exp(torch.arange(128, device=u.device) * (-math.log(10000) / 128))
    angles = 1000 * u[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def causal_switches(lm):
    """[(owner, attribute, value when causal, value when bidirectional)], over the model's configs and modules.

    Some families ask their config, some each attention module, so all are set together. When bidirectional, a sliding
    window becomes one that nothing reaches past. SDPA then gets no mask tensor, which is its flash path, in either
    mode (but for a causal window shorter than the text).
    """
    modules = list(lm.modules())
    configs = list({id(m.config): m.config for m in modules if "config" in vars(m)}.values())
    switches = [(config, "is_causal", True, False) for config in configs]
    switches += [(m, "is_causal", True, False) for m in modules if vars(m).get("is_causal") is True]
    for owner in configs + modules:
        window = vars(owner).get("sliding_window")
        if isinstance(window, int) and window > 0:
            switches.append((owner, "sliding_window", window, 1 << 30))
    return switches


@contextlib.contextmanager
def refused(why):
    """What a foreign model raises in here, but for a lack of memory, becomes a UserError that starts with why."""
    try:
        yield
    except FOREIGN as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{why}: {first_line(error)}") from None


@torch.no_grad()
def probe(model, max_seq_length):
    """Prove both modes on the model at hand: how far position 0 moves when the last token changes.

    (causal, bidirectional), relative to the largest hidden state. Raises UserError if the architecture leaks when it
    should be causal, or cannot be turned.
    """
    length = min(max_seq_length, max(8, (model.window or 0) + 2))
    ids = torch.randint(0, model.mask_id, (1, length), generator=torch.Generator().manual_seed(0))
    device, training, moved = model.mask_embedding.device, model.training, {}
    ids, kind = ids.to(device), model.lm.config.model_type
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % model.mask_id
    model.eval()
    for causal in (None, False, True):  # first as it comes: an encoder must not pass for being forced to be causal
        if causal is not None:
            model.set_causal(causal)
        with refused(f"architecture '{kind}' does not run from embeddings alone"):
            a, b = (model.hidden(x, None)[1][0] for x in (ids, other))
            model(torch.full_like(ids, model.mask_id), ids[:, :1], ids[0, :1] * 0)  # masks and the head run as well
        moved[causal] = ((a[0] - b[0]).abs().max() / a.abs().max()).item()
    if not max(moved[None], moved[True]) < 1e-4:
        raise UserError(f"architecture '{kind}' is not causal (position 0 sees the last token): no AR decoder")
    if model.bidirectional and not moved[False] > 10 * moved[True] + 1e-6:
        raise UserError(f"architecture '{kind}' cannot be made bidirectional: its attention stays causal whatever is "
                        "set; --use_bidirectional_attention=false trains it as it is")
    if model.block_size:
        probe_blocks(model, ids, a)
    model.train(training)
    return moved[True], moved[False]


def probe_blocks(model, ids, expected):
    """Prove on the model at hand that [clean | noisy] in one run is what it should be, or raise UserError.

    In blocks of one token, none of them masked, both copies must have the hidden states (T, C) of the causal model
    alone, beyond a sliding window too; the clean copy even with adapters that do something. In a batch of two, as some
    families want a mask for each.
    """
    kind, T = model.lm.config.model_type, ids.shape[1]
    ups = [m.lora_B["default"].weight for _, _, m in model.adapters]
    kept = [p.detach().clone() for p in ups]
    size, model.block_size = model.block_size, 1
    checks = [("block_size", slice(2 * T), 0.0), ("use_lora", slice(T), 1.0)]
    for what, rows, change in checks if model.adapters else checks[:1]:
        for p in ups:
            p.data.fill_(change)
        with refused(f"{what}: architecture '{kind}' does not take it"):
            states = model.hidden_of_blocks(ids.repeat(2, 2), ids.new_zeros(2, 2))[1][0, rows]
        for p, old in zip(ups, kept, strict=True):
            p.data.copy_(old)
        off = ((states - expected.repeat(2, 1)[rows]).abs().max() / expected.abs().max()).item()
        if not off < 1e-4 + (expected.dtype == torch.bfloat16) * 0.05:
            raise UserError(f"{what}: architecture '{kind}' cannot keep its causal copy apart, it is off by {off:.0e}; "
                            + ("--block_size=0 works" if what == "block_size" else "try --lora_targets=attention"))
    model.block_size = size
    model.views.clear()


# what transformers, datasets and their kin raise for a file or a configuration that is broken
FOREIGN = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, ArithmeticError,
           AssertionError, EOFError, UnpicklingError, StrictDataclassError, SafetensorError, TemplateError)


class Failure(UserError):
    """What went wrong is no mistake of the user's."""
    code = 1


def out_of_memory(error):
    """Whether an error says so, of a GPU or a CPU (torch has a type of its own for the former only)."""
    return any(text in str(error) for text in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def run(main):
    """Call main(argv). What a user can mend, or a machine fails at, ends as one line on stderr and an exit code.

    --help prints the script's docstring and the lines that define its settings.
    """
    if sys.stdout:  # not closed
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # a log in a file can be followed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleans up; the training loop has a handler of its own
    if "--help" in sys.argv or "-h" in sys.argv:
        script = main.__globals__
        lines = re.findall(r"^[a-z]\w* = .*#.*$", Path(script["__file__"]).read_text(), re.MULTILINE)
        print(script["__doc__"], *lines, sep="\n")
        return
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        advice = "; shorter or fewer windows, a smaller model, --use_8bit_adam, --use_gradient_checkpointing need less"
        if not out_of_memory(error):
            advice = ""
            if isinstance(error, RuntimeError):
                raise
        print(f"error: {' '.join(str(error).split())[:500] or type(error).__name__}{advice}", file=sys.stderr)
        sys.exit(error.code if isinstance(error, UserError) else Failure.code)


def first_line(error):
    """The first line of a library's error, short enough for ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def byte_tokenizer():
    """One token a byte and an end of text, as an ordinary Hugging Face tokenizer: nothing to download or to train."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def place_of(name):
    """(path, what transformers calls it, further arguments) of a hub name, a folder or a .gguf file."""
    path = Path(name).expanduser()
    local = path.exists() or path.suffix == ".gguf" or name[:1] in ("", ".", "/", "~") or name.count("/") > 1
    where = {"local_files_only": local}
    if path.suffix == ".gguf":
        path, where["gguf_file"] = path.parent, path.name
    return path, str(path) if local else name, where


@contextlib.contextmanager
def loading(what):
    """What a foreign file raises in here becomes a UserError that starts with what."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it misses kernels not used here
    for text in (".past_key_values. is deprecated", ".gradient_checkpointing_enable. is deprecated"):
        warnings.filterwarnings("ignore", text, FutureWarning)  # older versions know no other
    try:
        yield
    except FOREIGN as error:
        gated = " (accept its licence on its hub page, then hf auth login)"
        raise UserError(f"{what} cannot be loaded: {first_line(error)}"
                        + gated * bool(re.search("gated|private|40[13]", str(error)))) from None


def load_config(name, config_json="", tokenizer=None):
    """The Hugging Face configuration of a model, without its weights; config_json: instead, for this tokenizer."""
    if not config_json:
        _, source, where = place_of(name)
        with loading(f"model_name: '{name}'"):
            return AutoConfig.from_pretrained(source, **where)
    with loading(f"model_config: {config_json!r}"):
        config = {"pad_token_id": None}
        if tokenizer:
            config |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        return AutoConfig.for_model(**config | json.loads(config_json))


def weights_type(lora, device_type):
    """What weights are kept in: a base that only adapters train in bfloat16 on cuda, all else in float32."""
    return torch.bfloat16 if lora and device_type == "cuda" else torch.float32


def load_model(name, tokenizer_name="", config_json="", device_type="cpu", **ours):
    """(DiffusionLM, tokenizer) from a hub name, a folder, a .gguf file or an earlier run's folder; on the CPU still.

    device_type: where it is to run, for weights_type(). ours: the arguments of DiffusionLM after lm; without them they
    come from the folder's diffusion.json. config_json: random weights instead. Raises UserError if anything cannot be
    loaded or does not fit.
    """
    path, source, where = place_of(name)
    anew = bool(ours)  # or goes on, from a checkpoint that is whole
    if not anew:
        ours = read_record(path)["model"]
    weights = weights_type(ours.get("lora"), device_type)
    with loading(f"tokenizer_name: '{tokenizer_name}'" if tokenizer_name else f"model_name: '{name}'"):
        if tokenizer_name == "bytes":
            tokenizer = byte_tokenizer()
        else:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name or source, **({} if tokenizer_name else where))
    if config_json:
        config = load_config(name, config_json, tokenizer)
    with loading(f"model_config: {config_json!r}" if config_json else f"model_name: '{name}'"):
        if config_json:
            lm = AutoModelForCausalLM.from_config(config, dtype=weights)
        else:
            lm, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=weights, output_loading_info=True, **where)
            if report["missing_keys"] or report["mismatched_keys"]:
                raise ValueError(f"it lacks weights: {sorted(report['missing_keys'] or report['mismatched_keys'])[:3]}")
    if "gguf_file" in where:  # dequantised while loading: from here on an ordinary model
        lm.hf_quantizer = None
        del lm.config.quantization_config
    if "quantization_config" in vars(lm.config):
        raise UserError(f"model_name: '{name}' has quantised weights, which cannot be trained")
    if len(tokenizer) > lm.get_input_embeddings().weight.shape[0]:
        raise UserError(f"tokenizer_name: {len(tokenizer)} tokens, but the model's vocabulary has "
                        f"{lm.get_input_embeddings().weight.shape[0]}: not the tokenizer of this model")
    converted = not anew or (path / "diffusion.json").is_file() and not config_json
    try:
        model = DiffusionLM(lm, **ours)
    except (TypeError, LookupError) as error:  # of a record that was edited, or comes from another version
        raise UserError(f"{path / 'diffusion.json'}: {first_line(error)}") from None
    for file, tensors in OUR_FILES.items() if converted else ():
        wanted = tensors(model)
        try:
            if not (path / file).exists() and (not wanted or anew and file.startswith("adapter/")):
                continue
            found = load_file(path / file)
            if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
                theirs = read_record(path)["model"]
                raise ValueError("it belongs to a model with " + ", ".join(
                    f"{k}={theirs.get(k)} (here {ours.get(k)})" for k in ("use_time_embedding", "lora")))
            for k, v in found.items():
                wanted[k].data.copy_(v)
        except FOREIGN as error:
            raise UserError(f"{path / file}: {first_line(error)}") from None
    return model, tokenizer


# what a folder holds beside a plain Hugging Face model, {file: model -> its tensors}; the adapters not beside
# config.json, where transformers would load them unasked
OUR_FILES = {
    "diffusion.safetensors": DiffusionLM.own_state,
    "adapter/adapter_model.safetensors": DiffusionLM.adapter_state,
}


def read_record(folder):
    """diffusion.json of a folder that save_folder wrote: model, max_seq_length, settings, state, versions."""
    try:
        record = json.loads((Path(folder) / "diffusion.json").read_text())
        record["model"] = dict(record["model"])
        return {k: record[k] for k in ("model", "max_seq_length", "settings", "state", "versions")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{folder}' holds no diffusion model: {first_line(error)}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Data: tokenised once, in windows that each epoch visits once. A batch is a function of (seed, stage, step).
def read_corpus(name, config, column, cache, answered=False):
    """(train, held, lines, key, chat) of a hub name, a local file or folder, or "pydoc".

    train, held: sequences of texts, held None where there is no validation split. lines: how many of them make up one
    document, joined without an end of text where the rows are lines of one text. key: changes when the source does.
    chat: each row is a conversation, as JSON. answered: the model will write what prompts alone lack. Raises UserError
    for what is missing, empty or no text.
    """
    if name == "pydoc":
        from pydoc_data.topics import topics  # 450 KB of English prose in the standard library, less its indentation
        return [re.sub(" {2,}", " ", text) for text in topics.values()], None, 1, platform.python_version(), False
    path, what = Path(name).expanduser(), {"path": name, "name": config or None}
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.exists() or path.suffix in kinds or name[:1] in (".", "/", "~"):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in kinds)
        found = {kinds.get(p.suffix) for p in files}
        if len(found) != 1 or None in found:
            raise UserError(f"dataset_name: '{name}' must be a file or a folder of files, all {' or '.join(kinds)}")
        what = {"path": found.pop(), "cache_dir": f"{cache}/datasets",
                "data_files": [glob.escape(str(p)) for p in files]}
        if what["path"] == "text":
            column, what["sample_by"] = "text", "document"
            if not any(p.stat().st_size for p in files):
                raise UserError(f"dataset_name: '{name}' holds no text")
            if len(files) == 1:  # by line, or a large file would be in memory as a whole
                what |= {"sample_by": "line", "keep_linebreaks": True}
    import datasets  # slow to import, and pydoc does not need it
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises as well
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(**what)
    except (*FOREIGN, StopIteration, datasets.exceptions.DatasetsError) as error:  # StopIteration: an empty file
        raise UserError(f"dataset_name: '{name}' cannot be loaded: {first_line(error.__cause__ or error)}") from None
    names = ["train", *[k for k in ("validation", "valid", "dev") if k in splits and len(splits[k])][:1]]
    has = splits["train"].column_names if "train" in splits else []
    if column not in has and ("messages" in has or "prompt" in has):
        if not {"messages", "response"} & set(has) and not answered:
            raise UserError(f"dataset_name: '{name}' has no '{column}', and prompts but no response, which the model "
                            "writes by itself with --use_lora --on_policy_tokens=...")
        names = [k for k in names if set(has) <= set(splits[k].column_names)]
        train, *held = (conversations(splits[k]) for k in names)
        return train, held[0] if held else None, 1, ["chat", *(splits[k]._fingerprint for k in names)], True
    for wanted, has in [("train", list(splits)), *((column, splits[k].column_names) for k in names if k in splits)]:
        if wanted not in has:
            raise UserError(f"text_column: '{name}' has no '{wanted}', it has {', '.join(has)}{nearest(wanted, has)}")
    key, (train, *held) = [column, *(splits[k]._fingerprint for k in names)], [splits[k][column] for k in names]
    held = held[0] if held else None
    head = [text or "" for text in train[:1000]]
    if not any(head) or not all(isinstance(text, str) for text in head):
        raise UserError(f"text_column: '{column}' of '{name}' holds no text")
    if "keep_linebreaks" in what:  # one file of text: its lines, of which some are held out
        if len(train) < 1000:
            train = re.findall(r"[^\n]{1,2000}\n*|\n+", "".join(head))
        return train, None, max(2, min(256, len(train) // 50)), key, False
    line_like = sum(not text or text.find("\n") == len(text) - 1 for text in head)  # "" or one line with its end
    one_text = line_like > 0.98 * len(head) and what["path"] != "text"
    return train, held, 256 if one_text else 1, key, False


def conversations(table):
    """The rows of a data set as JSON lists of messages, from a messages column, or from prompt and response, if any."""
    if "messages" in table.column_names:
        return [json.dumps(messages or [], default=str) for messages in table["messages"]]
    answers = table["response"] if "response" in table.column_names else [""] * len(table)
    pairs = zip(table["prompt"], answers, strict=True)
    return [json.dumps([{"role": "user", "content": a}, {"role": "assistant", "content": b}],
                       default=str) for a, b in pairs]


def chat_encoder(tokenizer, length):
    """encode(conversations as JSON) -> lists of ids, whole windows each, with ~id for all that is context only: what
    the assistant does not say, and the padding. UserError without a chat template that grows turn by turn."""
    if not tokenizer.chat_template:
        raise UserError("dataset_name: chat data, but this tokenizer has no chat template; take a chat model, or "
                        "plain text (text_column)")

    def encode_one(messages):
        ids = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = (tokenizer.apply_chat_template(
                    messages[:n], add_generation_prompt=n == i, tokenize=True, return_dict=False) for n in (i, i + 1))
                if after[:len(before)] != before or before[:len(ids)] != [max(x, ~x) for x in ids]:
                    raise ValueError("its text changes as the conversation grows")
                ids += [~x for x in before[len(ids):]] + after[len(before):]
        ids += [~(tokenizer.eos_token_id or 0)] * (-len(ids) % length)
        windows = [ids[i:i + length] for i in range(0, len(ids), length)]
        return [x for window in windows if max(window) >= 0 for x in window]

    def encode(texts):
        try:
            return [encode_one(json.loads(text)) for text in texts]
        except FOREIGN as error:
            raise UserError(f"dataset_name: chat data, but the chat template of this tokenizer cannot write it: "
                            f"{first_line(error)}") from None
    return encode


def document(rows, lines, i):
    """The i-th document, of `lines` rows."""
    return "".join(text or "" for text in rows[i * lines:(i + 1) * lines])


def shingles(text, length=64):
    """Hashes of all strings of 64 bytes in text, unique, uint64: what two texts share is what their shingles share."""
    h = np.frombuffer(text.encode(errors="replace").ljust(length), np.uint8).astype(np.uint64) + np.uint64(1)
    n, p = 1, 0x9E3779B97F4A7C15
    while n < length:  # a polynomial hash modulo 2^64, of strings twice as long in each round
        h, n, p = h[:-n] * np.uint64(p) + h[n:], 2 * n, p * p % 2**64
    h = (h ^ h >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(h ^ h >> np.uint64(32))


def overlap(text, known):
    """(indices of the sorted shingles `known` that text has too, how many text has)."""
    its = shingles(text)
    at = np.searchsorted(known, its)
    return at[known.take(at, mode="clip") == its], len(its)


def fast_encoder(tokenizer, sample, threads):
    """encode(texts) -> lists of ids: tiktoken where it gives the same ids on the sample, else the tokenizer itself."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))

    def own(texts):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokenizer.is_fast:
        return own
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, before = backend["model"], backend["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    if bpe["type"] != "BPE" or bpe["byte_fallback"] or backend["normalizer"] or steps[-1].get("type") != "ByteLevel":
        return own
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    tokens = [token for token in (*byte_of, *(a + b for a, b in bpe["merges"])) if token in bpe["vocab"]]
    if not set(byte_of) <= set(tokens):  # tiktoken panics at a byte that it does not know
        return own
    ranks = {}
    for rank, token in enumerate(tokens):  # tiktoken merges in this order, and its ids are ranks
        ranks.setdefault(bytes(byte_of[c] for c in token), rank)
    id_of = np.array([bpe["vocab"][token] for token in tokens])
    added = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())) or "(?!)")

    def fast(texts):
        ids = [id_of[x] for x in encoding.encode_ordinary_batch(texts, num_threads=threads)]
        return [own([text])[0] if added.search(text) else x for text, x in zip(texts, ids, strict=True)]
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    digit_by_digit = r"\p{N}|" + gpt2.replace(r"\s+(?!\S)", r"\s+(?=\p{N})|\s+(?!\S)")
    tells_apart = "x  12 3\t\n\n  34.5 \u00e9t\u00e9 \u65e5\u672c \U0001f642's I'LL don't\r\n  (a)  _b  "
    sample = [*sample, tells_apart]
    for pattern in (*(step.get("pattern", {}).get("Regex") for step in steps), gpt2, digit_by_digit, r"[\s\S]+"):
        if pattern:
            encoding = tiktoken.Encoding("converted", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            if all(np.array_equal(a, b) for a, b in zip(fast(sample), own(sample), strict=True)):
                return fast
    print("tokenizer: tiktoken would give other ids, so the tokenizer itself is used, which is slower")
    return own


def tokenise(folder, corpus, tokenizer, length, max_windows, held_windows, split_seed, threads):
    """Write train.bin, held.bin and meta.json into folder, complete or not at all.

    Held out is the validation split, else a seeded 5 % of the documents. A document that shares a tenth of itself, or
    1 % of the held-out text, with what is held out is left out of training. UserError if there is too little text.
    """
    rows, held_rows, lines, _, chat = corpus
    source, count = held_rows or rows, math.ceil(len(rows) / lines)
    meta = {"dtype": "uint16" if len(tokenizer) <= 2**16 else "uint32", "near_duplicates_left_out": 0}
    if chat:
        encode, end, meta["dtype"] = chat_encoder(tokenizer, length), [], "int32"
    else:
        encode = fast_encoder(tokenizer, [document(rows, lines, i)[:20000] for i in range(min(count, 20))], threads)
        end = [tokenizer.eos_token_id] if lines == 1 and tokenizer.eos_token_id is not None else []
    held_out, held_shingles = {}, []  # characters of each document that is held out

    def held_texts():
        order = range(math.ceil(len(source) / lines))
        for i in order if held_rows else np.random.default_rng(split_seed).permutation(order).tolist():
            if not held_rows and len(held_out) >= max(1, count // 20) and sum(held_out.values()) > 8 * length:
                return
            text = document(source, lines, i)
            held_out[i] = len(text)
            held_shingles.append(shingles(text))
            yield text

    def train_texts(known, seen):
        for i in range(count):
            text = document(rows, lines, i)
            at, n = overlap(text, known)
            if len(at) > 0.1 * n or len(at) > 0.01 * len(known):  # what is held out itself, too
                meta["near_duplicates_left_out"] += held_rows is not None or i not in held_out
            else:
                seen[at] = True
                yield text

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")

    def write(name, texts, limit):
        left, texts = limit * length, filter(None, texts)
        with open(temporary / f"{name}.bin", "wb") as file, \
                tqdm(total=left, desc=f"tokenise {name}", unit_scale=True, disable=None, leave=False) as bar:
            while left and (batch := list(itertools.islice(texts, 64))):
                ids = np.concatenate([part for x in encode(batch) for part in (x, end)]).astype(meta["dtype"])[:left]
                ids.tofile(file)
                left -= len(ids)
                bar.update(len(ids))
        meta[name] = limit - math.ceil(left / length)
        if not meta[name]:
            raise UserError(f"dataset_name: too little {name} text: {limit * length - left} tokens, a window has "
                            f"{length} (max_seq_length); near-duplicates left out: {meta['near_duplicates_left_out']}")

    temporary.mkdir(parents=True)
    try:
        write("held", held_texts(), held_windows)
        known = np.unique(np.concatenate(held_shingles))
        seen = np.zeros(len(known), bool)  # which of them also stand in training
        write("train", train_texts(known, seen), max_windows)
        meta["held_out_share_in_training"] = float(seen.mean())
        (temporary / "meta.json").write_text(json.dumps(meta))
        if not folder.exists():  # by another run that started together with this one
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well


def token_windows(tokenizer, corpus, cache, threads, settings):
    """Memory-mapped windows (n, T), for training and held out, and meta.json; tokenised if not cached."""
    identity = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    key = json.dumps([1, identity, tokenizer.eos_token_id, corpus[3], settings]
                     + [str(tokenizer.chat_template)] * corpus[4])
    folder = Path(cache) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        tokenise(folder, corpus, tokenizer, **settings, threads=threads)
    try:
        meta, length = json.loads((folder / "meta.json").read_text()), settings["length"]
        return *(np.memmap(folder / f"{name}.bin", meta["dtype"], "r", shape=(meta[name], length))
                 for name in ("train", "held")), meta
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cache_dir: {folder} is damaged, delete it: {first_line(error)}") from None


def continued(lm, rows, eos, positions):
    """rows (n, T) with what lm writes, greedily, in place of what follows each prompt: what is asked in a chat, else
    the first quarter. Prompts and padding become context only, ~id. positions: how many tokens lm can take."""
    T, device = rows.shape[1], lm.get_input_embeddings().weight.device
    ends = {eos, *np.atleast_1d(lm.generation_config.eos_token_id).tolist()} - {None}  # of a turn as well
    lengths = [int((r >= 0).argmax()) or max(1, T // 4) for r in rows]
    most = max(lengths)
    ids = torch.tensor([[0] * (most - n) + np.maximum(r, ~r)[:n].tolist()
                        for r, n in zip(rows, lengths, strict=True)], device=device)
    seen = torch.tensor([[0] * (most - n) + [1] * n for n in lengths], device=device)
    with torch.no_grad():
        out = lm.generate(ids, attention_mask=seen, do_sample=False,
                          max_new_tokens=min(T - min(lengths), positions - most), repetition_penalty=1.0,
                          no_repeat_ngram_size=0, eos_token_id=sorted(ends) or None, pad_token_id=eos or 0)[:, most:]
    new = np.full(rows.shape, ~(eos or 0), np.int32)
    for row, r, n, text in zip(new, rows, lengths, out.cpu().numpy(), strict=True):
        row[:n] = np.minimum(r, ~r)[:n]
        end = np.flatnonzero(np.isin(text, list(ends)))
        text = text[:min(T - n, end[0] + 1 if len(end) else T)]
        row[n:n + len(text)] = text
    return new


def on_policy_windows(model, tokenizer, windows, tokens, dtype, cache, kept, batch):
    """Memory-mapped windows (n, T) of about `tokens` tokens (0: all) that the AR model writes after prompts from
    windows, continued(). Cached, and taken up again where it was stopped.

    kept: the name of their file, if the run has them already, as a model that trains in full would write others now.
    """
    T, eos = windows.shape[1], tokenizer.eos_token_id
    with model.as_it_came() as lm:
        key = json.dumps([tokens, eos, T, dtype, hashlib.sha256(windows).hexdigest(),
                          [p.float().sum().item() for p in lm.parameters()]])
    name = f"on-policy-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin"
    path = Path(cache) / (kept or name)
    whole = path.exists() and path.stat().st_size and not path.stat().st_size % (4 * T)  # else it is damaged
    if not whole and path.name != name:
        raise UserError(f"on_policy_tokens: {path} is gone, which this run trains on, and the model no longer writes "
                        "the same; --out_dir=... starts anew")
    if whole:
        return np.memmap(path, np.int32, "r").reshape(-1, T)
    unfinished = path.with_suffix(".part")
    model.eval()
    with (open(unfinished, "ab") as file, model.as_it_came() as lm,
          tqdm(total=tokens or None, desc="writes", unit="tok", mininterval=0.1 if sys.stderr.isatty() else 30) as bar):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"on_policy_tokens: another run is writing {unfinished}; start again when it is done"
                            ) from None
        file.truncate(file.tell() // (4 * T * batch) * 4 * T * batch)  # whole batches
        done = np.fromfile(unfinished, np.int32).reshape(-1, T)
        written, at = int((done >= 0).sum()), len(done)
        bar.update(written)
        while (written < tokens or not tokens) and at < len(windows):
            new = continued(lm, windows[at:at + batch].astype(np.int64), eos, model.positions)
            new.tofile(file)
            file.flush()
            at, more = at + len(new), int((new >= 0).sum())
            written += more
            bar.update(more)
    os.replace(unfinished, path)
    if written < tokens:
        tqdm.write(f"on_policy_tokens: {written:,} tokens, as there are no more prompts (max_train_samples, "
                   "dataset_name)")
    model.train()
    return np.memmap(path, np.int32, "r").reshape(-1, T)


@functools.lru_cache(4)  # a batch may reach over the end of an epoch, of the data and of its own text
def epoch_order(n, order_seed):
    """A seeded permutation of n windows."""
    return np.random.default_rng(order_seed).permutation(n)


def get_batch(windows, size, seed, stage, step):
    """ids (size, T): batch number `step` of a stage whose epochs follow one another, each a seeded permutation."""
    where = [divmod(i, len(windows)) for i in range(step * size, (step + 1) * size)]
    rows = [epoch_order(len(windows), derived_seed(seed, "order", stage, epoch))[i] for epoch, i in where]
    return torch.from_numpy(windows[rows].astype(np.int64))


# ----------------------------------------------------------------------------------------------------------------------
# The stages, as data
def make_stages(n_windows, windows_per_step, max_steps):
    """One record a stage: what it trains, at which rate, on which losses, for how many optimizer steps (0: not run),
    and how many windows of each step are the model's own text."""
    table = [  # name, epochs, share of learning_rate, what it trains, weight of the diffusion and of the causal loss
        ("0 AR pre-training", stage0_epochs, stage0_lr_scale, "AR model", 0, 1),
        ("1 attention adaptation", stage1_epochs, stage1_lr_scale, "attention", diffusion_loss_weight, lm_loss_weight),
        ("2 diffusion", stage2_epochs, stage2_lr_scale, "everything", diffusion_loss_weight, lm_loss_weight),
        ("3 recovery", stage3_epochs, stage3_lr_scale, "everything", diffusion_loss_weight, lm_loss_weight),
    ]
    stages = [dict(zip(("name", "epochs", "lr_scale", "trains", "diffusion", "lm"), row, strict=True)) for row in table]
    for s in stages:
        s["lm"] *= s["name"][0] in "0" + lm_loss_stages and not use_lora  # it would train nothing
        s["distill"] = distill_weight * bool(s["diffusion"])
        s["own"] = 0
        if on_policy_tokens and s["diffusion"]:  # some of the model's own text, and some of the data unless it has all
            some = max(1, round(on_policy_share * windows_per_step))
            s["own"] = min(some, windows_per_step - (on_policy_share < 1))
        s["epoch"] = n_windows
        if s["own"] == windows_per_step:  # it is not written yet: about 3/4 of a window is
            s["epoch"] = min(n_windows, math.ceil(on_policy_tokens / (0.75 * max_seq_length)))
    total, done = sum(s["epochs"] for s in stages), 0.0
    if not total:
        raise UserError("stage1_epochs, stage2_epochs and stage3_epochs are 0: there is nothing to train")
    for s in stages:
        share = [round(max_steps * x / total) for x in (done, done + s["epochs"])]
        s["steps"] = share[1] - share[0] if max_steps else math.ceil(s["epochs"] * s["epoch"] / windows_per_step)
        s["warmup"] = min(warmup_steps, s["steps"] // 5)
        done += s["epochs"]
    return stages


def model_settings(s):
    """The arguments of DiffusionLM after lm, from settings."""
    lora = {k: s[f"lora_{k}"] for k in ("rank", "alpha", "dropout", "targets")} if s["use_lora"] else None
    return {"num_timesteps": s["num_timesteps"], "noise_schedule": s["noise_schedule"],
            "logit_shift": s["logit_shift"], "use_time_embedding": s["use_time_embedding"],
            "bidirectional": s["use_bidirectional_attention"], "block_size": s["block_size"], "lora": lora}


def all_losses(stages):
    """The weights of the losses of all stages together, as the dearest of a run has at most."""
    return {k: max(s[k] for s in stages if s["epochs"]) for k in ("diffusion", "lm", "distill")}


def freeze(model, trains):
    """Let a stage train its part of the model and nothing else; its parameters. UserError if there are none."""
    part = list(model.attention_parameters() if trains == "attention" else model.lm.parameters())
    if model.adapters:
        adapters = {id(p) for p in model.adapter_state().values()}
        part = [p for p in part if id(p) in adapters]
    if not part:
        raise UserError(f"a stage would train nothing: '{model.lm.config.model_type}' has no module named ...Attention"
                        + " with adapters in it" * bool(model.adapters))
    trained = part + list(model.own_state().values()) * (trains != "AR model")
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    return trained


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, learning rate, machine
def make_optimizer(params, lr, betas, decay, use_8bit, device):
    """AdamW (https://arxiv.org/abs/1711.05101), of 8-bit state (https://arxiv.org/abs/2110.02861) where asked for."""
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    if use_8bit and device.type != "mps":
        import bitsandbytes  # slow to import
        return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas)
    if use_8bit:
        print("use_8bit_adam: not on mps, AdamW in 32 bits instead")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def update_in_backward(model, params, optimizer, norm_before):
    """Hooks that update a parameter once its gradient is whole, in the last run of a step, and free the gradient.

    Gradients are clipped by the last finite norm of the steps before (norm_before, a float), as that of this one is
    known too late; what is not finite in them counts as 0. Returns the hooks' handles.
    """
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    model.updates = {"last": False, "norms": [], "norm": torch.tensor(norm_before, device=params[0].device)}

    def update(p):
        if not model.updates["last"]:
            return
        with phase("optimizer"), torch.no_grad():
            model.updates["norms"].append(torch.linalg.vector_norm(p.grad))
            p.grad.mul_(model.updates["clip"]).nan_to_num_(0, 0, 0)
            groups = optimizer.param_groups
            optimizer.param_groups = [groups[group_of[p]] | {"params": [p]}]
            optimizer.step()
            optimizer.param_groups, p.grad = groups, None
    model.updates["update"] = update
    return [p.register_post_accumulate_grad_hook(update) for p in params]


def clip_factor(norm, limit):
    """What gradients of a norm are multiplied by, scalars on the device: their norm is `limit` then at most."""
    return ((limit or math.inf) / (norm + 1e-6)).clamp(max=1)


def checkpoint_layers(model, share):
    """Gradient checkpointing of a share of the decoder layers, the first; False if this architecture has none."""
    if not model.lm.supports_gradient_checkpointing:
        return False
    model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(model.lm)
    for layer in layers[round(share * len(layers)):]:
        layer.gradient_checkpointing = False
    return True


def save_memory(model, s, device_type):
    """Switch on what settings s say that saves memory in a step; whether layers are checkpointed."""
    model.head_floats = 2**28 if device_type == "cpu" else 2**26  # 1 GB of logits where memory is the host's
    checkpointing = s["use_gradient_checkpointing"] and checkpoint_layers(model, s["checkpoint_share"])
    # not with checkpointing, which would lose the cache, nor compiled, where a cache has each layer compile by itself
    model.context_apart = bool(s["block_size"] and s["use_lora"] and not s["compile_model"] and not checkpointing)
    return checkpointing


def set_up(model, s, place):
    """Switch on, as settings s say, what saves time or memory and changes no loss."""
    embedding, head = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    if place.type == "cpu" and head is not None and head.weight is embedding.weight:
        embedding.sparse = True  # its gradient joins the head's row by row, not by another matrix of that size
    if not save_memory(model, s, place.type) and s["use_gradient_checkpointing"]:
        print("use_gradient_checkpointing: goes on without, this architecture has none")
    if s["block_size"] and place.type == "cuda":
        try:
            if getattr(model.lm.config.get_text_config(), "attention_dropout", 0):
                raise ValueError("it has attention dropout")
            model.lm.set_attn_implementation("flex_attention")
        except ValueError as error:
            print(f"block_size: attention by a mask tensor, this model has no flex_attention: {first_line(error)}")
    if s["compile_model"]:
        compile_layers(model)


def lr_factor(step, steps, warmup, schedule):
    """Share of the peak rate at a step of a stage: linear warm-up, then down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    u = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * u), "linear": 1 - u, "constant": 1.0}[schedule]


def pick_device(name):
    """torch.device; "auto" is the best there is. UserError with what torch sees, and why, if a named one is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("only cuda, mps and cpu will do")
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        sees = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
        sees += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"device: '{name}' is not there; torch {torch.__version__} for CUDA {torch.version.cuda} "
                        f"sees {', '.join(sees)}: {first_line(error)}") from None


def pick_autocast(device, name, cache=True):
    """The autocast context of a dtype, off for float32; float16 on a CPU becomes float32, with a line.

    cache: keep what weights it has cast to the end of the context. Not for a step, which hardly needs one twice, but
    would hold them all.
    """
    if device.type == "cpu" and name == "float16":
        if cache:
            print("dtype: float16 on a CPU becomes float32", file=sys.stderr)
        name = "float32"
    return torch.autocast(device.type, getattr(torch, name), enabled=name != "float32", cache_enabled=cache)


def pick_scaler(device, name):
    """The loss scaler of a dtype: on for float16, which a CPU does without, else it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=name == "float16" and device.type != "cpu")


def memory_gb(device):
    """Peak memory of this process on the device (on a CPU its resident memory), and the device's own, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9, torch.cuda.get_device_properties(device).total_memory / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9, torch.mps.recommended_max_memory() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, total / 1e9


def usable_gb(device, wanted):
    """How much memory a run may use, GB: wanted, which is a cap on CUDA then; 0: the device's, less 3."""
    whole = memory_gb(device)[1]
    if device.type == "cuda" and wanted:
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / whole), device)
    return wanted or max(whole - 3, whole / 2)


def halving_when_out_of_memory(state, device, work, *args):
    """work(*args, state["micro_batch"]), which is halved as often as memory runs out; at 1 the error stands."""
    while True:
        try:
            return work(*args, state["micro_batch"])
        except RuntimeError as error:
            if not out_of_memory(error) or state["micro_batch"] == 1:
                raise
        # past the except, whose traceback held the tensors
        state["micro_batch"] //= 2
        tqdm.write(f"out of memory: {state['micro_batch']} windows at a time from here on, the effective batch stays")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def compile_layers(model):
    """torch.compile each decoder layer in place: a graph a mode, in seconds, and no wrapper in any name."""
    try:  # what a machine without a compiler lacks shows here, not in the first step
        torch.compile(torch.sin)(torch.ones(8, device=model.mask_embedding.device))
    except RuntimeError as error:
        print(f"compile_model: goes on without, as torch.compile does not work here: {first_line(error)}")
        return
    for layer in decoder_layers(model.lm):
        layer.compile()


# ----------------------------------------------------------------------------------------------------------------------
# Memory, on paper: the real step of the real model on tensors that have a shape and no content
MEANS = ("optimizer_in_backward", "use_8bit_adam", "use_gradient_checkpointing", "checkpoint_share", "batch_size",
         "gradient_accumulation_steps", "use_lora")
# what estimate() has found, by all that it depends on
estimates = {}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made within, by what they are for, for as long as they live.

    large: activations in blocks that malloc takes from the system, and gives back to it.
    """

    def __init__(self, model):
        super().__init__()
        self.what, self.live, self.peak = "activations", Counter(), Counter()
        self.known = {p.untyped_storage()._cdata: None for p in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                what = "large" if self.what == "activations" and storage.nbytes() >= 2**25 else self.what
                self.known[storage._cdata] = [what, storage.nbytes()]
                self.add(what, storage.nbytes())
                weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def add(self, what, n):
        self.live[what] += n
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def gone(self, key):
        what, n = self.known.pop(key)
        self.live[what] -= n

    def is_gradient(self, p):
        """Say so of what p has got."""
        entry = self.known[p.grad.untyped_storage()._cdata]
        self.live[entry[0]] -= entry[1]
        self.live["gradients"] += entry[1]
        entry[0] = "gradients"

    @contextlib.contextmanager
    def phase(self, name):
        before, self.what = self.what, "head" if name == "head" else "activations"
        try:
            yield
        finally:
            self.what = before


def on_paper(config, s, stage):
    """(mode, model, [the runs of a micro-batch]) of settings s on fake tensors: 20 steps, those with most to read last.

    config: of load_config(). stage: {diffusion, lm, distill}, the weights of its losses, and what it trains if not all.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with refused(f"model_name: architecture '{config.model_type}' cannot be estimated"), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=weights_type(s["use_lora"], device_type(s)))
        model = DiffusionLM(lm, **model_settings(s)).train()
    check_model(model, s)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it logs what it raises as well
    made = {}  # a tied weight once
    with mode:
        for named in (x for m in model.modules() for x in (m._parameters, m._buffers)):
            for name, x in named.items():
                if x is not None and x not in made:
                    y = torch.empty_like(x, device="cpu")
                    made[x] = nn.Parameter(y) if isinstance(x, nn.Parameter) else y
                named[name] = made.get(x)
    save_memory(model, s, device_type(s))
    freeze(model, stage.get("trains", "everything"))
    if device_type(s) == "cuda":  # whose fused kernels drop out without a matrix of it
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            elif isinstance(vars(m).get("attention_dropout"), float):
                m.attention_dropout = 0.0
    losses = stage["diffusion"], stage["lm"] * (not s["use_lora"]), stage["distill"]
    micro_batches, windows = [], s["batch_size"] * s["gradient_accumulation_steps"]
    for step in range(20):
        noise = draw_noise(windows, s["max_seq_length"], s["num_timesteps"], derived_seed("noise", s["seed"], 2, step),
                           s["block_size"], s["full_mask_share"])
        ids = torch.zeros(windows, s["max_seq_length"], dtype=torch.long)
        runs = runs_of(model, ids, *noise, losses, s["batch_size"])
        micro_batches += zip(*[iter(runs)] * (len(runs) // s["gradient_accumulation_steps"]), strict=True)
    return mode, model, sorted(micro_batches, key=lambda runs: sum(len(run[3]) for run in runs))


def device_type(s):
    """What kind of device settings ask for; cuda may be named where there is none, to see what it would take."""
    return pick_device("auto").type if s["device"] == "auto" else s["device"].partition(":")[0]


def estimate(config, s, stage):
    """GB at the peak of a step: weights, gradients, optimizer, activations, head; on a CPU heap and process; total.

    config, s, stage: of on_paper(). process is what this process has taken so far. Raises UserError for an architecture
    whose step depends on its data.
    """
    global phase
    key = repr((config, stage, {k: v for k, v in s.items() if k != "max_memory_gb"}))
    if key in estimates:  # a ladder comes by the same settings more than once, and some models take seconds
        return estimates[key]
    mode, model, micro_batches = on_paper(config, s, stage)
    runs = micro_batches[-1] * (1 + (s["gradient_accumulation_steps"] > 1))  # gradients add up from the second on
    live, usual = LiveBytes(model), phase
    params = [p for p in model.parameters() if p.requires_grad]

    def has_gradient(p):
        live.is_gradient(p)
        if s["optimizer_in_backward"] and model.updates["last"]:
            p.grad = None
    for p in params:
        p.register_post_accumulate_grad_hook(has_gradient)
    model.updates = {"last": False, "norms": []}
    half = s["dtype"] == "bfloat16" or s["dtype"] == "float16" and device_type(s) != "cpu"
    amp = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)
    with refused(f"model_name: architecture '{config.model_type}' cannot be estimated"), mode, live:
        phase = live.phase
        try:
            backpropagate(model, runs, torch.amp.GradScaler("cpu", enabled=False), amp, 0)
        finally:
            phase = usual
    held = (*model.parameters(), *model.buffers())
    state = sum(8 * p.numel() if p.numel() < 4096 or not s["use_8bit_adam"] else 2 * p.numel() + p.numel() // 32
                for p in params)  # bitsandbytes keeps small ones in 32 bits, and two scales for each 256 numbers
    parts = {"weights": sum(x.numel() * x.element_size() for x in held), "gradients": 0, "optimizer": state,
             "activations": 0, "head": 0} | live.peak
    if device_type(s) == "cpu":  # malloc gives back only what is large; the rest was half as much again
        parts |= {"heap": 0.5 * parts["activations"], "process": memory_gb(torch.device("cpu"))[0] * 1e9}
    parts["activations"] += parts.pop("large", 0)
    estimates[key] = {k: v / 1e9 for k, v in (parts | {"total": sum(parts.values())}).items()}
    return estimates[key]


def ladder(config, s, stage, limit):
    """([(the means so far, GB)], whether it fits, the largest batch_size): what to switch on to stay below limit GB.

    From none of MEANS on, those that cost least first; one that saves nothing is left out.
    """
    s = s | {"optimizer_in_backward": False, "use_8bit_adam": False, "use_gradient_checkpointing": False,
             "checkpoint_share": 1.0}
    rungs = [{"optimizer_in_backward": True}] * (s["dtype"] != "float16") + [{"use_8bit_adam": True}]
    rungs += [{"use_gradient_checkpointing": True, "checkpoint_share": share} for share in (0.25, 0.5, 0.75, 1.0)]
    size, steps = s["batch_size"], s["gradient_accumulation_steps"]
    while size % 2 == 0:
        size, steps = size // 2, steps * 2
        rungs.append({"batch_size": size, "gradient_accumulation_steps": steps})
    rungs += [{"use_lora": True}] * bool(not s["use_lora"] and stage["diffusion"])  # the last, as it is another thing
    total = estimate(config, s, stage)["total"]
    climbed = [({}, total)]
    for rung in rungs:
        if total <= limit:
            break
        new = estimate(config, s | rung, stage)["total"]
        if new < 0.99 * total:
            s, total = s | rung, new
            climbed.append((climbed[-1][0] | rung, total))
    largest, below, above = 0, 0.0, estimate(config, s | {"batch_size": 1}, stage)["total"]
    while above <= limit and largest < 512:  # doubled until it does not fit; between two that do and do not, a line
        largest, below = max(1, 2 * largest), above
        above = estimate(config, s | {"batch_size": 2 * largest}, stage)["total"]
    if above > limit and largest:
        largest += math.floor(largest * (limit - below) / (above - below))
    return climbed, total <= limit, largest


def print_memory(config, s, limit):
    """What estimate() and ladder() find for all stages of a run, printed: (GB by part, climbed, fits, largest)."""
    stage = all_losses(make_stages(1, 1, 0))
    parts, (climbed, fits, largest) = estimate(config, s, stage), ladder(config, s, stage, limit)
    print("memory, estimated as set: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v) + " GB")
    for means, total in climbed:
        print(f"{total:8.2f} GB  {' '.join(f'--{k}={v}' for k, v in means.items()) or 'with no means to save any'}")
    print(f"{'fits' if fits else 'does not fit'} {limit:.1f} GB (max_memory_gb); largest batch_size so: {largest}")
    return parts, climbed, fits, largest


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints, log
@torch.no_grad()
def evaluate(model, windows, text_bytes, amp, noise_seed, micro_batch):
    """On windows (n, T) with fixed noise, the model in eval mode: eval_nelbo (nats a token), eval_bpb, ..., ar_ppl."""
    ids = torch.from_numpy(windows.astype(np.int64))
    t, noise = draw_noise(*ids.shape, model.num_timesteps, noise_seed, model.block_size)

    def loss(run):
        with amp:
            return model.loss(*run)
    nelbo, causal = (sum(map(loss, runs_of(model, ids, t, noise, weights, micro_batch))).item()
                     for weights in ((1, 0), (0, 1)))
    bits = nelbo * (ids[:, int(model.logit_shift):] >= 0).sum().item() / math.log(2)
    return {"eval_nelbo": nelbo, "eval_ppl_bound": math.exp(min(nelbo, 700)), "eval_bpb": bits / max(1, text_bytes),
            "ar_ppl": math.exp(min(causal, 700))}


def canvas(model, tokenizer, prompt, new_tokens):
    """The ids of a prompt that new_tokens masks fit behind; an empty one starts a document, after an end of text.

    UserError if that is longer than the model can be.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id or 0]
    length = len(ids) + new_tokens
    if model.block_size:
        length = len(ids) + math.ceil(new_tokens / model.block_size) * model.block_size
    if length > model.positions:
        raise UserError(f"the prompt and what follows have {length} tokens, the model has {model.positions} positions")
    return ids


def checksums(folder):
    """The lines of SHA256SUMS, as sha256sum writes and checks them."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.name != "SHA256SUMS" and p.is_file()):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
    return "".join(lines)


def is_whole(folder):
    """Whether all that save_folder wrote into a checkpoint is there as it wrote it; other files don't matter."""
    try:
        wanted = (folder / "SHA256SUMS").read_text().splitlines()
        resumable = any(line.endswith("  training.pt") for line in wanted)  # final/ is not
        return resumable and set(wanted) <= set(checksums(folder).splitlines())
    except (OSError, ValueError):  # gone, or not text
        return False


def save_folder(path, model, tokenizer, record, training=None):
    """Write a plain Hugging Face folder with what is ours beside it, completely or not at all.

    training: the optimizer and scaler, for a checkpoint. Failure if the disk refuses; earlier folders stay whole.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with model.as_it_came() as lm:
            lm.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file, tensors in OUR_FILES.items():
            if state := tensors(model):
                (temporary / file).parent.mkdir(exist_ok=True)
                save_file({k: v.detach().contiguous() for k, v in state.items()}, temporary / file, {"format": "pt"})
        if model.adapters:
            model.lora_config.save_pretrained(temporary / "adapter")
        (temporary / "diffusion.json").write_text(json.dumps(record, indent=1))
        if training:
            torch.save(training, temporary / "training.pt")
        (temporary / "SHA256SUMS").write_text(checksums(temporary))
        for p in (*temporary.rglob("*"), temporary, path.parent):
            handle = os.open(p, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # tokenizers raises no other type when the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise Failure(f"cannot save {path} (is the disk full?): {first_line(error)}; earlier ones are whole") from None


def checkpoints(out):
    """The checkpoints of a run, newest first."""
    found = [p for p in out.glob("checkpoint_*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]), reverse=True)


def start_wandb(run_id, settings):
    """A run of Weights & Biases, continued if it has an id; None, with a line, if the service cannot be reached."""
    try:
        import wandb
    except ImportError:
        raise UserError("use_wandb: the package is not installed: pip install wandb") from None
    try:
        return wandb.init(project=settings["wandb_project"], id=run_id or None, resume="allow", config=settings)
    except (wandb.Error, OSError) as error:
        print(f"use_wandb: goes on without: {first_line(error)}")


def describe(model, moved, windows, held, meta, stages, per_step):
    """Print what is about to run, so that nothing derived stays hidden."""
    c, size = model.lm.config.get_text_config(), sum(p.numel() for p in model.parameters())
    layers, width, heads = (getattr(c, k, "?") for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    print(f"model: {c.model_type}, {layers} layers, hidden size {width}, {heads} heads, {size:,} parameters, attention "
          f"{c._attn_implementation}")
    print(f"probe: the last token moves position 0 by {moved[0]:.0e} when causal, {moved[1]:.0e} when bidirectional")
    print(f"data: {len(windows):,} training windows of {windows.shape[1]} tokens, {len(held):,} held out; "
          f"{meta['near_duplicates_left_out']} near-duplicates left out, "
          f"{meta['held_out_share_in_training']:.1%} of the held-out text also stands in training")
    own = max(s["own"] for s in stages)
    print(f"step: {per_step} windows, {per_step * windows.shape[1]:,} tokens"
          + f"; from stage 1 on {own} of the windows are the model's own text" * bool(own) + "\n")
    print(f"{'stage':24}{'trained':>15}{'frozen':>15}{'rate':>9}{'warm-up':>9}{'steps':>9}{'tokens':>15}  loss")
    for s in (s for s in stages if s["steps"]):
        n = sum(p.numel() for p in freeze(model, s["trains"]))
        loss = " + ".join(f"{s[k]:g} {k}" for k in ("diffusion", "lm", "distill") if s[k])
        print(f"{s['name']:24}{n:15,}{size - n:15,}{s['lr_scale'] * learning_rate:9.1e}{s['warmup']:9,}{s['steps']:9,}"
              f"{s['steps'] * per_step * windows.shape[1]:15,}  {loss}", flush=True)
    print()


def check_settings():
    """UserError for settings that do not go together."""
    if not block_size and (distill_weight or full_mask_share):
        raise UserError(f"{'distill_weight' if distill_weight else 'full_mask_share'}: needs a block_size")
    if (block_size or use_lora) and not use_bidirectional_attention:
        raise UserError(f"{'block_size' if block_size else 'use_lora'}: needs use_bidirectional_attention")
    if block_size == 1:
        raise UserError("block_size: a block of 1 is the AR model; 0 for the whole window, or 2 and more")
    if not diffusion_loss_weight and (use_lora or not lm_loss_weight):
        raise UserError("diffusion_loss_weight: 0 leaves nothing to train" + " adapters on" * use_lora)
    if not set(lm_loss_stages) <= set("123"):
        raise UserError(f"lm_loss_stages: some of 1, 2 and 3 in a row, as 23, not '{lm_loss_stages}'")
    if on_policy_tokens and not diffusion_loss_weight:
        raise UserError("on_policy_tokens: its own text teaches it to draft, which diffusion_loss_weight=0 leaves out")
    if on_policy_tokens and on_policy_share == 1 and not use_lora:
        raise UserError("on_policy_share: its own text alone would cost the AR model what it knows; less than 1, as "
                        "--on_policy_share=0.25, or --use_lora, which leaves the AR model alone")
    if on_policy_tokens and on_policy_share < 1 and batch_size * gradient_accumulation_steps == 1:
        raise UserError("on_policy_share: a step of one window cannot be shared; more gradient_accumulation_steps")
    if optimizer_in_backward and dtype == "float16":
        raise UserError("optimizer_in_backward: not with float16, whose gradients are scaled; --dtype=bfloat16")
    if use_lora and stage0_epochs:
        raise UserError("use_lora: the model stays as it is, so it cannot be pre-trained; --stage0_epochs=0")
    if use_lora and stage3_epochs:
        print("use_lora: the AR model stays as it was, so stage 3 has nothing to recover: it goes on with diffusion")


def check_model(model, s):
    """UserError for windows of settings s that the model cannot take."""
    if s["block_size"] and s["max_seq_length"] % s["block_size"]:
        raise UserError(f"block_size: {s['block_size']} does not divide max_seq_length, {s['max_seq_length']}")
    if s["max_seq_length"] > model.positions:
        raise UserError(f"max_seq_length: {s['max_seq_length']}, but the model has {model.positions} positions")


def plan_memory(settings, out, limit):
    """Print what estimate() and ladder() find; with auto_memory switch on what it takes, {setting: value}.

    A run that goes on keeps what it chose at its start.
    """
    for source in [Path(checkpoint)] if checkpoint else checkpoints(out) * resume if auto_memory else []:
        if (source / "diffusion.json").is_file():
            kept = read_record(source)["settings"]
            means, fits = {k: kept.get(k, settings[k]) for k in MEANS}, True
            break
    else:
        try:
            config = load_config(model_name, model_config, byte_tokenizer() if tokenizer_name == "bytes" else None)
            _, climbed, fits, _ = print_memory(config, settings, limit)
        except UserError as error:
            if auto_memory:
                raise
            print(f"memory: not estimated: {error}")
            return {}
        means = {"optimizer_in_backward": False, "use_8bit_adam": False, "use_gradient_checkpointing": False}
        means |= climbed[-1][0]
    if not auto_memory:
        return {}
    if means.get("use_lora", use_lora) != use_lora or not fits:
        raise UserError(f"auto_memory: this does not fit {limit:.3g} GB (max_memory_gb); --use_lora trains adapters "
                        "instead of all weights, else a smaller max_seq_length or another model")
    print("auto_memory: " + " ".join(f"--{k}={v}" for k, v in means.items()))
    globals().update(means)
    return means


def find_run(out, settings):
    """(state, the checkpoint to go on from or None). UserError rather than write over a run."""
    state = {"stage": 0, "step": 0, "total": 0, "tokens": 0, "losses": [], "skipped": 0, "skipped_in_a_row": 0,
             "micro_batch": batch_size, "ar_ppl_before": None, "best_nelbo": None, "log_bytes": 0, "wandb_id": "",
             "on_policy": "", "grad_norm": 0.0}
    here = checkpoint and Path(checkpoint).absolute().parent == out.absolute()
    if not (resume and not checkpoint or here or dry_run) and (checkpoints(out) or (out / "final").exists()):
        raise UserError(f"out_dir: {out} holds a run; --resume continues it, --out_dir=... starts another")
    for source in [Path(checkpoint)] if checkpoint else checkpoints(out) if resume else []:
        if is_whole(source):
            break
        if checkpoint:
            why = "no whole checkpoint" if source.exists() else "not there"
            raise UserError(f"checkpoint: '{checkpoint}' is {why}")
        print(f"{source} is damaged: the one before it is used" + ", it is kept as damaged_..." * (not dry_run))
        if not dry_run:  # or it would count as the newest of those to keep
            source.rename(out / f"damaged_{source.name}_{time.time_ns()}")
    else:
        if resume:
            print(f"resume: no checkpoint in {out}, so from the start")
        return state, None
    record = read_record(source)
    if here and any(int(p.name[11:]) > record["state"]["total"] for p in checkpoints(out)):
        raise UserError(f"checkpoint: {out} goes on to later ones; --out_dir=... starts beside it from this one")
    no_matter = {"resume", "checkpoint", "out_dir", "dry_run", "cache_dir", "num_proc", "save_steps", "eval_steps",
                 "log_steps", "keep_checkpoints", "sample_prompt", "use_wandb", "wandb_project", "max_memory_gb",
                 "auto_memory"}
    changed = [f"{k} {record['settings'].get(k)!r} -> {v!r}" for k, v in settings.items()
               if k not in no_matter and record["settings"].get(k) != v]
    print(f"resume: {source}" + f"; no longer the run it was: {', '.join(changed)}" * bool(changed))
    state |= record["state"]
    return state | {"micro_batch": min(batch_size, state["micro_batch"])}, source


# ---- one step: data, noise and dropout are functions of (seed, stage, step), so a resume is exact --------------------
def train_step(model, optimizer, scaler, amp, stage, sources, where, state):
    """One optimizer step, of windows from sources [(windows, how many)] at where (seed, stage, step).

    Returns its loss and the norm of its gradient, (2,), still on the device: nothing here waits for that, but for an
    8-bit optimizer and a scaler. A step of which either is not finite changes no weight, but for optimizer_in_backward.
    """
    with phase("data"):
        ids = torch.cat([get_batch(windows, n, *where) for windows, n in sources if n])  # (N, T)
        t, noise = draw_noise(*ids.shape, num_timesteps, derived_seed("noise", *where),  # (N, blocks), (N, T)
                              block_size, full_mask_share)
    params, device = [p for group in optimizer.param_groups for p in group["params"]], model.mask_embedding.device
    rate = lr_factor(where[2], stage["steps"], stage["warmup"], lr_schedule)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * stage["lr_scale"] * rate
    if model.updates:
        model.updates |= {"norms": [], "clip": clip_factor(model.updates["norm"], max_grad_norm)}

    def work(micro_batch):
        runs = runs_of(model, ids, t, noise, [stage[k] for k in ("diffusion", "lm", "distill", "own")], micro_batch)
        return backpropagate(model, runs, scaler, amp, derived_seed("dropout", *where))
    loss = halving_when_out_of_memory(state, device, work)
    with phase("optimizer"):
        if model.updates:
            for p in params:
                if p.grad is not None:  # the last run did not reach it
                    model.updates["update"](p)
            norm = torch.linalg.vector_norm(torch.stack(model.updates["norms"]))
            model.updates["norm"] = torch.where(norm.isfinite(), norm, model.updates["norm"])
            return torch.stack([loss, norm])
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, max_grad_norm or math.inf)
        finite = loss.isfinite() & norm.isfinite()
        if isinstance(optimizer, torch.optim.AdamW) and not scaler.is_enabled() and device.type != "mps":
            optimizer.found_inf = 1 - finite.float()  # where it is 1 the fused kernel changes nothing
            optimizer.step()
        elif scaler.is_enabled() or finite:  # the scaler skips by itself, and lowers its scale
            scaler.step(optimizer)
        scaler.update()
        return torch.stack([loss, norm])
# ----------------------------------------------------------------------------------------------------------------------


def main(argv):
    files = configure(globals(), argv, allowed)
    settings = {k: globals()[k] for k in names_of(globals())}
    name = Path(files[0] if files else model_name.removesuffix("/final"))
    out = Path(out_dir or f"outputs/{name.stem if files else name.name}_diffusion")
    if resume and not checkpoint and (out / "final").exists():
        print(f"this run is finished: {out}/final; --out_dir=... starts another")
        return
    torch.autograd.set_detect_anomaly(debug)
    check_settings()

    # -- the machine
    place = pick_device(device)
    amp, amp_to_write = pick_autocast(place, dtype, False), pick_autocast(place, dtype)
    memory_limit = usable_gb(place, max_memory_gb)
    print(f"device: {place}, {amp.fast_dtype}, {memory_limit:.1f} GB")
    if auto_memory or dry_run:
        settings |= plan_memory(settings, out, memory_limit)
    state, source = find_run(out, settings)  # state is all that a resume needs beside weights and optimizer

    # -- model, data, stages
    torch.manual_seed(seed)
    ours = model_settings(settings)
    names = (str(source), "", "") if source else (model_name, tokenizer_name, model_config)
    model, tokenizer = load_model(*names, place.type, **ours)
    check_model(model, settings)
    model.to(place)
    start_of_sample = canvas(model, tokenizer, sample_prompt, 32)
    moved = probe(model, max_seq_length)
    corpus = read_corpus(dataset_name, dataset_config, text_column, cache_dir, bool(on_policy_tokens and use_lora))
    windows, held, meta = token_windows(tokenizer, corpus, cache_dir, num_proc or os.cpu_count(), {
        "length": max_seq_length, "max_windows": max_train_samples, "held_windows": eval_samples, "split_seed": seed})

    def bytes_of(windows):
        return sum(len(tokenizer.decode(w[w >= 0], skip_special_tokens=True).encode())
                   for w in windows[:, int(logit_shift):])

    held_bytes, own = bytes_of(held), None
    if on_policy_tokens and dry_run:
        print("on_policy_tokens: left out here, as is the time that writing takes; the steps run on the corpus instead")
        own = np.asarray(windows, np.int32)
        own = np.where(np.arange(max_seq_length) < max_seq_length // 4, own, np.maximum(own, ~own))  # answers too
    per_step = batch_size * gradient_accumulation_steps
    stages = make_stages(len(windows), per_step, min(max_steps or 20, 20) if debug else max_steps)
    total_steps = sum(s["steps"] for s in stages)
    pretraining_steps = stages[0]["steps"]
    describe(model, moved, windows, held, meta, stages, per_step)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in freeze(model, "everything"))
    disk = weights + (weights + trained * (2 if use_8bit_adam else 8)) * (keep_checkpoints + 1 - len(checkpoints(out)))
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if disk > free:
        raise UserError(f"out_dir: {free / 1e9:.1f} GB of disk are free, but keep_checkpoints={keep_checkpoints}, one "
                        f"more and final/ need {disk / 1e9:.1f}")
    set_up(model, settings, place)
    model.train()

    # -- the log
    if not dry_run:
        out.mkdir(parents=True, exist_ok=True)
        log_file = open(out / "training_logs.jsonl", "a")
        try:
            fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
        except BlockingIOError:
            raise UserError(f"out_dir: another run is writing to {out}; --out_dir=... starts beside it") from None
        for left_over in (*out.glob(".checkpoint_*.tmp"), *out.glob(".final.tmp")):  # of a save that was killed
            shutil.rmtree(left_over)
        if not source and log_file.tell():
            shutil.copy(log_file.name, f"{log_file.name}.{time.time_ns()}")  # of a run that has no checkpoint
        log_file.truncate(min(state["log_bytes"], log_file.tell()))  # what came after the checkpoint comes again
    wandb_run = start_wandb(state["wandb_id"], settings) if use_wandb and not dry_run else None
    if wandb_run:
        state["wandb_id"] = wandb_run.id
    bar = tqdm(total=total_steps, initial=state["total"], unit="step", disable=True if dry_run else None)

    def log(row):
        row = {"stage": stage["name"], "step": state["total"]} | row
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        log_file.write(json.dumps(finite) + "\n")
        log_file.flush()
        if wandb_run:
            wandb_run.log(row, step=state["total"])

    def progress():
        return f"stage {stage['name'][0]}  step {state['total']:6}/{total_steps}"

    def save(name, training=None):
        state["log_bytes"] = log_file.tell()
        save_folder(out / name, model, tokenizer, {
            "model": ours, "max_seq_length": max_seq_length, "state": state, "settings": settings,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}, training)
        for old in checkpoints(out)[keep_checkpoints:]:
            shutil.rmtree(old)

    def eagerly():  # what has other shapes than a step
        return torch.compiler.set_stance("force_eager") if compile_model else contextlib.nullcontext()

    def answers(prompts, tokens):
        with amp_to_write, eagerly():
            return halving_when_out_of_memory({"micro_batch": 32}, place, on_policy_windows, model, tokenizer, prompts,
                                              tokens, dtype, cache_dir, state["on_policy"])

    def evaluation(micro_batch):
        with eagerly():
            model.eval()
            row = evaluate(model, held, held_bytes, amp, derived_seed(seed, "evaluation"), micro_batch)
            with amp_to_write:
                (text, *_), *_ = write(model, [start_of_sample], 32, 32)
            model.train()
        if state["total"] <= pretraining_steps:
            state["ar_ppl_before"] = row["ar_ppl"]  # with no position masked this is still the untouched model
            state["best_nelbo"] = None  # AR pre-training is not about it
        row |= {"ar_ppl_before": state["ar_ppl_before"], "sample": tokenizer.decode(text)}
        log(row)
        tqdm.write(f"{progress()}  eval_nelbo {row['eval_nelbo']:.4f}  eval_bpb {row['eval_bpb']:.3f}  "
                   f"ar_ppl {row['ar_ppl']:.3f} (before: {row['ar_ppl_before']:.3f})  {row['sample']!r}")
        best = state["best_nelbo"] or math.inf
        if row["eval_nelbo"] > 1.1 * best:
            tqdm.write(f"warning: eval_nelbo is well above its best, {best:.4f}: try a lower learning_rate")
        state["best_nelbo"] = min(row["eval_nelbo"], best)

    signals, writes = [], False

    def on_signal(number, frame):
        if writes:
            os.write(2, b"\nstopped; what it has written so far is kept, the same command with --resume goes on\n")
        if signals or writes:  # the second time at once
            sys.exit(128 + number)
        signals.append(number)
        os.write(2, b"\nstopping: saves a checkpoint after this step or evaluation; once more stops at once, without\n")
    for number in (signal.SIGINT, signal.SIGTERM) if not dry_run else ():
        signal.signal(number, on_signal)

    # -- the loop
    training, seconds, warned, pending, hooks = None, [], False, [], []
    if source and not dry_run:
        training = torch.load(source / "training.pt", weights_only=True, map_location="cpu")
        if any(read_record(source)["settings"][k] != settings[k] for k in ("use_8bit_adam", "dtype")):
            print("resume: the optimizer starts anew, as use_8bit_adam or dtype is another")
            training = None
    if dry_run:
        state |= {"stage": 0, "step": 0}  # times each stage from its start
    for number in range(state["stage"], len(stages)):
        stage = stages[number]
        if not stage["steps"]:  # its step and its optimizer, if it had begun before, are not the next stage's
            state["step"], training = 0, None
            continue
        state["stage"] = number
        if stage["own"] and own is None:
            if signals:
                sys.exit(128 + signals[0])
            writes = True
            own = answers(windows, on_policy_tokens)
            if on_policy_share == 1:  # nothing is learned from the data, so nothing is measured on it
                held = answers(held, 0)
                held_bytes = bytes_of(held)
            if not use_lora:  # a model that stays as it is writes the same at a resume
                state["on_policy"] = Path(own.filename).name
            writes = False
        params = freeze(model, stage["trains"])
        optimizer = make_optimizer(params, learning_rate, (beta1, beta2), weight_decay, use_8bit_adam, place)
        for hook in hooks:
            hook.remove()
        hooks = update_in_backward(model, params, optimizer, state["grad_norm"]) if optimizer_in_backward else []
        scaler = pick_scaler(place, dtype)
        if training:
            optimizer.load_state_dict(training["optimizer"])
            scaler.load_state_dict(training["scaler"])
            training = None
        steps = min(3, stage["steps"]) if dry_run else stage["steps"]
        while state["step"] < steps:
            if not dry_run and (state["step"] == 0 or state["total"] % eval_steps == 0):
                halving_when_out_of_memory(state, place, evaluation)

            start = time.perf_counter()
            sources = (own, stage["own"]), (windows, per_step - stage["own"])
            pending.append(train_step(model, optimizer, scaler, amp, stage, sources, (seed, number, state["step"]),
                                      state))
            state |= {"step": state["step"] + 1, "total": state["total"] + 1,
                      "tokens": state["tokens"] + per_step * max_seq_length}
            bar.update()
            last = state["step"] == steps
            stop = bool(signals)
            due = last or stop or debug or dry_run or any(
                n and state["total"] % n == 0 for n in (log_steps, eval_steps, save_steps))
            if due:  # waits for the device, so not at each step
                for n, (loss, grad_norm) in enumerate(torch.stack(pending).tolist(), 1 - len(pending)):
                    finite = math.isfinite(loss) and math.isfinite(grad_norm)
                    state |= {"losses": state["losses"] + [loss] * finite, "skipped": state["skipped"] + (not finite),
                              "grad_norm": grad_norm if math.isfinite(grad_norm) else state["grad_norm"],
                              "skipped_in_a_row": 0 if finite else state["skipped_in_a_row"] + 1}
                    if debug:
                        tqdm.write(f"step {state['total'] + n}: loss {loss}, grad_norm {grad_norm}")
                    if not finite:
                        tqdm.write(f"warning: step {state['total'] + n} skipped: loss {loss}, grad_norm {grad_norm}")
                        if debug or state["skipped_in_a_row"] == 10:
                            raise Failure(f"{state['skipped_in_a_row']} steps in a row were not finite; try a lower "
                                          "learning_rate, or dtype bfloat16 or float32")
                pending = []
            seconds.append(time.perf_counter() - start)
            memory = memory_gb(place)[0]
            if memory > 0.9 * memory_limit and not warned:
                warned = True
                tqdm.write(f"warning: {memory:.1f} GB in use, more than 90 % of {memory_limit:.1f} (max_memory_gb)")
            if not dry_run and (last or state["total"] % log_steps == 0):
                row = {"loss": statistics.fmean(state["losses"] or [math.nan]), "lr": optimizer.param_groups[0]["lr"],
                       "grad_norm": grad_norm if finite else math.nan, "tokens": state["tokens"],
                       "tokens_per_s": round(per_step * max_seq_length / statistics.fmean(seconds)),
                       "memory_gb": round(memory, 2)}
                log(row)
                left = timedelta(seconds=round((total_steps - state["total"]) * statistics.fmean(seconds)))
                tqdm.write(f"{progress()}  loss {row['loss']:8.4f}  lr {row['lr']:.2e}  norm {grad_norm:7.3f}  "
                           f"{row['tokens_per_s']:8,} tokens/s  {memory:5.1f} GB  left {left}")
                state["losses"], seconds = [], []
            if not dry_run and (last or stop or save_steps and state["total"] % save_steps == 0):
                save(f"checkpoint_{state['total']}",
                     {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
            if stop:
                bar.close()
                again = shlex.join(["python", *sys.argv, *["--resume"] * ("--resume" not in sys.argv)])
                print(f"stopped by {signal.Signals(signals[0]).name}; go on with: {again}")
                sys.exit(128 + signals[0])
        if dry_run:
            print(f"stage {stage['name']}: {statistics.median(seconds):.2f} s a step, "
                  f"{statistics.median(seconds) * stage['steps'] / 3600:.2f} hours")
            seconds = []
        state["stage"], state["step"] = number + 1, 0
    bar.close()
    if dry_run:
        print(f"memory: {memory_gb(place)[0]:.1f} GB at its peak on {place}, of {memory_limit:.1f}; on the host "
              f"{memory_gb(torch.device('cpu'))[0]:.1f} GB; disk: {disk / 1e9:.1f} GB")
        return
    halving_when_out_of_memory(state, place, evaluation)
    save("final")
    print(f"done: {out}/final; write with it: python sample.py --out_dir={out}")


if __name__ == "__main__":
    run(main)
