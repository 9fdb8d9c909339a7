"""Write adapters that draft as a folder for SGLang's UNO (https://arxiv.org/abs/2609.04010): a
base, untouched, and a plain peft adapter, which that engine adds on the drafted rows alone.

  python convert.py config/smollm2_lora.py
  python sample.py --export=uno --out_dir=outputs/smollm2_lora_diffusion
"""
import json
import os
import shutil
from pathlib import Path

from configurator import RunError, UserError, errors_as

# the layers in which the engine can add an adapter (srt/speculative/uno_lora.py of SGLang 0.5.23)
LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
CARD = """---
base_model: {base}
library_name: peft
tags: [uno, speculative-decoding]
---
# A drafter for {base}

The base stays as it is. The adapter acts on drafted rows alone: the last token, then {drafts}
random tokens, causal, give {drafts} drafts beyond the next token. The base checks them, so the text
is what the base writes without them. On an NVIDIA GPU, in this folder:

```
python -m sglang.launch_server --model-path {path} \\
  --speculative-algorithm UNO --uno-lora-path ./adapter \\
  --speculative-num-draft-tokens {block_size}
```
"""


def check_drafter(model, copy):
    """Raise UserError for a model that the engine would not run as it was trained."""
    mistakes = {
        "adapters on a frozen base; train with --use_lora": not model.adapters,
        "blocks; train with --block_size=4": not model.block_size,
        "random tokens as noise; train with --noise=uniform --use_time_embedding=false":
            model.noise != "uniform",
        "causal drafts; train with --causal_blocks": not model.causal_blocks,
        "no copy of a base in 4 bits; leave --export_copy out":
            copy and model.adapters and model.base and model.base.get("load_in_4bit"),
    }
    for need, lacks in mistakes.items():
        if lacks:
            raise UserError(f"export: uno needs {need}")
    names = {name for _, name, _ in model.adapters}
    if names - LAYERS:
        raise UserError(f"export: uno adapts {', '.join(sorted(LAYERS))}, not "
                        f"{', '.join(sorted(names - LAYERS))}; name others with --lora_targets")
    if names & {"k_proj", "v_proj"} and "q_proj" not in names:
        raise UserError("export: uno adapts k_proj or v_proj only with q_proj; add it to "
                        "--lora_targets")


def write_base(model, tokenizer, folder, copy):
    """Put the base into a folder: a link to its own, or a copy. A base from the hub stays there:
    returns how the engine finds it, else None."""
    name = model.base["name"] if model.base else ""
    if model.base and model.base["revision"] and not copy:
        return f"{name} --revision {model.base['revision']}"
    if name and Path(name).is_dir() and not copy:
        os.symlink(name, folder, target_is_directory=True)
    elif name and Path(name).is_dir():
        shutil.copytree(name, folder)
    else:  # of a .gguf file, which the engine would run otherwise, or of no place of its own
        with model.original_model() as lm:
            lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return None


def export_uno(model, tokenizer, final, copy=False):
    """Write uno/ beside a result's folder final/, base/ and adapter/ in it, entirely or not at all.

    copy: of the base, where a link to it would do. Returns the folder. UserError if the engine
    would not run the model as it was trained.
    """
    check_drafter(model, copy)
    folder = final.parent / "uno"
    if os.path.lexists(folder):
        raise UserError(f"export: {folder} is there already; move it away")
    with errors_as(f"export: {final / 'adapter/adapter_config.json'} is damaged"):
        config = json.loads((final / "adapter/adapter_config.json").read_text())
    temporary = final.parent / ".uno.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with errors_as(f"export: cannot write {folder}", RunError):
            temporary.mkdir()
            on_hub = write_base(model, tokenizer, temporary / "base", copy)
            shutil.copytree(final / "adapter", temporary / "adapter")
            settings = temporary / "adapter/adapter_config.json"
            config["target_modules"] = sorted({name for _, name, _ in model.adapters})
            settings.write_text(json.dumps(config, indent=1))
            card = CARD.format(
                base=config["base_model_name_or_path"], drafts=model.block_size - 1,
                path=on_hub or "./base", block_size=model.block_size)
            (temporary / "README.md").write_text(card)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
