"""What test_zero_options.py asks of real engines: each ZeRO option against none, hpZ's own check, ranks that differ."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any

import torch

from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.node import ReadOncePerNode
from nvlm_train.engine.optim import full_shape
from nvlm_train.errors import CheckpointError, NvlmError
from nvlm_train.model.nvlm import encode_tiles
from tiny import make_batch, model_config, seeded_value
from zero_jobs import DTYPES, full_state, make_tower, start

SAMPLES = [(9, 1), (7, 0), (12, 2), (5, 0)]


def _train(engine: zero.Engine, tower: Any, world: dist.World, steps: range, precision: str = "fp32") -> list[float]:
    """Two micro-steps a step, images in one of them and on one rank only."""
    losses = []
    for number in steps:
        batches = [make_batch([s], 100 * number + i, num_tile_chunks=1) for i, s in enumerate(SAMPLES)]
        total = sum(batch.num_trained_tokens for batch in batches)
        mine = batches[world.rank :: world.world_size]
        loss_sum = 0.0
        for micro, batch in enumerate(mine):
            features = encode_tiles(tower, batch.tiles, DTYPES[precision]) if tower is not None else None
            loss = zero.forward(engine, batch, features, last=micro == len(mine) - 1)
            zero.backward(engine, loss, total)
            loss_sum += float(loss.detach())
        zero.step(engine)
        losses.append(dist.sum_over_ranks(world, [loss_sum], torch.float64)[0] / total)
    return losses


@cache
def _base(rank: int) -> tuple[dict[str, Any], list[float], dict[str, Any]]:
    """Three steps without any option: every rank's slices after them, the losses of three more, and the state then."""
    engine, tower, world = start(stage=3)
    _train(engine, tower, world, range(3))
    whole = _gathered(engine, world)
    losses = _train(engine, tower, world, range(3, 6))
    return whole, losses, full_state(engine, world)


def _gathered(engine: zero.Engine, world: dist.World) -> dict[str, Any]:
    return {name: dist.gather(world, parts) for name, parts in zero.read_slices(engine).items()}


def _put(engine: zero.Engine, whole: dict[str, Any], step: int) -> None:
    zero.write_slices(engine, lambda n, k, b, e: torch.cat([part[k] for part in whole[n]])[b:e], step)


def option(*, rank: int, world_size: int, keys: dict[str, Any]) -> dict[str, Any]:
    """From `_base` three more steps with an option, its state read at the end, and put into another engine with the
    option, which goes on alone."""
    whole, expected_losses, expected = _base(rank)
    engine, tower, world = _start_with_base(keys, seed=8)
    _put(engine, whole, 3)
    losses = _train(engine, tower, world, range(3, 6))
    state, after = full_state(engine, world), _gathered(engine, world)
    further = _train(engine, tower, world, range(6, 7))
    again, tower, world = _start_with_base(keys, seed=9)
    _put(again, after, 6)
    return {
        "losses": losses,
        "expected_losses": expected_losses,
        "state": {
            key: max(float((state[key][n] - value).abs().max()) for n, value in expected[key].items())
            for key in zero.STATE_KEYS
        },
        "further": further,
        "resumed": _train(again, tower, world, range(6, 7)),
    }


def _start_with_base(keys: dict[str, Any], seed: int) -> tuple[zero.Engine, Any, dist.World]:
    """A fresh engine with trained weights of `seed` that a state is to replace; frozen ones are the base's, seed 3."""
    engine, tower, world = start(**{"stage": 3, "seed": seed, **keys})
    if tower is not None:
        return engine, make_tower(model_config(), 3, torch.float32), world
    _same_frozen(engine, world)
    return engine, None, world


def _same_frozen(engine: zero.Engine, world: dist.World) -> None:
    """Frozen weights inside the engine come from the base weights, here those of seed 3."""
    slice_of, write = zero.write_slice(world)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            value = seeded_value(name, tuple(full_shape(parameter)), 3)
            part = slice_of(parameter)
            write(parameter, value if part is None else value.flatten()[part[0] : part[1]])
    zero._forget_second_copies(engine.module)
    zero._refresh_model_weights(engine)


