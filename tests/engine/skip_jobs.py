"""Jobs for warm ranks: a step with a broken loss or gradient beside a training that never saw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.model.nvlm import encode_tiles
from zero_jobs import DTYPES, deal, full_state, start

SAMPLES = [(9, 1), (7, 0), (12, 2), (5, 0)]


class _BrokenBackward(torch.autograd.Function):
    """The loss as it is; the gradient infinite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * torch.inf


BREAK = {
    "none": lambda loss: loss,
    "infinite loss": lambda loss: loss + torch.inf,  # its gradient alone would be finite
    "broken gradient": _BrokenBackward.apply,
}


def broken_steps_leave_no_trace(
    *, rank: int, world_size: int, cases: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Of each case: states after steps 0, 1, 2 with broken steps before and between them, and without."""
    found = {}
    for case in cases:
        precision = case.get("precision", "fp32")
        state = {}
        for kind in ("broken", "clean"):
            engine, tower, world = start(clip=0.5, **case)
            norms = []
            for number, how in _SEQUENCE if kind == "broken" else [(0, "none"), (1, "none"), (2, "none")]:
                norms.append(_one(engine, tower, world, number, how, DTYPES[precision]))
            steps = {float(held["step"]) for held in engine.deepspeed.basic_optimizer.state.values()}
            state[kind] = {"norms": norms, "adam_steps": steps, **full_state(engine, world)}
        same = all(
            torch.equal(state["broken"][key][name], value)
            for key in zero.STATE_KEYS
            for name, value in state["clean"][key].items()
        )
        found[str(case)] = {
            "same": same,
            "norms": [norm for norm in state["broken"]["norms"] if norm == norm] == state["clean"]["norms"],
            "skipped": [norm != norm for norm in state["broken"]["norms"]],
            "adam_steps": state["broken"]["adam_steps"],
        }
    return found


_SEQUENCE = [(7, "infinite loss"), (0, "none"), (8, "broken gradient"), (9, "infinite loss"), (1, "none"), (2, "none")]


def _one(engine: zero.Engine, tower: Any, world: dist.World, number: int, how: str, dtype: torch.dtype) -> float:
    table = deal(SAMPLES, number, 4, world.world_size, 2)
    total = sum(batch.num_trained_tokens for row in table for batch in row)
    for micro, row in enumerate(table):
        batch = row[world.rank]
        features = None if tower is None else encode_tiles(tower, batch.tiles, dtype)
        loss = zero.forward(engine, batch, features, last=micro == len(table) - 1)
        # a broken loss on the rank with text alone, from where no gradient may reach any trained weight
        broken = micro == 0 and world.rank == (0 if how == "broken gradient" else world.world_size - 1)
        zero.backward(engine, BREAK[how if broken else "none"](loss), total)
    return zero.step(engine)
