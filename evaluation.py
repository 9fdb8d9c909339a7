"""What a finished model is worth: figures on a text, holes filled in it, tasks of a harness.

  python sample.py --evaluate=my_text.txt                     # bounds, perplexity, infilling
  python sample.py --tasks=arc_easy --tasks_mode=diffusion    # needs pip install -e '.[eval]'
  python sample.py --evaluate=my_text.txt --tasks=mine --tasks_folder=my_tasks --json

sample.py imports this module only when it is asked to evaluate, finish.py for its holes. The bounds
are those of training, evaluate() and window_losses() of convert.py; infilling is the sampler's
generate(); tasks are in harness.py. The name is not evaluate.py, which would hide a package that
the harness needs.
"""
import contextlib
import datetime
import functools
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm

from configurator import UserError, first_line, out_of_memory
from convert import (
    DiffusionLM, evaluate, generate, read_record, window_losses, with_less_memory)
from corpus import documents, encoding, make_windows, read_corpus, seed_for
from model_files import load_hf
from probe import decoder_layers
from verify import decode_verified

FIGURES = {  # of --json, in the order in which they are printed
    "eval_nelbo": "nats per token, at least the diffusion's -log p(text)",
    "eval_nelbo_se": "its standard error over windows",
    "sampler_bound": "the same for the sampler; with blocks it knows the first token of each",
    "sampler_bound_se": "its standard error over windows",
    "eval_ppl_bound": "exp(eval_nelbo)",
    "eval_bpb": "eval_nelbo in bits per byte",
    "ar_ppl": "perplexity of the AR mode of the same weights",
    "base_ar_ppl": "perplexity of the model before the conversion",
    "infill_exact": "share of holes filled with the very tokens",
    "infill_rouge": "ROUGE-L of what fills the holes, F1 in 0..1",
    "infill_bleu": "BLEU of the same, 0..100",
    "ar_infill_exact": "the AR mode's greedy guess, which sees the left side alone",
    "ar_infill_rouge": "its ROUGE-L",
    "ar_infill_bleu": "its BLEU",
    "tasks_mc_se": "mean standard error of a log-likelihood in diffusion mode, in nats",
}
NO_AUTOCAST = contextlib.nullcontext()  # the weights are in the dtype asked for


def check_flags(s):
    """Raise UserError for flags that exclude one another, and for what is not there. s: the
    settings of sample.py."""
    for name in ("prompt", "prompts", "chat", "verify", "compare", "watch", "trace"):
        if vars(s)[name]:
            raise UserError(f"{name}: is of samples, which --evaluate and --tasks do not write")
    if (s.tasks_folder or s.tasks_mode != "ar") and not s.tasks:
        raise UserError("tasks_folder, tasks_mode: need --tasks=NAME, comma-separated")
    if s.tasks_folder and not Path(s.tasks_folder).is_dir():
        raise UserError(f"tasks_folder: there is no folder '{s.tasks_folder}'")
    if s.evaluate and s.evaluate not in ("pydoc", "world") and not Path(s.evaluate).exists():
        raise UserError(f"evaluate: there is no '{s.evaluate}'; it takes a file or a folder")
    needed = {}
    if s.tasks:
        needed["lm_eval"] = "tasks: it needs {}; pip install -e '.[eval]'"
    if s.evaluate and s.infill_spans:
        for package in ("rouge_score", "sacrebleu"):
            needed[package] = "evaluate: it needs {}; pip install -e '.[eval]' or --infill_spans=0"
    for package, message in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(message.format(package))


def evaluate_model(model, tokenizer, folder, s):
    """Evaluate the model of a folder as the settings s of sample.py say, print the figures and add
    them to the evaluations of its run."""
    go_offline()
    record, windows = read_record(folder), None
    row = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
           "command": shlex.join(sys.argv), "model": str(folder), "seed": s.seed}
    if s.evaluate:
        length = record["max_seq_length"]
        windows = read_windows(s, tokenizer, length, model.block_size)
        row |= {"file": s.evaluate, "windows": len(windows), "max_seq_length": length}
        row |= text_figures(model, tokenizer, windows, s.seed)
        row |= infill_figures(model, tokenizer, windows, s)
    if s.tasks:
        from harness import task_figures  # it imports lm_eval
        row |= task_figures(model, tokenizer, s)
    if s.evaluate:  # last, as it needs the memory of the model
        row |= base_figures(model, record, windows, row["ar_ppl"], s.seed)
    if s.json:
        print(json.dumps(row, default=float))
    else:
        print_figures(row, folder)
    path = Path(folder).absolute().parent / "evaluations.jsonl"
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row, default=float) + "\n")
    except OSError as error:
        note(f"{path} cannot be written: {first_line(error)}")


def go_offline():
    """Have libraries read what is on the disk alone, unless HF_HUB_OFFLINE=0 allows a download."""
    if os.environ.setdefault("HF_HUB_OFFLINE", "1") != "0":
        import datasets  # slow to import
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True


