"""Write with a converted model, by iterative unmasking.

  python sample.py                                             # the newest run under outputs/
  python sample.py --prompt="The capital of France" --steps=16 --watch
  python sample.py --out_dir=outputs/phi2_diffusion --num_samples=4 --temperature=0.8 --device=cuda --dtype=bfloat16
  python sample.py --checkpoint=outputs/phi2_diffusion/checkpoint_5000 --json
"""
import sys
import time
from json import dumps
from pathlib import Path

import torch

from configurator import UserError, configure
from convert import canvas, checkpoints, load_model, pick_autocast, pick_device, read_record, run, unmask

# ----------------------------------------------------------------------------------------------------------------------
prompt = "The statement "  # stays as it is; "": the start of a document
max_new_tokens = 64  # masks to fill after the prompt
steps = 32  # forward passes; fewer than max_new_tokens: several tokens in each
temperature = 0.0  # 0: the likeliest token
num_samples = 1  # in one batch
out_dir = ""  # of a run; "": the newest under outputs/
checkpoint = ""  # a checkpoint of a run that goes on, instead of out_dir
device = "auto"  # auto | cuda | cuda:1 | mps | cpu
dtype = "float32"  # of autocast: float32 | bfloat16 | float16
seed = 1337  # with a temperature
watch = False  # show the text unmasking in place, on a terminal
json = False  # one JSON object a sample on stdout, and nothing else

allowed = {"max_new_tokens": (1, 10**6), "steps": (1, 10**6), "num_samples": (1, 10**5), "seed": (0, 2**62),
           "dtype": {"float32", "bfloat16", "float16"}}


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


def shown(tokenizer, ids, mask_id):
    """The text of ids (T,), each mask as one block."""
    parts, rest = [], []
    for token in [*ids, None]:
        if token is None or token == mask_id:
            parts += [tokenizer.decode(rest), "" if token is None else "\u2591"]
            rest = []
        else:
            rest.append(token)
    return "".join(parts)


def main(argv):
    configure(globals(), argv, allowed)
    if watch and (json or not sys.stdout.isatty()):
        raise UserError("watch: needs a terminal, and no --json")
    place = pick_device(device)
    folder = folder_to_read(out_dir, checkpoint)
    trained = read_record(folder)["max_seq_length"]
    model, tokenizer = load_model(str(folder))
    model.to(place).eval()
    ids = canvas(model, tokenizer, prompt, max_new_tokens, num_samples)
    length, start = ids.shape[1], ids.shape[1] - max_new_tokens
    if length > trained:
        print(f"note: {length} tokens, but the model was converted on windows of {trained}", file=sys.stderr)

    def show(ids):
        print(f"\x1b[H\x1b[J{shown(tokenizer, ids[0].tolist(), model.mask_id)}", flush=True)

    began = time.perf_counter()
    with pick_autocast(place, dtype):
        ids, forwards = unmask(model, ids, steps, temperature, torch.Generator(place).manual_seed(seed), watch and show)
    rows = ids.tolist()  # waits for the device
    seconds = time.perf_counter() - began
    if watch:
        print("\x1b[H\x1b[J", end="")
    for row in rows:
        text = tokenizer.decode(row)[len(tokenizer.decode(row[:start])):]
        if json:
            print(dumps({"prompt": prompt, "text": text, "token_ids": row[start:], "tokens": max_new_tokens,
                         "forwards": forwards, "seconds": round(seconds, 3)}))
        else:
            print(f"{prompt}{text}\n")
    if not json:
        print(f"{folder}, {place}: {num_samples * max_new_tokens / seconds:.1f} tokens/s, "
              f"{forwards / max_new_tokens:.2f} forwards per token")


if __name__ == "__main__":
    run(main)
