"""A run around its training: what is asked for, its log file, its state, its checkpoints.

Functions that need settings are given them as s, a namespace of all settings of convert.py.
"""
import fcntl
import json
import os
import shutil
import sys
import time
from collections import deque
from pathlib import Path

import torch
import transformers

import processes
from configurator import UserError, check_value, errors_as, first_line
from model_files import (
    checkpoints, is_intact, our_tensors, recover, save_folder, whole_tensors)
from terminal import evaluations_due, training_bar


# ----------------------------------------------------------------------------------------------
# What is asked for, and the log
def check_settings(s):
    """Raise UserError for settings that contradict one another."""
    causal, own_text = not s.use_bidirectional_attention, s.on_policy_tokens > 0
    n_windows = s.batch_size * s.gradient_accumulation_steps
    mistakes = {
        "distill_weight: needs a block_size": s.distill_weight and not s.block_size,
        "full_mask_share: needs a block_size": s.full_mask_share and not s.block_size,
        "causal_blocks: needs a block_size": s.causal_blocks and not s.block_size,
        "noise: uniform tells no masked token from others, so nothing can have the time embedding; "
        "add --use_time_embedding=false": s.noise == "uniform" and s.use_time_embedding,
        "block_size: needs use_bidirectional_attention": s.block_size and causal,
        "use_lora: needs use_bidirectional_attention": s.use_lora and causal,
        "block_size: 1 is the AR model; take 0 (the whole window) or more": s.block_size == 1,
        f"block_size: {s.block_size} does not divide max_seq_length, {s.max_seq_length}":
            s.block_size and s.max_seq_length % s.block_size,
        f"lm_loss_stages: stages in a row, as 3 or 123, not '{s.lm_loss_stages}'":
            not set(s.lm_loss_stages) <= set("123"),
        "diffusion_loss_weight: 0 leaves nothing to train for use_lora or on_policy_tokens":
            not s.diffusion_loss_weight and (s.use_lora or own_text),
        "diffusion_loss_weight: 0 needs an lm_loss_weight":
            not s.diffusion_loss_weight and not s.lm_loss_weight,
        "on_policy_share: on its own text alone the AR model would forget; take less than 1, as "
        "--on_policy_share=0.25, or --use_lora":
            own_text and s.on_policy_share == 1 and not s.use_lora,
        "on_policy_share: one window cannot be shared; take more gradient_accumulation_steps":
            own_text and s.on_policy_share < 1 and n_windows == 1,
        "own_prompts: are for the model's own text; add --on_policy_tokens=...":
            s.own_prompts and not own_text,
        "use_lora: the AR model is frozen, it cannot be pre-trained; set --stage0_epochs=0":
            s.use_lora and s.stage0_epochs,
    }
    for mistake, made in (mistakes | mistakes_in_memory(s)).items():
        if made:
            raise UserError(mistake)
    if s.rank_batch_sizes and processes.SIZE == 1:
        print("rank_batch_sizes: there is one process, which takes batch_size windows")
    if s.use_lora and s.stage3_epochs:
        print("use_lora: the AR model is frozen, there is nothing to recover: stage 3 is diffusion")


def mistakes_in_memory(s):
    """{mistake: whether it is made} among settings of memory and of several processes."""
    return {
        "load_in_4bit: such weights cannot be trained; add --use_lora":
            s.load_in_4bit and not s.use_lora,
        "load_in_4bit: 4-bit weights cannot be sharded; take --parallel=ddp":
            s.load_in_4bit and s.parallel == "fsdp",
        "weights_dtype: with use_lora nothing but adapters trains, in float32; leave it out":
            s.use_lora and s.weights_dtype != "float32",
        "weights_dtype: bfloat16 needs use_8bit_adam, which rounds them stochastically":
            s.weights_dtype == "bfloat16" and not s.use_8bit_adam,
        "weights_dtype: bfloat16 trains with dtype bfloat16 or float32":
            s.weights_dtype == "bfloat16" and s.dtype == "float16",
        "weights_dtype: bfloat16 not with parallel=fsdp, whose shares are small; take float32":
            s.weights_dtype == "bfloat16" and s.parallel == "fsdp",
        "cpu_offload: not with weights_dtype=bfloat16; take one of them":
            s.cpu_offload and s.weights_dtype == "bfloat16",
        "dtype: float16 not with parallel=fsdp; take bfloat16":
            s.dtype == "float16" and s.parallel == "fsdp",
        f"model_config: its weights are random, so model_name, '{s.model_name}', would not be "
        "loaded; add --model_config= --tokenizer_name= --stage0_epochs=0":
            s.model_config and Path(s.model_name).exists(),
        "auto_memory: not with several processes": s.auto_memory and processes.SIZE > 1,
    }


