"""From data sets to windows of token ids: texts and conversations are found, encoded, split into
training and held-out documents, and tokenised once. Prompts are encoded here too."""
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import torch
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode

import processes
from configurator import RunError, UserError, did_you_mean, errors_as, first_line
from hub import check_hub

SPLIT_WORD = r"(?<![a-z])(train|valid|validation|val|dev|test|evaluation|eval)(?:ing)?(?![a-z])"


def find_files(name, kinds):
    """({split: files} of a file or folder, the kind they all are of): a file's split is in its name
    or else in that of its folder, as train-00000-of-00001 or validation/, else it is train."""
    path = Path(name)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in kinds and p.name[0] != "."
                       and p.name != "dataset_infos.json")  # a hub clone has it beside its data
    found = sorted({p.suffix for p in files})
    if len({kinds.get(suffix) for suffix in found}) != 1 or found[0] not in kinds:
        examples = [next(p.name for p in files if p.suffix == suffix) for suffix in found]
        there = f", it has {' and '.join(examples)}" if examples else ""
        raise UserError(f"dataset_name: '{name}' must be a file or a folder of files, all "
                        + " or ".join(kinds) + there)
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"dataset_name: '{name}' holds no text")
    splits = {}
    for file in files:
        inside = file.relative_to(path).parts if path.is_dir() else ()
        shard = re.search(r"([^/]+)-\d{5}-of-\d{5}", "/".join(inside))
        words = [re.search(SPLIT_WORD, part.lower()) for part in reversed(inside)]
        word = next(filter(None, words), None)
        split = shard[1] if shard else word[1] if word else "train"
        splits.setdefault(split, []).append(file)
    if not any("train" in re.findall(SPLIT_WORD, split.lower()) for split in splits):
        print(f"data: no file has train in its name, so it is all trained on: {', '.join(splits)}")
        splits = {"train": files}
    return splits, kinds[found[0]]


def choose_splits(name, split, splits):
    """Of {split: data}: (what is trained on, its validation split or None). The others are left
    alone, with a line that says so. UserError if there is no such split."""
    if split not in splits:
        raise UserError(f"dataset_split: '{name}' has no '{split}', it has {', '.join(splits)}"
                        + did_you_mean(split, splits))
    words = "validation", "valid", "val", "dev"  # train_sft goes with validation_sft
    held = [split.replace("train", word) if "train" in split else word for word in words]
    held = [word for word in held if word in splits and word != split][:1]
    others = [word for word in splits if word not in (split, *held)]
    if others:
        print(f"data: splits left alone: {', '.join(others)}")
    return splits[split], splits[held[0]] if held else None


def load_splits(name, config, split, cache):
    """(Training data set, validation data set or None, the kind of its files) of a hub name, a
    file, a folder of files, or one of save_to_disk()."""
    kinds = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv",
             ".parquet": "parquet"}
    path = Path(name)
    local = path.exists() or path.suffix in kinds or name[:1] in (".", "/")
    if local and not path.exists():
        raise UserError(f"dataset_name: there is no '{name}'")
    if not local:
        check_hub("dataset_name", name, "dataset")
    import datasets  # slow to import
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    datasets.disable_progress_bars()
    saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if saved or not local:
        with errors_as(f"dataset_name: '{name}' cannot be loaded"):
            splits = (datasets.load_from_disk(name) if saved else
                      datasets.load_dataset(name, config or None))
        splits = splits if isinstance(splits, dict) else {"train": splits}
        return *choose_splits(name, split, splits), None

    files, kind = find_files(name, kinds)
    what = {"path": kind, "split": "train", "cache_dir": f"{cache}/datasets"}
    if kind != "parquet":
        what["encoding"] = "utf-8-sig"  # a byte order mark is no text
    if kind == "text":
        what["sample_by"] = "document"
        if max(map(len, files.values())) == 1:  # or a large file would be in memory as a whole
            kind = "lines"
            what |= {"sample_by": "line", "keep_linebreaks": True}
    parts = choose_splits(name, split, files)
    with errors_as(f"dataset_name: '{name}' cannot be loaded"):  # each alone: columns may differ
        train, held = (part and datasets.load_dataset(
            **what, data_files=[glob.escape(str(p.absolute())) for p in part]) for part in parts)
    return train, held, kind


