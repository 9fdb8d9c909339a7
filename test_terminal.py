"""What a run tells: its lines, its bar, its samples, and nothing of the libraries it uses.

  python -m pytest test_terminal.py     # a minute
"""
import http.server
import io
import os
import pty
import random
import re
import subprocess
import sys
import termios
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import datasets
import gguf
import pytest
from tqdm import tqdm

import bench
import convert
import hub
import model_files
import terminal
from configurator import UserError
from test_convert import (  # noqa: F401  the fixtures are used by their names
    HERE, TINY, convert_main, diffusion, evaluations, go_back, loss_by_hand, random_ids, random_lm,
    rows_of, run, save_final, train_step)

cases = pytest.mark.parametrize
BLOCKS = "--block_size=4 --distill_weight=0.7"


# ----------------------------------------------------------------------------------------------
# The parts of the loss
@cases("block_size, distill", [(0, 0), (4, 70.0)])
def test_each_part_of_the_loss_is_a_brute_force_sum(block_size, distill):
    model = diffusion(random_lm("llama"), "linear", 10, block_size=block_size)
    ids = random_ids(5, 12)
    noise = convert.sample_noise(5, 12, 0, block_size, 0.5 if block_size else 0)
    alone = loss_by_hand(model, ids, *noise, 0, 0).item()
    expected = [alone, loss_by_hand(model, ids, *noise, 0.5, 0).item() - alone,
                loss_by_hand(model, ids, *noise, 0, distill).item() - alone]
    assert min(expected[:2]) > 0.1 and (expected[2] > 0.1) == (distill > 0)
    for micro_batch, rows_of_head in ((1, 99), (2, 2), (5, 99)):
        model.head_floats = 99 * rows_of_head  # in chunks
        parts = train_step(model, ids, *noise, micro_batch, 0.5, distill, parts=True)
        assert parts == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_rows_have_the_parts_of_their_stage_and_a_resume_between_two_rows_is_exact(run):
    flags = f"{BLOCKS} --log_steps=5 --save_steps=2 --keep_checkpoints=9"
    out = run(flags)
    rows = rows_of("out")
    steps = [row for row in rows if "loss" in row]
    kinds = {row["stage"][0]: [k[5:] for k in row if k.startswith("loss_")] for row in steps}
    assert kinds == {"0": ["ar"], "1": ["diffusion", "distill"], "2": ["diffusion", "distill"],
                     "3": ["diffusion", "ar", "distill"]}
    for row in steps:
        parts = [x for k, x in row.items() if k.startswith("loss_")]
        assert sum(parts) == pytest.approx(row["loss"], rel=1e-6) and min(parts) > 0
    shown = " + ".join(f"{k} {steps[-1][f'loss_{k}']:.3f}" for k in kinds["3"])
    assert f"loss {steps[-1]['loss']:.3f} ({shown})" in out

    go_back(8)  # steps 6 to 8 are in no row yet
    run(f"{flags} --resume")
    assert rows_of("out") == rows


# ----------------------------------------------------------------------------------------------
# Lines
def a_log(steps, evaluations=(0, 1)):
    """A log as open_log() makes it, of a run of so many steps."""
    return {"bar": tqdm(disable=True), "file": io.StringIO(), "wandb": None, "steps": steps,
            "evaluations": evaluations, "seconds": [],
            "last_steps": deque(maxlen=50), "last_evaluations": deque(maxlen=5),
            "limit_gb": 1e3}


def test_lines_fit_100_columns_and_lose_their_last_figures_first(capsys):
    s = SimpleNamespace(batch_size=10**6, gradient_accumulation_steps=1, max_seq_length=1, debug=0,
                        log_steps=1)
    stage = {"name": "3 recovery", "steps": 500000, "diffusion": 1, "ar": 0.5, "distill": 0.1}
    state = {"total": 123456, "step": 1, "loss_parts": [], "skipped_in_a_row": 0, "tokens": 1}
    log = a_log(500000)
    log["file"].name = "log"
    terminal.log_step([10.1, 11.2, 12.3], 123.4567, 1e-4, 0.15, s, stage, state, log,
                      convert.torch.device("cpu"))
    row = {"eval_nelbo": 12.3456, "eval_nelbo_se": 1.2345, "ar_ppl": 123456.7, "eval_bpb": 12.345,
           "ar_ppl_before": 9999.99}
    terminal.log_evaluation(row, "word " * 99, 1.0, stage, state, log)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(len(line) <= 100 for line in lines), lines
    assert "/500000  loss 33.600 (diffusion 10.100 + ar 11.200 + distill 12.300)  " in lines[0]
    assert "left" in lines[0] and lines[1].endswith("(before 9999.99)"), "what matters is there"


