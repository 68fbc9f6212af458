"""What test_traps.py asks of a real two-rank ZeRO-3 engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nvlm_train.engine import engine as zero
from nvlm_train.engine.optim import full_shape
from nvlm_train.model.nvlm import NvlmD, encode_tiles
from tiny import make_batch, model_config, seeded_value
from zero_jobs import full_state, start

SAMPLES = [(9, 1), (7, 0), (12, 2)]


def facts(*, rank: int, world_size: int) -> dict[str, Any]:
    import deepspeed

    extensions = Path(os.environ["TORCH_EXTENSIONS_DIR"])  # of this test session alone
    found: dict[str, Any] = {
        "shm_comm": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
        "compiled": [str(p) for p in extensions.rglob("*")] if extensions.exists() else [],
        "clipping": {str(clip): start(stage=3, clip=clip)[0].deepspeed.gradient_clipping() for clip in (0.0, 0.5)},
    }
    found |= _rope(rank)
    found["norm_of_nan_step"] = _nan_step()
    found |= _alive_after_forward()
    found |= _rates()
    return found


def _forward(engine: zero.Engine, tower: Any, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    batch = make_batch(SAMPLES, seed)
    return zero.forward(engine, batch, encode_tiles(tower, batch.tiles, dtype), last=True)


def _rope(rank: int) -> dict[str, Any]:
    """Logits of a long sample under zero.Init in bf16 against fp32, in one plain process."""
    engine, _, _ = start(stage=3, precision="bf16")
    buffers = [name for name, buffer in engine.module.named_buffers() if buffer.is_floating_point()]
    batch = make_batch([(500, 0)], 3)
    with torch.no_grad():
        engine.deepspeed.eval()
        # the engine's forward returns the loss; the modules beneath it take the same hooks
        low = engine.module.logits(batch, None).float()
        plain = NvlmD(model_config(), with_vision=False)
        for name, parameter in plain.named_parameters():
            parameter.copy_(seeded_value(name, tuple(parameter.shape), 3).bfloat16())
        high = plain.logits(batch, None)
    return {"floating_buffers": buffers, "rope_error": float((low - high).abs().max() / high.abs().max())}


def _nan_step() -> str:
    engine, tower, _ = start(stage=3)
    zero.backward(engine, _forward(engine, tower, 1) * float("nan"), 10)
    return str(zero.step(engine))


def _alive_after_forward() -> dict[str, Any]:
    """Weights that the graph keeps whole between forward and backward; and what the same search says of a bad layer."""
    import deepspeed

    engine, tower, _ = start(stage=3)
    zero.backward(engine, _forward(engine, tower, 1), 10)  # the first step only traces
    zero.step(engine)
    shapes = {tuple(full_shape(p)) for _, p in engine.trainable() if len(full_shape(p)) == 2}
    loss = _forward(engine, tower, 2)
    kept = _saved_tensors(loss.grad_fn, shapes)
    zero.backward(engine, loss, 10)
    zero.step(engine)
    weight = engine.module.projector.fc1.weight
    with deepspeed.zero.GatheredParameters([weight]):
        x = torch.ones(2, weight.ds_shape[1], requires_grad=True)
        control = _saved_tensors((x @ weight.t()).grad_fn, shapes)
    return {"whole_weights_alive": kept, "whole_weights_of_a_bad_layer": control}


def _saved_tensors(node: Any, shapes: set[tuple[int, ...]]) -> list[list[int]]:
    """Shapes of weights that the graph itself keeps whole: saved tensors that are not the (empty) Parameter."""
    kept, seen, stack = [], set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_") and not name.startswith("_saved_self_sizes"):
                value = getattr(node, name, None)
                if (
                    isinstance(value, torch.Tensor)
                    and value.numel()
                    and (tuple(value.shape) in shapes or tuple(reversed(value.shape)) in shapes)
                ):
                    kept.append(list(value.shape))
        stack += [child for child, _ in node.next_functions]
    return kept


def _rates() -> dict[str, Any]:
    engine, tower, world = start(stage=3)
    for group in engine.optimizer.param_groups:
        if group["name"].startswith("projector"):
            group["lr"] = 0.0
    before = full_state(engine, world)["master"]
    zero.backward(engine, _forward(engine, tower, 1), 10)
    zero.step(engine)
    after = full_state(engine, world)["master"]
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    return {
        "lr_zero_moved": [name for name in moved if name.startswith("projector")],
        "lr_other_moved": [name for name in moved if not name.startswith("projector")],
    }


def gathers(*, rank: int, world_size: int, train: dict[str, str]) -> dict[str, float]:
    """How often ZeRO-3 gathers a weight of the decoder's layers in a step of one micro-step, by kind of recompute."""
    from deepspeed.runtime.zero import partition_parameters as partition

    original = partition._dist_allgather_fn
    found = {}
    for mode in ("none", "selective", "full"):
        engine, tower, _ = start(stage=3, checkpointing=mode, train=train, prefetch_bucket_size=0)
        gathered = [0]

        def count(part: torch.Tensor, whole: torch.Tensor, group: Any = None, gathered: Any = gathered) -> Any:
            gathered[0] += whole.numel()
            return original(part, whole, group)

        partition._dist_allgather_fn = count
        try:
            for seed in (1, 2):  # the first step only traces
                gathered[0] = 0
                zero.backward(engine, _forward(engine, tower, seed), 10)
                counted = gathered[0]
                zero.step(engine)
        finally:
            partition._dist_allgather_fn = original
        numel = {
            name: -(-full_shape(p).numel() // world_size) * world_size for name, p in engine.module.named_parameters()
        }
        layers = sum(n for name, n in numel.items() if ".layers." in name)
        # outside of the layers nothing runs again: all twice, a frozen embedding once (it has no backward)
        embedding = numel["language_model.model.embed_tokens.weight"] * (train["language_model"] == "frozen")
        found[mode] = (counted - 2 * (sum(numel.values()) - layers) + embedding) / layers
        found["down_proj"] = sum(n for name, n in numel.items() if ".down_proj." in name) / layers
    return found
