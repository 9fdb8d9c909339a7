"""Write with a converted model: by iterative unmasking, or the AR model's very output in fewer forward passes.

  python sample.py                                             # the newest run under outputs/
  python sample.py --prompt="The capital of France" --steps=16 --watch
  python sample.py --prompt="The [MASK:12] of France is Paris."     # fill a hole; a whole-sequence model can
  python sample.py --threshold=0.9                             # as many tokens in a pass as are sure
  python sample.py --verify --compare                          # a block model drafts, its causal mode checks
  python sample.py --prompts=questions.txt --chat --json       # one prompt a line; - is standard input
  python sample.py --checkpoint=outputs/phi2_diffusion/checkpoint_5000
"""
import functools
import re
import sys
import time
from json import dumps
from pathlib import Path

import torch

from configurator import UserError, configure
from convert import (
    FOREIGN,
    canvas,
    checkpoints,
    clean_places,
    draw,
    first_line,
    forget,
    load_model,
    new_past,
    pick_autocast,
    pick_device,
    predictive,
    read_record,
    run,
    write,
)

# ----------------------------------------------------------------------------------------------------------------------
# text
prompt = "The statement "  # stays as it is; "": the start of a document; [MASK:12]: a hole of 12 tokens
prompts = ""  # a file of prompts instead, one a line; -: standard input
chat = False  # each prompt is what a user says, through the tokenizer's chat template
num_samples = 1  # of each prompt, all in one batch
max_new_tokens = 64  # masks to fill after the prompt
stop_at_eos = True  # a text ends at the tokenizer's end of text
# unmasking
steps = 32  # passes that set tokens; fewer than max_new_tokens: several in each (a block model adds one a block)
order = "confidence"  # who is set first: confidence | entropy | margin | random | left_to_right
threshold = 0.0  # instead of steps: set all tokens that are so sure, at least one in each pass
remask = 0  # so many of the least sure tokens may be taken back (in a block model: of each block)
temperature = 0.0  # 0: the likeliest token
top_k = 0  # with a temperature: only among the k likeliest; 0: all
top_p = 1.0  # with a temperature: only among the fewest that make up this share
# verified decoding
verify = False  # a block model: masks draft, the causal mode of the same weights checks; the AR model's own output
drafts = 3  # tokens drafted beyond the next, which is exact; a block_size less 1 at most, 2 without logit_shift
branches = 4  # masks stand after 0, 1, ... so many accepted drafts in the pass that checks; 0: in a pass of their own
compare = False  # decode the same with plain AR as well, and print both
# run
out_dir = ""  # of a run; "": the newest under outputs/
checkpoint = ""  # a checkpoint of a run that goes on, instead of out_dir
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "float32"  # of autocast: float32 | bfloat16 | float16
seed = 1337  # with a temperature
watch = False  # show the text unmasking in place, on a terminal
trace = ""  # write a page that replays the unmasking, e.g. trace.html; opens in any browser, needs no network
json = False  # one JSON object a sample on stdout, and nothing else

allowed = {"max_new_tokens": (1, 10**6), "steps": (1, 10**6), "num_samples": (1, 10**5), "seed": (0, 2**62),
           "remask": (0, 10**4), "threshold": (0, 1), "top_p": (1e-6, 1), "dtype": {"float32", "bfloat16", "float16"},
           "order": {"confidence", "entropy", "margin", "random", "left_to_right"}}


