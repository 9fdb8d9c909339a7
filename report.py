"""Write the report of a run: one page with its curves, samples and settings, to open offline.

  python report.py                             # the newest run under outputs/
  python report.py --out_dir=outputs/my_run    # also of a run that is not finished
  python report.py --replay=false              # from the files alone, without loading the model

convert.py writes the same page, out_dir/report.html, when a run ends. Beside the result it puts a
model card, out_dir/final/README.md, if there is none yet.
"""
import ast
import contextlib
import html
import json
import math
import os
import re
import shlex
from pathlib import Path
from string import Template

import convert
import processes
from configurator import RunError, UserError, configure, errors_as, first_line, run
from corpus import encode_prompt, left_out
from machine import pick_autocast, pick_device
from model_files import checkpoints
from replay import trace_page

# ----------------------------------------------------------------------------------------------
# run
out_dir = ""  # folder of a run; "": the newest under outputs/
replay = True  # load the model and show how it unmasks a text; False: what the files tell alone
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "float32"  # of the weights: float32 | bfloat16 | float16

allowed = {"out_dir": Path, "dtype": {"float32", "bfloat16", "float16"}}
ASSETS = Path(__file__).with_name("assets")
NOT_REPEATED = "resume", "checkpoint", "debug", "out_dir"  # settings that a new run does without
NO_RECORD = {"settings": {}, "state": {}, "versions": {}}
FIGURES = "eval_nelbo", "eval_nelbo_se", "eval_nelbo_sampler", "eval_bpb", "ar_ppl"


def unmasking(model, tokenizer, prompt, autocast):
    """trace_page() of a continuation of prompt in 32 passes."""
    ids, frames = encode_prompt(model, tokenizer, prompt, 32), []  # fits: each evaluation does so
    new = 64 if len(ids) + 64 + model.block_size <= model.max_positions else 32

    def show(ids, confidence):
        frames.append((ids[0].tolist(), confidence[0].tolist()))

    model.eval()
    with convert.eagerly(convert.compile_model), model.attention(model.kernel), autocast:
        convert.generate(model, [ids], new, 32, watch=show)
    processes.reshard(model)
    return trace_page([(ids + [model.mask_id] * new, []), *frames], tokenizer, model.mask_id)


# ----------------------------------------------------------------------------------------------
# What the files of a run tell
def read_rows(path):
    """(The objects in the lines of a file, how many lines are none: a kill may cut the last)."""
    text = path.read_text("utf-8", "replace") if path.exists() else ""
    rows, lines = [], [line for line in text.split("\n") if line.strip()]
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict)]
    return rows, len(lines) - len(rows)


def read_run(out):
    """What the files of a run tell, as a dict; UserError if it has no log yet."""
    rows, broken = read_rows(out / "training_logs.jsonl")
    rows = [row for row in rows if "stage" in row and "step" in row]
    if not rows:
        raise UserError(f"out_dir: no log of a run in '{out}'")
    folders = [p for p in (out / "final", *checkpoints(out)) if (p / "diffusion.json").is_file()]
    record = convert.read_record(folders[0]) if folders else NO_RECORD
    path, result = out / "result.json", {}
    if path.exists():
        with errors_as(f"{path} cannot be read"):
            result = dict(json.loads(path.read_text("utf-8")))
    return {"out": out, "name": out.absolute().name, "rows": rows, "broken": broken,
            "evals": [row for row in rows if "eval_nelbo" in row],
            "steps": [row for row in rows if "loss" in row], "last_step": rows[-1]["step"],
            "folder": folders[0] if folders else None, "finished": (out / "final").exists(),
            "evaluations": read_rows(out / "evaluations.jsonl")[0],
            "record": record, "result": result}


