"""Nothing of ours makes the host wait for the device from the first forward to the last backward of a step.

On a GPU torch counts the waits itself. Without one, a dispatch mode refuses the operations that would wait there: those
that give the host a value or a size that the device must compute first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_cases import cross_pack, make_config, make_model, pack
from nvlm_train import kernels
from nvlm_train.batch import Batch
from nvlm_train.kernels import attention
from nvlm_train.model.vision import InternVit, encode_tiles

torch.set_num_threads(1)
# What gives the host a value, or a tensor whose size depends on values. masked_fill, where, nonzero_static do not.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "unique_dim",
    "_unique2", "unique_consecutive", "unique_dim_consecutive", "bincount", "_assert_async", "argwhere",
}  # fmt: skip


class Refuses(TorchDispatchMode):
    """Notes every operation that would wait for a device; `repeat_interleave` with counts from a tensor too.

    On a CPU tolist and numpy read memory without an operation, and cpu() does nothing, so those are caught by name; so
    is what makes a tensor of Python numbers, whose copy to a device waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits: list[str] = []
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._noting(name, getattr(torch.Tensor, name)))
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, self._noting(name, getattr(torch, name)))

    def _noting(self, name: str, method: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.waits.append(name)
            return method(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        boolean = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counted = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or boolean or counted:
            self.waits.append(name)
        return func(*args, **kwargs)


@contextmanager
def lengths_on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain PyTorch's attention reads lengths on the host, which is why GPUs take varlen: here a stand-in that reads
    none, as varlen reads none. What it computes is no attention, but depends on all its inputs."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *where: Any) -> torch.Tensor:
        return q * k.mean() + v.mean()

    monkeypatch.setattr(attention, "torch_attention", attend)
    monkeypatch.setattr(attention, "torch_cross_attention", attend)
    kernels.load.cache_clear()
    try:
        yield
    finally:
        kernels.load.cache_clear()


def batches(architecture: str) -> dict[str, Batch]:
    if architecture == "nvlm_d":
        return {"images": pack([[(9, 1), (11, 2)], [(12, 0), (8, 1)]]), "text alone": pack([[(9, 0), (7, 0)]])}
    config = make_config(architecture=architecture)
    rows = {"images": [[[3, -2, 4], [5]], [[2, -3, 2, -1, 4]]], "text alone": [[[6], [4]]]}
    return {name: cross_pack(row, config, seed=1).batch for name, row in rows.items()}


def prepared(architecture: str, frozen: bool) -> tuple[Any, InternVit | None]:
    config = make_config(architecture=architecture)
    model = make_model(config, gate=0.5, with_vision=not frozen, tiles_per_chunk=2)
    tower = InternVit(config.vision).requires_grad_(False) if frozen else None
    return model, tower


def micro_step(model: Any, tower: InternVit | None, batch: Batch) -> None:
    """A step's forward and backward, as train/step.py and engine.backward write it."""
    features = None
    if tower is not None:
        with torch.no_grad():
            features = encode_tiles(tower, batch.tiles, next(tower.parameters()).dtype, tiles_per_chunk=2)
    loss_sum = model(batch, features)
    mark = torch.where(loss_sum.detach().isfinite(), 1.0, torch.nan)
    (loss_sum * (2 / max(batch.num_trained_tokens, 1)) * mark).backward()


CASES = [(a, f, b) for a in ("nvlm_d", "nvlm_x", "nvlm_h") for f in (True, False) for b in ("images", "text alone")]


@pytest.mark.parametrize(("architecture", "frozen", "which"), CASES)
def test_nothing_between_forward_and_step_needs_a_value_on_the_host(
    architecture: str, frozen: bool, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tower = prepared(architecture, frozen)
    batch = batches(architecture)[which]
    with lengths_on_the_device(monkeypatch):
        micro_step(model, tower, batch)  # the first call copies constants
        with Refuses(monkeypatch) as mode:
            micro_step(model, tower, batch)
    # On a CPU alone the head compares the count of labels that the collator gives with the labels (`LmHead.forward`).
    assert mode.waits == ["_local_scalar_dense"], mode.waits


def test_the_refusal_sees_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    for code in (
        lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.nonzero(), lambda: x[x > 0], lambda: x.tolist(),
        lambda: x.repeat_interleave(torch.tensor([1, 0, 2])), lambda: torch.equal(x, x), lambda: x.unique(),
        lambda: x.cpu(), lambda: torch.tensor([1.0]),
    ):  # fmt: skip
        with monkeypatch.context() as patch, Refuses(patch) as mode:
            code()
        assert mode.waits, code


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("architecture", "frozen", "which"), CASES)
def test_a_gpu_counts_no_wait(architecture: str, frozen: bool, which: str) -> None:
    """torch's own debug mode warns at every wait; bf16, varlen attention. Not yet run on a GPU."""
    model, tower = prepared(architecture, frozen)
    model = model.bfloat16().cuda()
    tower = tower.bfloat16().cuda() if tower is not None else None
    batch = batches(architecture)[which].pin_memory().to("cuda")
    micro_step(model, tower, batch)  # the first call of a library may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            micro_step(model, tower, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in told if "synchroniz" in str(one.message)]
    assert not waits, waits
