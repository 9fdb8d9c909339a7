"""The world of stories, and the screen that ends a run."""
import html
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bpe
import corpus
import finish
from convert import load_model, timestep
from test_convert import HERE, script

world = corpus.world()


# ----------------------------------------------------------------------------------------------
# The world
def test_the_parser_accepts_what_the_world_writes_and_no_story_with_a_word_exchanged():
    rng = random.Random(0)
    words = {word for story in world.write_stories(50_000) for word in re.findall(r"\w+", story)}
    for story in world.write_stories(2_500, seed=5):
        assert all(world.judge(story)) and len(world.judge(story)) == 10
        sentences = story.split(". ")
        assert not all(world.judge(". ".join(sentences[1:]))), "the start is missing"
        cut = rng.choice(list(re.finditer(r"\w+", story[len(sentences[0]) + 2:])))
        start = len(sentences[0]) + 2 + cut.start()
        for word in rng.sample(sorted(words), 20):
            changed = story[:start] + word + story[start + len(cut[0]):]
            right = all(world.judge(changed))
            assert right == (word in world.answers(story[:start], story[start + len(cut[0]):]))


def test_agreement_reference_and_places_are_judged():
    story = "Today Mia has two red balls. She puts them in the box. Tom asks Mia where they are."
    assert world.judge(f"{story} They are in the box.") == [True] * 4
    for wrong in ("It is in the box.", "They are in the bag.", "They is in the box."):
        assert world.judge(f"{story} {wrong}") == [True, True, True, False]
    assert world.judge("Today Mia has two red ball.") == [False]
    assert world.judge("Today Tom has a cup.") == [False], "the colour is missing"
    assert world.judge(story + " They are in") == [True] * 3, "no whole sentence"
    wrong = "Today Mia has two red balls. She puts it in the box. Tom asks Mia where they are."
    assert world.judge(wrong) == [True, False, True], "behind a mistake the story goes on"


def test_a_hole_is_decided_by_what_stands_to_its_right_alone():
    stories = world.write_stories(2_500, seed=7)
    holes = [hole for story in stories for hole in world.holes(story)]
    assert len(holes) > 3 * len(stories)
    names = {name for name in world.PEOPLE}
    for left, word, right in holes:
        assert left + word + right in stories
        if word in names:  # every other name is wrong, though none is before the text goes on
            others = names - {word}
            assert not any(all(world.judge(left + other + right)) for other in others)
        assert word in world.answers(left) and len(world.answers(left)) >= 3


def test_held_out_stories_are_not_in_the_training_text():
    found = corpus.read_corpus("world", "", "train", "text", "")
    assert not set(found["train"]) & set(found["held"])
    assert len(found["held"]) > 128 and sum(map(len, found["train"])) > 900_000


def test_a_bpe_tokenizer_is_trained_once_and_gives_each_word_a_piece(tmp_path):
    s = SimpleNamespace(tokenizer_name="bpe", dataset_name="world", dataset_config="",
                        dataset_split="train", text_column="text", cache_dir=str(tmp_path))
    name = bpe.tokenizer_of(s)
    before = (tmp_path / name / "tokenizer.json").stat().st_mtime_ns
    assert bpe.tokenizer_of(s) == name
    assert (tmp_path / name / "tokenizer.json").stat().st_mtime_ns == before
    tokenizer = AutoTokenizer.from_pretrained(name)
    story = world.write_stories(1, seed=9)[0]
    assert tokenizer.decode(tokenizer.encode(story)) == story
    assert len(tokenizer.encode(story)) == len(re.findall(r"\w+|\.", story))
    assert tokenizer.decode(tokenizer.encode("Überraschung №5\n")) == "Überraschung №5\n"
    assert bpe.tokenizer_of(SimpleNamespace(tokenizer_name="bytes")) == "bytes"


# ----------------------------------------------------------------------------------------------
# The screen
@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A short run of config/tiny.py, with what it printed in out.txt."""
    cwd = tmp_path_factory.mktemp("run")
    out, _ = script("convert.py", HERE / "config/tiny.py", "--max_steps=40", "--eval_steps=20",
                    cwd=cwd)
    (cwd / "outputs/tiny_diffusion/out.txt").write_text(out)
    return cwd / "outputs/tiny_diffusion"


def test_a_run_ends_with_what_it_changed(run_dir):
    result = json.loads((run_dir / "result.json").read_text())
    rows = [json.loads(line) for line in (run_dir / "training_logs.jsonl").open()]
    evaluations = [row for row in rows if "eval_nelbo" in row]
    first = next(row for row in evaluations if row["stage"][0] == "1")
    assert result["eval_nelbo_first"] == first["eval_nelbo"]
    for name in ("eval_nelbo", "eval_nelbo_se", "ar_ppl", "ar_ppl_before"):
        assert result[name] == evaluations[-1][name]
    assert result["tokens"] == 40 * 2048

    shown = (run_dir / "out.txt").read_text().partition("-" * 80)[2]
    for text in (f"{result['eval_nelbo']:.3f}", f"{result['holes_right']['diffusion']:.1%}",
                 f"{result['accepted']['ar']:.1%}", result["hole"]["ar_guess"],
                 "python sample.py --out_dir=outputs/tiny_diffusion"):
        assert text in shown
    assert max(len(x) for x in shown.splitlines() if "python" not in x) <= 100
    page = html.unescape((run_dir / "report.html").read_text())
    frames = json.loads(re.search("const DATA=(.*)", page)[1])["frames"]
    assert {len(frame) for frame in frames} == {64}, "a sample is as long as the stories"


def test_texts_and_holes_are_those_of_hugging_face_and_of_a_loop_by_hand(run_dir):
    model, tokenizer = load_model(run_dir / "final", torch.device("cpu"))
    model.eval()
    lm = AutoModelForCausalLM.from_pretrained(run_dir / "final").eval()
    prompts = [tokenizer.encode(text) for text in ("Today Mia has two red balls.", "Today Tom has")]
    texts, figures = finish.race(model, tokenizer, prompts, 12)
    assert figures == {}
    for ids, new in zip(prompts, texts, strict=True):
        expected = lm.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0]
        assert new == expected[len(ids):].tolist()

    left, word, right = world.holes(world.write_stories(1, seed=3)[0])[-1]
    hole = finish.encode_hole(tokenizer, left, word, right)
    [([filled], [guess])] = finish.fill_holes(model, [hole], 1)
    before, gap, after = hole
    assert len(gap) == 1 and before + gap + after == tokenizer.encode(left + word + right)
    ids = torch.tensor([before + [model.mask_id] + after])
    model.set_causal(False)
    with torch.no_grad():
        t = timestep(torch.tensor([[1 / ids.shape[1]]]), model)
        logits = model(ids, t)[0]
        assert filled == logits[len(before) - 1].argmax()
        plain = lm(torch.tensor([before])).logits[0, -1]
    assert guess == plain.argmax()


def test_a_figure_that_is_none_is_a_dash_and_a_text_cannot_move_the_cursor():
    names = "ar_ppl_before", "ar_ppl", "eval_nelbo_first", "eval_nelbo", "eval_nelbo_se"
    result = dict.fromkeys(names) | {"minutes": 1.5, "tokens": 7, "samples": ["a\x1b[2Jb"]}
    s = SimpleNamespace(block_size=0, sample_prompt="The", dataset_name="pydoc")
    shown = finish.screen(result, "out", s, 64)
    assert re.search("perplexity +- +-\n.*nats a token +- +-\n", shown)
    assert r"a\x1b[2Jb" in shown and "\x1b" not in shown
