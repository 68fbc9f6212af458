"""When a run is saved, and the save that is on its way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvlm_train import checkpoint
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.optim import full_shape
from nvlm_train.recipe.resolve import Resolved
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state

log = logging.getLogger(__name__)


class Saver:
    """Saves a run, at once or beside the training (`checkpoint.asynchronous`).

    A save beside the training copies this rank's state at the step boundary and writes the copy in a thread. Ranks
    agree through the sum that the loop takes in every step anyway: each adds its `votes`, and `agree` hears the result.
    One save is on its way at a time. A request that may wait is put off until that one is committed, and counted; one
    that is bound to its step (a milestone, the best of validation, the end of the run) waits for it.
    """

    def __init__(
        self,
        built: state.Built,
        run: Path,
        recipe: Recipe,
        resolved: Resolved,
        say: Callable[[str], object],
        alive: Callable[[], object],
    ) -> None:
        """say: tells the user, on rank 0. alive: the rank got on (see `Watch`)."""
        self._built, self._run, self._recipe, self._resolved = built, run, recipe.checkpoint, resolved
        self._engine, self._world = built.engine, built.engine.world
        self._say, self._alive = say, alive
        self._shapes = {name: tuple(full_shape(p)) for name, p in self._engine.trainable()}
        self._snapshot = zero.Snapshot(self._engine) if recipe.checkpoint.asynchronous else None
        self._save: checkpoint.Save | None = None
        self._last = time.monotonic()  # when the newest save began
        self._minutes_over = self._owed = False
        self._steps_beside = 0  # steps since the save that is on its way began
        self._waited_s = 0.0  # seconds that training stood still for it
        self.put_off = 0  # requests that came while a save was on its way

    def votes(self) -> list[float]:
        """What this rank adds to the step's sum: its part of the save is written, the save takes too long, the minutes
        are over. The last two by rank 0's clock alone."""
        save, rank0 = self._save, self._world.rank == 0
        late = save is not None and rank0 and save.late(self._recipe.timeout_s)
        minutes = self._recipe.every_minutes
        over = rank0 and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        return [float(save is not None and save.ready()), float(late), float(over)]

    def agree(self, votes: list[float]) -> None:
        """Takes the sum of all ranks' `votes`; commits what all have written. Raises CheckpointError on all ranks."""
        ready, late, over = votes
        self._minutes_over = over > 0
        if self._save is None:
            return
        self._steps_beside += 1
        if ready == self._world.world_size:
            began = time.monotonic()
            committed = self._save.advance()
            self._waited_s += time.monotonic() - began
            if committed:
                self._tell()
        elif late:
            self._save.raise_late(self._recipe.timeout_s)

    def save_if_due(
        self,
        progress: state.Progress,
        data_at: Callable[[int], dict[str, Any]],
        *,
        asked: bool,
        best: bool,
        final: bool,
    ) -> None:
        """Saves the state after `progress.step` where something asks for it; every rank calls it after every step.

        data_at: where the data stands after so many steps. asked: somebody wants a checkpoint soon. best: this step's
        must be kept. final: the run ends here; everything is on disk when this returns.
        """
        recipe, step = self._recipe, progress.step
        bound = best or final or _is_multiple(step, recipe.keep_every_steps)
        asked = asked or self._minutes_over or _is_multiple(step, recipe.every_steps)
        milestone = _is_multiple(step, recipe.weights_every)
        if self._save is not None and asked and not bound and not milestone:
            self.put_off += not self._owed
            self._owed = True
            return
        due = bound or asked or (self._owed and self._save is None)
        if not (due or milestone):
            return
        self.finish()
        self._owed = self._owed and not due
        self._begin(progress, data_at(step), [*(["weights"] if milestone else []), *(["step"] if due else [])])
        if final or self._snapshot is None:
            self.finish()

    def finish(self) -> None:
        """Waits until the save that is on its way, if any, is committed."""
        if self._save is not None:
            began = time.monotonic()
            self._save.wait(self._recipe.timeout_s, self._alive)
            self._waited_s += time.monotonic() - began
            self._tell()

    def save_before_stop(self, progress: state.Progress, data: dict[str, Any]) -> None:
        """Saves the state as it is, at once, unless it is saved already; no older checkpoint goes then."""
        self.finish()
        saved = dist.gather(self._world, checkpoint.committed_steps(self._run))[0]  # as rank 0 sees the folder
        if progress.step and progress.step not in saved:
            self._begin(progress, data, ["step"], prune=False)
            self.finish()

    def close(self) -> None:
        """Lets go of a save that is still on its way: the run ends with an error."""
        if self._save is not None:
            self._save.abandon()

    def _begin(self, progress: state.Progress, data: dict[str, Any], kinds: list[str], prune: bool = True) -> None:
        began = time.monotonic()
        keep = [] if progress.best_step is None else [progress.best_step]

        def remove_older() -> None:
            try:
                checkpoint.prune(self._run, self._recipe.keep_last, keep, self._recipe.keep_every_steps)
            except OSError as error:  # the new checkpoint is there all the same
                log.warning("old checkpoints could not be removed: %s", error)

        save = checkpoint.Save(
            self._run,
            progress.step,
            self._shapes,
            state.describe(self._built, self._resolved, progress, data),
            rank=self._world.rank,
            world_size=self._world.world_size,
            gather=lambda value: dist.gather(self._world, value),
            kinds=kinds,
            committed=remove_older if prune else lambda: None,
        )
        save.begin((self._snapshot or zero.Snapshot(self._engine)).take())
        self._save = save
        self._last = time.monotonic()
        self._steps_beside, self._waited_s = 0, self._last - began

    def _tell(self) -> None:
        save, self._save = self._save, None
        assert save is not None
        self._alive()
        names = " and ".join(str(path) for path in save.paths)
        per_parameter = sum(map(checkpoint.bytes_per_parameter, save.kinds))
        text = f"saved {names} in {time.monotonic() - save.began:.1f} s, {save.bytes / 1e6:.1f} MB"
        text += f" ({per_parameter} bytes a trained parameter)"
        if self._snapshot is not None:
            text += f", beside {self._steps_beside} steps, which waited {self._waited_s:.2f} s"
        if self.put_off:
            text += f"; {self.put_off} requests put off so far"
        self._say(text)


def _is_multiple(step: int, of: int | None) -> bool:
    return of is not None and of > 0 and step % of == 0
