"""The faults: what a run does when it is killed, when the disk is full, when its files are damaged.

Each row of assets/faults.md is a fault that these tests make and the outcome that they see. pytest
makes most of them; FAULTS=all pytest test_faults.py makes all and writes the page.
"""
import contextlib
import datetime
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import configurator
import convert
import corpus
import model_files
import own_text
import processes
from test_convert import (
    HERE, NO_DROPOUT, TINY, cases, check_same_losses, in_process, many, quoted,
    random_lm, rows_of, small_config, weights)

ALL = os.environ.get("FAULTS") == "all"
PAGE = HERE / "assets/faults.md"
FLAGS = [*TINY, NO_DROPOUT, *"""--on_policy_tokens=2500 --on_policy_share=0.25 --batch_size=2
    --gradient_accumulation_steps=2 --keep_checkpoints=9""".split()]
FAULTS, SEEN = [], {}  # the faults in the order of the page; the row of each that was made


def faults(names, slow=False):
    """Give a test these faults, one at a time: each is a row of the page. slow: not by default."""
    FAULTS.extend(names)
    skip = pytest.mark.skipif(slow and not ALL, reason="FAULTS=all makes all faults")
    return cases("fault", [pytest.param(name, marks=skip) for name in names])


# ----------------------------------------------------------------------------------------------
# Runs with a fault inside
def after(module, name, number, act, of=lambda *args: True):
    """Patch a function so that act() follows its call of this number, among those of(*args)."""
    real, calls = getattr(module, name), itertools.count(1)

    def patched(*args, **kwargs):
        found = real(*args, **kwargs)
        if of(*args) and next(calls) == number:
            act()
        return found
    setattr(module, name, patched)


def at(phase, act):
    """Patch the program so that act() is called once, in the midst of a phase."""
    if phase == "starting":
        act()
    elif phase == "planning":  # all is loaded, and nothing written
        after(convert, "set_up_model", 1, act)
    elif phase == "tokenising":  # the windows are on the disk, but not their number
        after(corpus.zlib, "crc32", 2, act)
    elif phase == "writing own text":  # half of a batch is on the disk
        append, calls = own_text.append_windows, itertools.count(1)

        def in_two_parts(path, windows):
            append(path, windows[:9])
            if next(calls) == 2:
                act()
            append(path, windows[9:])
        own_text.append_windows = in_two_parts
    elif phase == "training":  # between the backward pass and the update
        after(convert.nn.utils, "clip_grads_with_norm_", 8, act)
    elif phase == "evaluating":
        after(convert, "generate", 3, act)
    elif phase == "saving a checkpoint":  # all its files are there, but it has no name yet
        after(model_files, "checksums", 3, act, lambda path: path.name.startswith(".checkpoint"))
    elif phase == "exporting final":
        after(model_files, "checksums", 1, act, lambda path: path.name.startswith(".final"))
    elif phase == "starting to export final":
        after(convert, "evaluate_and_log", 1, act, lambda *args: args[5]["total"] == 12)


PHASES = ["tokenising", "writing own text", "training", "evaluating", "saving a checkpoint",
          "exporting final"]


def kill(victims):
    """kill -9 some ranks of a run, unless this is a later start of it."""
    if Path("killed").exists():
        return
    Path("killed").touch()
    pids = [pid for _, pid in processes.members] or [os.getpid()]
    for rank in sorted(victims, reverse=True):  # its own last
        os.kill(pids[rank], 9)


def wait(_):
    """Stop a run until it is told to go on."""
    Path("waiting").touch()
    while not Path("go").exists():
        time.sleep(0.01)


def fill_disk(size):
    """From here on no file gets larger than this, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk_of_log(_):
    """From here on there is no room for another row of the log."""
    for link in Path("/proc/self/fd").iterdir():
        if "training_logs" in os.readlink(link):
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(link.name))
            return


def become_nobody(_):
    """From here on another user's folders can be read at most."""
    if os.geteuid() == 0:
        os.seteuid(65534)


def child(folder, argv, phase, act, value):
    """A run in a process of its own, where act(value) is called in the midst of a phase."""
    os.chdir(folder)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    at(phase, lambda: act(value))
    sys.argv = ["convert.py", *argv]
    configurator.run(convert.main)


