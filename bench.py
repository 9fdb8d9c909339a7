"""Measure what training and sampling cost on this machine: convert.py's step and sampler, timed.

  python bench.py config/tiny.py                        # a laptop, half a minute
  python bench.py config/phi2.py config/shapes/phi2.py --random_weights   # a GPU, no download
  python bench.py config/tiny.py --baseline             # beside plain Hugging Face code
  python bench.py config/phi2.py config/shapes/phi2.py --estimate --device=cuda --max_memory_gb=45
  python bench.py config/phi2_lora.py config/shapes/phi2.py --estimate --cards=48:155,20:95
  python bench.py config/tiny.py --sweep=batch_size=1,2,4,max_seq_length=128,256
  python bench.py config/tiny.py --profile=trace.json   # the ten most expensive operators

Every setting of convert.py works here too. With --json alone stdout is one JSON object, for a sweep
a list; --json=FILE adds each row to a file.
"""
import contextlib
import copy
import functools
import itertools
import logging
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import statistics
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from json import dumps
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bpe
import configurator
import convert
import corpus
import machine
import model_files
import probe
import processes
import runs
import sample
import verify
from configurator import (
    RunError, UserError, configure, errors_as, first_line, out_of_memory, run, settings_in)
from machine import memory_gb, speed_up_sampling
from terminal import duration

# --------------------------------------------------------------------------------------------------
# measure
random_weights = False  # of the model's architecture: as fast, and nothing to download
train = True  # time the training step
stage = 2  # whose step: 0 | 1 | 2 | 3
sampling = True  # time the sampler, and plain AR decoding with the same model
baseline = False  # in turns with ours, a plain Hugging Face step, and LLaDA's sampling loop
estimate = False  # instead: memory by purpose, and what makes it fit; allocates nothing
cards = ""  # for estimate: the cards of a run, each as GB:TFLOPS, the latter in bfloat16
n_processes = 1  # for estimate with parallel=fsdp: how many share the model
share_of_peak = 0.3  # for estimate: how much of these TFLOPS training reaches
sweep = ""  # settings to vary: batch_size,dtype=float32,bfloat16; without values half, once, twice
profile = ""  # file for a trace of one step, to open in chrome://tracing
# amount
steps = 10  # timed training steps, after burn_in
burn_in = 2  # training steps before them that are not timed
prompts = ""  # a file of prompts to continue, one a line; "": 4 prompts of 32 random tokens
new_tokens = 64  # tokens to generate after each prompt
sample_steps = 64  # passes that set tokens; steps in sample.py
threshold = 0.0  # same as in sample.py
repeats = 3  # timed samplings
# output
json = ""  # add the row to this file; --json alone: print it on stdout, and nothing else

allowed = convert.allowed | {
    "stage": (0, 3), "steps": (1, 10**4), "repeats": (1, 10**3), "new_tokens": (1, 10**5),
    "sample_steps": (1, 10**5), "threshold": (0, 1), "share_of_peak": (0.01, 1),
    "n_processes": (1, 10**5),
    "prompts": Path, "profile": Path, "json": Path}


def all_settings():
    """{setting: value} of convert.py and of this file."""
    return settings_in(vars(convert) | globals())


def use(settings):
    """Give settings of convert.py and of this file new values."""
    for scope in (vars(convert), globals()):
        scope.update({name: settings[name] for name in settings_in(scope) if name in settings})
    configurator.show_library_errors = convert.debug


def kept_tokenizer():
    """The tokenizer_name of convert.py, or where the one that it trains on the data is kept."""
    return bpe.tokenizer_of(SimpleNamespace(**settings_in(vars(convert))))


# --------------------------------------------------------------------------------------------------
# What is timed. Each function builds a model and returns work(what), which does one piece of work
# and tells how long it took. It runs in a process of its own, so that its memory is its own.
def build(for_training=True):
    """(device, autocast, model on it, tokenizer), as convert.py or sample.py build them."""
    device = machine.pick_device(convert.device)
    autocast = machine.pick_autocast(device, convert.dtype, cache=False)
    machine.limit_memory(device, convert.max_memory_gb)
    name, config_json, ours = convert.model_name, convert.model_config, convert.model_settings()
    if not for_training and not config_json and (Path(name) / "diffusion.json").is_file():
        ours = None  # a converted model knows its own
    torch.manual_seed(convert.seed)
    as_dtype = None if for_training else autocast.fast_dtype
    model, tokenizer = convert.load_model(name, device, ours, kept_tokenizer(), config_json,
                                          as_dtype)
    probe.check_length(model, convert.max_seq_length)
    return device, autocast, model.to(device), tokenizer


