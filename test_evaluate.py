"""Tests of sample.py --evaluate and --tasks: against brute-force sums over all masks, the greedy
text of Hugging Face's logits, and the harness's own `hf` model. Those that need pip install -e
'.[eval]' are skipped without it.
"""
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import configurator
import convert
import corpus
import evaluation
import model_files
import sample
from test_convert import (  # noqa: F401  the fixture is used by its name
    CPU, NO_AUTOCAST, WINDOW, cases, check_error, diffusion, random_ids, random_lm, sample_main,
    save_final)

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(60))


def settings(**more):
    """All settings of sample.py, and some changed."""
    return SimpleNamespace(**configurator.settings_in(vars(sample)) | more)


def whole_model(**more):
    """A whole-sequence model of bytes, with random weights."""
    return diffusion(random_lm("llama", vocab_size=300, **more), "linear", 10)


# ----------------------------------------------------------------------------------------------
# Figures on a text
@cases("block_size", [0, 4])
def test_figures_on_a_text_are_those_of_training_and_their_errors_sums_by_hand(block_size):
    model = diffusion(random_lm("llama"), "cosine", 10, block_size=block_size)
    windows, tokenizer = random_ids(6, 16).numpy(), model_files.byte_tokenizer()
    row = evaluation.text_figures(model, tokenizer, windows, 7)

    noise_seed = corpus.seed_for(7, "evaluation")
    logged = convert.evaluate(model, tokenizer, windows, NO_AUTOCAST, noise_seed,
                              {"eval_micro_batch": 3})
    for name in ("eval_nelbo", "eval_nelbo_se", "eval_bpb", "ar_ppl"):
        assert math.isclose(row[name], logged[name], rel_tol=1e-5)
    losses = convert.window_losses(model, torch.from_numpy(windows), NO_AUTOCAST, noise_seed, 6)
    nats = (losses * 6)[-1 if block_size else 0].tolist()  # a window's share of the mean
    mean = sum(nats) / 6
    error = math.sqrt(sum((x - mean) ** 2 for x in nats) / 5 / 6)
    assert math.isclose(row["sampler_bound"], mean, rel_tol=1e-5)
    assert math.isclose(row["sampler_bound_se"], error, rel_tol=1e-5)


