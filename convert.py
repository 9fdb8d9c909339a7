"""Turn a pre-trained autoregressive (AR) language model into a masked-diffusion language model.

  python convert.py config/tiny.py                         # a laptop, 4 minutes, no download
  python convert.py config/phi2.py config/single_a6000.py  # Phi-2 on one 48 GB card
  python convert.py config/phi2.py --dry_run               # what it costs: hours, memory, disk
  python convert.py config/phi2.py --resume                # continue after a kill, bit for bit
  torchrun --nproc_per_node=2 convert.py config/phi2.py    # on two cards
  python convert.py --model_name=./my_model --dataset_name=my_text.txt --batch_size=4

Config files and --name=value override the settings below, left to right. The result, out_dir/final,
is a plain Hugging Face folder (the AR model) with diffusion.safetensors and diffusion.json beside
it; sample.py generates text with it. The method is told from here to main(); what supports it is in
corpus.py, bpe.py, own_text.py, model_files.py, runs.py, terminal.py, probe.py, replay.py,
machine.py and processes.py, and after main().
"""
import contextlib
import copy
import functools
import math
import os
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # transformers reads it when imported
# torch's threads wait for one another by spinning, for so many rounds; by default for long, which
# makes a run beside one other busy process ten times slower. libgomp reads it when imported
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import DynamicCache

import processes
import runs
from bpe import tokenizer_of
from configurator import UserError, configure, errors_as, out_of_memory, run, settings_in
from corpus import encode_prompt, end_ids, end_of, get_batch, load_data, seed_for
from machine import (
    checkpoint_layers, choose_parallel, eagerly, leave, pick_device, set_up_device, set_up_model,
    stop_on_signal)
from model_files import base_dtype, load_base, load_hf, our_tensors, reference, resolve_model
from own_text import write_own_text
from probe import attention_modules, layers_to_adapt, probe, rounding
from replay import text_after
from runs import (
    check_disk, check_settings, cut_back, find_checkpoint, load_training, open_log, save,
    try_to_save)
from terminal import LOSSES, log_evaluation, log_step, print_plan

# ----------------------------------------------------------------------------------------------
# model
model_name = "openai-community/gpt2"  # hub name, folder, .gguf file, or an earlier run's final/
model_config = ""  # JSON of a Hugging Face config: random weights, to be trained in stage 0
tokenizer_name = ""  # "": the model's own; bytes; bpe, trained on the data; a hub name or folder
use_bidirectional_attention = True  # False: attention stays causal, for ablations
use_time_embedding = True  # tell masked positions how noisy their window or block is
block_size = 0  # tokens per block of block diffusion; 0: the whole window is one block
# adapters
use_lora = False  # freeze the model (bfloat16 on CUDA), train LoRA adapters for diffusion alone
lora_rank = 32  # rank of each LoRA adapter
lora_alpha = 64.0  # the adapter's output is scaled by lora_alpha / lora_rank
lora_dropout = 0.0  # dropout on the adapter's input
load_in_4bit = False  # the frozen model in 4 bits (QLoRA): half a byte per parameter, not 2
lora_targets = "auto"  # auto: all linear layers; attention: its own; or names, comma-separated
# data
dataset_name = "Salesforce/wikitext"  # hub name, pydoc, world, .txt .jsonl .json .csv .parquet
dataset_config = "wikitext-103-raw-v1"  # configuration of a hub data set; "": its default
dataset_split = "train"  # split to train on, as train_sft; test splits are left alone
text_column = "text"  # column with the text; a table of messages or prompts is chat data
on_policy_tokens = 0  # train on this many tokens or more that the AR model writes; 0: none
own_prompts = 0  # so many further prompts for this text, written by a chat model itself
on_policy_share = 1.0  # share of on-policy windows in a step; below 1 unless use_lora
cache_dir = "model_cache"  # tokenised data is kept here and reused
max_seq_length = 512  # tokens in a window
max_train_samples = 50000  # windows at most; no more text than that is tokenised
eval_samples = 128  # held-out windows
# optimizer
batch_size = 2  # windows in a micro-batch; halved when memory runs out
gradient_accumulation_steps = 16  # micro-batches in an optimizer step
learning_rate = 1e-4  # peak, times the stage's lr_scale
lr_schedule = "cosine"  # after the warm-up: cosine | linear, to zero in each stage | constant
warmup_steps = 100  # of each stage, but at most a fifth of its steps
weight_decay = 0.01  # on matrices; vectors have none
beta1 = 0.9  # AdamW
beta2 = 0.95  # AdamW; below the usual 0.999 because the loss of one step is noisy
max_grad_norm = 1.0  # 0: no clipping
use_8bit_adam = True  # bitsandbytes: 2 bytes of state per parameter, not 8; slow on a CPU
weights_dtype = "float32"  # of trained weights; bfloat16, rounded stochastically: 4 bytes less
cpu_offload = False  # optimizer states in the host's memory; with fsdp also weights, gradients
# stages
stage0_epochs = 0.0  # AR pre-training, for a model_config without weights
stage1_epochs = 2.0  # attention adaptation
stage2_epochs = 4.0  # diffusion
stage3_epochs = 2.0  # recovery of the causal ability
stage0_lr_scale = 1.0  # times learning_rate
stage1_lr_scale = 0.5  # low at first: attention has just changed
stage2_lr_scale = 1.0  # everything trains
stage3_lr_scale = 0.3  # lower: stage 3 repairs the causal ability that stage 2 damaged
lm_loss_weight = 0.5  # weight of the AR loss
lm_loss_stages = "3"  # stages with the AR loss, as 123; with a block_size it is nearly free
diffusion_loss_weight = 1.0  # weight of the diffusion loss in stages 1 to 3
distill_weight = 0.0  # blocks only: weight of the KL to the model's own AR prediction
full_mask_share = 0.0  # blocks only: share of blocks masked entirely, as when drafting
max_steps = 0  # optimizer steps of all stages together, shared out by epochs; 0: whole epochs
# diffusion
num_timesteps = 1000  # how finely the time embedding tells shares of masked tokens apart
noise_schedule = "cosine"  # cosine | linear | polynomial | sqrt
noise = "mask"  # a masked token is seen as: mask, an embedding of its own | uniform, a random token
causal_blocks = False  # a noisy token sees its block up to itself, not all of it
# machine
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "bfloat16"  # of autocast: bfloat16 | float16 | float32; see also weights_dtype
compile_model = True  # torch.compile, one decoder layer at a time
use_gradient_checkpointing = True  # a third more compute, far less activation memory
max_memory_gb = 0.0  # a cap on CUDA, and everywhere a warning at 90 %; 0: the device's less 3
parallel = ""  # under torchrun: ddp, a whole model each | fsdp, shares of one | "": what fits
rank_batch_sizes = ""  # under torchrun, instead of batch_size: of each process, as 3,1
auto_memory = False  # out of memory: checkpointing, then 8-bit Adam, then smaller micro-batches
# run
out_dir = ""  # "": outputs/<name of the config file>_diffusion
save_steps = 2500  # optimizer steps between checkpoints; 0: only at the end of each stage
eval_steps = 1000  # optimizer steps between evaluations
log_steps = 10  # optimizer steps between log lines
keep_checkpoints = 2  # newest checkpoints kept on disk
resume = False  # continue from the newest intact checkpoint of out_dir
checkpoint = ""  # continue from this checkpoint instead
sample_prompt = "The meaning of"  # continued at each evaluation
use_wandb = False  # log to Weights & Biases too; otherwise nothing leaves the machine
wandb_project = "diffusion-converter"  # project name there
dry_run = False  # time three steps per stage, print what the run would cost, write no out_dir
debug = False  # 20 steps with anomaly detection; errors of libraries keep their traceback
seed = 1337  # of data order, noise, dropout and random weights
# before files and flags change them: report.py tells what a run changed
defaults = settings_in(globals())

# a set of values, (lowest, highest), or Path, in which ~ is the home folder; any other number must
# be 0 or more
allowed = dict.fromkeys((
    "max_train_samples", "eval_samples", "batch_size", "gradient_accumulation_steps", "eval_steps",
    "log_steps", "keep_checkpoints"), (1, 10**9))