@pytest.fixture(scope="module")
def fork():
    """Starts runs in processes that have imported everything, but not yet done anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    with contextlib.chdir(HERE):
        forkserver.ensure_running()

    def start(folder, *flags, phase="", act=print, value=None):
        argv = [*FLAGS, *map(str, flags)]
        process = context.Process(target=child, daemon=True, args=(
            folder, argv, phase, act, value))
        process.start()
        return process
    return start


def ended(process, folder="."):
    """Wait for a process of fork(): (code, out, err)."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, *((Path(folder) / x).read_text() for x in ("stdout", "stderr"))


@pytest.fixture(scope="module")
def whole(fork, tmp_path_factory):
    """The folder of a run without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(fork(folder), folder)[0] == 0
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, whole):
    """Runs with more flags, in this process, on data that is tokenised: (code, out, err)."""
    in_folder = contextlib.contextmanager(in_process)
    with in_folder(convert, monkeypatch, tmp_path, capsys) as call:
        yield lambda *flags: call(*FLAGS, f"--cache_dir={whole}/model_cache", *flags)


def torchrun(folder, *flags, fault="", restarts=0):
    """A run of two processes, with a fault as "rank 0 while training": (code, out, err)."""
    script = HERE / ("test_faults.py" if fault else "convert.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", script, *FLAGS, *flags]
    environment = os.environ | {"FAULT": fault, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=180,
                          env=environment)
    return done.returncode, done.stdout, done.stderr


VICTIMS = {"rank 0": [0], "rank 1": [1], "both ranks": [0, 1]}


def rank_with_fault(fault):
    """A process that torchrun started; rank 0 makes the fault, also that of another rank."""
    who, _, phase = fault.partition(" while ")
    if who in VICTIMS and processes.RANK == 0:
        at(phase, lambda: kill(VICTIMS[who]))
    elif fault == "a wrong setting" and processes.RANK == 1:
        sys.argv.append("--batch_size=0")
    configurator.run(convert.main, processes.RANK, processes.lost)


# ----------------------------------------------------------------------------------------------
# What is seen
def told(result, word="", code=0):
    """What a run says, with its exit code: its error, if any, else the line with this word.

    Checks that this is the code, and that the error is one line, without a traceback.
    """
    found, out, err = result
    assert found == code and "Traceback" not in out + err, (found, out[-3000:], err[-3000:])
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code > 0), err
    if word:
        lines = [line for line in lines or (out + err).splitlines() if word in line]
        assert lines, out + err
    return f"exit {found}" + "".join(f": `{shortened(line)}`" for line in lines[:1])


def shortened(line):
    """A line without what differs from run to run and from machine to machine."""
    line = re.sub(r"(?<![\w.])/\S*/", "", line).replace(socket.gethostname(), "H")
    line = re.sub(r"(?<=process )\d+", "N", re.sub(r"tokens-[\w.]+", "tokens-...", line))
    line = line.replace("|", "/").replace("`", "'")
    return line if len(line) <= 150 else f"{line[:147]}..."


def see(fault, *outcomes, times=1, lost="nothing"):
    """Note a row of the page."""
    SEEN[fault] = f"| {fault} | {times} | {'; then '.join(outcomes)} | {lost} |"


def check_whole(whole, out="out"):
    """Nothing was lost: the log is that of a run without a fault, and so are the weights."""
    assert rows_of(out) == rows_of(whole / "out")
    assert weights(f"{out}/final") == weights(whole / "out/final")
    assert not list(Path(out).glob(".*"))


def resumed(result):
    """What a run without a further fault did after one, in words."""
    told(result)
    if "this run is finished" in result[1]:
        return "nothing is left to resume"
    found = re.search("resume: (?:out/(checkpoint_[0-9]+)|no checkpoint)", result[1])
    return f"a resume from {found[1] or 'the start'} ends well"


@pytest.fixture(scope="module", autouse=True)
def page():
    """Writes the page, if all faults were made and ended as they should."""
    yield
    if not ALL or set(SEEN) != set(FAULTS):
        return
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    rows = "\n".join(SEEN[fault] for fault in FAULTS)
    PAGE.write_text(f"""# Faults that were made, and how they ended

