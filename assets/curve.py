"""Draw the picture of the README from a log (needs matplotlib).

  python assets/curve.py assets/tiny.jsonl assets/tiny.png
"""
import json
import math
import sys

import matplotlib.pyplot as plt

with open(sys.argv[1]) as file:
    rows = [row for row in map(json.loads, file) if "eval_nelbo" in row]
steps = [row["step"] for row in rows]
diffusion = [row["eval_nelbo"] for row in rows]
ar = [math.log(row["ar_ppl"]) for row in rows]

figure, axis = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
axis.plot(steps, diffusion, "o-", ms=4, label="diffusion mode (eval_nelbo, an upper bound)")
axis.plot(steps, ar, "s--", ms=4, label="AR mode of the same weights (ar_ppl)")
axis.set(xlabel="optimizer step", ylabel="nats per held-out token", yscale="log", ylim=(0.12, 14))
axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
for stage, start in {row["stage"]: row["step"] for row in reversed(rows)}.items():
    axis.axvline(start, color="0.85", zorder=0)
    axis.text(start + 4, 12.5, stage, va="top", fontsize=8, rotation=90)
axis.legend(frameon=False, loc="center right", bbox_to_anchor=(0.86, 0.6))
figure.savefig(sys.argv[2], dpi=110)
