"""Several processes of one run, one for each card, as torchrun starts them.

ddp: each has the whole model, and gradients are summed once a step. fsdp: each has a share of every
weight, gradient and optimizer state (FSDP2, https://arxiv.org/abs/2304.11277). In both each process
takes its share of the windows of a step, so that data, noise and losses are those of one process.
"""
import contextlib
import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from configurator import UserError, errors_as

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0
SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # how many processes
RESTARTS = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) if LAUNCHED else 0

members = []  # (host, process id) of each rank
store = dist.HashStore()  # through which they find one another; under torchrun, its own


def join(device):
    """Wait for the other processes. Only rank 0 prints; errors of the others are told by run()."""
    if dist.is_initialized():
        return
    global store
    if LAUNCHED:  # a start of its own for each restart, whose addresses differ
        store = dist.PrefixStore(f"start {RESTARTS}", next(dist.rendezvous("env://"))[0])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # nobody is waited for in vain: torchrun ends all when one has died. But tokenising takes hours
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1), world_size=SIZE,
                            rank=RANK, store=store)
    members.extend([None] * SIZE)
    dist.all_gather_object(members, (socket.gethostname(), os.getpid()))


def disconnect():
    """End the connection when all processes have come this far. They count up to it in the store of
    torchrun, as a barrier fails in a process whose neighbour leaves it first."""
    if dist.is_initialized():
        store.add("leaving", 1)
        while store.add("leaving", 0) < SIZE:
            time.sleep(0.05)
        dist.destroy_process_group()


def end(code):
    """End the process after an error. With a connection, which the others may hold, at once."""
    if dist.is_initialized():
        for stream in (sys.__stdout__, sys.__stderr__):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def be_quiet():
    """Print nothing, unless this is rank 0."""
    if RANK:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def lost(error):
    """Which process has died, if error comes from talking to it, else None."""
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    host, dead = socket.gethostname(), []
    for _ in range(30):  # until torchrun has noticed, too
        for rank, (where, pid) in enumerate(members):
            if where == host and not is_alive(pid):
                dead.append(f"rank {rank} (process {pid} on {host}) has died")
        if dead:
            return ", ".join(dead)
        time.sleep(0.1)
    return f"the connection to another process is lost: {' '.join(str(error).split())[:200]}"


def is_alive(pid):
    """Whether there is a process of this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def from_rank_0(work, *args):
    """What work(*args) returns or raises on rank 0, on every rank. The others only wait."""
    if SIZE == 1:
        return work(*args)
    outcome = [None]
    if RANK == 0:
        try:
            outcome = [work(*args)]
        except (UserError, OSError, SystemExit) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
    if isinstance(outcome[0], BaseException):
        if isinstance(outcome[0], SystemExit):
            disconnect()
        raise outcome[0]
    return outcome[0]


def largest(value):
    """The largest of the numbers that the ranks have."""
    if SIZE == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def smallest(value):
    """The smallest of the numbers that the ranks have."""
    return -largest(-value)


def total(tensor):
    """The sum of a tensor over all ranks, in place."""
    if SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gathered(thing):
    """[thing of each rank], on every rank."""
    if SIZE == 1:
        return [thing]
    found = [None] * SIZE
    dist.all_gather_object(found, thing)
    return found


# ----------------------------------------------------------------------------------------------
# Gradients and weights
def is_sharded(model):
    """Whether a model was given to shard()."""
    return isinstance(model, FSDPModule)


def shard(model, layers, device, autocast, offload):
    """Give this process, on its device, its share of a model: of each layer, and of the rest as one
    group.

    A layer's weights are gathered, in the dtype of autocast, while it runs. offload: the shares are
    on the host meanwhile, if the device is a GPU.
    """
    mesh = dist.device_mesh.init_device_mesh(device.type, (SIZE,))
    model.runs_on = device
    offload = offload and device.type == "cuda"
    half = None if autocast.fast_dtype == torch.float32 else autocast.fast_dtype
    how = {
        "mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)}
    for layer in layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "loss")


def sum_gradients(model, params):
    """Sum the gradients of params over all ranks, in place, unless shard() has done so."""
    if SIZE == 1 or is_sharded(model):
        return
    # a parameter may have met no token here, as an expert, but some on another rank
    has = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
    dist.all_reduce(has)
    pending = []
    for p, n in zip(params, has.tolist(), strict=True):
        if n:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            pending.append(dist.all_reduce(p.grad, async_op=True))
    for work in pending:
        work.wait()


def gathered(tensors):
    """Tensors by name, those that shard() has split put together on rank 0's host; on the other
    ranks they are None."""
    found, seen = {}, {}
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            if id(x) not in seen:  # tied weights once
                full = x.detach().full_tensor()
                seen[id(x)] = None if RANK else full[:].cpu()  # [:] waits for the gathering
            x = seen[id(x)]
        found[name] = x
    return found


def gathered_optimizer(optimizer):
    """The state of an optimizer on rank 0, as one without shard() has it. But 8-bit states are kept
    as the parts of the processes, as the whole would have other blocks of 256 numbers."""
    state, gather = optimizer.state_dict(), gathered
    if type(optimizer).__module__.startswith("torchao"):
        gather = gathered_parts
    return state | {"state": {i: gather(entry) for i, entry in state["state"].items()}}


def gathered_parts(tensors):
    """Tensors by name; of one that shard() has split, on rank 0, {"parts": those of all ranks}, in
    8 bits as (codes, scale, qmap, signed)."""
    found = dict(tensors)
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            local, of_all = x.to_local(), None
            if type(local).__name__ == "OptimState8bit":
                local = local.codes.cpu(), local.scale.cpu(), local.qmap.cpu(), local.signed
            else:
                local = local.cpu()
            if RANK == 0:
                of_all = [None] * SIZE
            dist.gather_object(local, of_all)
            found[name] = {"parts": of_all}
    return found


def load_optimizer(optimizer, saved):
    """Give an optimizer its part of a state of gathered_optimizer(), of any number of processes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {name: own_part(x, params[i]) for name, x in entry.items()}
             for i, entry in saved["state"].items()}
    optimizer.load_state_dict(saved | {"state": state})
    if type(optimizer).__name__.startswith("Paged"):  # bitsandbytes loads onto the device
        for p in params:
            entry = optimizer.state[p]
            for name in {"state1", "state2"} & entry.keys():
                paged = optimizer.get_state_buffer(p, dtype=entry[name].dtype)
                entry[name] = paged.copy_(entry[name])


