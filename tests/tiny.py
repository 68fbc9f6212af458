"""A tiny NVLM of each architecture and batches for it, made without the data pipeline."""

from __future__ import annotations

import numpy as np
import torch

from nvlm_train.batch import IGNORE_INDEX, Batch, Memory
from nvlm_train.data.chat import Rendered, TileReads
from nvlm_train.data.memory import lay_out_memory
from nvlm_train.model.nvlm import Nvlm, class_of
from nvlm_train.recipe import schema

# pairwise different sizes, so that a mixed-up axis cannot pass
VISION = dict(
    hidden_size=18, intermediate_size=30, num_hidden_layers=2, num_attention_heads=3, image_size=8, patch_size=2
)
LANGUAGE_MODEL = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
)
IMAGE_TOKENS = 4  # (8 / 2 / 2)^2 per tile


def model_config(architecture: str = "nvlm_d", **language_model: object) -> schema.Model:
    values = {"vision": VISION, "language_model": {**LANGUAGE_MODEL, **language_model}, "architecture": architecture}
    if architecture != "nvlm_d":  # everything that a layer can have
        values["cross_attention"] = {"feed_forward": True, "every_layers": 1, "num_key_value_heads": 1}
    return schema.Model.model_validate(values)


def seeded_model(
    config: schema.Model,
    seed: int = 3,
    *,
    with_vision: bool = True,
    dtype: torch.dtype = torch.float32,
    gate: float = 0.5,
) -> Nvlm:
    """All parameters random, norms and LayerScale not constant, equal for equal seeds."""
    model = class_of(config)(config, with_vision=with_vision)
    set_seeded(model, seed, gate)
    return model.to(dtype)


@torch.no_grad()
def set_seeded(model: torch.nn.Module, seed: int, gate: float = 0.5) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(seeded_value(name, tuple(parameter.shape), seed, gate))


def seeded_value(name: str, shape: tuple[int, ...], seed: int, gate: float = 0.5) -> torch.Tensor:
    if name.endswith("_gate"):
        return torch.full(shape, gate)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()) + 7919 * len(name))
    value = torch.randn(shape, generator=generator) * 0.08
    return value + 1.0 if "norm" in name and name.endswith("weight") else value


def make_batch(
    samples: list[tuple[int, int]],
    seed: int,
    *,
    vocab_size: int = 61,
    num_tile_chunks: int = 0,
    architecture: str = "nvlm_d",
) -> Batch:
    """One row of packed samples. samples: (text tokens, tiles) each; the tiles' image tokens come first. In nvlm_x two
    tokens of tag stand for each tile instead; in nvlm_h the last tile is in the sequence, the others in the memory.

    The content of a sample depends on its own place in `seed`'s stream only, so the same samples can be dealt out
    differently.
    """
    ids, labels, positions, slots, lengths, tiles = [], [], [], [], [], []
    placed: list[tuple[int, Rendered]] = []
    for number, (text, num_tiles) in enumerate(samples):
        generator = torch.Generator().manual_seed(seed * 1009 + number)
        in_sequence = {"nvlm_d": num_tiles, "nvlm_x": 0, "nvlm_h": min(num_tiles, 1)}[architecture]
        image = num_tiles * 2 if architecture == "nvlm_x" else in_sequence * IMAGE_TOKENS
        words = torch.randint(5, vocab_size, (text,), generator=generator)
        first_slot = sum(t.shape[0] for t in tiles) * IMAGE_TOKENS
        tiles.append(torch.randint(0, 256, (num_tiles, 3, 8, 8), generator=generator, dtype=torch.uint8))
        ids += [torch.full((image,), 3), words]
        target = torch.cat([torch.full((image,), IGNORE_INDEX), words[1:], torch.tensor([IGNORE_INDEX])])
        labels.append(target[: image + text] if text else target[:image])
        positions.append(torch.arange(image + text))
        first_slot += (num_tiles - in_sequence) * IMAGE_TOKENS  # nvlm_h: the last tile's
        taken = torch.full((image,), -1) if architecture == "nvlm_x" else torch.arange(first_slot, first_slot + image)
        slots += [taken, torch.full((text,), -1)]
        reads = tuple(
            TileReads(0, True, (2 * k, 2 * k + 2), image, ())
            if architecture == "nvlm_x"
            else TileReads(0, k < num_tiles - 1, (0, 0), image, (7, 8 + k) if k < num_tiles - 1 else ())
            for k in range(num_tiles)
        )
        stream = np.zeros(image + text, dtype=np.int32)  # of which only the length counts here
        placed.append((sum(lengths), Rendered(stream, stream, (-1,) * num_tiles, reads)))
        lengths.append(image + text)
    memory = make_memory(architecture, placed)
    return _batch(ids, labels, positions, slots, lengths, tiles, num_tile_chunks, memory)


def make_memory(architecture: str, placed: list[tuple[int, Rendered]]) -> Memory | None:
    if architecture == "nvlm_d":
        return None
    arrays = lay_out_memory(model_config(architecture), placed, IMAGE_TOKENS, pad=0)
    return Memory(**{n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in arrays.items()})


def null_batch(num_tile_chunks: int = 0, architecture: str = "nvlm_d") -> Batch:
    """What a rank without work gets: one token, no label, no tile."""
    one = torch.zeros(1, dtype=torch.int64)
    memory = make_memory(architecture, [])
    return _batch([one], [one + IGNORE_INDEX], [one], [one - 1], [1], [], num_tile_chunks, memory)


def _batch(
    ids: list[torch.Tensor],
    labels: list[torch.Tensor],
    positions: list[torch.Tensor],
    slots: list[torch.Tensor],
    lengths: list[int],
    tiles: list[torch.Tensor],
    num_tile_chunks: int,
    memory: Memory | None,
) -> Batch:
    label_row = torch.cat(labels)
    return Batch(
        input_ids=torch.cat(ids).unsqueeze(0),
        labels=label_row.unsqueeze(0),
        position_ids=torch.cat(positions).unsqueeze(0),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        tiles=torch.cat(tiles) if tiles else torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        image_slots=torch.cat(slots).unsqueeze(0),
        num_trained_tokens=int((label_row != IGNORE_INDEX).sum()),
        num_tile_chunks=num_tile_chunks,
        memory=memory,
    )
