"""Tests of the report, the model card and the notebook. pytest test_report.py runs them alone."""
import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import configurator
import convert
import history
import report
from configurator import RunError, UserError
from test_convert import CPU, HERE, NO_AUTOCAST, TINY, evaluations, script

HOSTILE = '</script><img src=x onerror=alert(1)>"\' &lt; $title '
VOID = {"meta", "br", "img", "input"}  # elements without an end


class Page(html.parser.HTMLParser):
    """The elements and texts of a page, which must be nested rightly."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(source)
        self.close()
        assert set(self.open) <= {"p", "html", "body"}, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(out):
    return Page((out / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run, whose prompt is hostile to a page."""
    folder = tmp_path_factory.mktemp("finished")
    printed, _ = script("convert.py", *TINY, f"--sample_prompt={HOSTILE}", cwd=folder)
    assert "report: out/report.html" in printed
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the run."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def rewrite(out, change):
    """Put the rows that change(rows) returns into the log."""
    path = out / "training_logs.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_ends_with_a_page_that_has_its_figures_and_needs_no_network(finished):
    page, last = page_of(finished), evaluations(finished)[-1]
    text = " ".join(page.texts)
    for name in report.FIGURES:
        assert name not in last or f"{last[name]:.4g}" in text, name
    assert len(page.all("svg")) == 4 and all(x["aria-label"] for x in page.all("svg"))
    assert {name for name, _ in page.elements} >= {"h1", "h2", "main", "caption", "th", "details"}
    assert all(x["scope"] in ("row", "col") for x in page.all("th"))
    [trace] = page.all("iframe")
    for source in ((finished / "report.html").read_text(), trace["srcdoc"]):
        assert not re.search(r"https?://|url\(|@import", source)
    linked = {"src", "href", "data", "poster", "action"}
    assert not [x for _, x in page.elements + Page(trace["srcdoc"]).elements if linked & set(x)]


def test_what_a_model_or_a_user_writes_stays_text(out):
    (out / "result.json").write_text(json.dumps(indent=1, obj={
        "minutes": 3.5, "samples": [HOSTILE], "accepted": {"ar": 1, "diffusion": 0.5},
        "hole": {"left": HOSTILE, "right": "", "answer": None, "filled": HOSTILE}}))
    (out / "evaluations.jsonl").write_text(json.dumps({"file": HOSTILE, HOSTILE: [HOSTILE]}))
    script("report.py", f"--out_dir={out}", "--device=cpu")
    page = page_of(out)
    assert not page.all("img") and not page.all("script") and "50.0%" in page.texts
    assert sum(text.startswith(HOSTILE) for text in page.texts) >= 10
    trace = Page(page.all("iframe")[0]["srcdoc"])
    assert not trace.all("img") and len(trace.all("script")) == 1
    data = json.loads(re.search("const DATA=(.*)", page.all("iframe")[0]["srcdoc"])[1])
    written = "".join(data["tokens"][token] for token, *_ in data["frames"][-1])
    assert written.startswith(HOSTILE) and len(data["frames"]) == 33


def test_a_log_with_nulls_and_half_a_line_of_a_run_not_finished_has_a_page(out):
    def change(rows):
        for row in rows:
            row |= dict.fromkeys(("grad_norm", "eval_nelbo_se"))
        evals = [row for row in rows if "eval_nelbo" in row]
        evals[-1]["eval_nelbo"] = evals[2]["sample"] = evals[3]["ar_ppl"] = None
        rows[1]["loss"] = rows[2]["lr"] = None
        return rows

    rewrite(out, change)
    with open(out / "training_logs.jsonl", "a") as file:
        file.write('{"stage": "3 rec')
    shutil.rmtree(out / "final")
    report.write(out, "Not replayed.")
    text = " ".join(page_of(out).texts)
    assert "is not finished" in text
    assert not re.search(r"\b(nan|None|null|inf)\b", text)


def test_a_page_warns_of_what_the_log_and_the_record_know(out):
    def change(rows):
        rows[-1] |= {"eval_nelbo": 9.0, "ar_ppl": 2 * rows[-1]["ar_ppl_before"]}
        return rows

    rewrite(out, change)
    path = out / "final/diffusion.json"
    record = json.loads(path.read_text())
    record["state"] |= {"skipped": 7, "less_memory": ["8-bit Adam", "2 windows at a time"]}
    record["state"]["data_report"] |= {"near_duplicates_left_out": 5,
                                       "held_out_share_in_training": 0.25}
    path.write_text(json.dumps(record))
    found = " ".join(history.warnings(history.read_run(out)))
    for words in ("ar_ppl is", "eval_nelbo is 9, at its best", "finite: 7", "8-bit Adam; then with "
                  "2 windows", "5 near-dup", "25.0% of held-out"):
        assert words in found, words


