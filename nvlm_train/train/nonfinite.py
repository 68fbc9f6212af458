"""Steps with a loss or a gradient that is not finite: what is written down of them, and when the run stops.

The rule, on all ranks alike and at every stage of ZeRO: such a step changes no weight, no moment and no step count of
AdamW. Everything else goes on as if it had been trained: the step is counted, its data is used up, the schedule
advances, its line of metrics says `skipped`. So the data and the learning rate of a step depend on its number alone,
whatever was left out before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from nvlm_train import checkpoint
from nvlm_train.data.loader import StepData
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine import dist
from nvlm_train.errors import NvlmError
from nvlm_train.recipe.resolve import Resolved
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state
from nvlm_train.train.saving import Saver


def leave_out(
    recipe: Recipe,
    resolved: Resolved,
    built: state.Built,
    plan: DataPlan,
    progress: state.Progress,
    run: Path,
    data: StepData,
    losses: list[float],
    loss: float,
    saver: Saver,
) -> None:
    """Writes a broken step down; returns where the run goes on. Every rank calls it, before the step is counted.

    losses: this rank's sums, of each micro-step. loss: the step's mean over its trained tokens.
    Raises NvlmError where the run stops, after it has saved the state before the step; no older checkpoint goes then.
    """
    world, drawn = built.engine.world, plan.steps.data_step(data.step) + 1
    file = _write_down(run, world, data, losses, loss=loss, data_step=drawn, recipe_hash=resolved.recipe_hash)
    if recipe.on_nonfinite == "skip" and progress.nonfinite_in_a_row + 1 < recipe.max_nonfinite_steps:
        return
    saver.save_before_stop(progress, plan.state(progress.step))
    _stop(recipe, run, data.step + 1, drawn, loss, file)


def _write_down(
    run: Path, world: dist.World, data: StepData, losses: list[float], *, loss: float, data_step: int, recipe_hash: str
) -> Path:
    """Writes RUN/nonfinite/step_N.json, all that `train --replay` needs to know."""
    step = data.step + 1
    own = [
        {"loss": repr(value), "samples": [list(ref) for ref in batch.samples]}  # JSON has no NaN; repr keeps every bit
        for value, batch in zip(losses, data.micro_batches, strict=True)
    ]
    ranks = dist.gather(world, own)
    file = run / "nonfinite" / f"step_{step}.json"
    with dist.agreed(world, f"writing {file}"):
        if world.rank == 0:
            file.parent.mkdir(exist_ok=True)
            content: dict[str, Any] = {"format": checkpoint.FORMAT, "step": step, "data_step": data_step}
            content |= {"loss": repr(loss), "recipe_hash": recipe_hash, "world_size": world.world_size}
            checkpoint.write_json(file, {**content, "micro_steps_by_rank": ranks})
    return file


def _stop(recipe: Recipe, run: Path, step: int, data_step: int, loss: float, file: Path) -> NoReturn:
    """Raises what a broken step ends the run with; the state before it has been saved."""
    what = (
        f"loss is {loss}" if loss != loss or abs(loss) == float("inf") else f"the gradient is not finite (loss {loss})"
    )
    how = f", {recipe.max_nonfinite_steps} steps in a row (max_nonfinite_steps)"
    before = run / f"step_{step - 1}"
    raise NvlmError(
        f"step {step}: {what}{how if recipe.on_nonfinite == 'skip' else ''}; it was left out and the run stops, "
        + (f"with the state before it in {before}. " if step > 1 else "with nothing trained. ")
        + f"The samples of this step (source, row, epoch) and their losses are in {file}. "
        f"Look at it again, sample by sample: train R.yaml --replay {file}. "
        + (
            f"Go on past it in a new run: train R.yaml output_dir=NEW --from {before} --skip-steps "
            f"{data_step}:{data_step}. "
            if step > 1
            else "Lower optimizer.lr, lengthen schedule.warmup_steps, or check these samples. "
        )
        + ("" if recipe.on_nonfinite == "skip" else "Leave out such steps without stopping: on_nonfinite=skip")
    )
