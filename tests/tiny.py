"""A tiny NVLM-D and batches for it, made without the data pipeline."""

from __future__ import annotations

import torch

from nvlm_train.batch import IGNORE_INDEX, Batch
from nvlm_train.model.nvlm import NvlmD
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


def model_config(**language_model: object) -> schema.Model:
    return schema.Model.model_validate({"vision": VISION, "language_model": {**LANGUAGE_MODEL, **language_model}})


def seeded_model(
    config: schema.Model, seed: int = 3, *, with_vision: bool = True, dtype: torch.dtype = torch.float32
) -> NvlmD:
    """All parameters random, norms and LayerScale not constant, equal for equal seeds."""
    model = NvlmD(config, with_vision=with_vision)
    set_seeded(model, seed)
    return model.to(dtype)


@torch.no_grad()
def set_seeded(model: torch.nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(seeded_value(name, tuple(parameter.shape), seed))


def seeded_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()) + 7919 * len(name))
    value = torch.randn(shape, generator=generator) * 0.08
    return value + 1.0 if "norm" in name and name.endswith("weight") else value


def make_batch(samples: list[tuple[int, int]], seed: int, *, vocab_size: int = 61, num_tile_chunks: int = 0) -> Batch:
    """One row of packed samples. samples: (text tokens, tiles) each; the tiles' image tokens come first.

    The content of a sample depends on its own place in `seed`'s stream only, so the same samples can be dealt out
    differently.
    """
    ids, labels, positions, slots, lengths, tiles = [], [], [], [], [], []
    for number, (text, num_tiles) in enumerate(samples):
        generator = torch.Generator().manual_seed(seed * 1009 + number)
        image = num_tiles * IMAGE_TOKENS
        words = torch.randint(5, vocab_size, (text,), generator=generator)
        first_slot = sum(t.shape[0] for t in tiles) * IMAGE_TOKENS
        tiles.append(torch.randint(0, 256, (num_tiles, 3, 8, 8), generator=generator, dtype=torch.uint8))
        ids += [torch.full((image,), 3), words]
        target = torch.cat([torch.full((image,), IGNORE_INDEX), words[1:], torch.tensor([IGNORE_INDEX])])
        labels.append(target[: image + text] if text else target[:image])
        positions.append(torch.arange(image + text))
        slots += [torch.arange(first_slot, first_slot + image), torch.full((text,), -1)]
        lengths.append(image + text)
    return _batch(ids, labels, positions, slots, lengths, tiles, num_tile_chunks)


def null_batch(num_tile_chunks: int = 0) -> Batch:
    """What a rank without work gets: one token, no label, no tile."""
    one = torch.zeros(1, dtype=torch.int64)
    return _batch([one], [one + IGNORE_INDEX], [one], [one - 1], [1], [], num_tile_chunks)


def _batch(
    ids: list[torch.Tensor],
    labels: list[torch.Tensor],
    positions: list[torch.Tensor],
    slots: list[torch.Tensor],
    lengths: list[int],
    tiles: list[torch.Tensor],
    num_tile_chunks: int,
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
    )
