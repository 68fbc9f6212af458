"""Loads real folders into partitions and tells what it took: anonymous memory, bytes, and whether all is right."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import torch

from nvlm_train.engine import dist
from nvlm_train.engine import engine as zero
from nvlm_train.engine.launch import resolve_launch
from nvlm_train.engine.optim import full_shape
from nvlm_train.recipe.resolve import resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.train import state
from nvlm_train.train.weights import account_for_weights, open_weights

SAMPLE_EVERY_S = 0.002


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: mapped weights are not in it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class PeakOfAnonymous:
    """Samples `anonymous_bytes` in a thread; `growth` is the most above the beginning."""

    def __enter__(self) -> PeakOfAnonymous:
        self.begin = self.peak = anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_EVERY_S):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.begin


def load(*, rank: int, world_size: int, recipe: dict[str, Any]) -> dict[str, Any]:
    """`train.state.build` up to the engine, of folders that the recipe names."""
    parsed = Recipe.model_validate(recipe)
    world = dist.start(resolve_launch(), timeout_s=240)
    weights = open_weights(parsed)
    account_for_weights(parsed, weights)
    kept, shared_kept = zero.build, state.ReadOncePerNode
    models: list[Any] = []
    readers: list[Any] = []

    def reader(*arguments: Any) -> Any:
        readers.append(shared_kept(*arguments))
        return readers[-1]

    zero.build, state.ReadOncePerNode = lambda model, *rest: models.append(model), reader
    gc.collect()  # what an earlier job left would be freed meanwhile
    began = time.monotonic()
    try:
        with PeakOfAnonymous() as memory:
            built = state.build(parsed, resolve(parsed, world_size), world, weights, skip_trained=False)
            seconds = time.monotonic() - began
    finally:
        zero.build, state.ReadOncePerNode = kept, shared_kept
    named = dict(models[0].named_parameters())
    slice_of, _ = zero.write_slice(world)
    right = True
    for name, parameter in named.items():
        part = slice_of(parameter)
        if part is None or name not in weights.names():
            continue
        right &= torch.equal(parameter.ds_tensor[: part[1] - part[0]], weights.read_slice(name, *part))
    tower = sum(p.nbytes for p in built.tower.parameters()) if built.tower is not None else 0
    return {
        "right": right,
        "growth": memory.growth,
        "share": sum(p.ds_tensor.nbytes for p in named.values()),
        "whole": sum(full_shape(p).numel() * p.ds_tensor.itemsize for p in named.values()),
        "largest": max(full_shape(p).numel() * p.ds_tensor.itemsize for p in named.values()),
        "tower": tower,
        "bytes_read": readers[0].bytes_read,
        "stored": {"share": _stored(weights, named, slice_of), "tower": _tower_bytes(weights)},
        "seconds": seconds,
        "dtypes": sorted({str(p.ds_tensor.dtype) for p in named.values()}),
    }


def _stored(weights: Any, named: dict[str, Any], slice_of: Any) -> int:
    """Bytes of this rank's slices as they lie in the files."""
    total = 0
    for name in set(named) & set(weights.names()):
        begin, end = slice_of(named[name])
        total += (end - begin) * weights.dtype(name).itemsize
    return total


def _tower_bytes(weights: Any) -> int:
    names = [name for name in weights.names() if name.startswith("vision_model.")]
    return sum(torch.Size(weights.shape(name)).numel() * weights.dtype(name).itemsize for name in names)
