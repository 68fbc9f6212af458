"""A step that was not finite, again: `train R.yaml --replay RUN/nonfinite/step_N.json`.

The weights before the step are those of the newest checkpoint before it, trained on from there through the steps in
between, without saving, as a resume would. A run that stopped at the step has saved exactly the state before it, so
nothing lies in between; one that went on (on_nonfinite: skip) may have some steps. On the ranks that the run had, the
losses are its own bit for bit on a CPU; on others they differ by rounding. Nothing in the run directory changes.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_train import checkpoint
from nvlm_train.batch import IGNORE_INDEX, Batch, SampleRef
from nvlm_train.data.loader import StepData, StepLoader
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.errors import DataError, RecipeError
from nvlm_train.hub import pin
from nvlm_train.log import get_logger, set_up_logging
from nvlm_train.recipe.load import LoadedRecipe
from nvlm_train.recipe.resolve import Resolved, check_resume, resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state, step
from nvlm_train.train.branch import recorded_branch
from nvlm_train.train.loss import tower_features
from nvlm_train.train.metrics import Clock
from nvlm_train.train.weights import account_for_weights, open_weights

log = get_logger(__name__)


@dataclass(frozen=True)
class SampleLoss:
    """Of one sample of a micro-step. loss: summed over its `tokens` trained tokens."""

    ref: SampleRef
    where: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class MicroStep:
    """Of one rank. loss: summed over all trained tokens."""

    loss: float
    samples: list[SampleLoss]


@dataclass(frozen=True)
class Replay:
    """What a replayed step did.

    ranks: [rank][micro-step]. written: the losses that the file has, alike; None where the ranks are others.
    loss, loss_written: the step's mean over its trained tokens. gradients: the largest of each module.
    """

    step: int
    start: str
    steps_between: int
    ranks: list[list[MicroStep]]
    written: list[list[float]] | None
    loss: float
    loss_written: float
    gradients: dict[str, float]

    @property
    def first_broken(self) -> tuple[int, int, SampleLoss] | None:
        """(rank, micro-step from 1, sample) of the first sample whose loss is not finite, micro-step by micro-step."""
        for number in range(len(self.ranks[0])):
            for rank, micro_steps in enumerate(self.ranks):
                for sample in micro_steps[number].samples:
                    if not math.isfinite(sample.loss):
                        return rank, number + 1, sample
        return None

    @property
    def same(self) -> bool | None:
        """Whether every loss is the one written down, bit for bit; None on another number of ranks."""
        if self.written is None:
            return None
        found = [[repr(micro.loss) for micro in micro_steps] for micro_steps in self.ranks]
        return found == [[repr(loss) for loss in losses] for losses in self.written]


def replay(loaded: LoadedRecipe, file: str, accept: Sequence[str] = ()) -> int:
    """Replays the step that `file` tells of and prints what it did. Returns the exit code."""
    found = run_again(loaded, Path(file), accept)
    if resolve_launch().rank == 0:
        print(report(found))
    return 0


def run_again(loaded: LoadedRecipe, file: Path, accept: Sequence[str] = ()) -> Replay:
    """Replays a step; the same result on every rank.

    Raises RecipeError where the recipe is not that of the run, DataError where its data has changed.
    """
    set_up_logging()
    run = Path(loaded.recipe.output_dir)
    recipe, _ = pin(loaded, checkpoint.recorded_revisions(run))
    told = checkpoint.read_json(file)
    content = checkpoint.read_json(run / "recipe.json")
    check_resume(content["recipe"], recipe, accept)
    launch = resolve_launch()
    resolved = resolve(recipe, launch.world_size)
    if told["recipe_hash"] != resolved.recipe_hash:
        raise RecipeError(
            f"--replay {file}: was written by a run with recipe hash {told['recipe_hash']}, but this recipe has "
            f"{resolved.recipe_hash}; give the recipe and output_dir of that run"
        )
    branch = recorded_branch(content)
    saved = max((n for n in checkpoint.committed_steps(run) if n < told["step"]), default=0)
    leaves = not saved and branch is not None
    begin = branch.step if leaves and branch is not None else saved
    start = state.Start(run, begin, [], branch=branch, leaves=leaves)

    weights = open_weights(recipe, start.goes_on_from)
    account_for_weights(recipe, weights)
    plan = open_data(recipe, rank=launch.rank, world_size=launch.world_size, skipped=start.skipped)
    resolved = resolve(recipe, launch.world_size, plan.num_steps)
    state.check_data(start, plan.state(start.step, start.skipped_before), accept)
    world = dist.start(launch, recipe.distributed.timeout_s)
    try:
        with tempfile.TemporaryDirectory() as aside:  # for lines about bad samples: the run has them already
            plan = replace(plan, recipe=plan.recipe.model_copy(update={"output_dir": aside}))
            built = state.build(recipe, resolved, world, weights, skip_trained=start.step > 0)
            progress = state.restore(built, start.checkpoint) if start.checkpoint else state.Progress()
            with StepLoader(plan, start_step=progress.step, end_step=told["step"]) as loader:
                data, trained_tokens = _go_to(recipe, resolved, world, built, plan, loader, progress, told)
            where = str(start.checkpoint or "the beginning of the run")
            return _examine(recipe, world, built, plan, data, trained_tokens, told, where, told["step"] - 1 - begin)
    finally:
        dist.stop(world)


def _go_to(
    recipe: Recipe,
    resolved: Resolved,
    world: dist.World,
    built: state.Built,
    plan: DataPlan,
    loader: StepLoader,
    progress: state.Progress,
    told: dict[str, Any],
) -> tuple[StepData, int]:
    """Trains up to the step before, and loads the step: this rank's part, and the trained tokens of all ranks."""
    clock, waits = Clock(world.device), step.Waits()
    while progress.step < told["step"] - 1:
        data, counts = step.load(world, plan, loader, waits)
        step.set_rates(recipe, resolved, built, progress.step)
        losses, grad_norm = step.train(recipe, world, built, data, counts["trained_tokens"], clock)
        step.advance(progress, counts, skipped=not math.isfinite(grad_norm))
        (loss,) = dist.sum_over_ranks(world, [sum(losses)], torch.float64)
        log.info("on the way: step %d  loss %.4f", progress.step, loss / counts["trained_tokens"])
    data, counts = step.load(world, plan, loader, waits)
    mine = [tuple(ref) for batch in data.micro_batches for ref in batch.samples]
    now = Counter(ref for refs in dist.gather(world, mine) for ref in refs)
    then = Counter(tuple(ref) for rank in told["micro_steps_by_rank"] for micro in rank for ref in micro["samples"])
    if now != then:
        changed = next(iter((now - then) + (then - now)))
        raise DataError(
            f"step {told['step']} no longer holds the samples it had, the first {changed}: files have changed, or "
            "images that were broken are whole now (or the other way round)"
        )
    return data, counts["trained_tokens"]


