"""The folder that sample.py --export=uno writes, read by an engine's rules alone: transformers and
peft, none of this project's code."""
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

import convert
import verify
from configurator import UserError
from test_convert import (
    LORA, UNIFORM, cases, diffusion, greedy, random_ids, random_lm, save_final, train_step)
from uno_export import export_uno

NOISE = 7  # in place of the random tokens, so that both draft from the same


def plain_randoms(ids, high):
    return torch.full_like(ids, NOISE)


@pytest.fixture
def drafter(tmp_path, monkeypatch):
    """(Our model, its result's folder, its base's): adapters that have learnt the base's text."""
    monkeypatch.setattr(torch, "randint_like", plain_randoms)
    more = {"initializer_range": 0.1, "vocab_size": 300}
    lm = random_lm("llama", **more)
    lm.save_pretrained(tmp_path / "base")
    prompts = random_ids(32, 4)
    texts = greedy(lm, prompts, 28)
    model = diffusion(lm, "linear", 10, False, block_size=4, lora=LORA, **UNIFORM)
    optimizer = torch.optim.AdamW(convert.freeze(model, "everything"))
    x0 = torch.cat([~prompts, texts], 1)  # (32, 32)
    for step in range(60):
        u, noise = convert.sample_noise(32, 32, step, 4, 1.0)
        train_step(model.train(), x0, u, noise, 32, 0, 1.0, optimizer, 1e-2)
    model.eval()
    model.base = {"name": str(tmp_path / "base"), "revision": None, "sha256": None}
    save_final(tmp_path / "run/final", model, lora=LORA, use_time_embedding=False, **UNIFORM)
    return model, tmp_path / "run/final", tmp_path / "base"


@torch.no_grad()
def engine(folder, prompt, new_tokens, n_rows):
    """(The text, accepted drafts of each check) of an engine: rows of draft and check share one KV
    cache; the last token is drafted from without the adapter, the random ones behind it with it."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter").eval()
    cache, text, accepted = DynamicCache(), [], []

    def rows(ids, adapter):
        if adapter:
            return model(torch.tensor([ids]), past_key_values=cache).logits[0].argmax(-1).tolist()
        with model.disable_adapter():
            return model(torch.tensor([ids]), past_key_values=cache).logits[0].argmax(-1).tolist()

    text.append(rows(prompt, False)[-1])
    while len(text) < new_tokens:
        drafts = rows([text[-1]], False) + rows([NOISE] * (n_rows - 1), True)
        cache.crop(-(n_rows - 1))
        checked = rows(drafts, False)
        kept = 0  # of the drafts behind the first, which is the base's own
        while kept < n_rows - 1 and drafts[kept + 1] == checked[kept]:
            kept += 1
        text += [*drafts[:kept + 1], checked[kept]]
        accepted.append(kept)
        if kept < n_rows - 1:
            cache.crop(-(n_rows - 1 - kept))
    return text[:new_tokens], accepted


def test_an_engine_that_reads_the_folder_writes_our_text_with_as_many_accepted_drafts(drafter):
    model, final, base = drafter
    folder = export_uno(model, None, final)
    assert (folder / "base").resolve() == base.resolve()
    lm, total = AutoModelForCausalLM.from_pretrained(base), 0
    for prompt in random_ids(8, 5).tolist():
        text, accepted = engine(folder, prompt, 20, 4)
        assert text == greedy(lm, torch.tensor([prompt]), 20)[0].tolist()
        [ours], counts = verify.decode_verified(model, [prompt], 20, 3, 0, {})
        assert ours == text
        # ours does not check drafts behind the last token asked for
        assert 0 <= sum(accepted) - counts["accepted"] <= 3 and counts["checks"] <= len(accepted)
        total += sum(accepted)
    assert total > 8, "drafts were accepted, or the counts say nothing"


def test_the_adapter_is_of_the_layout_that_the_engine_loads(drafter):
    model, final, _ = drafter
    folder = export_uno(model, None, final)
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["bias"] == "none"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj",
                                        "up_proj", "v_proj"]
    assert not config["modules_to_save"] and not config["use_dora"]
    names = load_file(folder / "adapter/adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 7 * 2
    card = (folder / "README.md").read_text()
    assert "--speculative-num-draft-tokens 4" in card and "--model-path ./base" in card
    with pytest.raises(UserError, match="is there already"):
        export_uno(model, None, final)


@cases("wrong, message", [
    ({"noise": "mask"}, "random tokens as noise; train with --noise=uniform"),
    ({"causal_blocks": False}, "causal drafts; train with --causal_blocks"),
    ({"lora": None}, "adapters on a frozen base"),
    ({"lora": LORA | {"targets": "self_attn.v_proj"}}, "only with q_proj")])
def test_what_the_engine_would_not_run_is_refused(wrong, message, tmp_path):
    how = {"block_size": 4, "lora": LORA} | UNIFORM | wrong
    model = diffusion(random_lm("llama"), "linear", 10, False, **how)
    with pytest.raises(UserError, match=message):
        export_uno(model, None, tmp_path / "final")
    assert not list(tmp_path.iterdir())
