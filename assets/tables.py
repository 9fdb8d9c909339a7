"""Tables of README.md and assets/*.md, made from the logs in this folder.

  python assets/tables.py            # print them
  python assets/tables.py --write    # put them into the pages
"""
import json
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
SAVERS = "compile_model", "use_8bit_adam", "use_gradient_checkpointing"
KINDS = "block_size", "use_lora"
BATCH = "batch_size", "gradient_accumulation_steps"
WORDS = {"use_8bit_adam": "8-bit Adam", "use_gradient_checkpointing": "checkpointing",
         "use_lora": "adapters", "load_in_4bit": "4-bit base"}


def rows_of(name):
    """The rows of a log."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def label(row, *names):
    """The config file of a row, and those of the named settings that are on."""
    parts = [row["name"]]
    for name in names:
        value = row["settings"][name]
        if value is True:
            parts.append(f"`{name}`")
        elif value:
            parts.append(f"`{name}={value}`")
    return ", ".join(parts)


def table(head, *rows):
    """The lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def stages():
    """What the stages train, and where config/tiny.py stands after each."""
    evaluations = [row for row in rows_of("tiny.jsonl") if "eval_nelbo" in row]
    # the first evaluation of a stage is also the end of the stage before
    first = {row["stage"][0]: row for row in reversed(evaluations)}
    after = {"1": first["2"], "2": first["3"], "3": evaluations[-1]}
    what = {
        "1": ["1 attention adaptation", "attention, mask, time embedding", "0.5x", "diffusion"],
        "2": ["2 diffusion", "everything", "1x", "diffusion + 0.5 AR"],
        "3": ["3 recovery", "everything", "0.3x", "diffusion + 0.5 AR"],
    }
    head = ["stage", "trains", "learning rate", "loss", "`eval_nelbo`", "`ar_ppl`"]

    def figures(row):
        return [f"{row['eval_nelbo']:.3f}", f"{row['ar_ppl']:.2f}"]

    rows = [[*what[number], *figures(after[number])] for number in what]
    return table(head, ["right after surgery", "", "", "", *figures(first["1"])], *rows)


def speed():
    """The training step, beside the plain way of doing it."""
    head = ["", "tokens/s", "baseline", "speed-up", "GB", "baseline GB", "ratio", "of peak"]
    rows = []
    for r in rows_of("bench.jsonl"):
        baseline = [f"{r['baseline_tokens_per_s']:.0f}", f"{r['speedup']:.2f}"]
        memory = [f"{r['baseline_peak_memory_gb']:.2f}", f"{r['memory_ratio']:.2f}"]
        peak = "" if r["mfu"] is None else f"{r['mfu']:.0%}"
        rows.append([label(r, "dtype", *SAVERS, *KINDS), f"{r['tokens_per_s']:.0f}", *baseline,
                     f"{r['peak_memory_gb']:.2f}", *memory, peak])
    return table(head, *rows)


def gpu():
    """The training step on a GPU, with what --estimate says it takes."""
    head = ["", "tokens/s", "baseline", "speed-up", "GB", "estimated", "baseline GB", "of peak"]
    rows = []
    for r, estimated in zip(rows_of("bench_gpu.jsonl"), rows_of("bench_gpu_estimates.jsonl"),
                            strict=True):
        baseline = ["", ""]
        if "speedup" in r:
            baseline = [f"{r['baseline_tokens_per_s']:.0f}", f"{r['speedup']:.2f}"]
        plain_gb = f"{r['baseline_peak_memory_gb']:.1f}" if "speedup" in r else ""
        rows.append([r["name"].split()[-1], f"{r['tokens_per_s']:.0f}", *baseline,
                     f"{r['peak_memory_gb']:.1f}", f"{estimated['estimate_gb']['total']:.1f}",
                     plain_gb, f"{r['mfu']:.0%}"])
    return table(head, *rows)


def sampling():
    """Sampling, beside LLaDA's plain loop and plain AR decoding."""
    head = ["", "tokens/s", "passes per token", "LLaDA's loop", "speed-up", "plain AR", "verified"]
    rows = []
    for r in rows_of("bench_sampling.jsonl"):
        names = ["prompts", "threshold"] if r["settings"]["prompts"] else ["block_size"]
        verified = r.get("verify_tokens_per_s")
        rows.append([label(r, *names, "new_tokens"), f"{r['sample_tokens_per_s']:.1f}",
                     f"{r['forwards_per_token']:.2f}", f"{r['baseline_sample_tokens_per_s']:.1f}",
                     f"{r['sample_speedup']:.2f}", f"{r['ar_tokens_per_s']:.1f}",
                     f"{verified:.1f}" if verified else ""])
    return table(head, *rows)


