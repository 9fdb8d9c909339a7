"""The machine: its device, dtype and memory, what makes a model fit on it, and the signals that
stop a run."""
import contextlib
import os
import re
import resource
import select
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

import processes
from configurator import UserError, errors_as, first_line
from probe import decoder_layers


def pick_device(name, local_rank=None):
    """The torch.device of a name, "auto" being the best there is; UserError if it is not there.
    local_rank: of CUDA devices this one, as each process has its own."""
    n_cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if n_cuda else "mps" if mps else "cpu"
    if local_rank is not None:
        if name.startswith("cuda:"):
            raise UserError(f"device: under torchrun cuda without a number, not '{name}'")
        if name == "cuda":
            name = f"cuda:{local_rank}"
    with errors_as(f"device: '{name}' is not there; torch {torch.__version__} for CUDA "
                   f"{torch.version.cuda} sees {n_cuda} CUDA devices, mps: {mps}"):
        if torch.device(name).type not in ("cuda", "mps", "cpu"):
            raise ValueError("only cuda, mps and cpu will do")
        found = torch.zeros(1, device=name).device
    if found.type == "cuda":
        torch.cuda.set_device(found)  # kernels of other libraries run on the current one
    return found


def pick_autocast(device, name, cache=True):
    """The autocast context of a dtype. cache: keep cast weights; training would hold them all."""
    if device.type == "cpu" and name == "float16":
        name = "float32"
        print("dtype: float16 on a CPU becomes float32", file=sys.stderr)
    enabled = name != "float32"
    return torch.autocast(device.type, getattr(torch, name), enabled=enabled, cache_enabled=cache)


def memory_gb(device):
    """(this process's peak, on a CPU its resident set; the device's own memory), in GB."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        peak, total = torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        status = Path("/proc/self/status")  # Linux, whose ru_maxrss begins at the parent's
        if status.exists() and (own := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            peak = int(own[1]) * 1024
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return peak / 1e9, total / 1e9


def limit_memory(device, wanted):
    """How much memory the run may use, in GB: wanted, a cap on CUDA; 0: the device's less 3."""
    total = memory_gb(device)[1]
    if device.type == "cuda" and wanted:
        torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total), device)
    return wanted or max(total - 3, total / 2)


def checkpoint_layers(model):
    """Switch on gradient checkpointing, or print that the architecture has none."""
    if model.lm.supports_gradient_checkpointing:
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        print("use_gradient_checkpointing: this architecture has none, so without")


