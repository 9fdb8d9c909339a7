"""Verified decoding, against plain AR decoding, distributions and masks written by hand."""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import convert
import drafting
import machine
import verify
from test_convert import (
    LORA, UNIFORM, assert_close, cases, chi_square, diffusion, meta_by_hand, random_ids, random_lm)


@cases("family", ["llama", "mistral"])
@torch.no_grad()
def test_drafts_come_from_what_a_block_was_trained_on(family):
    """Each branch of a pass equals a pass of its own on [accepted text | masks]."""
    model, ids = diffusion(random_lm(family), block_size=5), random_ids(1, 10)
    t, cache = torch.tensor([[1000]]), convert.new_cache(model.device)
    model.set_causal(False)
    model(ids[:, :7], **model.attention_inputs(convert.clean_meta(7), cache))

    tokens = ids[0, 7:].tolist()  # three, of which two are drafts
    nodes = verify.grow(tokens[0], [[(token, 0.0)] for token in tokens[1:]], 2)
    rows, behind = verify.layout(nodes, 7, 2, 3)
    assert behind == [0, 1, 2]
    logits = verify.run_pass(model, [{"rows": rows}], cache)[0]

    for j in range(3):  # the two drafts after candidate j
        start = 8 + j
        fed = torch.tensor([[*ids[0, :start], model.mask_id, model.mask_id]])
        alone = model.attention_inputs(meta_by_hand(start, start + 2))
        expected = model(fed, t, torch.tensor([start, start + 1]), **alone)
        assert_close(logits[3 + 2 * j:5 + 2 * j], expected, rtol=0, atol=1e-5)


@cases("temperature", [0.0, 1.0])
@cases("family, noise", [("llama", {}), ("mistral", {}), ("gpt2", UNIFORM), ("qwen3", UNIFORM)])
def test_texts_in_a_batch_are_those_of_plain_decoding_alone(family, noise, temperature):
    more = {"initializer_range": 0.1}
    model = diffusion(random_lm(family, **more), 10, not noise, block_size=4, lora=LORA, **noise)
    for p in model.adapter_state().values():
        torch.nn.init.normal_(p, std=0.1)
    prompts = [random_ids(20)[n:n + length].tolist() for n, length in enumerate((3, 9, 5, 9))]
    sampling, seeds = {"temperature": temperature, "top_k": 5}, [4, 5, 6, 7]
    plain = [verify.decode_verified(model, [prompt], 20, 0, 0, sampling, seeds=[seed])[0][0]
             for prompt, seed in zip(prompts, seeds, strict=True)]
    assert len(set(map(tuple, plain))) == 4
    end = plain[2][6]  # one text ends early
    plain = [text[:text.index(end) + 1] if end in text else text for text in plain]
    for drafts, branches, tree in ((0, 0, 0), (3, 4, 0), (3, 1, 0), (2, 0, 0), (3, 2, 9)):
        found, counts = verify.decode_verified(
            model, prompts, 20, drafts, branches, sampling, [end], seeds, tree=tree)
        assert found == plain, (drafts, branches, tree)
        assert counts["accepted"] <= counts["drafted"] <= drafts * counts["checks"]
        assert bool(drafts) == (counts["checks"] > 0)
        # a pass on a text gives one token, and those drafts that were right
        assert sum(map(len, found)) <= counts["forwards"] + counts["accepted"]


def test_the_plan_takes_what_gives_most_tokens_a_second_and_plain_decoding_if_nothing_helps():
    ways = {(d, min(b, d + bool(d))) for d in range(4) for b in range(5)}
    always = Counter(checks=9) + Counter({("tried", d): 9 for d in (1, 2, 3)})
    all_right = always + Counter({("stood", d): 9 for d in (1, 2, 3)})
    flat, steep = [(1, 1.0), (16, 1.0)], [(1, 1.0), (2, 2.0), (16, 16.0)]
    assert drafting.make_plan(steep, ways)(Counter()) == (3, 4), "first it learns"
    assert drafting.make_plan(steep, ways)(always) == (0, 0)
    assert drafting.make_plan(steep, ways)(all_right) == (0, 0), "16 rows for 4 tokens"
    assert drafting.make_plan(flat, ways)(all_right) == (3, 4)
    # 4 rows for 1 + 3 tokens, then 4 rows for the next: passes of their own for drafts
    assert drafting.make_plan([(1, 1.0), (4, 1.1), (5, 9.0)], ways)(all_right) == (3, 0)


def test_a_tree_holds_the_likeliest_paths_and_each_node_sees_its_ancestors():
    drafts = [[("a", math.log(0.6)), ("b", math.log(0.4))],
              [("c", math.log(0.7)), ("d", math.log(0.3))]]
    nodes = verify.grow("root", drafts, 5)
    paths = []
    for token, parent, depth, log_p in nodes:
        paths.append((paths[parent] if depth else "") + (token if depth else ""))
        assert depth == len(paths[-1])
        assert math.exp(log_p) == pytest.approx(math.prod(
            math.exp(dict(row)[token]) for row, token in zip(drafts, paths[-1], strict=False)))
    assert paths == ["", "a", "ac", "b", "bc", "ad"]  # 1, .6, .42, .4, .28, .18; not bd, .12

    rows, behind = verify.layout(nodes, 10, 1, 2)
    assert behind == [0, 1] and [row[1] for row in rows] == [10, 11, 12, 11, 12, 12, 11, 12]
    meta = torch.tensor([row[1:] for row in rows]).T[:, None]
    sees = convert.mask_mod(meta[..., None], meta[:, :, None], None)[0]
    seen_by = [*paths, "", "a"]  # the noisy rows see what the node before them does
    for q, k in itertools.product(range(8), range(6)):
        assert sees[q, k] == seen_by[q].startswith(paths[k]), (q, k)
    assert verify.follow(nodes, ["b", "x", "x", "c", "y", "x"]) == ([0, 3, 4], ["b", "c", "y"])


