"""Write the report of a run: one page with its curves, samples and settings, to open offline.

  python report.py                             # the newest run under outputs/
  python report.py --out_dir=outputs/my_run    # also of a run that is not finished
  python report.py --replay=false              # from the files alone, without loading the model

convert.py writes the same page, out_dir/report.html, when a run ends. Beside the result it puts a
model card, out_dir/final/README.md, if there is none yet.
"""
import html
import json
import math
import re
import shlex
from pathlib import Path
from string import Template

import convert
import processes
from configurator import (
    RunError, UserError, configure, errors_as, first_line, out_of_memory, run)
from corpus import encode_prompt
from history import (
    NOT_REPEATED, before_and_after, changed, command, is_number, number, read_run, shares,
    stage_rows, versions, warnings)
from machine import eagerly, pick_autocast, pick_device
from replay import trace_page
from runs import write_whole
from sample import folder_to_read
from terminal import duration

# ----------------------------------------------------------------------------------------------
# run
out_dir = ""  # folder of a run; "": the newest under outputs/
replay = True  # load the model and show how it unmasks a text; False: what the files tell alone
device = "auto"  # auto | cuda | cuda:1 | mps | cpu

allowed = {"out_dir": Path}
ASSETS = Path(__file__).with_name("assets")
FIGURES = "eval_nelbo", "eval_nelbo_se", "eval_nelbo_sampler", "eval_bpb", "ar_ppl"


def unmasking(model, tokenizer, prompt, window, autocast):
    """trace_page() of a continuation of prompt, one token a pass, as in evaluations, or a sentence
    if memory runs out. window: max_seq_length of the run."""
    ids = encode_prompt(model, tokenizer, prompt, 32)
    new = convert.continuation_length(model, ids, window)
    frames = [(ids + [model.mask_id] * new, [])]  # before the first pass

    def show(ids, confidence):
        frames.append((ids[0].tolist(), confidence[0].tolist()))

    model.eval()
    try:
        with eagerly(convert.compile_model), model.attention(model.kernel), autocast:
            convert.generate(model, [ids], new, new, watch=show)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return "Not replayed: memory ran out."
    return trace_page(frames, tokenizer, model.mask_id)


# ----------------------------------------------------------------------------------------------
# The page. Whatever comes from a file is text of others: it is escaped here, in escape() alone
def plain(value):
    """A value as text: a text as it is, a number shortened, anything else as JSON."""
    if value is None or type(value) in (int, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def escape(value):
    """plain() as HTML."""
    return html.escape(plain(value))


def table(rows, caption, kind="numbers"):
    """Rows, as dicts, of numbers or words; what does not fit scrolls sideways. "" for no rows."""
    if not rows:
        return ""
    keys, caption = list(dict.fromkeys(key for row in rows for key in row)), escape(caption)
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in keys)
    body = ""
    for row in rows:
        first, *others = [escape(row.get(key)) for key in keys]
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body += f'<tr><th scope="row">{first}</th>{cells}</tr>\n'
    return (f'<div class="wide {kind}" tabindex="0" role="region" aria-label="{caption}"><table>\n'
            f"<caption>{caption}</caption><thead><tr>{head}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>")


def thinned(points, most=600):
    """At most about so many of some points, evenly, with the last."""
    return [*points[:-1:math.ceil(len(points) / most) or 1], *points[-1:]]


def ticks(low, high):
    """Five or so round values from low to high."""
    step = 10 ** math.floor(math.log10(high - low))
    step *= next(m for m in (0.2, 0.5, 1, 2) if (high - low) <= 5 * m * step)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(name, points, errors, ends):
    """The figure of a curve in SVG, 360 x 200, as wide as a phone. points: [(step, value or None)];
    errors: {step: standard error of the value}; ends: [(name of a stage, its last step)]."""
    points = thinned([(x, y) for x, y in points if is_number(y)])
    if not points:
        return ""
    low = min(y - errors.get(x, 0) for x, y in points)
    high = max(y + errors.get(x, 0) for x, y in points)
    if high - low <= 1e-9 * abs(high):  # a level line, in the middle
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    right = max(1, points[-1][0], *(end for _, end in ends))

    def at(x, y):
        return f"{44 + 308 * x / right:.1f},{176 - 154 * (y - low) / (high - low):.1f}"

    def path(kind, *places):
        return f'<path class="{kind}" d="M{" ".join(places)}"/>'

    marks = ['<text x="44" y="194">0</text>', f'<text class="y" x="352" y="194">{right:,}</text>']
    for y in ticks(low, high):
        _, row = at(0, y).split(",")
        marks += [path("grid", at(0, y), at(right, y)),
                  f'<text class="y" x="40" y="{row}">{y:.3g}</text>']
    start = 0
    for stage, end in ends:
        middle, _ = at((start + end) / 2, low).split(",")
        marks += [path("stage", at(end, low), at(end, high)),
                  f'<text class="x" x="{middle}" y="14">{escape(stage[0])}</text>']
        start = end
    band = [(x, y, errors[x]) for x, y in points if x in errors]
    if band:
        marks += [path("band", *(at(x, y + e) for x, y, e in band),
                       *(at(x, y - e) for x, y, e in reversed(band)))]
    marks += [path("line", *(at(x, y) for x, y in points))]
    if len(points) <= 60:
        marks += [f'<circle r="2.5" transform="translate({at(x, y)})"><title>step {x:,}: '
                  f"{number(y)}</title></circle>" for x, y in points]
    told = f"{name}: {number(points[0][1])} at first, {number(points[-1][1])} in the end"
    return (f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 360 200" role="img" '
            f'aria-label="{escape(told)}">{"".join(marks)}</svg></figure>')


