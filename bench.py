"""What training and sampling cost on this machine: the real step of convert.py and the real sampler, timed.

  python bench.py config/phi2.py config/single_a6000.py        # both, as these settings ask for
  python bench.py config/phi2.py config/shapes/phi2.py --random_weights      # needs no hub
  python bench.py config/tiny.py --baseline                    # beside the plain Hugging Face way, step by step
  python bench.py config/phi2.py config/shapes/phi2.py --estimate --max_memory_gb=45      # memory, on paper
  python bench.py config/tiny.py --sweep=batch_size=1,2,4,max_seq_length=128,256          # a table and bench.png
  python bench.py config/tiny.py --profile=trace.json          # the ten dearest operators, and a trace to look at
  python bench.py --plot=log.jsonl                             # draws the rows that --json=log.jsonl has added

Every setting of convert.py works here too; the last line on stdout is JSON, an object or, of a sweep, their list.
"""
import contextlib
import itertools
import math
import multiprocessing
import platform
import shlex
import signal
import statistics
import sys
import time
from collections import Counter
from json import dumps, loads
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import convert
from configurator import UserError, checked, configure, from_flag, names_of
from convert import (
    Failure,
    byte_tokenizer,
    first_line,
    freeze,
    load_config,
    load_model,
    make_optimizer,
    make_stages,
    memory_gb,
    model_settings,
    on_paper,
    out_of_memory,
    pick_autocast,
    pick_device,
    pick_scaler,
    print_memory,
    run,
    train_step,
    update_in_backward,
    usable_gb,
    write,
)
from sample import decode_verified

# ----------------------------------------------------------------------------------------------------------------------
# what
random_weights = False  # of the model's architecture; speed and memory are the same
train = True  # time the training step
stage = 2  # which stage's step: 0 | 1 | 2 | 3
sampling = True  # time the sampler, and plain AR decoding of the same model
baseline = False  # in turns with ours, a plain Hugging Face step (whole-sequence, all weights) and LLaDA's plain loop
estimate = False  # instead of all that: memory by part, and what it takes to fit, with nothing allocated
sweep = ""  # settings to vary: batch_size,dtype or batch_size=1,2,4,dtype=float32,bfloat16
profile = ""  # write a trace of one step here (chrome://tracing reads it) and list the ten dearest operators
# how
steps = 10  # timed training steps, after burn_in
burn_in = 2  # steps that are not timed
prompts = ""  # a file, one a line, to sample after; "": 4 of 32 random tokens
new_tokens = 64  # to sample after each prompt
sample_steps = 64  # passes that set tokens, as --steps of sample.py
threshold = 0.0  # as there
repeats = 3  # timed samplings
# log
json = ""  # append the row to this file
plot = ""  # draw the rows of such a file to bench.png, and do nothing else

allowed = {"stage": (0, 3), "steps": (1, 10**4), "repeats": (1, 10**3), "new_tokens": (1, 10**5),
           "sample_steps": (1, 10**5), "threshold": (0, 1)}


# ----------------------------------------------------------------------------------------------------------------------
# What is timed. Each runs in a process of its own, so that its memory is its own: a generator that builds, yields what
# it found, and then does one more piece of work each time it is sent a request.
def build(s, training=True):
    """(place, autocast, model on it, tokenizer) of settings, as convert.py, or sample.py if not training, builds it."""
    place = pick_device(s["device"])
    amp, config_json = pick_autocast(place, s["dtype"], cache=not training), s["model_config"]
    if s["random_weights"] and not config_json:
        config_json = load_config(s["model_name"]).to_json_string(use_diff=False)
    usable_gb(place, s["max_memory_gb"])
    torch.manual_seed(s["seed"])
    converted = not training and not config_json and (Path(s["model_name"]) / "diffusion.json").is_file()
    model, tokenizer = load_model(s["model_name"], "bytes" if s["random_weights"] else s["tokenizer_name"], config_json,
                                  place.type, **({} if converted else model_settings(s)))
    convert.check_model(model, s)
    return place, amp, model.to(place), tokenizer


