"""The end of a run: what the conversion changed, shown on held-out text.

convert.main() calls finish() once final/ is saved. The figures are also kept in
out_dir/result.json, from which report.py takes them.
"""
import json
import random
import shlex
import signal

import numpy as np
import torch
from tqdm import tqdm

import processes
from configurator import RunError, UserError, errors_as, first_line
from convert import generate
from corpus import encode_prompt, end_ids, end_of, opening, world
from drafting import decode_in_turns
from evaluation import cut_holes, fill_holes
from history import before_and_after, is_number, read_run, shares
from machine import eagerly
from replay import text_after
from report import report_on_run
from runs import write_whole
from terminal import duration, quoted_text


# --------------------------------------------------------------------------------------------------
# Texts and holes
def held_out(tokenizer, val_data, s):
    """Held-out texts to show: up to 50 stories of the world, or 4 windows of other data."""
    if s.dataset_name == "world":
        return world().train_and_held_out()[1][:50]
    ids = [[max(x, ~x) for x in window[:64].tolist()] for window in val_data[:4]]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def held_out_holes(tokenizer, texts, val_data, s):
    """Holes (left, gap, right), lists of ids, fixed by the seed: words of the world's stories that
    only the text to their right decides, or else 4 to 12 tokens of held-out windows."""
    if s.dataset_name != "world":
        windows = np.asarray(val_data[:8, :64], np.int64)
        return cut_holes(windows, 8, windows.shape[1], s.seed)
    rng, words = random.Random(s.seed), []
    for text in texts:
        found = world().holes(text)
        words += rng.sample(found, min(2, len(found)))
    return [encode_hole(tokenizer, *word) for word in words]


def encode_hole(tokenizer, left, gap, right):
    """The ids of the three parts of a text around a hole."""
    space = left[len(left.rstrip()):]  # a tokenizer joins a space to the word after it
    gap, left = space + gap, left.rstrip()
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in (left, gap, right)]
    parts[0] = opening(tokenizer) + parts[0] or [tokenizer.eos_token_id or 0]
    return parts


# --------------------------------------------------------------------------------------------------
# What the model does with them
def write_all(model, tokenizer, prompts, n_new):
    """The texts that diffusion writes behind prompts (lists of ids), one token in a pass."""
    ends, rows = end_ids(model.lm, tokenizer), []
    for start in tqdm(range(0, len(prompts), 10), "writing by unmasking", disable=None):
        rows += generate(model, prompts[start:start + 10], n_new, n_new, ends)[0]
    new = [row[len(ids):] for row, ids in zip(rows, prompts, strict=True)]
    return [ids[:end_of(ids, ends)] for ids in new]


def race(model, tokenizer, prompts, n_new):
    """Plain AR decoding of prompts, and for a block model verified decoding in turns with it: (the
    AR texts as lists of ids, figures)."""
    ends, modes = end_ids(model.lm, tokenizer), {"ar": (0, 0, None)}
    if model.block_size:
        n = min(3, model.block_size - 1)
        modes["drafts"] = n, n + 1, None
    texts, seconds, counts = decode_in_turns(model, prompts, modes, n_new, {}, ends,
                                             title="decoding")
    plain = [ids[:end_of(ids, ends)] for ids in texts["ar"]]
    if not model.block_size:
        return plain, {}
    equal = sum(a == b for a, b in zip(texts["ar"], texts["drafts"], strict=True))
    n_tokens, n = sum(map(len, texts["drafts"])), counts["drafts"]
    return plain, {
        "tokens_per_forward": n_tokens / n["forwards"], "equal": equal, "texts": len(prompts),
        "accepted_per_check": n["accepted"] / max(1, n["checks"]),
        "speed_over_ar": seconds["ar"] / seconds["drafts"]}