allowed |= {
    "noise_schedule": {"cosine", "linear", "polynomial", "sqrt"},
    "lr_schedule": {"cosine", "linear", "constant"},
    "dtype": {"bfloat16", "float16", "float32"}, "weights_dtype": {"bfloat16", "float32"},
    "parallel": {"", "ddp", "fsdp"}, "noise": {"mask", "uniform"},
    "learning_rate": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.999999),
    "lora_rank": (1, 10**4), "lora_dropout": (0, 0.99),
    "full_mask_share": (0, 1), "on_policy_share": (1e-6, 1),
    "out_dir": Path, "cache_dir": Path, "checkpoint": Path, "model_name": Path,
    "dataset_name": Path, "tokenizer_name": Path, "max_seq_length": (2, 10**6),
    "num_timesteps": (1, 10**6), "seed": (0, 2**31), "own_prompts": (0, 10**7),
}


# ----------------------------------------------------------------------------------------------
# Masked diffusion (MDLM, https://arxiv.org/abs/2406.07524; LLaDA,
# https://arxiv.org/abs/2502.09992): at time u a share alpha(u) of the tokens is still clean.
def alpha(u, schedule):
    """Share of tokens still clean at time u (float64 in 0..1): from 1 to 0."""
    return {
        "cosine": torch.cos(math.pi * u / 2) ** 2,  # https://arxiv.org/abs/2102.09672, eq. 17
        "linear": 1 - u,
        "polynomial": 1 - u**2,
        "sqrt": 1 - u.sqrt(),
    }[schedule]


def time_at(mask_rate, schedule):
    """The time at which this share of the tokens is masked: the inverse of 1 - alpha."""
    return {
        "cosine": mask_rate.sqrt().asin() * 2 / math.pi,
        "linear": mask_rate,
        "polynomial": mask_rate.sqrt(),
        "sqrt": mask_rate**2,
    }[schedule]


def sample_noise(n, length, noise_seed, block_size=0, full_mask_share=0.0):
    """Times u (n, n_blocks) and uniform noise (n, length), float64, on the CPU.

    One time in 0..1 per block, stratified: those of a batch cover the range evenly, which lowers
    the variance of the loss. 1 marks a block to be masked entirely.
    """
    generator = torch.Generator().manual_seed(noise_seed)
    n_blocks = length // (block_size or length)
    u = torch.randperm(n * n_blocks, generator=generator)
    u = u + torch.rand(len(u), generator=generator, dtype=torch.float64)  # one draw per stratum
    u = (u / len(u)).view(n, n_blocks) / max(1 - full_mask_share, 1e-9)
    return u.clamp(max=1), torch.rand(n, length, generator=generator, dtype=torch.float64)