def block_figures(r):
    """The figures of a row of blocks.jsonl: nats, AR perplexity, tokens per forward, speed."""
    own = " (own text)" if r["ar_ppl_before"] < 5 else ""
    cells = [f"{r['eval_nelbo']:.3f}{own}", f"{r['ar_ppl']:.3f}{own}"]
    if "tokens_per_forward" not in r:
        return [*cells, "", ""]
    ratio = r["tokens_per_s"] / r["ar_tokens_per_s"]
    return [*cells, f"{r['tokens_per_forward']:.2f}", f"{ratio:.2f}"]


BLOCK_HEAD = ["`eval_nelbo`", "`ar_ppl`", "tokens per forward", "speed over AR"]


def choices():
    """{name of a choice: its rows of recipe.jsonl, one for each seed}."""
    found = {}
    for r in rows_of("recipe.jsonl"):
        found.setdefault(r["name"], []).append(r)
    return found


def over_seeds(rows, value, form):
    """The mean and the standard deviation over seeds of value(row), "" where a row has none."""
    try:
        values = [value(r) for r in rows]
    except KeyError:
        return ""
    mean = f"{statistics.fmean(values):{form}}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):{form.removeprefix('+')}}"


def choice_figures(rows):
    """The cells of a choice: NELBO, AR perplexity, sentences, holes, drafts, speed."""
    return [over_seeds(rows, lambda r: r["eval_nelbo"], ".3f"),
            over_seeds(rows, lambda r: r["ar_ppl"] / r["ar_ppl_before"], ".3f"),
            over_seeds(rows, lambda r: r["accepted"]["diffusion"], ".0%"),
            over_seeds(rows, lambda r: r["holes_right"]["diffusion"], ".0%"),
            over_seeds(rows, lambda r: r["verify"]["accepted_per_check"], ".2f"),
            over_seeds(rows, lambda r: r["verify"]["speed_over_ar"], ".2f")]


CHOICE_HEAD = ["`eval_nelbo`", "`ar_ppl`, after / before", "sentences right", "holes right",
               "accepted drafts a check", "speed over AR"]


def recipe():
    """All choices of recipe.jsonl, and by how much their NELBO differs from the whole-sequence
    recipe's, seed by seed."""
    found, rows = choices(), []
    whole = {r["seed"]: r["eval_nelbo"] for r in found["whole sequence"]}
    for name, of_name in found.items():
        off = over_seeds(of_name, lambda r: r["eval_nelbo"] / whole[r["seed"]] - 1, "+.0%")
        if "own text alone" in name:  # measured on other text
            off = ""
        nelbo, ar_ppl, sentences, *others = choice_figures(of_name)
        if "scratch" in name:  # there was no AR model before
            ar_ppl = ""
        behind = over_seeds(of_name, lambda r: r["accepted_behind_16"], ".0%")
        rows.append([name, str(len(of_name)), nelbo, off, ar_ppl, sentences, behind, *others])
    nelbo, ar_ppl, sentences, *others = CHOICE_HEAD
    return table(["choice", "seeds", nelbo, "difference", ar_ppl, sentences, "behind 16 tokens",
                  *others], *rows)


def blocks():
    """Five ways to convert."""
    ways = ["whole sequence", "blocks of 4", "blocks of 4, own text", "blocks of 4, adapters",
            "blocks of 4, adapters, own text alone"]
    found = choices()
    return table(["what is trained", *CHOICE_HEAD],
                 *([way, *choice_figures(found[way])] for way in ways))


def ablation():
    """All of blocks.jsonl, with the flags of each row."""
    rows = []
    for r in rows_of("blocks.jsonl"):
        flags = f"`{r['flags']}`" if r["flags"] else "none"
        rows.append([flags, *block_figures(r)])
    return table(["flags", *BLOCK_HEAD], *rows)


def drafts():
    """How SmolLM2 drafts for itself: what was trained, how it decodes, accepted drafts, speed."""
    head = ["trained", "decoding", "accepted drafts a check", "tokens per forward", "tokens/s",
            "plain AR", "speed over AR"]
    rows = [[r["name"], r["flags"] and f"`{r['flags']}`", f"{r['accepted_per_check']:.2f}",
             f"{r['tokens_per_forward']:.2f}", f"{r['tokens_per_s']:.1f}",
             f"{r['ar_tokens_per_s']:.1f}", f"{r['speed_over_ar']:.2f}"]
            for r in rows_of("smollm2_drafts.jsonl")]
    return table(head, *rows)


def masks():
    """Masks of an exact count, and masks drawn one by one, in pairs of one seed."""
    rows = [[str(r["seed"]), r["masks"], f"{r['eval_nelbo']:.3f}", f"{r['ar_ppl']:.3f}"]
            for r in rows_of("masks.jsonl")]
    return table(["seed", "masks in training", "`eval_nelbo`", "`ar_ppl`"], *rows)