def hpz_with_stale_copies(*, rank: int, world_size: int) -> str:
    """Builds with hpZ as DeepSpeed alone would: the second copies of the first moment stay. Returns the error."""
    original = zero._forget_second_copies
    zero._forget_second_copies = lambda model: None  # in `build`
    try:
        engine, tower, world = start(stage=3, experimental={"hpz_partition_size": 2})
    finally:
        zero._forget_second_copies = original
    try:
        _train(engine, tower, world, range(1))
        return "nothing"
    except NvlmError as error:
        return str(error)


def hpz_in_groups(*, rank: int, world_size: int) -> dict[str, list[float]]:
    """Two groups of two ranks against none, from the same weights."""
    losses = {}
    for size in (1, 2):
        engine, tower, world = start(stage=3, experimental={"hpz_partition_size": size})
        losses[str(size)] = _train(engine, tower, world, range(5))
    return losses


def ranks_that_differ(*, rank: int, world_size: int, how: str) -> dict[str, Any]:
    """A model that rank 1 bends, with `debug.collectives`; what each rank was told, and after how many seconds."""
    engine, tower, world = start(stage=3, compare_calls_s=100.0)
    out: dict[str, Any] = {"calls_of_a_good_step": _good_step(engine, tower, world)}
    assert engine.calls is not None
    if how == "is_late":
        engine.calls.timeout_s = 1.0
    if rank == 1:
        _bend(engine.module, how)
    began = time.monotonic()
    try:
        loss = zero.forward(engine, make_batch([(9, 0)], 5), None, last=True)
        zero.backward(engine, loss, 10)
        out["told"] = "nothing"
    except NvlmError as error:
        out["told"] = str(error)
    out["seconds"], out["number"] = time.monotonic() - began, engine.calls.num_calls
    dist.barrier(world)
    return out


def _good_step(engine: zero.Engine, tower: Any, world: dist.World) -> int:
    _train(engine, tower, world, range(1))
    assert engine.calls is not None
    return engine.calls.num_calls


def _bend(model: Any, how: str) -> None:
    if how == "skips_the_projector":  # what a model does that takes the short way where there is no image

        def hidden(batch: Any, features: Any) -> torch.Tensor:
            decoder = model.language_model.model
            embedded = decoder.embed_tokens(batch.input_ids)
            return decoder(embedded, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)

        model._hidden = hidden
    elif how == "cuts_the_gradient":
        model.projector.register_forward_hook(lambda module, args, output: output.detach())
    else:
        model.register_forward_pre_hook(lambda module, args: time.sleep(4), prepend=True)


class _Counted:
    """Weights that count what is read of them, and may break."""

    def __init__(self, values: dict[str, torch.Tensor], broken: str | None = None) -> None:
        self.values, self.broken, self.reads = values, broken, 0

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.values[name].dtype

    def where(self, name: str) -> str:
        return f"weights.safetensors:{name}"

    def read(self, name: str) -> torch.Tensor:
        if name == self.broken:
            raise OSError(5, "Input/output error")
        self.reads += self.values[name].nbytes
        return self.values[name]

    def read_slice(self, name: str, begin: int, end: int) -> torch.Tensor:
        part = self.values[name].flatten()[begin:end]
        self.reads += part.nbytes
        return part


def read_once_per_node(*, rank: int, world_size: int, local_ranks: list[int]) -> dict[str, Any]:
    """Reads through `ReadOncePerNode` where rank r is `local_ranks[r]` of its node. Only leaders have real values."""
    world = dist.World(rank, world_size, torch.device("cpu"), torch.distributed.group.WORLD, False)
    kept = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = str(local_ranks[rank])
    try:
        leader = local_ranks[rank] == 0
        real = {
            "a": torch.arange(35, dtype=torch.float32).view(5, 7),
            "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).bfloat16(),
        }
        counted = _Counted(real if leader else {name: torch.zeros_like(value) for name, value in real.items()})
        with ReadOncePerNode(counted, world, 60) as shared:
            right = all(torch.equal(shared.read(name), value) for name, value in real.items())
            right &= all(shared.read(name).dtype == value.dtype for name, value in real.items())
            own = shared.read_slice("a", 3, 9)
        counted.broken = "b"
        try:
            with ReadOncePerNode(counted, world, 60) as shared:
                shared.read("a")
                shared.read("b")
            error = "nothing"
        except (OSError, CheckpointError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        return {"right": right, "bytes": counted.reads, "own": own.numel(), "error": error}
    finally:
        os.environ["LOCAL_RANK"] = kept