Back to the [README](../README.md). `FAULTS=all pytest test_faults.py` makes each of these faults in
a small run on a CPU, checks how it ends, and writes this page from what it sees; `pytest` makes
most of them. Two processes are those of torchrun. Nothing is lost if the log and the weights, after
a resume, are those of a run without the fault, or if the run is refused before it writes. Written
on {datetime.date.today()} with {versions}, Python {sys.version.split()[0]}.

<!-- faults -->
| fault | times | outcome | lost |
|---|---|---|---|
{rows}
<!-- end -->
""")


def test_the_page_has_a_row_for_each_fault():
    rows = quoted(PAGE, "faults").splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == FAULTS


# ----------------------------------------------------------------------------------------------
# Kills
@faults([f"kill -9 while {phase}" for phase in PHASES])
def test_a_run_killed_in_any_phase_goes_on_to_the_same_log(fork, run, whole, tmp_path, fault):
    cache = [] if "tokenising" in fault else [f"--cache_dir={whole}/model_cache"]
    phase = fault.removeprefix("kill -9 while ")
    assert ended(fork(tmp_path, *cache, phase=phase, act=kill, value=[0]))[0] == -9
    outcome = resumed(run("--resume", *cache or ["--cache_dir=model_cache"]))
    check_whole(whole)
    see(fault, "exit -9", outcome)


@faults(["kill -9 at random moments"], slow=True)
def test_thirty_kills_at_random_moments_change_no_row(fork, run, whole, tmp_path, fault):
    longer = "--max_steps=200", "--save_steps=9", "--resume", f"--cache_dir={whole}/model_cache"
    told(run(*longer, "--out_dir=never_killed"))
    dice, kills = random.Random(time.time_ns()), 0

    def check():
        assert "finished" in run(*longer)[1]
        assert rows_of("out") == rows_of("never_killed")
        assert weights("out/final") == weights("never_killed/final")

    while kills < 30:
        process = fork(tmp_path, *longer)
        process.join(dice.uniform(0.2, 2.5))
        process.kill()
        if ended(process)[0] == -9:
            kills += 1
        else:  # it came to its end: another is begun
            check()
            shutil.rmtree("out")
    outcome = resumed(run(*longer))
    check()
    see(fault, "exit -9", outcome, times=kills)


def told_by_torchrun(result, code=1):
    """told() of two processes, or whom torchrun names, in words; torchrun has its own traceback."""
    found, _, err = result
    assert found == code and not re.search(r"\[rank\d\]: *Traceback", err), err
    assert err.count("Traceback (") == ("ChildFailedError" in err), err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1, err
    if lines:
        return f"exit {found}: `{shortened(lines[0])}`"
    first = re.search(r"Root Cause.*?rank *: (\d).*?exitcode *: (-?\d+)", err, re.S)
    return f"exit {found}: torchrun names rank {first[1]}, exit {first[2]}"


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """The folder of a run of two processes without a fault."""
    folder = tmp_path_factory.mktemp("two")
    assert torchrun(folder)[0] == 0
    return folder


@faults([f"kill -9 of {who} of two while {phase}" for phase in PHASES for who in VICTIMS],
        slow=True)
def test_two_processes_killed_in_any_phase_go_on_to_the_same_log(whole_of_two, tmp_path, fault,
                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    what = fault.removeprefix("kill -9 of ").replace(" of two", "")
    outcome = told_by_torchrun(torchrun(".", fault=what))
    again = torchrun(".", "--resume")
    check_whole(whole_of_two)
    see(fault, outcome, resumed(again))


@faults(["one of two processes dies, and torchrun may start them again"])
def test_a_rank_that_dies_is_named_and_a_restart_goes_on(whole, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    start = time.time()
    code, out, err = torchrun(".", f"--cache_dir={whole}/model_cache", restarts=1,
                              fault="rank 1 while training")
    assert code == 0 and "rank 1 (process" in err and time.time() - start < 60, err
    check_same_losses(1e-3, "out", whole / "out")
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    see(fault, f"`{shortened(line)}`", f"exit {code}, {resumed((code, out, ''))}")


@faults(["a wrong setting, of two processes", "a wrong setting, of one of two processes"],
        slow=True)
def test_a_mistake_of_two_processes_is_told_once(tmp_path, fault):
    if "one of" in fault:
        result = torchrun(tmp_path, fault="a wrong setting")
    else:
        result = torchrun(tmp_path, "--batch_size=0")
    outcome = told_by_torchrun(result)
    assert "batch_size must be from 1" in outcome and not (tmp_path / "out").exists()
    see(fault, outcome)


# ----------------------------------------------------------------------------------------------
# Disks and folders
FULL = {  # fault: phase, what happens then, the most bytes in a file, a word of the error
    "a full disk while tokenising": ("starting", fill_disk, 20000, "train.bin"),
    "a full disk while writing own text": ("writing own text", fill_disk, 9000, "on_policy"),
    "a full disk while a row is logged": ("training", fill_disk_of_log, 0, "training_logs.jsonl"),
    "a full disk while saving a checkpoint": ("training", fill_disk, 40000, "checkpoint_9"),
    "a full disk while exporting final": ("starting to export final", fill_disk, 40000, "final")}


@faults(FULL)
def test_a_full_disk_is_one_line_and_a_resume_goes_on(fork, run, whole, tmp_path, fault):
    phase, act, value, word = FULL[fault]
    cache = "--cache_dir=model_cache" if phase == "starting" else f"--cache_dir={whole}/model_cache"
    result = ended(fork(tmp_path, cache, phase=phase, act=act, value=value))
    outcome = told(result, word, 1)
    assert all(model_files.is_intact(p) for p in model_files.checkpoints(Path("out")))
    again = resumed(run("--resume", cache))
    check_whole(whole)
    see(fault, outcome, again)


@faults(["an out_dir under a file", "a read-only out_dir"])
def test_an_out_dir_that_cannot_be_written_is_one_line(fork, whole, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    tmp_path.chmod(0o755)  # of which others see the folder
    Path("folder").mkdir(0o555)
    out, act = ("file/out", print) if "file" in fault else ("folder/out", become_nobody)
    cache = f"--cache_dir={whole}/model_cache"
    see(fault, told(ended(fork(tmp_path, cache, f"--out_dir={out}", phase="planning", act=act)),
                    f"out_dir: cannot write to '{out}'", 2))


@faults(["two runs in one out_dir at the same time"])
def test_of_two_runs_in_one_out_dir_the_second_is_refused(fork, run, whole, tmp_path, fault):
    process = fork(tmp_path, f"--cache_dir={whole}/model_cache", phase="training", act=wait)
    while not Path("waiting").exists() and process.is_alive():
        time.sleep(0.01)
    outcomes = [told(run(), "holds a run", 2), told(run("--resume"), "another run", 2)]
    Path("go").touch()
    told(ended(process))
    check_whole(whole)
    see(fault, *outcomes, times=2)


# ----------------------------------------------------------------------------------------------
# Checkpoints
class Bomb:
    """In a pickle, it makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder):
    for path in folder.iterdir():
        path.write_bytes(b"")