def open_log(out, s, state, stages, limit_gb):
    """The log of a run: its file, locked, the bar, Weights & Biases. UserError if another run has
    the lock."""
    file = open_log_file(out, state) if processes.RANK == 0 else open(os.devnull, "a")
    steps = sum(stage["steps"] for stage in stages)
    use = s.use_wandb and processes.RANK == 0
    return {"file": file, "bar": training_bar(state["total"], steps),
            "wandb": start_wandb(s, state) if use else None,
            "steps": steps, "pretraining_steps": stages[0]["steps"],
            "evaluations": evaluations_due(stages, s.eval_steps),
            "seconds": [], "last_steps": deque(maxlen=50), "last_evaluations": deque(maxlen=5),
            "limit_gb": limit_gb, "tell_hours": s.device == "auto", "cut": False}


def open_log_file(out, state):
    """training_logs.jsonl of open_log(); what a killed save left in out is removed."""
    with errors_as(f"out_dir: cannot write to '{out}'"):
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "training_logs.jsonl", "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
    except BlockingIOError:
        raise UserError(f"out_dir: another run writes to {out}; take another --out_dir") from None
    for pattern in (".checkpoint_*.tmp", ".final.tmp", ".untouched.tmp"):  # of a killed save
        for leftover in out.glob(pattern):
            shutil.rmtree(leftover)
    if not state["total"] and file.tell():
        shutil.copy(file.name, f"{file.name}.{time.time_ns()}")
    return file


def cut_back(log, state):
    """Cut the file of a log back to the moment of the checkpoint, as what was logged later comes
    again. Once."""
    if processes.RANK == 0 and not log["cut"]:
        log["file"].truncate(min(state["log_bytes"], log["file"].tell()))
    log["cut"] = True


def start_wandb(s, state):
    """A run of Weights & Biases, at a resume the same; None, with a line, if it is out of reach."""
    try:
        import wandb
    except ImportError:
        raise UserError("use_wandb: the package is not installed: pip install wandb") from None
    try:
        run = wandb.init(project=s.wandb_project, id=state["wandb_id"] or None, resume="allow",
                         config=vars(s))
    except (wandb.Error, OSError) as error:
        print(f"use_wandb: goes on without: {first_line(error)}")
        return None
    state["wandb_id"] = run.id
    return run


def write_whole(path, text):
    """Write a file of text, so that a kill or a full disk leaves a whole one, or the one before."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.write_text(text, "utf-8", "replace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------
# Checkpoints
def save(out, name, model, tokenizer, s, ours, state, log, training=None, own_text=None):
    """Save a checkpoint, or final/ without training {"optimizer", "scaler"}; remove old ones.
    ours: the arguments of DiffusionLM after lm."""
    state["log_bytes"] = log["file"].tell()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    record = {"model": ours, "max_seq_length": s.max_seq_length, "state": state,
              "settings": vars(s), "versions": versions}
    if training:
        training = {"optimizer": processes.gathered_optimizer(training["optimizer"]),
                    "scaler": training["scaler"].state_dict(),
                    "own_text": {name: torch.from_numpy(x) for name, x in own_text.items()}}
    tensors = whole_tensors(model)

    def write():
        save_folder(out / name, model, tokenizer, record, training, tensors)
        for old in checkpoints(out)[s.keep_checkpoints:]:
            shutil.rmtree(old)
    processes.from_rank_0(write)


def load_training(checkpoint_dir, s, state, model):
    """(The states of optimizer and scaler, on-policy text) of a checkpoint, if there is one.
    UserError if it is of another version, or its 8-bit optimizer of another kind."""
    sharded = processes.is_sharded(model)
    if not checkpoint_dir:
        state["sharded"] = sharded
        return None, {}
    if s.use_8bit_adam and state["sharded"] != sharded:
        flag = "--parallel=fsdp" if state["sharded"] else "--parallel=ddp"
        raise UserError(f"parallel: the 8-bit optimizer in {checkpoint_dir} goes on with {flag}")
    if s.use_8bit_adam and (sharded or s.weights_dtype == "bfloat16"):
        import torchao.optim  # noqa: F401  its states can be loaded once it is imported
    state["sharded"] = sharded
    with errors_as(f"checkpoint: {checkpoint_dir} is of another version"):
        saved = torch.load(checkpoint_dir / "training.pt", map_location="cpu")
        kept = saved["own_text"] if s.on_policy_tokens else {}
        return saved, {k: x.numpy() for k, x in kept.items() if x.shape[1] == s.max_seq_length}


def try_to_save(model, out, s, checkpoint_dir):
    """Save the model as it came and remove it again: what cannot be saved shows before the work."""
    if model.base or checkpoint_dir or s.dry_run:  # is not saved, or was saved before
        return
    with errors_as(f"out_dir: cannot write to '{out}'"):
        out.mkdir(parents=True, exist_ok=True)
    folder = out / ".untouched.tmp"
    try:
        with errors_as("model_name: this model cannot be saved"), model.original_model() as lm:
            lm.save_pretrained(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_state(s):
    """The state of a run at its start: all that a resume needs beside weights, optimizer and
    scaler."""
    return {"stage": 0, "step": 0, "total": 0, "tokens": 0, "loss_parts": [], "skipped_in_a_row": 0,
            "micro_batch": s.batch_size, "eval_micro_batch": s.batch_size, "sharded": False,
            "checkpointing": s.use_gradient_checkpointing, "adam_8bit": s.use_8bit_adam,
            "ar_ppl_before": None, "log_bytes": 0, "wandb_id": "", "data": 0, "skipped": 0,
            "data_report": {}, "less_memory": []}


def find_checkpoint(out, s, allowed):
    """(state, the checkpoint to continue from or None); UserError rather than write over a run."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out_dir: '{out}' is a file")
    if not s.dry_run:
        recover(out)
    finished, newest_first = (out / "final").exists(), checkpoints(out)
    go_on, chosen = s.resume, s.checkpoint
    if processes.RESTARTS:  # by torchrun: out_dir is this run's own
        go_on, chosen = True, ""
    if go_on and not chosen and finished:
        print(f"this run is finished: {out}/final; --out_dir=... starts another")
        sys.exit(0)
    here = chosen and Path(chosen).absolute().parent == out.absolute()
    if (finished or newest_first) and not (here or s.dry_run or go_on and not chosen):
        raise UserError(f"out_dir: {out} holds a run; --resume continues it, --out_dir=... starts "
                        "another")
    for source in [Path(chosen)] if chosen else newest_first if go_on else []:
        if is_intact(source):
            break
        if chosen:
            why = "not intact" if source.exists() else "not there"
            raise UserError(f"checkpoint: '{chosen}' is {why}")
        print(f"{source} is damaged, so the one before it is used")
        if not s.dry_run:  # renamed, or it would count among those to keep
            source.rename(out / f"damaged_{source.name}_{time.time_ns()}")
    else:
        if go_on:
            print(f"resume: no checkpoint in {out}, so from the start")
        return new_state(s), None
    record, settings = read_record(source, s, allowed), dict(vars(s))
    if here and any(int(p.name[11:]) > record["state"]["total"] for p in newest_first):
        raise UserError(f"checkpoint: {out} goes on to later ones; --out_dir=... branches off here")
    compare_settings(source, record, settings)
    state = new_state(s) | record["state"]
    return state | {"micro_batch": min(s.batch_size, state["micro_batch"])}, source


