"""Jobs for warm ranks: whole trainings through the same function that the command line calls."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from nvlm_train.engine import engine as zero
from nvlm_train.errors import NvlmError, PeerError
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train import loop


def train(
    *,
    rank: int,
    world_size: int,
    recipe: str,
    overrides: Sequence[str] = (),
    resume: str = "auto",
    accept: Sequence[str] = (),
) -> tuple[int, str]:
    """(exit code, message) as the command line would give them."""
    try:
        return loop.train(load_recipe(recipe, overrides), resume, list(accept)), ""
    except NvlmError as error:
        return 2, f"{type(error).__name__}: {error}"
    except PeerError as error:
        return 1, f"{type(error).__name__}: {error}"


def train_with_signal(
    *,
    rank: int,
    world_size: int,
    recipe: str,
    overrides: Sequence[str],
    signal_name: str,
    on_rank: int,
    after_step: int,
) -> tuple[int, str]:
    """Trains; one rank alone gets a signal in the middle of a step."""
    original, seen = zero.step, [0]

    def step(engine: Any) -> float:
        seen[0] += 1
        if rank == on_rank and seen[0] == after_step:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(engine)

    zero.step = step
    try:
        return train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides)
    finally:
        zero.step = original


def train_until_killed(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], on_rank: int, in_step: int
) -> None:
    """Trains; one rank is gone in the middle of a step, as if by the kernel. The group of ranks ends with it."""
    original, seen = zero.step, [0]

    def step(engine: Any) -> float:
        seen[0] += 1
        if rank == on_rank and seen[0] == in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(engine)

    zero.step = step
    train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides)


def train_with_full_disk(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], on_rank: int, save_number: int
) -> tuple[int, str]:
    """Trains; the disk is full for one rank in its n-th save."""
    from nvlm_train import checkpoint

    original, saves = checkpoint._write_parts, [0]

    def write_parts(path: Any, *args: Any) -> Any:
        saves[0] += 1
        if rank == on_rank and saves[0] == save_number:
            raise OSError(28, "No space left on device", str(path))
        return original(path, *args)

    checkpoint._write_parts = write_parts
    try:
        return train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides)
    finally:
        checkpoint._write_parts = original


def train_with_broken_sink(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], how: str
) -> tuple[int, str]:
    """Trains; what `log.to` names raises or hangs in its thread."""
    from nvlm_train.train import metrics

    release = threading.Event()

    def start() -> Any:
        if how == "raises":
            raise RuntimeError("no such project")
        release.wait(60)
        raise SystemExit

    original, patience = metrics.open_sinks, metrics.SINK_PATIENCE_S
    loop.open_sinks = lambda *args: [metrics.Sink("wandb", start)]
    metrics.SINK_PATIENCE_S = 0.2
    try:
        return train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides)
    finally:
        release.set()
        loop.open_sinks, metrics.SINK_PATIENCE_S = original, patience


def train_with_error(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], on_rank: int, where: str
) -> str:
    """Trains; the storage fails for one rank. Returns what this rank raised."""
    from nvlm_train.train import validation

    original_next, original_batches = loop.StepLoader.__next__, validation.validation_batches

    def broken(*args: Any) -> Any:
        raise OSError(5, "Input/output error")

    if rank == on_rank and where == "loading":
        loop.StepLoader.__next__ = broken
    elif rank == on_rank:
        validation.validation_batches = broken
    try:
        loop.train(load_recipe(recipe, overrides))
        return "nothing"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.StepLoader.__next__, validation.validation_batches = original_next, original_batches


def train_with_slow_writing(
    *,
    rank: int,
    world_size: int,
    recipe: str,
    overrides: Sequence[str],
    seconds: float,
    on_rank: int | None = None,
) -> tuple[int, str, int]:
    """Trains; writing a rank's part of a save takes so many seconds. Returns besides how many steps ended meanwhile."""
    from nvlm_train import checkpoint

    write_parts, step = checkpoint._write_parts, zero.step
    release, steps, beside = threading.Event(), [0], [0]

    def slow(*args: Any) -> Any:
        began = steps[0]
        if on_rank is None or rank == on_rank:
            release.wait(seconds)
        found = write_parts(*args)
        beside[0] += steps[0] - began
        return found

    def counted(engine: Any) -> float:
        steps[0] += 1
        return step(engine)

    checkpoint._write_parts, zero.step = slow, counted
    try:
        return *train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides), beside[0]
    finally:
        release.set()
        checkpoint._write_parts, zero.step = write_parts, step
