"""A training run, top to bottom: build everything, then load, step, log, validate, save, stop."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nvlm_train import checkpoint
from nvlm_train.data.loader import StepData, StepLoader
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.engine.optim import set_learning_rates
from nvlm_train.errors import DataError, NvlmError
from nvlm_train.log import set_up_logging
from nvlm_train.model.lora import is_trained
from nvlm_train.recipe.load import LoadedRecipe
from nvlm_train.recipe.resolve import Resolved, lr_factor, recipe_to_dict, resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import announce, state
from nvlm_train.train.loss import tower_features
from nvlm_train.train.metrics import Clock, Console, MetricsFile, Sink, open_sinks, peak_memory_gib
from nvlm_train.train.stop import StopRequest
from nvlm_train.train.validation import ValidationResult, validate
from nvlm_train.train.watch import HangWatch

log = logging.getLogger(__name__)


def train(loaded: LoadedRecipe, resume: str = "auto", accept: Sequence[str] = ()) -> int:
    """Trains a recipe from where its run directory stands to its last step, or until somebody asks it to stop.

    Returns the exit code. Raises NvlmError for what the user can put right.
    """
    set_up_logging()
    recipe = loaded.recipe
    launch = resolve_launch()
    resolved = resolve(recipe, launch.world_size)
    start = state.find_start(recipe, resume, accept)
    if _is_complete(start, resolved.num_steps):
        return 0

    weights = state.open_weights(recipe)
    account = state.account_for_weights(recipe, weights)
    attempt = announce.provenance(launch)
    plan = open_data(recipe, rank=launch.rank, world_size=launch.world_size)
    if _is_complete(start, plan.num_steps):
        return 0
    resolved = resolve(recipe, launch.world_size, plan.num_steps)
    state.check_data(start, plan.state(start.step), accept)

    world = dist.start(launch, recipe.distributed.timeout_s)
    try:
        dist.barrier(world)  # every rank has looked at the run directory; only now may it change
        frozen = {name: weights.where(name) for name in account.loaded if not _is_trained(recipe, name)}
        state.write_base(start.run, frozen, world)
        if not start.step:
            state.verify_earlier_run(recipe, world)
        built = state.build(recipe, resolved, world, weights, skip_trained=start.step > 0)
        progress = state.restore(built, start.checkpoint) if start.checkpoint else state.Progress()
        with dist.agreed(world, "writing the run's files"):
            if launch.rank == 0:
                checkpoint.clear_leftovers(start.run)
                state.set_aside(start)
                state.write_run_files(start, recipe, resolved, attempt)
        if _stopped_early(recipe, progress):
            log.info("%s stopped early: validation had not improved at step %d", start.run, progress.step)
            return 0
        if launch.rank == 0:
            idle = torch.cuda.device_count() - 1 if launch.launcher == "alone" and torch.cuda.is_available() else 0
            screen = announce.first_screen(
                recipe,
                resolved,
                launch,
                start,
                account,
                str(world.device),
                attempt,
                plan,
                shlex.join([str(loaded.path), *loaded.overrides]),
                idle,
            )
            log.info("%s", "\n" + screen)
        stacks = start.run / f"stacks_rank_{launch.rank}.txt"
        with (
            HangWatch(recipe.distributed.hang_s, stacks) as watch,
            StopRequest(start.run, recipe.checkpoint.signal, watch_files=launch.rank == 0) as stop,
        ):
            _run(recipe, resolved, world, built, plan, progress, start.run, stop, watch)
        return 0
    finally:
        dist.stop(world)


def _is_complete(start: state.Start, num_steps: int | None) -> bool:
    if num_steps is None or start.step < num_steps:
        return False
    log.info("%s is complete: step %d of %d", start.run, start.step, num_steps)
    return True


def _stopped_early(recipe: Recipe, progress: state.Progress) -> bool:
    early = recipe.validation.early_stop if recipe.validation is not None else None
    same = progress.best_measure == state.validation_measure(recipe)
    return early is not None and same and progress.validations_without_improvement >= early.patience


def _is_trained(recipe: Recipe, name: str) -> bool:
    return is_trained(name, recipe.train.modes[state.module_of(name)])


def _run(
    recipe: Recipe,
    resolved: Resolved,
    world: dist.World,
    built: state.Built,
    plan: DataPlan,
    progress: state.Progress,
    run: Path,
    stop: StopRequest,
    watch: HangWatch,
) -> None:
    rank0 = world.rank == 0
    num_steps = plan.num_steps
    metrics = MetricsFile(run / "metrics.jsonl", progress.step) if rank0 else None
    console = Console(progress.step, num_steps) if rank0 else None
    config = {"recipe_hash": resolved.recipe_hash, **recipe_to_dict(recipe)}
    sinks = open_sinks(recipe.log.to, run, recipe.run_name, recipe.log.wandb_project, config) if rank0 else []
    loader = StepLoader(plan, start_step=progress.step, end_step=num_steps)
    clock = Clock(world.device)
    since, tokens, tiles = time.monotonic(), 0, 0  # of the steps since the last line of metrics
    try:
        if progress.validation_due:  # the last attempt was asked to stop before it
            if _validate(recipe, world, built, plan, progress, metrics, console, sinks)[1]:
                return
            watch.alive()
            since = time.monotonic()
        clock.start()
        while progress.step < num_steps:
            data, counts = _load(world, plan, loader)
            clock.stop("data")
            rates = _set_rates(recipe, resolved, built, progress.step)
            losses, grad_norm = _step(recipe, world, built, data, counts["trained_tokens"], clock)
            stop_asked, save_asked = stop.asked()
            asked = [sum(losses), float(stop_asked), float(save_asked)]
            loss, stops, saves = dist.sum_over_ranks(world, asked, torch.float64)
            loss = loss / counts["trained_tokens"] if counts["trained_tokens"] else math.nan
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                _stop_for_non_finite(world, loss, grad_norm, progress.step + 1, data, losses, run)
            _advance(progress, counts)
            clock.stop("step")
            watch.alive()
            last = progress.step == num_steps
            tokens, tiles = tokens + counts["tokens"], tiles + counts["tiles"]

            if progress.step % recipe.log.every_steps == 0 or last:
                seconds, since = time.monotonic() - since, time.monotonic()
                if metrics is not None and console is not None:
                    record = _record(progress, counts, loss, grad_norm, rates)
                    record |= {"seconds": seconds, "tokens_per_s": tokens / seconds, "tiles_per_s": tiles / seconds}
                    record["balance"] = {
                        unit: round(ratio, 4) for unit, ratio in plan.balance(data.step)._asdict().items()
                    }
                    record["time"] = {part: round(value, 4) for part, value in clock.take().items()}
                    record["peak_memory_gib"] = round(peak_memory_gib(world.device), 3)
                    _publish(metrics, console, sinks, record)
                tokens = tiles = 0

            improved = early = False
            if recipe.validation is not None and (progress.step % recipe.validation.every_steps == 0 or last):
                progress.validation_due = True
            # asked to stop, saving comes first and the next start validates; after the last step there is none
            if progress.validation_due and (last or not stops):
                improved, early = _validate(recipe, world, built, plan, progress, metrics, console, sinks)
                watch.alive()

            if last or stops or saves or improved or early or progress.step % recipe.checkpoint.every_steps == 0:
                began = time.monotonic()
                path = state.save(built, run, progress, recipe, resolved, plan.state(progress.step))
                watch.alive()
                if console is not None:
                    console.say(f"saved {path} in {time.monotonic() - began:.1f} s")
            if stops or early:
                if console is not None:
                    why = f"asked by {stop.reason or 'another rank'}" if stops else "validation no longer improves"
                    console.say(f"stopped after step {progress.step} of {num_steps}: {why}; saved {path}")
                stop.forget_file()
                break
            since = time.monotonic() if progress.step % recipe.log.every_steps == 0 else since  # not of the next steps
            clock.start()
    finally:
        loader.close()
        if built.cache is not None:
            log.info("%s", built.cache.summary())
        for sink in sinks:
            sink.close()
        if metrics is not None and console is not None:
            console.close()
            metrics.close()


def _load(world: dist.World, plan: DataPlan, loader: StepLoader) -> tuple[StepData, dict[str, Any]]:
    """This rank's part of the next step, and what the step really holds on all ranks together, after decoding.

    One small int64 all-reduce: it fixes the denominator of the loss before the first backward, and it tells the other
    ranks when data failed on one of them, so that all stop with its message instead of waiting for it.
    """
    data: StepData | None = None
    error: Exception | None = None
    try:
        data = next(loader)
    except Exception as raised:
        error = raised
    sources = list(plan.mixture.names)
    values = [int(error is not None)] + [0] * (5 + len(sources))
    if data is not None:
        values = [0, data.trained_tokens, data.tokens, data.tiles, data.samples, sum(data.bad.values())]
        values += [data.samples_by_source.get(source, 0) for source in sources]
    summed = dist.sum_over_ranks(world, values, torch.int64)
    if summed[0]:
        dist.raise_together(world, error, "loading data")
    assert data is not None
    totals: dict[str, Any] = dict(
        zip(("trained_tokens", "tokens", "tiles", "samples", "bad"), summed[1:], strict=False)
    )
    totals["samples_by_source"] = dict(zip(sources, summed[6:], strict=True))
    return data, totals


def _set_rates(recipe: Recipe, resolved: Resolved, built: state.Built, step: int) -> dict[str, float]:
    assert resolved.warmup_steps is not None and resolved.decay_steps is not None  # the run's steps are known by now
    factor = lr_factor(
        step,
        resolved.warmup_steps,
        resolved.decay_steps,
        recipe.schedule.name,
        recipe.schedule.min_lr / recipe.optimizer.lr,
    )
    return set_learning_rates(built.engine.optimizer, factor)


def _step(
    recipe: Recipe, world: dist.World, built: state.Built, data: StepData, trained_tokens: int, clock: Clock
) -> tuple[list[float], float]:
    """One optimizer step. Returns this rank's sum of losses of each micro-step and the global gradient norm."""
    losses = []
    clock.start()
    if built.draws is not None:
        built.draws.start_step(recipe.seed, data.step)
    for number, host_batch in enumerate(data.micro_batches, start=1):
        batch = host_batch.to(world.device)
        features = tower_features(built.tower, batch, built.dtype, recipe.vision_tiles_per_chunk, built.cache)
        clock.stop("vision")
        loss_sum = zero.forward(built.engine, batch, features, last=number == len(data.micro_batches))
        clock.stop("forward")
        zero.backward(built.engine, loss_sum, trained_tokens)
        clock.stop("backward")
        losses.append(loss_sum.detach())
    grad_norm = zero.step(built.engine)
    return torch.stack(losses).double().tolist(), grad_norm