def use(s):
    """Have convert.py go by settings s, those of them that are its own."""
    vars(convert).update({k: v for k, v in s.items() if k in names_of(vars(convert))})


def synchronize(place):
    """Wait for the device."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    elif place.type == "mps":
        torch.mps.synchronize()


def gemm_peak(place, amp):
    """The device's best rate in a matrix product in the step's own type, in TFLOPS, measured."""
    best, one = 0.0, torch.ones(1, 1, device=place)
    with amp:
        dtype = (one @ one).dtype
    for n in (1024, 2048, 4096) if place.type == "cpu" else (4096, 8192):
        x = torch.randn(n, n, device=place, dtype=dtype)
        for _ in range(5):
            synchronize(place)
            began = time.perf_counter()
            x @ x
            synchronize(place)
            best = max(best, 2 * n**3 / (time.perf_counter() - began) / 1e12)
    return best


@contextlib.contextmanager
def split(place, spent):
    """Within, the phases of convert.py add their seconds to spent, each without those inside it; the device is waited
    for at each end."""
    names, last = ["rest"], time.perf_counter()

    @contextlib.contextmanager
    def phase(name):
        tick()
        names.append(name)
        try:
            yield
        finally:
            tick()
            names.pop()

    def tick():
        nonlocal last
        synchronize(place)
        now = time.perf_counter()
        spent[names[-1]] += now - last
        last = now
    usual, convert.phase = convert.phase, phase
    try:
        yield
        tick()
    finally:
        convert.phase = usual


def our_training(s):
    """The training step of convert.py."""
    place, amp, model, _ = build(s)
    convert.set_up(model, s, place)
    windows = np.random.default_rng(0).integers(0, model.mask_id, (1000, s["max_seq_length"]), np.int32)
    per_step = s["batch_size"] * s["gradient_accumulation_steps"]
    which = make_stages(len(windows), per_step, 0)[s["stage"]] | {"steps": 10**6, "warmup": 0, "own": 0}
    params = freeze(model.train(), which["trains"])
    optimizer = make_optimizer(params, s["learning_rate"], (s["beta1"], s["beta2"]), s["weight_decay"],
                               s["use_8bit_adam"], place)
    if s["optimizer_in_backward"]:
        update_in_backward(model, params, optimizer, 0.0)
    scaler = pick_scaler(place, s["dtype"])
    state, row = {"micro_batch": s["batch_size"]}, {"device": name_of(place)}
    for step in itertools.count():
        how = yield row
        if how == "gemm":
            row = {"gemm_peak_tflops": gemm_peak(place, amp)}
            continue
        row, spent = {}, Counter()
        tracing = torch.profiler.profile() if how == "profile" else contextlib.nullcontext()
        synchronize(place)
        began = time.perf_counter()
        with split(place, spent) if how == "split" else contextlib.nullcontext(), tracing:
            loss = train_step(model, optimizer, scaler, amp, which, [(windows, per_step)],
                              (s["seed"], s["stage"], step), state)
            loss.tolist()  # waits for the device
        row["seconds"], row["parts"], row["micro_batch"] = time.perf_counter() - began, spent, state["micro_batch"]
        row["peak_memory_gb"] = memory_gb(place)[0]
        if how == "profile":
            tracing.export_chrome_trace(s["profile"])
            by_cost = f"self_{'cuda' if place.type == 'cuda' else 'cpu'}_time_total"
            row["operators"] = tracing.key_averages().table(sort_by=by_cost, row_limit=10, max_name_column_width=60)


def plain_training(s):
    """What people would write: full logits, a dense mask, torch's AdamW, whole-sequence diffusion of random batches."""
    place, amp, model, _ = build(s | {"use_lora": False, "block_size": 0})
    lm, row = model.lm.train(), {}
    del model
    size, length, vocabulary = s["batch_size"], s["max_seq_length"], lm.get_input_embeddings().weight.shape[0]
    mask = torch.zeros(size, 1, length, length, device=place)
    data = torch.randint(vocabulary, (1000, length))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=s["learning_rate"])
    while True:
        yield row
        synchronize(place)
        began = time.perf_counter()
        optimizer.zero_grad()
        for _ in range(s["gradient_accumulation_steps"]):
            ids = data[torch.randint(len(data), (size,))].to(place)
            t = torch.rand(size, 1, device=place)
            masked = torch.rand(size, length, device=place) < t
            with amp:
                logits = lm(input_ids=ids.masked_fill(masked, 0), attention_mask=mask, use_cache=False).logits
                losses = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
                loss = (losses.view(size, length) * masked / t.clamp(min=1e-3)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        loss.item()
        row = {"seconds": time.perf_counter() - began, "peak_memory_gb": memory_gb(place)[0]}


@torch.no_grad()
def plain_unmasking(model, ids, passes):
    """The plain loop of LLaDA's generate.py, retold: all logits and all confidences in each pass, no cache; (1, T)."""
    left = (ids == model.mask_id).sum().item()
    model.set_causal(not model.bidirectional)
    for i in range(passes):
        logits = model(ids, model.time_of((ids == model.mask_id).float().mean(1)))
        if model.logit_shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        tokens = logits.argmax(-1)
        sure = logits.float().softmax(-1).gather(-1, tokens[..., None])[..., 0]
        sure = torch.where(ids == model.mask_id, sure, -math.inf)
        count = math.ceil(left / (passes - i))
        chosen = sure.topk(count).indices
        ids = ids.scatter(1, chosen, tokens.gather(1, chosen))
        left -= count
        if not left:
            break
    return ids


def sampling_of(s):
    """The sampler of convert.py, plain AR decoding, verified decoding of a block model, and LLaDA's plain loop."""
    place, amp, model, tokenizer = build(s, training=False)
    model.eval()
    rng, row = np.random.default_rng(0), {"device": name_of(place)}
    texts = rng.integers(0, model.mask_id, (4, 32)).tolist()
    if s["prompts"]:
        try:
            lines = filter(None, Path(s["prompts"]).read_text("utf-8").splitlines())
            texts = [tokenizer.encode(line, add_special_tokens=False) for line in lines]
        except (OSError, ValueError) as error:
            raise UserError(f"prompts: '{s['prompts']}' cannot be read: {first_line(error)}") from None
        if not texts:
            raise UserError(f"prompts: '{s['prompts']}' is empty")
    n, drafts = s["new_tokens"], min(3, model.block_size - 1 - (not model.logit_shift))
    longest = max(map(len, texts)) + n + 8 + model.block_size  # drafts and the last block reach past the end
    if longest > model.positions:
        raise UserError(f"new_tokens, prompts: up to {longest} positions, the model has {model.positions}")
    while True:
        how = yield row
        synchronize(place)
        began, first, forwards, out = time.perf_counter(), [], 0, []

        def watch(ids, confidence, began=began, first=first):
            if not first and not (ids == model.mask_id).any():
                first.append(time.perf_counter() - began)
        for text in texts:
            with amp:
                if how in ("sample", "first"):  # whose watch waits for the device after each pass
                    rows, passes, _ = write(model, [text], n, s["sample_steps"], threshold=s["threshold"],
                                            watch=watch if how == "first" and not out else None)
                    new = rows[0][len(text):][:n]
                elif how == "plain":
                    ids = torch.tensor([text + [model.mask_id] * n], device=place)
                    new, passes = plain_unmasking(model, ids, s["sample_steps"])[0, len(text):].tolist(), 0
                else:
                    new, passes, *_ = decode_verified(model, text, n, drafts if how == "verify" else 0, 4, {})
            out.append(new)
            forwards += passes
        seconds = time.perf_counter() - began
        row = {"tokens_per_s": n * len(texts) / seconds, "forwards_per_token": forwards / (n * len(texts)), "out": out,
               "first_block_s": first[0] if first else seconds / len(texts), "verifies": drafts > 0}


def name_of(place):
    """What the device is called."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    return f"{(model or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# Processes
def serve(pipe, work, s):
    """The other end of started(): runs a generator, a piece of work a request, and sends what it raises as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ends with the process that asks
    use(s)
    try:
        generator = work(s)
        answer = next(generator)
        while True:
            pipe.send(answer)
            answer = generator.send(pipe.recv())
    except (EOFError, ConnectionError):  # nobody asks any more
        pass
    except (UserError, MemoryError, *convert.FOREIGN) as error:
        memory = isinstance(error, MemoryError) or out_of_memory(error)
        what = "out of memory" if memory else f"{type(error).__name__}: {first_line(error)}"
        pipe.send(error if isinstance(error, UserError) else Failure(what))


@contextlib.contextmanager
def started(*works):
    """Functions, one for each (generator, settings): each asks its own process for a piece of work, and what it found.

    UserError or Failure as it is raised there; Failure if the machine killed it.
    """
    context, pipes, processes, first = multiprocessing.get_context("spawn"), [], [], []

    def ask(pipe, how):
        try:
            if how is not None:
                pipe.send(how)
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise Failure("its process was killed, as happens when it runs out of memory") from None
        if isinstance(answer, Exception):
            raise answer
        return answer
    try:
        for work, s in works:
            here, there = context.Pipe()
            processes.append(context.Process(target=serve, args=(there, work, s), daemon=True))
            processes[-1].start()
            there.close()
            pipes.append(here)
            first.append(ask(here, None))
        yield [lambda how, pipe=pipe: ask(pipe, how) for pipe in pipes], first
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join(60)  # so that its memory is free again


def spread(values):
    """The median, and the distance between the quartiles as a share of it."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), (high - low) / middle


# ----------------------------------------------------------------------------------------------------------------------
# The measurements: rows of figures
def flops_of(s, which):
    """What a training step costs, in floating-point operations, none counted twice; None where it depends on the data.

    Matrix products and attention, forward and backward, of the real step on fake tensors, without recomputation.
    """
    def forward(query, key, value, *args, **kwargs):
        return sdpa_flop(query, key, value)

    def backward(gradient, query, key, value, *args, **kwargs):
        return 2 * sdpa_flop(query, key, value)

    def once(function, *args, use_reentrant):
        return function(*args)
    usual, name = convert.recompute, "_scaled_dot_product_flash_attention_for_cpu"
    mapping = {getattr(torch.ops.aten, name): forward, getattr(torch.ops.aten, name + "_backward"): backward}
    try:
        mode, model, micro_batches = on_paper(config_of(s), s | {"use_gradient_checkpointing": False}, which)
        runs = micro_batches[len(micro_batches) // 2]  # half of them have more to read
        convert.recompute = once  # of a head in chunks
        with convert.refused("flops"), mode, FlopCounterMode(display=False, custom_mapping=mapping) as counted:
            convert.backpropagate(model, runs, torch.amp.GradScaler("cpu", enabled=False), contextlib.nullcontext(), 0)
    except UserError as error:
        print(f"mfu: not known: {error}")
        return None
    finally:
        convert.recompute = usual
    return counted.get_total_flops() * s["gradient_accumulation_steps"]


def config_of(s):
    """The Hugging Face configuration that settings name."""
    return load_config(s["model_name"], s["model_config"],
                       byte_tokenizer() if s["tokenizer_name"] == "bytes" or s["random_weights"] else None)


def measure_training(s):
    """A row of what a step takes, beside the plain way with a baseline."""
    try:
        found = timed_training(s, [our_training] + [plain_training] * s["baseline"])
    except Failure as error:
        if not s["baseline"]:
            raise
        print(f"baseline: not side by side but one after the other: {error}")
        found = timed_training(s, [our_training])
        try:
            found |= {"plain": timed_training(s, [plain_training])["plain"]}
        except Failure as error:
            print(f"baseline: {error}")
    rows, plains, peak = found["ours"], found["plain"], found["peak"]
    tokens = s["batch_size"] * s["gradient_accumulation_steps"] * s["max_seq_length"]
    step, noise = spread([r["seconds"] for r in rows])
    flops = flops_of(s, make_stages(1, 1, 0)[s["stage"]])
    row = {"device": found["device"], "tokens_per_s": tokens / step, "step_ms": 1000 * step, "spread": noise,
           "step_parts_ms": {k: 1000 * statistics.median(p[k] for p in found["parts"])
                             for k in ("data", "forward", "head", "backward", "optimizer", "rest")},
           "gemm_peak_tflops": peak, "mfu": flops and flops / step / 1e12 / peak,
           "peak_memory_gb": rows[-1]["peak_memory_gb"], "micro_batch": rows[-1]["micro_batch"]}
    if plains:
        theirs, noise = spread([r["seconds"] for r in plains])
        row |= {"baseline_tokens_per_s": tokens / theirs, "baseline_step_ms": 1000 * theirs, "baseline_spread": noise,
                "baseline_peak_memory_gb": plains[-1]["peak_memory_gb"], "speedup": theirs / step,
                "memory_ratio": row["peak_memory_gb"] / plains[-1]["peak_memory_gb"]}
    return row


def timed_training(s, works):
    """{ours, plain: rows of steps in turns; parts, peak, device of ours}."""
    ours, found = works[0] is our_training, {"ours": [], "plain": [], "parts": []}
    with started(*((work, s) for work in works)) as (asks, first):
        for _ in range(s["burn_in"]):
            for ask in asks:
                ask("step")
        for _ in range(s["steps"]):
            for how in ("step", "split"):  # of both, so that neither has the machine to itself
                for ask, work in zip(asks, works, strict=True):
                    row = ask(how)
                    if work is our_training and how == "split":
                        found["parts"].append(row["parts"])
                    elif how == "step":
                        found["ours" if work is our_training else "plain"].append(row)
        if len(works) > 1 and found["ours"][-1]["micro_batch"] < s["batch_size"]:
            raise Failure("out of memory")
        if ours and s["profile"]:
            print(asks[0]("profile")["operators"])
        return found | {"peak": ours and asks[0]("gemm")["gemm_peak_tflops"], "device": first[0].get("device")}


def measure_sampling(s):
    """A row of what writing takes, beside plain AR decoding, and with a baseline LLaDA's plain loop."""
    with started((sampling_of, s)) as ([ask], first):
        hows = ["sample", "ar"] + ["plain"] * s["baseline"]
        hows += ["verify"] * ask("ar")["verifies"]
        latency, rows = ask("first")["first_block_s"], {how: [] for how in hows}
        for how in hows[1:]:
            ask(how)
        for _ in range(s["repeats"]):
            for how in hows:
                rows[how].append(ask(how))
    ours = rows["sample"][-1]
    speed = {how: spread([r["tokens_per_s"] for r in found])[0] for how, found in rows.items()}
    row = {"device": first[0]["device"], "sample_tokens_per_s": speed["sample"],
           "sample_spread": spread([r["tokens_per_s"] for r in rows["sample"]])[1],
           "forwards_per_token": ours["forwards_per_token"],
           "first_block_ms": 1000 * latency,
           "ar_tokens_per_s": speed["ar"]}
    if "verify" in speed:
        row |= {"verify_tokens_per_s": speed["verify"],
                "verify_forwards_per_token": rows["verify"][-1]["forwards_per_token"]}
    if s["baseline"]:
        row |= {"baseline_sample_tokens_per_s": speed["plain"], "sample_speedup": speed["sample"] / speed["plain"],
                "same_text": sum(a == b for a, b in zip(ours["out"], rows["plain"][-1]["out"], strict=True))}
    return row


def measure_memory(s):
    """A row of estimate() and ladder(); with a max_memory_gb also for a device that is not there."""
    limit = s["max_memory_gb"] or usable_gb(pick_device(s["device"]), 0)
    parts, climbed, fits, largest = print_memory(config_of(s), s, limit)
    return {"estimate_gb": parts, "fits": fits, "ladder": [{"means": m, "gb": gb} for m, gb in climbed],
            "largest_batch": largest, "limit_gb": limit}


# ----------------------------------------------------------------------------------------------------------------------
# The script
def print_row(row, s):
    """A row of figures, for people."""
    if "step_ms" in row:
        print(f"training: {row['tokens_per_s']:,.0f} tokens/s, {row['step_ms']:.1f} ms a step (quartiles "
              f"{row['spread']:.0%} apart), peak memory {row['peak_memory_gb']:.2f} GB"
              + f", {row['micro_batch']} windows at a time" * (row["micro_batch"] < s["batch_size"]))
        print("  of a step, ms: " + ", ".join(f"{k} {v:.1f}" for k, v in row["step_parts_ms"].items()))
        mfu = "?" if row["mfu"] is None else f"{row['mfu']:.0%}"
        print(f"  {mfu} of the {row['gemm_peak_tflops']:.3f} TFLOPS of a matrix product on {row['device']}")
        if "speedup" in row:
            print(f"  plain Hugging Face: {row['baseline_tokens_per_s']:,.0f} tokens/s, "
                  f"{row['baseline_peak_memory_gb']:.2f} GB: {row['speedup']:.2f} times its speed, "
                  f"{row['memory_ratio']:.2f} of its memory")
    if "sample_tokens_per_s" in row:
        print(f"sampling: {row['sample_tokens_per_s']:,.1f} tokens/s, {row['forwards_per_token']:.2f} forwards a token,"
              f" first block after {row['first_block_ms']:.0f} ms; plain AR: {row['ar_tokens_per_s']:,.1f} tokens/s")
        if "verify_tokens_per_s" in row:
            print(f"  verified: {row['verify_tokens_per_s']:,.1f} tokens/s, {row['verify_forwards_per_token']:.2f} "
                  "forwards a token")
        if "sample_speedup" in row:
            print(f"  LLaDA's plain loop: {row['baseline_sample_tokens_per_s']:,.1f} tokens/s: "
                  f"{row['sample_speedup']:.2f} times its speed, {row['same_text']} texts the same")


def cells(text, settings):
    """[{setting: value}] of a sweep: all combinations. A setting without values takes half, once and twice its own."""
    values, name = {}, ""
    for item in filter(None, text.replace(" ", "").split(",")):
        key, given, value = item.partition("=")
        if given or key in settings or not name:
            name = key
            checked(name, settings.get(name), settings, None, "sweep")  # that there is one
            if name in ("sweep", "json", "plot", "profile", "estimate", "random_weights"):
                raise UserError(f"sweep: {name} is no setting of a cell")
            values[name] = []
        if given or key != name or key not in settings:
            values[name].append(from_flag(name, value if given else item, settings))
    for name, found in values.items():
        now = settings[name]
        if not found and isinstance(now, bool):
            found += [False, True]
        elif not found and isinstance(now, (int, float)) and now:
            found += [type(now)(now * x) for x in (0.5, 1, 2) if type(now)(now * x)]
        elif not found:
            raise UserError(f"sweep: {name} needs values, as {name}=...,...")
        rule = (convert.allowed | allowed).get(name)
        values[name] = [checked(name, value, settings, rule, "sweep") for value in found]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def measure(s):
    """One row of all that is asked for."""
    if s["estimate"]:
        return measure_memory(s)
    row = {}
    if s["train"]:
        row |= measure_training(s)
    if s["sampling"]:
        row |= measure_sampling(s)
    return row


def memory_of(row):
    """The peak that a row has measured, else what it has estimated, in GB; 0 if neither."""
    return row.get("peak_memory_gb") or row.get("estimate_gb", {}).get("total", 0)


def draw(rows, names):
    """bench.png: tokens/s and peak memory (or the estimate) of rows, a bar each."""
    try:
        import matplotlib
    except ImportError:
        print("bench.png: not drawn, as matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.3 * len(rows)), sharey=True, layout="constrained")
    for axis, what in zip(axes, ("tokens_per_s", "peak_memory_gb"), strict=True):
        found = [r.get(what, 0) if what == "tokens_per_s" else memory_of(r) for r in rows]
        bars = axis.barh(range(len(rows)), found, color=["#4477aa", "#ccbb44"][what != "tokens_per_s"])
        axis.bar_label(bars, [f"{v:,.4g}" if v else r.get("error", "") for v, r in zip(found, rows, strict=True)],
                       padding=3)
        axis.set_title({"tokens_per_s": "training, tokens/s", "peak_memory_gb": "peak memory, GB"}[what])
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.2)
    axes[0].set_yticks(range(len(rows)), names)
    axes[0].invert_yaxis()
    try:
        figure.savefig("bench.png", dpi=110)
        print("drawn: bench.png", file=sys.stderr)
    except OSError as error:
        print(f"bench.png: not drawn: {first_line(error)}", file=sys.stderr)


def main(argv):
    settings = {k: scope[k] for scope in (vars(convert), globals()) for k in names_of(scope)}
    files = configure(settings, argv, convert.allowed | allowed)
    if settings["plot"]:
        try:
            rows = [loads(line) for line in Path(settings["plot"]).read_text().splitlines()]
            draw(rows, [r["name"] for r in rows])
        except convert.FOREIGN as error:
            raise UserError(f"plot: '{settings['plot']}' is no log of bench.py: {first_line(error)}") from None
        return
    if not (settings["train"] or settings["sampling"] or settings["estimate"]):
        raise UserError("train, sampling: one of them, or --estimate")
    for what in "json", "profile":  # known before the work
        try:
            if settings[what]:
                if Path(settings[what]).exists() and not Path(settings[what]).is_file():
                    raise OSError("not a file")
                open(settings[what], "a").close()
        except OSError as error:
            raise UserError(f"{what}: '{settings[what]}' cannot be written: {first_line(error)}") from None
    name = " + ".join(Path(f).stem for f in files) or settings["model_name"]
    found = []
    for cell in cells(settings["sweep"], settings):
        s = settings | cell
        use(s)
        title = ", ".join(f"{k}={v}" for k, v in cell.items())
        if title:
            print(f"-- {title}", flush=True)
        try:
            convert.check_settings()
            row = measure(s)
        except UserError as error:
            if not cell:
                raise
            row = {"error": first_line(error)}
            print(row["error"])
        print_row(row, s)
        row = {"name": f"{name}{': ' * bool(title)}{title}", "command": shlex.join(["python", *sys.argv]), **row,
               "dtype": s["dtype"],
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                            "python": platform.python_version()}, "settings": s}
        found.append(row)
        if s["json"]:
            with open(s["json"], "a") as file:
                file.write(dumps(row) + "\n")
    if settings["sweep"]:
        names = [r["name"].partition(": ")[2] for r in found]
        width = max(map(len, names))
        print(f"\n{'':{width}}  {'tokens/s':>10}  {'GB':>8}  {'sampling':>10}")
        for name, r in zip(names, found, strict=True):
            figures = r.get("tokens_per_s"), memory_of(r), r.get("sample_tokens_per_s")
            shown = [f"{x:,.4g}" if x else "" for x in figures]
            print(f"{name:{width}}  {shown[0]:>10}  {shown[1]:>8}  {shown[2]:>10}  {r.get('error', '')}")
        print(dumps(found), flush=True)
        draw(found, names)
    else:
        print(dumps(found[0]))


if __name__ == "__main__":
    run(main)
