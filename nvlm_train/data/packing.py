"""Packs: several samples in one sequence, planned from lengths alone, and who trains which of them.

A step is exactly the samples of its positions; how many packs they fill varies from step to step. Every rank plans the
whole step, so that all know the number of micro-steps without a word between them.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import SampleRef
from nvlm_train.recipe import schema

_TRIES = 16  # bins of few tiles that are looked at before a new one is opened


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


def twin(tokens: NDArray[np.int64], tiles: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Tiles first, text after: samples with images, most tiles first, go to the bin with the fewest tiles; samples of
    text then fill what is left, best fit. Bins end up alike in tiles as well as in tokens."""
    with_image = sorted(np.flatnonzero(tiles > 0).tolist(), key=lambda i: (-int(tiles[i]), -int(tokens[i]), i))
    text_only = sorted(np.flatnonzero(tiles == 0).tolist(), key=lambda i: (-int(tokens[i]), i))
    bins: list[list[int]] = [[] for _ in range(max(1, -(-int(tokens.sum()) // capacity)))]
    free = [capacity] * len(bins)
    heap = [(0, b) for b in range(len(bins))]
    for i in with_image:
        seen: list[tuple[int, int]] = []
        target = -1
        while heap and len(seen) < _TRIES:
            held, b = heapq.heappop(heap)
            if free[b] >= tokens[i]:
                target = b
                heapq.heappush(heap, (held + int(tiles[i]), b))
                break
            seen.append((held, b))
        for entry in seen:
            heapq.heappush(heap, entry)
        if target < 0:
            target = len(bins)
            bins.append([])
            free.append(capacity)
            heapq.heappush(heap, (int(tiles[i]), target))
        bins[target].append(i)
        free[target] -= int(tokens[i])
    return [held for held in _fill(text_only, tokens, capacity, bins) if held]


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
    samples: Sequence[SampleRef], tokens: NDArray[np.int64], tiles: NDArray[np.int64], capacity: int, cost: Cost
) -> list[Pack]:
    """Packs of at most `capacity` tokens that hold each sample exactly once; the costliest pack first.

    `twin`, unless it needs more packs than best-fit decreasing (small capacities). Raises ValueError when a sample does
    not fit any pack; the index has dropped such samples.
    """
    if len(tokens) and int(tokens.max()) > capacity:
        raise ValueError(f"a sample of {int(tokens.max())} tokens does not fit a pack of {capacity}")
    if not len(samples):
        return []
    tight, balanced = best_fit(tokens, capacity), twin(tokens, tiles, capacity)
    bins = balanced if len(balanced) <= len(tight) else tight
    packs = []
    for held in bins:
        lengths = tokens[held].astype(np.float64)
        num_tiles = int(tiles[held].sum())
        price = cost.per_token * lengths.sum() + cost.per_square * (lengths**2).sum() + cost.per_tile * num_tiles
        packs.append(Pack(tuple(samples[i] for i in held), int(tokens[held].sum()), num_tiles, float(price)))
    return sorted(packs, key=lambda p: -p.cost)  # stable: equal costs stay in bin order


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