@functools.cache  # in a process of its own
def our_training():
    """The training step of convert.py."""
    device, autocast, model, _ = build()
    model.train()
    state = {"step": 0, "stage": stage, "micro_batch": convert.batch_size,
             "checkpointing": convert.use_gradient_checkpointing,
             "adam_8bit": convert.use_8bit_adam}
    settings = SimpleNamespace(**all_settings())
    machine.set_up_model(model, settings, state["checkpointing"], autocast)
    chosen = convert.make_stages(1)[stage] | {"steps": 10**6, "warmup": 0, "n_on_policy": 0}
    training = convert.set_up_training(model, chosen, state, None)
    data = np.random.default_rng(0).integers(0, model.mask_id, (1000, convert.max_seq_length))

    def step():
        state["step"] += 1
        return time_step(model, training, autocast, chosen, data, state)

    def work(what):
        if what == "parts":
            return time_parts(step, device)
        if what == "profile":
            with torch.profiler.profile() as profiler:
                step()
            profiler.export_chrome_trace(profile)
            column = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
            table = profiler.key_averages().table(column, 10, max_name_column_width=60)
            return print(table, flush=True)
        if what == "totals":
            passes = sum(make_passes(model, chosen, times_of_step(0)), [])
            return {"peak_memory_gb": memory_gb(device)[0], "micro_batch": state["micro_batch"],
                    "device": name_of(device), "flops": step_flops(model, passes),
                    "gemm_peak_tflops": matmul_tflops(device, autocast)}
        return step()
    return work


def time_step(model, training, autocast, chosen, data, state):
    """The seconds of one step of a stage of convert.py, on windows of data."""
    start = now(model.device)
    n = convert.batch_size * convert.gradient_accumulation_steps
    with convert.record_function("data"):
        x0 = corpus.get_batch(data, n, convert.seed, state["stage"], state["step"])
        text = x0[:chosen["n_on_policy"], x0.shape[1] // 4:]
        text.copy_(torch.maximum(text, ~text))  # what the model writes is scored
    convert.train_step(model, training, autocast, chosen, x0, state)
    return now(model.device) - start


@functools.cache
def plain_training():
    """What people would write: all logits, a dense mask, torch's AdamW, whole sequences."""
    use({"use_lora": False, "block_size": 0})
    device, autocast, model, _ = build()
    lm, size, length = model.lm.train(), convert.batch_size, convert.max_seq_length
    del model
    attention_mask = torch.zeros(size, 1, length, length, device=device)  # added to the scores
    data = torch.randint(lm.get_input_embeddings().weight.shape[0], (1000, length))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=convert.learning_rate)

    def work(what):
        if what == "totals":
            return {"peak_memory_gb": memory_gb(device)[0]}
        start = now(device)
        optimizer.zero_grad()
        for _ in range(convert.gradient_accumulation_steps):
            ids = data[torch.randint(len(data), (size,))].to(device)
            t = torch.rand(size, 1, device=device)
            masked = torch.rand(size, length, device=device) < t
            xt = ids.masked_fill(masked, 0)
            with autocast:
                logits = lm(input_ids=xt, attention_mask=attention_mask, use_cache=False).logits
                logits = logits.flatten(0, 1).float()
                losses = nn.functional.cross_entropy(logits, ids.flatten(), reduction="none")
                loss = (losses.view(size, length) * masked / t.clamp(min=1e-3)).mean()
            loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        return now(device) - start
    return work


@functools.cache
def our_sampling():
    """The sampler of convert.py, plain AR decoding, verified decoding, and LLaDA's plain loop."""
    device, _, model, tokenizer = build(for_training=False)
    model.eval()
    speed_up_sampling(model)
    texts = np.random.default_rng(0).integers(0, model.mask_id, (4, 32)).tolist()
    if prompts:
        sample.prompts = prompts
        lines = filter(None, sample.read_prompts())
        texts = [corpus.encode_prompt(model, tokenizer, line, 0) for line in lines]
    longest = max(map(len, texts)) + new_tokens + 8 + model.block_size  # drafts reach past the end
    if longest > model.max_positions:
        raise UserError(f"new_tokens, prompts: up to {longest} positions, the model has "
                        f"{model.max_positions}")
    block = min(model.block_size or new_tokens, new_tokens)
    n_blocks = math.ceil(new_tokens / block)
    drafts, drafted = {"ar": 0, "verify": min(3, model.block_size - 1)}, defaultdict(Counter)

    def generate(kind, text):  # (new ids, forward passes)
        if kind == "baseline_sample":
            return plain_unmasking(model, text, new_tokens, sample_steps), sample_steps
        if kind in drafts:
            [new], counts = verify.decode_verified(model, [text], new_tokens, drafts[kind], 4, {})
            drafted[kind].update(counts)
            return new, counts["forwards"]
        n, passes = new_tokens, sample_steps
        if kind == "first_block":
            n, passes = block, round(sample_steps / n_blocks)  # at least one, as generate() says
        [ids], forwards = convert.generate(model, [text], n, passes, threshold=threshold)
        return ids[len(text):], forwards

    def work(kind):
        if kind == "verify" and not model.block_size:
            return None
        start = now(device)
        out, forwards = zip(*(generate(kind, text) for text in texts), strict=True)
        seconds, n = now(device) - start, sum(map(len, out))
        counts = drafted[kind]
        return {"tokens_per_s": n / seconds, "forwards_per_token": sum(forwards) / n, "out": out,
                "accepted_per_check": counts["accepted"] / max(1, counts["checks"]),
                "device": name_of(device)}
    return work


