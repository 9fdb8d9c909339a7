"""Tests of what takes more, or less, than one card: several processes, as torchrun starts them,
weights in 16 and in 4 bits. The losses are compared with those of one process in float32.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import bench
import convert
import model_files
import processes
from configurator import UserError
from test_convert import (  # noqa: F401  the fixtures are used by their names
    CPU, HERE, NO_DROPOUT, PAPER, TINY, cases, check_same_losses, convert_main, evaluations,
    go_back, random_lm, rows_of, run, small_settings)

MODES = {
    "whole": "--lm_loss_stages=123",
    "blocks": "--block_size=4 --distill_weight=0.5 --full_mask_share=0.3",
    "adapters": "--block_size=4 --use_lora --stage0_epochs=0 --on_policy_tokens=900",
    "shared": "--block_size=4 --on_policy_tokens=900 --on_policy_share=0.25 --eval_samples=7"}


def command(flags, n, *torchrun):
    """The command line of TINY with more flags, a text, in n processes."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
            *torchrun, str(HERE / "convert.py"), *TINY, NO_DROPOUT, *flags.split()]


def together(flags, n, *torchrun, code=0):
    """Run TINY with more flags in n processes; what they printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(flags, n, *torchrun), capture_output=True, text=True,
                          timeout=300, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def tensors(out):
    """All that a finished run has trained, by file and name."""
    found = {}
    for path in sorted(Path(out, "final").rglob("*.safetensors")):
        found |= {(path.name, name): x for name, x in load_file(path).items()}
    return found


def check_same_run(one, other, tolerance=1e-5):
    """Two runs logged the same figures, and end with the same weights."""
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert a.keys() == b.keys() and a.get("tokens") == b.get("tokens")
        for name in ("loss", "loss_diffusion", "loss_ar", "loss_distill", "grad_norm", "eval_nelbo",
                     "eval_nelbo_sampler", "ar_ppl"):
            near = pytest.approx(b.get(name, 0), rel=tolerance, abs=1e-7)  # a KL is a difference
            assert a.get(name, 0) == near, name
    x, y = tensors(one), tensors(other)
    assert x.keys() == y.keys()
    for name in x:
        assert_close(x[name], y[name], rtol=0, atol=1e-3)  # Adam enlarges what rounding left


# ----------------------------------------------------------------------------------------------
# Several processes
@cases("mode, n, flags", [
    ("whole", 4, "--parallel=ddp"), ("blocks", 4, "--parallel=fsdp"), ("adapters", 2, ""),
    ("adapters", 2, "--parallel=fsdp"), ("shared", 2, "--rank_batch_sizes=3,1")])
def test_losses_and_weights_are_those_of_one_process(run, mode, n, flags):
    steps = f"{MODES[mode]} --max_steps=5 --eval_steps=3"
    run(f"{NO_DROPOUT} {steps}")

    printed = together(f"{steps} --out_dir=several {flags}", n)
    assert printed.count("device: cpu") == 1, "only rank 0 prints"
    check_same_run("out", "several")


@cases("before, after, exact", [
    ("2 ddp", "2 ddp", True), ("2 fsdp", "2 fsdp", True), ("2 fsdp", "", False),
    ("", "2 fsdp", False)])
def test_a_run_goes_on_with_any_number_of_processes(run, before, after, exact):
    steps = "--max_steps=6 --block_size=4 --batch_size=2 --gradient_accumulation_steps=2"

    def start(how, more=""):
        if not how:
            return run(f"{NO_DROPOUT} {steps} {more}")
        n, parallel = how.split()
        return together(f"{steps} --parallel={parallel} {more}", n)

    start(before)
    shutil.copytree("out", "b")
    go_back(5)
    assert "resume: out/checkpoint_5\n" in start(after, "--resume"), "with no changed settings"
    check_same_run("b", "out")
    if exact:
        assert rows_of("b") == rows_of("out")
        for x, y in zip(tensors("b").values(), tensors("out").values(), strict=True):
            assert x.equal(y)


def children(pid):
    """The ids of a process's children, in the order in which they were started."""
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_a_rank_that_dies_is_named_and_a_restart_goes_on_from_the_last_checkpoint(run):
    steps = "--max_steps=60 --save_steps=10 --log_steps=10 --batch_size=2 --eval_steps=60"
    run(f"{NO_DROPOUT} {steps} --gradient_accumulation_steps=2 --out_dir=b")

    started = subprocess.Popen(
        command(f"{steps} --gradient_accumulation_steps=2", 2, "--max-restarts=1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list(Path().glob("out/checkpoint_*")):
        time.sleep(0.05)
    pid = children(started.pid)[1]
    os.kill(pid, signal.SIGKILL)
    printed, _ = started.communicate(timeout=120)
    assert started.returncode == 0, printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"error: rank 1 (process {pid} on " in errors[0], printed
    assert re.search("^resume: out/checkpoint_[1-9]", printed, re.M)
    check_same_run("b", "out")


def test_a_signal_to_torchrun_saves_a_checkpoint_on_all_ranks(run):
    steps = "--max_steps=500 --save_steps=500 --batch_size=2 --gradient_accumulation_steps=2"
    started = subprocess.Popen(command(steps, 2), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while "  1/500" not in started.stdout.readline():
        pass
    started.send_signal(signal.SIGTERM)
    printed = started.communicate(timeout=60)[0]
    assert printed.count("stopping, to be continued") == 1
    assert printed.count("stopped; continue with") == 1
    assert len(list(Path().glob("out/checkpoint_*"))) == 1


@cases("flags, error", [
    ("--batch_siz=3", "--batch_siz: there is no setting 'batch_siz'"),
    ("--batch_size=3 --gradient_accumulation_steps=3", "8 or 10 windows can"),
    ("--dataset_name=no.txt", "there is no 'no.txt'")
])
def test_a_mistake_is_told_once(tmp_path, monkeypatch, flags, error):
    monkeypatch.chdir(tmp_path)
    printed = together(flags, 2, code=1)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and error in errors[0], printed
    assert "convert.py\", line" not in printed, "no traceback of ours"


@cases("sizes, n, shares", [
    ("", 2, [(0, 16, 4), (16, 32, 4)]), ("", 16, [(2 * i, 2 * i + 2, 2) for i in range(16)]),
    ("3,1", 2, [(0, 24, 3), (24, 32, 1)]),
    ("5,2,1", 3, [(0, 20, 5), (20, 28, 2), (28, 32, 1)])])
def test_the_windows_of_a_step_are_shared_out(monkeypatch, small_settings, sizes, n, shares):
    small_settings(batch_size=4, gradient_accumulation_steps=8, rank_batch_sizes=sizes)
    monkeypatch.setattr(processes, "SIZE", n)
    for rank, (start, stop, size) in enumerate(shares):
        monkeypatch.setattr(processes, "RANK", rank)
        assert convert.share_of_step() == (slice(start, stop), size)


@cases("sizes, error", [("3,2", "30 or 35 windows can"), ("3", "needs 2 sizes"), ("a,b", "like"),
                        ("4,0", "1 or more")])
def test_what_cannot_be_shared_out_is_told_with_what_can(monkeypatch, small_settings, sizes, error):
    small_settings(batch_size=4, gradient_accumulation_steps=8, rank_batch_sizes=sizes)
    monkeypatch.setattr(processes, "SIZE", 2)
    with pytest.raises(UserError, match=error):
        convert.share_of_step()


# ----------------------------------------------------------------------------------------------
# Weights in 16 and in 4 bits
def test_weights_in_bfloat16_lose_as_those_in_float32_and_resume_exactly(run):
    steps = "--use_8bit_adam --max_steps=20 --learning_rate=3e-4"
    run(f"{NO_DROPOUT} {steps} --out_dir=b")
    run(f"{NO_DROPOUT} {steps} --weights_dtype=bfloat16")
    check_same_losses(0.01)
    assert all(x.dtype == torch.bfloat16 for (file, _), x in tensors("out").items()
               if file == "model.safetensors")

    before, trained = rows_of("out"), tensors("out")
    go_back(15)
    run(f"{NO_DROPOUT} {steps} --weights_dtype=bfloat16 --resume")
    assert rows_of("out") == before
    for name, x in tensors("out").items():
        assert x.equal(trained[name])


FOUR_BITS = "--model_name=base --model_config= --tokenizer_name=bytes --block_size=4 " \
    "--use_lora --load_in_4bit --stage0_epochs=0"


def four_bit_base():
    """Save a small Llama as base/."""
    random_lm("llama", **PAPER | {"vocab_size": 300}).save_pretrained("base")


def test_adapters_on_4_bits_have_the_gradient_of_the_same_weights_unpacked(tmp_path, monkeypatch):
    from bitsandbytes.functional import dequantize_4bit
    monkeypatch.chdir(tmp_path)
    four_bit_base()
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "auto"}
    ours = {"num_timesteps": 10, "noise_schedule": "linear", "use_time_embedding": False,
            "bidirectional": True, "block_size": 4, "lora": lora}
    monkeypatch.setattr(convert, "load_in_4bit", True)
    torch.manual_seed(0)
    packed, _ = convert.load_model("base", CPU, ours, "bytes")
    for p in packed.adapter_state().values():
        p.data.normal_(std=0.02)
    plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    n_packed = 0
    for name, p in packed.lm.named_parameters():
        if type(p).__name__ == "Params4bit":
            n_packed += 1
            target = plain.get_parameter(name.replace(".base_layer", ""))
            target.data = dequantize_4bit(p.data, p.quant_state).float()
    assert n_packed == 21, "all linear layers"
    plain = convert.DiffusionLM(plain, **ours)
    plain.load_state_dict({k: v for k, v in packed.state_dict().items() if "lora_" in k or
                           k == "mask_embedding"}, strict=False)

    x0 = torch.arange(64).view(2, 32)
    batch = convert.loss_weights(x0, *convert.sample_noise(2, 32, 1, 4), packed)
    gradients = []
    for model in (packed, plain):
        convert.freeze(model, "everything")
        model.eval()
        with torch.no_grad():  # on some CPUs this repacks the weights
            model(x0[:, :1])
        model.train()
        for inputs in convert.forward_passes(batch, 2, model):
            model.loss(**inputs).sum().backward()
        gradients.append([p.grad for p in model.adapter_state().values()])
    assert any(x.abs().max() > 1e-3 for x in gradients[1])
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_a_run_on_4_bits_names_its_base_resumes_exactly_and_is_loaded_with_4_bits(run):
    four_bit_base()
    run(FOUR_BITS)
    assert not Path("out/final/model.safetensors").exists()
    before = rows_of("out")
    assert len({row["ar_ppl"] for row in evaluations("out")}) == 1, "the base is as it was"
    go_back(6)
    run(f"{FOUR_BITS} --resume")
    assert rows_of("out") == before
    lm = convert.load_model("out/final", CPU)[0].lm
    assert sum(type(p).__name__ == "Params4bit" for p in lm.parameters()) == 21


@cases("flags, error", [
    ("--load_in_4bit", "use_lora"),
    (f"{FOUR_BITS} --parallel=fsdp", "parallel=ddp"), ("--weights_dtype=bfloat16", "use_8bit_adam"),
    ("--weights_dtype=bfloat16 --use_8bit_adam --parallel=fsdp", "fsdp"),
    ("--parallel=zero", "fsdp"), ("--model_name=.", "--model_config="),
    ("--weights_dtype=bfloat16 --use_8bit_adam --cpu_offload", "cpu_offload"),
    ("--parallel=fsdp --dtype=float16", "bfloat16")])
def test_what_does_not_go_together_is_one_line_and_exit_2(run, flags, error):
    run(flags, error=error)


def test_on_a_cpu_there_is_nothing_to_offload_and_one_line_says_so(run):
    run(f"{NO_DROPOUT} --max_steps=4 --out_dir=b")
    printed = run(f"{NO_DROPOUT} --max_steps=4 --cpu_offload")
    assert printed.count("cpu_offload: ") == 1
    assert rows_of("out") == rows_of("b")
    printed = together("--max_steps=4 --cpu_offload --parallel=fsdp --out_dir=shares", 1)
    assert printed.count("cpu_offload: ") == 1
    check_same_run("b", "shares")


# ----------------------------------------------------------------------------------------------
# On paper
def test_the_estimate_of_4_bits_is_what_bitsandbytes_keeps(small_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    four_bit_base()
    small_settings(use_lora=True, lora_rank=4, block_size=4, load_in_4bit=True)
    lm, _ = model_files.load_hf("base", "bytes", "", torch.float32, four_bits=CPU)
    taken = sum(p.numel() * p.element_size() for p in lm.parameters())
    for p in lm.parameters():
        if type(p).__name__ == "Params4bit":
            state = p.quant_state
            taken += state.absmax.nbytes + state.state2.absmax.nbytes
    with_base = bench.estimate_memory(lm.config, {}, 0.0)["weights"]
    adapters = bench.estimate_memory(lm.config, {"lora_rank": 8}, 0.0)["weights"] - with_base
    ours = sum(p.numel() for p in bench.model_without_weights(
        lm.config, torch.float32).diffusion_state().values())
    assert (with_base - adapters) * 1e9 - 4 * ours == pytest.approx(taken, rel=0.01)


def test_the_estimate_of_weights_in_16_bits_and_of_shares(small_settings):
    config = random_lm("llama", **PAPER).config

    def estimate(**changes):
        return bench.estimate_memory(config, changes, 0.0)
    full, half = estimate(), estimate(weights_dtype="bfloat16", use_8bit_adam=True)
    for purpose in ("weights", "gradients"):
        assert half[purpose] == pytest.approx(full[purpose] / 2, rel=0.2)  # but ours are in float32
    shares = []
    for n in (1, 2, 4):
        small_settings(parallel="fsdp", n_processes=n)
        shares.append(bench.estimate_step(config, 0.0))
    for one, two in zip(shares, shares[1:], strict=False):
        assert two["weights"] == pytest.approx(one["weights"] / 2)
        assert two["optimizer"] == pytest.approx(one["optimizer"] / 2)
        assert one["total"] / 2 < two["total"] < one["total"]
    assert shares[0]["weights"] == pytest.approx(full["weights"])


def test_cards_get_batches_by_their_speed_that_divide_the_windows(small_settings, monkeypatch):
    monkeypatch.setattr(bench, "estimate_memory", lambda config, changes, gb: {
        "total": 10 + changes["batch_size"]})
    monkeypatch.setattr(bench, "run_tflop", lambda config: 3600 * 320)
    small_settings(batch_size=4, gradient_accumulation_steps=8, cards="48:200,20:120",
                   share_of_peak=0.5)
    found = bench.plan_cards(None, 0.0)
    assert found["rank_batch_sizes"] == "5,3" and found["hours"] == pytest.approx(2)
    for wrong in ("48", "48:0", "nan:1", "48:155,x", "1:1,2:1,3:1,4:1,5:1"):
        small_settings(cards=wrong)
        with pytest.raises(UserError, match="cards: "):
            bench.limit_of_estimate()
    small_settings(batch_size=4, gradient_accumulation_steps=8, cards="48:200,12:120")
    assert bench.plan_cards(None, 0.0)["hours"] is None, "the second has no room for a window"