def test_a_sample_is_shown_without_what_moves_the_cursor_and_its_end(run):
    text = terminal.quoted_text("a\n\x1b[2Jb\u202e\r" + "\u6f22" * 400, "sample")
    assert text.startswith(r"    sample: a\n\x1b[2Jb\u202e\r") and text.count("\n") == 2
    assert max(map(len, text.splitlines())) <= 50, "of characters two columns wide"
    assert terminal.quoted_text("", "sample") == "    sample:"

    model = random_lm("gpt2", vocab_size=257)  # an AR model that writes nothing but its end
    model.transformer.wte.weight.data[256] *= 5
    model.transformer.ln_f.weight.data.mul_(0.1)
    model.transformer.ln_f.bias.data.copy_(9 * model.transformer.wte.weight[256].sign())
    model.save_pretrained("ends")
    model_files.byte_tokenizer().save_pretrained("ends")
    out = run("--model_config= --tokenizer_name= --model_name=./ends --stage0_epochs=0 "
              "--max_steps=1 --sample_prompt=The \x1b[31m")
    assert "\n    sample: The \\x1b[31m\n" in out and "\x1b" not in out
    assert "<|endoftext|>" in evaluations("out")[0]["sample"], "the row has all of it"


@cases("seconds, text", [(0, "0 s"), (0.043, "0.043 s"), (4.26, "4.3 s"), (59, "59 s"),
                         (250, "4.2 min"), (5900, "98 min"), (6000, "1.7 hours"),
                         (40000, "11 hours"), (5e6, "1,389 hours")])
def test_a_time_has_the_unit_that_fits_it(seconds, text):
    assert terminal.duration(seconds) == text


