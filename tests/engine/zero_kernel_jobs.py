"""A job for warm ranks: what our autograd functions keep of a model's weights between forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from nvlm_train.engine import engine as zero
from nvlm_train.model.vision import encode_tiles
from tiny import make_batch
from zero_jobs import start


def kept_by_kernels(*, rank: int, world_size: int) -> dict[str, list[tuple[bool, int]]]:
    """By autograd function: of each one-dimensional weight that it saved whether it is a Parameter, and its elements.

    ZeRO-3 empties the Parameter between forward and backward; anything else would keep the gathered weight alive.
    """
    engine, tower, _ = start(stage=3, kernels="triton")
    batch = make_batch([(6, 1), (4, 0)], 1 + rank)
    features = encode_tiles(tower, batch.tiles, torch.float32)
    loss = zero.forward(engine, batch, features, last=True)
    parameters = {id(p) for p in engine.module.parameters()}
    found: dict[str, list[tuple[bool, int]]] = {}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [child for child, _ in node.next_functions]
        if type(node).__name__ in ("_RmsNormBackward", "_AddRmsNormBackward"):
            weight = node.saved_tensors[1 if "Add" not in type(node).__name__ else 2]
            found.setdefault(type(node).__name__, []).append((id(weight) in parameters, weight.numel()))
        elif "nvlm_train" in type(node).__module__ or type(node).__name__.startswith("_"):
            found.setdefault(type(node).__name__, [])
    zero.backward(engine, loss, 10)
    zero.step(engine)
    return found
