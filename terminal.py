"""What a run tells in the terminal and in its log: the plan, a line for steps and for evaluations,
and one bar.

A line has at most 100 columns. What does not fit is in training_logs.jsonl, which has every figure.
"""
import bisect
import itertools
import json
import math
import shutil
import statistics
import textwrap
import unicodedata

from tqdm import tqdm

from configurator import RunError, errors_as
from corpus import left_out
from machine import memory_gb
from model_files import n_weights
from probe import decoder_layers

LOSSES = "diffusion", "ar", "distill"  # the parts of the loss, in the order of DiffusionLM.loss()
COLUMNS = 100


def duration(seconds):
    """A time in the unit that fits it, as 4.2 s, 35 min or 12 hours."""
    for unit, size in {"s": 1, "min": 60, "hours": 3600}.items():
        if seconds < 99.5 * size or unit == "hours":
            n = seconds / size
            return f"{n:.2g} {unit}" if n < 9.95 else f"{n:,.0f} {unit}"


def fitting(fields):
    """Fields in a line, less as many of the last as do not fit."""
    fields = list(filter(None, fields))
    while len("  ".join(fields)) > COLUMNS:
        fields.pop()
    return "  ".join(fields)


def quoted_text(text, name="", most=3):
    """A text of a model as indented lines, so many at most, that fit the terminal; what would move
    the cursor or ring the bell is escaped."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    width = min(COLUMNS, shutil.get_terminal_size((COLUMNS, 24)).columns)
    if any(unicodedata.east_asian_width(c) in "WF" for c in text):
        width //= 2  # such a character takes two columns
    first = f"    {name}: " if name else "    "
    lines = textwrap.wrap(text, max(width, 2 * len(first)), max_lines=most, placeholder=" ...",
                          initial_indent=first, subsequent_indent=" " * len(first))
    return "\n".join(lines or [first.rstrip()])


# ----------------------------------------------------------------------------------------------
# The plan
def print_plan(model, s, stages, trained, train_data, val_data, data_report):
    """Print what is about to run, so that no derived value stays hidden. trained: {what a stage
    trains: how many parameters these are}."""
    config = model.lm.config.get_text_config()
    size = sum(n_weights(p) for p in model.parameters())
    tokens = s.batch_size * s.gradient_accumulation_steps * s.max_seq_length
    print(f"model: {config.model_type}, {len(decoder_layers(model.lm))} layers, {size:,} "
          "parameters")
    turned = "bidirectional when switched" if model.bidirectional else "which it stays"
    print(f"attention: {config._attn_implementation}, causal as it came, {turned} (checked on this "
          "model)")
    print(f"data: {len(train_data):,} windows of {s.max_seq_length} tokens, {len(val_data):,} "
          f"held out; {left_out(data_report)}, "
          f"{data_report['held_out_share_in_training']:.1%} of held-out text is in training too")
    n_own = max(stage["n_on_policy"] for stage in stages)
    own_text = f", {n_own} windows on-policy" if n_own else ""
    print(f"step: {tokens:,} tokens{own_text}\n")
    print(f"{'stage':24}{'trained':>15}{'frozen':>15}{'rate':>9}{'warm-up':>9}{'steps':>9}"
          f"{'tokens':>15}  loss")
    for stage in stages:
        if stage["steps"]:
            n = trained[stage["trains"]]
            loss = [f"{stage[k]:g} {k}" for k in LOSSES if stage[k]]
            print(f"{stage['name']:24}{n:15,}{size - n:15,}{stage['lr']:9.1e}{stage['warmup']:9,}"
                  f"{stage['steps']:9,}{stage['steps'] * tokens:15,}  {' + '.join(loss)}")
    print(flush=True)


# ----------------------------------------------------------------------------------------------
# How long it takes
def training_bar(done, steps):
    """The bar of a run. On a terminal it alone says what is left; elsewhere there is no bar, and
    the log lines say it."""
    return tqdm(total=steps, initial=done, desc="training", disable=None, dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}")


def evaluations_due(stages, eval_steps):
    """After which steps of a run it evaluates: where a stage starts, every eval_steps, at the end.
    """
    ends = list(itertools.accumulate(stage["steps"] for stage in stages))
    starts = {end - stage["steps"] for end, stage in zip(ends, stages, strict=True)}
    return sorted(starts | {*range(0, ends[-1], eval_steps), ends[-1]})


def seconds_left(log, done):
    """The seconds that a run takes after so many steps, with its evaluations. Each counts as the
    median of the last ones, which a slow one, as the first, does not move."""
    n_evaluations = len(log["evaluations"]) - bisect.bisect_left(log["evaluations"], done)
    return ((log["steps"] - done) * statistics.median(log["last_steps"])
            + n_evaluations * statistics.median(log["last_evaluations"] or [0]))


# ----------------------------------------------------------------------------------------------
# The log
def log_row(row, fields, stage, state, log):
    """Print a line of fields, and add a row to training_logs.jsonl."""
    where = {"stage": stage["name"], "step": state["total"]}
    step = f"{state['total']:{len(str(log['steps']))}}/{log['steps']}"
    tqdm.write(fitting([f"stage {stage['name'][0]}  {step}", *fields]))
    not_finite = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    with errors_as(f"out_dir: cannot write {log['file'].name}", RunError):
        log["file"].write(json.dumps(where | row | dict.fromkeys(not_finite)) + "\n")  # as null
        log["file"].flush()
    if log["wandb"]:
        log["wandb"].log(where | row, step=state["total"])


def log_evaluation(row, text, seconds, stage, state, log):
    """Log the row of an evaluation, which took so many seconds, and print the text that the model
    wrote."""
    log["last_evaluations"].append(seconds)
    ppl, before = (f"{x:.2f}" if x < 1e4 else f"{x:.2e}"
                   for x in (row["ar_ppl"], row["ar_ppl_before"]))
    fields = [f"eval_nelbo {row['eval_nelbo']:.4f} (se {row['eval_nelbo_se']:.4f})",
              f"ar_ppl {ppl} (before {before})", f"eval_bpb {row['eval_bpb']:.3f}"]
    log_row(row, fields, stage, state, log)
    tqdm.write(quoted_text(text, "sample"))


def log_step(losses, norm, lr, seconds, s, stage, state, log, device):
    """Count a step, whose losses are LOSSES, and log a row if one is due. RunError after ten
    skipped steps in a row."""
    log["seconds"].append(seconds)
    log["last_steps"].append(seconds)
    left = duration(seconds_left(log, state["total"]))
    log["bar"].set_postfix_str(f"{left} left", refresh=False)
    log["bar"].update()
    loss = math.fsum(losses)
    if math.isfinite(loss + norm):
        state["loss_parts"].append(losses)
        state["skipped_in_a_row"] = 0
    else:
        state["skipped_in_a_row"] += 1
        state["skipped"] += 1
        tqdm.write(f"warning: step {state['total']} skipped: loss {loss}, grad_norm {norm}")
        norm = math.nan
        if s.debug or state["skipped_in_a_row"] == 10:
            raise RunError(f"{state['skipped_in_a_row']} steps in a row were not finite; try a "
                           "lower learning_rate, or dtype bfloat16 or float32")
    memory = memory_gb(device)[0]
    if memory > 0.9 * log["limit_gb"]:
        tqdm.write(f"warning: {memory:.1f} GB in use, more than 90 % of {log['limit_gb']:.1f} "
                   "(max_memory_gb)")
        log["limit_gb"] = math.inf  # said once
    if state["step"] < stage["steps"] and state["total"] % s.log_steps and not s.debug:
        return
    if log.pop("tell_hours", False) and device.type == "cpu":
        whole = duration(seconds_left(log, 0))
        tqdm.write(f"device: auto found no GPU; on this CPU the run takes {whole}")
    log_losses(norm, lr, memory, left, s, stage, state, log)


def log_losses(norm, lr, memory, left, s, stage, state, log):
    """Log the mean losses, and the speed, since the row before."""
    n = len(state["loss_parts"])
    means = [math.fsum(part) / n for part in zip(*state["loss_parts"], strict=True)]
    means = dict(zip(LOSSES, means or [math.nan] * len(LOSSES), strict=True))
    parts = {name: mean for name, mean in means.items() if stage[name]}
    tokens = s.batch_size * s.gradient_accumulation_steps * s.max_seq_length
    tokens_per_s = round(tokens * len(log["seconds"]) / sum(log["seconds"]))
    row = {"loss": math.fsum(means.values()), **{f"loss_{k}": x for k, x in parts.items()},
           "lr": lr, "grad_norm": norm, "tokens": state["tokens"], "tokens_per_s": tokens_per_s,
           "memory_gb": round(memory, 2)}
    named = "".join(parts)
    if len(parts) > 1:
        named = " + ".join(f"{name} {mean:.3f}" for name, mean in parts.items())
    fields = [f"loss {row['loss']:.3f} ({named})", f"{left} left" if log["bar"].disable else "",
              f"{tokens_per_s:,} tokens/s", f"norm {norm:.3f}", f"lr {lr:.1e}", f"{memory:.1f} GB"]
    log_row(row, fields, stage, state, log)
    state["loss_parts"], log["seconds"] = [], []