def mask_tokens(x0, u, noise, maskable, mask_id, schedule):
    """The forward process: (xt, masked, weight), all (B, T). u: (B, n_blocks).

    A block with m maskable tokens gets l masks: l is (1 - alpha(u)) m, rounded up. As l has no
    noise of its own, the loss has less variance (LLaDA, eq. 6). The weight 1 / (l P(l)), with P(l)
    the probability of l, makes its mean the NELBO under any schedule. A block masked entirely
    (u = 1), as blocks are when drafting starts, weighs 1.
    """
    maskable = maskable.view(*u.shape, -1)  # (B, n_blocks, block)
    m = maskable.sum(2).clamp(min=1)
    count = (m * (1 - alpha(u, schedule))).ceil().clamp(min=1)
    rank = noise.view(maskable.shape).masked_fill(~maskable, 2).argsort(2).argsort(2)
    masked = (maskable & (rank < count[..., None])).view(x0.shape)
    probability = time_at(count / m, schedule) - time_at((count - 1) / m, schedule)
    weight = torch.where(u < 1, 1 / (count * probability), 1.0)
    weight = weight.repeat_interleave(x0.shape[1] // u.shape[1], 1)
    return x0.masked_fill(masked, mask_id), masked, weight


def timestep(mask_rate, model):
    """The timestep, 1..num_timesteps, at which this share of a window or block is masked. The time
    embedding is told it: a function of xt, so training and sampling cannot disagree."""
    u = time_at(mask_rate, model.noise_schedule)
    return (u * model.num_timesteps).ceil().long().clamp(1, model.num_timesteps)


def loss_weights(x0, u, noise, model, diffusion=1.0, ar=0.0, n_on_policy=0, schedule=None,
                 first_known=False):
    """Mask a batch, and weigh each token in each loss: (x0, xt, t, diffusion_w, ar_w).

    x0 (B, T): token ids, ~id for context that is never masked and never scored. u (B, n_blocks) and
    noise (B, T): of sample_noise(). diffusion, ar: weights of the losses. The first n_on_policy
    windows were written by the model itself and get no AR loss. schedule: instead of the model's.
    first_known: blocks keep their first token, as in sampling. Weights are divided by the tokens
    of the whole batch, so the losses of micro-batches add up to nats per token.
    """
    block = model.block_size or x0.shape[1]
    position = torch.arange(x0.shape[1])
    scored = (x0 >= 0) & (position > 0)  # nothing predicts the first token of a window
    ar_scored = scored & (torch.arange(len(x0)) >= n_on_policy)[:, None]
    x0 = torch.maximum(x0, ~x0)  # ~id back to id
    # behind the end of its text a window is filled with ends, of which the AR loss needs but one
    repeats = (x0 == model.end_id) & (x0.roll(1, 1) == model.end_id)
    ar_scored = ar_scored & ~repeats

    # 1) masks, and how much each counts in the diffusion loss
    first = bool(model.block_size) & (position % block == 0)
    maskable = scored & ~first if first_known else scored
    xt, masked, weight = mask_tokens(x0, u, noise, maskable, model.mask_id,
                                     schedule or model.noise_schedule)
    t = timestep((xt == model.mask_id).view(*u.shape, -1).double().mean(2), model)  # (B, n_blocks)
    if model.noise == "uniform":  # the upper bits of the noise chose the place, the lower the token
        xt = torch.where(masked, (noise * 2**20 % 1 * model.mask_id).long(), xt)
    per_token = diffusion / scored.sum().clamp(min=1)
    diffusion_w = masked * per_token * weight

    if model.block_size:  # the first token of a block is predicted from a clean state, so noise
        # does not matter to it: it counts 1, as a token does on average
        diffusion_w = torch.where(first, per_token * ar_scored, diffusion_w)

    # 2) the AR loss
    ar_w = ar * ar_scored / ar_scored.sum().clamp(min=1)
    return x0, xt, t, diffusion_w, ar_w


def forward_passes(batch, micro_batch, model, distill=0.0, always=()):
    """The model calls for a batch of loss_weights(), micro_batch windows at a time, as arguments of
    model.loss().

    Token i is always predicted from the hidden state at i - 1, as in the AR model ("logit shift").
    distill: weight of the KL to the AR prediction, relative to the diffusion loss; blocks only.
    always: "noisy", "clean": passes over xt or x0 come even if they predict no token.
    """
    for x0, xt, t, diffusion_w, ar_w in zip(*(x.split(micro_batch) for x in batch), strict=True):
        T = x0.shape[1]
        from_x0 = torch.arange(T) % (model.block_size or T) == 0  # by diffusion as well
        noisy_w = torch.stack([diffusion_w.masked_fill(from_x0, 0), 0 * ar_w], 2)  # (B, T, 2)
        clean_w = torch.stack([diffusion_w.masked_fill(~from_x0, 0), ar_w], 2)
        noisy = noisy_w.any(2).nonzero(as_tuple=True)  # (b, i) of each token predicted from xt
        clean = clean_w.any(2).nonzero(as_tuple=True)  # (b, i) of each token predicted from x0
        # blocks: one pass over [clean copy | noisy copy]
        if model.block_size and (len(noisy[0]) or "noisy" in always):
            both = (predictions(x0, noisy, noisy_w, 2 * T, offset=T),
                    predictions(x0, clean, clean_w, 2 * T))
            inputs = {name: torch.cat([part[name] for part in both]) for name in both[0]}
            if distill:  # the clean copy predicts the same tokens
                teachers = predictions(x0, noisy, distill * diffusion_w, 2 * T)
                inputs |= {"teacher_rows": teachers["rows"], "kl_weights": teachers["weights"]}
            ids, t = torch.cat([x0, xt], 1), torch.cat([0 * t, t], 1)
            yield {"attention": "blocks", "ids": ids, "t": t, **inputs}
            continue
        if len(noisy[0]) or "noisy" in always:
            attention = "bidirectional" if model.bidirectional else "causal"
            inputs = predictions(x0, noisy, noisy_w, T)
            yield {"attention": attention, "ids": xt, "t": t, **inputs}
        if len(clean[0]) or "clean" in always:
            inputs = predictions(x0, clean, clean_w, T)
            yield {"attention": "causal", "ids": x0, "t": 0 * t, **inputs}  # t is for masks


def predictions(x0, tokens, weights, row_length, offset=0):
    """Tokens (b, i) as targets with their weights, and the rows of the flattened hidden states,
    (B * row_length, C), that predict them."""
    b, i = tokens
    rows = b * row_length + offset + i - 1
    return {"rows": rows, "targets": x0[b, i], "weights": weights[b, i].float()}


# ----------------------------------------------------------------------------------------------
# The model. The Hugging Face model is not resized, subclassed or copied: it gets a mask embedding,
# a causal switch, and a head for chosen rows. Causal and without masks it is exactly what it was.
FOREVER = 1 << 40  # the `last` of a token that is no draft


def mask_mod(query, key, window, causal_blocks=False):
    """Whether a query sees a key; each is (position, block_id, context_end, last), broadcastable.

    It sees clean keys (block_id 0) before its context_end: for a clean query its position + 1
    (causal), for a noisy one the start of its block. last: the largest context_end that still sees
    a key; of a draft in a tree (verify.py) the end of its subtree. A sliding window limits how far
    back. It sees noisy keys of its own block, with causal_blocks up to itself. Padding: block -1.
    """
    sees_clean = (key[2] <= query[2]) & (query[2] <= key[3])
    if window:
        sees_clean = sees_clean & (query[0] - key[0] < window)
    sees_noisy = key[1] == query[1]
    if causal_blocks:
        sees_noisy = sees_noisy & (key[0] <= query[0])
    return torch.where(key[1] == 0, sees_clean, sees_noisy)


def clean_meta(length):
    """What mask_mod() asks of clean tokens from position 0 on, (4, 1, length)."""
    i = torch.arange(length)
    return torch.stack([i, 0 * i, i + 1, 0 * i + FOREVER])[:, None]


def block_meta(T, block_size):
    """What mask_mod() asks of [clean copy | noisy copy in blocks], (4, 1, 2T)."""
    i = torch.arange(T)
    noisy = [i, 1 + i // block_size, i // block_size * block_size, 0 * i + FOREVER]
    return torch.cat([clean_meta(T), torch.stack(noisy)[:, None]], 2)


def new_cache(device):
    """An empty KV cache that also holds the meta (4, B, L) of its tokens. It keeps all of them;
    with a config, Hugging Face's drops those outside a sliding window."""
    cache = DynamicCache()
    cache.meta = torch.zeros(4, 1, 0, dtype=torch.long, device=device)
    cache.hides = False  # whether some of them are not to be seen, so that a mask is needed
    return cache


def crop_cache(cache, n):
    """Drop the last n tokens of a cache."""
    cache.meta = cache.meta[:, :, :cache.meta.shape[2] - n]
    for layer in cache.layers if n else ():  # crop() differs between versions
        layer.keys = layer.keys[:, :, :layer.keys.shape[2] - n]
        layer.values = layer.values[:, :, :layer.values.shape[2] - n]


class DiffusionLM(nn.Module):
    """A masked-diffusion LM around any AutoModelForCausalLM.

    The mask token (id vocab_size) is unknown to tokenizer and head and has an embedding of its own,
    so the AR model stays exact. lora: {rank, alpha, dropout, targets}; the rest: see the settings.
    """

    def __init__(self, lm, num_timesteps, noise_schedule, use_time_embedding, bidirectional,
                 block_size=0, lora=None, noise="mask", causal_blocks=False):
        super().__init__()
        # 1) the mask token: one id past the vocabulary, so nothing in the model is resized
        self.lm, self.bidirectional, self.block_size = lm, bidirectional, block_size
        self.num_timesteps, self.noise_schedule = num_timesteps, noise_schedule
        self.noise, self.causal_blocks = noise, causal_blocks
        embedding = lm.get_input_embeddings()
        self.mask_id = embedding.weight.shape[0]
        with torch.no_grad():  # the mean of its outputs, not of its rows: some families scale them
            ids = torch.arange(self.mask_id, device=embedding.weight.device)
            total = sum(embedding(part).float().sum(0) for part in ids.split(8192))
        self.mask_embedding = nn.Parameter(total / self.mask_id)  # (C,)
        self.time_mlp = None
        if use_time_embedding:
            C = len(total)
            self.time_mlp = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
            nn.init.zeros_(self.time_mlp[2].weight)  # starts as if it were not there
            nn.init.zeros_(self.time_mlp[2].bias)

        # 2) the causal switch, and what limits a text: positions and the sliding window
        config = lm.config.get_text_config()
        self.max_positions = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.switches, self.kernel = causal_switches(lm), lm.config._attn_implementation
        windows = [causal for _, name, causal, _ in self.switches if name == "sliding_window"]
        self.window = (windows or [None])[0]

        # 3) what the methods below keep between calls
        self.base = None  # where a frozen model is from; it is not saved again
        self.runs_on = None  # the device, where shares of weights may be on the host meanwhile
        self.end_id = -1  # of the tokenizer's end of text, if it has one
        self.block_inputs = {}  # attention_inputs() of [clean | noisy], built once
        self.gate = None  # (B or 1, L, 1), 1 where adapters act; None: everywhere
        self.adapters, self.lora_config = [], None  # [(parent, name, LoRA layer)]
        self.head_floats = 2**26  # logits in a chunk of the head, 256 MB
        if lora:
            self.add_adapters(**lora)

    @property
    def device(self):
        return self.runs_on or self.mask_embedding.device

    # -- the surgery
    def set_causal(self, causal):
        """Switch attention. Not between forward and backward: checkpointing re-runs layers."""
        for owner, name, if_causal, if_bidirectional in self.switches:
            setattr(owner, name, if_causal if causal else if_bidirectional)

    def embed(self, ids, t):
        """ids (B, L), t (B, n_blocks) -> (B, L, C): masks get the mask and the time embedding."""
        masked = (ids == self.mask_id)[..., None]
        mask = self.mask_embedding
        if self.time_mlp is not None and t is not None:
            time = self.time_mlp(sinusoid(t / self.num_timesteps))  # (B, n_blocks, C)
            mask = mask + time.repeat_interleave(ids.shape[1] // t.shape[1], 1)
        tokens = self.lm.get_input_embeddings()(ids.masked_fill(masked[..., 0], 0))
        return torch.where(masked, mask.to(tokens.dtype), tokens)
    # -- end of the surgery

    def add_adapters(self, rank, alpha, dropout, targets):
        """Add LoRA (https://arxiv.org/abs/2106.09685), off in causal mode, else times the gate.

        targets: auto | attention | names, comma-separated. Raises UserError where they do not fit.
        """
        from peft import LoraConfig, inject_adapter_in_model  # slow to import
        from peft.tuners.lora import LoraLayer
        wanted = layers_to_adapt(self.lm, targets)
        self.lora_config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted,
            task_type="CAUSAL_LM", base_model_name_or_path=self.lm.name_or_path)
        with errors_as(f"lora_targets: '{targets}'"), warnings.catch_warnings(action="ignore"):
            inject_adapter_in_model(self.lora_config, self.lm)  # warns of Conv1D, then handles it
        # each adapter is gated by a hook, and switched off by peft's own flag in causal mode
        in_decoder = set(self.lm.get_decoder().modules())
        self.adapters = [(parent, name, m) for parent in self.lm.modules()
                         for name, m in parent.named_children() if isinstance(m, LoraLayer)]
        for _, name, m in self.adapters:
            if "default" not in m.lora_B or m not in in_decoder:
                raise UserError(f"lora_targets: '{name}' is no linear layer of the decoder")
            m.lora_B["default"].register_forward_hook(self.apply_gate)
            self.switches.append((m, "_disable_adapters", True, False))
        for p in self.adapter_state().values():
            p.data = p.data.float()  # trained, so in float32 whatever the base is in

    def apply_gate(self, module, args, output):
        """The hook on each adapter: its output is 0 where the gate, (B or 1, L, 1), is 0."""
        gate = self.gate
        if gate is None:
            return output
        if output.dim() == 2:  # some layers flatten their tokens
            gate = gate.expand(len(output) // gate.shape[1], -1, -1).reshape(-1, 1)
        return output * gate

    def diffusion_state(self):
        """The mask and the time embedding, by name: what is trained beside the AR model."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("lm.")}

    def adapter_state(self):
        """The adapters' parameters, by the names that peft gives them in its files."""
        return {f"base_model.model.{name.replace('.default', '')}": p
                for name, p in self.lm.named_parameters() if "lora_" in name}

    @contextlib.contextmanager
    def original_model(self):
        """The Hugging Face model in its original form, causal and without adapters, to save or to
        write with. Saved in bidirectional mode, it would reload as not causal."""
        self.set_causal(True)
        with self.attention(self.kernel):
            for parent, name, m in self.adapters:
                setattr(parent, name, m.base_layer)
            try:
                yield self.lm
            finally:
                for parent, name, m in self.adapters:
                    setattr(parent, name, m)

    @contextlib.contextmanager
    def attention(self, kernel):
        """The model with another attention kernel, by the name that Hugging Face gives it."""
        before = self.lm.config._attn_implementation
        if kernel != before:
            self.lm.set_attn_implementation(kernel)
        try:
            yield
        finally:
            if kernel != before:
                self.lm.set_attn_implementation(before)

    def attention_inputs(self, meta, cache=None):
        """Position ids, attention mask, adapter gate and cache of hidden(), for tokens at meta
        (4, B or 1, L). They also attend to the tokens of a cache, and are added to it."""
        keys, kernel = meta, self.lm.config._attn_implementation  # (4, B, keys)
        if cache is not None:
            keys = cache.meta = torch.cat([cache.meta.expand(-1, meta.shape[1], -1), meta], 2)

        def make_mask(window):
            if kernel == "flex_attention":
                B, queries, all_keys = meta.shape[1], meta.unbind(), keys.unbind()

                causal = self.causal_blocks

                def pair(b, h, q, k):  # compiled, so it indexes with tensors only
                    b = b * (B > 1)  # one row of meta serves every text
                    query, key = [x[b, q] for x in queries], [x[b, k] for x in all_keys]
                    return mask_mod(query, key, window, causal)
                return create_block_mask(pair, B, None, meta.shape[2], keys.shape[2], meta.device)
            mask = mask_mod(meta[..., None], keys[:, :, None], window, self.causal_blocks)
            mask = mask[:, None]  # (B, 1, L, keys)
            if kernel != "eager":
                return mask
            scores = torch.zeros_like(mask, dtype=torch.float32)  # what eager attention adds
            return scores.masked_fill(~mask, torch.finfo(torch.float32).min)

        mask = make_mask(self.window)
        layer_types = getattr(self.lm.config, "layer_types", None) or ()
        if self.window and "sliding_attention" in layer_types:  # only some layers have the window
            mask = {"full_attention": make_mask(None), "sliding_attention": mask}
        gate = (meta[1] > 0)[..., None] if self.adapters else None  # noisy tokens alone
        return {"position_ids": meta[0], "attention_mask": mask, "gate": gate, "cache": cache}

    def hidden(self, ids, t, gate=None, cache=None, **kwargs):
        """The decoder's output, as head() needs it, and the hidden states in it (B, L, C)."""
        if self.noise == "uniform":  # when sampling: loss_weights() left no mask
            ids = torch.where(ids == self.mask_id, torch.randint_like(ids, self.mask_id), ids)
        self.gate = gate  # read by the hooks of the adapters, also when layers are re-run
        output = self.lm.get_decoder()(
            inputs_embeds=self.embed(ids, t), past_key_values=cache, use_cache=cache is not None,
            **kwargs)
        return output, output[0]

    def hidden_of_blocks(self, ids, t):
        """hidden() of [clean copy | noisy copy]: ids (B, 2T), t (B, 2 n_blocks)."""
        T = ids.shape[1] // 2
        key = T, self.block_size, self.lm.config._attn_implementation
        if key not in self.block_inputs:
            meta = block_meta(T, self.block_size).to(ids.device)
            self.block_inputs[key] = self.attention_inputs(meta)
        self.set_causal(False)  # the mask says who attends to whom
        return self.hidden(ids, t, **self.block_inputs[key])

    def head(self, output, states):
        """Logits of hidden states (.., N, C), by the model's own forward with its decoder's result
        replaced: scaling, soft-capping and bias are right in every family, for N rows alone."""
        decoder, output = self.lm.get_decoder(), copy.copy(output)
        output.last_hidden_state = states
        decoder.forward = lambda *args, **kwargs: output
        try:
            return self.lm(inputs_embeds=states, use_cache=False).logits
        finally:
            del decoder.forward

    def forward(self, ids, t=None, rows=None, **kwargs):
        """Logits (B, L, V), or (N, V) of rows of the flattened hidden states. ids: (B, L); t:
        (B, n_blocks) in 1..num_timesteps, for masks; kwargs: of attention_inputs()."""
        output, states = self.hidden(ids, t, **kwargs)
        if rows is None:
            return self.head(output, states)
        return self.head(output, states.flatten(0, 1)[rows][None])[0]

    def loss(self, attention, ids, t, rows, targets, weights, teacher_rows=None, kl_weights=None):
        """The weighted losses (N, 3) of one pass of forward_passes(), to be summed: diffusion,
        AR, distillation.

        rows (N,) of the flattened hidden states predict targets (N,), whose weights (N, 2) are
        those in the diffusion and in the AR loss. The first M also get a KL, times kl_weights
        (M,), to the AR prediction at teacher_rows (M,), which gets no gradient.
        """
        with record_function("data"):  # names the parts in a profile, and for bench.py
            if teacher_rows is None:
                teacher_rows, kl_weights = rows[:0], weights[:0, 0]
            tensors = ids, t, rows, targets, weights, teacher_rows, kl_weights
            if self.device.type == "cuda" and ids.device.type == "cpu":  # FSDP has moved them
                # from pinned memory the copies do not wait
                tensors = [x.pin_memory() for x in tensors]
            tensors = [x.to(self.device, non_blocking=True) for x in tensors]
            ids, t, rows, targets, weights, teacher_rows, kl_weights = tensors
        with record_function("forward"):
            if attention == "blocks":
                output, states = self.hidden_of_blocks(ids, t)
            else:
                self.set_causal(attention == "causal")
                output, states = self.hidden(ids, t)
            states = states.flatten(0, 1)  # (B * L, C)

        def chunk_loss(states, targets, weights, teacher_states, kl_weights):
            logits = self.head(output, states[None])[0].float()  # (N, V), softmax in float32
            losses = F.cross_entropy(logits, targets, reduction="none")[:, None] * weights
            if not len(kl_weights):
                return F.pad(losses, (0, 1))
            with torch.no_grad():  # the AR mode teaches, and is not bent towards the drafts
                teacher = self.head(output, teacher_states[None])[0].float().log_softmax(-1)
            student = logits[:len(teacher)].log_softmax(-1)
            kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
            kl = F.pad(kl * kl_weights, (0, len(losses) - len(kl)))
            return torch.cat([losses, kl[:, None]], 1)

        with record_function("head"):
            parts = states[rows], targets, weights, states[teacher_rows].detach(), kl_weights
            size = max(1, self.head_floats // self.mask_id)
            if len(rows) <= size:
                return chunk_loss(*parts)
            chunks = [[part[i:i + size] for part in parts] for i in range(0, len(rows), size)]
            # recomputed in the backward pass: the logits of one chunk exist at a time
            return torch.cat([recompute(chunk_loss, *chunk, use_reentrant=False)
                              for chunk in chunks])


def sinusoid(u):
    """u (B, n) in 0..1 -> (B, n, 256) sines and cosines (https://arxiv.org/abs/1706.03762, 3.5)."""
    frequencies = torch.exp(torch.arange(128, device=u.device) * (-math.log(10000) / 128))
    angles = 1000 * u[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def causal_switches(lm):
    """[(owner, attribute, value if causal, value if bidirectional)] in the configs and modules.

    Some families ask their config, some each attention module, so all are set. A sliding window
    becomes one that nothing reaches past. Bidirectional SDPA gets no mask tensor: the flash path.
    """
    modules = list(lm.modules())  # of all kinds, as families differ in who has the attribute
    configs = list({id(m.config): m.config for m in modules if "config" in vars(m)}.values())
    asked = configs + [m for m in modules if vars(m).get("is_causal") is True]
    switches = [(owner, "is_causal", True, False) for owner in asked]
    for owner in configs + modules:
        window = vars(owner).get("sliding_window")
        if isinstance(window, int) and window > 0:
            switches.append((owner, "sliding_window", window, 1 << 30))
    return switches


# ----------------------------------------------------------------------------------------------
# The sampler: from masks to text
def logits_to_probs(logits, temperature=0.0, top_k=0, top_p=1.0):
    """The distribution (N, V) to draw from: temperature 0 is the most likely token alone, top_k the
    k most likely, top_p the fewest that hold this share (https://arxiv.org/abs/1904.09751)."""
    if not temperature:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1)
    logits = logits - logits.max(-1, keepdim=True).values  # at most 0: no overflow
    logits = logits / max(temperature, 1e-6)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        drop = probs.cumsum(-1) - probs >= top_p  # never the first
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    return logits.softmax(-1)


def sample_token(logits, sampling=None, generator=None):
    """A token (N,) for each row of logits (N, V); sampling: arguments of logits_to_probs()."""
    if not sampling or not sampling.get("temperature"):
        return logits.argmax(-1)
    probs = logits_to_probs(logits.float(), **sampling)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def top_positions(scores, among, count):
    """bool (B, T): in each row the count (B,) highest scores of those among."""
    scores = scores.masked_fill(~among, -math.inf)
    rank = scores.argsort(1, descending=True).argsort(1)  # argsort twice: the place of each
    return among & (rank < count[:, None])


def confidence_score(order, probs, prob, cols, generator):
    """Scores (N,) of the masked positions, of which the highest are set first: from the
    distributions probs (N, V), the drawn tokens' probability prob (N,) and columns cols (N,)."""
    if order == "confidence":
        return prob
    if order == "entropy":  # negative, so the most certain distribution comes first
        return torch.special.xlogy(probs, probs).sum(-1)
    if order == "margin":  # between the two most likely tokens
        return -probs.topk(2).values.diff()[:, 0]
    if order == "random":
        return torch.rand(prob.shape, generator=generator, device=prob.device)
    return -cols.float()  # left_to_right


@torch.no_grad()
def unmask(predict, ids, mask_id, steps, sampling=None, order="confidence", threshold=0.0, remask=0,
           generator=None, watch=None):
    """Fill the masked positions of ids (B, T), the most confident first: (ids, forward passes).

    predict(ids, n_masked (B,), rows, cols): logits (N, V) of the masked positions.
    steps: passes at most (MaskGIT, https://arxiv.org/abs/2202.04200).
    threshold: instead, each pass sets all tokens at least this probable, or else the most probable
    one of a row (Fast-dLLM, https://arxiv.org/abs/2505.22618).
    remask: this many of a row's least confident tokens are masked again (ReMDM,
    https://arxiv.org/abs/2503.00307).
    watch(ids, confidence): called after each pass.
    """
    fixed, confidence = ids != mask_id, torch.ones(ids.shape, device=ids.device)
    remasks_left, forwards = torch.full_like(ids[:, 0], remask), 0  # (B,): a budget a row
    passes_left = int((~fixed).sum(1).max()) + remask
    if not threshold:
        passes_left = min(passes_left, steps)
    while (masked := ids == mask_id).any():
        rows, cols = masked.nonzero(as_tuple=True)  # (N,)
        n_masked = masked.sum(1)  # (B,), which tells the model its timestep
        logits = predict(ids, n_masked, rows, cols).float()
        tokens = sample_token(logits, sampling, generator)
        probs = logits.softmax(-1)  # at temperature 1, whatever the tokens were drawn at
        prob = probs.gather(1, tokens[:, None])[:, 0]  # (N,)
        score = confidence_score(order, probs, prob, cols, generator)

        count = torch.ones_like(n_masked)
        if not threshold:  # rounded up, so that the last pass sets all that is left
            count = (n_masked + passes_left - 1) // passes_left
        transfer = top_positions(confidence.index_put((rows, cols), score), masked, count)
        new_confidence = confidence.index_put((rows, cols), prob)
        if threshold:
            transfer |= masked & (new_confidence >= threshold)
        ids = torch.where(transfer, ids.index_put((rows, cols), tokens), ids)
        confidence = torch.where(transfer, new_confidence, confidence)
        forwards += 1
        passes_left -= 1
        if remask and passes_left > 0:  # not after the last pass, which nothing would fill again
            unsure, count = ~fixed & ~masked, remasks_left  # set in an earlier pass
            if threshold:
                unsure &= confidence < threshold
            else:
                count = (remasks_left + passes_left - 1) // passes_left
            again = top_positions(-confidence, unsure, count)
            ids, remasks_left = ids.masked_fill(again, mask_id), remasks_left - again.sum(1)
        if watch:
            watch(ids, confidence)
    return ids, forwards


def forward_at(model, ids, start, pad, block_id, t=None, rows=None, cache=None):
    """The model on ids (B, L), clean (block_id 0) or one noisy block (1), from position start - pad
    on; pad (B, 1) is each row's padding on the left, which nothing attends to."""
    position = torch.arange(start, start + ids.shape[1], device=ids.device) - pad  # (B, L)
    context_end = position[:, :1].expand_as(position) if block_id else position + 1
    block_ids = torch.where(position < 0, -1, block_id)
    last = torch.full_like(position, FOREVER)
    meta = torch.stack([position.clamp(min=0), block_ids, context_end, last])
    model.set_causal(False)  # the mask says who attends to whom
    return model(ids, t, rows, **model.attention_inputs(meta, cache))


@torch.no_grad()
def takes_padding(model):
    """Whether texts of different lengths can share a batch. Not with ALiBi, whose distances come
    from a mask of padding that holds no positions."""
    ids = torch.arange(4, device=model.device)[None] % model.mask_id
    pad = torch.tensor([[2]], device=model.device)
    model.set_causal(True)
    alone = model(ids)
    try:
        with errors_as("padding", trial=True):
            padded = forward_at(model, F.pad(ids, (2, 0)), 0, pad, 0)
    except UserError:
        return False
    off = (padded[:, 2:] - alone).abs().max() / alone.abs().max()
    return bool(off < rounding(alone.dtype))


@torch.no_grad()
def generate(model, prompts, new_tokens, steps, ends=(), watch=None, **options):
    """Continue prompts (lists of ids), or fill the masks in them, in the way the model was trained.

    A whole-sequence model fills prompt and new_tokens masks in at most `steps` passes. A block
    model writes block after block behind a KV cache, each in its share of the steps, until every
    text has one of its `ends`. options: of unmask(). Returns (lists of ids, forward passes).
    """
    P, same_length = max(map(len, prompts)), len(set(map(len, prompts))) == 1
    if not same_length and not takes_padding(model):
        each = [generate(model, [p], new_tokens, steps, ends, watch, **options) for p in prompts]
        return [text for [text], _ in each], sum(forwards for _, forwards in each)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    pad = (P - lengths)[:, None]  # on the left, so that all texts end in the same column
    ids = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=model.device)
    if model.block_size:
        n_blocks = math.ceil(new_tokens / model.block_size)
        ids, forwards = generate_blocks(model, ids, pad, n_blocks, steps, ends, watch, options)
    else:
        ids = F.pad(ids, (0, new_tokens), value=model.mask_id)
        T, causal = ids.shape[1], not model.bidirectional

        def predict(ids, n_masked, rows, cols):
            t = timestep(n_masked / (lengths + new_tokens), model)[:, None]
            rows = rows * T + cols - 1
            if not same_length:
                return forward_at(model, ids, 0, pad, 0 if causal else 1, t, rows)
            model.set_causal(causal)  # without a mask tensor
            return model(ids, t, rows)

        ids, forwards = unmask(predict, ids, model.mask_id, steps, watch=watch, **options)
    texts = zip(ids.tolist(), prompts, strict=True)
    return [row[P - len(p):P + new_tokens] for row, p in texts], forwards


def generate_blocks(model, ids, pad, n_blocks, steps, ends, watch, options):
    """generate() of a block model, behind ids (B, P) and their padding: (ids, forward passes)."""
    B, P = ids.shape
    k, cache, cached, forwards = model.block_size, new_cache(model.device), 0, 0
    for start in range(P, P + n_blocks * k, k):
        # 1) finished text enters the cache; the token after it is the AR model's own
        new = ids[:, cached:]
        last = torch.arange(1, B + 1, device=model.device) * new.shape[1] - 1  # row of each text
        logits = forward_at(model, new, cached, pad, 0, None, last, cache)  # (B, V)
        cached = start
        block = torch.full((B, k), model.mask_id, device=model.device)
        block[:, 0] = sample_token(logits, options.get("sampling"), options.get("generator"))
        first_prob = logits.float().softmax(-1).gather(1, block[:, :1])

        # 2) the rest of the block is unmasked behind it
        def predict(block, n_masked, rows, cols, start=start):
            t = timestep(n_masked / k, model)[:, None]
            logits = forward_at(model, block, start, pad, 1, t, rows * k + cols - 1, cache)
            crop_cache(cache, k)  # masks leave no trace
            return logits

        def show(block, confidence, ids=ids, first_prob=first_prob):
            # the text is certain, the first token of a block as certain as the AR model was of it
            parts = torch.ones(ids.shape, device=ids.device), first_prob, confidence[:, 1:]
            watch(torch.cat([ids, block], 1), torch.cat(parts, 1))

        block, passes = unmask(predict, block, model.mask_id, max(1, round(steps / n_blocks)),
                               watch=show if watch else None, **options)
        ids, forwards = torch.cat([ids, block], 1), forwards + 1 + passes
        if all(not set(ends).isdisjoint(text) for text in ids[:, P:].tolist()):
            break
    return ids, forwards


# ----------------------------------------------------------------------------------------------
# The stages, and what trains in them
def make_stages(n_windows):
    """The stages as dicts: what each trains, its rate, its steps (0: skipped), the weights of its
    losses, and how many windows of a step are the model's own text."""
    rows = [("0 AR pre-training", "AR model", stage0_epochs, stage0_lr_scale),
            ("1 attention adaptation", "attention", stage1_epochs, stage1_lr_scale),
            ("2 diffusion", "everything", stage2_epochs, stage2_lr_scale),
            ("3 recovery", "everything", stage3_epochs, stage3_lr_scale)]
    stages = [{"name": name, "trains": trains, "epochs": epochs, "lr": scale * learning_rate}
              for name, trains, epochs, scale in rows]
    per_step, limit = batch_size * gradient_accumulation_steps, max_steps
    if debug:
        limit = min(max_steps or 20, 20)
    total, done = sum(stage["epochs"] for stage in stages), 0.0  # epochs
    if not total:
        raise UserError("stage1_epochs, stage2_epochs, stage3_epochs: nothing to train, all are 0")
    for stage in stages:
        number, epoch_windows = stage["name"][0], n_windows
        stage |= {"diffusion": diffusion_loss_weight, "ar": 0.0, "distill": distill_weight,
                  "n_on_policy": 0}
        if number in lm_loss_stages and not use_lora:  # it would train no adapter
            stage["ar"] = lm_loss_weight
        if number == "0":
            stage |= {"diffusion": 0.0, "ar": 1.0, "distill": 0.0}
        if stage["epochs"] and not any(stage[part] for part in LOSSES):
            raise UserError(f"stage{number}_epochs: the stage has no loss; give one a weight, as "
                            "diffusion_loss_weight, or set its epochs to 0")
        if on_policy_tokens and stage["diffusion"]:
            most = per_step - 1 if on_policy_share < 1 else per_step  # the data keeps one window
            stage["n_on_policy"] = min(max(1, round(on_policy_share * per_step)), most)
        if stage["n_on_policy"] == per_step:  # 3/4 of each window will be the model's own text
            own_windows = math.ceil(on_policy_tokens / (0.75 * max_seq_length))
            epoch_windows = min(n_windows + own_prompts, own_windows)
        stage["steps"] = math.ceil(stage["epochs"] * epoch_windows / per_step)
        if limit:  # rounded at the ends, so that the stages add up to it
            ends = [round(limit * x / total) for x in (done, done + stage["epochs"])]
            stage["steps"] = ends[1] - ends[0]
        stage["warmup"] = min(warmup_steps, stage["steps"] // 5)
        done += stage["epochs"]
    return stages


def freeze(model, trains):
    """Let a stage train its part of the model and nothing else; returns those parameters."""
    part = list(model.lm.parameters())
    if trains == "attention":  # each once, in order
        attention = [p for _, m in attention_modules(model.lm) for p in m.parameters()]
        part = list(dict.fromkeys(attention))
    if model.adapters:
        adapters = set(model.adapter_state().values())
        part = [p for p in part if p in adapters]
    if not part:
        raise UserError(f"a stage would train nothing: architecture '{model.lm.config.model_type}' "
                        "has no module named ...Attention, or no adapters in it")
    if trains != "AR model":
        part += model.diffusion_state().values()
    model.requires_grad_(False)  # what was trained before as well
    for p in part:
        p.requires_grad_(True)
    return part


def make_optimizer(params, use_8bit):
    """AdamW (https://arxiv.org/abs/1711.05101), on request with 8-bit states
    (https://arxiv.org/abs/2110.02861), which torchao's has for weights in bfloat16, rounded
    stochastically (https://arxiv.org/abs/2010.06192), and for shares of weights."""
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    how = {"lr": learning_rate, "betas": (beta1, beta2)}
    kind, sharded = params[0].device.type, isinstance(params[0], DTensor)
    paged = cpu_offload and kind == "cuda" and not sharded
    if use_8bit and kind == "mps":
        print("use_8bit_adam: not on mps, where AdamW has 32-bit states")
    elif use_8bit and (sharded or weights_dtype == "bfloat16"):
        from torchao.optim import AdamW8bit  # slow to import
        # torch 2.13 takes what it compiled for states of 32 bits for those of 8 bits, too
        torch._functorch.config.enable_autograd_cache = False
        return AdamW8bit(groups, bf16_stochastic_round=not sharded, **how)
    elif use_8bit or paged:
        from bitsandbytes import optim  # slow to import
        if paged:  # in memory that CUDA moves to the host as needed
            return (optim.PagedAdamW8bit if use_8bit else optim.PagedAdamW)(groups, **how)
        return optim.AdamW8bit(groups, **how)
    return torch.optim.AdamW(groups, fused=True, **how)


def set_rate(optimizer, lr):
    """Give an optimizer a learning rate; torchao's keep it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def set_up_training(model, stage, state, saved):
    """The optimizer and gradient scaler of a stage, in the state that was saved, if any."""
    kind = model.device.type
    optimizer = make_optimizer(freeze(model, stage["trains"]), state["adam_8bit"])
    scaler = torch.amp.GradScaler(kind, enabled=dtype == "float16" and kind != "cpu")
    if saved:
        with errors_as("checkpoint: its optimizer was made with other settings"):
            processes.load_optimizer(optimizer, saved["optimizer"])
            scaler.load_state_dict(saved["scaler"])
    return {"optimizer": optimizer, "scaler": scaler}


def lr_factor(step, steps, warmup, schedule):
    """Share of the peak rate at a step of a stage: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    u = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * u), "linear": 1 - u, "constant": 1.0}[schedule]


# ----------------------------------------------------------------------------------------------
# Evaluation
@torch.no_grad()
def window_losses(model, x0, autocast, noise_seed, micro_batch, only=slice(None)):
    """The losses (2 or 3, n) of windows x0 (n, T) with fixed noise: diffusion, AR, for blocks also
    diffusion with the first token of each block known. 0 for windows of other processes and
    outside `only`."""
    u, noise = sample_noise(*x0.shape, noise_seed, model.block_size)
    kinds = [(1.0, 0.0, False), (0.0, 1.0, False)]
    if model.block_size:
        kinds.append((1.0, 0.0, True))
    losses = torch.zeros(len(kinds), len(x0), device=model.device)
    for total, (diffusion, ar, first_known) in [*zip(losses, kinds, strict=True)][only]:
        # the linear schedule makes all counts of masks equally likely, which has least variance
        batch = loss_weights(x0, u, noise, model, diffusion, ar, 0, "linear", first_known)
        always = processes.passes_of_all(batch, model)
        for windows in processes.windows_of_rank(len(x0)).split(micro_batch):
            part = [x[windows % len(x0)] for x in batch]
            for weights in part[3:]:
                weights[windows >= len(x0)] = 0  # padding
            for inputs in forward_passes(part, micro_batch, model, 0.0, always):
                with autocast:
                    found = model.loss(**inputs).sum(1)
                rows = inputs["rows"] // inputs["ids"].shape[1]
                total.index_add_(0, (windows[rows] % len(x0)).to(model.device), found)
    return losses


def evaluate(model, tokenizer, windows, autocast, noise_seed, state):
    """Metrics on windows (n, T) of a model in eval mode, with fixed noise: eval_nelbo in nats per
    token, eval_ppl_bound, eval_bpb in bits per byte, ar_ppl of the causal mode. For blocks also
    eval_nelbo_sampler, with the first token of each block known. _se: standard errors."""
    x0 = torch.from_numpy(windows.astype(np.int64))  # (n, T)
    work = functools.partial(window_losses, model, x0, autocast, noise_seed)
    losses = processes.total(with_less_memory(work, state, model, size="eval_micro_batch"))
    nelbo, ar_loss, *of_sampler = losses.sum(1).tolist()  # nats per token
    errors = (losses.std(1, correction=min(1, len(x0) - 1)) * len(x0) ** 0.5).tolist()
    row = {"eval_nelbo": nelbo, "eval_nelbo_se": errors[0]}
    if of_sampler:
        row |= {"eval_nelbo_sampler": of_sampler[0], "eval_nelbo_sampler_se": errors[2]}
    scored = [ids[1:][ids[1:] >= 0] for ids in windows]
    n_bytes = sum(len(tokenizer.decode(x, skip_special_tokens=True).encode()) for x in scored)
    bits = nelbo * sum(map(len, scored)) / math.log(2)
    return row | {"eval_ppl_bound": math.exp(min(nelbo, 700)), "eval_bpb": bits / max(1, n_bytes),
                  "ar_ppl": math.exp(min(ar_loss, 700))}


# ----------------------------------------------------------------------------------------------
# Training. Data, noise and dropout are functions of (seed, stage, step): a resume is exact.
def train_step(model, training, autocast, stage, x0, state):
    """One optimizer step on x0 (N, T): (the losses, a list, gradient norm, learning rate). If loss
    or norm is not finite, no weight changes."""
    where = seed, state["stage"], state["step"]
    u, noise = sample_noise(*x0.shape, seed_for("noise", *where), model.block_size,
                            full_mask_share)
    batch = loss_weights(x0, u, noise, model, stage["diffusion"], stage["ar"],
                         stage["n_on_policy"])  # of all windows at once, on the CPU
    always = processes.passes_of_all(batch, model)
    batch = [x[share_of_step()[0]] for x in batch]  # from here on this process's own windows

    def forward_backward(micro_batch):
        model.zero_grad(set_to_none=True)  # of an attempt that ran out of memory, too
        torch.manual_seed(seed_for("dropout", *where) + processes.RANK)
        total = torch.zeros(3, device=model.device)  # summed there: nothing waits in here
        for inputs in forward_passes(batch, micro_batch, model, stage["distill"], always):
            with autocast:
                losses = model.loss(**inputs).sum(0)
            with record_function("backward"):  # before the next pass switches attention
                loss = losses.sum() * processes.gradient_factor(model)
                training["scaler"].scale(loss).backward()
            total += losses.detach()
        return total

    losses = with_less_memory(forward_backward, state, model, training)
    with record_function("optimizer"):
        optimizer, scaler = training["optimizer"], training["scaler"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        processes.sum_gradients(model, params)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        norm = processes.same_norm(model, norm)
        nn.utils.clip_grads_with_norm_(params, max_grad_norm or math.inf, norm)
        norm = processes.gathered_number(norm)
        losses = processes.total(losses).tolist()  # here, and only here, it waits for the device
        norm = norm.item()
        lr = stage["lr"] * lr_factor(state["step"], stage["steps"], stage["warmup"], lr_schedule)
        set_rate(optimizer, lr)
        torch.manual_seed(seed_for("rounding", *where))  # of weights, the same in every replica
        if math.isfinite(sum(losses) + norm):  # as scaler.step() would check
            with_less_memory(lambda _: training["optimizer"].step(), state, model, training,
                             halve=False)
        scaler.update()
    return losses, norm, lr


def main(argv):
    processes.be_quiet()
    config_files = configure(globals(), argv, allowed)
    s = SimpleNamespace(**settings_in(globals()))  # for the functions of other modules
    check_settings(s)
    torch.autograd.set_detect_anomaly(debug)  # says which operation made a NaN
    name = config_files[0] if config_files else model_name.removesuffix("/final")
    out = Path(out_dir or f"outputs/{Path(name).name.removesuffix('.py')}_diffusion")
    device, autocast, limit_gb = set_up_device(s)
    state, checkpoint_dir = processes.from_rank_0(find_checkpoint, out, s, allowed)
    processes.share_sizes(state, share_of_step()[1])

    # model and data
    torch.manual_seed(seed)  # for what has random weights
    source = (checkpoint_dir,) if checkpoint_dir else (model_name, tokenizer_of(s), model_config)
    model, tokenizer = load_model(source[0], device, model_settings(), *source[1:])
    encode_prompt(model, tokenizer, sample_prompt, 32)  # if it is too long, that shows now
    spread = choose_parallel(model, s, state, checkpoint_dir, device, limit_gb)
    if spread != "fsdp":  # else a card may not have room for all of it
        model.to(device)
    probe(model, max_seq_length)
    train_data, val_data, data_report = load_data(tokenizer, s, state)
    stages = make_stages(len(train_data))
    trained = count_trained(model, stages)
    print_plan(model, s, stages, trained, train_data, val_data, data_report)
    disk_gb = check_disk(model, out, s, trained["everything"])
    processes.from_rank_0(try_to_save, model, out, s, checkpoint_dir)
    set_up_model(model, s, state["checkpointing"], autocast, device, spread)
    model.train()
    if dry_run:
        from bench import print_cost  # bench.py imports this module, so not before
        print_cost(model, autocast, stages, state, train_data, limit_gb, disk_gb)
        return processes.disconnect()

    # the run
    log = open_log(out, s, state, stages, limit_gb)
    stop = stop_on_signal()
    saved, own_text = load_training(checkpoint_dir, s, state, model)
    while state["stage"] < len(stages):
        stage = stages[state["stage"]]
        if not stage["steps"]:  # skipped; an optimizer saved in it would not fit the next stage
            state["stage"], state["step"], saved = state["stage"] + 1, 0, None
            continue
        if stage["n_on_policy"] and not own_text:
            own_text = write_own_text(model, tokenizer, train_data, val_data, out, s, stop,
                                      with_less_memory)
        val_data = own_text.get("held", val_data)
        training, saved = set_up_training(model, stage, state, saved), None
        cut_back(log, state)  # not before all of the checkpoint could be loaded
        while state["step"] < stage["steps"]:
            if state["step"] == 0 or state["total"] % eval_steps == 0:
                evaluate_and_log(model, tokenizer, val_data, autocast, stage, state, log)

            # ----------------------------------------------------------------------------------
            start = time.perf_counter()
            x0 = windows_of_step(train_data, own_text.get("train"), stage, state)  # (N, T)
            losses, norm, lr = train_step(model, training, autocast, stage, x0, state)
            # ----------------------------------------------------------------------------------

            state["step"] += 1
            state["total"] += 1
            state["tokens"] += x0.numel()
            log_step(losses, norm, lr, time.perf_counter() - start, s, stage, state, log, device)
            last = state["step"] == stage["steps"]
            stopping = processes.agree_to_stop(stop)
            if last or stopping or save_steps and state["total"] % save_steps == 0:
                save(out, f"checkpoint_{state['total']}", model, tokenizer, s, model_settings(),
                     state, log, training, own_text)
            if stopping:
                leave(stopping)
        state["stage"], state["step"] = state["stage"] + 1, 0
    log["bar"].close()
    last_stage = [stage for stage in stages if stage["steps"]][-1]
    evaluate_and_log(model, tokenizer, val_data, autocast, last_stage, state, log)
    save(out, "final", model, tokenizer, s, model_settings(), state, log)
    from finish import finish  # it imports this module
    finish(model, tokenizer, val_data, autocast, out, s)
    processes.disconnect()


# ----------------------------------------------------------------------------------------------
# From here on: plumbing, to be read when needed
def share_of_step():
    """(Which windows of a step are this process's, a slice; its micro-batch)."""
    return processes.share_of_step(batch_size, gradient_accumulation_steps, rank_batch_sizes)


def windows_of_step(train_data, own_text, stage, state):
    """x0 (N, T): the windows of an optimizer step, those of the model's own text first."""
    n_data = batch_size * gradient_accumulation_steps - stage["n_on_policy"]
    parts = [(own_text, stage["n_on_policy"]), (train_data, n_data)]
    where = seed, state["stage"], state["step"]
    return torch.cat([get_batch(data, n, *where) for data, n in parts if n])


def continuation_length(model, prompt, window):
    """How many tokens an evaluation writes behind a prompt (list of ids): 32. A whole-sequence
    model fills a window of at most 64 instead, as it has seen texts of no other length."""
    return window - len(prompt) if len(prompt) < window <= 64 and not model.block_size else 32


def evaluate_and_log(model, tokenizer, windows, autocast, stage, state, log):
    """Evaluate on held-out windows, continue sample_prompt, print and log both."""
    prompt = encode_prompt(model, tokenizer, sample_prompt, 32)
    new = continuation_length(model, prompt, max_seq_length)
    noise_seed = seed_for(seed, "evaluation")  # the same each time: curves can be compared
    model.eval()
    torch.manual_seed(noise_seed)  # of the random tokens of noise="uniform"
    start = time.perf_counter()
    # flex_attention must be compiled
    with eagerly(compile_model), model.attention(model.kernel):
        row = evaluate(model, tokenizer, windows, autocast, noise_seed, state)
        with autocast:
            [text], _ = generate(model, [prompt], new, new)
    row["sample"] = tokenizer.decode(text)
    end = len(prompt) + end_of(text[len(prompt):], end_ids(model.lm, tokenizer))
    processes.reshard(model)
    model.train()
    if state["total"] <= log["pretraining_steps"]:  # no diffusion step yet: the AR model to keep
        state["ar_ppl_before"] = row["ar_ppl"]
    row["ar_ppl_before"] = state["ar_ppl_before"]
    seconds = time.perf_counter() - start
    log_evaluation(row, tokenizer.decode(text[:end]), seconds, stage, state, log)


def count_trained(model, stages):
    """{what a stage trains: how many parameters these are}, of everything in any case."""
    parts = [stage["trains"] for stage in stages if stage["steps"]]
    return {trains: sum(p.numel() for p in freeze(model, trains))
            for trains in (*parts, "everything")}


def with_less_memory(work, state, model, training=None, size="micro_batch", halve=True):
    """work(state[size]), and again each time memory runs out, with half the windows at a time.

    With auto_memory, for training {"optimizer", "scaler"}, gradient checkpointing comes first, then
    8-bit Adam. halve=False: work does not depend on the micro-batch.
    """
    while True:
        try:
            return work(state[size])
        except RuntimeError as error:
            if not out_of_memory(error) or processes.is_sharded(model):  # the others would wait
                raise
            failure = error.with_traceback(None)  # which would hold the tensors
        ladder = auto_memory and training is not None
        if ladder and halve and not state["checkpointing"]:
            state["checkpointing"], change = True, "gradient checkpointing"
            checkpoint_layers(model)
        elif ladder and not state["adam_8bit"]:
            state["adam_8bit"], change = True, "a new optimizer, 8-bit Adam,"
            groups = training["optimizer"].param_groups
            params = [p for group in groups for p in group["params"]]
            training["optimizer"] = make_optimizer(params, True)
            set_rate(training["optimizer"], groups[0]["lr"])
        elif halve and state[size] > 1:
            state[size] //= 2
            change = f"{state[size]} windows at a time ({size}), of the same batch,"
        else:
            raise failure
        tqdm.write(f"out of memory: {change} from here on")
        state.setdefault("less_memory", []).append(change)  # for the report
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(model.device)


# ----------------------------------------------------------------------------------------------
# Loading
def model_settings():
    """The arguments of DiffusionLM after lm, from the settings."""
    lora = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout,
            "targets": lora_targets}
    return {"num_timesteps": num_timesteps, "noise_schedule": noise_schedule,
            "use_time_embedding": use_time_embedding, "bidirectional": use_bidirectional_attention,
            "block_size": block_size, "lora": lora if use_lora else None, "noise": noise,
            "causal_blocks": causal_blocks}


def load_model(name, device, ours=None, tokenizer_name="", config_json="", as_dtype=None):
    """(DiffusionLM, tokenizer), on the CPU, of a hub name, a folder, a .gguf file or a result.

    ours: arguments of DiffusionLM after lm; None: those of the folder, which must be complete then.
    config_json: random weights. as_dtype: of the weights, instead of what fits training. UserError
    if anything cannot be loaded or does not fit.
    """
    name = str(name)
    path = resolve_model(name)[0]
    saved = base = None
    if not ours or (path / "diffusion.json").is_file() and not config_json:
        record = read_record(path)
        saved, base = record["model"], record.get("base")
    complete, ours = not ours, ours or saved
    if saved and saved.get("lora") and not ours.get("lora"):
        raise UserError(f"use_lora: {path} has trained adapters, which would be lost; --use_lora")
    as_dtype = as_dtype or base_dtype(ours.get("lora"), device.type, weights_dtype)
    if base:
        lm, tokenizer = load_base(name, base, tokenizer_name or name, as_dtype, device)
    else:
        lm, tokenizer = load_hf(name, tokenizer_name, config_json, as_dtype,
                                four_bits=device if load_in_4bit else None)
    # random weights are nowhere else, and a checkpoint is deleted when newer ones are there; an
    # earlier result with adapters is where this run may write its own
    temporary = config_json or saved and saved.get("lora") or (path / "training.pt").exists()
    if ours.get("lora") and not base and not temporary:
        base = reference(name) | {"load_in_4bit": load_in_4bit}
    with errors_as(path / "diffusion.json"):
        model = DiffusionLM(lm, **ours)
    changed = [f"{key}={value} (here {ours[key]})" for key, value in (saved or {}).items()
               if value != ours.get(key, value) and (key, value) != ("lora", None)]
    if changed:
        print(f"model_name: {path} was trained with {', '.join(changed)}")
    model.base = base if ours.get("lora") else None
    if tokenizer.eos_token_id is not None:
        model.end_id = tokenizer.eos_token_id
    for file, wanted in our_tensors(model).items() if saved else ():
        if not complete and file.startswith("adapter") and not (path / file).exists():
            continue  # new adapters on an earlier result
        with errors_as(path / file):
            found = load_file(path / file)
            if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
                raise ValueError("it belongs to a model with other settings: "
                                 + ", ".join(changed or ["of another size"]))
            for key, tensor in found.items():
                wanted[key].data.copy_(tensor)
    return model, tokenizer


def read_record(folder):
    """diffusion.json of a folder that save_folder() wrote, its values checked."""
    return runs.read_record(folder, SimpleNamespace(**settings_in(globals())), allowed)


# ----------------------------------------------------------------------------------------------
# In Python
def from_pretrained(folder, device="auto"):
    """The model of a finished run (its folder, or final/). UserError if there is none."""
    path, target = Path(folder), pick_device(device)
    path = path / "final" if (path / "final").is_dir() else path
    model, model.tokenizer = load_model(path, target, as_dtype=torch.float32)
    return model.to(target).eval()


def continue_text(model, prompt, new_tokens=64, steps=32, **options):
    """The text that a model of from_pretrained() writes behind a prompt. options: of unmask()."""
    ids = encode_prompt(model, model.tokenizer, prompt, new_tokens)
    ends = end_ids(model.lm, model.tokenizer)
    [row], _ = generate(model, [ids], new_tokens, steps, ends, **options)
    new = row[len(ids):]
    return text_after(model.tokenizer, new[:end_of(new, ends)], ids)


# not in the class, which custom_generate/ has without what loads it
DiffusionLM.from_pretrained, DiffusionLM.generate = staticmethod(from_pretrained), continue_text

if __name__ == "__main__":
    from convert import main  # one copy of the module, whoever else imports it
    run(main, processes.RANK, processes.lost, processes.end)
