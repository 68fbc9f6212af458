"""The order of data: a pure function from (seed, sources and weights, position) to a sample.

Ranks, workers and past draws appear nowhere in it, so any position can be asked for at once and every number of ranks
sees the same stream. Three steps:

1. How many draws of each source the first N positions hold: N times its weight, rounded by largest remainder; taken at
   the ends of blocks of 1024 positions, so that every block has its exact share.
2. Inside a block a keyed permutation decides which places belong to which source.
3. The k-th draw of a source of n rows is row P(k mod n) of epoch k div n, where P is a keyed permutation of the rows,
   another one for each source and epoch. Draws are numbered by position, so no row comes again before all have come.

The permutations are Feistel networks on the next power of four, applied again until the value is in range ("cycle
walking"): bijections with random access and no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
_ROUNDS = 8


class Draws(NamedTuple):
    """Draws at consecutive positions: i32[n] source (index into `Mixture.names`), i64[n] row, i64[n] epoch."""

    source: NDArray[np.int32]
    row: NDArray[np.int64]
    epoch: NDArray[np.int64]


@lru_cache(maxsize=4096)
def _round_keys(key: str) -> tuple[int, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def permute(values: NDArray[np.int64], size: int, key: str) -> NDArray[np.int64]:
    """Where a permutation of range(size), chosen by `key`, sends each of `values`.

    Example: permute(np.arange(5), 5, "a") holds each of 0..4 once; permute(np.array([3]), 5, "a") is its fourth entry.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [np.uint64(k) for k in _round_keys(key)]

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> shift, x & mask
        for k in keys:
            mixed = (right ^ k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        return (left << shift) | right

    out = network(values.astype(np.uint64))
    outside = np.flatnonzero(out >= np.uint64(size))
    while len(outside):
        out[outside] = network(out[outside])
        outside = outside[out[outside] >= np.uint64(size)]
    return out.astype(np.int64)


class Mixture:
    """The order over sources of `sizes[name]` rows with `weights[name]` as shares of samples.

    A weight share below 1/1024 makes the block larger (a power of two times 1024), so that each block still holds at
    least one draw of it; otherwise rounded counts could go down from one block to the next.
    """

    def __init__(self, seed: int, sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
        self.names = sorted(sizes)  # by name: the order of the recipe's keys means nothing
        self.sizes = [int(sizes[name]) for name in self.names]
        if not self.names or min(self.sizes) < 1 or min(weights[name] for name in self.names) <= 0:
            raise ValueError("a mixture needs at least one source, each with a row and a positive weight")
        self.seed = seed
        exact = [Fraction(weights[name]) for name in self.names]
        total = sum(exact)
        self.shares = [weight / total for weight in exact]
        self.block = BLOCK
        while self.block * min(self.shares) < 1:
            self.block *= 2
        self._blocks: dict[int, Draws] = {}

    def counts(self, num_blocks: int) -> list[int]:
        """Draws of each source in the first `num_blocks` blocks; never off its share by one or more."""
        total = num_blocks * self.block
        wanted = [total * share for share in self.shares]
        counts = [int(quota) for quota in wanted]
        by_remainder = sorted(range(len(counts)), key=lambda d: (counts[d] - wanted[d], d))
        for d in by_remainder[: total - sum(counts)]:
            counts[d] += 1
        return counts

    def draws(self, start: int, stop: int) -> Draws:
        """The draws at positions start..stop-1."""
        pieces = []
        for block in range(start // self.block, (stop - 1) // self.block + 1):
            begin = block * self.block
            window = slice(max(start - begin, 0), min(stop - begin, self.block))
            drawn = self._block_draws(block)
            pieces.append(Draws(drawn.source[window], drawn.row[window], drawn.epoch[window]))
        return Draws(
            np.concatenate([piece.source for piece in pieces]),
            np.concatenate([piece.row for piece in pieces]),
            np.concatenate([piece.epoch for piece in pieces]),
        )

    def _block_draws(self, block: int) -> Draws:
        if block in self._blocks:
            return self._blocks[block]
        before, after = self.counts(block), self.counts(block + 1)
        ends = np.cumsum([end - first for first, end in zip(before, after, strict=True)])
        places = permute(np.arange(self.block, dtype=np.int64), self.block, f"{self.seed}/block/{block}")
        source = np.searchsorted(ends, places, side="right").astype(np.int32)
        row = np.empty(self.block, dtype=np.int64)
        epoch = np.empty(self.block, dtype=np.int64)
        for d, (first, size) in enumerate(zip(before, self.sizes, strict=True)):
            mine = np.flatnonzero(source == d)
            drawn = first + np.arange(len(mine), dtype=np.int64)  # in the order of positions: epochs do not mix
            epoch[mine] = drawn // size
            for e in np.unique(epoch[mine]).tolist():
                chosen = mine[epoch[mine] == e]
                in_epoch = (drawn % size)[epoch[mine] == e]
                row[chosen] = permute(in_epoch, size, f"{self.seed}/rows/{self.names[d]}/{e}")
        drawn_block = Draws(source, row, epoch)
        while len(self._blocks) >= 4:
            self._blocks.pop(next(iter(self._blocks)), None)
        self._blocks[block] = drawn_block
        return drawn_block
