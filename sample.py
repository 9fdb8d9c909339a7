"""Generate text with a converted model: by unmasking, or as the AR model would but in fewer passes.

  python sample.py                                        # the newest run under outputs/
  python sample.py --prompt="The capital of France" --steps=16 --watch
  python sample.py --prompt="The [MASK:12] of France is Paris."   # fills a hole, not in blocks
  python sample.py --threshold=0.9                        # in each pass all tokens that probable
  python sample.py --verify --compare                     # a block model drafts, its AR mode checks
  python sample.py --prompts=questions.txt --chat --json  # one prompt a line; - is standard input
  python sample.py --checkpoint=outputs/phi2_diffusion/checkpoint_5000
  python sample.py --evaluate=my_text.txt --json          # instead of text, figures on a text
  python sample.py --serve                                # a page to try it in a browser
  python sample.py --export=transformers                  # for other programs: also gguf, uno
"""
import re
import sys
import time
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import UserError, configure, errors_as, first_line, run, settings_in
from convert import generate, load_model, read_record
from corpus import encode_prompt, end_ids, end_of, opening
from drafting import verify_texts
from machine import pick_autocast, pick_device, speed_up_sampling
from model_files import checkpoints
from replay import text_after, text_with_masks, write_trace
from verify import reach

# --------------------------------------------------------------------------------------------------
# text
prompt = ""  # kept; "": the run's sample_prompt; [MASK:12], [MASK]: a hole of 12, of 1
prompts = ""  # a file of prompts instead, one a line; -: standard input
chat = False  # each prompt is what a user says, through the tokenizer's chat template
num_samples = 1  # of each prompt, all in one batch
max_new_tokens = 64  # masks to fill after the prompt
stop_at_eos = True  # a text ends at an end of text or turn, of tokenizer or generation_config
# unmasking
steps = 32  # passes that set tokens; a block model adds one a block
order = "confidence"  # what is set first: confidence | entropy | margin | random | left_to_right
threshold = 0.0  # instead of steps: set all tokens at least this probable, or the best one
remask = 0  # how many unsure tokens of a text (blocks: of each block) may be masked again
temperature = 0.0  # 0: the most likely token
top_k = 0  # with a temperature: only among the k most likely; 0: all
top_p = 1.0  # with a temperature: only among the fewest that hold this share of the probability
# verified decoding
verify = False  # a block model drafts, the causal mode of the same weights checks: its very output
drafts = 0  # drafted tokens beyond the next, at most block_size less 1; 0: what is fastest here
branches = -1  # a check drafts on behind 0, 1, ... of them; 0: in a pass of its own; -1: the same
tree = 0  # a check has so many drafts, several for one place, with 3 drafts or as set; 0: no tree
verify_batch = 1  # texts decoded together
compare = False  # decode the same with plain AR as well: its speed, and how many texts are equal
# evaluation
evaluate = ""  # figures on this text: a file or folder as convert.py reads; pydoc; world
eval_samples = 128  # windows of it at most; 0: all, in order
text_column = "text"  # its column with the text
infill_spans = 100  # holes of 4 to 12 tokens cut into it; 0: no infilling
tasks = ""  # tasks of lm-evaluation-harness, comma-separated
tasks_folder = ""  # a folder with tasks of your own, as it describes them
tasks_mode = "ar"  # log-likelihoods and texts of which mode: ar | diffusion
tasks_limit = 0  # examples of each task at most; 0: all
tasks_draws = 32  # draws of the masks in a log-likelihood of the diffusion
# run
out_dir = ""  # folder of a run; "": the newest under outputs/
checkpoint = ""  # a checkpoint of an unfinished run, instead of out_dir
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "float32"  # of the weights: float32 | bfloat16 | float16
seed = 1337  # of the random numbers that a temperature needs
watch = False  # show the text unmasking in place, on a terminal
trace = ""  # write a page that replays the unmasking, as trace.html; opens in any browser, offline
serve = False  # a page to try the model in a browser, on this machine alone
port = 8000  # of that page; 0: a free one
json = False  # one JSON object a sample on stdout, and nothing else
# other programs
export = ""  # write the result for another program: transformers | gguf | uno
export_copy = False  # uno: with a copy of the base, where a link to it would do

