"""Print README's tables of speed and memory from the logs of bench.py: python assets/tables.py"""
import json
from pathlib import Path

HERE = Path(__file__).parent


def rows_of(name):
    """The rows of a log, each with the arguments that only some of its commands have."""
    rows = [json.loads(line) for line in (HERE / name).read_text().splitlines()]
    common = set.intersection(*(set(r["command"].split()) for r in rows))
    for r in rows:
        r["flags"] = " ".join(word for word in r["command"].split() if word not in common)
    return rows


def table(*rows):
    """Lines of a table, whose first row is its head."""
    return [f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def speed():
    """Training, each beside the plain way of the same minutes."""
    rows = [["flags", "tokens/s", "plain", "speed", "GB", "plain", "memory", "of the GEMM peak"]]
    for r in rows_of("bench.jsonl"):
        theirs = ["", "", "", ""] if "speedup" not in r else [
            f"{r['baseline_tokens_per_s']:.0f}", f"{r['speedup']:.2f}", f"{r['baseline_peak_memory_gb']:.2f}",
            f"{r['memory_ratio']:.2f}"]
        rows.append([f"`{r['flags']}`", f"{r['tokens_per_s']:.0f}", *theirs[:2], f"{r['peak_memory_gb']:.2f}",
                     *theirs[2:], "" if r["mfu"] is None else f"{r['mfu']:.0%}"])
    return table(*rows)


def writing():
    """Sampling, beside LLaDA's plain loop and plain AR decoding."""
    rows = [["flags", "tokens/s", "passes a token", "LLaDA's loop", "speed", "plain AR", "verified"]]
    for r in rows_of("bench_sampling.jsonl"):
        rows.append([f"`{r['flags']}`", f"{r['sample_tokens_per_s']:.1f}", f"{r['forwards_per_token']:.2f}",
                     f"{r['baseline_sample_tokens_per_s']:.1f}", f"{r['sample_speedup']:.2f}",
                     f"{r['ar_tokens_per_s']:.1f}",
                     f"{r['verify_tokens_per_s']:.1f}" if "verify_tokens_per_s" in r else ""])
    return table(*rows)


def estimates():
    """What --estimate says, beside what the same settings then took."""
    rows, found = [["flags", "estimated, GB", "measured, GB"]], rows_of("bench_estimates.jsonl")
    for measured, r in zip(found[::2], found[1::2], strict=True):
        flags = " ".join(f for f in r["flags"].split() if f in measured["flags"].split())
        rows.append([f"`{flags}`", f"{r['estimate_gb']['total']:.2f}", f"{measured['peak_memory_gb']:.2f}"])
    return table(*rows)


def cards():
    """What it takes for a model to fit a card, and the largest batch then."""
    rows = [json.loads(line) for line in (HERE / "bench_cards.jsonl").read_text().splitlines()]
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
            words += [f"batch_size {means[k]}" for k in ("batch_size",) if k in means]
            words += ["adapters"] * means.get("use_lora", False)
            cells.append(f"{' + '.join(words) or 'none'}: {r['ladder'][-1]['gb']:.1f} GB, up to {r['largest_batch']}"
                         if r["fits"] else "no")
        lines.append([name, f"{r['ladder'][0]['gb']:.1f} GB", *cells])
    return table(*lines)


TABLES = {"speed": speed, "writing": writing, "estimates": estimates, "cards": cards}

if __name__ == "__main__":
    for name, make in TABLES.items():
        print(f"<!-- {name} -->", *make(), "<!-- end -->", "", sep="\n")