def note(text):
    """Print a line that is no figure, on stderr."""
    print(f"note: {text}", file=sys.stderr)


def print_figures(row, folder):
    """Print the figures of a row of evaluations.jsonl, one a line with what it is."""
    for name, meaning in FIGURES.items():
        if name in row:
            print(f"{name:16} {row[name]:10.4f}  {meaning}")
    for task, figures in row.get("tasks", {}).items():
        print(f"{task:16} {', '.join(f'{k} {v:.4g}' for k, v in figures.items())}")
    seen = ""
    if "file" in row:
        holes = row.get("infill_spans", 0)
        seen = f": {row['windows']} windows of {row['file']}, {holes} holes in them"
    print(f"{folder}{seen}")


@contextlib.contextmanager
def passes_shown(model, what, total):
    """A bar on stderr, with the time left, of how often the model runs."""
    with tqdm(total=total, desc=what, unit="passes", disable=None, leave=False) as bar:
        def count(*_):  # returns nothing: a hook's result would be the layer's
            bar.update()
        hook = decoder_layers(model.lm)[0].register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


# ----------------------------------------------------------------------------------------------
# A text: bounds and perplexities
def read_windows(s, tokenizer, length, block):
    """Windows (n, T), int64, of a file that corpus.py reads, of a validation split if it has one.

    They are cut as those of training: of at most eval_samples, a seeded sample of the documents, or
    with 0 all of them in order.
    """
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
        try:
            corpus = read_corpus(s.evaluate, "", "train", s.text_column, cache)
        except UserError as error:
            text = str(error).replace("dataset_name:", "evaluate:")
            raise UserError(text) from None
        if corpus["chat"] and not tokenizer.chat_template:
            raise UserError("evaluate: chat data, but this tokenizer has no chat template")
        texts, lines = corpus["held"] or corpus["train"], corpus["lines"]
        order = np.arange(math.ceil(len(texts) / lines))
        if s.eval_samples:
            order = np.random.default_rng(s.seed).permutation(order)
        report = {"refused": 0, "first_refused": None}
        found = list(make_windows(
            ((i, text) for i, text in documents(texts, lines, order) if text),
            *encoding(corpus, tokenizer, length, block), s.eval_samples or sys.maxsize, length,
            report))
    if report["refused"]:
        note(f"{report['refused']} texts refused, the first: {report['first_refused'][1]}")
    windows = np.concatenate([np.zeros((0, length), np.int64), *found])
    if not len(windows):
        raise UserError(f"evaluate: '{s.evaluate}' has too little text for a window of {length} "
                        "tokens, which this model was trained on")
    return windows


def text_figures(model, tokenizer, windows, seed):
    """The metrics of training on windows (n, T), with training's noise: the same windows give the
    same figures. A whole-sequence model samples what eval_nelbo bounds."""
    state = {"eval_micro_batch": 8}
    passes = (3 if model.block_size else 2) * math.ceil(len(windows) / 8)
    with passes_shown(model, "bounds", passes):
        row = evaluate(model, tokenizer, windows, NO_AUTOCAST, seed_for(seed, "evaluation"), state)
    for end in ("", "_se"):
        row["sampler_bound" + end] = row.pop("eval_nelbo_sampler" + end, row["eval_nelbo" + end])
    return row


def base_figures(model, record, windows, ar_ppl, seed):
    """{base_ar_ppl} of the model that was converted, if it is on this disk, else {} and a line on
    why not. The AR mode of adapters is their base."""
    if record.get("base"):
        return {"base_ar_ppl": ar_ppl}
    target = model.device
    model.to("cpu")
    try:
        largest_id = np.maximum(windows, ~windows).max()
        base = load_converted(record["settings"], largest_id, model.lm.dtype)
        with passes_shown(base, "base model", math.ceil(len(windows) / 8)):
            work = functools.partial(
                window_losses, base.to(target), torch.from_numpy(windows), NO_AUTOCAST,
                seed_for(seed, "evaluation"), only=slice(1, 2))  # the AR loss
            losses = with_less_memory(work, {"eval_micro_batch": 8}, base, size="eval_micro_batch")
    except (UserError, RuntimeError) as error:
        if not isinstance(error, UserError) and not out_of_memory(error):
            raise
        note(f"no base_ar_ppl: {first_line(error)}")
        return {}
    return {"base_ar_ppl": math.exp(min(losses.sum().item(), 700))}