@torch.no_grad()
def measure(model, tokenizer, val_data, s):
    """Figures and examples on held-out text: {samples, hole, accepted, holes_right, verify}, as far
    as they apply."""
    texts, is_world = held_out(tokenizer, val_data, s), s.dataset_name == "world"
    starts = [text[:text.find(".") + 1] if is_world else text[:len(text) // 3] for text in texts]
    prompts = [encode_prompt(model, tokenizer, start, 0)[:s.max_seq_length // 3 or 1]
               for start in starts]
    starts = tokenizer.batch_decode(prompts, skip_special_tokens=True)  # they may be cut
    n_new = max(1, min(32, s.max_seq_length // 2 - 8))
    longest = max(map(len, prompts))
    if is_world:  # a story fills a window
        n_new = s.max_seq_length - longest
    if model.block_size:  # it writes whole blocks, and drafts ahead
        n_new = max(1, min(n_new, model.max_positions - longest - model.block_size - 8))
    ar_texts, verify = race(model, tokenizer, prompts, n_new)
    written = write_all(model, tokenizer, prompts, n_new)
    both = [[text_after(tokenizer, new, ids) for new, ids in zip(side, prompts, strict=True)]
            for side in (ar_texts, written)]
    result = {"samples": [a + b for a, b in zip(starts, both[1], strict=True)][:3]}
    if verify:
        result["verify"] = verify
    if is_world:
        shares = []
        for side in both:
            right = [x for start, text in zip(starts, side, strict=True)
                     for x in world().judge(start + text)[1:]]
            shares.append(sum(right) / max(1, len(right)))
        result["accepted"] = {"ar": shares[0], "diffusion": shares[1]}
    holes = [] if model.block_size else held_out_holes(tokenizer, texts, val_data, s)
    holes = [hole for hole in holes if sum(map(len, hole)) <= model.max_positions]
    if holes:
        result |= infilling(model, tokenizer, holes)
        if not is_world:  # its words alone are decided by their right sides
            del result["holes_right"]
    return result


def infilling(model, tokenizer, holes):
    """The shares of holes filled with the very tokens, and one of them, if there is one that
    diffusion fills rightly and the AR mode does not."""
    pairs = fill_holes(model, holes, max(len(gap) for _, gap, _ in holes))  # a token a pass
    right = [(found == gap, guess == gap)
             for (found, guess), (_, gap, _) in zip(pairs, holes, strict=True)]
    example = right.index((True, False)) if (True, False) in right else 0
    (left, gap, after), (found, guess) = holes[example], pairs[example]
    answer, filled, guessed = (text_after(tokenizer, ids, left) for ids in (gap, found, guess))
    space = answer[:len(answer) - len(answer.lstrip())]  # a tokenizer joins it to the word
    diffusion, ar = (sum(side) / len(holes) for side in zip(*right, strict=True))
    return {"hole": {"left": tokenizer.decode(left, skip_special_tokens=True) + space,
                     "right": text_after(tokenizer, after, left + gap), "answer": answer.strip(),
                     "filled": filled.strip(), "ar_guess": guessed.strip()},
            "holes_right": {"ar": ar, "diffusion": diffusion}}


# --------------------------------------------------------------------------------------------------
# The screen
def figures_of(run):
    """What the log of a run says of all of it: minutes of training, tokens, and the figures before
    and after. run: of read_run()."""
    first, last = before_and_after(run)
    if not first:  # AR pre-training alone
        first = run["evals"][0]
    seconds, tokens = 0.0, 0
    for row in run["steps"]:
        seconds += (row["tokens"] - tokens) / max(1, row["tokens_per_s"])
        tokens = row["tokens"]
    return {"minutes": seconds / 60, "tokens": tokens, "ar_ppl_before": last["ar_ppl_before"],
            "ar_ppl": last["ar_ppl"], "eval_nelbo_first": first["eval_nelbo"],
            "eval_nelbo": last["eval_nelbo"], "eval_nelbo_se": last["eval_nelbo_se"]}


def screen(result, out, s, room):
    """The text of the end screen. room: how many tokens of a window sample_prompt leaves."""
    rule = "-" * 80
    took = duration(60 * result["minutes"])
    lines = ["", rule, f"done: {out}/final",
             f"{took} of training steps, {result['tokens']:,} tokens", "",
             f"{'':34}{'before':>10}{'after':>10}"]
    for name, before, after in (("AR model, perplexity", "ar_ppl_before", "ar_ppl"),
                                ("diffusion, NELBO in nats a token", "eval_nelbo_first",
                                 "eval_nelbo")):
        cells = [f"{x:10.3f}" if is_number(x) else f"{'-':>10}"
                 for x in (result[before], result[after])]
        lines.append(f"{name:34}{''.join(cells)}")
    if is_number(result["eval_nelbo_se"]):
        lines[-1] += f"   (se {result['eval_nelbo_se']:.3f})"
    if "samples" in result:
        how = "block by block" if s.block_size else "by unmasking"
        lines += ["", f"written {how} behind the start of held-out texts:"]
        lines += [quoted(text, str(n)) for n, text in enumerate(result["samples"], 1)]
    if "hole" in result:
        hole = result["hole"]
        lines += ["", "a hole in a held-out text:",
                  quoted(f"{hole['left']}[____]{hole['right']}"),
                  f"    diffusion, from both sides    {hole['filled']!r}",
                  f"    AR model, from the left       {hole['ar_guess']!r}",
                  f"    the text has                  {hole['answer']!r}"]
    judged = [row.values() for row in shares(result)]
    if judged:
        lines += ["", f"{'judged by the grammar':34}{'AR model':>10}{'diffusion':>10}"]
        lines += [f"{name:34}{ar:>10}{diffusion:>10}" for name, ar, diffusion in judged]
    if "verify" in result:
        verify = result["verify"]
        lines += ["", "verified decoding, beside plain AR decoding:",
                  f"    {verify['equal']} of {verify['texts']} texts are the same",
                  f"    {verify['tokens_per_forward']:.2f} tokens a forward pass, "
                  f"{verify['speed_over_ar']:.2f} times the speed"]
    flag = f"--out_dir={shlex.quote(str(out))}"
    next_one = f"python sample.py {flag} --watch"
    if s.sample_prompt.isprintable():  # nothing in it moves the cursor
        next_one += f" --prompt={shlex.quote(s.sample_prompt)}"
    if room < 64:  # what sample.py writes
        next_one += f" --max_new_tokens={max(1, room)}"
    if s.block_size:
        next_one = f"python sample.py {flag} --verify --compare"
    text = "world" if s.dataset_name == "world" else "my_text.txt"
    return "\n".join([*lines, "", "next:", f"    {next_one}",
                      f"    python sample.py {flag} --evaluate={text}", rule])


def quoted(text, name=""):
    """A text in at most five indented lines, the first behind its name."""
    return quoted_text(" ".join(text.split()), name, most=5)


def show(model, tokenizer, val_data, autocast, out, s):
    """Measure, print the screen, keep it in out/result.json, write the report. What cannot be
    measured is told in one line, as the run is saved."""
    result = figures_of(read_run(out))
    model.eval()
    torch.manual_seed(s.seed)  # of the random tokens of noise="uniform"
    try:
        if not processes.is_sharded(model):
            with (errors_as("on held-out text", RunError), eagerly(s.compile_model),
                  model.attention(model.kernel), autocast):
                result |= measure(model, tokenizer, val_data, s)
    except (UserError, RuntimeError) as error:  # errors_as() leaves a lack of memory as it is
        print(f"no examples are shown: {first_line(error)}")
    room = s.max_seq_length - len(encode_prompt(model, tokenizer, s.sample_prompt, 0))
    print(screen(result, out, s, room))
    with errors_as(f"out_dir: cannot write {out / 'result.json'}", RunError):
        write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    report_on_run(out, model, tokenizer, autocast)


def finish(model, tokenizer, val_data, autocast, out, s):
    """Show what a run has changed, and write its report, in the first process.

    All is saved by now: a signal ends the process at once, and a lack of memory costs the examples
    alone. With a sharded model there are none, as every process would have to write them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm's warning: nothing is left to save
    processes.from_rank_0(show, model, tokenizer, val_data, autocast, out, s)