def _stop_for_non_finite(
    world: dist.World, loss: float, grad_norm: float, step: int, data: StepData, losses: list[float], run: Path
) -> None:
    """Stops before a step with a broken loss or gradient can be saved; the last checkpoint stays as it is.

    What the step was made of is written down: RUN/nonfinite/step_N.json, every rank's samples and losses.
    """
    own = [
        {"loss": value, "samples": [list(ref) for ref in batch.samples]}
        for value, batch in zip(losses, data.micro_batches, strict=True)
    ]
    ranks = dist.gather(world, own)
    trained = sum(dist.gather(world, data.trained_tokens))
    if not trained:
        raise DataError(
            f"step {step}: none of its samples could be used, so there is nothing to train on; see "
            f"{run / 'bad_samples.jsonl'}"
        )
    file = run / "nonfinite" / f"step_{step}.json"
    with dist.agreed(world, f"writing {file}"):
        if world.rank == 0:
            file.parent.mkdir(exist_ok=True)
            content = {"format": checkpoint.FORMAT, "step": step, "loss": str(loss), "grad_norm": str(grad_norm)}
            text = [[{**micro, "loss": str(micro["loss"])} for micro in rank] for rank in ranks]
            checkpoint.write_json(file, {**content, "micro_steps_by_rank": text})
    raise NvlmError(
        f"step {step}: loss is {loss}, gradient norm {grad_norm}; nothing was saved after the last checkpoint in {run}."
        f" The samples of this step (source, row, epoch) and their losses are in {file}. Lower optimizer.lr, lengthen "
        "schedule.warmup_steps, or check these samples; then start again to resume"
    )