def curves(run):
    """The four charts, with the stages between them."""
    ends = [(row["stage"], row["until step"] or 0) for row in stage_rows(run)]
    errors = {row["step"]: row["eval_nelbo_se"] for row in run["evals"]
              if is_number(row.get("eval_nelbo_se"))}
    ar = [(row["step"], math.log(row["ar_ppl"])) for row in run["evals"]
          if is_number(row.get("ar_ppl")) and row["ar_ppl"] > 0]
    loss, nelbo, rate = ([(row["step"], row.get(key)) for row in rows] for rows, key in (
        (run["steps"], "loss"), (run["evals"], "eval_nelbo"), (run["steps"], "lr")))
    charts = (chart("loss", loss, {}, ends),
              chart("eval_nelbo and its standard error, nats per token", nelbo, errors, ends),
              chart("AR mode: log of ar_ppl, nats per token", ar, {}, ends),
              chart("learning rate", rate, {}, ends))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


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
    """What result.json adds to the tiles: shares, verified decoding, a filled hole, samples."""
    result = run["result"]
    hole, texts, verify = (result.get(key) for key in ("hole", "samples", "verify"))
    found = [table(shares(result), "Shares at the end")]
    if verify:
        equal, of, drafts = (escape(verify.get(key)) for key in (
            "equal", "texts", "accepted_per_check"))
        found += [f"<p>Verified decoding: {equal} of {of} texts are those of plain AR decoding, "
                  f"{drafts} drafts are accepted in a check.</p>"]
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
    before, verify = first | {"ar_ppl": last.get("ar_ppl_before")}, run["result"].get("verify", {})
    minutes, none = run["result"].get("minutes"), number(None)
    took = duration(60 * minutes) if is_number(minutes) else none
    found = [(name, number(last.get(key)), f"before {number(before.get(key))}") for name, key in (
        ("eval_nelbo, nats per token", "eval_nelbo"), ("bits per byte", "eval_bpb"),
        ("ar_ppl", "ar_ppl"))]
    found += [("tokens per forward", number(verify.get("tokens_per_forward")),
               f"speed over AR {number(verify.get('speed_over_ar'))}"),
              ("training", took, f"{number(run['rows'][-1]['step'])} steps")]
    return "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
                   for name, value, note in found if value != none)


def page(run, replayed):
    """The report of a run as HTML. replayed: of unmasking(), or a sentence that says why not."""
    notes = "".join(f"<li>{escape(text)}</li>" for text in warnings(run))
    frame = f"<p>{escape(replayed)}</p>"
    if replayed.startswith("<!doctype"):
        frame = f'<iframe title="replay of the unmasking" srcdoc="{escape(replayed)}"></iframe>'
    logged = [{key: row[key] for key in ("step", "stage", *FIGURES) if key in row}
              for row in thinned(run["evals"], 100)]
    settings = [{"setting": name, "value": str(value), "default": str(default)}
                for name, (value, default) in changed(run).items()]
    sections = {
        "Warnings and notes": [notes and f'<ul class="warnings">{notes}</ul>'],
        "Curves": [curves(run), folded("The numbers", table(logged, "On held-out text"))],
        "It learns: the same prompt at each evaluation": [samples(run)],
        "Unmasking": [frame],
        "Results": results(run),
        "Evaluations after the run": [table(run["evaluations"], "On files")],
        "Stages": [table(stage_rows(run), "After each stage")],
        "Settings": [folded(f"{len(settings)} differ from the defaults",
                            table(settings, "Settings", "words"))],
        "The same run again": [settings and f"<pre>{escape(command(run))}</pre>"]}
    body = ""
    for title, parts in sections.items():
        if any(parts):
            body += f"<section><h2>{title}</h2>\n" + "\n".join(filter(None, parts)) + "</section>\n"
    about = [f"{number(run['rows'][-1]['step'])} steps", *versions(run)]
    template = Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(run["out"].absolute().name), tiles=tiles(run),
                               about=escape(", ".join(about)), sections=body)