# ----------------------------------------------------------------------------------------------------------------------
# Verified decoding: self-speculation in one forward pass (https://arxiv.org/abs/2211.17192 for the rule of acceptance,
# TiDAR, https://arxiv.org/abs/2511.08923, for draft and check in one pass)
@functools.lru_cache(64)  # a prompt has two of them, passed over and over
def draft_layout(candidates, drafts, branches, shift, device):
    """What one pass runs on, relative to its first candidate: (places (3, 1, L), inputs (L,), rows to read (N,)).

    First the candidates, clean, each checked by the state of the one before. Then, for each place where acceptance may
    stop, a noisy block of its own behind the last candidate accepted there, whose reads are the next drafts. inputs:
    the index of a candidate, or -1 for a mask.
    """
    places = [(i, 0, i + 1) for i in range(candidates)]
    inputs, rows = list(range(candidates)), list(range(candidates))
    for j in range(min(branches if candidates > 1 else 1, candidates) if drafts else 0):
        if shift:  # the mask at i predicts token i + 1; token j + 1 itself is exact, read from candidate j
            block, horizon = [(-1, j + 1 + d) for d in range(drafts)], j + 1
        else:  # a mask predicts its own token, and the block starts from a known one
            block, horizon = [(j, j)] + [(-1, j + 1 + d) for d in range(drafts + 1)], j
        rows += range(len(places) + len(block) - drafts, len(places) + len(block))
        places += [(position, j + 1, horizon) for _, position in block]
        inputs += [index for index, _ in block]
    return torch.tensor(places, device=device).T[:, None], inputs, torch.tensor(rows, device=device)


def accept(p, q, drafted, generator=None):
    """How many drafts stand, and the token after them: distributed as p says, whatever q is.

    p (m, V): the model's distribution of each draft and of what follows them; q (m - 1, V): what the drafts were drawn
    from. (Speculative sampling, https://arxiv.org/abs/2211.17192, algorithm 1.) At temperature 0: the agreeing prefix.
    """
    tokens = torch.tensor(drafted, dtype=torch.long, device=p.device)[:, None]
    u = torch.rand(tokens.shape, generator=generator, device=p.device)
    stands = (u * q.gather(1, tokens) < p[:-1].gather(1, tokens))[:, 0].tolist()
    kept = [*stands, False].index(False)
    left = (p[kept] - q[kept]).clamp(min=0) if kept < len(drafted) else p[kept]
    return kept, int(torch.multinomial(left, 1, generator=generator))


@torch.no_grad()
def decode_verified(model, prompt, new_tokens, drafts, branches, sampling, end=None, generator=None):
    """Continue a prompt (list of ids) exactly as the causal mode would: (new ids, forward passes, drafted, accepted).

    Each pass yields one token at least. drafts = 0 is plain cached AR decoding.
    """
    past, device = new_past(), model.mask_embedding.device
    past["places"] = clean_places(len(prompt)).to(device)
    moves = torch.tensor([[[1]], [[0]], [[1]]], device=device)  # positions and horizons do, groups don't
    t = torch.tensor([[model.num_timesteps]], device=device) if drafts else None
    model.set_causal(True)
    ids = torch.tensor([prompt], device=device)
    logits = model(ids, None, torch.tensor([len(prompt) - 1], device=device), past=past)
    text, drafted, q, forwards, proposed, accepted = draw(logits, sampling, generator).tolist(), [], logits[:0], 1, 0, 0
    model.set_causal(not drafts)  # with drafts look() says who sees whom
    while len(text) < new_tokens and end not in text:
        known = [text[-1], *drafted]
        places, inputs, rows = draft_layout(len(known), drafts, branches, model.logit_shift, device)
        ids = torch.tensor([[model.mask_id if i < 0 else known[i] for i in inputs]], device=device)
        view = model.look(places + (len(prompt) + len(text) - 1) * moves, past) if drafts else {"past": past}
        logits = model(ids, t, rows, **view)
        forwards += 1
        p = predictive(logits.float(), **sampling)  # (rows, V)
        kept, token = accept(p[:len(known)], q, drafted, generator)
        proposed, accepted = proposed + len(drafted), accepted + kept
        forget(past, len(inputs) - 1 - kept)
        text += [*drafted[:kept], token]
        drafted = []
        if drafts and len(known) + (kept + 1) * drafts <= len(rows):  # masks stood where acceptance stopped
            q = p[len(known) + kept * drafts:][:drafts]
            drafted = torch.multinomial(q, 1, generator=generator)[:, 0].tolist()
    text = text[:new_tokens]
    return text[:text.index(end) + 1] if end in text else text, forwards, proposed, accepted