def replace(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(99999))


DAMAGES = {
    "model.safetensors of a checkpoint is cut off":
        lambda folder: os.truncate(folder / "model.safetensors", 50000),
    "training.pt of a checkpoint is cut off":
        lambda folder: os.truncate(folder / "training.pt", 50000),
    "a bit of model.safetensors is flipped":
        lambda folder: flip_a_bit(folder / "model.safetensors"),
    "a bit of training.pt is flipped": lambda folder: flip_a_bit(folder / "training.pt"),
    "all files of a checkpoint are empty": empty,
    "SHA256SUMS of a checkpoint is no text":
        lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\xfe" * 99),
    "a checkpoint holds files of something else": replace,
    "a checkpoint is a file": lambda folder: (shutil.rmtree(folder), folder.touch())}


def killed_before_the_end(whole):
    """Copy a run here, without its final/; its newest checkpoint."""
    shutil.copytree(whole / "out", "out")
    shutil.rmtree("out/final")
    return Path("out/checkpoint_12")


@faults([*DAMAGES, "all checkpoints are damaged"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, whole, fault):
    newest = killed_before_the_end(whole)
    damaged = [newest] if fault in DAMAGES else model_files.checkpoints(Path("out"))
    for folder in damaged:
        DAMAGES.get(fault, empty)(folder)
    result = run("--resume")
    outcome = told(result, "damaged")
    check_whole(whole)
    assert len(list(Path("out").glob("damaged_*"))) == len(damaged)
    see(fault, outcome, resumed(result), times=len(damaged))


def edit(path, change):
    """Change what is in diffusion.json or training.pt."""
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else torch.load(path)
    change(content)
    path.write_text(json.dumps(content)) if is_json else torch.save(content, path)


def make_newer(folder):
    def change(record):
        for part in (record, record["settings"], record["state"], record["model"]):
            part["of_a_newer_version"] = [1]
    edit(folder / "diffusion.json", change)
    edit(folder / "training.pt", lambda saved: saved.update(new=[1]))
    (folder / "newer.json").write_text("{}")


SIGNED = {  # fault: change, exit code, a word of what is said
    "a checkpoint of a newer version has more settings, keys and files":
        (make_newer, 0, "resume: "),
    "a state in diffusion.json is a list":
        (lambda x: edit(x / "diffusion.json", lambda record: record.update(state=[])), 2,
         "no diffusion model"),
    "a state in diffusion.json lacks its type":
        (lambda x: edit(x / "diffusion.json", lambda record: record["state"].update(step="3")), 2,
         "state"),
    "training.pt is a list": (lambda x: torch.save([1], x / "training.pt"), 2, "version"),
    "training.pt lacks the optimizer":
        (lambda x: edit(x / "training.pt", lambda saved: saved.pop("optimizer")), 2, "optimizer"),
    "training.pt has an optimizer of another model":
        (lambda x: edit(x / "training.pt", lambda saved: saved["optimizer"].update(
            param_groups=saved["optimizer"]["param_groups"][:1])), 2, "optimizer"),
    "training.pt is a pickle that runs code":
        (lambda x: torch.save({"optimizer": Bomb()}, x / "training.pt"), 2, "version"),
    "training.pt is a plain pickle that runs code":
        (lambda x: (x / "training.pt").write_bytes(pickle.dumps(Bomb())), 2, "version"),
    "diffusion.safetensors of a checkpoint is a pickle that runs code":
        (lambda x: (x / "diffusion.safetensors").write_bytes(pickle.dumps(Bomb())), 2,
         "diffusion.safetensors")}


@faults(SIGNED)
def test_what_a_checkpoint_should_not_hold_is_ignored_or_one_line(run, whole, fault):
    change, code, word = SIGNED[fault]
    newest = killed_before_the_end(whole)
    change(newest)
    (newest / "SHA256SUMS").write_text("\n".join(sorted(model_files.checksums(newest))) + "\n")
    before = [model_files.checksums(folder) for folder in model_files.checkpoints(Path("out"))]
    outcome = told(run("--resume"), word, code)
    assert not Path("unpickled").exists()
    if code:
        folders = model_files.checkpoints(Path("out"))
        assert [model_files.checksums(folder) for folder in folders] == before
    else:
        check_whole(whole)
    rows, found = rows_of(whole / "out"), rows_of("out")
    assert found == rows[:len(found)]  # cut back to the checkpoint, if that was not refused at once
    n = len(rows) - len(found)
    see(fault, outcome, lost=f"{n} rows of the log after the checkpoint" if n else "nothing")


@faults(["a checkpoint is another model's"])
def test_a_resume_from_another_models_checkpoint_says_so(run, whole, fault):
    newest = killed_before_the_end(whole)
    told(run("--max_steps=12", small_config(n_embd=32), "--out_dir=other"))
    shutil.rmtree(newest)
    shutil.copytree("other/checkpoint_12", newest)
    see(fault, told(run("--resume"), "no longer the run it was: model_config"),
        lost="as said, the run is another")


# ----------------------------------------------------------------------------------------------
# Numbers and memory
@faults(["one gradient is not finite", "all gradients are not finite from step 5 on"])
def test_gradients_that_are_not_finite_change_no_weight_and_ten_end_the_run(
        run, whole, monkeypatch, fault):
    calls, real = itertools.count(1), convert.nn.utils.get_total_norm
    bad = [5] if "one" in fault else range(5, 99)

    def broken(gradients):
        if next(calls) in bad:
            gradients[0][0] = math.nan
        return real(gradients)

    monkeypatch.setattr(convert.nn.utils, "get_total_norm", broken)
    more = ["--max_steps=24", "--save_steps=1", "--keep_checkpoints=99"]
    if "one" in fault:
        outcome = told(run(*more), "skipped")
    else:
        outcome = told(run(*more), "10 steps in a row", 1)
        assert model_files.checkpoints(Path("out"))[0].name == "checkpoint_13"
    assert weights("out/checkpoint_4") == weights("out/checkpoint_5")
    assert all(model_files.is_intact(p) for p in model_files.checkpoints(Path("out")))
    see(fault, outcome, times=1 if "one" in fault else 10, lost="the steps that were skipped")


OUTS = {  # fault: an object and its function that runs out of memory, when called for this time
    "out of memory in the forward pass": (convert.DiffusionLM, "loss", 16),
    "out of memory in the backward pass": (torch.Tensor, "backward", 4),
    "out of memory in an evaluation": (convert, "window_losses", 2),
    "out of memory while writing own text": (own_text, "ar_continue", 2),
    "out of memory in the update": (torch.optim.AdamW, "step", 8)}


@faults(OUTS)
def test_out_of_memory_halves_the_windows_and_keeps_the_losses_or_is_one_line(
        run, whole, monkeypatch, fault):
    owner, name, number = OUTS[fault]
    real, calls = getattr(owner, name), itertools.count(1)

    def patched(*args, **kwargs):
        if next(calls) == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    if "update" in fault:  # which does not depend on how many windows there are
        outcome = told(run(), "out of memory", 1)
        outcome = f"{outcome}; then {resumed(run('--resume'))}"
        check_whole(whole)
    else:
        outcome = told(run(), "windows at a time")
        check_same_losses(1e-4, "out", whole / "out")
    see(fault, outcome)


# ----------------------------------------------------------------------------------------------
# Data, models, config files
def documents(*more):
    """A corpus with enough text to train on, and more documents, as JSON lines."""
    return "\n".join(json.dumps({"text": text}) for text in [*many(200, 20), *more]).encode()


def one_line(size):
    words = random.Random(0).choices(many(1, 5000)[0].split(), k=size // 6)
    return " ".join(words).encode()


CORPORA = {  # fault: content of a .jsonl, if it starts with {, or .txt; exit code; a word
    "a text with a byte that is not UTF-8": (one_line(50000) + b" \xff\xfe ", 2, "utf-8"),
    "rows with bytes that are not UTF-8": (documents().replace(b" ", b" \xff", 1), 2, "a.jsonl"),
    "a row with half a surrogate pair": (documents("\ud83d half"), 2, "surrogate"),
    "a text with NUL bytes": (one_line(50000).replace(b"a", b"\0"), 0, "done"),
    "rows that are empty, blank or null": (documents("", " ", "\n", None, *[""] * 500), 0, "done"),
    "emoji and right-to-left text":
        (documents(*["\U0001f469\u200d\U0001f680 \u05e9\u05dc\u05d5\u05dd \u202emix " * 40] * 2), 0,
         "done"),
    "one line of 5 MB": (one_line(5 * 10**6), 0, "done")}


def check_corpus(run, fault, content, code, word):
    path = Path("a.jsonl" if content[:1] == b"{" else "a.txt")
    path.write_bytes(content)
    result = run(f"--dataset_name={path}", "--max_steps=4", "--cache_dir=model_cache")
    outcome = told(result, word, code)
    assert Path("out/final").exists() == (code == 0)
    see(fault, outcome)


@faults(CORPORA)
def test_odd_text_trains_or_is_one_line(run, fault):
    check_corpus(run, fault, *CORPORA[fault])


@faults(["one line of 100 MB"], slow=True)
def test_a_very_long_line_trains(run, fault):
    check_corpus(run, fault, one_line(10**8), 0, "done")


def change_weights(change):
    tensors = load_file("model/model.safetensors")
    change(tensors)
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def swap_weights(name, content):
    Path("model/model.safetensors").unlink()
    Path("model", name).write_bytes(content)


def zipped(thing):
    torch.save(thing, "bomb")
    return Path("bomb").read_bytes()


def header_of(size):
    """Change how long the header says that it is."""
    data = Path("model/model.safetensors").read_bytes()
    Path("model/model.safetensors").write_bytes(size.to_bytes(8, "little") + data[8:])


EMBEDDING = "model.embed_tokens.weight"
MODELS = {  # fault: change, a word of the error
    "a model without its tokenizer":
        (lambda: [p.unlink() for p in Path("model").glob("tokenizer*")], "model"),
    "a model without its configuration": (lambda: Path("model/config.json").unlink(), "model"),
    "a model that lacks a weight": (lambda: change_weights(lambda x: x.pop("model.norm.weight")),
                                    "model.norm.weight"),
    "a model whose weights have another shape":
        (lambda: change_weights(lambda x: x.update({EMBEDDING: torch.zeros(9, 32)})), "model"),
    "a model with a NaN in one weight":
        (lambda: change_weights(lambda x: x[EMBEDDING][7].fill_(math.nan)), "finite"),
    "a model with infinite weights":
        (lambda: change_weights(lambda x: x["model.norm.weight"].fill_(math.inf)), "finite"),
    "a safetensors header longer than the file": (lambda: header_of(10**12), "model"),
    "a safetensors header of 0 bytes": (lambda: header_of(0), "model"),
    "a safetensors header that ends too early": (lambda: header_of(99), "model"),
    "model.safetensors is a pickle that runs code":
        (lambda: swap_weights("model.safetensors", pickle.dumps(Bomb())), "model"),
    "pytorch_model.bin is a pickle that runs code":
        (lambda: swap_weights("pytorch_model.bin", zipped({EMBEDDING: Bomb()})), "model"),
    "pytorch_model.bin is a plain pickle that runs code":
        (lambda: swap_weights("pytorch_model.bin", pickle.dumps(Bomb())), "model")}


@faults(MODELS)
def test_a_broken_model_is_one_line_and_no_pickle_is_run(run, fault):
    random_lm("llama", vocab_size=300).save_pretrained("model")
    model_files.byte_tokenizer().save_pretrained("model")
    change, word = MODELS[fault]
    change()
    flags = "--model_config=", "--tokenizer_name=", "--model_name=./model", "--stage0_epochs=0"
    outcome = told(run(*flags), word, 2)
    assert not Path("unpickled").exists() and not Path("out").exists()
    see(fault, outcome)


CONFIGS = {  # fault: the file, exit code, a word of what is said
    "a config file with a syntax error": ("batch_size = = 2", 2, "SyntaxError"),
    "a config file that raises": ("batch_size = 1 // 0", 2, "ZeroDivisionError"),
    "a config file that calls itself for ever": ("def f():\n    f()\nf()", 2, "RecursionError"),
    "a config file that calls sys.exit(0)": ("import sys\nsys.exit(0)", 2, "SystemExit"),
    "a config file that prints": ("print('hello')\nmax_steps = 4", 0, "hello"),
    "a config file that is not UTF-8": (b"# \xff", 2, "UnicodeDecodeError"),
    "a config file with a NUL byte": (b"batch_size = 2\0", 2, "null bytes")}


@faults(CONFIGS)
def test_a_config_file_may_do_anything_and_a_mistake_is_one_line(run, fault):
    content, code, word = CONFIGS[fault]
    Path("wrong.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    outcome = told(run("wrong.py", "--out_dir=out"), word, code)
    assert Path("out").exists() == (code == 0)
    see(fault, outcome)


if __name__ == "__main__":
    rank_with_fault(os.environ["FAULT"])
