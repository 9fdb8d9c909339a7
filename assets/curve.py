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
diffusion = [row["eval_nelbo"] / math.log(2) for row in rows]
ar = [math.log2(row["ar_ppl"]) for row in rows]

figure, axis = plt.subplots(figsize=(8, 3.6), constrained_layout=True)
axis.plot(steps, diffusion, "o-", ms=4, label="diffusion mode (eval_nelbo, an upper bound)")
axis.plot(steps, ar, "s--", ms=4, label="AR mode of the same weights (ar_ppl)")
axis.set(xlabel="optimizer step", ylabel="bits per held-out byte", ylim=(2.5, 10))
for stage, start in {row["stage"]: row["step"] for row in reversed(rows)}.items():
    axis.axvline(start, color="0.85", zorder=0)
    axis.text(start + 4, 9.9, stage.replace(" ", "\n"), va="top", fontsize=8)
axis.legend(frameon=False, loc="center right")
figure.savefig(sys.argv[2], dpi=110)