def test_a_race_is_won_as_the_probabilities_say_and_by_a_draft_as_often_as_they_agree():
    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.4, 0.3, 0.1, 0.2])
    counts, agree, n = torch.zeros(4), 0, 4000
    for seed in range(n):
        [[[x], [y]]] = verify.best_tokens(torch.stack([p, q])[None].log(), [[7, 7]], [seed],
                                          {"temperature": 1.0}, 1).tolist()
        counts[x] += 1
        agree += x == y
    assert chi_square(counts, p * n) < 16.3, "3 degrees of freedom, p = 0.001"
    total_variation = 0.2
    assert agree / n > (1 - total_variation) / (1 + total_variation)


def test_verified_sampling_has_the_distribution_of_the_causal_model():
    lm = random_lm("llama", vocab_size=5, pad_token_id=None, bos_token_id=None,
                   eos_token_id=None, num_hidden_layers=1)
    model, sampling = diffusion(lm, block_size=4), {"temperature": 1.0}
    for p in lm.parameters():
        p.data *= 8 if p.dim() > 1 else 1  # far from uniform
    texts = torch.tensor([[1, 2, *abc] for abc in itertools.product(range(5), repeat=3)])
    with torch.no_grad():
        log_p = lm(texts).logits.log_softmax(-1)[:, 1:4].gather(2, texts[:, 2:, None])
    expected = log_p.sum((1, 2)).exp() * 3000
    counts = torch.zeros(125)
    for seed in range(3000):
        [[a, b, c]], _ = verify.decode_verified(model, [[1, 2]], 3, 2, 3, sampling, seeds=[seed])
        counts[25 * a + 5 * b + c] += 1

    likely = expected > 5  # the others count as one
    counts, expected = (
        torch.cat([x[likely], x[~likely].sum()[None]]) for x in (counts, expected))
    n = len(counts) - 1
    assert chi_square(counts, expected.clamp(min=1)) < n + 4 * math.sqrt(2 * n)


@cases("more", [{}, {"tie_word_embeddings": True}, {"lora": None}])
@cases("family", ["llama", "gpt2", "phi", "gemma2", "mistral"])
@torch.no_grad()
def test_a_model_made_faster_for_sampling_has_the_same_logits(family, more):
    lora = more.get("lora", LORA)
    lm = random_lm(family, **{k: v for k, v in more.items() if k != "lora"})
    model, ids = diffusion(lm, block_size=4, lora=lora), random_ids(2, 12)
    for p in model.adapter_state().values():
        torch.nn.init.normal_(p, std=0.3)
    noisy = torch.cat([ids, ids.masked_fill(ids % 2 == 0, model.mask_id)], 1)

    def logits():
        model.set_causal(True)
        output, states = model.hidden_of_blocks(noisy, torch.full((2, 6), 500))
        both = model.head(output, states)
        model.set_causal(True)
        return torch.cat([both, model(ids), model(ids[:1, :1]).expand(2, -1, -1)], 1)

    expected = logits()
    n_weights = sum(p.numel() for p in lm.parameters())
    machine.speed_up_sampling(model)
    found = logits()
    assert_close(found, expected, rtol=0, atol=1e-5 * (1 + expected.abs().max().item()))
    if family == "llama":  # gpt2 has no nn.Linear but its head
        assert sum(p.numel() for p in lm.parameters()) < 0.6 * n_weights, "packed ones are freed"


@torch.no_grad()
def test_chosen_drafts_change_in_the_middle_and_stay_within_the_model(monkeypatch):
    model = diffusion(random_lm("gpt2", initializer_range=0.1), block_size=4)  # 64 positions
    prompt = random_ids(36).tolist()
    s = SimpleNamespace(drafts=0, branches=-1, tree=0, compare=True, verify_batch=1, seed=3,
                        max_new_tokens=64 - 36 - verify.reach(model))
    [plain], _ = verify.decode_verified(model, [prompt], s.max_new_tokens, 0, 0, {})
    seen, make_plan = [], drafting.make_plan

    def plan_in_turns(costs, ways):
        plan = make_plan(costs, ways)
        return lambda counts: seen.append(plan(counts)) or [(3, 4), (0, 0), (2, 0)][len(seen) % 3]

    monkeypatch.setattr(drafting, "make_plan", plan_in_turns)
    [found], figures = drafting.verify_texts(model, [prompt], {}, [], s)
    assert found == plain and figures["equal"] == 1 and seen[0] == (3, 4)
    for drafts, branches, tree, expected in ((2, 1, 0, (2, 1)), (0, -1, 5, (3, 4)),
                                             (1, -1, 5, (1, 2))):
        s.drafts, s.branches, s.tree = drafts, branches, tree
        assert drafting.choose(model, s, 36) == (*expected, None)
    s.drafts, s.branches, s.tree = 0, 8, 0  # more than there are places for
    assert drafting.choose(model, s, 64)[2](Counter()) == (3, 4)