def compare_settings(source, record, settings):
    """Print what is no longer as it was in the run of a checkpoint; UserError for what may not
    change."""
    for name in ("use_8bit_adam", "dtype", "weights_dtype"):
        if record["settings"].get(name, settings[name]) != settings[name]:
            raise UserError(f"{name}: the optimizer in {source} was made with another; keep that, "
                            f"or start from its weights, with --model_name={source}")
    offload = record["settings"].get("cpu_offload", False), settings["cpu_offload"]
    if len(set(offload)) == 2 and not settings["use_8bit_adam"]:
        raise UserError(f"cpu_offload: 32-bit states in {source} are of another kind; keep "
                        f"--cpu_offload={offload[0]}")
    for name in ("resume", "checkpoint", "out_dir", "dry_run", "cache_dir", "save_steps",
                 "log_steps", "eval_steps", "keep_checkpoints", "sample_prompt", "use_wandb",
                 "wandb_project", "max_memory_gb", "auto_memory", "parallel", "rank_batch_sizes",
                 "cpu_offload"):
        settings.pop(name)  # may change
    before = settings | record["settings"]  # a newer version has more of them
    changed = [f"{name} {before[name]!r} -> {value!r}"
               for name, value in settings.items() if before[name] != value]
    note = f"; no longer the run it was: {', '.join(changed)}" if changed else ""
    print(f"resume: {source}{note}")


def read_record(folder, s, allowed):
    """diffusion.json of a folder that save_folder() wrote. allowed: of configure()."""
    with errors_as(f"'{folder}' holds no diffusion model"):
        record = json.loads((Path(folder) / "diffusion.json").read_text())
        for key in ("model", "max_seq_length", "settings", "state", "versions"):
            record[key]  # all that is needed is there
        state = new_state(s) | record["state"]
        if any(type(state[k]) is not type(v) for k, v in new_state(s).items() if v is not None):
            raise ValueError("its state is of another version")
        values = record["model"] | {"max_seq_length": record["max_seq_length"]}
        for name in vars(s).keys() & values:
            check_value(name, values[name], vars(s), allowed.get(name), folder)
        if not record["model"].pop("logit_shift", True):  # of an older version
            raise ValueError("logit_shift=False is no longer supported")
        return record


def check_disk(model, out, s, trained):
    """The disk, in GB, that the coming checkpoints and final/ take; UserError if it is not free.
    trained: how many parameters have states of the optimizer."""
    saved = [p for part in our_tensors(model).values() for p in part.values()]
    if not model.base:
        saved = model.parameters()
    weights = sum(p.numel() * p.element_size() for p in saved)
    n = s.keep_checkpoints + 1 - len(checkpoints(out))  # one more before an old one goes
    needed = weights + n * (weights + trained * (2 if s.use_8bit_adam else 8))
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    if needed > free:
        raise UserError(f"out_dir: {free / 1e9:.1f} GB of disk are free, keep_checkpoints="
                        f"{s.keep_checkpoints}, one more and final/ need {needed / 1e9:.1f}")
    return needed / 1e9