def try_flex_attention(model, length, autocast):
    """Give blocks flex_attention, if forward and backward run on this device, in windows of this
    length, and equal those of a mask tensor; else print why not: some head sizes need more shared
    memory than a card has."""
    n_blocks = max(1, min(length, 512) // model.block_size)
    x0 = torch.arange(2 * n_blocks * model.block_size, device=model.device).view(2, -1)
    x0 = x0 % model.mask_id
    ids = torch.cat([x0, torch.where(x0 % 2 == 1, model.mask_id, x0)], 1)
    t = torch.ones(2, 2 * n_blocks, device=model.device)
    model.requires_grad_(False)
    model.mask_embedding.requires_grad_(True)

    def states_and_gradient(kernel):
        torch.manual_seed(0)  # the same dropout in both
        model.zero_grad()
        with model.attention(kernel):
            with autocast:
                states = model.hidden_of_blocks(ids, t)[1]
            states.float()[..., ::2].mean().backward()  # checkpointing re-runs the layers
        return states.detach(), model.mask_embedding.grad

    noise, model.noise = model.noise, "mask"  # of random tokens no gradient reaches the embedding
    try:
        if 2 * length < 128:  # both copies
            raise UserError("it is made for windows of 64 tokens or more")
        expected = states_and_gradient(model.kernel)
        with errors_as("it does not run here", trial=True):
            found = states_and_gradient("flex_attention")
        exact = autocast.fast_dtype == expected[0].dtype == torch.float32
        for x, y in zip(expected, found, strict=True):
            if not (x - y).norm() < (1e-3 if exact else 0.1) * x.norm():
                raise UserError("its results differ")
        model.lm.set_attn_implementation("flex_attention")
    except UserError as error:
        print(f"block_size: no flex_attention, but a mask tensor: {error}")
    model.noise = noise
    model.zero_grad()


def set_up_device(s):
    """(device, autocast, memory limit in GB) from the settings s."""
    found = pick_device(s.device, processes.LOCAL_RANK if processes.LAUNCHED else None)
    if processes.LAUNCHED or s.parallel == "fsdp":
        processes.join(found)
    if s.auto_memory and found.type == "cpu":
        raise UserError("auto_memory: not on a CPU, where nothing tells when memory runs out; "
                        "bench.py --estimate says what to switch on")
    autocast = pick_autocast(found, s.dtype, cache=False)
    limit_gb = limit_memory(found, s.max_memory_gb)
    print(f"device: {found}, {autocast.fast_dtype}, {limit_gb:.1f} GB")
    return found, autocast, limit_gb


def choose_parallel(model, s, state, checkpoint_dir, device, limit_gb):
    """ddp or fsdp: as set, or as before where 8-bit states continue, or ddp where a whole model and
    its training fit each card."""
    if s.parallel or processes.SIZE == 1:
        return s.parallel
    if checkpoint_dir and s.use_8bit_adam:
        return "fsdp" if state["sharded"] else "ddp"
    from bench import estimate_memory  # bench.py imports this module, so not before
    try:
        size = {"batch_size": state["micro_batch"]}
        gb = estimate_memory(model.lm.config, size, 0.5)["total"]  # 0.5: the process, on a CPU
    except UserError as error:
        print(f"parallel: ddp, as memory is not estimated: {error}")
        return "ddp"
    if device.type == "cpu":
        limit_gb /= processes.SIZE
    too_much = processes.largest(gb - limit_gb)  # on the smallest card
    if too_much <= 0:
        print(f"parallel: ddp, a step takes {gb:.1f} GB on each card")
        return "ddp"
    if s.load_in_4bit or s.weights_dtype == "bfloat16":
        print(f"parallel: ddp, as such weights cannot be sharded; a step takes {gb:.1f} GB")
        return "ddp"
    print(f"parallel: fsdp, as a step of the whole model would take {gb:.1f} GB, {too_much:.1f} "
          "more than the smallest card has")
    return "fsdp"


def set_up_model(model, s, checkpointing, autocast, device=None, spread=""):
    """Switch on what saves time or memory on the model's device and changes no loss. With spread
    "fsdp" each process keeps its share of the weights, on its device."""
    if spread == "fsdp":
        processes.shard(model, decoder_layers(model.lm), device, autocast, s.cpu_offload)
    if s.cpu_offload and model.device.type != "cuda":
        print("cpu_offload: there is no CUDA device here, so nothing is offloaded")
    cpu = model.device.type == "cpu"
    model.head_floats = 2**28 if cpu else 2**26  # 1 GB of logits where memory is the host's
    embedding, head = model.lm.get_input_embeddings(), model.lm.get_output_embeddings()
    alone = not dist.is_initialized()  # else gradients are exchanged, as dense ones
    if cpu and alone and head is not None and head.weight is embedding.weight:
        embedding.sparse = True  # adds to the head's gradient row by row, not as another matrix
    if checkpointing:
        checkpoint_layers(model)
    if processes.is_sharded(model) and model.block_size:
        print("block_size: with fsdp no flex_attention, but a mask tensor")
    elif model.block_size and model.device.type == "cuda":
        try_flex_attention(model, s.max_seq_length, autocast)
    if s.compile_model:
        try:  # what a machine without a compiler lacks shows here, not in the first step
            torch.compile(torch.sin)(torch.ones(8, device=model.device))
        except RuntimeError as error:
            print(f"compile_model: goes on without, torch.compile fails: {first_line(error)}")
            return
        for layer in decoder_layers(model.lm):  # in place: a graph a mode, no wrapper in any name
            layer.compile(dynamic=False)  # flex_attention is not sure to take lengths that vary


def eagerly(compiled):
    """A context without compiled layers, for inputs of other shapes than a training step's."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def stop_on_signal():
    """A list that gets the number of a signal to stop: Ctrl-C, SIGTERM, a closed terminal, Slurm's
    warning. A second Ctrl-C or SIGTERM ends the process at once, but not under torchrun, which
    sends one itself."""
    stop = []

    def handler(number, frame):
        if stop and number in (signal.SIGINT, signal.SIGTERM):
            if not processes.LAUNCHED:
                sys.exit(128 + number)
            return
        stop.append(number)
        time.sleep(0.1)  # a closed terminal or Ctrl-C also ends the tee or less that reads us
        outputs = select.poll()
        for fd in (1, 2):
            outputs.register(fd, 0)
        for fd, _ in outputs.poll(0):  # nobody reads it any more, and writing to it would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if processes.RANK == 0:
            os.write(2, b"\nstopping, to be continued with --resume; once more stops at once\n")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
    return stop


def leave(number):
    """End the process after the signal of this number, and print how to continue."""
    once = "--checkpoint=", "--resume"  # from here on out_dir has the newest
    again = [arg for arg in sys.argv if not arg.startswith(once)]
    start = "torchrun OPTIONS" if processes.LAUNCHED else "python"
    tqdm.write(f"stopped; continue with: {start} {shlex.join([*again, '--resume'])}")
    processes.disconnect()
    sys.exit(128 + number)


# ----------------------------------------------------------------------------------------------
# Sampling
def speed_up_sampling(model):
    """Make the passes of a model faster that is to generate and nothing else: adapters without
    peft's bookkeeping, and on a CPU weights that are packed once, not in each matrix product. A
    head that shares the embedding's weights gets a packed copy of them."""
    for _, _, layer in model.adapters:
        layer.forward = lean_adapter(model, layer)
    onednn = torch.ops.mkldnn
    if model.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    dtypes = {torch.float32}
    if onednn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    called, shared = set(), model.lm.get_input_embeddings().weight
    hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer))
             for layer in model.lm.modules()]
    with torch.no_grad():  # what is not called may be read: some layers multiply by themselves
        model.set_causal(True)
        model(torch.zeros(1, 2, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    for layer in called:
        if type(layer) is nn.Linear and layer.weight.dtype in dtypes:
            packed = onednn._reorder_linear_weight(layer.weight.detach(), 8)  # of inductor, too
            layer.forward = lambda x, packed=packed, bias=layer.bias: onednn._linear_pointwise(
                x, packed, bias, "none", [], "")
            if layer.weight is not shared:
                layer.weight = nn.Parameter(torch.empty(0, dtype=packed.dtype))


def lean_adapter(model, layer):
    """The forward of a LoRA layer in evaluation, its output times the model's gate."""
    kind = next(layer.base_layer.parameters()).dtype
    if not kind.is_floating_point:  # 4 bits
        kind = torch.float32
    down = layer.lora_A["default"].weight.detach().T.to(kind)  # (in, rank)
    up = (layer.lora_B["default"].weight.detach() * layer.scaling["default"]).T.to(kind)

    def forward(x):
        output = layer.base_layer(x)
        if layer.disable_adapters:
            return output
        inside = model.apply_gate(None, None, x.to(kind) @ down)  # (.., rank)
        return output + (inside @ up).to(output.dtype)
    return forward