def read_corpus(name, config, split, column, cache, answered=False):
    """{train, held: texts, held None without a validation split; lines: how many texts make up a
    document; chat: whether texts are conversations, as JSON; key: changes with the data}.

    answered: prompts alone will do, as the model answers them. UserError if there is no text.
    """
    if name == "pydoc":  # 450 KB of English prose in the standard library, less its indentation
        from pydoc_data.topics import topics
        texts = [re.sub(" {2,}", " ", text) for text in topics.values()]
        return {"train": texts, "held": None, "lines": 1, "chat": False, "key": sys.version}
    if name == "world":
        stories, held = world().train_and_held_out()
        return {"train": stories, "held": held, "lines": 1, "chat": False, "key": "world 6"}
    train, held, kind = load_splits(name, config, split, cache)
    has = train.column_names
    if kind in ("text", "lines"):
        column = "text"
    asks = {"messages", "conversations", "prompt"}
    chat = column not in has and bool(asks & set(has))
    if not chat and column not in has:
        raise UserError(f"text_column: '{name}' has no '{column}', it has {', '.join(has)}"
                        + did_you_mean(column, has))
    if kind == "json" and len(train) == 1:
        raise UserError(f"dataset_name: '{name}' is one row; write one JSON object a line, or a "
                        "list of objects")
    wanted = sorted((asks | {"response", "completion"}) & set(has)) if chat else [column]
    if held is not None and not set(wanted) <= set(held.column_names):
        print(f"data: the validation split is left alone, as it has no {' and '.join(wanted)}")
        held = None
    corpus = {"held": None, "lines": 1, "chat": chat, "key": [column, chat and answered]}
    for part, table in {"train": train, "held": held}.items():
        if table is not None:
            corpus[part] = conversations(table, name, answered) if chat else text_of(table, column)
            corpus["key"].append(table._fingerprint)
    head = [text or "" for text in corpus["train"][:1000]]
    if not any(head) and len(head) == len(corpus["train"]):
        raise UserError(f"text_column: '{column}' of '{name}' holds no text")
    if kind == "lines" and len(corpus["train"]) < 1000:
        corpus["train"] = re.findall(r"[^\n]{1,2000}\n*|\n+", "".join(head))
    if kind != "text" and not chat:
        corpus["lines"] = lines_per_document(corpus["train"], head, kind)
    return corpus


def world():
    """The module assets/world.py: stories for a tiny model, and a parser that judges its own."""
    if "world" not in sys.modules:
        path = Path(__file__).with_name("assets") / "world.py"
        spec = importlib.util.spec_from_file_location("world", path)
        sys.modules["world"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["world"])
    return sys.modules["world"]


def text_of(table, column):
    """A column of a data set. UserError if it is of another type than text."""
    feature = table.features[column]
    if getattr(feature, "dtype", "") not in ("string", "large_string", "string_view", "null"):
        raise UserError(f"text_column: '{column}' holds {feature}, not text")
    return table[column]