def _advance(progress: state.Progress, counts: dict[str, Any]) -> None:
    progress.step += 1
    progress.samples += counts["samples"]
    progress.trained_tokens += counts["trained_tokens"]
    progress.bad_samples += counts["bad"]
    for source, samples in counts["samples_by_source"].items():
        progress.samples_by_source[source] = progress.samples_by_source.get(source, 0) + samples


def _record(
    progress: state.Progress,
    counts: dict[str, Any],
    loss: float,
    grad_norm: float,
    rates: dict[str, float],
) -> dict[str, Any]:
    return {
        "step": progress.step,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": rates,
        "trained_tokens": counts["trained_tokens"],
        "tokens": counts["tokens"],
        "tiles": counts["tiles"],
        "samples": progress.samples,
        "share": {source: n / max(progress.samples, 1) for source, n in progress.samples_by_source.items()},
        "bad_samples": counts["bad"],
    }


def _publish(metrics: MetricsFile, console: Console, sinks: list[Sink], record: dict[str, Any]) -> None:
    metrics.write(record)
    console.step(record)
    for sink in sinks:
        sink.write(record)


def _validate(
    recipe: Recipe,
    world: dist.World,
    built: state.Built,
    plan: DataPlan,
    progress: state.Progress,
    metrics: MetricsFile | None,
    console: Console | None,
    sinks: list[Sink],
) -> tuple[bool, bool]:
    result = validate(
        built.engine, built.tower, plan, world, dtype=built.dtype, tiles_per_chunk=recipe.vision_tiles_per_chunk
    )
    progress.validation_due = False
    improved, early = _judge(recipe, progress, result)
    if metrics is not None and console is not None:
        _publish_validation(metrics, console, sinks, progress, result, improved)
    return improved, early


def _judge(recipe: Recipe, progress: state.Progress, result: ValidationResult) -> tuple[bool, bool]:
    """(this is the best so far, it is time to stop early)."""
    assert recipe.validation is not None
    loss = result.marked(recipe.validation.best)
    measure = state.validation_measure(recipe)
    if progress.best_measure != measure:  # another set or another mark: older losses do not compare
        progress.best_loss, progress.validations_without_improvement, progress.best_measure = None, 0, measure
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step, progress.validations_without_improvement = loss, progress.step, 0
        return True, False
    progress.validations_without_improvement += 1
    return False, _stopped_early(recipe, progress)


def _publish_validation(
    metrics: MetricsFile,
    console: Console,
    sinks: list[Sink],
    progress: state.Progress,
    result: ValidationResult,
    improved: bool,
) -> None:
    record = {"step": progress.step, "validation": result.losses, "validation_tokens": result.tokens, "best": improved}
    metrics.write(record)
    for sink in sinks:
        sink.write(record)
    losses = "  ".join(f"{name} {loss:.4f}" for name, loss in result.losses.items())
    console.say(f"validation at step {progress.step}: {losses}{'  (best so far)' if improved else ''}")
