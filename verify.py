"""Verified decoding: a block model drafts, and the AR mode of the same weights checks. The text is
what plain AR decoding writes, with the same seed also at a temperature, in fewer passes.

Draft and check can share a forward pass (TiDAR, https://arxiv.org/abs/2511.08923): behind each
place where acceptance may stop stands a noisy block, whose rows are the next drafts.
"""
import functools
import heapq
from collections import Counter

import torch

from configurator import UserError
from convert import (
    FOREVER, clean_meta, crop_cache, forward_at, logits_to_probs, new_cache, takes_padding)
from corpus import end_of, seed_for

MASK = -1  # stands for a noisy row in lists of ids


# --------------------------------------------------------------------------------------------------
# Tokens
@functools.lru_cache(64)  # a draft and its check need the same
def race_times(seed, position, size, device):
    """Exponential random numbers (size,) that belong to one place of one text."""
    generator = torch.Generator(device).manual_seed(seed_for(seed, position))
    return torch.empty(size, device=device).exponential_(generator=generator)


def best_tokens(logits, positions, seeds, sampling, k):
    """The k first tokens (B, L, k) at each place, of logits (B, L, V).

    At temperature 0 the most likely ones. Else the winners of a race in which token v needs the
    time e_v / p_v, with e_v exponential: the first is distributed as p. As e depends on the text's
    seed and the position (B, L) alone, a draft wins the same race as the token that checks it, so
    far as their distributions agree, and the text is the same with any drafts
    (https://arxiv.org/abs/2408.07978).
    """
    scores = logits
    if sampling.get("temperature"):
        scores = logits_to_probs(logits, **sampling)
        times = [race_times(seed, position, scores.shape[-1], scores.device)
                 for seed, row in zip(seeds, positions, strict=True)
                 for position in row + [0] * (scores.shape[1] - len(row))]
        scores = scores / torch.stack(times).view_as(scores)
    return scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices


# --------------------------------------------------------------------------------------------------
# What a pass runs on
def grow(token, drafts, n):
    """A tree to be checked: a token and the n likeliest ways on, with one row of drafts
    [(token, log p), ...] for each place behind it. One draft a place makes a chain.

    Returns the nodes (token, parent, depth, log p), parents first.
    """
    nodes, ways = [(token, -1, 0, 0.0)], []

    def offer(parent, place, rank):
        if place < len(drafts) and rank < len(drafts[place]):
            log_p = nodes[parent][3] + drafts[place][rank][1]
            heapq.heappush(ways, (-log_p, place, rank, parent))

    offer(0, 0, 0)
    while ways and len(nodes) <= n:
        minus, place, rank, parent = heapq.heappop(ways)
        nodes.append((drafts[place][rank][0], parent, place + 1, -minus))
        offer(parent, place, rank + 1)
        offer(len(nodes) - 1, place + 1, 0)
    return nodes


def layout(nodes, start, n_drafts, branches):
    """The rows of a pass: (rows (id or MASK, position, block_id, context_end, last), the nodes that
    have a noisy block behind them). start: the position of the first node.

    Nodes are numbered so that a subtree's numbers follow one another, and see those whose subtree
    they are in; the noisy rows behind a node see what it sees.
    """
    size, first = [1] * len(nodes), [0] * len(nodes)
    for i in range(len(nodes) - 1, 0, -1):
        size[nodes[i][1]] += size[i]
    free = [1] * len(nodes)  # the first number in each subtree that is not given yet
    for i, (_, parent, *_) in enumerate(nodes[1:], 1):
        first[i] = free[parent]
        free[parent] += size[i]
        free[i] = first[i] + 1
    rows = []
    for i, (token, _, depth, _) in enumerate(nodes):
        number = start + 1 + first[i]
        rows.append((token, start + depth, 0, number, number + size[i] - 1))
    likeliest = sorted(range(len(nodes)), key=lambda i: -nodes[i][3])
    n_blocks = branches if len(nodes) > 1 else 1
    behind = likeliest[:n_blocks] if n_drafts else []
    for block, i in enumerate(behind, 1):
        _, position, _, number, _ = rows[i]
        rows += [(MASK, position + 1 + d, block, number, FOREVER) for d in range(n_drafts)]
    return rows, behind


