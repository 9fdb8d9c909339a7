"""What each choice of the recipe is worth: the world of config/tiny.py, equal tokens, three seeds.

  python assets/recipe.py assets/recipe.jsonl    # over an hour of two idle CPU cores
  python assets/recipe.py my.jsonl --seeds=1 --jobs=4 --only=schedule

For each seed an AR model is trained, and converted once for each choice, in STEPS steps. A row is
appended when its run ends, and what has its row is not run again: start it again after a kill.
The tables are made from the rows by `python assets/tables.py --write`.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from world import judge, train_and_held_out

ROOT = Path(__file__).resolve().parent.parent
STEPS = 120
COMMON = ("--log_steps=50 --eval_steps=1000000 --save_steps=0 --keep_checkpoints=1 "
          "--eval_samples=128").split()
CONVERT = ("--model_config= --tokenizer_name= --stage0_epochs=0 --stage1_epochs=0.15 "
           "--stage2_epochs=1.1 --stage3_epochs=0.25").split()  # epochs share out the steps
PLAIN = "--noise_schedule=cosine --lm_loss_stages=3 --lm_loss_weight=0.5".split()  # the defaults
ONE_STAGE = "--stage1_epochs=0 --stage2_epochs=3 --stage3_epochs=0"
LINEAR = "--noise_schedule=linear --lm_loss_stages=2"
BLOCK = "--stage3_epochs=0 --stage2_epochs=1.35 --on_policy_tokens=0".split()

# name of the choice: (config file, flags of one run, or of several that go on from one another)
WHOLE, BLOCKS = "config/tiny.py", "config/tiny_block.py"
ROWS = {
    "whole sequence": (WHOLE, ""),
    "whole sequence, AR loss in stages 2 and 3": (WHOLE, "--lm_loss_stages=23"),
    "whole sequence, lm_loss_weight 0": (WHOLE, "--lm_loss_weight=0"),
    "whole sequence, one stage": (WHOLE, ONE_STAGE),
    "whole sequence, one stage with AR loss": (WHOLE, f"{ONE_STAGE} --lm_loss_stages=2"),
    "whole sequence, schedule linear": (WHOLE, "--noise_schedule=linear"),
    "whole sequence, schedule polynomial": (WHOLE, "--noise_schedule=polynomial"),
    "whole sequence, schedule sqrt": (WHOLE, "--noise_schedule=sqrt"),
    "whole sequence, no time embedding": (WHOLE, "--use_time_embedding=false"),
    "whole sequence, three stages, linear, AR loss in 2 and 3": (WHOLE, f"{LINEAR}3"),
    "whole sequence, one stage, linear, AR loss": (WHOLE, f"{ONE_STAGE} {LINEAR}"),
    "whole sequence, three stages, linear, AR loss in 2 and 3, 600 steps":
        (WHOLE, f"{LINEAR}3 --max_steps=600"),
    "whole sequence, one stage, linear, AR loss, 600 steps":
        (WHOLE, f"{ONE_STAGE} {LINEAR} --max_steps=600"),
    "whole sequence, from scratch": (WHOLE, "SCRATCH"),
    "whole sequence, from scratch, linear": (WHOLE, "SCRATCH --noise_schedule=linear"),
    "whole sequence, from scratch, with the AR steps too": (WHOLE, "SCRATCH --max_steps=370"),
    "blocks of 4": (BLOCKS, ""),
    "blocks of 8": (BLOCKS, "--block_size=8"),
    "blocks of 16": (BLOCKS, "--block_size=16"),
    "blocks of 2, 4, 8, 16 in turn":
        (BLOCKS, *(f"--block_size={size} --max_steps={STEPS // 4}" for size in (2, 4, 8, 16))),
    "blocks of 4, no distillation": (BLOCKS, "--distill_weight=0"),
    "blocks of 4, none fully masked": (BLOCKS, "--full_mask_share=0"),
    "blocks of 4, own text": (BLOCKS, "--on_policy_tokens=50000"),
    "blocks of 4, adapters": (BLOCKS, "--use_lora"),
    "blocks of 4, adapters, own text alone":
        (BLOCKS, "--use_lora --on_policy_tokens=50000 --on_policy_share=1"),
    "blocks of 4, adapters, own text alone, causal":
        (BLOCKS, "--use_lora --on_policy_tokens=50000 --on_policy_share=1 --causal_blocks"),
    "blocks of 4, adapters, own text alone, causal, uniform":
        (BLOCKS, "--use_lora --on_policy_tokens=50000 --on_policy_share=1 --causal_blocks "
                 "--noise=uniform"),
}


def run_script(script, *args):
    """What a script prints, run with one thread; its words are shown only if it fails."""
    done = subprocess.run([sys.executable, ROOT / script, *args], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(map(str, args))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def ar_model(seed, out):
    """The folder of the AR model of a seed, trained if it is not there, without what a conversion
    would go on from."""
    folder, plain = out / f"ar_{seed}", out / f"plain_{seed}"
    if not plain.exists():
        run_script("convert.py", ROOT / WHOLE, *COMMON, "--max_steps=250", "--stage1_epochs=0",
                   "--stage2_epochs=0", "--stage3_epochs=0", f"--seed={seed}",
                   f"--out_dir={folder}", "--resume")
        shutil.copytree(folder / "final", plain, ignore=shutil.ignore_patterns("diffusion.*"))
    return plain


def run_row(name, seed, out):
    """The row of a choice and a seed: the figures that end its run, and its flags."""
    config, *runs = ROWS[name]
    model, results = ar_model(seed, out), []
    for number, flags in enumerate(runs):
        start = [f"--model_name={model}", *CONVERT]
        start += BLOCK if config == BLOCKS else PLAIN
        if "SCRATCH" in flags:
            flags = flags.replace("SCRATCH", f"--stage0_epochs=0 {ONE_STAGE}")
            start = PLAIN
        folder = out / f"{name.replace(' ', '_').replace(',', '')}_{seed}_{number}"
        if not (folder / "result.json").exists():  # killed, perhaps while it measured
            shutil.rmtree(folder, ignore_errors=True)
        run_script("convert.py", ROOT / config, *COMMON, f"--max_steps={STEPS}", *start,
                   *flags.split(), f"--seed={seed}", f"--out_dir={folder}", "--resume")
        model = folder / "final"
        results.append(json.loads((folder / "result.json").read_text()))
    row = {"name": name, "seed": seed, "config": config, "flags": runs} | results[-1]
    row |= {key: sum(result[key] for result in results) for key in ("minutes", "tokens")}
    row["ar_ppl_before"] = results[0]["ar_ppl_before"]
    if config == BLOCKS:
        row["accepted_behind_16"] = accepted_behind(16, folder)
    return row


def accepted_behind(n, folder):
    """The share of right sentences that a model writes behind the first n tokens, words and full
    stops, of 50 held-out stories of 64."""
    _, stories = train_and_held_out()
    prompts = [re.match(rf"(\s*(\w+|\.)){{{n}}}", story)[0] for story in stories[:50]]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    lines = run_script(
        "sample.py", f"--prompts={folder / 'prompts.txt'}", f"--out_dir={folder}", "--json",
        f"--max_new_tokens={64 - n}", f"--steps={64 - n}", "--device=cpu").splitlines()
    right = []
    for prompt, line in zip(prompts, lines, strict=True):
        right += judge(prompt + json.loads(line)["text"])[prompt.count("."):]
    return sum(right) / len(right)


def main(log, *flags):
    """Run what has no row yet, and append its rows to the log."""
    options = {"seeds": "1,2,3", "jobs": "2", "only": "", "out": "outputs/recipe"}
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        if name not in options:
            sys.exit(f"{flag}: there are --{', --'.join(options)}")
        options[name] = value
    log, out = Path(log), Path(options["out"])
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["name"], row["seed"]) for row in rows}
    todo = [(name, seed) for name in ROWS for seed in seeds
            if options["only"] in name and (name, seed) not in done]
    print(f"{log}: {len(rows)} rows are there, {len(todo)} to run")
    for seed in sorted({seed for _, seed in todo}):  # first, as all rows of a seed start there
        ar_model(seed, out)
    with ThreadPoolExecutor(int(options["jobs"])) as pool:
        for row in pool.map(lambda what: run_row(*what, out), todo):
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['name']}, seed {row['seed']}: eval_nelbo {row['eval_nelbo']:.3f}",
                  flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
