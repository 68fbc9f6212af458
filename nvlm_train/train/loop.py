"""A training run, top to bottom: build everything, then load, step, log, validate, save, stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nvlm_train import attempts, checkpoint
from nvlm_train.attempts import Attempt
from nvlm_train.data.loader import StepLoader
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.engine import dist
from nvlm_train.engine.launch import Launch, resolve_launch
from nvlm_train.engine.waiting import CollectiveWait
from nvlm_train.errors import PeerError, RecipeError, is_users
from nvlm_train.hub import pin
from nvlm_train.log import set_up_logging
from nvlm_train.model.lora import is_trained
from nvlm_train.recipe.load import LoadedRecipe
from nvlm_train.recipe.resolve import Resolved, recipe_to_dict, resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import announce, nonfinite, oom, run_lock, state, step
from nvlm_train.train.branch import Branch, check_base, check_reached
from nvlm_train.train.metrics import Clock, Console, MetricsFile, Sink, open_sinks, peak_memory_gib
from nvlm_train.train.rehearsal import plan_rehearsal, rehearse
from nvlm_train.train.saving import Saver
from nvlm_train.train.stop import StopRequest
from nvlm_train.train.stragglers import RankTimes, Stragglers, gather_times, planned_work, summary
from nvlm_train.train.validation import ValidationResult, validate
from nvlm_train.train.watch import Watch
from nvlm_train.train.weights import account_for_weights, account_table, open_weights

log = logging.getLogger(__name__)


def train(loaded: LoadedRecipe, resume: str = "auto", accept: Sequence[str] = (), branch: Branch | None = None) -> int:
    """Trains a recipe from where its run directory stands to its last step, or until somebody asks it to stop.

    branch: the checkpoint of another run in which this one begins (`--from`).
    Returns the exit code. Raises NvlmError for what the user can put right.
    """
    set_up_logging()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # no library under us may wait for a server
        os.environ.setdefault(variable, "1")
    launch = resolve_launch()
    recipe, revisions = pin(loaded, checkpoint.recorded_revisions(Path(loaded.recipe.output_dir)))
    loaded = replace(loaded, recipe=recipe)
    resolved = resolve(recipe, launch.world_size)
    run = Path(recipe.output_dir)
    attempt = Attempt(run, launch.rank)
    with (
        StopRequest(run, recipe.checkpoint.signal, watch_files=launch.rank == 0) as stop,
        Watch(launch, recipe.distributed, run, stop, attempt=attempt) as watch,
        _told_to(attempt),
        watch.guard(),
    ):
        with run_lock.held(run, launch.rank):
            start = state.find_start(recipe, resume, accept, branch)
            if _is_complete(start, resolved.num_steps):
                if launch.rank == 0:
                    attempts.mark_done(run, start.step)
                return 0
            if launch.rank == 0:
                attempt.begin({"world_size": launch.world_size, **announce.provenance(launch)}, start.step)
            _train(loaded, launch, start, accept, stop, watch, attempt, revisions)
    return 0


@contextlib.contextmanager
def _told_to(attempt: Attempt) -> Iterator[None]:
    """Writes down how the attempt ended, unless that is done."""
    try:
        yield
    except PeerError as error:
        attempt.end("lost", str(error))
        raise
    except Exception as error:
        attempt.end("failed", f"{type(error).__name__}: {error}", user=is_users(error))
        raise
    except KeyboardInterrupt:
        attempt.end("stopped", "SIGINT")
        raise
    finally:
        attempt.end("done", "nothing was left to do")


def _train(
    loaded: LoadedRecipe,
    launch: Launch,
    start: state.Start,
    accept: Sequence[str],
    stop: StopRequest,
    watch: Watch,
    attempt: Attempt,
    revisions: dict[str, str],
) -> None:
    """Builds everything, then runs the steps. revisions: see `hub.pin`."""
    recipe = loaded.recipe
    weights = open_weights(recipe, start.goes_on_from)
    account = account_for_weights(recipe, weights)
    provenance = announce.provenance(launch)
    watch.mark("opening the data")
    plan = open_data(recipe, rank=launch.rank, world_size=launch.world_size, skipped=start.skipped)
    if _is_complete(start, plan.num_steps):
        return
    if start.leaves and start.branch is not None:
        check_reached(start.branch, plan.num_steps)
    resolved = resolve(recipe, launch.world_size, plan.num_steps)
    state.check_data(start, plan.state(start.step, start.skipped_before), accept)

    watch.mark("meeting the other ranks")
    store = watch.join()
    if store is not None:
        attempt.share(store)
    world = dist.start(launch, recipe.distributed.timeout_s, store)
    provenance["device"] = announce.device_name(world.device)
    try:
        dist.require_same(world, start.step, f"the step to start from in {start.run}", "is it one shared folder?")
        watch.mark("hashing the frozen weights")
        frozen = [name for name in account.loaded if not _is_trained(recipe, name)]
        state.write_base(start.run, frozen, weights, recipe.checkpoint.base == "copy", world)
        if start.leaves and start.branch is not None:
            check_base(start.run, start.branch)
        hashes: dict[str, str] = {}
        if not start.step:
            state.verify_earlier_run(recipe, world)
            watch.mark("hashing the weights that the run starts from")
            hashes = state.hash_weights(start.run, account.loaded, weights, world)
        watch.mark("loading the weights")
        built = state.build(recipe, resolved, world, weights, skip_trained=start.step > 0)
        with state.with_a_way_on(start):
            progress = state.restore(built, start.checkpoint) if start.checkpoint else state.Progress()
        if start.leaves:
            progress.forget_best()
        with dist.agreed(world, "writing the run's files"):
            if launch.rank == 0:
                checkpoint.set_leftovers_aside(start.run)
                state.set_aside(start)
                _remove_older(start, recipe, progress)
                state.write_run_files(start, recipe, resolved, provenance, revisions, hashes, plan)
        if _stopped_early(recipe, progress):
            log.info("%s stopped early: validation had not improved at step %d", start.run, progress.step)
            attempt.end("done", "validation no longer improves")
            return
        rehearsal = plan_rehearsal(recipe, plan, world, progress.step)
        if launch.rank == 0:
            idle = torch.cuda.device_count() - 1 if launch.launcher == "alone" and torch.cuda.is_available() else 0
            screen = announce.first_screen(
                recipe,
                resolved,
                launch,
                start,
                account_table(account, weights),
                str(world.device),
                provenance,
                plan,
                shlex.join([str(loaded.path), *loaded.overrides]),
                idle,
                rehearsal.announced(),
            )
            log.info("%s", "\n" + screen)
            for warning in resolved.warnings:
                log.warning("%s", warning)
        with oom.explained(recipe, resolved, built):
            watch.mark("worst case first")
            rehearse(recipe, world, built, plan, rehearsal)
            watch.started()
            attempt.end(*_run(recipe, resolved, world, built, plan, progress, start.run, stop, watch))
    finally:
        dist.stop(world)


def _is_complete(start: state.Start, num_steps: int | None) -> bool:
    if num_steps is None or start.step < num_steps:
        return False
    if start.leaves and start.branch is not None:
        raise RecipeError(
            f"--from {start.branch.checkpoint}: is at step {start.step}, and this run ends at step {num_steps}, so "
            "there is nothing to train; name an earlier checkpoint or give a larger max_steps"
        )
    log.info("%s is complete: step %d of %d", start.run, start.step, num_steps)
    return True


def _remove_older(start: state.Start, recipe: Recipe, progress: state.Progress) -> None:
    """Checkpoints that the recipe keeps no longer: a lowered keep_last makes room before the next save needs it."""
    kept = recipe.checkpoint
    best = [] if progress.best_step is None else [progress.best_step]
    if removed := checkpoint.prune(start.run, kept.keep_last, [start.step, *best], kept.keep_every_steps):
        names = ", ".join(f"step_{step}" for step in removed)
        log.info("removed %s, beyond checkpoint.keep_last %d", names, kept.keep_last)


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
    watch: Watch,
) -> tuple[str, str]:
    """The outcome of the attempt and the reason, see `Attempt.end`."""
    rank0 = world.rank == 0
    num_steps = plan.num_steps
    metrics = MetricsFile(run / "metrics.jsonl", progress.step) if rank0 else None
    console = Console(progress.step, num_steps) if rank0 else None
    config = {"recipe_hash": resolved.recipe_hash, **recipe_to_dict(recipe)}
    sinks = open_sinks(recipe.log.to, run, recipe.run_name, recipe.log.wandb_project, config) if rank0 else []
    saver = Saver(built, run, recipe, resolved, console.say if console is not None else lambda text: None, watch.alive)
    pin_for = world.device if world.device.type == "cuda" else None
    loader = StepLoader(plan, start_step=progress.step, end_step=num_steps, pin_for=pin_for)
    clock, waits = Clock(world.device), step.Waits()
    stragglers = Stragglers(dist.gather(world, platform.node()))
    since, tokens, tiles = time.monotonic(), 0, 0  # of the steps since the last line of metrics
    collectives = CollectiveWait(world.device)
    collectives.install()
    try:
        watch.mark("validation", progress.step)
        if progress.validation_due:  # the last attempt was asked to stop before it
            if _validate(recipe, world, built, plan, progress, metrics, console, sinks)[1]:
                return "done", "validation no longer improves"
            watch.alive()
            since = time.monotonic()
        clock.start()
        while progress.step < num_steps:
            logged = (progress.step + 1) % recipe.log.every_steps == 0 or progress.step + 1 == num_steps
            collectives.on = logged and world.world_size > 1
            watch.mark("data", progress.step + 1)
            data, counts = step.load(world, plan, loader, waits)
            clock.stop("data")
            rates = step.set_rates(recipe, resolved, built, progress.step)
            began = time.perf_counter()
            losses, grad_norm = step.train(recipe, world, built, data, counts["trained_tokens"], clock, watch.mark)
            ended = time.perf_counter()
            watch.mark("agreement")
            stop_asked, save_asked = stop.asked()
            asked = [sum(losses), float(stop_asked), float(save_asked), *saver.votes()]
            loss, stops, saves, *votes = dist.sum_over_ranks(world, asked, torch.float64)
            loss = loss / counts["trained_tokens"]
            waits.control += time.perf_counter() - ended
            waited, collective_wait = waits.take(), collectives.take()
            skipped = not math.isfinite(grad_norm)  # and nothing was updated
            assert skipped or math.isfinite(loss), f"step {progress.step + 1} was trained with a loss of {loss}"
            if skipped:
                nonfinite.leave_out(recipe, resolved, built, plan, progress, run, data, losses, loss, saver)
            if stops:
                watch.stop_agreed()
            step.advance(progress, counts, skipped=skipped)
            clock.stop("step")
            saver.agree(votes)
            watch.alive()
            last = progress.step == num_steps
            tokens, tiles = tokens + counts["tokens"], tiles + counts["tiles"]

            if logged or skipped:
                seconds, since = time.monotonic() - since, time.monotonic()
                spent, times = clock.take(), []
                if logged and world.world_size > 1:
                    compute = ended - began - collective_wait
                    times = gather_times(world, RankTimes(compute, waited.data, collective_wait + waited.control))
                if metrics is not None and console is not None:
                    record = _record(progress, counts, loss, grad_norm, rates)
                    record |= {"seconds": seconds, "tokens_per_s": tokens / seconds, "tiles_per_s": tiles / seconds}
                    record["data_step"] = plan.steps.data_step(data.step) + 1
                    record["balance"] = {
                        unit: round(ratio, 4) for unit, ratio in plan.balance(data.step)._asdict().items()
                    }
                    record["time"] = {part: round(value, 4) for part, value in spent.items()}
                    record["peak_memory_gib"] = round(peak_memory_gib(world.device), 3)
                    if skipped:
                        record["skipped"] = True
                    if times:
                        record["ranks"] = summary(times)
                    if slow := stragglers.look(times, planned_work(plan.deal_step(data.step))):
                        record["straggler"] = slow
                    _publish(metrics, console, sinks, record)
                    for news in stragglers.news(slow):
                        log.warning("%s", news)
                tokens = tiles = 0

            improved = early = False
            if recipe.validation is not None and (progress.step % recipe.validation.every_steps == 0 or last):
                progress.validation_due = True
            # asked to stop, saving comes first and the next start validates; after the last step there is none
            if progress.validation_due and (last or not stops):
                watch.mark("validation")
                improved, early = _validate(recipe, world, built, plan, progress, metrics, console, sinks)
                watch.alive()

            watch.mark("save")
            saver.save_if_due(
                progress,
                plan.state,
                asked=bool(saves),
                best=improved,
                final=last or bool(stops) or early,
            )
            if stops or early:
                why = f"asked by {stop.reason or 'another rank'}" if stops else "validation no longer improves"
                if console is not None:
                    console.say(
                        f"stopped after step {progress.step} of {num_steps}: {why}; saved {run}/step_{progress.step}"
                    )
                stop.forget_file()
                if stops and not (last or early):
                    return "stopped", stop.reason or "another rank"
                return "done", why
            since = time.monotonic() if progress.step % recipe.log.every_steps == 0 else since  # not of the next steps
            clock.start()
        return "done", f"step {num_steps}"
    except Exception:
        with watch.guard():  # before files are closed, which may take its time
            raise
    finally:
        collectives.remove()
        saver.close()
        loader.close()
        if built.cache is not None:
            log.info("%s", built.cache.summary())
        for sink in sinks:
            sink.close()
        if metrics is not None and console is not None:
            console.close()
            metrics.close()


def _record(
    progress: state.Progress,
    counts: dict[str, Any],
    loss: float,
    grad_norm: float,
    rates: dict[str, float],
) -> dict[str, Any]:
    return {
        "step": progress.step,
        "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "lr": rates,
        "trained_tokens": counts["trained_tokens"],
        "tokens": counts["tokens"],
        "tiles": counts["tiles"],
        "samples": progress.samples,
        "share": {source: n / max(progress.samples, 1) for source, n in progress.samples_by_source.items()},
        "bad_samples": counts["bad"],
        "skipped_steps": progress.skipped_steps,
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