def estimates():
    """What --estimate says, beside what the same settings then took. The log has them in pairs."""
    found, rows = rows_of("bench_estimates.jsonl"), []
    for measured, estimated in zip(found[::2], found[1::2], strict=True):
        total = estimated["estimate_gb"]["total"]
        rows.append([label(estimated, "dtype", *BATCH, *SAVERS, *KINDS), f"{total:.2f}",
                     f"{measured['peak_memory_gb']:.2f}"])
    return table(["", "estimated, GB", "measured, GB"], *rows)


def savers(row):
    """A cell of cards(): the memory savers that make a row fit, its GB, and the largest batch."""
    if not row["fits"]:
        return "no"
    step = row["ladder"][-1]
    on = [WORDS[name] for name, value in step["means"].items() if value and name in WORDS]
    if step["means"].get("weights_dtype") == "bfloat16":
        on.append("bfloat16 weights")
    if "batch_size" in step["means"]:
        on.append(f"`batch_size={step['means']['batch_size']}`")
    batch = f", batch up to {row['largest_batch']}" if row["largest_batch"] else ""
    return f"{' + '.join(on) or 'baseline'}: {step['gb']:.1f} GB{batch}"


def cards():
    """Which memory savers let a model fit a card, by the size of the card."""
    rows = rows_of("bench_cards.jsonl")
    limits = sorted({r["limit_gb"] for r in rows})
    lines = []
    for model in dict.fromkeys(r["name"].partition(":")[0] for r in rows):
        of_model = {r["limit_gb"]: r for r in rows if r["name"].partition(":")[0] == model}
        first = next(iter(of_model.values()))
        cells = [savers(of_model[limit]) if limit in of_model else "" for limit in limits]
        lines.append([model, f"{first['ladder'][0]['gb']:.1f} GB", *cells])
    return table(["model", "baseline", *(f"{round(limit) + 3} GB" for limit in limits)], *lines)


def sizes():
    """The least and the comfortable cards for a model, what a step takes, the hours of a run."""
    names = {"1b": "1B", "llama3b": "3B", "llama7b": "7B", "llama13b": "13B"}
    rows = []
    for r in rows_of("bench_sizes.jsonl"):
        s, all_cards = r["settings"], r["cards"].split(",")
        card = f"{all_cards[0].split(':')[0]} GB"
        on = [WORDS[name] for name in WORDS if s[name]]
        if s["weights_dtype"] == "bfloat16":
            on.append("bfloat16 weights")
        if s["parallel"]:
            on.append(s["parallel"])
            card = f"{len(all_cards)} x {card}"
        rows.append([names[r["name"].split()[-1]], card, f"{r['estimate_gb']['total']:.1f}",
                     str(s["batch_size"]), ", ".join(on), f"{r['hours']:.0f}"])
    return table(["", "cards", "GB on each", "`batch_size`", "switched on", "hours"], *rows)


def options():
    """What a step of SmolLM2 takes with each option, estimated and measured."""
    rows = []
    for r in rows_of("memory_options.jsonl"):
        flags = " ".join(f"`{flag}`" for flag in r["flags"].split()) or "none"
        rows.append([str(r["processes"]), flags, f"{r['estimated_gb']:.2f}",
                     f"{r['measured_gb']:.2f}"])
    return table(["processes", "options", "estimated, GB each", "measured, GB each"], *rows)


def screen():
    """What config/tiny.py's run prints in the end, less two of the three texts."""
    text = (HERE / "tiny_screen.txt").read_text().strip("\n")
    written = [match.start() for match in re.finditer(r"^    \d: ", text, re.M)]
    text = text[:written[1]] + "    ..." + text[text.index("\n\na hole"):]
    return ["```", *text.splitlines(), "```"]


PAGES = {
    "README.md": [screen, blocks, stages],
    "assets/recipe.md": [recipe],
    "assets/blocks.md": [ablation, drafts, masks, sampling],
    "assets/memory.md": [sizes, cards, estimates, options, gpu, speed],
}


def quote(make):
    """A table between its marks, as the pages have it."""
    return "\n".join([f"<!-- {make.__name__} -->", *make(), "<!-- end -->"])


if __name__ == "__main__":
    for page, makers in PAGES.items():
        path = HERE.parent / page
        for make in makers:
            text = quote(make)
            print(text, end="\n\n")
            if "--write" in sys.argv:
                marks = rf"<!-- {make.__name__} -->\n.*?<!-- end -->"
                old = path.read_text()
                path.write_text(re.sub(marks, lambda _, text=text: text, old, flags=re.S))