def stages_of(run):
    """[(name, rows of its steps, the evaluation at its end)] of the stages of a run. The first
    evaluation of a stage is also the end of the stage before."""
    names = list(dict.fromkeys(row["stage"] for row in run["rows"]))
    found = []
    for name, following in zip(names, [*names[1:], None], strict=True):
        later = [row for row in run["evals"] if row["stage"] == following]
        steps = [row for row in run["steps"] if row["stage"] == name]
        found.append((name, steps, (later or run["evals"][-1:] or [{}])[0]))
    return found


def before_and_after(run):
    """(The evaluation right before diffusion training, the last one), {} where there is none."""
    diffusion = [row for row in run["evals"] if row["stage"][0] != "0"]
    return (diffusion or [{}])[0], (run["evals"] or [{}])[-1]


def defaults():
    """{setting: (its default, what it is)} from the source of convert.py, in whose globals a run
    has changed them."""
    source = Path(convert.__file__).read_text("utf-8").partition("\nallowed = ")[0]
    found = re.findall(r"^([a-z]\w*) = (.+?)  # (.*)$", source, re.M)
    return {name: (ast.literal_eval(value), why) for name, value, why in found}


def changed(run):
    """{setting: (value, default, what it is)} where a run differs from the defaults."""
    known = defaults()
    return {name: (value, *known.get(name, ("", "")))
            for name, value in run["record"]["settings"].items()
            if name not in known or value != known[name][0]}


def command(run):
    """The command that repeats a run, in another folder, with one flag a line."""
    flags = [f"--{name}={value}" for name, (value, _, _) in changed(run).items()
             if name not in NOT_REPEATED]
    flags = ["python convert.py", *flags, f"--out_dir={run['out']}_again"]
    return " \\\n  ".join([flags[0], *map(shlex.quote, flags[1:])])


def is_number(value):
    """Whether a value of a file can be drawn and compared; not so null, nor true."""
    return type(value) in (int, float) and math.isfinite(value)


def warnings(run):
    """What a reader of the curves should know, as sentences."""
    state, s = run["record"]["state"], run["record"]["settings"]
    first, last = before_and_after(run)
    nelbo, ppl = last.get("eval_nelbo"), last.get("ar_ppl")
    best = min((row["eval_nelbo"] for row in run["evals"]
                if row["stage"][0] != "0" and is_number(row["eval_nelbo"])), default=None)
    ppl_before, error = last.get("ar_ppl_before"), last.get("eval_nelbo_se")
    not_finite = sum(row["loss"] is None or row.get("grad_norm") is None for row in run["steps"])
    skipped = max(state.get("skipped", 0), not_finite)
    data = state.get("data_report")
    changes = [change.rstrip(",") for change in state.get("less_memory", [])]
    found = {
        "The run is not finished: these are the figures so far.": not run["finished"],
        f"Steps left out because loss or gradient was not finite: {skipped}.": skipped,
        f"Lines of the log that cannot be read: {run['broken']}.": run["broken"],
        f"ar_ppl is {number(ppl)}, before diffusion training it was {number(ppl_before)}: the AR "
        "mode has lost.": first and is_number(ppl) and is_number(ppl_before)
                          and ppl > 1.01 * ppl_before,
        f"eval_nelbo is {number(nelbo)}, at its best it was {number(best)}.":
            best and is_number(nelbo) and is_number(error) and nelbo > best + error,
        f"Memory ran out, and the run went on with {'; then with '.join(changes)}.": changes,
        "Evaluated on the model's own text, so its nats compare with those of no other run.":
            s.get("on_policy_tokens") and s.get("on_policy_share") == 1,
    }
    if data:
        share = data["held_out_share_in_training"]
        found |= {f"Data: {left_out(data)}.": data["near_duplicates_left_out"] or data["refused"],
                  f"Data: {share:.1%} of held-out text is in training too.": share >= 0.0005}
    return [text for text, holds in found.items() if holds]


