"""What the files of a run tell: its log, the record beside its weights, its figures. report.py and
finish.py show it."""
import contextlib
import json
import math
import shlex

import convert
from configurator import UserError, errors_as
from corpus import left_out
from model_files import checkpoints

NOT_REPEATED = "resume", "checkpoint", "debug", "out_dir"  # settings that a new run does without


def is_number(value):
    """Whether a value of a file can be drawn and compared; not so null, nor true."""
    return type(value) in (int, float) and math.isfinite(value)


def number(value):
    """A number with four digits, or as it is if whole; a dash for what is none."""
    if not is_number(value):
        return "\u2013"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def shares(result):
    """What the grammar of the world judged, as rows for tables with the shares in percent."""
    names = {"accepted": "sentences that are right", "holes_right": "holes filled rightly"}
    return [{"judged by the grammar": name, "AR model": f"{result[key]['ar']:.1%}",
             "diffusion": f"{result[key]['diffusion']:.1%}"}
            for key, name in names.items() if key in result]


def read_rows(path):
    """The objects in the lines of a file, if it is there; a kill may have cut its last line."""
    rows = []
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def read_run(out):
    """What the files of a run tell, as a dict; UserError if it has no log yet."""
    rows = [row for row in read_rows(out / "training_logs.jsonl") if {"stage", "step"} <= set(row)]
    if not rows:
        raise UserError(f"out_dir: no log of a run in '{out}'")
    folders = [p for p in (out / "final", *checkpoints(out)) if (p / "diffusion.json").is_file()]
    record, result = {"settings": {}, "state": {}, "versions": {}}, {}
    if folders:
        record = convert.read_record(folders[0])
    if (out / "result.json").exists():
        with errors_as(f"{out}/result.json is damaged, delete it"):
            result = dict(json.loads((out / "result.json").read_text("utf-8")))
    return {"out": out, "rows": rows,
            "evals": [row for row in rows if "eval_nelbo" in row],
            "steps": [row for row in rows if "loss" in row],
            "folder": folders[0] if folders else None, "finished": (out / "final").exists(),
            "evaluations": read_rows(out / "evaluations.jsonl"),
            "record": record, "result": result}


def before_and_after(run):
    """(The evaluation right before diffusion training, the last one), {} where there is none."""
    diffusion = [row for row in run["evals"] if row["stage"][0] != "0"]
    return (diffusion or [{}])[0], (run["evals"] or [{}])[-1]


def stage_rows(run):
    """What each stage did. The first evaluation of a stage is also the end of the stage before."""
    names = list(dict.fromkeys(row["stage"] for row in run["rows"]))
    trains = {stage["name"]: stage["trains"] for stage in convert.make_stages(1)}
    if run["record"]["settings"].get("use_lora"):
        trains = dict.fromkeys(trains, "adapters")
    rows = []
    for name, following in zip(names, [*names[1:], None], strict=True):
        later = [row for row in run["evals"] if row["stage"] == following]
        after = (later or run["evals"][-1:] or [{}])[0]
        steps = [row for row in run["steps"] if row["stage"] == name] or [{}]
        rates = [row["lr"] for row in steps if is_number(row.get("lr"))]
        rows.append({
            "stage": name, "trains": trains.get(name), "until step": steps[-1].get("step"),
            "highest rate": max(rates, default=None), "loss at first": steps[0].get("loss"),
            "at the end": steps[-1].get("loss"), "eval_nelbo": after.get("eval_nelbo"),
            "ar_ppl": after.get("ar_ppl")})
    return rows


def changed(run):
    """{setting: (value, default)} where a run differs from the defaults of convert.py."""
    return {name: (value, convert.defaults.get(name, ""))
            for name, value in run["record"]["settings"].items()
            if value != convert.defaults.get(name)}


def command(run):
    """The command that repeats a run, in another folder, with one flag a line."""
    flags = [f"--{name}={value}" for name, (value, _) in changed(run).items()
             if name not in NOT_REPEATED]
    flags = ["python convert.py", *flags, f"--out_dir={run['out']}_again"]
    return " \\\n  ".join([flags[0], *map(shlex.quote, flags[1:])])


def warnings(run):
    """What a reader of the curves should know, as sentences."""
    state, s = run["record"]["state"], run["record"]["settings"]
    _, last = before_and_after(run)
    nelbo, ppl, ppl_before = (last.get(k) for k in ("eval_nelbo", "ar_ppl", "ar_ppl_before"))
    best = min((row["eval_nelbo"] for row in run["evals"]
                if row["stage"][0] != "0" and is_number(row["eval_nelbo"])), default=math.inf)
    error = last.get("eval_nelbo_se") or 0
    skipped = state.get("skipped", 0)
    changes = [change.rstrip(",") for change in state.get("less_memory", [])]
    found = {
        "The run is not finished: these are the figures so far.": not run["finished"],
        f"Steps left out because loss or gradient was not finite: {skipped}.": skipped,
        f"ar_ppl is {number(ppl)}, before diffusion training it was {number(ppl_before)}: the AR "
        "mode has lost.": is_number(ppl) and is_number(ppl_before) and ppl > 1.01 * ppl_before,
        f"eval_nelbo is {number(nelbo)}, at its best it was {number(best)}.":
            is_number(nelbo) and nelbo > best + error,
        f"Memory ran out, and the run went on with {'; then with '.join(changes)}.": changes,
        "Evaluated on the model's own text, so its nats compare with those of no other run.":
            s.get("on_policy_tokens") and s.get("on_policy_share") == 1,
    }
    if data := state.get("data_report"):
        share = data["held_out_share_in_training"]
        alike = ", as stories of the world are alike" if s.get("dataset_name") == "world" else ""
        lost = data["near_duplicates_left_out"] or data["refused"]
        found |= {f"Data: {left_out(data)}{alike}.": lost,
                  f"Data: {share:.1%} of held-out text is in training too.": share >= 0.0005}
    return [text for text, holds in found.items() if holds]


def versions(run):
    """The libraries of a run, each with its version."""
    return [f"{name} {version}" for name, version in run["record"]["versions"].items()]