def test_windows_of_a_file_are_its_tokens_in_order_or_a_seeded_sample(tmp_path):
    tokenizer, path = model_files.byte_tokenizer(), tmp_path / "text.txt"
    path.write_text(TEXT)
    wanted = settings(evaluate=str(path), eval_samples=0)
    windows = evaluation.read_windows(wanted, tokenizer, 48, 0)

    ids = tokenizer.encode(TEXT)
    assert windows.ravel().tolist() == ids[:len(ids) // 48 * 48]
    wanted.eval_samples = 10
    some = [evaluation.read_windows(wanted, tokenizer, 48, 0) for _ in range(2)]
    assert some[0].shape == (10, 48) and (some[0] == some[1]).all()


# ----------------------------------------------------------------------------------------------
# Infilling
def test_holes_are_in_the_middle_of_windows_seeded_and_without_context():
    windows = np.arange(5 * 64).reshape(5, 64)
    windows[:, 30:34] = ~windows[:, 30:34]
    spans = evaluation.cut_spans(windows, 50, 64, 3)
    assert len(spans) == 50 and spans == evaluation.cut_spans(windows, 50, 64, 3)
    assert spans != evaluation.cut_spans(windows, 50, 64, 4)
    assert {length for *_, length in spans} == set(range(4, 13))
    for row, start, length in spans:
        assert 16 <= start and start + length <= 48
        assert (windows[row, start:start + length] >= 0).all()
    holes = evaluation.cut_holes(windows, 50, 64, 3)
    for (row, start, length), (left, gap, right) in zip(spans, holes, strict=True):
        assert len(left) == start and gap == windows[row, start:start + length].tolist()
        assert left + gap + right == np.maximum(windows, ~windows)[row].tolist()


@cases("block_size", [0, 4])
def test_a_hole_is_filled_by_the_sampler_and_guessed_as_hugging_face_continues(block_size):
    model = diffusion(random_lm("mistral", **WINDOW), "linear", 10, block_size=block_size)
    lengths = [(10, 4, 18), (8, 7, 17), (20, 5, 7)]
    holes = [[random_ids(n).tolist() for n in parts] for parts in lengths]
    pairs = evaluation.fill_holes(model, holes, 99)

    for (found, guess), (left, gap, right) in zip(pairs, holes, strict=True):
        start, prompt, more = len(left), left + [model.mask_id] * len(gap) + right, 0
        if block_size:
            prompt, more = left, 7
        [alone], _ = convert.generate(model, [prompt], more, 99)
        assert found == alone[start:start + len(gap)]
        with model.original_model() as lm:
            ids = torch.tensor([left])
            for _ in gap:
                ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
        assert guess == ids[0, start:].tolist()


def test_rouge_bleu_and_exact_match_are_those_counted_by_hand():
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    encode, tokenizer = model_files.byte_tokenizer().encode, model_files.byte_tokenizer()
    wanted = [encode("the cat sat on the mat"), encode("one two three four")]
    found = [encode("the cat on a mat"), encode("one two three four")]
    figures = evaluation.overlap(tokenizer, found, wanted)

    assert figures["exact"] == 0.5
    # the longest common subsequence, "the cat on mat", is 4 words of 5 and of 6
    assert math.isclose(figures["rouge"], (2 * 4 / (5 + 6) + 1) / 2)
    # n-grams of the same: 8 of 9 words, 4 of 7 pairs, 2 of 5 triples, 1 of 3; 9 words for 10
    bleu = math.exp(1 - 10 / 9) * (8 / 9 * 4 / 7 * 2 / 5 * 1 / 3) ** 0.25
    assert math.isclose(figures["bleu"], 100 * bleu, rel_tol=1e-6)


# ----------------------------------------------------------------------------------------------
# Tasks
def decided(model):
    """A random model that is far from guessing evenly, and in which time matters."""
    torch.manual_seed(1)
    for p in (*model.lm.parameters(), *model.time_mlp.parameters()):
        if p.dim() == 2:
            p.data = torch.randn_like(p) * 0.3
    return model


def brute_force(predict, tokens, unknown):
    """-NELBO of tokens (m,): for each number of masks the mean over all ways to place them.
    predict(masked, n_masked): log p of the masked tokens; unknown: masks behind them."""
    m, total = len(tokens), 0.0
    for count in range(1, m + 1):
        ways = list(itertools.combinations(range(m), count))
        total += sum(predict(way, count + unknown) for way in ways) / len(ways) / count
    return total  # counts are equally likely, and weigh m / count


def test_the_diffusion_log_likelihood_is_the_sum_over_all_masks():
    harness = pytest.importorskip("harness")
    model = decided(diffusion(random_lm("llama"), "cosine", 10))
    text = random_ids(9).tolist()
    context, continuation = text[:6], text[6:]

    def predict(way, n_masked):
        ids = torch.tensor([text])
        ids[0, [6 + i for i in way]] = model.mask_id
        t = convert.timestep(torch.tensor([n_masked / 9]), model)[:, None]
        model.set_causal(False)
        log_p = model(ids, t)[0].log_softmax(-1)
        return sum(log_p[5 + i, continuation[i]].item() for i in way)

    with torch.no_grad():
        expected = brute_force(predict, continuation, 0)
    found, error = harness.diffusion_log_likelihood(model, context, continuation, 3000, 1)
    assert abs(found - expected) < 4 * error and error < 0.01 * abs(expected)
    with torch.no_grad():
        single = brute_force(lambda way, n: predict((2,), n), continuation[2:], 0)
    one, error = harness.diffusion_log_likelihood(model, text[:8], text[8:], 3, 1)
    assert math.isclose(one, single, rel_tol=1e-5) and error < 1e-4  # one token has one mask


@cases("n_context", [4, 6])  # the continuation starts a block, or goes on with one
def test_in_blocks_it_is_the_bound_of_the_sampler(n_context):
    harness = pytest.importorskip("harness")
    model = decided(diffusion(random_lm("llama"), "cosine", 10, block_size=4))
    text = random_ids(11).tolist()  # the last block has 3 tokens and a mask
    context, continuation = text[:n_context], text[n_context:]

    @torch.no_grad()
    def block(start):  # -NELBO of the part of the continuation in a block, as the sampler sees it
        cache, pad = convert.new_cache(CPU), torch.zeros(1, 1, dtype=torch.long)
        before = convert.forward_at(
            model, torch.tensor([text[:start]]), 0, pad, 0, cache=cache)[0, -1].log_softmax(-1)
        here = text[start:start + 4] + [model.mask_id] * (start + 4 - len(text))
        scored = [i for i in range(4) if n_context <= start + i < len(text)]
        total = before[here[0]].item() if 0 in scored else 0.0  # the first is the AR mode's
        scored = [i for i in scored if i]

        def predict(way, n_masked):
            ids = torch.tensor([here])
            ids[0, [scored[i] for i in way]] = model.mask_id
            t = convert.timestep(torch.tensor([n_masked / 4]), model)[:, None]
            log_p = convert.forward_at(model, ids, start, pad, 1, t, None, cache)[0].log_softmax(-1)
            convert.crop_cache(cache, 4)
            return sum(log_p[scored[i] - 1, here[scored[i]]].item() for i in way)
        return total + brute_force(predict, scored, here.count(model.mask_id))

    expected = block(4) + block(8)
    found, error = harness.diffusion_log_likelihood(model, context, continuation, 3000, 1)
    assert abs(found - expected) < 4 * error and error < 0.002 * abs(expected)


def test_the_ar_mode_scores_and_writes_what_the_harness_does_with_final(tmp_path):
    harness = pytest.importorskip("harness")
    from lm_eval.api.instance import Instance
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = whole_model(max_position_embeddings=64)
    save_final(tmp_path / "final", model)
    model, tokenizer = convert.load_model(tmp_path / "final", CPU)
    ours = harness.Converted(model.eval(), tokenizer, settings())
    theirs = huggingface.HFLM(str(tmp_path / "final"), device="cpu", dtype="float32")

    def both(kind, *requests):
        requests = [Instance(kind, {}, args, i) for i, args in enumerate(requests)]
        return [getattr(lm, kind)(requests) for lm in (ours, theirs)]

    found, expected = both("loglikelihood", ("A cat", " sat"), ("", "No context"), ("A ", "b c"),
                           (TEXT[:90], " left out in part"))  # longer than the model's positions
    assert_close(torch.tensor(found), torch.tensor(expected))
    found, expected = both("loglikelihood_rolling", (TEXT[:30],), (TEXT[:200],))
    assert_close(torch.tensor(found), torch.tensor(expected))
    [written], _ = both("generate_until", ("A cat", {"max_gen_toks": 20}))
    found, expected = both(
        "generate_until", ("A cat", {"until": [written[9]], "max_gen_toks": 20}),
        (TEXT[:70], {"until": ["\n"], "max_gen_toks": 9}))
    assert found == expected and 0 < len(found[0]) < 10


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{i} plus {i} is", "choices": [str(2 * i), "a dog", "x"], "label": 0}
            for i in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = {"dataset_path": "json", "test_split": "train", "doc_to_text": "{{question}}",
              "dataset_kwargs": {"data_files": str(folder / "rows.jsonl"),
                                 "cache_dir": str(tmp_path / "cache")}}
    sums = {"task": "sums", "output_type": "multiple_choice", "doc_to_target": "label",
            "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}]}
    writing = {"task": "writing", "output_type": "generate_until",
               "doc_to_target": "{{choices[label]}}", "metric_list": [{"metric": "exact_match"}],
               "generation_kwargs": {"until": ["."], "max_gen_toks": 6}}
    for task in (sums, writing):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


# ----------------------------------------------------------------------------------------------
# The command
def finished_run(model=None, **run_settings):
    """A finished run in out/, and a text."""
    save_final("out/final", model or whole_model())
    record = json.loads(Path("out/final/diffusion.json").read_text())
    Path("out/final/diffusion.json").write_text(json.dumps(record | {"settings": run_settings}))
    Path("text.txt").write_text(TEXT)


def test_an_evaluation_is_one_object_and_a_row_beside_final(sample_main, tasks):
    for name in ("lm_eval", "rouge_score", "sacrebleu"):
        pytest.importorskip(name)
    finished_run(model_name="base")
    lm = whole_model().lm
    lm.save_pretrained("base")
    model_files.byte_tokenizer().save_pretrained("base")
    flags = ["--out_dir=out", "--evaluate=text.txt", "--eval_samples=8", "--infill_spans=5",
             "--tasks=sums,writing", f"--tasks_folder={tasks}", "--tasks_draws=2", "--steps=2"]
    for mode in ("ar", "diffusion"):
        code, out, err = sample_main(*flags, f"--tasks_mode={mode}", "--json")
        assert code == 0, err
        row = json.loads(out)
        assert set(evaluation.FIGURES) - {"tasks_mc_se"} <= set(row) and "error" not in err
        assert ("tasks_mc_se" in row) == (mode == "diffusion")
        assert 0 <= row["tasks"]["sums"]["acc,none"] <= 1 and "writing" in row["tasks"]
        assert math.isclose(row["base_ar_ppl"], row["ar_ppl"], rel_tol=1e-5)  # the same weights
        assert row["eval_nelbo"] == row["sampler_bound"] and row["infill_spans"] == 5
        rows = Path("out/evaluations.jsonl").read_text().splitlines()
        assert json.loads(rows[-1]) == row and row["file"] == "text.txt"
    assert len(rows) == 2

    Path("out/evaluations.jsonl").unlink()
    Path("out/evaluations.jsonl").mkdir()  # nothing can be written there
    code, out, err = sample_main("--out_dir=out", "--evaluate=text.txt", "--infill_spans=0")
    assert code == 0 and "evaluations.jsonl cannot be written" in err
    assert re.search(r"^ar_ppl +\d+\.\d{4}  perplexity", out, re.M) and "infill" not in out


@cases("run_settings, why", [
    ({"model_config": "{}"}, "random"), ({"model_name": "gone/away"}, "gone/away"),
    ({"model_name": "base", "tokenizer_name": "bytes"}, "tokenizer")])
def test_a_base_that_is_not_there_is_a_line(sample_main, run_settings, why):
    block_model = diffusion(random_lm("llama", vocab_size=300), "linear", 10, block_size=4)
    finished_run(block_model, **run_settings)
    code, out, err = sample_main("--out_dir=out", "--evaluate=text.txt", "--infill_spans=0")
    assert code == 0 and "no base_ar_ppl" in err and why in err and "base_ar_ppl" not in out


WRONG = {  # flags: a word of the error
    "--evaluate=nowhere.txt": "nowhere.txt", "--evaluate=empty.txt": "evaluate: 'empty.txt'",
    "--evaluate=short.txt": "too little text", "--evaluate=text.txt --verify": "verify",
    "--evaluate=text.txt --prompts=text.txt": "prompts", "--tasks_folder=.": "--tasks",
    "--evaluate=text.txt --tasks_mode=diffusion": "--tasks",
    "--tasks=sums --tasks_folder=nowhere": "tasks_folder", "--tasks=sums --tasks_mode=best": "ar",
    "--evaluate=rows.jsonl --text_column=txt": "text_column"}


@cases("flags", WRONG)
def test_what_cannot_be_evaluated_is_one_line_and_exit_2(sample_main, flags):
    finished_run()
    Path("empty.txt").touch()
    Path("short.txt").write_text("A line.\n")
    Path("rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    check_error(sample_main("--out_dir=out", "--infill_spans=0", *flags.split()), WRONG[flags])


@cases("flag, package", [("--evaluate=text.txt", "rouge_score"), ("--tasks=arc", "lm_eval")])
def test_a_package_that_is_missing_is_one_line(sample_main, monkeypatch, flag, package):
    finished_run()
    find = evaluation.importlib.util.find_spec
    monkeypatch.setattr(evaluation.importlib.util, "find_spec",
                        lambda name: None if name == package else find(name))
    check_error(sample_main("--out_dir=out", flag), "pip install -e '.[eval]'")


@cases("allowed, offline", [(None, True), ("0", False)])
def test_nothing_is_downloaded_unless_it_is_allowed(monkeypatch, allowed, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if allowed:
        monkeypatch.setenv("HF_HUB_OFFLINE", allowed)

    evaluation.go_offline()
    assert huggingface_hub.is_offline_mode() == datasets.config.HF_HUB_OFFLINE == offline


def test_a_task_or_its_data_that_is_not_there_is_one_line(sample_main, tasks):
    pytest.importorskip("lm_eval")
    finished_run()
    check_error(sample_main("--out_dir=out", "--tasks=arc_eazy"), "did you mean 'arc_easy'?")

    far = json.loads((tasks / "sums.yaml").read_text())
    far |= {"task": "far", "dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    (tasks / "far.yaml").write_text(json.dumps(far))
    flags = "--tasks=far", f"--tasks_folder={tasks}"
    check_error(sample_main("--out_dir=out", *flags), "HF_HUB_OFFLINE=0")