# ----------------------------------------------------------------------------------------------------------------------
# The script
def folder_to_read(out_dir, checkpoint):
    """The folder with the model: the checkpoint, else final/ of out_dir, else its newest checkpoint."""
    if checkpoint:
        return Path(checkpoint)
    written = sorted(Path("outputs").glob("*/*/diffusion.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for run_dir in [Path(out_dir)] if out_dir else [p.parent.parent for p in written]:
        for folder in (run_dir / "final", *checkpoints(run_dir)):
            if (folder / "diffusion.json").is_file():
                return folder
    raise UserError(f"out_dir: no converted model in {out_dir or 'outputs/'}; convert.py config/tiny.py makes one")


def within(tokenizer, ids, before=None):
    """The text of ids after those before, by default some: at the start many tokenizers leave out a leading space."""
    if before is None:
        before = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)):]


def shown(tokenizer, ids, mask_id):
    """The text of ids (T,), each mask as one block."""
    parts, rest = [], []
    for token in [*ids, None]:
        if token is None or token == mask_id:
            parts += [within(tokenizer, rest) if parts else tokenizer.decode(rest), "" if token is None else "\u2591"]
            rest = []
        else:
            rest.append(token)
    return "".join(parts)


TRACE = """<!doctype html><meta charset="utf-8"><title>unmasking</title>
<style>body{font:16px/1.7 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;background:#fff;color:#111}
#text{white-space:pre-wrap;min-height:12em}#text span{border-radius:3px}.mask{color:#bbb}
input{width:60%;vertical-align:middle}button{font:inherit;min-width:5em}</style>
<p><button id="play">play</button> <input id="at" type="range" min="0" value="0" aria-label="pass">
<output id="said"></output></p><div id="text"></div>
<p><small>Hue: the pass that set a token, from the first (red) to the last (violet); the paler, the less sure it was.
Hover for both. Space plays, the arrow keys step.</small></p>
<script>
const tokens=DATA.tokens,frames=DATA.frames,at=document.getElementById("at"),play=document.getElementById("play")
let timer=null
at.max=frames.length-1
function draw(){
  const n=+at.value,text=document.getElementById("text")
  text.replaceChildren(...frames[n].map(([token,pass,sure])=>{
    const span=document.createElement("span")
    if(token<0){span.textContent="\u2591";span.className="mask"}
    else{span.textContent=tokens[token]
      if(pass>0){span.style.background=`hsl(${280*(pass-1)/Math.max(1,frames.length-2)} 80% ${95-35*sure}%)`
        span.title=`pass ${pass}, confidence ${sure}`}}
    return span}))
  document.getElementById("said").textContent=`pass ${n} of ${frames.length-1}`}
function stop(){clearInterval(timer);timer=null;play.textContent="play"}
function step(by){at.value=+at.value+by;draw()}
play.onclick=()=>{if(timer)return stop()
  if(+at.value==frames.length-1)at.value=0
  play.textContent="pause";draw();timer=setInterval(()=>{step(1);if(+at.value==frames.length-1)stop()},250)}
at.oninput=draw
document.onkeydown=e=>{if(e.key==" "){e.preventDefault();play.click()}
  else if(e.key=="ArrowRight"||e.key=="ArrowLeft"){e.preventDefault();stop();step(e.key=="ArrowRight"?1:-1)}}
draw()
</script>"""