def _examine(
    recipe: Recipe,
    world: dist.World,
    built: state.Built,
    plan: DataPlan,
    data: StepData,
    trained_tokens: int,
    told: dict[str, Any],
    where: str,
    steps_between: int,
) -> Replay:
    losses: list[float] = []
    if built.draws is not None:
        built.draws.start_step(recipe.seed, data.step)
    batches = [batch.to(world.device) for batch in data.micro_batches]
    features = [
        tower_features(built.tower, b, built.dtype, recipe.vision_tiles_per_chunk, built.cache) for b in batches
    ]
    for number, (batch, encoded) in enumerate(zip(batches, features, strict=True), start=1):
        loss_sum = zero.forward(built.engine, batch, encoded, last=number == len(batches))
        zero.backward(built.engine, loss_sum, trained_tokens, mark_broken=False)  # the gradients as they are
        losses.append(float(loss_sum.detach()))
    gradients = _by_module(dist.gather(world, zero.largest_gradients(built.engine)))
    micro_steps = [
        MicroStep(loss, _sample_losses(world, built, plan, batch, encoded))
        for loss, batch, encoded in zip(losses, batches, features, strict=True)
    ]
    ranks = dist.gather(world, micro_steps)
    written = None
    if told["world_size"] == world.world_size:
        written = [[float(micro["loss"]) for micro in rank] for rank in told["micro_steps_by_rank"]]
    (total,) = dist.sum_over_ranks(world, [sum(losses)], torch.float64)
    loss = total / trained_tokens
    return Replay(told["step"], where, steps_between, ranks, written, loss, float(told["loss"]), gradients)