def load_converted(settings, largest_id, as_dtype):
    """The model that a run with these settings converted, as a DiffusionLM in causal mode, from a
    folder or the hub's cache. UserError if it is not there or has another vocabulary."""
    name = settings.get("model_name", "")
    if settings.get("model_config") or not name:
        raise UserError("the model was trained from random weights, or its run names no other")
    if settings.get("tokenizer_name"):
        raise UserError(f"'{name}' was converted with a tokenizer that is not its own")
    if not Path(name).exists():
        cached = name.count("/") == 1 and try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise UserError(f"'{name}', which was converted, is not on this disk")
        name = str(Path(cached).parent)
    with contextlib.redirect_stdout(sys.stderr):
        lm, tokenizer = load_hf(name, "", "", as_dtype)
    base = DiffusionLM(lm, 1, "linear", False, True).eval()
    if largest_id >= base.mask_id:
        raise UserError(f"'{name}' has another vocabulary than what was made of it")
    if tokenizer.eos_token_id is not None:
        base.end_id = tokenizer.eos_token_id
    return base


# ----------------------------------------------------------------------------------------------
# Infilling
def cut_spans(windows, n, last, seed):
    """[(window, start, length)] of n holes of 4 to 12 tokens that end before position `last`, in
    the middle half of windows (n, T) and without context (~id), which is not to be predicted."""
    rng, T, spans = np.random.default_rng(seed), windows.shape[1], []
    for _ in range(20 * n):  # tries
        row, length = rng.integers(len(windows)), rng.integers(4, 13)
        start = rng.integers(T // 4, max(T // 4, 3 * T // 4 - length) + 1)
        fits = start > 0 and start + length < min(last, T)
        if len(spans) < n and fits and windows[row, start:start + length].min() >= 0:
            spans.append((int(row), int(start), int(length)))
    return spans


def cut_holes(windows, n, last, seed):
    """Holes (left, gap, right), lists of ids, at the places of cut_spans() in windows (n, T)."""
    texts = np.maximum(windows, ~windows).tolist()  # ~id back to id
    return [(texts[row][:start], texts[row][start:start + length], texts[row][start + length:])
            for row, start, length in cut_spans(windows, n, last, seed)]


def fill_holes(model, holes, steps, **options):
    """[(what the sampler puts into a hole, what the AR mode writes there, which sees its left
    alone)], lists of ids, for holes (left, gap, right). A block model too continues the left.
    options: of generate()."""
    pairs = []
    for i in tqdm(range(0, len(holes), 8), "filling holes", disable=None, leave=False):
        lefts, gaps, rights = zip(*holes[i:i + 8], strict=True)
        prompts, more = lefts, max(map(len, gaps))
        if not model.block_size:
            masks, more = [[model.mask_id] * len(gap) for gap in gaps], 0
            prompts = [sum(parts, []) for parts in zip(lefts, masks, rights, strict=True)]
        rows, _ = generate(model, prompts, more, steps, **options)
        for row, left, gap in zip(rows, lefts, gaps, strict=True):
            [guess], _ = decode_verified(model, [left], len(gap), 0, 0, {})  # {}: greedily
            pairs.append((row[len(left):len(left) + len(gap)], guess))
    return pairs


def overlap(tokenizer, found, wanted):
    """{exact, rouge, bleu} of lists of ids against those wanted: the share of equal ones, the mean
    F1 of ROUGE-L (https://aclanthology.org/W04-1013), BLEU (https://aclanthology.org/W18-6319)."""
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, like the other
    from sacrebleu import corpus_bleu
    logging.getLogger("absl").setLevel(logging.WARNING)  # it logs which tokenizer it takes
    texts, references = ([tokenizer.decode(ids) for ids in side] for side in (found, wanted))
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(reference, text)["rougeL"].fmeasure
             for text, reference in zip(texts, references, strict=True)]
    equal = [a == b for a, b in zip(found, wanted, strict=True)]
    return {"exact": float(np.mean(equal)), "rouge": float(np.mean(rouge)),
            "bleu": corpus_bleu(texts, [references]).score}


def infill_figures(model, tokenizer, windows, s):
    """The infill and ar_infill figures on holes cut into windows (n, T), or {}."""
    last = windows.shape[1]
    if model.block_size:  # it writes on in whole blocks, behind the longest text of a batch
        last = min(last, model.max_positions - 12 - model.block_size)
    holes = cut_holes(windows, s.infill_spans, last, seed_for(s.seed, "infilling"))
    if not holes:
        if s.infill_spans:
            note("no infilling: the windows have no room for holes of 4 to 12 tokens")
        return {}
    if model.block_size:
        note("a block model writes left to right: it fills holes from the left alone, as AR does")
    pairs = fill_holes(
        model, holes, s.steps, order=s.order, threshold=s.threshold, remask=s.remask,
        sampling={"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p},
        generator=torch.Generator(model.device).manual_seed(s.seed))
    found, guesses = zip(*pairs, strict=True)
    wanted = [gap for _, gap, _ in holes]
    row = {"infill_spans": len(holes)}
    for name, side in {"infill": found, "ar_infill": guesses}.items():
        row |= {f"{name}_{key}": x for key, x in overlap(tokenizer, side, wanted).items()}
    return row