def folded(summary, contents):
    """Contents, if there are any, that open on a click."""
    return contents and f"<details><summary>{escape(summary)}</summary>{contents}</details>"


# ----------------------------------------------------------------------------------------------
# The model card
def hub_name(name):
    """The name, if it is one of the hub and not a path here."""
    there = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).exists()
    return name if there and Path(name).suffix not in (".gguf", ".txt", ".jsonl") else ""


def public(name, value):
    """A setting as a card shows it: of a path on this machine only the last part, as cards are
    published."""
    is_path = convert.allowed.get(name) is Path and not hub_name(str(value))
    return Path(value).name if is_path else " ".join(str(value).split())


def markdown(rows):
    """Rows, as dicts with the same keys, as a table in Markdown, whose texts are no HTML."""
    cells = [[html.escape(plain(x), False) for x in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(x.replace('|', ' ') for x in line)} |" for line in lines)


def card(run):
    """The model card of a result, in Markdown."""
    record, s, ours = run["record"], run["record"]["settings"], run["record"]["model"]
    base, data = (record.get("base") or {}).get("name", s["model_name"]), s["dataset_name"]
    said, base_hub, data_hub = public("model_name", base), hub_name(base), hub_name(data)
    if s["model_config"]:
        said, base_hub = "random weights", ""
    kinds = {"blocks" if ours["block_size"] else "whole", "adapters" if ours["lora"] else "full",
             "based" if record.get("base") else "own", base_hub and "hub_base",
             data_hub and "hub_data"}
    text = (ASSETS / "model_card.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- (\w+) -->\n(.*?)<!-- end -->\n",
                  lambda part: part[2] if part[1] in kinds else "", text, flags=re.S)
    first, last = before_and_after(run)
    moments = {"right before diffusion training": first, "at the end": last}
    figures = [{"": when} | {key: row.get(key) for key in FIGURES if key in last}
               for when, row in moments.items()]
    settings = [{"setting": f"`{name}`", "value": public(name, value)}
                for name, (value, _) in changed(run).items()
                if name not in (*NOT_REPEATED, "cache_dir")]
    report = record["state"].get("data_report")
    return Template(text).substitute(
        name=run["out"].absolute().name, base=said, base_json=json.dumps(said),
        data_json=json.dumps(data_hub), block=ours["block_size"], data=public("dataset_name", data),
        prompt=shlex.quote(" ".join(s["sample_prompt"].split())), length=record["max_seq_length"],
        ar_ppl_before=number(last.get("ar_ppl_before")),
        windows=f", {report['train']:,} windows and {report['held']:,} held out" if report else "",
        figures=markdown(figures), stages=markdown(stage_rows(run)),
        settings=markdown(settings or [{"setting": "none"}]), versions=", ".join(versions(run)))


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
        write_whole(path, text)
    print(f"report: {out}/report.html")


def report_on_run(out, model, tokenizer, autocast):
    """Write the report of a run that has just ended. The run is saved by then, so an error is told
    in one line, and python report.py makes up for it. Sharded weights are not replayed, as every
    process would have to take part."""
    replayed = f"Not replayed: the weights were sharded; python report.py --out_dir={out} does it."
    try:
        with errors_as(f"{out}/report.html", RunError):
            if not processes.is_sharded(model):
                replayed = unmasking(model, tokenizer, convert.sample_prompt,
                                     convert.max_seq_length, autocast)
            write(out, replayed)
    except UserError as error:
        print(f"report: not written: {first_line(error)}")


def replayed_by(folder, target):
    """unmasking() by the model in a folder, or a sentence that says why not."""
    if not (replay and folder):
        return "Not replayed: the model was not loaded." if folder else "Nothing is saved yet."
    try:
        autocast = pick_autocast(target, "float32")
        model, tokenizer = convert.load_model(folder, target, as_dtype=autocast.fast_dtype)
        record = convert.read_record(folder)
        prompt = record["settings"].get("sample_prompt", "")
        return unmasking(model.to(target), tokenizer, prompt, record["max_seq_length"], autocast)
    except UserError as error:
        return f"Not replayed: {first_line(error)}"


def main(argv):
    configure(globals(), argv, allowed)
    out = Path(out_dir) if out_dir else folder_to_read("", "").parent
    replayed = replayed_by(read_run(out)["folder"], pick_device(device))
    with errors_as(f"report: cannot write to '{out}'", RunError):
        write(out, replayed)


if __name__ == "__main__":
    run(main)