def follow(nodes, tokens):
    """The path of nodes, from the first on, that the checked tokens (one behind each node) take:
    (indices of the nodes, tokens behind them)."""
    path, new, i = [0], [], 0
    while True:
        new.append(tokens[i])
        children = (j for j, node in enumerate(nodes) if node[1] == i and node[0] == tokens[i])
        i = next(children, None)
        if i is None:
            return path, new
        path.append(i)


def keep_in_cache(cache, n_rows, paths, starts):
    """Of the last n_rows tokens in a cache keep each text's path (lists of columns), which is clean
    text from its start (B) on; what is behind the shorter ones is hidden."""
    old, most = cache.meta.shape[2] - n_rows, max(map(len, paths))
    device = cache.meta.device
    if any(path != list(range(len(path))) for path in paths):
        columns = [[old + i for i in path + [0] * (most - len(path))] for path in paths]
        columns = torch.tensor(columns, device=device)[:, None, :, None]  # (B, 1, most, 1)
        for layer in cache.layers:
            for x in (layer.keys, layer.values):  # (B, heads, L, size)
                where = columns.expand(-1, x.shape[1], -1, x.shape[3])
                x[:, :, old:old + most] = x.gather(2, where)
    crop_cache(cache, n_rows - most)
    meta = [[(start + i, 0 if i < len(path) else -1, start + i + 1, FOREVER) for i in range(most)]
            for path, start in zip(paths, starts, strict=True)]
    cache.meta[:, :, old:] = torch.tensor(meta, device=device).permute(2, 0, 1)  # (4, B, most)
    cache.hides |= min(map(len, paths)) < most


def leave_batch(cache, staying):
    """Drop the texts from a cache that are not among those staying, a list of rows."""
    cache.meta = cache.meta[:, staying]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[staying], layer.values[staying]


# --------------------------------------------------------------------------------------------------
# Decoding
def start_texts(model, prompts, sampling, seeds):
    """Run the prompts: (their cache, the texts so far as dicts)."""
    cache, P = new_cache(model.device), max(map(len, prompts))
    cache.hides = min(map(len, prompts)) < P
    if cache.hides and not takes_padding(model):
        raise UserError("verify_batch: this model's texts cannot be decoded together if their "
                        "lengths differ; take 1")
    ids = torch.tensor([[0] * (P - len(prompt)) + list(prompt) for prompt in prompts],
                       device=model.device)
    last = torch.arange(1, len(prompts) + 1, device=model.device) * P - 1
    if cache.hides:
        pad = torch.tensor([[P - len(prompt)] for prompt in prompts], device=model.device)
        logits = forward_at(model, ids, 0, pad, 0, None, last, cache)  # (B, V)
    else:
        model.set_causal(True)  # without a mask tensor
        logits = model(ids, None, last, cache=cache)
        cache.meta = clean_meta(P).to(model.device).expand(-1, len(prompts), -1)
    places = [[len(prompt)] for prompt in prompts]
    first = best_tokens(logits[:, None].float(), places, seeds, sampling, 1)[:, 0, 0].tolist()
    return cache, [{"start": len(prompt), "new": [token], "seed": seed, "drafts": []}
                   for prompt, token, seed in zip(prompts, first, seeds, strict=True)]


def lay_out(text, n_drafts, branches, tree):
    """Put the rows of a text's next pass into it."""
    text["nodes"] = grow(text["new"][-1], text["drafts"], tree or len(text["drafts"]))
    start = text["start"] + len(text["new"]) - 1
    text["rows"], text["behind"] = layout(text["nodes"], start, n_drafts, branches)


def run_pass(model, texts, cache):
    """Logits (B, L, V) of one pass over the rows of each text, fewer of which are filled up."""
    L = max(len(text["rows"]) for text in texts)
    rows = [text["rows"] + [(0, 0, -1, 0, 0)] * (L - len(text["rows"])) for text in texts]
    ids, *meta = torch.tensor(rows, device=model.device).permute(2, 0, 1)  # (B, L) each
    ids = torch.where(ids == MASK, model.mask_id, ids)
    if L == 1 and not cache.hides:  # plain AR decoding, which needs no mask
        model.set_causal(True)
        cache.meta = torch.cat([cache.meta, torch.stack(meta)], 2)
        return model(ids, None, cache=cache).float()
    model.set_causal(False)  # the mask says who attends to whom
    t = torch.tensor([[model.num_timesteps]], device=model.device)
    return model(ids, t, **model.attention_inputs(torch.stack(meta), cache)).float()