def lines_per_document(texts, head, kind):
    """How many texts make up a document: 1, unless they are lines of one text."""
    if kind == "lines":  # a few lines each, so that some can be held out
        return max(2, min(256, len(texts) // 50))
    n_lines = sum(not text or text.find("\n") == len(text) - 1 for text in head)
    return 256 if n_lines > 0.98 * len(head) else 1  # as in wikitext


def conversations(table, name, answered):
    """The rows of a data set as JSON: {messages, complete: whether the last one is the answer}.

    Prompts without answers are a UserError unless the model will answer them.
    """
    has = set(table.column_names)
    for column in ("messages", "conversations"):
        if column in has:
            return [json.dumps({"messages": rows, "complete": True}, default=not_text)
                    for rows in table[column]]
    column = next((c for c in ("response", "completion") if c in has), None)
    if not column and not answered:
        raise UserError(f"dataset_name: '{name}' has prompts but no response or completion, it has "
                        f"{', '.join(table.column_names)}; with --use_lora --on_policy_tokens=... "
                        "the model answers them itself")
    if column and answered:
        print(f"on_policy_tokens: the model answers the prompts itself, '{column}' is not used")
    answers = table[column] if column and not answered else [""] * len(table)
    rows = []
    for prompt, answer in zip(table["prompt"], answers, strict=True):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": answer}]
        row = {"messages": [*messages, *answer], "complete": not answered}
        rows.append(json.dumps(row, default=not_text))
    return rows


def not_text(value):
    """What stands for a date, say, in the JSON of a row: plain_messages() refuses it as content."""
    return {"type": type(value).__name__}


def plain_messages(messages):
    """Messages as [{role, content: a text}], whatever their data set calls these, and further keys
    as they are. ValueError for what is no text."""
    roles = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
             "chatbot": "assistant", "ai": "assistant"}
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError("a conversation must be a list of messages")
    plain = []
    for message in messages:
        role = str(message.get("role") or message.get("from") or "").lower()
        content = message.get("content")
        if content is None:
            content = message.get("value")
        parts = content if isinstance(content, list) else ["" if content is None else content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"the content of a message is no text: {json.dumps(content)[:80]}")
        if not role:
            raise ValueError("a message has no role")
        plain.append(message | {"role": roles.get(role, role), "content": "".join(texts)})
    return plain


def chat_pieces(tokenizer, row):
    """The texts that a conversation teaches, as lists of (text, whether the assistant says it).

    One text, unless the template rewrites earlier turns as the conversation grows, as some do with
    their thinking: then a text for each answer.
    """
    messages, texts = plain_messages(row["messages"]), []
    before = None  # the text so far
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    for i, message in enumerate(messages):
        answers = message["role"] == "assistant" and i > 0  # nothing asks for a first message
        if not answers or row["complete"] and not message["content"].strip():
            continue
        asked, after = write(messages[:i], add_generation_prompt=True), write(messages[:i + 1])
        if not after.startswith(asked):  # some ask with more than they show in the end
            asked = os.path.commonprefix([asked, after])
            if len(asked) < len(write(messages[:i])):
                raise ValueError("the template rewrites what was asked")
        if before is None or not asked.startswith(before):
            texts.append([])
            before = ""
        texts[-1] += [(asked[len(before):], False), (after[len(asked):], True)]
        before = after
    if not texts:
        raise ValueError("no answer in it")
    return texts


def encode_pieces(tokenizer, pieces):
    """The ids of a text in pieces, ~id for all but what the assistant says."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    ids, text = [], ""
    for piece, said in pieces:
        text += piece
        plain = [max(x, ~x) for x in ids]
        whole = encode(text)
        # a tokenizer may merge over the border: but a prompt ends there when the model is asked
        new = whole[len(plain):] if whole[:len(plain)] == plain else encode(piece)
        ids += new if said else [~x for x in new]
    return ids


def fill_up(ids, end, block, length, finished=True):
    """A window with ids, filled up with ends of text.

    Those in the last block of a finished text are to be learned: as context, which the model sees,
    they would tell it how long the text is. All others are context.
    """
    if finished and end is not None:
        ids = [*ids, *[end] * (-len(ids) % block)]
    return ids + [~(end or 0)] * (length - len(ids))


def encode_chat(tokenizer, text, length, block):
    """The ids of a conversation in whole windows, ~id for all but what the assistant says."""
    end, windows = tokenizer.eos_token_id, []
    for pieces in chat_pieces(tokenizer, json.loads(text)):
        ids = encode_pieces(tokenizer, pieces)
        if end is not None and end not in ids[-3:]:  # the template may write it, and a newline
            ids.append(end)
        start = [x for x in ids[:1] if ~x == tokenizer.bos_token_id]  # opens further windows, too
        while ids:
            window, ids = ids[:length], ids[length:]
            if max(window[1:], default=-1) >= 0:  # nothing predicts the first
                windows += fill_up(window, end, block or length, length)
            ids = ids and start + ids
    return windows


def opening(tokenizer):
    """[BOS] where the tokenizer opens a text with it, else []. A model that was trained behind a
    BOS reads badly without, so every window and prompt starts with it, as context."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def end_ids(lm, tokenizer):
    """All that ends a text: the tokenizer's end of text, and the ends of generation_config, which
    are ends of turns as well. UserError if these are no ids."""
    ends = np.atleast_1d(lm.generation_config.eos_token_id).tolist()
    if not all(isinstance(end, int | None) for end in ends):
        raise UserError(f"model_name: '{lm.name_or_path}', generation_config.json: eos_token_id "
                        f"must be ids, not {lm.generation_config.eos_token_id!r}")
    return sorted({tokenizer.eos_token_id, *ends} - {None})


def end_of(ids, ends):
    """Where the first of `ends` stands in ids, or how many ids there are."""
    return next((i for i, token in enumerate(ids) if token in ends), len(ids))


def encode_prompt(model, tokenizer, prompt, new_tokens, start=None):
    """The ids of a prompt behind start, by default BOS; an empty one starts a document, after BOS
    or an end of text. UserError if it and new_tokens more, in whole blocks, exceed the model's
    positions."""
    ids = opening(tokenizer) if start is None else start
    ids = ids + tokenizer.encode(prompt, add_special_tokens=False)
    ids = ids or [tokenizer.eos_token_id or 0]
    block = model.block_size or 1
    length = len(ids) + math.ceil(new_tokens / block) * block
    if length > model.max_positions:
        raise UserError(f"the prompt and what follows have {length} tokens, the model has "
                        f"{model.max_positions} positions")
    return ids


def make_encoder(tokenizer, sample):
    """encode(text) -> ids: by tiktoken, which is faster, where it gives the same ids on samples."""
    def slow(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    bpe, split = backend.get("model", {}), backend.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    byte_level = bpe.get("type") == "BPE" and steps[-1].get("type") == "ByteLevel"
    if not byte_level or backend["normalizer"] or not set(byte_of) <= set(bpe["vocab"]):
        return slow  # tiktoken panics at a byte that the vocabulary lacks
    patterns = [step["pattern"]["Regex"] for step in steps if "Regex" in step.get("pattern", {})]
    if steps[-1].get("use_regex", True):  # GPT-2's
        patterns = [r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]
    import tiktoken
    merged = [a + b for a, b in bpe["merges"]]
    tokens = [x for x in dict.fromkeys((*byte_of, *merged)) if x in bpe["vocab"]]  # by rank
    ranks = {bytes(byte_of[c] for c in token): rank for rank, token in enumerate(tokens)}
    id_of = np.array([bpe["vocab"][token] for token in tokens])
    added = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())) or "(?!)")
    fast_bpe = tiktoken.Encoding("same", pat_str=(patterns or [r"[\s\S]+"])[0],
                                 mergeable_ranks=ranks, special_tokens={})

    def fast(text):
        if added.search(text):
            return slow(text)
        return id_of[fast_bpe.encode_to_numpy(text, disallowed_special=())]

    odd = "x  12 3\t\n\n 34.5 \u00e9t\u00e9 \u65e5\U0001f642's I'LL don't\r\n (a) _b "
    if all(np.array_equal(fast(text), slow(text)) for text in (*sample, odd)):
        return fast
    print("tokenizer: tiktoken would give other ids, so the tokenizer itself is used; it is slower")
    return slow