def _sample_losses(
    world: dist.World, built: state.Built, plan: DataPlan, batch: Batch, features: Tensor | None
) -> list[SampleLoss]:
    """The loss of each sample alone: the same forward with the labels of the others taken away.

    All ranks make as many calls as the one with the most samples.
    """
    segments = [s for s in segments_of(batch) if int((batch.labels.flatten()[s] != IGNORE_INDEX).sum())]
    assert len(segments) == len(batch.samples), "every sample trains a token"
    most = max(dist.gather(world, len(segments)))
    found = []
    built.engine.deepspeed.eval()
    try:
        with torch.no_grad():
            for number in range(most):
                labels = torch.full_like(batch.labels, IGNORE_INDEX)  # [B, S]
                if number < len(segments):
                    labels.view(-1)[segments[number]] = batch.labels.flatten()[segments[number]]
                count = int((labels != IGNORE_INDEX).sum())
                loss = float(built.engine.deepspeed(replace(batch, labels=labels, num_trained_tokens=count), features))
                if number < len(segments):
                    ref = batch.samples[number]
                    found.append(SampleLoss(ref, plan.indexes[ref.source].where(ref.row), loss, count))
    finally:
        built.engine.deepspeed.train()
    return found


def segments_of(batch: Batch) -> Iterator[slice]:
    """Each segment as a slice of the B*S flattened tokens, paddings included."""
    return (slice(begin, end) for begin, end in pairwise(batch.cu_seqlens.tolist()))


def module_name(parameter: str) -> str:
    """The part of the model that a parameter is listed under: a layer, or what has none.

    Example: "language_model.model.layers.3.mlp.up_proj.weight" gives "language_model.model.layers.3", and
    "projector.fc1.weight" gives "projector.fc1".
    """
    parts = parameter.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def _by_module(by_rank: Iterable[dict[str, float]]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for found in by_rank:
        for name, value in found.items():
            module = module_name(name)
            before = largest.get(module, 0.0)
            largest[module] = value if math.isnan(value) or value > before else before  # once NaN, `>` stays False
    return largest


def report(found: Replay) -> str:
    """The replay as text."""
    lines = [f"step {found.step} again, from {found.start}, {found.steps_between} steps on the way", ""]
    first = found.first_broken
    for rank, micro_steps in enumerate(found.ranks):
        for number, micro in enumerate(micro_steps, start=1):
            then = "" if found.written is None else f"  (in the run {found.written[rank][number - 1]!r})"
            lines.append(f"rank {rank} micro-step {number}: loss {micro.loss!r}{then}")
            for sample in micro.samples:
                mark = "  <- the first that is not finite" if first is not None and sample is first[2] else ""
                name = f"{sample.ref.source} row {sample.ref.row} epoch {sample.ref.epoch}"
                lines.append(f"  {name:<32} loss {sample.loss:<12.6g} {sample.tokens:>6} tokens  {sample.where}{mark}")
    lines += ["", "largest gradient of each module"]
    lines += [f"  {module:<44} {value:.4g}" for module, value in found.gradients.items()]
    lines.append("")
    if first is None:
        lines.append("all losses are finite: it is the gradient that was not")
    if found.same is None:
        lines.append(
            f"on {len(found.ranks)} ranks, the run had others: the step's loss is {found.loss!r}, in the run "
            f"{found.loss_written!r}; sums in another order differ by rounding"
        )
    else:
        lines.append(
            "every loss is the one in the run, bit for bit"
            if found.same
            else "losses differ from those in the run: another machine, library or frozen weight is at work"
        )
    return "\n".join(lines)
