"""Packs: several samples in one sequence, planned from lengths alone, and who trains which of them.

A pack has a hard capacity in tokens and, where asked for, in tiles. Every rank plans the whole step, so that all know
the number of micro-steps without a word between them. What a rank waits for is the slowest of the others, so packs are
made alike, in tiles (the tower's work) as well as in tokens (the decoder's).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # counting packs in many processes at once needs no torch
    from nvlm_train.batch import SampleRef
    from nvlm_train.recipe import schema

VERSION = 2  # of the rule that fills packs: where a step is a number of packs, its samples depend on it
_MANY = 20  # with so many packs one more in twenty is worth a better balance


@dataclass(frozen=True)
class Pack:
    """Samples that share a sequence. `tokens` and `tiles` are planned sums; a null pack has no samples."""

    samples: tuple[SampleRef, ...]
    tokens: int
    tiles: int
    cost: float

    @property
    def is_null(self) -> bool:
        """Whether it only fills a rank's turn: one token, no label, no tile."""
        return not self.samples


NULL_PACK = Pack((), 1, 0, 0.0)


class Cost(NamedTuple):
    """Relative time of a pack: per token, per squared sample length (attention), per tile."""

    per_token: float
    per_square: float
    per_tile: float

    @classmethod
    def of(cls, recipe: schema.Recipe) -> Cost:
        """Multiply-adds of the matrices; it only sorts packs, so exactness is not needed."""
        lm, tower = recipe.model.language_model, recipe.model.vision
        layer = lm.hidden_size * (2 * lm.hidden_size + 3 * lm.intermediate_size)
        patches = (tower.image_size // tower.patch_size) ** 2
        tower_layer = tower.hidden_size * (4 * tower.hidden_size + 2 * tower.intermediate_size)
        share = 1.0 if recipe.train.vision != "frozen" else 1.0 / 3.0  # a frozen tower has no backward
        return cls(
            float(lm.num_hidden_layers * layer + lm.hidden_size * lm.vocab_size),
            float(lm.num_hidden_layers * lm.hidden_size),
            share * tower.num_hidden_layers * patches * (tower_layer + 2.0 * patches * tower.hidden_size),
        )


def best_fit(tokens: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest bin it fits. Returns bins of indices.

    Example, capacity 10: lengths [4, 7, 3, 5] give [[1, 2], [3, 0]].
    """
    return _fill(sorted(range(len(tokens)), key=lambda i: (-int(tokens[i]), i)), tokens, capacity, [])


def twin(
    tokens: NDArray[np.int64], tiles: NDArray[np.int64], capacity: int, tile_capacity: int | None = None
) -> list[list[int]]:
    """Bins alike in tiles as well as in tokens; as many as the sums need, and more only where something fits nowhere.

    1. Text that is too long for the room that images will leave goes first, one to a bin.
    2. Samples with images, most tiles first, each into the bin with the fewest tiles (and of these the fewest tokens)
       that it fits. Its tile-poorest bins may be full: they wait aside until something short enough comes.
    3. The rest of the text, longest first, each into the emptiest bin.

    Each of 2 and 3 is the rule "longest processing time first". The sorting of text into whatever is fullest, which
    uses the last tokens of every bin, would leave others half empty, and the ranks that get them waiting.
    """
    length, count = tokens.tolist(), tiles.tolist()
    most = int(tiles.sum()) + 1 if tile_capacity is None else tile_capacity
    with_image = sorted((i for i, k in enumerate(count) if k), key=lambda i: (-count[i], -length[i], i))
    text_only = sorted((i for i, k in enumerate(count) if not k), key=lambda i: (-length[i], i))
    num_bins = max(1, -(-sum(length) // capacity), -(-sum(count) // most))
    room = capacity - sum(length[i] for i in with_image) / num_bins
    long = [i for i in text_only[:num_bins] if length[i] > room]
    bins: list[list[int]] = [[i] for i in long] + [[] for _ in range(num_bins - len(long))]
    heap = [(0, sum(length[i] for i in held), b) for b, held in enumerate(bins)]  # (tiles, tokens, bin)
    heapq.heapify(heap)
    aside: list[tuple[int, int, int]] = []  # (-room, tiles, bin): no place for what came last
    for i in with_image:
        need, more = length[i], count[i]
        while aside and -aside[0][0] >= need:
            left, held, b = heapq.heappop(aside)
            heapq.heappush(heap, (held, capacity + left, b))
        while heap and heap[0][0] + more <= most and heap[0][1] + need > capacity:
            held, used, b = heapq.heappop(heap)
            heapq.heappush(aside, (used - capacity, held, b))
        if heap and heap[0][0] + more <= most:
            held, used, b = heap[0]
            heapq.heapreplace(heap, (held + more, used + need, b))
        else:
            b = len(bins)
            bins.append([])
            heapq.heappush(heap, (more, need, b))
        bins[b].append(i)
    by_tokens = [(used, b) for _, used, b in heap] + [(capacity + left, b) for left, _, b in aside]
    heapq.heapify(by_tokens)
    for i in text_only[len(long) :]:
        used, b = by_tokens[0]
        if used + length[i] <= capacity:
            heapq.heapreplace(by_tokens, (used + length[i], b))
        else:
            b = len(bins)
            bins.append([])
            heapq.heappush(by_tokens, (length[i], b))
        bins[b].append(i)
    return [held for held in bins if held]


def fill_bins(
    tokens: NDArray[np.int64], tiles: NDArray[np.int64], capacity: int, tile_capacity: int | None = None
) -> list[list[int]]:
    """`twin`, unless best-fit decreasing needs clearly fewer bins: with few bins one less may be a whole micro-step.

    Raises ValueError when a sample does not fit any bin; the index has dropped such samples.
    """
    if len(tokens) and int(tokens.max()) > capacity:
        raise ValueError(f"a sample of {int(tokens.max())} tokens does not fit a pack of {capacity}")
    if tile_capacity is not None and len(tiles) and int(tiles.max()) > tile_capacity:
        raise ValueError(f"a sample of {int(tiles.max())} tiles does not fit a pack of {tile_capacity}")
    if not len(tokens):
        return []
    balanced = twin(tokens, tiles, capacity, tile_capacity)
    if tile_capacity is not None or len(balanced) <= -(-int(tokens.sum()) // capacity):
        return balanced  # none can need fewer
    tight = best_fit(tokens, capacity)
    return balanced if len(balanced) <= len(tight) + len(tight) // _MANY else tight


def _fill(order: list[int], tokens: NDArray[np.int64], capacity: int, bins: list[list[int]]) -> list[list[int]]:
    room = sorted((capacity - sum(int(tokens[i]) for i in held), b) for b, held in enumerate(bins))
    for i in order:
        need = int(tokens[i])
        at = bisect_left(room, (need, -1))
        if at < len(room):
            left, b = room.pop(at)
        else:
            left, b = capacity, len(bins)
            bins.append([])
        bins[b].append(i)
        insort(room, (left - need, b))
    return bins


def pack(
    samples: Sequence[SampleRef],
    tokens: NDArray[np.int64],
    tiles: NDArray[np.int64],
    capacity: int,
    cost: Cost,
    tile_capacity: int | None = None,
) -> list[Pack]:
    """Packs of at most `capacity` tokens that hold each sample exactly once; the costliest pack first.

    Raises ValueError when a sample does not fit any pack; the index has dropped such samples.
    """
    bins = fill_bins(tokens, tiles, capacity, tile_capacity)
    return by_cost([make_pack(samples, tokens, tiles, held, cost) for held in bins])


def make_pack(
    samples: Sequence[SampleRef], tokens: NDArray[np.int64], tiles: NDArray[np.int64], held: Sequence[int], cost: Cost
) -> Pack:
    """The pack of the samples numbered `held`."""
    lengths = tokens[held].astype(np.float64)
    num_tiles = int(tiles[held].sum())
    price = cost.per_token * lengths.sum() + cost.per_square * (lengths**2).sum() + cost.per_tile * num_tiles
    return Pack(tuple(samples[i] for i in held), int(tokens[held].sum()), num_tiles, float(price))


def by_cost(packs: Sequence[Pack]) -> list[Pack]:
    """The costliest first; equal costs stay in their order."""
    return sorted(packs, key=lambda p: -p.cost)


def deal(packs: Sequence[Pack], world_size: int, micro_batch_size: int) -> list[list[list[Pack]]]:
    """Who trains what: result[micro_step][rank] is a list of 1 to `micro_batch_size` packs.

    Packs of like cost meet in one micro-step. A rank that gets none takes a null pack, so that all ranks make the same
    number of micro-steps: ceil(packs / (world_size * micro_batch_size)). Example, packs a..e by falling cost, 2 ranks,
    1 pack each: [[a],[b]], [[c],[d]], [[e],[null]].
    """
    turn = world_size * micro_batch_size
    dealt = []
    for begin in range(0, len(packs), turn):
        ranks: list[list[Pack]] = [[] for _ in range(world_size)]
        for k, item in enumerate(packs[begin : begin + turn]):
            lap, seat = divmod(k, world_size)
            ranks[seat if lap % 2 == 0 else world_size - 1 - seat].append(item)  # back and forth evens out the cost
        dealt.append([held or [NULL_PACK] for held in ranks])
    return dealt


# ------------------------------------------------------------------------------------------------------------ balance


class Balance(NamedTuple):
    """How evenly the ranks of a step are loaded; 1.0 is perfect.

    decoder, tokens, tiles: sum over micro-steps of the most that any rank has, by the sum over micro-steps of the mean.
    With 2.0 half of the ranks' time goes by in waiting for the slowest, as far as the decoder (the tower) is concerned.
    decoder: its work by the cost model, matrices (which grow with tokens) and attention (with the squares of the
    samples' lengths). tiles: the tower's work. A null pack counts as none.
    """

    decoder: float
    tokens: float
    tiles: float


def balance(dealt: Sequence[Sequence[Sequence[Pack]]], cost: Cost) -> Balance:
    """The balance of a step as `deal` made it. Example, two ranks with 3 and 1 tiles: 3 / 2 = 1.5."""
    decoder = [[sum(p.cost - cost.per_tile * p.tiles for p in held) for held in ranks] for ranks in dealt]
    tokens = [[sum(p.tokens for p in held if not p.is_null) for held in ranks] for ranks in dealt]
    tiles = [[sum(p.tiles for p in held) for held in ranks] for ranks in dealt]

    def ratio(loads: Sequence[Sequence[float]]) -> float:
        total = sum(map(sum, loads))
        return sum(max(ranks) * len(ranks) for ranks in loads) / total if total else 1.0

    return Balance(ratio(decoder), ratio(tokens), ratio(tiles))


def utilisation(dealt: Sequence[Sequence[Sequence[Pack]]], cost: Cost) -> float:
    """Share of the ranks' time that is work, where they wait for each other after the tower and after the decoder.

        sum of all work / (ranks x sum over micro-steps of (longest tower + longest decoder))

    The work of a pack is `Cost`'s; sums over several steps come from `work_and_time`.
    """
    work, spent = work_and_time(dealt, cost)
    return work / spent if spent else 1.0


def work_and_time(dealt: Sequence[Sequence[Sequence[Pack]]], cost: Cost) -> tuple[float, float]:
    """(work of all ranks, ranks x time until the last is done) of a step, in `Cost`'s units."""
    work = spent = 0.0
    for ranks in dealt:
        tower = [sum(cost.per_tile * p.tiles for p in held) for held in ranks]
        decoder = [sum(p.cost - cost.per_tile * p.tiles for p in held) for held in ranks]
        work += sum(tower) + sum(decoder)
        spent += len(ranks) * (max(tower) + max(decoder))
    return work, spent
