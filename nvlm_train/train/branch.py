"""A run that goes on from a checkpoint of another one, past data that it never draws: `--from RUN/step_N
--skip-steps A:B`.

Weights, moments, schedule and counters are those of the checkpoint. Step k of the new run trains the k-th data step
that is not skipped (`data.windows.data_step`), so the order stays a pure function. Where the run began and what it
skips stand in its recipe.json, and in the state.json of its checkpoints; later starts take it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train import checkpoint
from nvlm_train.data.windows import Stretch, data_step, merge_stretches
from nvlm_train.errors import CheckpointError, RecipeError


@dataclass(frozen=True)
class Branch:
    """Where a run began.

    checkpoint: RUN/step_N of another run. inherited: data steps that that run skipped. skipped: all that this one does.
    """

    checkpoint: Path
    step: int
    inherited: tuple[Stretch, ...]
    skipped: tuple[Stretch, ...]
    recorded: dict[str, Any]  # for recipe.json: path, step, recipe_hash, skip_steps, and where that run began

    def skips(self) -> str:
        """The skipped data steps in words: `7 to 9, 12 to 12`, or `nothing`."""
        return ", ".join(f"{first} to {last}" for first, last in self.skipped) or "nothing"


def open_branch(path: str, skip: Sequence[Stretch]) -> Branch:
    """What `--from` and `--skip-steps` ask for.

    skip: stretches of data steps, counted as `data_step` in the metrics of the run behind `path`.
    Raises CheckpointError where there is no such checkpoint, RecipeError where it was trained on what is to be skipped.
    """
    if Path(path).name.startswith("weights_"):
        raise RecipeError(
            f"--from {path}: holds bf16 weights alone, without the state to go on with; start a new run from them with "
            f"init_from.run={path}, or name a checkpoint step_N"
        )
    if not Path(path).name.startswith("step_"):
        raise RecipeError(
            f"--from {path}: names a run, whose newest checkpoint will be another one tomorrow; name one: "
            f"{Path(path) / 'step_N'}"
        )
    folder = checkpoint.find_step(path)
    content = checkpoint.read_json(folder.parent / "recipe.json")
    step = int(checkpoint.read_state(folder)["step"])
    before = content.get("continued_from")
    inherited = _stretches(before["skip_steps"]) if before else ()
    trained = data_step(step - 1, inherited) + 1 if step else 0
    for first, last in skip:
        if first <= trained:
            earlier = [n for n in checkpoint.committed_steps(folder.parent) if data_step(n - 1, inherited) + 1 < first]
            there = f"step_{earlier[-1]} is" if earlier else "no checkpoint of this run is"
            raise RecipeError(
                f"--skip-steps {first}:{last}: {folder} has been trained on the data of steps up to {trained} already; "
                f"go on from a checkpoint before step {first} ({there}), or skip from {trained + 1} on"
            )
    skipped = merge_stretches([*inherited, *skip])
    recorded = {
        "path": str(folder.absolute()),
        "step": step,
        "recipe_hash": content["recipe_hash"],
        "skip_steps": [list(stretch) for stretch in skipped],
        "continued_from": before,
    }
    return Branch(folder.absolute(), step, inherited, skipped, recorded)


def recorded_branch(content: dict[str, Any]) -> Branch | None:
    """Where the run behind this recipe.json began, if it went on from another."""
    found = content.get("continued_from")
    if found is None:
        return None
    before = found["continued_from"]
    inherited = _stretches(before["skip_steps"]) if before else ()
    return Branch(Path(found["path"]), found["step"], inherited, _stretches(found["skip_steps"]), found)


def check_reached(branch: Branch, num_steps: int) -> None:
    """Raises RecipeError where a run of `num_steps` steps ends before data that it was told to skip: a mistyped step
    would go unnoticed."""
    last = data_step(num_steps - 1, branch.skipped) + 1
    if beyond := [stretch for stretch in branch.skipped if stretch[0] > last]:
        raise RecipeError(
            f"--skip-steps {beyond[0][0]}:{beyond[0][1]}: this run ends with data step {last} (step {num_steps}) and "
            f"never reaches them; steps are counted as `data_step` in {branch.checkpoint.parent / 'metrics.jsonl'}"
        )


def check_base(run: Path, branch: Branch) -> None:
    """Compares the frozen weights that this run starts with with those of the run it goes on from.

    Raises CheckpointError where they differ. `run`/base.json has been written.
    """
    then, now = (_origins(checkpoint.read_json(path / "base.json")) for path in (branch.checkpoint.parent, run))
    wrong = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} frozen weights are not those that {branch.checkpoint} was trained with, the first "
            f"{wrong[0]}; name the same weights in init_from"
        )


def _origins(base: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {name: (base["files"][entry["file"]]["sha256"], entry["key"]) for name, entry in base["tensors"].items()}


def _stretches(found: Sequence[Sequence[int]]) -> tuple[Stretch, ...]:
    return tuple((first, last) for first, last in found)
