"""Jobs for warm ranks: trainings with samples that break the loss, ranks that are slow, memory that runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine import engine as zero
from nvlm_train.errors import NvlmError
from nvlm_train.model.nvlm import NvlmD
from nvlm_train.recipe.load import load_recipe
from nvlm_train.train import loop
from nvlm_train.train.branch import open_branch
from nvlm_train.train.replay import report, run_again, segments_of

Sample = tuple[str, int]  # source, row


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _breaking(samples: Sequence[Sample]) -> Callable[[NvlmD, Batch, Tensor | None], Tensor]:
    """The model's forward, with a loss of NaN where the labels of one of `samples` count."""
    original = NvlmD.forward

    def forward(self: NvlmD, batch: Batch, features: Tensor | None = None) -> Tensor:
        loss = original(self, batch, features)
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        held = [s for s in segments_of(batch) if len(ids[s].unique()) > 1]  # a padding is one token again and again
        for ref, segment in zip(batch.samples, held, strict=True):
            if (ref.source, ref.row) in samples and (labels[segment] != IGNORE_INDEX).any():
                return loss * torch.nan
        return loss

    return forward


def train(
    *,
    rank: int,
    world_size: int,
    recipe: str,
    overrides: Sequence[str],
    broken: Sequence[Sample] = (),
    from_: str | None = None,
    skip: Sequence[tuple[int, int]] = (),
    stop_after: int | None = None,
    shifted_from: int | None = None,
    slow_rank: int | None = None,
    sleep_s: float = 0.0,
    full_at: int | None = None,
) -> tuple[int, str]:
    """(exit code, message) of a training.

    broken: samples whose loss is NaN. stop_after: RUN/stop appears in the n-th step of this attempt. shifted_from: by
    hand, steps from this one (counted from 0) draw the data of the next. slow_rank: sleeps in every forward. full_at:
    memory runs out in the n-th forward, the rehearsal's included.
    """
    loaded = load_recipe(recipe, overrides)
    forwards, steps = [0], [0]
    original_forward, original_step, original_draws = zero.forward, zero.step, DataPlan.draws

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        forwards[0] += 1
        if forwards[0] == full_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsome more")
        if rank == slow_rank:
            time.sleep(sleep_s)
        return original_forward(*args, **kwargs)

    def step(engine: Any) -> float:
        steps[0] += 1
        if steps[0] == stop_after and rank == 0:
            (Path(loaded.recipe.output_dir) / "stop").touch()
        return original_step(engine)

    def draws(self: DataPlan, number: int) -> Any:
        return original_draws(self, number + (shifted_from is not None and number >= shifted_from))

    try:
        with (
            replaced(NvlmD, "forward", _breaking([(source, row) for source, row in broken])),
            replaced(zero, "forward", forward),
            replaced(zero, "step", step),
            replaced(DataPlan, "draws", draws),
        ):
            branch = None if from_ is None else open_branch(from_, [(first, last) for first, last in skip])
            return loop.train(loaded, branch=branch), ""
    except NvlmError as error:
        return 2, f"{type(error).__name__}: {error}"


def replay(
    *, rank: int, world_size: int, recipe: str, overrides: Sequence[str], file: str, broken: Sequence[Sample]
) -> dict[str, Any]:
    """A replay, and its report."""
    with replaced(NvlmD, "forward", _breaking([(source, row) for source, row in broken])):
        try:
            found = run_again(load_recipe(recipe, overrides), Path(file))
        except NvlmError as error:
            return {"error": str(error)}
    first = found.first_broken
    return {
        "same": found.same,
        "first": None if first is None else (first[0], first[1], tuple(first[2].ref)),
        "losses": [[micro.loss for micro in micro_steps] for micro_steps in found.ranks],
        "samples": [
            (tuple(s.ref), s.loss, s.tokens) for micros in found.ranks for micro in micros for s in micro.samples
        ],
        "written": found.written,
        "between": found.steps_between,
        "gradients": found.gradients,
        "report": report(found),
    }