@torch.no_grad()
def plain_unmasking(model, text, new_tokens, passes):
    """LLaDA's generate.py, retold: all logits in each pass, no cache."""
    ids = torch.tensor([text + [model.mask_id] * new_tokens], device=model.device)  # (1, T)
    model.set_causal(not model.bidirectional)
    for left in range(min(passes, new_tokens), 0, -1):
        masked = ids == model.mask_id
        logits = model(ids, convert.timestep(masked.float().mean(1, keepdim=True), model))
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        tokens = logits.argmax(-1)
        prob = logits.float().softmax(-1).gather(-1, tokens[..., None])[..., 0]
        count = math.ceil(masked.sum().item() / left)
        transfer = torch.where(masked, prob, -math.inf).topk(count).indices
        ids = ids.scatter(1, transfer, tokens.gather(1, transfer))
    return ids[0, len(text):].tolist()


def now(device):
    """The time in seconds, once the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def name_of(device):
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall("model name\t: (.*)", info.read_text()) if info.exists() else []
    return f"{(names or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def time_parts(step, device):
    """{part: seconds} of convert's step, "rest" being what is in none; step() gives its seconds."""
    parts = Counter()

    @contextlib.contextmanager
    def timed(name):
        start = now(device)
        yield
        parts[name] += now(device) - start

    with patch.object(convert, "record_function", timed):
        seconds = step()
    parts["rest"] = seconds - parts.total()
    return parts


def matmul_tflops(device, autocast):
    """The device's best rate in a matrix product in the step's dtype, measured, in TFLOPS."""
    best = 0.0
    for n in (1024, 2048, 4096) if device.type == "cpu" else (4096, 8192):
        x = torch.randn(n, n, device=device, dtype=autocast.fast_dtype)
        for _ in range(5):
            start = now(device)
            x @ x
            best = max(best, 2 * n**3 / (now(device) - start) / 1e12)
    return best


