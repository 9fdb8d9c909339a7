"""A small world whose stories a tiny model can learn, with a parser that says what is right.

  python assets/world.py 1000000 > stories.txt  # about a megabyte of stories, one a line

Somebody has something and puts it somewhere. There it is found, or asked for, and given away. One
function, next_sentences(), says what may come next: stories are drawn from it, and a sentence is
right if it is among what may stand there. So a model's text can be judged sentence by sentence, and
it is known which words fit a hole in a story, given what comes before and after.
"""
import functools
import random
import re
import sys

PEOPLE = {**dict.fromkeys(("Anna", "Emma", "Mia"), ("She", "her")),
          **dict.fromkeys(("Ben", "Leo", "Tom"), ("He", "his"))}
COLOURS = "black", "blue", "green", "red", "white"
THINGS = "ball", "book", "cup", "hat", "lamp", "pen"
PLACES = "bag", "box", "drawer", "garden", "kitchen", "tent"
NUMBERS = {"a": ("it", "It is"), "two": ("them", "They are")}
START = ("", "", "", "", "", "", "start")


def noun(number, thing):
    """The thing, in the plural if there are two."""
    return thing if number == "a" else thing + "s"


@functools.lru_cache(100_000)
def next_sentences(state):
    """{each sentence that may come next: the state after it}.

    state: (whose the thing is, who else is there or "", number, colour, thing, place, what was told
    last). The thing has two owners, and with each a place.
    """
    owner, other, number, colour, thing, place, last = state
    if last == "start":
        return {f"Today {person} has {number} {colour} {noun(number, thing)}.":
                (person, "", number, colour, thing, "", "first has")
                for person in PEOPLE for number in NUMBERS for colour in COLOURS
                for thing in THINGS}
    if last == "end":
        return {}
    what = noun(number, thing)
    them, they_are = NUMBERS[number]
    they, are = they_are.split()
    she, her = PEOPLE[owner]
    others = [other] if other else [person for person in PEOPLE if PEOPLE[person] != (she, her)]
    turn, _, last = last.partition(" ")
    if last == "has":
        return {f"{she} puts {them} in the {new}.":
                (owner, other, number, colour, thing, new, f"{turn} put")
                for new in PLACES}
    if last == "put":
        asks = {f"{person} asks {owner} where {they.lower()} {are}.":
                (owner, person, number, colour, thing, place, f"{turn} asked")
                for person in others}
        return asks | {f"{owner} looks for {her} {what}.": (*state[:-1], f"{turn} looked")}
    if last == "asked":
        return {f"{they_are} in the {place}.": (*state[:-1], f"{turn} found")}
    if last == "looked":
        return {f"{she} finds {them} in the {place}.": (*state[:-1], f"{turn} found")}
    if last == "found" and turn == "first":
        return {f"{owner} gives {them} to {person}.":
                (person, owner, number, colour, thing, place, "first given") for person in others}
    if last == "given":
        return {f"Now {owner} has {number} {colour} {what}.": (*state[:-1], "second has")}
    return {"The end.": (*state[:-1], "end")}


def write_story(rng):
    """A story, drawn with the random numbers of rng."""
    state, sentences = START, []
    while options := next_sentences(state):
        sentence = rng.choice(list(options))
        sentences.append(sentence)
        state = options[sentence]
    return " ".join(sentences)


def write_stories(n_bytes, seed=0):
    """Stories of n_bytes together or a little more."""
    rng, stories, size = random.Random(seed), [], 0
    while size < n_bytes:
        stories.append(write_story(rng))
        size += len(stories[-1]) + 1
    return stories


@functools.cache  # a run asks three times: for its tokenizer, its windows and its last screen
def train_and_held_out():
    """(Stories to train on, stories held out, none of which is among the first)."""
    stories = write_stories(1_200_000)
    known = set(stories)
    return stories, [story for story in write_stories(40_000, seed=1) if story not in known]


def judge(story):
    """Of each whole sentence of a story, whether it may stand there. Behind a wrong one the story
    may go on as behind any right one in its place."""
    states, right = {START}, []
    for sentence in re.findall(r"[^.]*\.", story):
        options = [next_sentences(state) for state in states]
        fits = {found[sentence.strip()] for found in options if sentence.strip() in found}
        right.append(bool(fits))
        states = fits or {after for found in options for after in found.values()} or states
    return right


def answers(left, right=""):
    """The words that fit between two parts of a story; without the right one, what may follow."""
    state = START
    *before, start = left.split(".")
    for sentence in before:
        state = next_sentences(state)[sentence.strip() + "."]
    start = f"{start.strip()} ".lstrip()
    follow = {s[len(start):].split()[0].rstrip(".") for s in next_sentences(state)
              if s.startswith(start)}
    return {word for word in follow if not right or all(judge(left + word + right))}


def holes(story):
    """(left, word, right) of each word that only what stands to its right decides: nothing else
    fits there, but from the left three words or more are possible."""
    cuts = [(story[:m.start()], m[0], story[m.end():]) for m in re.finditer(r"\w+", story)]
    return [(left, word, right) for left, word, right in cuts
            if len(answers(left)) >= 3 and answers(left, right) == {word}]


if __name__ == "__main__":
    print("\n".join(write_stories(int(sys.argv[1]))))
