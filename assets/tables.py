"""Print README's tables of speed and memory from the logs of bench.py: python assets/tables.py"""
import json
from pathlib import Path

HERE = Path(__file__).parent
STEP = "compile_model", "use_8bit_adam", "optimizer_in_backward", "use_gradient_checkpointing", "block_size", "use_lora"


def rows_of(name):
    """The rows of a log."""
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def label(row, *settings):
    """What a row is of: the config file, and those of the settings that are on."""
    on = [f"`{k}`" if row["settings"][k] is True else f"`{k}={row['settings'][k]}`" for k in settings
          if row["settings"][k]]
    return ", ".join([row["name"], *on])


def table(*rows):
    """Lines of a table, whose first row is its head."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def speed():
    """Training, each beside the plain way of the same minutes."""
    rows = [["", "tokens/s", "plain", "speed", "GB", "plain", "memory", "of the GEMM peak"]]
    for r in rows_of("bench.jsonl"):
        theirs = ["", "", "", ""] if "speedup" not in r else [
            f"{r['baseline_tokens_per_s']:.0f}", f"{r['speedup']:.2f}", f"{r['baseline_peak_memory_gb']:.2f}",
            f"{r['memory_ratio']:.2f}"]
        rows.append([label(r, "dtype", *STEP), f"{r['tokens_per_s']:.0f}", *theirs[:2], f"{r['peak_memory_gb']:.2f}",
                     *theirs[2:], "" if r["mfu"] is None else f"{r['mfu']:.0%}"])
    return table(*rows)


def writing():
    """Sampling, beside LLaDA's plain loop and plain AR decoding."""
    rows = [["", "tokens/s", "passes a token", "LLaDA's loop", "speed", "plain AR", "verified"]]
    for r in rows_of("bench_sampling.jsonl"):
        what = ["prompts", "threshold"] if r["settings"]["prompts"] else ["block_size"]  # of a folder: its own
        rows.append([label(r, *what, "new_tokens"), f"{r['sample_tokens_per_s']:.1f}", f"{r['forwards_per_token']:.2f}",
                     f"{r['baseline_sample_tokens_per_s']:.1f}", f"{r['sample_speedup']:.2f}",
                     f"{r['ar_tokens_per_s']:.1f}",
                     f"{r['verify_tokens_per_s']:.1f}" if "verify_tokens_per_s" in r else ""])
    return table(*rows)


def estimates():
    """What --estimate says, beside what the same settings then took."""
    rows, found = [["", "estimated, GB", "measured, GB"]], rows_of("bench_estimates.jsonl")
    for measured, r in zip(found[::2], found[1::2], strict=True):
        what = label(r, "dtype", "batch_size", "gradient_accumulation_steps", *STEP)
        rows.append([what, f"{r['estimate_gb']['total']:.2f}", f"{measured['peak_memory_gb']:.2f}"])
    return table(*rows)


def cards():
    """What it takes for a model to fit a card, and the largest batch then."""
    rows = rows_of("bench_cards.jsonl")
    sizes = sorted({r["limit_gb"] for r in rows})
    lines = [["model", "with no means", *(f"{round(x) + 3} GB" for x in sizes)]]
    for name in dict.fromkeys(r["name"].partition(":")[0] for r in rows):
        cells = []
        for r in sorted((r for r in rows if r["name"].partition(":")[0] == name), key=lambda r: r["limit_gb"]):
            means = r["ladder"][-1]["means"]
            words = ["in backward"] * means.get("optimizer_in_backward", False)
            words += ["8-bit Adam"] * means.get("use_8bit_adam", False)
            words += [f"checkpointing of {means.get('checkpoint_share', 0):.0%}"] * (
                means.get("use_gradient_checkpointing", False))
            if "batch_size" in means:
                words.append(f"batch_size {means['batch_size']}")
            words += ["adapters"] * means.get("use_lora", False)
            cells.append(f"{' + '.join(words) or 'none'}: {r['ladder'][-1]['gb']:.1f} GB, up to {r['largest_batch']}"
                         if r["fits"] else "no")
        lines.append([name, f"{r['ladder'][0]['gb']:.1f} GB", *cells])
    return table(*lines)


TABLES = {"speed": speed, "writing": writing, "estimates": estimates, "cards": cards}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"<!-- {name} -->", *make(), "<!-- end -->", "", sep="\n")
