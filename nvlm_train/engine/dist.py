"""Starting and ending torch.distributed and DeepSpeed's communication, and the small control messages of the loop.

Two groups: the default one carries tensors of the model (gloo on CPU, NCCL on GPU); the *control* group is always gloo,
so that counts, flags and errors travel without touching the device.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nvlm_train.engine.launch import Launch, export_launch
from nvlm_train.errors import NvlmError, SetupError, is_users


@dataclass(frozen=True)
class World:
    """The running process groups of this rank."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    owned: bool  # this package started the default group, so it ends it


def start(launch: Launch, timeout_s: float, store: dist.Store | None = None) -> World:
    """Joins the job: sets the device, starts the groups and makes DeepSpeed use them.

    store: where the ranks meet (`Heartbeat.join`); torch's own rendezvous where there is none.
    A default group that runs already (a notebook's, a test's) is used as it is.
    Raises SetupError when this rank's GPU does not exist.
    """
    export_launch(launch)
    on_gpu = torch.cuda.is_available()
    device = own_gpu(launch) if on_gpu else torch.device("cpu")
    _quiet_deepspeed(on_gpu)
    if on_gpu:
        torch.cuda.set_device(device)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)  # its own import sets INFO
    if not on_gpu:
        _skip_compiled_operators(deepspeed)
    timeout = timedelta(seconds=timeout_s)
    owned = not dist.is_initialized()
    if owned:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=device if on_gpu else None,  # NCCL meets here, not in the first collective, and knows its GPU
        )
    deepspeed.init_distributed(dist_init_required=False)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(launch.rank, launch.world_size, device, control, owned)


def own_gpu(launch: Launch) -> torch.device:
    """This rank's GPU: number LOCAL_RANK, or the only one that the launcher lets it see.

    Raises SetupError when there is none. (Two ranks that see the same one are found by `Heartbeat.join`.)
    """
    shown = torch.cuda.device_count()
    if shown != 1 and launch.local_rank >= shown:
        raise SetupError(
            f"local rank {launch.local_rank} has no GPU: this host shows {shown}; start as many ranks per host as it "
            "has GPUs"
        )
    return torch.device("cuda", 0 if shown == 1 else launch.local_rank)


def stop(world: World) -> None:
    """Leaves the job."""
    if world.owned and dist.is_initialized():
        dist.destroy_process_group()


def _quiet_deepspeed(on_gpu: bool) -> None:
    """DeepSpeed reads these at import. Without dynamo its import of Muon does not load inductor (2 s on a CPU)."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if not on_gpu:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch 2.13 prints these for every collective of DeepSpeed, on every rank
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")


def _skip_compiled_operators(deepspeed: Any) -> None:
    """On CPU, init_distributed would compile a shared-memory all-reduce for minutes, and fail without ninja.

    Nothing of ours uses a compiled operator of DeepSpeed on CPU, so all of them count as not available.
    """
    import deepspeed.ops as ops

    ops.__dict__["__compatible_ops__"] = defaultdict(bool)


def sum_over_ranks(world: World, values: list[int] | list[float], dtype: torch.dtype) -> list[Any]:
    """Element-wise sum over all ranks on the control group. dtype: int64 for counts, float64 for losses."""
    vector = torch.tensor(values, dtype=dtype)
    if world.world_size > 1:
        dist.all_reduce(vector, group=world.control)
    return list(vector.tolist())


def gather(world: World, value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value, group=world.control)
    return values


@contextmanager
def agreed(world: World, what: str) -> Iterator[None]:
    """Runs a part that may fail on one rank alone: when it fails on any, it fails on all, with each one's cause.

    Without it the others would go on into a collective and wait there for the time limit. The part itself must not
    hold collectives. The rank that failed raises its own error, the others an NvlmError (or, for a bug, RuntimeError).
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(world, error, what)


def raise_together(world: World, error: Exception | None, what: str) -> None:
    """Raises on every rank when any has an error. See `agreed`."""
    message = None if error is None else (is_users(error), f"{type(error).__name__}: {error}")
    found = {rank: entry for rank, entry in enumerate(gather(world, message)) if entry is not None}
    if error is not None:
        raise error
    if found:
        text = "\n".join(f"{what} failed on rank {rank}: {entry[1]}" for rank, entry in found.items())
        raise NvlmError(text) if all(entry[0] for entry in found.values()) else RuntimeError(text)


def require_same(world: World, value: Any, what: str, hint: str) -> None:
    """Raises SetupError on every rank where `value` differs between them. what: its name in the message."""
    values = gather(world, value)
    other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
    if other is not None:
        raise SetupError(f"{what} is {values[0]} for rank 0, but {values[other]} for rank {other}; {hint}")


def barrier(world: World) -> None:
    """Waits for all ranks, on the control group."""
    if world.world_size > 1:
        dist.barrier(group=world.control)