def own_part(x, p):
    """What goes with this process's share of a parameter p, of a state x that was gathered."""
    if isinstance(x, dict) and "parts" in x:  # bitsandbytes has dicts of its own
        local = own_eight_bits(x["parts"])
    elif isinstance(p, DTensor) and isinstance(x, torch.Tensor) and x.shape == p.shape:
        local = own_rows(x)
    else:
        return x
    found = DTensor.from_local(local.to(p.device), p.device_mesh, p.placements, run_check=False,
                               shape=p.shape, stride=p.stride())
    return found.to(p.device)  # of shares on the host: from_local() moves them to the mesh's device


def own_rows(x):
    """This process's rows of a tensor, as shard() splits it."""
    n = -(-len(x) // SIZE)
    return x[RANK * n:(RANK + 1) * n]


def own_eight_bits(parts):
    """This process's part of a state of gathered_parts(). From another number of processes it is
    quantised anew."""
    from torchao.optim.subclass_8bit import OptimState8bit  # slow to import
    signed = None
    for i, part in enumerate(parts):
        if isinstance(part, (tuple, list)):
            parts[i], signed = OptimState8bit(*part), part[3]
    if len(parts) == SIZE:
        return parts[RANK]
    floats = [part.dequantize() if isinstance(part, OptimState8bit) else part for part in parts]
    local = own_rows(torch.cat(floats))
    if signed is None or local.numel() < 4096 or local.numel() % 256:
        return local
    return OptimState8bit.zeros(local.shape, signed).copy_(local)


def gradient_factor(model):
    """By what a loss is multiplied, as FSDP averages gradients over ranks, to have their sum."""
    return SIZE if is_sharded(model) else 1


def same_norm(model, norm):
    """The norm of all gradients, the same to the last bit on each rank: cards of different kinds
    sum in different orders, and replicas would drift apart."""
    if SIZE > 1 and not is_sharded(model):
        dist.broadcast(norm, 0)
    return norm


def gathered_number(x):
    """A number that all processes have a part of, as an ordinary tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def reshard(model):
    """Drop the weights that were gathered outside of training."""
    if is_sharded(model):
        model.reshard()


@contextlib.contextmanager
def unsharded(model):
    """Within, embeddings and head of a sharded model, which no layer gathers, can be used outside
    of its forward()."""
    if is_sharded(model):
        with torch.no_grad():  # FSDP asks for one forward() of the whole before layers run
            model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
        model.unshard()
    try:
        yield
    finally:
        reshard(model)


def share_of_step(batch_size, accumulation, rank_batch_sizes):
    """(Which windows of a step are this process's, a slice; its micro-batch). UserError if they
    cannot be shared out in whole micro-batches."""
    n, setting = batch_size * accumulation, "gradient_accumulation_steps"
    sizes = [1] * SIZE
    if rank_batch_sizes and SIZE > 1:
        setting = "rank_batch_sizes"
        with errors_as(f"rank_batch_sizes: '{rank_batch_sizes}' is not like 3,1"):
            sizes = [int(size) for size in rank_batch_sizes.split(",")]
        if len(sizes) != SIZE or min(sizes) < 1:
            raise UserError(f"rank_batch_sizes: needs {SIZE} sizes of 1 or more, one for "
                            f"each process, not '{rank_batch_sizes}'")
    together = sum(sizes)
    if n % together:
        fits = [x for x in (n // together * together, -(-n // together) * together) if x]
        raise UserError(
            f"{setting}: the {n} windows of a step, batch_size x gradient_accumulation_steps, "
            f"cannot be shared by processes that take {together} at a time; "
            f"{' or '.join(map(str, fits))} windows can")
    first, own = n // together * sum(sizes[:RANK]), n // together * sizes[RANK]
    size = sizes[RANK]
    if setting != "rank_batch_sizes":  # as many of batch_size as give equal micro-batches
        size = max(size for size in range(1, batch_size + 1) if own % size == 0)
    return slice(first, first + own), size


def passes_of_all(batch, model):
    """Which passes every process must make, if weights are sharded: those that any of the windows
    of a batch of loss_weights() needs, as a layer is gathered from all."""
    if not is_sharded(model):
        return ()
    weights = {"noisy": batch[3], "clean": batch[4]}
    return [name for name, w in weights.items() if w.any()]


def share_sizes(state, size):
    """Give the state of a run this process's micro-batch, and the smallest of all for evaluation,
    where each takes as many windows."""
    if SIZE > 1:
        state["micro_batch"], state["eval_micro_batch"] = size, smallest(size)


def windows_of_rank(n):
    """Which of n windows are this process's. Each process gets as many: numbers from n on are
    padding."""
    return torch.arange(RANK, n + -n % SIZE, SIZE)


def agree_to_stop(stop):
    """The number of a signal to stop that any process has in its list stop, on all ranks, or 0."""
    return largest(stop[0] if stop else 0)
