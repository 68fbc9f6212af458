"""The order of data: a pure function from (seed, sources and weights, position) to a sample.

Ranks, workers and past draws appear nowhere in it, so any position can be asked for at once and every number of ranks
sees the same stream. Three steps:

1. How many draws of each source the first N positions hold: N times its weight, rounded by largest remainder; taken at
   the ends of blocks of 1024 positions, so that every block has its exact share. A source with a limit of epochs ends
   in the block where the limit is reached; from there on the others share what was its part, by their weights. There
   are at most twice as many such phases as sources, found once, so any position is still looked up at once.
2. Inside a block a keyed permutation decides which places belong to which source.
3. The k-th draw of a source of n rows is row P(k mod n) of epoch k div n, where P is a keyed permutation of the rows,
   another one for each source and epoch. Draws are numbered by position, so no row comes again before all have come.

P may keep to groups of shards (`Shards`), for sources that are read over a network or a row group at a time: the shards
of the epoch are permuted and taken so many to a group, and the rows of a group are permuted among themselves before the
next group begins. Which shards a stretch of draws needs is then few, and still a function of its place alone: the sums
of the shards' rows in the epoch's order tell the group of a draw. With one group it is the permutation of all rows.

The permutations are Feistel networks on the next power of four, applied again until the value is in range ("cycle
walking"): bijections with random access and no memory.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
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


class Shards(NamedTuple):
    """How the rows of a source lie in shards: row numbers rise from shard to shard.

    sizes: i64[shards] rows in each, 1 or more. per_group: so many shards are mixed with each other.
    Example: sizes [2, 1, 3], per_group 2: rows 0, 1 | 2 | 3, 4, 5; an epoch may mix the last and the first, then the
    second: rows 4, 0, 3, 5, 1 and then 2.
    """

    sizes: NDArray[np.int64]
    per_group: int


class _Layout(NamedTuple):
    """An epoch of a source in shards: the shards in their order, and where each of them and each group ends."""

    order: NDArray[np.int64]  # i64[shards]
    ends: NDArray[np.int64]  # i64[shards]: draws of the epoch up to the end of a shard
    group_ends: NDArray[np.int64]  # i64[groups]


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


class _Phase(NamedTuple):
    """Blocks in which the same sources share the draws; `after` is written out where a block ends some of them."""

    first: int  # block
    before: list[int]  # draws of each source before it
    shares: list[Fraction]  # zero for a source that has ended
    after: list[int] | None = None  # draws at the end of the phase's only block; None: quotas of `shares`


def quotas(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` split by `shares` (of sum 1) and rounded by largest remainder: never off by one or more."""
    wanted = [total * share for share in shares]
    counts = [int(quota) for quota in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda d: (counts[d] - wanted[d], d))
    for d in by_remainder[: total - sum(counts)]:
        counts[d] += 1
    return counts


def epoch_limit(size: int, max_epochs: float | None) -> int | None:
    """Draws that a source of `size` rows gives before `max_epochs` are over; at least one. None: without end."""
    return None if max_epochs is None else max(1, int(size * Fraction(str(max_epochs))))