def go_on(text, best, log_p, n_drafts, counts):
    """Follow the drafts that were right, and take the next ones from behind them. best, log_p: of
    the rows of the pass, lists (L, k). Returns the columns of the pass that are text now."""
    path, new = follow(text["nodes"], [row[0] for row in best[:len(text["nodes"])]])
    text["new"] += new
    if len(text["nodes"]) > 1:
        depth = max(node[2] for node in text["nodes"])
        counts.update({"checks": 1, "drafted": depth, "accepted": len(path) - 1})
        counts.update([("tried", d) for d in range(1, depth + 1)])
        counts.update([("stood", d) for d in range(1, len(path))])
    text["drafts"] = []
    if path[-1] in text["behind"]:
        first = len(text["nodes"]) + text["behind"].index(path[-1]) * n_drafts
        text["drafts"] = [list(zip(best[i], log_p[i], strict=True))
                          for i in range(first, first + n_drafts)]
    return path


@torch.no_grad()
def decode_verified(model, prompts, new_tokens, drafts, branches, sampling, ends=(), seeds=None,
                    watch=None, tree=0, plan=None, counts=None):
    """Continue prompts (lists of ids), in one batch, exactly as the causal mode would.

    Each pass gives each text one token or more. drafts: for so many places, at most block_size less
    1; 0 is plain cached AR decoding. branches: behind how many of the checked tokens a noisy block
    drafts on in the same pass; 0: drafts have passes of their own. tree: how many drafts a check
    has, several for a place; 0: one for each. seeds: one a text. watch(new ids of each text) is
    called after each pass. plan(counts) may change (drafts, branches) before each. counts: a
    Counter of earlier texts, which plan is given too; those of these texts are added to it.

    Returns (the new ids of each prompt, counts: forwards, checks, and of drafts drafted, accepted);
    a pass counts once for each text in it.
    """
    cache, texts = start_texts(model, prompts, sampling, seeds or [0] * len(prompts))
    counts, all_texts, k = Counter() if counts is None else counts, texts, min(max(1, tree), 8)
    counts["forwards"] += len(texts)

    def is_done(text):
        return len(text["new"]) >= new_tokens or not set(ends).isdisjoint(text["new"])

    def shown():
        return [text["new"][:end_of(text["new"], ends) + 1][:new_tokens] for text in all_texts]

    while staying := [i for i, text in enumerate(texts) if not is_done(text)]:
        if len(staying) < len(texts):
            texts = [texts[i] for i in staying]
            leave_batch(cache, staying)
        if plan:
            drafts, branches = plan(counts)

        # 1) one pass over the candidates and the noisy rows behind them
        for text in texts:
            lay_out(text, drafts, branches, tree)
        logits = run_pass(model, texts, cache)  # (B, L, V)
        counts["forwards"] += len(texts)
        places = [[row[1] + 1 for row in text["rows"]] for text in texts]
        best = best_tokens(logits, places, [text["seed"] for text in texts], sampling, k)
        log_p = [[[0.0]] * best.shape[1]] * len(texts)  # one draft for a place: no choice
        if k > 1:
            log_p = logits.log_softmax(-1).gather(2, best).tolist()  # (B, L, k)

        # 2) check the drafts, keep what was right, draft anew
        starts = [text["rows"][0][1] for text in texts]
        paths = [go_on(text, *lists, drafts, counts)
                 for text, *lists in zip(texts, best.tolist(), log_p, strict=True)]
        keep_in_cache(cache, logits.shape[1], paths, starts)
        if watch:
            watch(shown())
    return shown(), counts


def reach(model, drafts=0):
    """How many positions behind the last new token may be used, with so many drafts or any."""
    return 2 * (drafts or min(model.block_size - 1, 7)) + 2