allowed = dict.fromkeys((
    "prompts", "out_dir", "checkpoint", "trace", "evaluate", "tasks_folder"), Path) | {
    "max_new_tokens": (1, 10**6), "steps": (1, 10**6), "num_samples": (1, 10**5),
    "seed": (0, 2**62), "remask": (0, 10**4), "threshold": (0, 1), "top_p": (1e-6, 1),
    "branches": (-1, 10**4), "tree": (0, 64), "verify_batch": (1, 10**5), "port": (0, 65535),
    "export": {"", "transformers", "gguf", "uno"},
    "tasks_draws": (1, 10**6), "tasks_mode": {"ar", "diffusion"},
    "dtype": {"float32", "bfloat16", "float16"},
    "order": {"confidence", "entropy", "margin", "random", "left_to_right"},
}
HOLE = r"\[MASK(?::([1-9]\d{0,5}))?\]"  # in a prompt: so many masks, or one


# --------------------------------------------------------------------------------------------------
# The script
def folder_to_read(out_dir, checkpoint):
    """The folder of the model: the checkpoint, or out_dir's final/, or its newest checkpoint."""
    if checkpoint:
        return Path(checkpoint)
    runs = [Path(out_dir)]
    if not out_dir:
        written = Path("outputs").glob("*/*/diffusion.json")
        written = sorted(written, key=lambda p: p.stat().st_mtime, reverse=True)
        runs = [p.parent.parent for p in written]
    for run_dir in runs:
        for folder in (run_dir / "final", *checkpoints(run_dir)):
            if (folder / "diffusion.json").is_file():
                return folder
    raise UserError(f"out_dir: no converted model in {out_dir or 'outputs/'}; python convert.py "
                    "config/tiny.py makes one")


def hole_in(tokenizer):
    """The pattern of a hole in a prompt. Most tokenizers join a space to the word after it: then
    the space before a hole belongs to what fills it, as a token of a space alone is rare."""
    first, inside = (tokenizer.encode(x, add_special_tokens=False) for x in ("a", " a"))
    return " ?" + HOLE if len(first) == len(inside) else HOLE


