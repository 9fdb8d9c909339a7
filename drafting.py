"""How far verified decoding drafts on this machine, and its speed beside plain AR decoding."""
import time
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from convert import FOREVER, crop_cache, forward_at, new_cache
from verify import MASK, decode_verified, run_pass


@torch.no_grad()
def measure_passes(model, context, most, batch=1):
    """[(rows, seconds of a pass on so many)], up to most rows or more, for a batch of texts behind
    so many tokens of context."""
    cache = new_cache(model.device)
    ids = torch.zeros(batch, context, dtype=torch.long, device=model.device)
    forward_at(model, ids, 0, 0 * ids[:, :1], 0, None, ids[0, :1], cache)
    found, n = [], 1
    while not found or found[-1][0] < most:
        rows = [(0, context, 0, context + 1, FOREVER)]
        rows += [(MASK, context + 1 + i % 8, 1, context + 1, FOREVER) for i in range(1, n)]
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            run_pass(model, [{"rows": rows}] * batch, cache).argmax(-1).tolist()  # which waits
            seconds.append(time.perf_counter() - start)
            crop_cache(cache, n)
        found.append((n, min(seconds)))
        n *= 2
    return found


def make_plan(costs, ways):
    """The plan of decode_verified() for costs of measure_passes(): the fastest of ways, a set of
    (drafts, branches), by the acceptance so far. (0, 0) is plain AR decoding."""
    sizes, seconds = zip(*costs, strict=True)
    first = max([way for way in ways if way[0] <= 3] or ways)  # to learn what is accepted

    def speed(way, counts):  # tokens per second
        d, b = way
        chance = [1.0]  # that 0, 1, ... drafts or more are accepted
        for i in range(1, d + 1):
            likely = chance[-1] ** 2 / chance[-2] if i > 1 and chance[-2] else 0.5
            if counts["tried", i]:
                likely = counts["stood", i] / counts["tried", i]
            chance.append(likely)
        missed = chance[b] if b <= d else 0.0  # acceptance ends where no noisy block is
        rows = 1 + d + b * d, 1 + d
        taken = np.interp(rows, sizes, seconds)
        return (sum(chance) + missed) / (taken[0] + missed * taken[1])

    def plan(counts):
        if counts["checks"] < 8 + counts["forwards"] // 64:  # now and then also in plain decoding
            return first
        return max(ways, key=lambda way: speed(way, counts))
    return plan


def choose(model, s, context):
    """How to draft behind so many tokens, as settings of sample.py say and this machine is fastest:
    (drafts, branches, plan) of decode_verified()."""
    most = min(model.block_size - 1, 7)
    drafts = [s.drafts] if s.drafts else range(most + 1)
    branches = [s.branches] if s.branches >= 0 else range(9)
    if s.tree or len(drafts) == len(branches) == 1:
        n = s.drafts or min(3, most)
        return n, s.branches if s.branches >= 0 else n + 1, None
    ways = {(d, min(b, d + bool(d))) for d in drafts for b in branches}
    rows = max(1 + d + b * d for d, b in ways)
    context = max(1, min(context, model.max_positions - 9))  # where what is measured has room
    costs = measure_passes(model, context, rows, s.verify_batch)
    return 1, 1, make_plan(costs, ways)


def decode_in_turns(model, prompts, modes, new_tokens, sampling, ends, seed=0, batch=1, tree=0,
                    title=""):
    """Continue prompts (lists of ids), so many together, in each of modes {name: (drafts, branches,
    plan)} by turns, so that what else the machine does meets all of them alike. title: of a bar.

    Returns {name: new ids of each prompt}, {name: seconds}, {name: counts}.
    """
    if len(modes) > 1:  # so that all are timed warm
        for drafts, branches, _ in modes.values():
            decode_verified(model, prompts[:1], min(8, new_tokens), drafts, branches, sampling)
    texts, seconds = {name: [] for name in modes}, dict.fromkeys(modes, 0.0)
    counts = {name: Counter() for name in modes}
    for i in tqdm(range(0, len(prompts), batch), title, disable=None if title else True):
        part = prompts[i:i + batch]
        seeds = [seed + i + j for j in range(len(part))]
        for name, (drafts, branches, plan) in modes.items():
            start = time.perf_counter()
            new, _ = decode_verified(model, part, new_tokens, drafts, branches, sampling, ends,
                                     seeds, None, tree if drafts else 0, plan, counts[name])
            seconds[name] += time.perf_counter() - start
            texts[name] += new
    return texts, seconds, counts


def verify_texts(model, prompts, sampling, ends, s):
    """Continue prompts (lists of ids) as the settings of sample.py say, and with `compare` by plain
    AR decoding in turns with it: (the new ids of each, figures)."""
    drafts, branches, plan = choose(model, s, max(map(len, prompts)))
    modes = {"drafts": (drafts, branches, plan)}
    if s.compare:
        modes["ar"] = 0, 0, None
    texts, seconds, counts = decode_in_turns(
        model, prompts, modes, s.max_new_tokens, sampling, ends, s.seed, s.verify_batch, s.tree)
    new, taken, n = texts["drafts"], seconds["drafts"], counts["drafts"]
    n_tokens = sum(map(len, new))
    figures = {
        "tokens_per_s": round(n_tokens / taken, 1),
        "tokens_per_forward": round(n_tokens / n["forwards"], 3), "forwards": n["forwards"],
        "seconds": round(taken, 3),
        "accepted_per_check": round(n["accepted"] / max(1, n["checks"]), 3),
        "acceptance": round(n["accepted"] / max(1, n["drafted"]), 4)}
    if plan:
        figures["drafts"], figures["branches"] = plan(n)
    if s.compare:
        n_plain = sum(map(len, texts["ar"]))
        figures |= {"ar_tokens_per_s": round(n_plain / seconds["ar"], 1),
                    "speed_over_ar": round(seconds["ar"] / taken, 3),
                    "equal": sum(a == b for a, b in zip(new, texts["ar"], strict=True))}
    return new, figures