# ----------------------------------------------------------------------------------------------
# The page. Whatever comes from a file is text of others: it is escaped here, in escape() alone
def escape(value):
    """A value as HTML: a text as it is, a number shortened, anything else as JSON."""
    if value is None or isinstance(value, (int, float)):
        value = number(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return html.escape(text)


def number(value):
    """A number with four digits, or as it is if whole; a dash for what is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not is_number(value):
        return "\u2013"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def table(head, rows, caption, kind="numbers"):
    """A table of numbers or words; what does not fit scrolls sideways. Cells are escaped."""
    cells = [[f'<th scope="row">{escape(row[0])}</th>',
              *(f"<td>{escape(cell)}</td>" for cell in row[1:])] for row in rows]
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    caption = escape(caption)
    return (f'<div class="wide {kind}" tabindex="0" role="region" aria-label="{caption}"><table>\n'
            f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>")


def section(title, *parts):
    """A section of the page; none without contents."""
    parts = [part for part in parts if part]
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "</section>" if parts else ""


def thinned(points, most=600):
    """At most about so many of some points, evenly, with the last."""
    return [*points[:-1:math.ceil(len(points) / most) or 1], *points[-1:]]


def ticks(low, high, log):
    """Round values from low to high; of a logarithmic axis their logarithms."""
    if log:
        tens = range(math.floor(low), math.ceil(high))
        found = [e + math.log10(m) for e in tens for m in (1, 2, 5)]
        return [y for y in found if low <= y <= high]
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) <= 5 * m * step)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(name, points, errors, ends):
    """The figure of a curve in SVG. points: [(step, value or None)]; errors: {step: standard error
    of the value}; ends: [(name of a stage, its last step)]."""
    known = [(x, y) for x, y in points if is_number(y)]
    if not known:
        return ""
    values = [y for _, y in known]
    log = name != "learning rate" and min(values) > 0 and max(values) > 20 * min(values)
    scale = math.log10 if log else float
    low = min(scale(max(y - errors.get(x, 0), y / 2 if log else -math.inf)) for x, y in known)
    high = max(scale(y + errors.get(x, 0)) for x, y in known)
    if high - low < 1e-9 * abs(high) or high == low:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    right = max(1, known[-1][0], *(end for _, end in ends))

    def at(x, scaled):  # in a picture of 360 x 200, as wide as a phone
        return f"{44 + 308 * x / right:.1f},{176 - 154 * (scaled - low) / (high - low):.1f}"

    def path(kind, *places):
        return f'<path class="{kind}" d="M{" ".join(places)}"/>'

    marks = []
    for y in ticks(low, high, log):
        _, row = at(0, y).split(",")
        marks += [path("grid", at(0, y), at(right, y)),
                  f'<text class="y" x="40" y="{row}">{10**y if log else y:.3g}</text>']
    for (stage, end), start in zip(ends, [0, *(end for _, end in ends)], strict=False):
        middle, _ = at((start + end) / 2, low).split(",")
        marks += [path("stage", at(end, low), at(end, high)),
                  f'<text class="x" x="{middle}" y="14">{escape(stage[0])}</text>']
    marks += ['<text x="44" y="194">0</text>', f'<text class="y" x="352" y="194">{right:,}</text>']
    band = [(x, y) for x, y in known if x in errors and not log]
    if band:
        edge = [at(x, y + errors[x]) for x, y in band]
        marks += [path("band", *edge, *reversed([at(x, y - errors[x]) for x, y in band]))]
    line, gap = "", True  # a value that is none interrupts the line
    for x, y in points:
        if is_number(y):
            line += f"{'M' if gap else 'L'}{at(x, scale(y))}{'h0' if gap else ''}"
        gap = not is_number(y)
    marks += [f'<path class="line" d="{line}"/>']
    if len(known) <= 60:
        marks += [f'<circle r="2.5" transform="translate({at(x, scale(y))})"><title>step {x:,}: '
                  f"{number(y)}</title></circle>" for x, y in known]
    (first, start), (last, end) = known[0], known[-1]
    told = (f"{name}: {number(start)} at step {first:,}, {number(end)} at step {last:,}, lowest "
            f"{number(min(values))}, highest {number(max(values))}")
    unit = " (logarithmic)" if log else ""
    return (f'<figure><figcaption>{escape(name + unit)}</figcaption><svg viewBox="0 0 360 200" '
            f'role="img" aria-label="{escape(told)}">{"".join(marks)}</svg></figure>')


def curves(run):
    """The four charts, with the stages between them."""
    ends = [(name, max([row["step"] for row in steps], default=0))
            for name, steps, _ in stages_of(run)]
    errors = {row["step"]: row["eval_nelbo_se"] for row in run["evals"]
              if is_number(row.get("eval_nelbo_se"))}
    charts = [chart(name, thinned([(row["step"], row.get(key)) for row in rows]), band, ends)
              for name, rows, key, band in (
                  ("loss", run["steps"], "loss", {}),
                  ("eval_nelbo and its standard error", run["evals"], "eval_nelbo", errors),
                  ("ar_ppl", run["evals"], "ar_ppl", {}),
                  ("learning rate", run["steps"], "lr", {}))]
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def stage_table(run):
    """What each stage did."""
    trains = {stage["name"]: stage["trains"] for stage in convert.make_stages(1)}
    lora, rows = run["record"]["settings"].get("use_lora"), []
    for name, steps, after in stages_of(run):
        what = "adapters" if lora else trains.get(name)
        losses, rates = ([row[key] for row in steps if is_number(row.get(key))]
                         for key in ("loss", "lr"))
        rows.append([name, what, steps[-1]["step"] if steps else None, max(rates, default=None),
                     *(losses[:1] or [None]), *(losses[-1:] or [None]), after.get("eval_nelbo"),
                     after.get("ar_ppl")])
    return table(["stage", "trains", "until step", "highest rate", "loss at first", "at the end",
                  "eval_nelbo", "ar_ppl"], rows, "After each stage")


def evaluation_table(rows, keys, caption):
    """The evaluations in rows of a log or a file, as far as they have the keys."""
    keys = [key for key in keys if any(key in row for row in rows)]
    return table(keys, [[row.get(key) for key in keys] for row in rows], caption)


def samples(run):
    """The texts of the evaluations, twelve at most, the first and the last among them."""
    rows = [row for row in run["evals"] if isinstance(row.get("sample"), str)]
    items = [f"<li><span><b>step {escape(row['step'])}</b><br><small>{escape(row['stage'])}</small>"
             f"</span>{block(row['sample'])}</li>" for row in thinned(rows, 11)]
    return f'<ol class="samples">{"".join(items)}</ol>' if items else ""


def block(text):
    """A text as its model or its owner wrote it."""
    return f'<p class="text" dir="auto">{escape(text)}</p>'


def results(run):
    """What result.json adds: figures, a hole that was filled, samples."""
    result, rows = dict(run["result"]), []
    hole, texts = result.pop("hole", None), result.pop("samples", None) or []
    for name, value in result.items():
        if isinstance(value, dict):
            rows += [[f"{name}: {part}", x] for part, x in value.items()]
        else:
            rows.append([name, value])
    found = [table(["figure", "value"], rows, "Measured at the end")] if rows else []
    if hole:
        left, right, filled, answer, guess = (
            escape(hole.get(key)) for key in ("left", "right", "filled", "answer", "ar_guess"))
        found += [f'<h3>A hole, filled</h3><p class="text" dir="auto">{left}<mark>{filled}</mark>'
                  f"{right}</p><p>What stood there: <q>{answer}</q>. The AR model, which sees the "
                  f"left side alone, writes: <q>{guess}</q>.</p>"]
    return found + (["<h3>Samples</h3>", *map(block, texts)] if texts else [])


def tiles(run):
    """The figures that say most, each with what it was before."""
    first, last = before_and_after(run)
    verify = run["result"].get("verify") or {}
    found = [("eval_nelbo, nats per token", last.get("eval_nelbo"),
              f"at first {number(first.get('eval_nelbo'))}"),
             ("bits per byte", last.get("eval_bpb"), f"at first {number(first.get('eval_bpb'))}"),
             ("ar_ppl", last.get("ar_ppl"), f"before {number(last.get('ar_ppl_before'))}"),
             ("tokens per forward", verify.get("tokens_per_forward"),
              f"speed over AR {number(verify.get('speed_over_ar'))}"),
             ("minutes", run["result"].get("minutes"), f"{number(run['last_step'])} steps")]
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}<small>{note}</small></dd></div>"
                   for name, value, note in found if is_number(value))


def page(run, replayed):
    """The report of a run as HTML. replayed: of unmasking(), or a sentence that says why not."""
    notes = "".join(f"<li>{escape(text)}</li>" for text in warnings(run))
    frame = f"<p>{escape(replayed)}</p>"
    if replayed.startswith("<!doctype"):
        frame = f'<iframe title="replay of the unmasking" srcdoc="{escape(replayed)}"></iframe>'
    logged = ["step", "stage", *FIGURES]
    numbers = evaluation_table(thinned(run["evals"], 100), logged, "On held-out text")
    more = run["evaluations"]
    keys = list(dict.fromkeys(key for row in more for key in row))
    rows = [[name, str(value), str(default), why]
            for name, (value, default, why) in changed(run).items()]
    settings = table(["setting", "value", "default", "what it is"], rows, "Settings", "words")
    sections = [
        section("Warnings", notes and f'<ul class="warnings">{notes}</ul>'),
        section("Curves", curves(run), folded("The numbers", numbers)),
        section("It learns: the same prompt at each evaluation", samples(run)),
        section("Unmasking", frame),
        section("Results", *results(run)),
        section("Evaluations after the run", more and evaluation_table(more, keys, "On files")),
        section("Stages", stage_table(run)),
        section("Settings", rows and folded(f"{len(rows)} differ from the defaults", settings)),
        section("The same run again", rows and f"<pre>{escape(command(run))}</pre>")]
    versions = [f"{name} {version}" for name, version in run["record"]["versions"].items()]
    about = [f"{number(run['last_step'])} steps", *versions]
    template = Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(run["name"]), about=escape(", ".join(about)), tiles=tiles(run),
        sections="\n".join(filter(None, sections)))


def folded(summary, contents):
    """What opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{contents}</details>"


# ----------------------------------------------------------------------------------------------
# The model card
def hub_name(name):
    """The name, if it is one of the hub and not a path here."""
    there = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if there and Path(name).suffix not in (".gguf", ".txt", ".jsonl") else ""


def markdown(head, rows):
    """A table in Markdown, whose texts are no HTML."""
    rows = [[number(x) if is_number(x) or x is None else html.escape(str(x), False) for x in row]
            for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(x.replace('|', ' ') for x in row)} |" for row in lines)


def public(name, value):
    """A setting as a card shows it: of a path on this machine only the last part, as cards are
    published."""
    is_path = convert.allowed.get(name) is Path and not hub_name(str(value))
    return Path(value).name if is_path else " ".join(str(value).split())


def card(run):
    """The model card of a result, in Markdown."""
    record, s, ours = run["record"], run["record"]["settings"], run["record"]["model"]
    base, data = (record.get("base") or {}).get("name", s["model_name"]), s["dataset_name"]
    said, base_hub, data_hub = public("model_name", base), hub_name(base), hub_name(data)
    if s["model_config"]:
        said, base_hub = "random weights", ""
    first, last = before_and_after(run)
    report = record["state"].get("data_report")
    kinds = {"blocks" if ours["block_size"] else "whole", "adapters" if ours["lora"] else "full",
             "based" if record.get("base") else "own", base_hub and "hub_base",
             data_hub and "hub_data"}
    text = (ASSETS / "model_card.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+) -->\n(.*?)<!-- end -->\n",
                  lambda part: part[2] if part[1] in kinds else "", text, flags=re.S)
    keys = [key for key in FIGURES if key in last]
    stages = [[name, steps[-1]["step"] if steps else None, after.get("eval_nelbo"),
               after.get("ar_ppl")] for name, steps, after in stages_of(run)]
    settings = [[f"`{name}`", public(name, value)] for name, (value, _, _) in changed(run).items()
                if name not in (*NOT_REPEATED, "cache_dir")]
    versions = [f"{name} {version}" for name, version in record["versions"].items()]
    return Template(text).substitute(
        name=run["name"], base=said, base_json=json.dumps(said), data_json=json.dumps(data_hub),
        block=ours["block_size"], data=public("dataset_name", data),
        prompt=shlex.quote(" ".join(s["sample_prompt"].split())), length=record["max_seq_length"],
        ar_ppl_before=number(last.get("ar_ppl_before")),
        windows=f", {report['train']:,} windows and {report['held']:,} held out" if report else "",
        figures=markdown(["", *(f"`{key}`" for key in keys)],
                         [["right before diffusion training", *(first.get(k) for k in keys)],
                          ["at the end", *(last.get(k) for k in keys)]]),
        stages=markdown(["stage", "until step", "`eval_nelbo`", "`ar_ppl`"], stages),
        settings=markdown(["setting", "value"], settings), versions=", ".join(versions))


# ----------------------------------------------------------------------------------------------
# Writing
def write(out, replayed):
    """Write report.html, and the card of a finished run that has none: its owner may have added to
    it. SHA256SUMS does not list the card, so the result stays what was checked when saved."""
    run = read_run(out)
    files = {out / "report.html": page(run, replayed)}
    if run["finished"] and not (out / "final/README.md").exists():
        files[out / "final/README.md"] = card(run)
    for path, text in files.items():
        temporary = path.with_name(f"{path.name}.new")
        try:
            temporary.write_text(text, "utf-8", "replace")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    print(f"report: {out}/report.html")


def report_on_run(out, model, tokenizer):
    """Write the report of a run that has just ended. The run is saved by then, so an error is told
    in one line, and python report.py makes up for it."""
    autocast = pick_autocast(model.device, convert.dtype)
    try:
        with errors_as(f"{out}/report.html", RunError):
            replayed = unmasking(model, tokenizer, convert.sample_prompt, autocast)
            processes.from_rank_0(write, out, replayed)
    except (UserError, RuntimeError) as error:  # of these, errors_as() leaves out of memory
        print(f"report: not written: {first_line(error)}")


def newest_run():
    """The run under outputs/ that was written to last."""
    logs = sorted(Path("outputs").glob("*/training_logs.jsonl"), key=lambda p: p.stat().st_mtime)
    if not logs:
        raise UserError("out_dir: no run in outputs/; python convert.py config/tiny.py makes one")
    return logs[-1].parent


def replayed_by(folder, target):
    """unmasking() by the model in a folder, or a sentence that says why not."""
    if not (replay and folder):
        return "Not replayed: the model was not loaded." if folder else "Nothing is saved yet."
    try:
        autocast = pick_autocast(target, "float32")
        as_dtype = pick_autocast(target, dtype).fast_dtype
        model, tokenizer = convert.load_model(folder, target, as_dtype=as_dtype)
        prompt = convert.read_record(folder)["settings"].get("sample_prompt", "")
        return unmasking(model.to(target), tokenizer, prompt, autocast)
    except UserError as error:
        return f"Not replayed: {first_line(error)}"


def main(argv):
    configure(globals(), argv, allowed)
    out, target = Path(out_dir) if out_dir else newest_run(), pick_device(device)
    replayed = replayed_by(read_run(out)["folder"], target)
    with errors_as(f"report: cannot write to '{out}'", RunError):
        write(out, replayed)


if __name__ == "__main__":
    run(main)
