"""Dropout without a random generator: whether a value is dropped is a hash of what it belongs to.

    kept(row, channel) = hash(key of the row + key of the channel in this layer) >= p

The key of a row is a hash of (seed, step, the sample's tokens, position) for text, of (seed, step, the tile's pixels,
place in the tile) for images. So the mask follows the sample wherever it goes: to another rank, another pack, another
micro batch, or a second computation in the backward pass. That is what makes a resume exact and one on another number
of ranks equal, with dropout on. No mask is kept for backward either: it is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nvlm_train.batch import Batch, Memory

# What the rows of a dropout's input are: tokens, those of them that cross-attention reads for, rows of its memory,
# image tokens, patches of a tile
Rows = Literal["tokens", "readers", "memory", "image_tokens", "patches"]

# Odd numbers with well mixed bits (the finalisers of splitmix64 and murmur3), as signed integers.
_M64 = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_M32 = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
_ODD = 0x9E3779B97F4A7C15 - 2**64


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: i64 -> i64, each bit of the result depends on each of the input. Products wrap around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _M64[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _M64[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _number(*parts: object) -> int:
    """A signed 63-bit number of a few words: the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Draws:
    """The keys of the rows that the model works on, for all its dropouts."""

    def __init__(self, image_tokens_per_tile: int) -> None:
        self._per_tile = image_tokens_per_tile
        self._step: int | None = None
        self._tiles_done = 0  # of the batch, through the tower
        self._keys: dict[str, Tensor] = {}

    def start_step(self, seed: int, step: int) -> None:
        """Before the first micro-step of optimizer step `step` (from 0)."""
        self._step = _number(seed, step)

    def look_at(self, batch: Batch) -> None:
        """Makes the keys of a micro batch: i64[B, S] of its tokens, i64[T] of its tiles."""
        if self._step is None:
            raise RuntimeError("dropout needs to know the step: call start_step before the forward pass")
        ids, bounds = batch.input_ids.flatten(), batch.cu_seqlens.long()  # [B*S], [G+1]
        segment = torch.bucketize(torch.arange(len(ids), device=ids.device), bounds[1:], right=True)  # [B*S]
        places = batch.position_ids.flatten() * _ODD  # [B*S]
        # a sum of integers is the same in any order
        content = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=ids.device)  # [G]
        content = content.index_add(0, segment, _mix(ids + places))
        keys = _mix(_mix(content + self._step)[segment] + places)  # [B*S]
        flat = batch.tiles.flatten(1)  # [T, 3*px*px]
        weights = _mix(torch.arange(flat.shape[1], device=ids.device) * _ODD)  # [3*px*px]
        sums = [(tile * weights).sum() for tile in flat]  # one at a time: in i64 a tile is eight times as large
        tiles = _mix(torch.stack(sums) + self._step) if sums else ids[:0]  # [T]
        self._keys = {"tokens": keys.view_as(batch.input_ids), "tiles": tiles}
        if batch.memory is not None:
            self._keys["readers"] = keys[batch.memory.query_rows]  # [U]
            self._keys["memory"] = self._of_memory(batch.memory)
        self._tiles_done = 0

    def _of_memory(self, memory: Memory) -> Tensor:
        """i64[M]: of an image token its own, of a tag that of the image token it stands before, and how far before.

        Example, slots [-1 -1 4 5 -1 6]: tag 2 and 1 before image token 4, image tokens 4, 5, tag 1 before 6, 6.
        """
        image_tokens = self._of_image_tokens()  # [T*Q]
        slots = memory.slots
        if not len(slots):  # nvlm_x: the image tokens as they are
            return image_tokens
        here = torch.arange(len(slots), device=slots.device)
        following = torch.where(slots >= 0, here, len(slots) - 1).flip(0).cummin(0).values.flip(0)  # [M]
        return _mix(image_tokens[slots[following]] + (following - here) * _ODD)

    def _of_image_tokens(self) -> Tensor:
        """i64[T*Q]"""
        tiles = self._keys["tiles"]  # [T]
        places = torch.arange(self._per_tile, device=tiles.device) * _ODD  # [Q]
        return _mix(tiles[:, None] + places).flatten()

    def next_tiles(self, count: int) -> None:
        """The next `count` tiles of the batch, or zero tiles behind its last, go through the tower now."""
        keys = self._keys["tiles"][self._tiles_done : self._tiles_done + count]
        self._tiles_done += count
        self._keys = {**self._keys, "patches": torch.cat((keys, keys.new_zeros(count - len(keys))))}

    def rows(self, kind: Rows, shape: torch.Size) -> Tensor:
        """i64[shape]: the key of every row of a dropout's input. Raises RuntimeError where rows of that shape are not
        the batch's."""
        if kind == "patches":
            tiles = self._keys["patches"]  # [T]
            places = torch.arange(shape[-1], device=tiles.device) * _ODD
            keys = _mix(tiles[:, None] + places)  # [T, 1+P]
        else:
            keys = self._of_image_tokens() if kind == "image_tokens" else self._keys[kind]
        if kind in ("image_tokens", "memory"):
            # zero tiles, and the zero row where there is no image, come last and belong to nobody
            keys = torch.cat((keys, keys.new_zeros(max(0, shape.numel() - len(keys)))))
        if kind == "memory" and shape.numel() == 1:
            keys = keys[:1]  # nvlm_h without a tile to read: one row of zeros, which nobody reads
        if keys.shape != shape:
            raise RuntimeError(
                f"dropout got rows of shape {list(shape)}, but the batch's {kind} are {list(keys.shape)}"
            )
        return keys

    def kept_for(self, layer: nn.Module) -> Callable[..., Tensor]:
        """`layer` as a function that sees today's keys even when it is called again after others were made."""
        keys = self._keys

        def call(*args: Any) -> Tensor:
            now, self._keys = self._keys, keys
            try:
                out: Tensor = layer(*args)
                return out
            finally:
                self._keys = now

        return call