def test_a_long_log_is_thinned_and_many_evaluations_show_twelve_texts(out):
    def change(rows):
        steps, evals = rows[1], rows[-1]
        return [row | {"step": n} for n in range(0, 50000, 10) for row in (steps, evals)]

    rewrite(out, change)
    report.write(out, "Not replayed.")
    page = page_of(out)
    lines = [x["d"] for x in page.all("path") if x["class"] == "line"]
    assert len(lines) == 4 and all(400 < line.count(",") <= 601 for line in lines)
    assert len(page.all("b")) == 12 and (out / "report.html").stat().st_size < 250e3


def test_the_command_in_a_page_gives_the_settings_of_the_run(finished):
    run = history.read_run(finished)
    _, script_name, *flags = shlex.split(history.command(run).replace("\\\n", ""))
    settings = dict(convert.defaults)
    assert settings.keys() == configurator.settings_in(vars(convert)).keys()
    configurator.configure(settings, flags, convert.allowed)
    known = run["record"]["settings"]
    assert script_name == "convert.py" and settings == known | {"out_dir": f"{finished}_again"}


def test_a_result_has_a_card_with_the_figures_of_the_log_and_stays_intact(finished):
    folder, evals = finished / "final", evaluations(finished)
    card = (folder / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "transformers" and "masked-diffusion" in front["tags"]
    assert "base_model" not in front and "datasets" not in front, "neither is on the hub"
    first = next(row for row in evals if row["stage"][0] == "1")
    for row in (first, evals[-1]):
        assert all(f"{row[key]:.4g}" in text for key in ("eval_nelbo", "eval_bpb", "ar_ppl"))
    assert "$" not in text.replace(" $title", "") and "<!--" not in text
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder, check=True)

    code = re.search("```python\n(.*?)```", text, re.S)[1].replace("FOLDER", str(folder))
    exec(code, scope := {})
    assert scope["model"].config.model_type == "gpt2"
    commands = re.search("```\n(python .*?)```", text, re.S)[1].replace("FOLDER", str(folder))
    _, *argv = shlex.split(commands.splitlines()[0])
    assert HOSTILE.strip() in script(*argv, "--max_new_tokens=4", "--device=cpu")[0]


def test_a_card_names_hub_data_but_no_path_of_the_machine(out):
    run = history.read_run(out)
    run["record"] |= {"base": {"name": "EleutherAI/pythia-70m"}}
    run["record"]["model"] |= {"lora": {"rank": 4}, "block_size": 4}
    run["record"]["settings"] |= {"model_name": "/home/me/secret/base", "model_config": "",
                                  "dataset_name": "Salesforce/wikitext", "use_lora": True}
    card = report.card(run)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "EleutherAI/pythia-70m"
    assert front["datasets"] == ["Salesforce/wikitext"] and "secret" not in card
    assert "--verify" in card and "[MASK:" not in card and "its adapters" in card
    run["record"] |= {"base": None}
    run["record"]["settings"]["dataset_name"] = "~/secret/text.jsonl"
    front = yaml.safe_load(report.card(run).split("---\n")[1])
    assert not {"base_model", "datasets"} & set(front) and "secret" not in report.card(run)


def test_a_card_that_its_owner_changed_is_left_alone(out):
    (out / "final/README.md").write_text("mine")
    report.write(out, "Not replayed.")
    assert (out / "final/README.md").read_text() == "mine"


def test_a_report_that_cannot_be_written_is_one_line(out, capsys):
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    model, tokenizer = convert.load_model(out / "final", CPU)
    report.report_on_run(out, model, tokenizer, NO_AUTOCAST)
    told = capsys.readouterr()
    assert re.fullmatch("report: not written: .*\n", told.out)
    assert not told.err and not list(out.glob("*.new"))
    for wrong, kind, words in ((out, RunError, "cannot write"), (out / "x", UserError, "no log")):
        with pytest.raises(kind, match=words) as error:
            report.main([f"--out_dir={wrong}", "--replay=false", "--device=cpu"])
        assert "\n" not in str(error.value)


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    for path in (*HERE.glob("*.py"), HERE / "config", HERE / "assets", HERE / "notebooks"):
        (tmp_path / path.name).symlink_to(path)  # so that what it writes is not in the repository
    notebook = json.loads((HERE / "notebooks/tour.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]) and '"error"' not in json.dumps(cells)
    assert str(Path.home()) not in json.dumps(cells) and "/tmp/" not in json.dumps(cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"TOUR_STEPS": "8"})
    assert done.returncode == 0 and "error" not in done.stdout, done.stdout + done.stderr
    for words in ("done: outputs/tour/diffusion/final", "equal the model's own: True", "3 recovery",
                  "masked: "):
        assert words in done.stdout, words
    assert (tmp_path / "outputs/tour/diffusion/report.html").exists()
