"""Jobs for warm ranks: whole trainings through the same function that the command line calls."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from nvlm_train.engine import engine as zero
from nvlm_train.errors import NvlmError
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

    original, saves = checkpoint.sha256, [0]

    def sha256(path: Any) -> str:
        if path.name.startswith(f"__{rank}_"):
            saves[0] += 1
            if rank == on_rank and saves[0] == save_number:
                raise OSError(28, "No space left on device", str(path))
        return original(path)

    checkpoint.sha256 = sha256
    try:
        return train(rank=rank, world_size=world_size, recipe=recipe, overrides=overrides)
    finally:
        checkpoint.sha256 = original


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
