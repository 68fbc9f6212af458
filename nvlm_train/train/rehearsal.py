"""The worst case first: the heaviest packs of the run go forward and backward before step 1 and leave no trace.

So a run that will not fit says so in its first minute. The moments of AdamW are made before, as they will be there from
step 2 on; what the update itself needs on top is not covered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm_train.data import packing
from nvlm_train.data.assembly import Builder
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan
from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state
from nvlm_train.train.loss import tower_features

SEARCH_S = 3.0  # for planning steps; about 30 us a sample


@dataclass(frozen=True)
class Heavy:
    """What one rank runs in one micro-step, and why it was chosen."""

    packs: Sequence[Pack]
    step: int  # from 1
    text: str


@dataclass(frozen=True)
class Rehearsal:
    """What is run first. last: the step up to which the plan was searched."""

    heavy: Sequence[Heavy]
    first: int
    last: int
    num_steps: int

    def announced(self) -> str:
        """One line for the first screen."""
        if not self.heavy:
            return "off (worst_case_first)"
        searched = f"of steps {self.first} to {self.last}" + (
            f" (the plan of all {self.num_steps} takes too long)" if self.last < self.num_steps else ""
        )
        return f"the heaviest {searched} is run first and discarded: " + "; ".join(one.text for one in self.heavy)


def _padded_tokens(packs: Sequence[Pack]) -> int:
    return len(packs) * max(item.tokens for item in packs)


def _tiles(packs: Sequence[Pack]) -> int:
    return sum(item.tiles for item in packs)


def _cost(packs: Sequence[Pack]) -> float:
    return sum(item.cost for item in packs)


_MEASURES: dict[str, Callable[[Sequence[Pack]], float]] = {"tokens": _padded_tokens, "tiles": _tiles, "cost": _cost}


def plan_rehearsal(recipe: Recipe, plan: DataPlan, world: dist.World, first_step: int) -> Rehearsal:
    """The heaviest of the steps from `first_step` on: by tokens (padding included), tiles and cost.

    Rank 0 searches, for at most SEARCH_S seconds, from the first step on; all ranks get the same.
    """
    found = Rehearsal((), first_step + 1, first_step, plan.num_steps)
    with dist.agreed(world, "looking for the heaviest pack"):
        if world.rank == 0 and recipe.worst_case_first:
            found = _search(plan, first_step)
    heaviest: Rehearsal = dist.gather(world, found)[0]
    return heaviest


def _search(plan: DataPlan, first_step: int) -> Rehearsal:
    until = time.monotonic() + SEARCH_S
    best: dict[str, tuple[float, int, Sequence[Pack]]] = {}
    step = first_step
    while step < plan.num_steps and (step == first_step or time.monotonic() < until):
        dealt = packing.deal(plan.plan_step(step), plan.world_size, plan.recipe.micro_batch_size)
        for held in (held for ranks in dealt for held in ranks):
            for name, measure in _MEASURES.items():
                if name not in best or measure(held) > best[name][0]:
                    best[name] = measure(held), step, held
        step += 1
    heavy: dict[int, Heavy] = {}
    for name, (_, at, chosen) in best.items():
        words = [*([heavy[id(chosen)].text.split(" by ")[1]] if id(chosen) in heavy else []), name]
        size = f"{_padded_tokens(chosen):,} tokens and {_tiles(chosen):,} tiles of step {at + 1}"
        heavy[id(chosen)] = Heavy(chosen, at + 1, f"{size} by {' and '.join(words)}")
    return Rehearsal(list(heavy.values()), first_step + 1, step, plan.num_steps)


def rehearse(recipe: Recipe, world: dist.World, built: state.Built, plan: DataPlan, rehearsal: Rehearsal) -> None:
    """Runs what was found on every rank at once. No weight, moment, count or learning rate is another afterwards."""
    if not rehearsal.heavy:
        return
    zero.allocate_optimizer_state(built.engine)
    for heavy in rehearsal.heavy:
        if built.draws is not None:
            built.draws.start_step(recipe.seed, heavy.step)
        with dist.agreed(world, f"loading the heaviest pack, of step {heavy.step}"):
            builder = Builder(plan, recipe.data.num_threads, augment=False, name="nvlm-rehearsal")
            try:
                host_batch = builder.submit(heavy.packs, plan.chunks([heavy.packs])).result().batch
            finally:
                builder.close()
        batch = host_batch.to(world.device)
        features = tower_features(built.tower, batch, built.dtype, recipe.vision_tiles_per_chunk)
        loss_sum = zero.forward(built.engine, batch, features, last=True)
        zero.backward_and_discard(built.engine, loss_sum)
