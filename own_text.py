"""On-policy text: what the AR model itself writes after prompts from the data, to train on. A file
in the folder of the run keeps it until a checkpoint does."""
import functools
import time
import zlib

import numpy as np
import torch
from tqdm import tqdm

import processes
from configurator import RunError, errors_as
from corpus import end_ids, end_of, fill_up, opening, seed_for
from machine import eagerly, leave, pick_autocast


def write_own_text(model, tokenizer, train_data, val_data, out, s, stop, with_less_memory):
    """{"train": on-policy windows; "held": held-out ones, if nothing is learned from the data, so
    that nothing is measured on it}. s: the settings; stop, with_less_memory: of convert.py."""
    write = functools.partial(on_policy_windows, model, tokenizer, out=out, s=s, stop=stop,
                              with_less_memory=with_less_memory)
    if s.own_prompts:
        seeds = seed_for(s.seed, "prompts") % 2**20 + np.arange(s.own_prompts, dtype=np.int32)
        asked = write(np.repeat(seeds[:, None], train_data.shape[1], 1), 0, ar_ask)
        asked = asked[(asked >= 0).any(1)]
        print(f"own_prompts: {len(asked):,} of {s.own_prompts:,} can be used")
        train_data = np.concatenate([asked, train_data])  # first, as tokens may be enough by then
    own_text = {"train": write(train_data, s.on_policy_tokens)}
    if s.on_policy_share == 1:
        own_text["held"] = write(val_data, 0)
    return own_text


def on_policy_windows(model, tokenizer, windows, tokens, how=None, *, out, s, stop,
                      with_less_memory):
    """Windows (n, T), int32, of about `tokens` tokens (0: all) that the AR model writes after
    prompts from windows, by the function `how`, ar_continue() or another with its arguments.
    They are also kept in out, to be continued there after a kill."""
    T, state, how = windows.shape[1], {"micro_batch": 32}, how or ar_continue
    sharded = processes.is_sharded(model)

    def write(lm, batch):  # (32 or fewer, T), in parts if memory runs out
        new = np.zeros((0, T), np.int32)
        while len(new) < len(batch):
            work = functools.partial(how, lm, batch[len(new):], tokenizer,
                                     model.block_size, model.max_positions, together=sharded)
            new = np.concatenate([new, with_less_memory(work, state, model)])
        return new

    model.eval()
    with (eagerly(s.compile_model), pick_autocast(model.device, s.dtype),
          processes.unsharded(model), model.original_model() as lm,
          tqdm(total=tokens or None, desc="on-policy text", unit="tok", disable=None) as bar):
        key = s.model_name, zlib.crc32(windows), model.block_size, model.mask_embedding.tolist()
        path = out / f"on_policy_{seed_for(*key):x}.bin"
        done = processes.from_rank_0(read_windows, path, T)
        n, told = int((done >= 0).sum()), time.monotonic()  # tokens so far; when it was said
        bar.update(n)
        while (n < tokens or not tokens) and len(done) < len(windows):
            # each process writes one batch of 32, and they are taken in order
            start = len(done) + 32 * processes.RANK
            batch = windows[start:start + 32]
            if sharded and not len(batch):  # written for the others, which need this one's weights
                new = write(lm, windows[-1:])[:0]
            else:
                new = write(lm, batch)
            for part in processes.all_gathered(new):
                if n < tokens or not tokens:
                    processes.from_rank_0(append_windows, path, part)
                    done = np.concatenate([done, part])
                    n += int((part >= 0).sum())
                    bar.update(int((part >= 0).sum()))
            if bar.disable and time.monotonic() > told + 60:  # in a log, which has no bar
                print(f"on-policy text: {n:,} tokens in {len(done):,} of {len(windows):,} windows")
                told = time.monotonic()
            stopping = processes.agree_to_stop(stop)
            if stopping:
                leave(stopping)
    if n < tokens:
        print(f"on_policy_tokens: {n:,} tokens, as there are no more prompts")
    model.train()
    return done