def write_trace(path, frames, tokenizer, mask_id):
    """The page that replays frames, (ids, confidence) lists after each pass; in the first, all is masked that will be
    set. UserError if it cannot be written."""
    names, rows, set_at = {}, [], {}
    for n, (ids, confidence) in enumerate(frames):
        row = []
        for i, token in enumerate(ids):
            if token == mask_id:
                set_at.pop(i, None)
                row.append([-1, 0, 0])
                continue
            if n and i not in set_at and (i >= len(frames[n - 1][0]) or frames[n - 1][0][i] == mask_id):
                set_at[i] = [n, round(confidence[i], 3)]
            row.append([names.setdefault(token, len(names)), *set_at.get(i, [0, 0])])
        rows.append(row)
    data = dumps({"tokens": [within(tokenizer, [token]) for token in names], "frames": rows}).replace("<", "\\u003c")
    try:
        Path(path).write_text(TRACE.replace("<script>", f"<script>const DATA={data}\n"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"trace: '{path}' cannot be written: {first_line(error)}") from None


def encode(model, tokenizer, text):
    """(ids of a prompt with masks in its holes, the holes, masks to add behind). UserError if it cannot be filled."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError("chat: this tokenizer has no chat template; take a model that was trained to chat")
        try:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                                 add_generation_prompt=True)
        except FOREIGN as error:
            raise UserError(f"chat: the chat template cannot write this: {first_line(error)}") from None
    parts = re.split(r"\[MASK:(\d{1,6})\]", text)
    if len(parts) == 1:
        past_the_end = 2 * drafts + 2 if verify else 0  # masks stand there
        return canvas(model, tokenizer, text, max_new_tokens + past_the_end), [], max_new_tokens
    if model.block_size:
        raise UserError("prompt: a block model writes left to right, it cannot fill [MASK:...]; a whole-sequence one "
                        "can")
    ids, holes = [], []
    for i, part in enumerate(parts):
        hole = i % 2
        new = [model.mask_id] * int(part) if hole else tokenizer.encode(part, add_special_tokens=False)
        if hole and not ids and model.logit_shift:  # something must stand before the first token
            ids = [tokenizer.eos_token_id or 0]
        holes += [slice(len(ids), len(ids) + len(new))] if hole else []
        ids += new
    if len(ids) > model.positions:
        raise UserError(f"prompt: {len(ids)} tokens, the model has {model.positions} positions")
    return ids, holes, 0


def main(argv):
    configure(globals(), argv, allowed)
    if watch and (json or not sys.stdout or not sys.stdout.isatty()):
        raise UserError("watch: needs a terminal, and no --json")
    if watch and (verify or prompts):
        raise UserError("watch: shows the unmasking of one prompt, so without --verify and --prompts")
    texts = [prompt]
    if prompts:
        try:
            lines = Path(prompts).read_text("utf-8") if prompts != "-" else sys.stdin.read() if sys.stdin else ""
            lines.encode()  # what is no text at all is a ValueError too
            texts = lines.removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"prompts: '{prompts}' cannot be read: {first_line(error)}") from None
        if texts == [""]:
            raise UserError(f"prompts: '{prompts}' is empty")
    place = pick_device(device)
    folder = folder_to_read(out_dir, checkpoint)
    trained = read_record(folder)["max_seq_length"]
    if not (checkpoint or (folder.parent / "final").exists()):
        print(f"note: this run is not finished, {folder} is its newest checkpoint", file=sys.stderr)
    if num_samples > 1 and not temperature and (verify or order != "random"):
        print("note: without a --temperature all samples of a prompt are the same", file=sys.stderr)
    model, tokenizer = load_model(str(folder), device_type=place.type)
    model.to(place).eval()
    if verify and not model.block_size:
        raise UserError("verify: needs a block model, as config/tiny_block.py makes one; this one is whole-sequence")
    most = model.block_size - 1 - (not model.logit_shift)
    if verify and most < 1:
        raise UserError(f"verify: blocks of {model.block_size} leave nothing to draft; convert with larger ones")
    if verify and not 1 <= drafts <= most:
        raise UserError(f"drafts: from 1 to {most}, as the model was trained on blocks of {model.block_size}")
    if trace and (verify or len(texts) > 1):
        raise UserError("trace: replays the unmasking of one prompt, so without --verify and --prompts")
    if compare and not verify:
        raise UserError("compare: needs --verify")
    if trace:
        write_trace(trace, [], tokenizer, model.mask_id)  # so that it can be written is known before the work
    encoded = [encode(model, tokenizer, text) for text in texts for _ in range(num_samples)]
    longest = max(len(ids) + extra for ids, _, extra in encoded)
    if longest > trained:
        print(f"note: {longest} tokens, but the model was converted on windows of {trained}", file=sys.stderr)
    if model.block_size and not verify and not json:
        print("note: --verify --compare writes what the AR model would, in fewer passes than it", file=sys.stderr)
    end = tokenizer.eos_token_id if stop_at_eos else None
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator, frames = torch.Generator(place).manual_seed(seed), []

    def show(ids, confidence):
        if trace:
            if not frames:  # before the first pass
                start = encoded[0][0]
                frames.append((start + [model.mask_id] * (ids.shape[1] - len(start)), []))
            sure = confidence[0].tolist()
            frames.append((ids[0].tolist(), [0] * (ids.shape[1] - len(sure)) + sure))  # of the block at work
        if watch:
            print(f"\x1b[H\x1b[J{shown(tokenizer, ids[0].tolist(), model.mask_id)}", flush=True)

    def decode(drafts):
        return [decode_verified(model, ids, max_new_tokens, drafts, branches, sampling, end, generator)
                for ids, *_ in encoded]

    more = {}
    with pick_autocast(place, dtype):
        for warm_up in (drafts, 0) if compare else ():  # so that both are timed warm
            decode_verified(model, encoded[0][0], min(8, max_new_tokens), warm_up, branches, sampling, end)
        began = time.perf_counter()
        if verify:
            results = decode(drafts)
            new, forwards = [r[0] for r in results], sum(r[1] for r in results)
            more["acceptance"] = round(sum(r[3] for r in results) / max(1, sum(r[2] for r in results)), 4)
        else:
            whole = [ids + [model.mask_id] * (extra if not model.block_size else 0) for ids, _, extra in encoded]
            rows, forwards, _ = write(model, whole, max_new_tokens if model.block_size else 0, steps, end,
                                      (watch or trace) and show, sampling=sampling, order=order, threshold=threshold,
                                      remask=remask, generator=generator)
            new = [row[len(ids):] for row, (ids, _, _) in zip(rows, encoded, strict=True)]
        seconds = time.perf_counter() - began
        if compare:
            began = time.perf_counter()
            plain = decode(0)
            ar_seconds = time.perf_counter() - began
            more["ar_tokens_per_s"] = round(sum(len(r[0]) for r in plain) / ar_seconds, 1)
            if not temperature:  # else both are drawn
                more["equal"] = sum(r[0] == ids for r, ids in zip(plain, new, strict=True))
    if watch:
        print("\x1b[H\x1b[J", end="")
    if trace:
        write_trace(trace, frames, tokenizer, model.mask_id)
    total = sum(map(len, new)) or sum(h.stop - h.start for _, holes, _ in encoded for h in holes)
    passes = max(1, forwards * (1 if verify else len(new)))  # one runs on all texts, but for verify
    more |= {"tokens_per_forward": round(total / passes, 3), "tokens_per_s": round(total / seconds, 1)}
    for i, (ids, holes, _) in enumerate(encoded):
        text = texts[i // num_samples]
        if holes:
            filled = iter([tokenizer.decode(rows[i][hole]) for hole in holes])
            token_ids = [token for hole in holes for token in rows[i][hole]]
            written = re.sub(r"\[MASK:\d{1,6}\]", lambda _, f=filled: next(f), text)
        else:
            token_ids = new[i][:new[i].index(end)] if end in new[i] else new[i]
            written = within(tokenizer, token_ids, ids)
        if json:
            print(dumps({"prompt": text, "text": written, "token_ids": token_ids, "tokens": len(token_ids),
                         "forwards": forwards, "seconds": round(seconds, 3)} | more))
        else:
            print(f"{'' if holes or chat else text}{written}\n")
    if not json:
        print(f"{folder}, {place}: {more['tokens_per_s']} tokens/s, {more['tokens_per_forward']} tokens per forward"
              + (f", {more['acceptance']:.0%} of the drafts accepted" if verify else "")
              + (f"; plain AR: {more['ar_tokens_per_s']} tokens/s" if compare else "")
              + (f", {more['equal']} of {len(new)} texts the same" if "equal" in more else ""))


if __name__ == "__main__":
    run(main)
