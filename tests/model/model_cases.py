"""Small models and batches for the tests of nvlm_train.model; all sizes of a case differ from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from make_tiny_checkpoints import random_state
from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.model.nvlm import NvlmD
from nvlm_train.recipe import schema

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
LANGUAGE_MODEL = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 67,
}  # fmt: skip
IMAGE_TOKENS = 4  # Q of VISION: 28 / 7 = 4 patches a side, joined two by two


def make_config(vision: Mapping[str, Any] | None = None, **language_model: Any) -> schema.Model:
    return schema.Model.model_validate(
        {"vision": {**VISION, **(vision or {})}, "language_model": {**LANGUAGE_MODEL, **language_model}}
    )


def randomise(model: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Nothing constant, so that a forgotten norm, bias or LayerScale shows."""
    state = random_state({name: tuple(p.shape) for name, p in model.named_parameters()}, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name] * (scale if parameter.ndim > 1 else 1.0))


def make_model(config: schema.Model | None = None, seed: int = 0, **options: Any) -> NvlmD:
    model = NvlmD(config or make_config(), **options)
    randomise(model, seed, scale=3.0)
    return model


def pack(
    rows: Sequence[Sequence[tuple[int, int]]],
    *,
    pad: int = 0,
    seed: int = 0,
    vocab_size: int = 67,
    labelled: float = 0.6,
    num_tile_chunks: int = 0,
) -> Batch:
    """A batch of rows of samples (length, tiles); a sample's tiles come first, IMAGE_TOKENS positions each.

    Rows are filled up with one padding segment to the longest row + pad.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(sum(length for length, _ in row) for row in rows) + pad
    ids = torch.randint(0, vocab_size, (len(rows), width), generator=generator)
    labels = torch.randint(0, vocab_size, (len(rows), width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) >= labelled] = IGNORE_INDEX
    slots = torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    bounds, tiles = [0], 0
    for number, row in enumerate(rows):
        start = 0
        for length, own_tiles in row:
            image = own_tiles * IMAGE_TOKENS
            assert image <= length
            slots[number, start : start + image] = torch.arange(image) + tiles * IMAGE_TOKENS
            labels[number, start : start + image] = IGNORE_INDEX
            positions[number, start : start + length] = torch.arange(length)
            tiles += own_tiles
            start += length
            bounds.append(number * width + start)
        if start < width:
            labels[number, start:] = IGNORE_INDEX
            positions[number, start:] = torch.arange(width - start)
            bounds.append((number + 1) * width)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(bounds)),
        tiles=torch.randint(0, 256, (tiles, 3, 28, 28), dtype=torch.uint8, generator=generator),
        image_slots=slots,
        num_trained_tokens=int((labels != IGNORE_INDEX).sum()),
        num_tile_chunks=num_tile_chunks,
    )


def segments(batch: Batch) -> list[Batch]:
    """Every segment of a batch as a batch of its own, with only its own tiles."""
    alone = []
    flat = {name: getattr(batch, name).flatten() for name in ("input_ids", "labels", "position_ids", "image_slots")}
    bounds = batch.cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        part = {name: value[begin:end].unsqueeze(0).clone() for name, value in flat.items()}
        slots = part["image_slots"]
        used = sorted({int(slot) // IMAGE_TOKENS for slot in slots[slots >= 0]})
        if used:
            slots[slots >= 0] -= used[0] * IMAGE_TOKENS
        alone.append(
            Batch(
                **part,
                cu_seqlens=torch.tensor([0, end - begin], dtype=torch.int32),
                max_seqlen=end - begin,
                tiles=batch.tiles[used],
                num_trained_tokens=int((part["labels"] != IGNORE_INDEX).sum()),
            )
        )
    return alone


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by name, taken off the model."""
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def worst(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> float:
    """The largest relative difference |a - b| / (|b| + 1e-2 |all|) over all tensors, norms over a tensor.

    The share of the norm over all tensors keeps gradients that are pure rounding (key biases) from counting.
    """
    assert set(ours) == set(theirs)
    total = torch.stack([t.double().norm() for t in theirs.values() if t is not None]).norm()
    largest = 0.0
    for name, other in theirs.items():
        own = ours[name]
        assert own is not None and other is not None, f"{name} has no gradient"
        assert own.shape == other.shape, name
        difference = (own.double() - other.double()).norm() / (other.double().norm() + 1e-2 * total)
        largest = max(largest, float(difference))
    return largest


def at_most(value: Tensor | float, limit: float, what: str) -> None:
    """Asserts value <= limit and prints it: `pytest -rP` shows by how much every tolerance was kept."""
    number = float(value.detach()) if isinstance(value, Tensor) else float(value)
    print(f"{what}: {number:.2e} of at most {limit:.0e}")
    assert number <= limit, f"{what}: {number:.3e} is more than {limit:.0e}"


def largest_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """max |a - b| / max |b|."""
    return (ours.detach().double() - theirs.detach().double()).abs().max() / theirs.detach().double().abs().max()
