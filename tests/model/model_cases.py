"""Small models and batches for the tests of nvlm_train.model; all sizes of a case differ from each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from make_tiny_checkpoints import random_state
from nvlm_train.batch import IGNORE_INDEX, Batch, Memory
from nvlm_train.data.chat import Rendered, TileReads
from nvlm_train.data.memory import lay_out_memory
from nvlm_train.model.nvlm import Nvlm, class_of
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


def make_config(
    vision: Mapping[str, Any] | None = None,
    *,
    architecture: str = "nvlm_d",
    cross_attention: Mapping[str, Any] | None = None,
    **language_model: Any,
) -> schema.Model:
    return schema.Model.model_validate(
        {
            "architecture": architecture,
            "vision": {**VISION, **(vision or {})},
            "language_model": {**LANGUAGE_MODEL, **language_model},
            "cross_attention": dict(cross_attention or {}),
        }
    )


def randomise(model: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Nothing constant, so that a forgotten norm, bias or LayerScale shows."""
    state = random_state({name: tuple(p.shape) for name, p in model.named_parameters()}, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name] * (scale if parameter.ndim > 1 else 1.0))


def make_model(config: schema.Model | None = None, seed: int = 0, *, gate: float | None = None, **options: Any) -> Nvlm:
    """Random weights; the gates of cross-attention at `gate`, or where the recipe starts them."""
    config = config or make_config()
    model = class_of(config)(config, **options)
    randomise(model, seed, scale=3.0)
    set_gates(model, float(config.cross_attention.gate_init) if gate is None else gate)
    return model


@torch.no_grad()
def set_gates(model: nn.Module, value: float) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(value)


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


@dataclass(frozen=True)
class Crossing:
    """A batch for nvlm_x or nvlm_h. visible: bool[B*S, T], written down token by token from the rule in words."""

    batch: Batch
    visible: Tensor
    tag_ids: list[tuple[int, ...]]  # of each tile in the memory; () for those in the sequence, which nobody reads
    in_memory: list[bool]


def _words(
    generator: torch.Generator,
    ids: list[int],
    sees: list[set[int]],
    labelled: list[bool],
    count: int,
    seen: set[int],
    label: bool = True,
) -> None:
    ids.extend(torch.randint(1, 67, (count,), generator=generator).tolist())
    sees.extend(set(seen) for _ in range(count))
    labelled.extend([label] * count)


def cross_pack(
    rows: Sequence[Sequence[Sequence[int]]], config: schema.Model, *, seed: int = 0, pad: int = 0, tags: bool = True
) -> Crossing:
    """Rows of samples for cross-attention. A sample is a list of numbers: n > 0 is n text tokens, -t an image of t
    tiles (nvlm_h: the last of them the thumbnail). [3, -2, 4] is text, an image, text."""
    generator = torch.Generator().manual_seed(seed)
    architecture, own = config.architecture, config.cross_attention
    made: list[list[tuple[Rendered, list[set[int]]]]] = []
    tile = 0  # of the whole batch
    for row in rows:
        made.append([])
        for sample in row:
            ids: list[int] = []
            labelled: list[bool] = []
            sees: list[set[int]] = []
            starts: list[int] = []
            reads: list[TileReads] = []
            before: set[int] = set()  # tiles of the images so far that ordinary text sees
            image = -1
            words = partial(_words, generator, ids, sees, labelled)
            for piece in sample:
                if piece > 0:
                    words(piece, before)
                    continue
                image += 1
                number = -piece
                kept = number if architecture == "nvlm_x" else number - 1
                mine = set(range(tile, tile + kept))
                now = {"preceding_images": before | mine, "last_image": mine, "tags_only": set()}[own.text_reads]
                spans = []
                for k in range(number):
                    begin = len(ids)
                    if architecture == "nvlm_x":
                        words(2 + k % 2 if tags else 0, {tile + k}, label=False)
                        starts.append(-1)
                    elif k < kept:
                        starts.append(-1)
                    else:
                        words(2, before, label=False)  # the thumbnail's tag: its image's tiles come with its tokens
                        starts.append(len(ids))
                        words(IMAGE_TOKENS, now if own.thumbnail_reads_tiles else before, label=False)
                    spans.append((begin, len(ids)))
                for k, span in enumerate(spans):
                    inside = k < kept
                    tag = tuple(range(5, 7 + k % 2)) if tags and architecture == "nvlm_h" and inside else ()
                    alone = span if architecture == "nvlm_x" else (span[0], span[0])
                    reads.append(TileReads(image, inside, alone, len(ids), tag))
                before = now
                tile += number
            labels = torch.randint(0, 67, (len(ids),), generator=generator)
            labels[~torch.tensor(labelled)] = IGNORE_INDEX
            made[-1].append(
                (Rendered(np.array(ids, np.int32), labels.numpy().astype(np.int32), tuple(starts), tuple(reads)), sees)
            )
    width = max(sum(len(r.input_ids) for r, _ in row) for row in made) + pad
    shape = (len(made), width)
    out = {
        "input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.full(shape, IGNORE_INDEX),
        "position_ids": torch.zeros(shape, dtype=torch.int64), "image_slots": torch.full(shape, -1),
    }  # fmt: skip
    visible = torch.zeros(len(made) * width, tile, dtype=torch.bool)
    placed: list[tuple[int, Rendered]] = []
    bounds, first = [0], 0
    for b, row in enumerate(made):
        at = 0
        for rendered, sees in row:
            end = at + len(rendered.input_ids)
            out["input_ids"][b, at:end] = torch.from_numpy(rendered.input_ids.astype(np.int64))
            out["labels"][b, at:end] = torch.from_numpy(rendered.labels.astype(np.int64))
            out["position_ids"][b, at:end] = torch.arange(end - at)
            for k, start in enumerate(rendered.tile_starts):
                if start >= 0:
                    slot = (first + k) * IMAGE_TOKENS
                    out["image_slots"][b, at + start : at + start + IMAGE_TOKENS] = torch.arange(IMAGE_TOKENS) + slot
            for t, tiles in enumerate(sees):
                visible[b * width + at + t, sorted(tiles)] = True
            placed.append((b * width + at, rendered))
            first += len(rendered.tile_starts)
            bounds.append(b * width + end)
            at = end
        if at < width:
            out["position_ids"][b, at:] = torch.arange(width - at)
            bounds.append((b + 1) * width)
    arrays = lay_out_memory(config, placed, IMAGE_TOKENS, pad=0)
    memory = Memory(**{n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()})
    every = [read for _, rendered in placed for read in rendered.reads]
    batch = Batch(
        **out,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in pairwise(bounds)),
        tiles=torch.randint(0, 256, (tile, 3, 28, 28), dtype=torch.uint8, generator=generator),
        num_trained_tokens=int((out["labels"] != IGNORE_INDEX).sum()),
        memory=memory,
    )
    return Crossing(batch, visible, [read.tag_ids for read in every], [read.in_memory for read in every])


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