class Mixture:
    """The order over sources of `sizes[name]` rows with `weights[name]` as shares of samples.

    A weight share below 1/1024 makes the block larger (a power of two times 1024), so that each block still holds at
    least one draw of it; otherwise rounded counts could go down from one block to the next.

    max_epochs: times that a source's rows may come, by name; a source without it comes for ever. When all have it the
    order ends after `length` positions.

    shards: the sources whose order keeps to groups of shards, by name; the others mix all their rows.
    """

    def __init__(
        self,
        seed: int,
        sizes: Mapping[str, int],
        weights: Mapping[str, float | Fraction],
        max_epochs: Mapping[str, float | None] | None = None,
        shards: Mapping[str, Shards] | None = None,
    ) -> None:
        self.names = sorted(sizes)  # by name: the order of the recipe's keys means nothing
        self.sizes = [int(sizes[name]) for name in self.names]
        if not self.names or min(self.sizes) < 1 or min(weights[name] for name in self.names) <= 0:
            raise ValueError("a mixture needs at least one source, each with a row and a positive weight")
        self.seed = seed
        # by place among the names; a single group is the order of rows, so it is none
        self.shards: dict[int, Shards] = {}
        for name, given in (shards or {}).items():
            if len(given.sizes) == 0 or given.sizes.min() < 1 or int(given.sizes.sum()) != sizes[name]:
                raise ValueError(f"the shards of {name!r} do not hold its {sizes[name]} rows")
            if len(given.sizes) > given.per_group:
                self.shards[self.names.index(name)] = given
        self._starts = {d: np.cumsum(held.sizes) - held.sizes for d, held in self.shards.items()}
        self._layouts: dict[tuple[int, int], _Layout] = {}
        exact = [Fraction(weights[name]) for name in self.names]
        total = sum(exact)
        self.shares = [weight / total for weight in exact]
        self.limits = [
            epoch_limit(size, (max_epochs or {}).get(name)) for name, size in zip(self.names, self.sizes, strict=True)
        ]
        self.block = BLOCK
        while self.block * min(self.shares) < 1:
            self.block *= 2
        self.length: int | None = None
        self._phases: list[_Phase] = []
        self._find_phases()
        self._first_blocks = [phase.first for phase in self._phases]
        self._blocks: dict[int, Draws] = {}

    def shard_digests(self) -> list[list[str | int]]:
        """What of the order by groups other facts do not tell, for a fingerprint: [name, shards in a group, digest]."""
        return [
            [self.names[d], held.per_group, hashlib.sha256(held.sizes.tobytes()).hexdigest()[:16]]
            for d, held in sorted(self.shards.items())
        ]

    def _find_phases(self) -> None:
        block, drawn = 0, [0] * len(self.names)
        while True:
            left = [None if cap is None else cap - n for cap, n in zip(self.limits, drawn, strict=True)]
            alive = [share if room != 0 else Fraction(0) for share, room in zip(self.shares, left, strict=True)]
            total = sum(alive)
            if not total:
                self.length = sum(drawn)
                self._phases.append(_Phase(block, drawn, alive, drawn))
                return
            shares = [share / total for share in alive]
            bounds = [(d, room) for d, room in enumerate(left) if room]
            if not bounds:
                self._phases.append(_Phase(block, drawn, shares))
                return
            whole = min(int(room / (self.block * shares[d])) for d, room in bounds)

            def fits(blocks: int, shares: list[Fraction] = shares, bounds: list[tuple[int, int]] = bounds) -> bool:
                counts = quotas(blocks * self.block, shares)
                return all(counts[d] <= room for d, room in bounds)

            while not fits(whole):  # rounding moves it by one
                whole -= 1
            while fits(whole + 1):
                whole += 1
            ends = quotas(whole * self.block, shares)
            wanted = [n - e for n, e in zip(quotas((whole + 1) * self.block, shares), ends, strict=True)]
            if whole:
                self._phases.append(_Phase(block, drawn, shares))
                drawn = [n + e for n, e in zip(drawn, ends, strict=True)]
                block += whole
            after = self._last_block(drawn, wanted)
            self._phases.append(_Phase(block, drawn, shares, after))
            drawn = after
            block += 1

    def _last_block(self, drawn: list[int], wanted: list[int]) -> list[int]:
        """Draws after a block in which sources end: what they cannot give is shared out among the others."""
        given = [0] * len(drawn)
        while True:
            for d, cap in enumerate(self.limits):
                room = wanted[d] if cap is None else min(wanted[d], cap - drawn[d] - given[d])
                given[d] += room
            missing = self.block - sum(given)
            alive = [
                share if cap is None or drawn[d] + given[d] < cap else Fraction(0)
                for d, (share, cap) in enumerate(zip(self.shares, self.limits, strict=True))
            ]
            total = sum(alive)
            if not missing or not total:
                return [n + g for n, g in zip(drawn, given, strict=True)]
            wanted = quotas(missing, [share / total for share in alive])

    def ends(self) -> dict[str, tuple[int, int]]:
        """The sources whose limit of epochs is reached, and the stretch of positions (begin, end) in which it is: one
        block, over which what is left of the source is spread, so that its share there is below its weight."""
        found: dict[str, tuple[int, int]] = {}
        for phase in self._phases:
            for d, cap in enumerate(self.limits):
                if phase.after is not None and cap is not None and phase.after[d] == cap > phase.before[d]:
                    size = sum(phase.after) - sum(phase.before)
                    found[self.names[d]] = (phase.first * self.block, phase.first * self.block + size)
        return found

    def counts(self, num_blocks: int) -> list[int]:
        """Draws of each source in the first `num_blocks` blocks; never off its share of a phase by one or more."""
        phase = self._phases[max(bisect_right(self._first_blocks, num_blocks) - 1, 0)]
        blocks = num_blocks - phase.first
        if phase.after is not None:
            return list(phase.before if blocks == 0 else phase.after)
        return [n + q for n, q in zip(phase.before, quotas(blocks * self.block, phase.shares), strict=True)]

    def drawn(self, position: int) -> list[int]:
        """Draws of each source at the positions before `position`."""
        block, within = divmod(position, self.block)
        counts = self.counts(block)
        if within:
            here = np.bincount(self._block_draws(block).source[:within], minlength=len(counts))
            counts = [n + int(h) for n, h in zip(counts, here, strict=True)]
        return counts

    def draws(self, start: int, stop: int) -> Draws:
        """The draws at positions start..stop-1. Raises ValueError behind the end of the order."""
        if self.length is not None and stop > self.length:
            raise ValueError(f"the order ends after {self.length} positions; {stop} were asked for")
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
        size = int(ends[-1])  # self.block, but for the last block of an order that ends
        places = permute(np.arange(size, dtype=np.int64), size, f"{self.seed}/block/{block}")
        source = np.searchsorted(ends, places, side="right").astype(np.int32)
        row = np.empty(size, dtype=np.int64)
        epoch = np.empty(size, dtype=np.int64)
        for d, (first, rows) in enumerate(zip(before, self.sizes, strict=True)):
            mine = np.flatnonzero(source == d)
            drawn = first + np.arange(len(mine), dtype=np.int64)  # in the order of positions: epochs do not mix
            epoch[mine] = drawn // rows
            for e in np.unique(epoch[mine]).tolist():
                chosen = mine[epoch[mine] == e]
                in_epoch = (drawn % rows)[epoch[mine] == e]
                row[chosen] = self._rows(d, e, in_epoch)
        drawn_block = Draws(source, row, epoch)
        while len(self._blocks) >= 16:
            self._blocks.pop(next(iter(self._blocks)), None)
        self._blocks[block] = drawn_block
        return drawn_block

    def _rows(self, d: int, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows of source d at some draws of an epoch, numbered from 0."""
        key = f"{self.seed}/rows/{self.names[d]}/{epoch}"
        if d not in self.shards:
            return permute(places, self.sizes[d], key)
        sizes, layout = self.shards[d].sizes, self._layout(d, epoch)
        within = np.empty_like(places)  # draws in the order of shards
        groups = np.searchsorted(layout.group_ends, places, side="right")
        for group in np.unique(groups).tolist():
            mine = groups == group
            begin = int(layout.group_ends[group - 1]) if group else 0
            size = int(layout.group_ends[group]) - begin
            within[mine] = begin + permute(places[mine] - begin, size, f"{key}/{group}")
        at = np.searchsorted(layout.ends, within, side="right")
        shard = layout.order[at]
        return self._starts[d][shard] + within - layout.ends[at] + sizes[shard]

    def _layout(self, d: int, epoch: int) -> _Layout:
        layout = self._layouts.get((d, epoch))
        if layout is None:
            sizes, per_group = self.shards[d]
            key = f"{self.seed}/shards/{self.names[d]}/{epoch}"
            order = permute(np.arange(len(sizes), dtype=np.int64), len(sizes), key)
            ends = np.cumsum(sizes[order])
            last = np.append(np.arange(per_group - 1, len(sizes) - 1, per_group), len(sizes) - 1)
            layout = _Layout(order, ends, ends[last])
            while len(self._layouts) >= 2 * len(self.shards):  # the epoch that ends and the one that begins
                self._layouts.pop(next(iter(self._layouts)), None)
            self._layouts[d, epoch] = layout
        return layout