# ----------------------------------------------------------------------------------------------
# What is left
def test_what_is_left_counts_evaluations_to_come_and_does_not_jump():
    stages = [{"steps": n} for n in (1, 3, 5, 0, 3)]
    due = terminal.evaluations_due(stages, 5)
    assert due == [0, 1, 4, 5, 9, 10, 12], "as test_a_run_end_to_end has them"
    log, left = a_log(2000, terminal.evaluations_due([{"steps": 2000}], 100)), []
    random.seed(0)
    log["last_evaluations"].append(30.0)
    for step in range(1, 1901):
        slow = step == 1 or random.random() < 0.05  # compiles, or another process is busy
        log["last_steps"].append(20.0 if slow else random.uniform(0.8, 1.2))
        left.append(terminal.seconds_left(log, step))
    expected = [2000 - step + 30 * (1 + (2000 - max(step, 1) + 99) // 100 - (step % 100 > 0))
                for step in range(1, 1901)]
    assert left[50:] == pytest.approx(expected[50:], rel=0.1)
    assert max(abs(a - b) for a, b in zip(left[50:], left[51:], strict=False)) < 90


def on_a_terminal(*argv, columns=90):
    """Run a script on a terminal: what it shows, and when the last of it came, in seconds."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, columns))
    process = subprocess.Popen([sys.executable, *map(str, argv)], stdin=side, stdout=side,
                               stderr=side)
    os.close(side)
    pieces = []
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        pieces.append((time.perf_counter(), piece))
    os.close(main)
    assert process.wait() == 0, b"".join(piece for _, piece in pieces).decode()
    return pieces


def test_what_is_left_is_in_the_bar_of_a_terminal_and_else_in_the_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = b"".join(piece for _, piece in on_a_terminal(HERE / "convert.py", *TINY)).decode()
    lines = [line.rpartition("\r")[2] for line in shown.split("\r\n")]
    steps = [line for line in lines if "tokens/s" in line]
    bars = re.findall(r"training +\d+%[^\r]*", shown)
    assert len(steps) == 12 and not any("left" in line for line in steps)
    assert "left" not in bars[0] and any(re.search(r"steps, \S+ s left", bar) for bar in bars)
    assert not re.search(r"it/s|step/s|\?", "".join(bars)), "tqdm's own estimate is not shown"
    done = subprocess.run([sys.executable, HERE / "convert.py", *TINY, "--out_dir=b"],
                          capture_output=True, text=True)
    steps = [line for line in done.stdout.splitlines() if "tokens/s" in line]
    assert len(steps) == 12 and all(re.search(r"\d m?s? ?s left  ", line) for line in steps)
    assert not done.stderr and all(len(line) <= 100 for line in done.stdout.splitlines()
                                   if re.match(r"stage \d", line))


def test_watch_is_slow_enough_to_see_and_leaves_the_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_final("out/final", diffusion(random_lm("llama", vocab_size=300), "linear", 10))
    pieces = on_a_terminal(HERE / "sample.py", "--watch", "--out_dir=out", "--max_new_tokens=9",
                           "--prompt=a [MASK] b [MASK:7]", "--steps=8")
    frames = [at for at, piece in pieces if b"\x1b[H\x1b[J" in piece]
    assert 7 * 0.1 < frames[-1] - frames[0] < 5
    last = b"".join(piece for _, piece in pieces).decode().rpartition("\x1b[H\x1b[J")[2]
    assert last.startswith("a ") and " b " in last and "MASK" not in last
    assert "forwards 8" in last and "tokens_per_s" not in last


# ----------------------------------------------------------------------------------------------
# Libraries are silent
def write_gguf(path, lm):
    """Write a llama as llama.cpp would."""
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    config, writer = lm.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    for name, p in lm.state_dict().items():
        for theirs, its in names.items():
            name = name.replace(theirs, its)
        writer.add_tensor(name, p.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cases("model, data", [("m.gguf", "a.jsonl"), ("./shards", "folder")])
def test_a_log_holds_our_lines_alone(tmp_path, monkeypatch, model, data):
    monkeypatch.chdir(tmp_path)
    lm = random_lm("llama", vocab_size=300)
    write_gguf("m.gguf", lm)
    lm.save_pretrained("shards", max_shard_size="40KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    texts = [" ".join(map(str, range(i, 19 * i, i))) for i in range(100, 300)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.to_json("a.jsonl")
    Path("folder").mkdir()
    table.to_parquet("folder/a.parquet")
    done = subprocess.run(
        [sys.executable, HERE / "convert.py", *TINY, "--model_config=", f"--model_name={model}",
         "--stage0_epochs=0", "--max_steps=1", f"--dataset_name={data}"],
        capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    ours = ("device: ", "model: ", "attention: ", "data: ", "step: ", "stage ", "2 diffusion ",
            "    sample: ", "            ")
    log, screen, after = done.stdout.split("-" * 80)
    other = [line for line in log.splitlines() if line and not line.startswith(ours)]
    assert "done: out/final" in screen and after == "\nreport: out/report.html\n"
    assert not other and "attention: sdpa, causal as it came, bidirectional" in done.stdout


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing."""
    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_hub_out_of_reach_or_without_the_name_is_one_line_within_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_model").mkdir()
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import convert, hub\n"
            "start = time.time()\n"
            "try: convert.load_hf(sys.argv[2], '', '', convert.torch.float32)\n"
            "except hub.UserError as error: print(time.time() - start, error)")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for port, offline, expected in (
            (9, "0", "hub does not answer: .*refused.*; connect, or take --model_name=./folder"),
            (9, "1", "did you mean 'my_model'.* HF_HUB_OFFLINE is set"),
            (server.server_port, "0", "there is no folder and no model on the hub 'my_modle'")):
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": offline,
            "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-c", code, HERE, "my_modle"], text=True,
                              capture_output=True, env=environment)
        seconds, _, error = done.stdout.partition(" ")
        assert re.search(expected, error) and error.count("\n") == 1, done.stdout + done.stderr
        assert float(seconds) < 2 and not done.stderr
    server.shutdown()


def test_offline_what_is_cached_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="^model_name: 'me/it' is no folder here and not in the"):
        hub.check_hub("model_name", "me/it")
    (tmp_path / "models--me--it").mkdir()
    hub.check_hub("model_name", "me/it")


# ----------------------------------------------------------------------------------------------
# bench.py
def test_the_cells_of_a_sweep_are_named_by_what_differs():
    assert bench.what_differs(["batch_size=1, dtype=a", "batch_size=2, dtype=a"]) == (
        "dtype=a", ["batch_size=1", "batch_size=2"])
    assert bench.what_differs(["batch_size=1"]) == ("", ["batch_size=1"])