def encode(model, tokenizer, text, new_tokens, chat=False, beyond=0):
    """(ids of a prompt with the masks in it and behind it, where these are: slices). beyond: so
    many positions more must be there, where masks stand while a text is drafted."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError("chat: this tokenizer has no chat template; take a chat model")
        with errors_as("chat: the chat template cannot write this"):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    parts = re.split(hole_in(tokenizer), text)
    if wrong := re.search(r"\[MASK:[^\]]{,20}\]?", "".join(parts[::2])):
        raise UserError(f"prompt: {wrong[0]!r} is no hole; [MASK:12] is one of 12 tokens, [MASK] "
                        "of one")
    if len(parts) == 1:
        start = [] if chat else None  # a chat template writes BOS itself
        ids = encode_prompt(model, tokenizer, text, new_tokens + beyond, start)
        hole = slice(len(ids), len(ids) + new_tokens)
        return ids + [model.mask_id] * new_tokens, [hole]
    if model.block_size:
        raise UserError("prompt: a block model writes left to right and cannot fill [MASK:...]; a "
                        "whole-sequence one can")
    ids, holes = [] if chat else opening(tokenizer), []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            ids = ids + tokenizer.encode(part, add_special_tokens=False)
            continue
        ids = ids or [tokenizer.eos_token_id or 0]  # something must stand before the first token
        holes.append(slice(len(ids), len(ids) + int(part or 1)))
        ids += [model.mask_id] * int(part or 1)
    if len(ids) > model.max_positions:
        raise UserError(f"prompt: {len(ids)} tokens, the model has {model.max_positions} positions")
    return ids, holes


def read_prompts(default=""):
    """The texts to continue: prompt, or the default if that is empty, or the lines of the file
    prompts."""
    if not prompts:
        return [prompt or default]
    try:
        if prompts == "-":
            text = sys.stdin.read().removeprefix("\ufeff") if sys.stdin else ""
        else:
            text = Path(prompts).read_text("utf-8-sig")
        text.encode()  # what is no text at all is a ValueError too
    except (OSError, ValueError) as error:
        raise UserError(f"prompts: '{prompts}' cannot be read: {first_line(error)}") from None
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"prompts: '{prompts}' is empty")
    return lines


def check_flags(model, n_prompts):
    """Raise UserError for what this model cannot do, and for flags that exclude one another."""
    mistakes = {
        "verify: needs a block model, as config/tiny_block.py makes; this one is whole-sequence":
            verify and not model.block_size,
        f"drafts: from 1 to {model.block_size - 1}, as the model's blocks have {model.block_size} "
        "tokens": verify and 0 < model.block_size <= drafts,
        "drafts, branches, tree, verify_batch: need --verify": not verify and (
            drafts or branches >= 0 or tree or verify_batch > 1),
        "trace: replays the unmasking of one prompt, so without --verify and --prompts":
            trace and (verify or n_prompts > 1),
        "compare: needs --verify": compare and not verify,
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)


def decode_all(model, encoded, sampling, ends, generator, watcher):
    """Generate for all prompts, timed: (the ids of each text, figures)."""
    before = [ids[:holes[0].start] for ids, holes in encoded]
    if verify:
        new, figures = verify_texts(model, before, sampling, ends,
                                    SimpleNamespace(**settings_in(globals())))
        return [ids + text for ids, text in zip(before, new, strict=True)], figures
    prompts, more = [ids for ids, _ in encoded], 0
    if model.block_size:  # it adds the masks block by block
        prompts, more = before, max_new_tokens
    start = time.perf_counter()
    rows, forwards = generate(
        model, prompts, more, steps, ends, watcher, sampling=sampling, order=order,
        threshold=threshold, remask=remask, generator=generator)
    seconds = time.perf_counter() - start
    n_tokens = sum(len(row[hole]) for row, (_, holes) in zip(rows, encoded, strict=True)
                   for hole in holes)
    return rows, {
        "tokens_per_s": round(n_tokens / seconds, 1),  # one pass runs on all texts
        "tokens_per_forward": round(n_tokens / max(1, forwards * len(encoded)), 3),
        "forwards": forwards, "seconds": round(seconds, 3)}


def text_of(tokenizer, text, ids, holes, row, ends):
    """(The new ids of a row, its text: what follows the prompt, or all of it around holes)."""
    parts = [row[hole] for hole in holes]
    token_ids, filled = sum(parts, []), iter(parts)
    written, n_holes = re.subn(hole_in(tokenizer),
                               lambda _: text_after(tokenizer, next(filled)), text)
    if n_holes:
        return token_ids, written
    token_ids = token_ids[:end_of(token_ids, ends)]
    return token_ids, text_after(tokenizer, token_ids, ids[:holes[0].start])


def print_sample(tokenizer, text, ids, holes, row, ends, figures):
    """Print one sample, as text or as JSON."""
    token_ids, written = text_of(tokenizer, text, ids, holes, row, ends)
    if json:
        print(dumps({"prompt": text, "text": written, "token_ids": token_ids,
                     "tokens": len(token_ids)} | figures))
    else:
        print(f"{'' if re.search(HOLE, text) or chat else text}{written}\n")


def print_notes(model, folder, trained, longest):
    """Print what may surprise, on stderr. trained, longest: tokens of a window in training, and of
    the longest text here."""
    notes = {
        f"this run is not finished, {folder} is its newest checkpoint":
            not checkpoint and not (folder.parent / "final").exists(),
        "without a --temperature all samples of a prompt are the same":
            num_samples > 1 and not temperature and (verify or order != "random"),
        f"{longest} tokens, but the model was converted on windows of {trained}": longest > trained,
        "--verify --compare writes what the AR model would, in fewer passes than it":
            model.block_size and not verify and not json,
    }
    for note, holds in notes.items():
        if holds:
            print(f"note: {note}", file=sys.stderr)


def choose_work(s):
    """work(model, tokenizer, folder) where flags ask for another than to write text, else None.
    UserError for flags that exclude one another, before a model is loaded."""
    if watch and (json or not sys.stdout or not sys.stdout.isatty()):
        raise UserError("watch: needs a terminal, and no --json")
    if watch and (verify or prompts):
        raise UserError("watch: shows the unmasking of one prompt, without --verify or --prompts")
    if sum(map(bool, (serve, export, evaluate or tasks))) > 1:
        raise UserError("serve, export, evaluate, tasks: one at a time")
    if serve:
        from serve import prepare_page  # as the others below, not needed to write text
        return prepare_page(s)
    if export_copy and export != "uno":
        raise UserError("export_copy: is for --export=uno")
    if export in ("gguf", "uno"):
        from export import prepare_export
        return prepare_export(export, export_copy)
    if evaluate or tasks or tasks_folder or tasks_mode != "ar":
        import evaluation
        evaluation.check_flags(s)
        return lambda *loaded: evaluation.evaluate_model(*loaded, s)


def main(argv):
    configure(globals(), argv, allowed)
    work = choose_work(SimpleNamespace(**settings_in(globals())))
    folder, target = folder_to_read(out_dir, checkpoint), pick_device(device)
    if export == "transformers":  # which needs no weights
        from export import export_transformers
        return export_transformers(folder)
    record = read_record(folder)
    texts = [] if work else read_prompts(record["settings"].get("sample_prompt", ""))
    as_dtype = pick_autocast(target, dtype).fast_dtype
    model, tokenizer = load_model(folder, target, as_dtype=as_dtype)
    model.to(target).eval()
    torch.manual_seed(seed)  # of the random tokens that a model with noise="uniform" sees
    if work:
        return work(model, tokenizer, folder)
    check_flags(model, len(texts))
    speed_up_sampling(model)
    if trace:
        write_trace(trace, [], tokenizer, model.mask_id)  # whether it can be, before the work
    beyond = reach(model, drafts) if verify else 0
    encoded = [encode(model, tokenizer, text, max_new_tokens, chat, beyond)
               for text in texts for _ in range(num_samples)]
    print_notes(model, folder, record["max_seq_length"], max(len(ids) for ids, _ in encoded))

    frames = [(encoded[0][0], [])]  # before the first pass

    def show(ids, confidence):
        frames.append((ids[0].tolist(), confidence[0].tolist()))
        if watch:
            text = text_with_masks(tokenizer, frames[-1][0], model.mask_id)
            print(f"\x1b[H\x1b[J{text}", flush=True)
            time.sleep(min(0.15, 4 / steps))  # slow enough to see

    ends = end_ids(model.lm, tokenizer) if stop_at_eos else []
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator = torch.Generator(target).manual_seed(seed)
    rows, figures = decode_all(model, encoded, sampling, ends, generator,
                               show if watch or trace else None)
    if watch:
        print("\x1b[H\x1b[J", end="")
        del figures["seconds"], figures["tokens_per_s"]  # with the pauses
    if trace:
        write_trace(trace, frames, tokenizer, model.mask_id)
    for i, (ids, holes) in enumerate(encoded):
        print_sample(tokenizer, texts[i // num_samples], ids, holes, rows[i], ends, figures)
    if not json:
        figures = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"{folder}, {target}: texts {len(encoded)}, {figures}")


if __name__ == "__main__":
    run(main)