def make_passes(model, chosen, u):
    """[forward_passes() of a micro-batch] of windows with noise at times u (n, n_blocks)."""
    size, windows = convert.batch_size, (len(u), convert.max_seq_length)
    noise = torch.rand(windows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = torch.arange(windows[1]).expand(windows) % 2  # nothing repeats, as ends of text do
    batch = convert.loss_weights(x0, u, noise, model, chosen["diffusion"], chosen["ar"])
    parts = zip(*(x.split(size) for x in batch), strict=True)
    return [list(convert.forward_passes(part, size, model, chosen["distill"])) for part in parts]


def times_of_step(step):
    """The times u (n, n_blocks) that a step draws for its windows."""
    n_blocks = convert.max_seq_length // (convert.block_size or convert.max_seq_length)
    return convert.sample_noise(
        convert.batch_size * convert.gradient_accumulation_steps, n_blocks,
        corpus.seed_for("noise", convert.seed, 2, step), 1, convert.full_mask_share)[0]


def fullest_micro_batch():
    """The times u of the micro-batch with most masks among some hundred windows. Their tokens are
    not laid out: of large batches these would take more memory than the step that is estimated."""
    n_steps = max(1, 640 // (convert.batch_size * convert.gradient_accumulation_steps))
    parts = [u for step in range(n_steps) for u in times_of_step(step).split(convert.batch_size)]
    return max(parts, key=lambda u: -convert.alpha(u, convert.noise_schedule).sum())


def step_flops(model, passes):
    """FLOPs of forward and backward in matrix products and attention, without recomputation (PaLM,
    https://arxiv.org/abs/2204.02311, appendix B). None for a mixture of experts."""
    config, head = model.lm.config.get_text_config(), model.lm.get_output_embeddings().weight
    n_heads, per_token, total = config.num_attention_heads, 0, 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    attention = 12 * len(probe.decoder_layers(model.lm)) * n_heads * head_dim
    for module in model.lm.get_decoder().modules():
        for p in module.parameters(recurse=False):
            if p.dim() > 2:
                return None  # how many experts a token meets depends on the family
            if p.dim() == 2 and not isinstance(module, nn.Embedding):
                per_token += p.numel() * (6 if p.requires_grad else 4)  # frozen: no gradient of it
    for inputs in passes:
        B, L = inputs["ids"].shape  # in block mode L is both copies
        total += B * L * (per_token + attention * L)
        total += len(inputs["rows"]) * head.numel() * (6 if head.requires_grad else 4)
        total += len(inputs.get("teacher_rows", ())) * head.numel() * 2  # forward only
    return total


# --------------------------------------------------------------------------------------------------
# Processes, which take turns, and the rows of figures that they find
def start_process(settings):
    """In a new process: Ctrl-C ends it at once, and so does the end of the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    use(settings)
    if json == "-":
        sys.stdout = sys.stderr


def answer(prepare, what):
    """In a process: a piece of the work that prepare() gives, which is built at the first call."""
    return prepare()(what)


def take_turns(prepares, turns):
    """{(prepare, what): answers}: each prepare() in a process of its own, one turn after the other.
    UserError as raised there; RunError if memory ran out."""
    found, spawn = defaultdict(list), multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack, errors_as("this cannot be measured"):
        pools = {}
        for prepare in prepares:
            pool = ProcessPoolExecutor(1, spawn, start_process, (all_settings(),))
            pools[prepare] = stack.enter_context(pool)
        for what, (prepare, pool) in itertools.product(turns, pools.items()):
            try:
                found[prepare, what].append(pool.submit(answer, prepare, what).result())
            except (RuntimeError, MemoryError) as error:
                killed = isinstance(error, (BrokenExecutor, MemoryError))
                if killed or out_of_memory(error):
                    raise RunError("out of memory, or a process was killed") from None
                raise
    return found


def spread(values):
    """The median, and the distance between the quartiles as a share of it."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return middle, (high - low) / middle


def measure_training():
    """A row of what a step costs, with a baseline beside plain Hugging Face code."""
    turns = ["step"] * burn_in + ["step", "parts"] * steps  # of both, or one had a quieter machine
    turns += ["totals", "profile"] if profile else ["totals"]
    works = [our_training, plain_training] if baseline else [our_training]
    try:
        found = take_turns(works, turns)
        if baseline and found[our_training, "totals"][0]["micro_batch"] < convert.batch_size:
            raise RunError("out of memory")
    except RunError as error:
        if not baseline:
            raise
        print(f"baseline: not side by side but one after the other: {error}")
        found = take_turns(works[:1], turns)
        try:
            found |= take_turns(works[1:], turns)
        except RunError as error:
            print(f"baseline: {error}")
    tokens = convert.batch_size * convert.gradient_accumulation_steps * convert.max_seq_length
    row = {}
    for work, prefix in ((our_training, ""), (plain_training, "baseline_")):
        for figures in found[work, "totals"]:  # once, or not at all
            seconds, noise = spread(found[work, "step"][burn_in:])
            figures |= {"tokens_per_s": tokens / seconds, "step_ms": 1000 * seconds}
            figures["spread"] = noise
            row |= {prefix + name: value for name, value in figures.items()}
    if "baseline_step_ms" in row:
        row |= {"speedup": row["baseline_step_ms"] / row["step_ms"],
                "memory_ratio": row["peak_memory_gb"] / row["baseline_peak_memory_gb"]}
    flops, parts = row.pop("flops"), found[our_training, "parts"]
    row["mfu"] = flops and flops / row["step_ms"] / 1e9 / row["gemm_peak_tflops"]
    row["step_parts_ms"] = {name: 1000 * statistics.median(seconds[name] for seconds in parts)
                            for name in parts[0]}
    return row


def measure_sampling():
    """A row of what sampling costs, beside plain AR decoding, and with a baseline LLaDA's loop."""
    kinds = ["first_block", "sample", "ar", "verify"]
    if baseline:
        kinds.append("baseline_sample")
    found = take_turns([our_sampling], kinds + kinds * repeats)
    found = {kind: found[our_sampling, kind][1:] for kind in kinds}  # the first of each is slower
    ours = found["sample"][-1]
    row = {"device": ours["device"], "forwards_per_token": ours["forwards_per_token"]}
    for kind, answers in found.items():
        if answers[0]:  # None: cannot verify
            speeds = [answer["tokens_per_s"] for answer in answers]
            row[f"{kind}_tokens_per_s"], row[f"{kind}_spread"] = spread(speeds)
    first_block = len(found["first_block"][0]["out"][0])  # tokens
    row["first_block_ms"] = 1000 * first_block / row.pop("first_block_tokens_per_s")
    if "verify_tokens_per_s" in row:
        for name in ("forwards_per_token", "accepted_per_check"):
            row[f"verify_{name}"] = found["verify"][-1][name]
    if baseline:
        theirs = found["baseline_sample"][-1]["out"]
        row["sample_speedup"] = row["sample_tokens_per_s"] / row["baseline_sample_tokens_per_s"]
        row["same_text"] = sum(a == b for a, b in zip(ours["out"], theirs, strict=True))
    return row


# --------------------------------------------------------------------------------------------------
# Memory of a step, counted on fake tensors, which have a shape but no content
class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of a model and of all tensors made within, by purpose, while they live."""

    def __init__(self, model):
        super().__init__()
        self.live, self.peak = Counter(), Counter()
        self.known = {}  # [purpose, bytes] of each storage
        self.purpose = "weights"
        self.count([*model.parameters(), *model.buffers()])
        self.purpose = "activations"
        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.is_gradient)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.count(x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()
        return out

    def count(self, tensors):
        for storage in [x.untyped_storage() for x in tensors]:
            if storage._cdata not in self.known:
                self.known[storage._cdata] = [self.purpose, storage.nbytes()]
                self.live[self.purpose] += storage.nbytes()
                weakref.finalize(storage, self.remove, storage._cdata)

    def remove(self, key):
        purpose, n = self.known.pop(key)
        self.live[purpose] -= n

    def is_gradient(self, p):
        entry = self.known[p.grad.untyped_storage()._cdata]
        self.live[entry[0]] -= entry[1]
        self.live["gradients"] += entry[1]
        entry[0] = "gradients"


def tracked_step(model, passes):
    """Bytes by purpose at the peak of forward and backward."""
    tracker = MemoryTracker(model)
    half = convert.dtype == "bfloat16" or convert.dtype == "float16" and device_type() != "cpu"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False)

    def part(name):
        return patch.object(tracker, "purpose", "head" if name == "head" else "activations")

    with patch.object(convert, "record_function", part), tracker, \
            torch.autograd.set_detect_anomaly(False):  # it would read values
        for inputs in passes:
            with autocast:
                loss = model.loss(**inputs).sum()
            loss.backward()
    return dict.fromkeys(["weights", "gradients", "activations", "head"], 0) | tracker.peak


def device_type():
    """The kind of device asked for; "cuda" even where there is none, to see what it would take."""
    kind = convert.device.partition(":")[0]
    return machine.pick_device(kind).type if kind == "auto" else kind


# found before: a sweep comes by the same settings again, and a large model takes seconds
estimates = {}


def estimate_memory(config, changes, process_gb):
    """{purpose: GB} at the peak of a step with changed settings, and the total; on a CPU with what
    the process takes anyway. UserError for an architecture whose step depends on its data."""
    with patch.multiple(convert, **changes, max_memory_gb=0.0):  # a limit makes no difference
        key = repr((config, process_gb, settings_in(vars(convert))))
        if key not in estimates:
            with errors_as(f"model_name: architecture '{config.model_type}' cannot be estimated"):
                estimates[key] = estimate_step(config, process_gb)
        return estimates[key]


def estimate_step(config, process_gb):
    """estimate_memory() with the settings as they are, for the losses of all stages together."""
    # 1) a model of fake tensors, as a run would set it up
    kind = device_type()
    dtype = model_files.base_dtype(convert.use_lora, kind, convert.weights_dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # as it raises
    model = model_without_weights(config, dtype)
    probe.check_length(model, convert.max_seq_length)
    with fake:
        model.to_empty(device="cpu")
        model.lm.tie_weights()
    model.head_floats = 2**28 if kind == "cpu" else 2**26  # as in set_up_model()
    if convert.use_gradient_checkpointing:
        machine.checkpoint_layers(model)
    for m in model.modules() if kind == "cuda" else ():  # fused kernels keep no dropout
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        elif isinstance(vars(m).get("attention_dropout"), float):
            m.attention_dropout = 0.0
    params = convert.freeze(model, "everything")

    # 2) forward and backward of the micro-batch with most to predict
    stages = convert.make_stages(1)
    chosen = {loss: max(s[loss] for s in stages) for loss in ("diffusion", "ar", "distill")}
    [passes] = make_passes(model, chosen, fullest_micro_batch())
    repeated = convert.gradient_accumulation_steps > 1  # then gradients are there from the start
    with fake:
        parts = tracked_step(model, passes * 2 if repeated else passes)

    # 3) what 8-bit optimizers keep: small ones in 32 bits, two scales for each 256 numbers
    parts["optimizer"] = 0
    for p in params:
        eight = convert.use_8bit_adam and p.numel() >= 4096
        parts["optimizer"] += 2 * p.numel() + p.numel() // 32 if eight else 8 * p.numel()
    if convert.load_in_4bit:
        count_four_bits(model, parts)
    if convert.parallel == "fsdp":
        count_shares(model, parts)
    host = {}
    if convert.cpu_offload and kind == "cuda":
        away = ["optimizer"]
        if convert.parallel == "fsdp":
            away += ["weights", "gradients"]
        host = {"host": sum(parts.pop(purpose) for purpose in away) / 1e9}
    parts = {purpose: n / 1e9 for purpose, n in parts.items()}
    parts["process"] = process_gb if kind == "cpu" else 0.0
    return parts | {"total": sum(parts.values())} | host


def model_without_weights(config, dtype):
    """A DiffusionLM on the meta device, in training mode."""
    with torch.device("meta"):
        lm = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        return convert.DiffusionLM(lm, **convert.model_settings()).train()


def count_four_bits(model, parts):
    """Correct the bytes of a step for a frozen model in 4 bits, as bitsandbytes keeps it: a scale
    of 8 bits for 64 weights and one of 32 for 256 such scales; one matrix at a time is unpacked."""
    packed = [m.weight for m in probe.decoder_layers(model.lm).modules()
              if isinstance(m, (nn.Linear, probe.Conv1D)) and not m.weight.requires_grad]
    n, size = sum(w.numel() for w in packed), packed[0].element_size()
    parts["weights"] += n * (1 / 2 + 1 / 64 + 4 / (64 * 256) - size)
    parts["activations"] += size * max(w.numel() for w in packed)


def count_shares(model, parts):
    """Correct the bytes of a step for one of n_processes that share weights, gradients and states
    of the optimizer: what no layer holds is whole during a step, and two layers are at a time."""
    for purpose in ("weights", "gradients", "optimizer"):
        parts[purpose] /= n_processes
    half = 2 if convert.dtype == "bfloat16" else 4
    params = {id(p): p for p in model.parameters()}
    layers = [list(layer.parameters()) for layer in probe.decoder_layers(model.lm)]
    largest = max(layers, key=lambda layer: sum(p.numel() for p in layer))
    rest = params.keys() - {id(p) for layer in layers for p in layer}
    for group, times in ([params[key] for key in rest], 1), (largest, 2):
        trained = sum(p.numel() for p in group if p.requires_grad)
        parts["activations"] += times * half * sum(p.numel() for p in group)  # gathered
        parts["gradients"] += half * trained  # whole, before they are shared out ...
    parts["gradients"] += 4 * sum(p.numel() for p in largest if p.requires_grad)  # ... in float32


def memory_savers(config, limit_gb, process_gb):
    """([(settings, GB)], whether the last fits, the largest batch_size then): from no memory saver
    on, the cheapest first, without those that do not help."""
    def gb(changes):
        return estimate_memory(config, off | changes, process_gb)["total"]

    off = {"use_8bit_adam": convert.weights_dtype == "bfloat16",  # which needs it
           "use_gradient_checkpointing": False}
    savers = [{"use_8bit_adam": True}, {"use_gradient_checkpointing": True}]
    size, accumulation = convert.batch_size, convert.gradient_accumulation_steps
    while size % 2 == 0:
        size, accumulation = size // 2, accumulation * 2
        savers.append({"batch_size": size, "gradient_accumulation_steps": accumulation})
    sharded = convert.parallel == "fsdp"
    if not convert.use_lora and not sharded and convert.dtype != "float16":
        savers.append({"weights_dtype": "bfloat16", "use_8bit_adam": True})
    if convert.diffusion_loss_weight and convert.use_bidirectional_attention:
        # last, as they change what is trained
        savers.append({"use_lora": True, "weights_dtype": "float32"})
        if not sharded:
            savers.append({"use_lora": True, "weights_dtype": "float32", "load_in_4bit": True})
    on, total = {}, gb({})
    found = [(on, total)]
    for saver in savers:
        if total > limit_gb and (less := gb(on | saver)) < 0.99 * total:
            on, total = on | saver, less
            found.append((on, total))
    largest, below, above = 0, 0.0, gb(on | {"batch_size": 1})
    while above <= limit_gb and largest < 512:  # doubled until it does not fit, then a line between
        largest, below = max(1, 2 * largest), above
        above = gb(on | {"batch_size": 2 * largest})
    if above > limit_gb and largest:
        largest += math.floor(largest * (limit_gb - below) / (above - below))
    return found, total <= limit_gb, largest


def measure_memory(limit_gb, loaded_gb=0.0):
    """A row of estimate and memory savers, printed. loaded_gb: weights already in the process."""
    tokenizer = None
    if convert.tokenizer_name in ("bytes", "bpe"):  # others are as large as their model says
        tokenizer = model_files.load_tokenizer("", kept_tokenizer(), {})
    config = model_files.load_config(convert.model_name, convert.model_config, tokenizer)
    process_gb = max(0.0, memory_gb(torch.device("cpu"))[0] - loaded_gb)
    parts = estimate_memory(config, {}, process_gb)
    found, fits, largest = memory_savers(config, limit_gb, process_gb)
    shown = ", ".join(f"{purpose} {gb:.2f}" for purpose, gb in parts.items() if gb)
    print(f"memory, estimated as set: {shown} GB")
    for on, gb in found:
        flags = " ".join(f"--{name}={value}" for name, value in on.items())
        print(f"{gb:8.2f} GB  {flags or 'without memory savers'}")
    print(f"{'fits' if fits else 'does not fit'} {limit_gb:.1f} GB (max_memory_gb); largest "
          f"batch_size then: {largest}")
    row = {"estimate_gb": parts, "fits": fits, "largest_batch": largest, "limit_gb": limit_gb,
           "ladder": [{"means": on, "gb": gb} for on, gb in found]}
    return row | plan_cards(config, process_gb) if cards else row


def plan_cards(config, process_gb):
    """The best rank_batch_sizes for cards, and the hours of the run on them, printed: of all sizes
    that fit the cards and divide the windows of a step."""
    known = known_cards()
    n = convert.batch_size * convert.gradient_accumulation_steps
    one, two = (estimate_memory(config, {"batch_size": size}, process_gb)["total"]
                for size in (1, 2))
    # 2 GB are left for the driver
    kinds = list(dict.fromkeys(known))  # cards of a kind take as many windows
    largest = [min(n, 16, math.floor(1 + (gb - 2 - one) / (two - one))) for gb, _ in kinds]
    best = None
    for chosen in itertools.product(*(range(1, size + 1) for size in largest)):
        sizes = [chosen[kinds.index(card)] for card in known]
        # a step waits for the slowest card; of equals the smallest
        seconds = max(size / tflops for size, (_, tflops) in zip(sizes, known, strict=True))
        seconds *= n / sum(sizes)
        if n % sum(sizes) == 0 and (best is None or seconds < 0.99 * best[0]):
            best = seconds, sizes
    if not best:
        print(f"cards: a step does not fit {cards} as set, or {n} windows cannot be shared out")
        return {"cards": cards, "hours": None}
    hours = best[0] / n * run_tflop(config) / share_of_peak / 3600
    sizes = ",".join(map(str, best[1]))
    several = f"rank_batch_sizes={sizes}; " if len(known) > 1 else ""
    print(f"cards: {several}{duration(3600 * hours)} at {share_of_peak:.0%} of the "
          "cards' peak, without evaluation and on-policy text")
    return {"cards": cards, "rank_batch_sizes": sizes, "hours": hours}


def run_tflop(config):
    """The matrix products and attention of a whole run, in 10^12 operations."""
    model, total = model_without_weights(config, torch.float32), 0.0
    for stage in convert.make_stages(convert.max_train_samples):
        if stage["steps"]:
            convert.freeze(model, stage["trains"])
            passes = sum(make_passes(model, stage, times_of_step(0)), [])
            total += stage["steps"] * (step_flops(model, passes) or math.nan) / 1e12
    return total


def print_cost(model, autocast, stages, state, train_data, limit_gb, disk_gb):
    """For convert.py --dry_run: memory on paper, then three steps of each stage, timed."""
    device, cpu = model.device, torch.device("cpu")
    loaded = sum(p.numel() * p.element_size() for p in model.parameters() if p.device == cpu)
    use({"n_processes": processes.SIZE})
    try:
        measure_memory(limit_gb, loaded / 1e9)
    except UserError as error:
        print(f"memory: not estimated: {error}")
    if any(s["n_on_policy"] for s in stages):
        print("on_policy_tokens: the time to write them is not in this; the steps run on the data")
    for state["stage"], s in enumerate(stages):
        if not s["steps"]:
            continue
        training, seconds = convert.set_up_training(model, s, state, None), []
        for state["step"] in range(min(3, s["steps"])):
            seconds.append(time_step(model, training, autocast, s, train_data, state))
        median = statistics.median(seconds)
        print(f"stage {s['name']}: {duration(median)} a step, {duration(median * s['steps'])}")
    print(f"memory: {memory_gb(device)[0]:.1f} GB at its peak on {device}, of {limit_gb:.1f}; on "
          f"the host {memory_gb(cpu)[0]:.1f} GB; disk: {disk_gb:.1f} GB")


# --------------------------------------------------------------------------------------------------
# The script
def known_cards():
    """[(GB, TFLOPS)] of the setting cards."""
    with errors_as(f"cards: '{cards}' is not like 48:155,20:95, GB:TFLOPS of each"):
        found = [tuple(map(float, card.split(":"))) for card in cards.split(",")]
        if not all(len(card) == 2 and 0 < min(card) <= max(card) < 1e6 for card in found):
            raise ValueError("two numbers each")
    if len(set(found)) > 4:
        raise UserError("cards: of at most 4 kinds")
    return found


def limit_of_estimate():
    """The GB that --estimate is for: max_memory_gb, or the smallest card's, or this device's."""
    known = known_cards() if cards else []  # a mistake in them is told before the work
    if convert.max_memory_gb:
        return convert.max_memory_gb
    if known:
        return min(gb for gb, _ in known) - 2
    if device_type() == "cuda" and not torch.cuda.is_available():
        raise UserError("max_memory_gb: no GPU is here; say for which, as --max_memory_gb=45")
    return machine.limit_memory(machine.pick_device(convert.device), 0)


def measure():
    """A row of all that is asked for."""
    if random_weights:
        config = convert.model_config
        if not config:
            config = model_files.load_config(convert.model_name).to_json_string(use_diff=False)
        use({"model_config": config, "tokenizer_name": "bytes"})
    if estimate:
        return measure_memory(limit_of_estimate())
    row = measure_training() if train else {}
    return row | measure_sampling() if sampling else row


def parse_sweep(settings):
    """[(title, settings)] of all combinations of the values in sweep. Without values a number is
    taken half, once and twice, a switch off and on."""
    flags = []
    for item in filter(None, sweep.replace(" ", "").split(",")):
        head, given, value = item.partition("=")
        now, values = settings.get(head), [value if given else item]
        if given or head in settings or not flags:
            name = head
            flags.append([])
        if isinstance(now, bool) and not given:
            values = [False, True]
        elif isinstance(now, (int, float)) and now and not given:
            values = [x for x in (type(now)(now / 2), now, 2 * now) if x]
        elif not given and name == head:
            raise UserError(f"sweep: {name} needs values, as {name}=...,...")
        if name in ("sweep", "json", "profile", "estimate", "random_weights"):
            raise UserError(f"sweep: {name} cannot vary")
        flags[-1] += [f"--{name}={x}" for x in values]
    cells = []
    for cell in itertools.product(*flags):
        cells.append((", ".join(flag[2:] for flag in cell), dict(settings)))
        configure(cells[-1][1], cell, allowed)
    return cells


def short(x):
    """A figure as text, with three digits or more."""
    return f"{x:,.0f}" if x > 100 else f"{x:.3g}"


def print_row(row):
    """Print the figures of a row, one a line."""
    for name, value in row.items():
        if name == "step_parts_ms":
            value = ", ".join(f"{part} {ms:.1f}" for part, ms in value.items())
        elif isinstance(value, float):
            value = short(value)
        if not isinstance(value, (dict, list)):
            print(f"  {name:30}{value}")


def what_differs(titles):
    """(What all cells of a sweep share, the names of cells by what they do not share)."""
    cells = [title.split(", ") for title in titles]
    shared = [part for part in cells[0] if all(part in cell for cell in cells)]
    if len(cells) == 1:
        shared = []
    return ", ".join(shared), [", ".join(x for x in cell if x not in shared) for cell in cells]


def show_sweep(name, titles, rows):
    """Print a table of what a sweep found, a line a row, and draw it, as bench.png."""
    shared, names = what_differs(titles)
    table = {
        "training, tokens/s": [row.get("tokens_per_s", 0) for row in rows],
        "memory, GB": [row.get("peak_memory_gb") or row.get("estimate_gb", {}).get("total", 0)
                       for row in rows],
        "sampling, tokens/s": [row.get("sample_tokens_per_s", 0) for row in rows]}
    table = {title: figures for title, figures in table.items() if any(figures)}
    width = max(map(len, names))
    print(" " * width, *(f"{title:>20}" for title in table))
    for label, row, *figures in zip(names, rows, *table.values(), strict=True):
        cells = [f"{short(x) if x else '':>20}" for x in figures]
        print(f"{label:{width}}", *cells, row.get("error", ""))
    if table:
        draw_sweep(f"{name}: {shared}" if shared else name, names, table)


def draw_sweep(title, names, table):
    """Draw {what is measured: a figure for each name} as bars, a panel each."""
    try:
        from matplotlib.figure import Figure
        size = 1.5 + 0.06 * max(map(len, names)) + 4 * len(table), 1.2 + 0.32 * len(names)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots(1, len(table), sharey=True, squeeze=False)[0]
        for axis, (measured, figures) in zip(axes, table.items(), strict=True):
            bars = axis.barh(names, figures)
            axis.bar_label(bars, [short(x) if x else "" for x in figures], padding=3)
            axis.set_title(measured)
            axis.margins(x=0.2)
        axes[0].invert_yaxis()
        figure.savefig("bench.png", dpi=110)
        print("drawn: bench.png", file=sys.stderr)
    except (ImportError, OSError) as error:
        print(f"bench.png: not drawn: {first_line(error)}", file=sys.stderr)


def main(argv):
    settings = all_settings()
    argv = ["--json=-" if arg == "--json" else arg for arg in argv]
    config_files = configure(settings, argv, allowed)
    use(settings)
    if not (train or sampling or estimate):
        raise UserError("train, sampling: one of them, or --estimate")
    for name, path in {"json": json, "profile": profile}.items():
        if path and path != "-":  # before the work
            with errors_as(f"{name}: '{path}' cannot be written"):
                if Path(path).exists() and not Path(path).is_file():
                    raise ValueError("it is not a file")
                open(path, "a").close()
    name = " + ".join(Path(file).stem for file in config_files) or convert.model_name
    cells = parse_sweep(settings)
    with contextlib.redirect_stdout(sys.stderr if json == "-" else sys.stdout):
        rows = measure_cells(name, cells)
        if sweep:
            show_sweep(name, [title for title, _ in cells], rows)
    if json == "-":
        print(dumps(rows if sweep else rows[0]))


def measure_cells(name, cells):
    """The rows of cells [(title, settings)], each printed, and added to the file json."""
    rows = []
    for title, cell in cells:
        use(cell)
        print(f"-- {title or name}", flush=True)
        try:
            runs.check_settings(SimpleNamespace(**cell))
            row = measure()
        except UserError as error:
            if not title:
                raise
            row = {"error": first_line(error)}
        print_row(row)
        rows.append({
            "name": f"{name}: {title}" if title else name,
            "command": shlex.join(["python", *sys.argv]), **row, "dtype": cell["dtype"],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()}, "settings": cell})
        if json and json != "-":
            with open(json, "a") as file:
                file.write(dumps(rows[-1]) + "\n")
    return rows


if __name__ == "__main__":
    run(main, scope=vars(convert) | globals())