def substrings(text):
    """All strings of 64 bytes in a text: how many two texts share says how much is copied."""
    text = text.encode(errors="replace")
    return [text[i:i + 64] for i in range(max(1, len(text) - 63))]


def common_strings(n_documents, documents, n_held):
    """Strings of held-out text that many documents share, as an instruction, a licence or JSON
    keys. n_documents: how many of the n_held held-out documents have each; documents: some more."""
    counts = Counter(n_documents)
    for text in documents:  # without the strings that only they have
        counts.update(n_documents.keys() & set(substrings(text)))
        n_held += 1
    many = max(3, n_held // 100)
    return {string for string, count in counts.items() if count >= many}


def documents(texts, lines, order):
    """The documents (number, text) of so many lines each, in this order."""
    for i in map(int, order):
        yield i, "".join(text or "" for text in texts[i * lines:(i + 1) * lines])


def split_corpus(corpus, length, split_seed, report):
    """Generators of (held-out documents, training documents), both (number, text) in a seeded
    order; the first must be read first.

    Held out is the validation split, else a seeded 5 % of the documents. Training leaves out a
    document if a tenth of it stands in held-out text, or 1 % of held-out text in it. Text that many
    documents share does not count, but a document with nothing else is left out too.
    """
    rows, lines = corpus["train"], corpus["lines"]
    held_rows = corpus["held"] or rows
    held_out, seen = set(), set()  # documents; strings of held-out text that are in training too
    n_documents = Counter()  # how many held-out documents have a string
    n = math.ceil(len(rows) / lines)
    order = np.random.default_rng(split_seed).permutation(n)

    def held_documents():
        n_characters, of_training = 0, held_rows is rows
        held_order = order if of_training else range(math.ceil(len(held_rows) / lines))
        for i, text in documents(held_rows, lines, held_order):
            if of_training and len(held_out) >= max(1, n // 20) and n_characters > 8 * length:
                return
            n_characters += len(text)
            held_out.add(i)
            if text:
                n_documents.update(set(substrings(text)))
                yield i, text

    def train_documents():
        rest = order[len(held_out):] if held_rows is rows else order
        some = (text for _, text in documents(rows, lines, rest[:200]))
        common = common_strings(n_documents, some, len(held_out))
        for i, text in documents(rows, lines, rest):
            if not text:
                continue
            own = [string for string in substrings(text) if string not in common]
            shared = [string for string in own if string in n_documents]
            copied = len(shared) > 0.1 * len(own) or len(set(shared)) > 0.01 * len(n_documents)
            report["documents"] += 1
            if copied or not own:
                report["near_duplicates_left_out"] += 1
                continue
            seen.update(shared)
            report["held_out_share_in_training"] = len(seen) / max(1, len(n_documents))
            yield i, text

    return held_documents(), train_documents()


def encoding(corpus, tokenizer, length, block):
    """(encode(text) -> ids, what opens windows, what ends a text)."""
    if corpus["chat"]:
        return functools.partial(encode_chat, tokenizer, length=length, block=block), [], []
    encode = make_encoder(tokenizer, [text[:20000] for text in corpus["train"][:20] if text])
    one_text = corpus["lines"] > 1 or tokenizer.eos_token_id is None
    return encode, opening(tokenizer), [] if one_text else [tokenizer.eos_token_id]


def make_windows(texts, encode, start, end, limit, length, report):
    """Windows (n, length), limit at most, of the texts (number, text) one after the other, each
    behind start. Texts that cannot be encoded are counted in the report."""
    body, rest = length - len(start), np.zeros(0, np.int64)
    while limit and (batch := list(itertools.islice(texts, 64))):
        found = [rest]
        for number, text in batch:
            try:
                found += [encode(text), end]
            except (ValueError, TypeError, jinja2.TemplateError) as error:  # of its template
                report["refused"] += 1
                report["first_refused"] = report["first_refused"] or [number + 1, first_line(error)]
        ids = np.concatenate(found).astype(np.int64)
        rest = ids[len(ids) // body * body:]
        windows = ids[:len(ids) - len(rest)].reshape(-1, body)[:limit]
        limit -= len(windows)
        yield np.insert(windows, [0] * len(start), start, axis=1)


def tokenise(folder, corpus, tokenizer, length, max_windows, held_windows, split_seed, block):
    """Write train.bin, held.bin and meta.json into folder, entirely or not at all."""
    ids = tokenizer.get_vocab().values()
    report = {"dtype": "uint16" if max(ids) < 2**16 else "uint32", "documents": 0,
              "near_duplicates_left_out": 0, "held_out_share_in_training": 0.0, "refused": 0,
              "first_refused": None, "crc32": 0}
    if corpus["chat"]:
        report["dtype"] = "int32"
    how = encoding(corpus, tokenizer, length, block)
    documents = split_corpus(corpus, length, split_seed, report)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        limits = {"held": held_windows, "train": max_windows}
        for (name, limit), texts in zip(limits.items(), documents, strict=True):
            report[name] = 0
            with (open(temporary / f"{name}.bin", "wb") as file, tqdm(
                    total=limit, desc=name, unit="windows", disable=None, leave=False) as bar):
                for windows in make_windows(texts, *how, limit, length, report):
                    windows = windows.astype(report["dtype"])
                    with errors_as(f"cache_dir: cannot write {file.name}", RunError):
                        windows.tofile(file)
                    report[name] += len(windows)
                    report["crc32"] = zlib.crc32(windows, report["crc32"])
                    bar.update(len(windows))
            if not report[name]:
                raise UserError(f"dataset_name: too little {name} text for a window of {length} "
                                "tokens; add text, or lower max_seq_length; " + left_out(report))
        (temporary / "meta.json").write_text(json.dumps(report))
        if not folder.exists():  # else another run, started together with this one, was faster
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def left_out(report):
    """What the data lost on the way to windows, and why."""
    n, n_all = report["near_duplicates_left_out"], max(1, report["documents"])
    text = f"{n} near-duplicates of held-out text left out ({n / n_all:.0%} of the documents)"
    if report["refused"]:
        row, why = report["first_refused"]
        text += f", {report['refused']} texts refused, the first in row {row}: {why}"
    return text


def cached_data(tokenizer, s):
    """The folder of the tokenised data, made if it is not there yet. s: the settings."""
    answered = s.use_lora and s.on_policy_tokens > 0 and s.on_policy_share == 1
    corpus = read_corpus(s.dataset_name, s.dataset_config, s.dataset_split, s.text_column,
                         s.cache_dir, answered)
    if corpus["chat"] and not tokenizer.chat_template:
        raise UserError("dataset_name: chat data, but this tokenizer has no chat template; take a "
                        "chat model, or plain text (text_column)")
    split = {"length": s.max_seq_length, "max_windows": s.max_train_samples,
             "held_windows": s.eval_samples, "split_seed": s.seed, "block": 0}
    vocabulary = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        vocabulary = tokenizer.backend_tokenizer.to_str()
    template = ""
    if corpus["chat"]:  # how a window is filled up depends on the block
        template, split["block"] = str(tokenizer.chat_template), s.block_size
    key = json.dumps([3, vocabulary, tokenizer.eos_token_id, opening(tokenizer), template,
                      corpus["key"], split])
    folder = Path(s.cache_dir) / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        tokenise(folder, corpus, tokenizer, **split)
    return folder


def load_data(tokenizer, s, state):
    """(training windows, held-out windows, both (n, T) and memory-mapped, a report), cached. s: the
    settings."""
    if s.own_prompts and not tokenizer.chat_template:
        raise UserError("own_prompts: this tokenizer has no chat template; take a chat model, or "
                        "leave it out")
    folder = processes.from_rank_0(cached_data, tokenizer, s)
    with errors_as(f"cache_dir: {folder} is damaged, delete it"):
        report = json.loads((folder / "meta.json").read_text())
        shapes = {name: (report[name], s.max_seq_length) for name in ("train", "held")}
        train, held = (np.memmap(folder / f"{name}.bin", report["dtype"], "r", shape=shape)
                       for name, shape in shapes.items())
        if zlib.crc32(train, zlib.crc32(held)) != report["crc32"]:
            raise ValueError("its bytes have changed")
    if state["data"] not in (0, report["crc32"]):
        print("resume: no longer the run it was: the data has changed")
    state["data"], state["data_report"] = report["crc32"], report
    return train, held, report


def seed_for(*parts):
    """A seed for one use: its name, the run's seed, stage, step. No random state need be saved."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


@functools.lru_cache(4)
def permutation(n, order_seed):
    """A seeded order of n windows."""
    return np.random.default_rng(order_seed).permutation(n)


def get_batch(windows, size, seed, stage, step):
    """x0 (size, T): batch number `step` of a stage; each epoch has an order of its own."""
    where = [divmod(i, len(windows)) for i in range(step * size, (step + 1) * size)]
    rows = [permutation(len(windows), seed_for(seed, "order", stage, epoch))[i]
            for epoch, i in where]
    return torch.from_numpy(windows[rows].astype(np.int64))
