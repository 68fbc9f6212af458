"""One optimizer step, in the order in which the loop and a replay take it: load, set rates, train, count."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nvlm_train.data.loader import StepData, StepLoader
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.optim import set_learning_rates
from nvlm_train.errors import DataError
from nvlm_train.recipe.resolve import Resolved, lr_factor
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state
from nvlm_train.train.loss import tower_features
from nvlm_train.train.metrics import Clock


@dataclass
class Waits:
    """Seconds that this rank waited for its data and, of the control messages of a step, for the other ranks."""

    data: float = 0.0
    control: float = 0.0

    def take(self) -> Waits:
        """What has come together since the last `take`."""
        taken = Waits(self.data, self.control)
        self.data = self.control = 0.0
        return taken


def load(world: dist.World, plan: DataPlan, loader: StepLoader, waits: Waits) -> tuple[StepData, dict[str, Any]]:
    """This rank's part of the next step, and what the step really holds on all ranks together, after decoding.

    One small int64 all-reduce: it fixes the denominator of the loss before the first backward, and it tells the other
    ranks when data failed on one of them, so that all stop with its message instead of waiting for it.
    Raises DataError where nothing of the step can be trained.
    """
    data: StepData | None = None
    error: Exception | None = None
    begun = time.perf_counter()
    try:
        data = next(loader)
    except Exception as raised:
        error = raised
    loaded = time.perf_counter()
    sources = list(plan.mixture.names)
    values = [int(error is not None)] + [0] * (5 + 2 * len(sources))
    if data is not None:
        values = [0, data.trained_tokens, data.tokens, data.tiles, data.samples, sum(data.bad.values())]
        values += [data.samples_by_source.get(source, 0) for source in sources]
        values += [data.tokens_by_source.get(source, 0) for source in sources]
    summed = dist.sum_over_ranks(world, values, torch.int64)
    waits.data += loaded - begun
    waits.control += time.perf_counter() - loaded
    if summed[0]:
        dist.raise_together(world, error, "loading data")
    assert data is not None
    totals: dict[str, Any] = dict(
        zip(("trained_tokens", "tokens", "tiles", "samples", "bad"), summed[1:], strict=False)
    )
    totals["samples_by_source"] = dict(zip(sources, summed[6 : 6 + len(sources)], strict=True))
    totals["tokens_by_source"] = dict(zip(sources, summed[6 + len(sources) :], strict=True))
    if not totals["trained_tokens"]:
        raise DataError(
            f"step {data.step + 1}: none of its samples could be used, so there is nothing to train on; see "
            f"{plan.recipe.output_dir}/bad_samples.jsonl"
        )
    return data, totals


def set_rates(recipe: Recipe, resolved: Resolved, built: state.Built, step: int) -> dict[str, float]:
    """Sets the learning rates of the step after `step` steps; returns them by module."""
    assert resolved.warmup_steps is not None and resolved.decay_steps is not None  # the run's steps are known by now
    factor = lr_factor(
        step,
        resolved.warmup_steps,
        resolved.decay_steps,
        recipe.schedule.name,
        recipe.schedule.min_lr / recipe.optimizer.lr,
    )
    return set_learning_rates(built.engine.optimizer, factor)


def train(
    recipe: Recipe,
    world: dist.World,
    built: state.Built,
    data: StepData,
    trained_tokens: int,
    clock: Clock,
    mark: Callable[[str], object] = lambda phase: None,
) -> tuple[list[float], float]:
    """Forward, backward and update. Returns this rank's sum of losses of each micro-step and the global gradient norm.

    mark: is told where this rank stands (`Watch.mark`).
    The norm is NaN on every rank where a loss or the gradient was not finite anywhere; then nothing was updated.
    """
    losses = []
    clock.start()
    if built.draws is not None:
        built.draws.start_step(recipe.seed, data.step)
    for number, host_batch in enumerate(data.micro_batches, start=1):
        mark("forward")
        batch = host_batch.to(world.device)
        features = tower_features(built.tower, batch, built.dtype, recipe.vision_tiles_per_chunk, built.cache)
        clock.stop("vision")
        loss_sum = zero.forward(built.engine, batch, features, last=number == len(data.micro_batches))
        clock.stop("forward")
        mark("backward")
        zero.backward(built.engine, loss_sum, trained_tokens)
        clock.stop("backward")
        losses.append(loss_sum.detach())
    mark("optimizer step")
    grad_norm = zero.step(built.engine)
    return torch.stack(losses).double().tolist(), grad_norm


def advance(progress: state.Progress, counts: dict[str, Any], *, skipped: bool) -> None:
    """Counts a step. A skipped one counts like any other (its data is used up, the schedule goes on), save in AdamW."""
    progress.step += 1
    progress.samples += counts["samples"]
    progress.trained_tokens += counts["trained_tokens"]
    progress.bad_samples += counts["bad"]
    for source, samples in counts["samples_by_source"].items():
        progress.samples_by_source[source] = progress.samples_by_source.get(source, 0) + samples
    for source, tokens in counts["tokens_by_source"].items():
        progress.tokens_by_source[source] = progress.tokens_by_source.get(source, 0) + tokens
    progress.skipped_steps += skipped
    progress.nonfinite_in_a_row = progress.nonfinite_in_a_row + 1 if skipped else 0