def keep_mask(rows: Tensor, channels: Tensor, p: float) -> Tensor:
    """bool[..., C]: True with probability 1 - p. rows: i64[...] keys of the rows; channels: i32[C] of the channels."""
    x = rows.to(torch.int32)[..., None] + channels  # [..., C], wraps around
    x = (x ^ ((x >> 16) & 0xFFFF)) * _M32[0]
    x = (x ^ ((x >> 13) & 0x7FFFF)) * _M32[1]
    x = x ^ ((x >> 16) & 0xFFFF)
    return x >= round(p * 2**32) - 2**31


class _Drop(torch.autograd.Function):
    """`where(mask, x / (1 - p), 0)`; keeps the keys alone and makes the mask again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, channels: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(rows, channels)
        ctx.p = p
        return _masked(x, rows, channels, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, channels = ctx.saved_tensors
        return _masked(grads[0], rows, channels, ctx.p), None, None, None


def _masked(x: Tensor, rows: Tensor, channels: Tensor, p: float) -> Tensor:
    return torch.where(keep_mask(rows, channels, p), x * (1 / (1 - p)), 0)  # x's shape and type


class Dropout(nn.Module):
    """Dropout by keys. name: the layer's own, which makes its mask differ from other layers'. rows: see `Rows`."""

    def __init__(self, p: float, name: str, rows: Rows, draws: Draws) -> None:
        super().__init__()
        self.p, self.rows, self.draws = p, rows, draws
        self.key = _number(name)

    def extra_repr(self) -> str:
        return f"p={self.p}, rows={self.rows}"

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C] -> same shape and type; as it is outside of training."""
        if not self.training:
            return x
        channels = _mix(torch.arange(x.shape[-1], device=x.device) * _ODD + self.key).to(torch.int32)  # [C]
        out: Tensor = _Drop.apply(x, self.draws.rows(self.rows, x.shape[:-1]), channels, self.p)
        return out
