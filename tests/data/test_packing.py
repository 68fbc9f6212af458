"""Packs hold every sample once and never too much; dealing gives every rank the same number of turns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.batch import SampleRef
from nvlm_train.data.packing import (
    NULL_PACK,
    Balance,
    Cost,
    Pack,
    balance,
    best_fit,
    deal,
    make_pack,
    pack,
    twin,
    utilisation,
)

COST = Cost(1.0, 1e-3, 100.0)
CAPACITY = 100
lengths = st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, 7)), min_size=1, max_size=200)


def packed(samples: list[tuple[int, int]], capacity: int = CAPACITY) -> list[Pack]:
    refs = [SampleRef("s", k, 0) for k in range(len(samples))]
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    return pack(refs, tokens, tiles, capacity, COST)


@given(lengths)
def test_every_sample_once_and_within_capacity(samples: list[tuple[int, int]]) -> None:
    packs = packed(samples)
    assert sorted(ref.row for p in packs for ref in p.samples) == list(range(len(samples)))
    for p in packs:
        assert p.tokens == sum(samples[ref.row][0] for ref in p.samples) <= CAPACITY
        assert p.tiles == sum(samples[ref.row][1] for ref in p.samples)
        assert not p.is_null
    assert [p.cost for p in packs] == sorted((p.cost for p in packs), reverse=True)
    # at most one in twenty more than best fit, of whose bins at most one can be half empty
    tokens = np.array([length for length, _ in samples])
    tight = len(best_fit(tokens, CAPACITY))
    assert len(packs) <= tight + tight // 20 and tight <= 2 * int(tokens.sum()) / CAPACITY + 1
    assert packs == packed(samples)


def test_best_fit_example() -> None:
    assert best_fit(np.array([4, 7, 3, 5]), 10) == [[1, 2], [3, 0]]


def test_twin_balances_tiles() -> None:
    """Half text, half images at a large capacity: tiles per pack hardly differ, where best fit sorts them apart."""
    draw = np.random.default_rng(0)
    count, capacity = 400, 4000
    tiles = np.where(draw.random(count) < 0.5, draw.integers(1, 8, count), 0)
    tokens = np.where(tiles > 0, tiles * 40 + 20, draw.integers(10, 120, count))

    def spread(bins: list[list[int]]) -> float:
        held = [int(tiles[b].sum()) for b in bins]
        return max(held) / (sum(held) / len(held))

    # measured: twin 1.003, best fit 1.58
    assert spread(twin(tokens, tiles, capacity)) < 1.1
    assert spread(best_fit(tokens, capacity)) > 1.5
    assert len(twin(tokens, tiles, capacity)) <= len(best_fit(tokens, capacity)) + 1


@given(lengths, st.integers(7, 30))
def test_two_capacities(samples: list[tuple[int, int]], tile_capacity: int) -> None:
    tokens, tiles = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    bins = twin(tokens, tiles, CAPACITY, tile_capacity)
    assert sorted(i for held in bins for i in held) == list(range(len(samples)))
    assert all(tokens[held].sum() <= CAPACITY and tiles[held].sum() <= tile_capacity for held in bins)


def test_tiles_bound_packs_where_tokens_do_not() -> None:
    """Image tokens outside the decoder, 60 % short text: tiles decide how many packs there are, and both are even."""
    draw = np.random.default_rng(1)
    count, capacity, tile_capacity = 3000, 32768, 64
    tiles = np.where(draw.random(count) < 0.4, draw.integers(1, 8, count), 0)
    tokens = draw.integers(10, 300, count)
    bins = twin(tokens, tiles, capacity, tile_capacity)
    assert len(bins) == -(-int(tiles.sum()) // tile_capacity)
    for column in (tokens, tiles):
        held = [int(column[b].sum()) for b in bins]
        assert max(held) / (sum(held) / len(held)) < 1.02  # measured 1.001 (tokens), 1.010 (tiles)


def test_balance_and_utilisation_by_hand() -> None:
    """Two ranks, two micro-steps: tiles 3 | 1 then 2 | none; decoder 8 | 8 then 4 | none."""

    def made(row: int, tokens: int, tiles: int) -> Pack:
        return Pack((SampleRef("s", row, 0),), tokens, tiles, tokens * 1.0 + 100.0 * tiles)

    dealt = [[[made(0, 8, 3)], [made(1, 8, 1)]], [[made(2, 4, 2)], [NULL_PACK]]]
    cost = Cost(1.0, 0.0, 100.0)
    assert balance(dealt, cost) == Balance(decoder=(8 + 4) * 2 / 20, tokens=(8 + 4) * 2 / 20, tiles=(3 + 2) * 2 / 6)
    assert utilisation(dealt, cost) == pytest.approx((600 + 20) / (2 * (300 + 8 + 200 + 4)))
    assert balance([[[NULL_PACK], [NULL_PACK]]], cost) == Balance(1.0, 1.0, 1.0)
    # one sample of 8 tokens beside four of 2: equally many tokens, but attention works 64 beside 16
    lengths = np.array([8, 2, 2, 2, 2])
    refs = [SampleRef("s", row, 0) for row in range(5)]
    quadratic = Cost(1.0, 1.0, 100.0)
    one, four = (make_pack(refs, lengths, lengths * 0, held, quadratic) for held in ([0], [1, 2, 3, 4]))
    assert balance([[[one], [four]]], quadratic) == Balance(decoder=(8 + 64) * 2 / (16 + 80), tokens=1.0, tiles=1.0)
    assert utilisation([], cost) == 1.0


def test_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit a pack of 10"):
        packed([(11, 0)], 10)
    one = np.ones(1, dtype=np.int64)
    with pytest.raises(ValueError, match="a sample of 8 tiles does not fit a pack of 7"):
        pack([SampleRef("s", 0, 0)], one, 8 * one, 10, COST, 7)
    assert pack([], np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 10, COST) == []


@settings(deadline=None)
@given(lengths, st.integers(1, 9), st.integers(1, 4))
def test_dealing(samples: list[tuple[int, int]], world_size: int, micro_batch_size: int) -> None:
    packs = packed(samples)
    dealt = deal(packs, world_size, micro_batch_size)
    assert len(dealt) == -(-len(packs) // (world_size * micro_batch_size))
    for ranks in dealt:
        assert len(ranks) == world_size
        assert all(1 <= len(held) <= micro_batch_size for held in ranks)
        assert all(held == [NULL_PACK] or not any(p.is_null for p in held) for held in ranks)
    given = [p for ranks in dealt for held in ranks for p in held if not p.is_null]
    assert sorted(map(id, given)) == sorted(map(id, packs))
    # like cost meets in one micro-step: no pack of a later one costs more
    tops = [[p.cost for held in ranks for p in held if not p.is_null] for ranks in dealt]
    assert all(min(one) >= max(other) for one, other in zip(tops, tops[1:], strict=False))


def test_dealing_example() -> None:
    a, b, c, d, e = (Pack((SampleRef("s", k, 0),), 1, 0, float(9 - k)) for k in range(5))
    assert deal([a, b, c, d, e], 2, 1) == [[[a], [b]], [[c], [d]], [[e], [NULL_PACK]]]
    assert deal([a, b, c, d, e], 2, 2) == [[[a, d], [b, c]], [[e], [NULL_PACK]]]
    assert deal([a], 3, 2) == [[[a], [NULL_PACK], [NULL_PACK]]]
