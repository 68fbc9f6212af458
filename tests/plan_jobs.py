"""What test_plan.py measures on real ranks: bytes that go through collectives, and bytes that the engine holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.engine.optim import full_shape
from nvlm_train.recipe.resolve import resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state
from nvlm_train.train.loss import tower_features
from nvlm_train.train.weights import open_weights
from tiny import make_batch

SAMPLES = [(9, 1), (7, 0), (12, 2)]  # text tokens and tiles
STEPS = 2  # DeepSpeed learns the order of calls in the first one; the last one counts


def measure(
    *, rank: int, world_size: int, values: dict[str, Any], micro_steps: int = 2, steps: int = STEPS
) -> dict[str, Any]:
    """Trains a recipe, built as `train` builds it. Of the last step: bytes by collective and number of ranks, gathers
    by tensor in a micro-step, and what the engine holds after its first micro-step and before the update."""
    from deepspeed.utils import groups

    world = dist.start(resolve_launch(), timeout_s=240)
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    recipe = Recipe.model_validate(values)
    built = state.build(recipe, resolve(recipe, world_size), world, open_weights(recipe), skip_trained=False)
    out: dict[str, Any] = {}
    for number in range(steps):
        batches = [
            make_batch(SAMPLES, 10 * number + micro, num_tile_chunks=1, architecture=recipe.model.architecture)
            for micro in range(micro_steps)
        ]
        with counted() as (volume, names):
            for micro, batch in enumerate(batches):
                features = tower_features(built.tower, batch, built.dtype, recipe.vision_tiles_per_chunk, built.cache)
                loss = zero.forward(built.engine, batch, features, last=micro == micro_steps - 1)
                zero.backward(built.engine, loss, batch.num_trained_tokens * micro_steps * world_size)
                if micro == 0:
                    out["held_between"] = zero.held_bytes(built.engine)
            out["held"] = zero.held_bytes(built.engine)
            copies = [getattr(p, "ds_secondary_tensor", None) for p in built.engine.module.parameters()]
            out["hpz_copy"] = sum(c.numel() * c.element_size() for c in copies if c is not None)
            zero.step(built.engine)
            out["volume"] = dict(volume)
        number_of = {getattr(p, "ds_id", -1): name for name, p in built.engine.module.named_parameters()}
        out["gathers"] = {number_of[n]: count / micro_steps for n, count in names.items()}
    counts = [entry["step"] for entry in built.engine.deepspeed.basic_optimizer.state.values() if "step" in entry]
    out["step_counts"] = sum(count.numel() * count.element_size() for count in counts)
    out["tensors"] = {
        name: (full_shape(p).numel(), p.requires_grad) for name, p in built.engine.module.named_parameters()
    }
    return out


def kept(*, rank: int, world_size: int, values: dict[str, Any], tokens: int) -> tuple[int, int]:
    """`test_plan.kept_by_autograd` with our Triton kernels, run by the interpreter."""
    import pytest

    from test_plan import kept_by_autograd

    with pytest.MonkeyPatch.context() as patch:
        return kept_by_autograd(Recipe.model_validate(values), tokens, patch, "triton")


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Bytes of the whole tensors that go through DeepSpeed's collectives, by kind; and gathers by parameter's name."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    volume: Counter[str] = Counter()
    names: Counter[str] = Counter()
    backend: Any = comm.cdb
    whole = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 1, "all_reduce": 0, "reduce": 0, "broadcast": 0}
    keys = {
        "all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "input_tensor", "all_reduce": "tensor",
        "reduce": "tensor", "broadcast": "tensor",
    }  # fmt: skip

    def wrap(kind: str) -> Any:
        original = getattr(backend, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[keys[kind]] if keys[kind] in kwargs else args[whole[kind]]
            group = kwargs.get("group")
            ranks = torch.distributed.get_world_size(group)
            volume[f"{kind}/{ranks}"] += tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return call

    attribute = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(Coordinator, attribute)

    def by_name(self: Any, params: Any, forward: bool, quantize: bool = False) -> None:
        names.update(p.ds_id for p in params if p.ds_status.name == "NOT_AVAILABLE")
        gather(self, params, forward, quantize)

    for kind in whole:
        setattr(backend, kind, wrap(kind))
    setattr(Coordinator, attribute, by_name)
    try:
        yield volume, names
    finally:
        for kind in whole:
            delattr(backend, kind)
        setattr(Coordinator, attribute, gather)
