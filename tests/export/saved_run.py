"""A run on disk as a training of any number of ranks leaves it, made without one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nvlm_train import checkpoint
from tiny_nvlm import MemoryWeights

LORA = ("language_model.model.layers.0.self_attn.v_proj", "language_model.model.layers.2.mlp.down_proj")
RANK, SCALE = 3, 0.7


def save_run(
    run: Path, recipe: dict[str, Any], weights: MemoryWeights, *, world_size: int = 2, step: int = 20,
    frozen: str = "vision_model.", lora: bool = False,
) -> Path:  # fmt: skip
    """Saves RUN/step_N. frozen: prefix of the weights that stay in a file of their own. lora: the decoder is frozen as
    well, and the layers in `LORA` have adapters."""
    run.mkdir(parents=True, exist_ok=True)
    own = {
        n: t for n, t in weights.tensors.items() if not n.startswith((frozen, "language_model." if lora else frozen))
    }
    base = {name: tensor.contiguous() for name, tensor in weights.tensors.items() if name not in own}
    generator = torch.Generator().manual_seed(5)
    for layer in LORA if lora else ():
        outputs, inputs = base[f"{layer}.weight"].shape
        own[f"{layer}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
        own[f"{layer}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator)
    file = run.with_name(f"{run.name}_base.safetensors")
    if base:
        save_file(base, file)
    checkpoint.write_json(run / "recipe.json", {"format": 1, "recipe": recipe, "attempts": []})
    checkpoint.write_base(run, {name: f"{file}:{name}" for name in base})

    path = run / f"step_{step}"
    (checkpoint._temporary(path) / "weights").mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in own.items()}
    reports = {}
    for rank in range(world_size):
        parts = []
        for tensor in own.values():
            share = -(-tensor.numel() // world_size)  # as ZeRO-3 cuts: some ranks get less, or nothing
            part = tensor.float().flatten()[rank * share : (rank + 1) * share]
            parts += [part, torch.full_like(part, 7.0), torch.full_like(part, 9.0)]
        name = checkpoint._file_name(rank)
        reports[name] = checkpoint._write_parts(
            checkpoint._temporary(path) / "weights" / name, parts, torch.float32, threading.Event()
        )
    state = {"step": step, "world_size": world_size, "recipe_hash": "0123", "lora": {"language_model": SCALE}}
    checkpoint._commit(path, state, shapes, "step", reports)
    return path


def merged(weights: MemoryWeights, opened: checkpoint.CheckpointWeights) -> MemoryWeights:
    """What a run of `save_run(lora=True)` stands for, by the formula."""
    tensors = dict(weights.tensors)
    for layer in LORA:
        a, b = (opened.checkpoint.read_master(f"{layer}.lora_{part}.weight") for part in "AB")
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + SCALE * (b @ a)
    return MemoryWeights(tensors)