def ar_continue(lm, windows, tokenizer, block, max_positions, n, together=False):
    """The first n windows (.., T) with what lm writes, greedily, after each prompt: what is asked
    in a chat, or the first quarter. Prompts become context, ~id; fill_up() pads what has ended."""
    windows = windows[:n].astype(np.int64)
    T, device = windows.shape[1], lm.get_input_embeddings().weight.device
    eos, ends = tokenizer.eos_token_id, end_ids(lm, tokenizer)
    lengths = [int((row >= 0).argmax()) for row in windows]
    opened = len(opening(tokenizer))  # a window that goes on with an answer has no prompt but this
    lengths = [n if n > opened else max(1, T // 4) for n in lengths]
    P = max(lengths)
    prompts = [np.maximum(row, ~row)[:n].tolist() for row, n in zip(windows, lengths, strict=True)]
    ids = torch.tensor([[0] * (P - len(p)) + p for p in prompts], device=device)
    attended = torch.tensor([[0] * (P - n) + [1] * n for n in lengths], device=device)

    with torch.no_grad():
        out = lm.generate(
            ids, attention_mask=attended, do_sample=False, repetition_penalty=1.0,
            no_repeat_ngram_size=0, max_new_tokens=min(T - min(lengths), max_positions - P),
            eos_token_id=ends or None, pad_token_id=eos or 0, synced_gpus=together)
    new = []
    for prompt, text in zip(prompts, out[:, P:].tolist(), strict=True):
        end = end_of(text, ends)
        row = [*(~token for token in prompt), *text[:end + 1]][:T]
        new.append(fill_up(row, eos, block or T, T, end < len(text)))
    return np.array(new, np.int32)


def ar_ask(lm, windows, tokenizer, block, max_positions, n, together=False):
    """For each of the first n windows one with a prompt that a chat model writes itself: what comes
    after an empty user turn of its template (https://arxiv.org/abs/2406.08464).

    A prompt is context, ~id, before an end; where no end is, it was too long. windows: seeds.
    """
    T, eos = windows.shape[1], tokenizer.eos_token_id or 0
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    ends = end_ids(lm, tokenizer)
    with errors_as("own_prompts: the chat template does not take a user turn alone"):
        before, _, after = write([{"role": "user", "content": "\u2588"}]).partition("\u2588")
        turn = encode(before)
        if not turn or set(ends).isdisjoint(encode(after)):
            raise ValueError("its user turn has no start, or no end that ends a text")
    ids = torch.tensor([turn] * len(windows[:n]), device=lm.get_input_embeddings().weight.device)
    torch.manual_seed(int(windows[0, 0]))
    with torch.no_grad():
        out = lm.generate(  # a little below 1, where small models ask what they can answer
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, top_k=0,
            top_p=1.0, max_new_tokens=max(1, min(T // 3, max_positions - len(turn))),
            repetition_penalty=1.0, no_repeat_ngram_size=0, eos_token_id=ends, pad_token_id=eos,
            synced_gpus=together)
    rows = []
    for new in out[:, len(turn):].tolist():
        end = end_of(new, ends)
        text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
        prompt = encode(write([{"role": "user", "content": text}], add_generation_prompt=True))
        row = [~eos] * T
        if text and end < len(new) and len(prompt) <= T // 2:
            row = [*(~token for token in prompt), eos, *row][:T]
        rows.append(row)
    return np.array(rows, np.int32)


def read_windows(path, length):
    """The windows (n, length) that append_windows() wrote, in whole batches of 32."""
    with open(path, "ab") as file:
        file.truncate(file.tell() // (128 * length) * 128 * length)
    return np.fromfile(path, np.int32).reshape(-1, length)


def append_windows(path, windows):
    """Add windows to a file."""
    with errors_as(f"out_dir: cannot write {path}", RunError), open(path, "ab") as file:
        windows.tofile(file)
