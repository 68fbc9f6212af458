"""The order: bijections, exact quotas, no memory of what was asked before."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_train.data.mixture import BLOCK, Mixture, Shards, epoch_limit, permute

sources = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.integers(1, 3000), st.floats(1e-4, 10.0)),
    min_size=1,
    max_size=5,
)


def mixture(given: dict[str, tuple[int, float]], seed: int = 0) -> Mixture:
    return Mixture(seed, {k: size for k, (size, _) in given.items()}, {k: weight for k, (_, weight) in given.items()})


@given(st.integers(1, 5000), st.text(max_size=6))
def test_permutation_is_a_bijection(size: int, key: str) -> None:
    image = permute(np.arange(size), size, key)
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_depends_on_key_and_looks_random() -> None:
    n = 100_000
    one, other = permute(np.arange(n), n, "a"), permute(np.arange(n), n, "b")
    # measured: |correlation| of neighbours 0.0003, with the place 0.0053, between keys 0.0032
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(n), one)[0, 1]) < 0.02
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert permute(np.array([77_777]), n, "a")[0] == one[77_777]


def test_permutations_of_a_few_rows_all_occur() -> None:
    """Three rows over 300 epochs: each of the 6 orders, none twice as often as expected (measured 43 to 61)."""
    found: dict[tuple[int, ...], int] = {}
    for epoch in range(300):
        order = tuple(permute(np.arange(3), 3, f"0/rows/a/{epoch}").tolist())
        found[order] = found.get(order, 0) + 1
    assert len(found) == 6
    assert max(found.values()) < 100


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(0, 3))
def test_quotas_are_exact_and_never_shrink(given: dict[str, tuple[int, float]], seed: int) -> None:
    mix = mixture(given, seed)
    total = sum(weight for _, weight in given.values())
    before = [0] * len(mix.names)
    for blocks in (0, 1, 2, 3, 10, 1000, 10**6, 10**6 + 1):
        counts = mix.counts(blocks)
        assert sum(counts) == blocks * mix.block
        assert all(now >= then for now, then in zip(counts, before, strict=True))
        for name, count in zip(mix.names, counts, strict=True):
            # off by less than one draw; the small term is the rounding of this test's own float arithmetic
            assert abs(count - blocks * mix.block * given[name][1] / total) < 1 + 1e-9 * blocks * mix.block
        before = counts


def test_block_is_1024_unless_a_weight_is_tiny() -> None:
    assert mixture({"a": (5, 0.999), "b": (5, 0.001)}).block == BLOCK
    assert mixture({"a": (5, 0.9995), "b": (5, 0.0005)}).block == 2 * BLOCK


@settings(max_examples=40, deadline=None)
@given(sources, st.integers(0, 5))
def test_every_block_holds_its_quota(given: dict[str, tuple[int, float]], block: int) -> None:
    mix = mixture(given)
    drawn = mix.draws(block * mix.block, (block + 1) * mix.block)
    before, after = mix.counts(block), mix.counts(block + 1)
    assert np.bincount(drawn.source, minlength=len(before)).tolist() == [
        b - a for a, b in zip(before, after, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(sources)
def test_no_row_lost_or_doubled_in_an_epoch(given: dict[str, tuple[int, float]]) -> None:
    """Every full epoch of every source holds each of its rows once, the last no row twice, and epochs do not mix."""
    mix = mixture(given)
    drawn = mix.draws(0, 3 * mix.block)
    for d, name in enumerate(mix.names):
        mine = drawn.source == d
        rows, epochs = drawn.row[mine], drawn.epoch[mine]
        assert epochs[0] == 0 and set(np.diff(epochs).tolist()) <= {0, 1}
        *full, last = np.split(rows, np.flatnonzero(np.diff(epochs)) + 1)
        assert all(np.array_equal(np.sort(epoch), np.arange(given[name][0])) for epoch in full)
        assert len(set(last.tolist())) == len(last)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 3000), st.integers(0, 3000))
def test_any_window_equals_the_whole(start: int, length: int, cut: int) -> None:
    given = {"b": (700, 0.3), "a": (50, 0.2), "c": (900, 0.5)}
    whole = mixture(given).draws(0, 8192)
    stop = min(start + length, 8192)
    start = min(start, stop - 1)
    mix = mixture(dict(reversed(given.items())))  # neither the order of keys nor earlier questions matter
    mix.draws(cut, cut + 10)
    part = mix.draws(start, stop)
    for whole_column, column in zip(whole, part, strict=True):
        assert np.array_equal(column, whole_column[start:stop])


def test_seed_changes_the_order_and_far_positions_work() -> None:
    given = {"a": (700, 0.3), "b": (50, 0.7)}
    one, other = mixture(given, 1).draws(0, 1024), mixture(given, 2).draws(0, 1024)
    assert not np.array_equal(one.row, other.row)
    far = mixture(given).draws(10**12, 10**12 + 5)
    assert far.epoch.min() > 10**8
    assert (far.row < 700).all()


def test_a_fixed_order() -> None:
    """The order is part of the promise to resume: these values may not change between versions or machines."""
    drawn = mixture({"a": (1000, 0.6), "b": (100, 0.4)}, 1234).draws(5000, 5008)
    assert drawn.source.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert drawn.row.tolist() == [387, 42, 623, 401, 45, 309, 99, 685]
    assert drawn.epoch.tolist() == [3, 19, 3, 3, 19, 3, 19, 3]


limited = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(
        st.integers(20, 3000), st.floats(1e-2, 10.0), st.one_of(st.none(), st.sampled_from([0.25, 0.3, 1, 2, 2.5]))
    ),
    min_size=1,
    max_size=5,
)


def limited_mixture(given: dict[str, tuple[int, float, float | None]]) -> Mixture:
    columns = [{name: row[k] for name, row in given.items()} for k in range(3)]
    return Mixture(3, *columns)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(limited)
def test_max_epochs_are_never_exceeded_and_used_up_where_the_order_goes_on(
    given: dict[str, tuple[int, float, float | None]],
) -> None:
    mix = limited_mixture(given)
    caps = [epoch_limit(given[name][0], given[name][2]) for name in mix.names]
    stop = mix.length if mix.length is not None else 8 * mix.block
    assert (mix.length is None) == (None in caps)
    assert mix.length is None or mix.length == sum(cap for cap in caps if cap is not None)
    drawn = mix.draws(0, min(stop, 8 * mix.block))
    for d, (name, cap) in enumerate(zip(mix.names, caps, strict=True)):
        mine = drawn.source == d
        size = given[name][0]
        seen = np.bincount(drawn.epoch[mine] * size + drawn.row[mine])
        assert seen.max(initial=0) <= 1  # in no epoch twice
        assert cap is None or mine.sum() <= cap
        assert cap is None or stop > 8 * mix.block or mix.length is None or mine.sum() == cap
    # the counts of every block are what it holds, and never go down; any position knows what came before it
    for block in range(min(stop, 8 * mix.block) // mix.block):
        held = np.bincount(drawn.source[block * mix.block : (block + 1) * mix.block], minlength=len(caps))
        before, after = mix.counts(block), mix.counts(block + 1)
        assert held.tolist() == [b - a for a, b in zip(before, after, strict=True)]
    for position in (0, 1, stop // 3, stop - 1):
        if position < len(drawn.source):
            assert mix.drawn(position) == np.bincount(drawn.source[:position], minlength=len(caps)).tolist()
    # the same by looking into the middle first
    middle = len(drawn.source) // 2
    again = limited_mixture(given).draws(middle, min(middle + 50, len(drawn.source)))
    assert np.array_equal(again.row, drawn.row[middle : middle + 50])


def test_what_an_ended_source_leaves_goes_to_the_others_by_weight() -> None:
    """1000 rows once at 50 %, then 4 : 1 between the others: 2 blocks' worth of draws, then none."""
    mix = Mixture(0, {"a": 1000, "b": 50, "c": 50}, {"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 1})
    drawn = mix.draws(0, 20 * BLOCK)
    assert (drawn.source == 0).sum() == 1000
    assert mix.counts(1) == [512, 410, 102]
    assert mix.counts(2) == [1000, 410 + 409 + 19, 102 + 103 + 5]  # 488 in the second block; the 24 missing go 4 : 1
    late = np.bincount(drawn.source[2 * BLOCK :], minlength=3)
    assert late.tolist()[0] == 0 and abs(late[1] - 0.8 * 18 * BLOCK) < 2
    assert Mixture(0, {"a": 1000}, {"a": 1}, {"a": None}).length is None
    with pytest.raises(ValueError, match="the order ends after 1000 positions; 1001 were asked for"):
        Mixture(0, {"a": 1000}, {"a": 1}, {"a": 1}).draws(990, 1001)


# ---------------------------------------------------------------------------------------------------- groups of shards


in_shards = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(2, 20), st.floats(0.1, 10.0)),
    min_size=1,
    max_size=3,
)


def sharded_mixture(given: dict[str, tuple[list[int], int, float]], seed: int = 0) -> Mixture:
    shards = {name: Shards(np.array(sizes), per_group) for name, (sizes, per_group, _) in given.items()}
    sizes = {name: sum(held) for name, (held, _, _) in given.items()}
    return Mixture(seed, sizes, {name: weight for name, (_, _, weight) in given.items()}, None, shards)


@settings(max_examples=20, deadline=None)
@given(in_shards)
def test_groups_lose_and_double_nothing_and_come_one_after_the_other(
    given: dict[str, tuple[list[int], int, float]],
) -> None:
    """Every whole epoch is a bijection, and of each at most `per_group` shards are begun and not ended at any draw."""
    mix = sharded_mixture(given)
    drawn = mix.draws(0, 2 * mix.block)
    for d, name in enumerate(mix.names):
        sizes, per_group, _ = given[name]
        shard_of = np.repeat(np.arange(len(sizes)), sizes)
        mine = drawn.source == d
        rows, epochs = drawn.row[mine], drawn.epoch[mine]
        for epoch in range(int(epochs.max()) + 1):
            seen = rows[epochs == epoch]
            assert len(set(seen.tolist())) == len(seen)
            if epoch < epochs.max():
                assert sorted(seen.tolist()) == list(range(sum(sizes)))
            shards = shard_of[seen]
            groups: list[set[int]] = [set()]
            for shard in shards.tolist():
                if shard not in groups[-1] and len(groups[-1]) == per_group:
                    groups.append(set())
                groups[-1].add(shard)
            assert sum(len(group) for group in groups) == len(set(shards.tolist()))  # a group never comes back
    # seeking: the same from the middle, by a mixture that has not seen what was before
    middle = mix.block - 7
    again = sharded_mixture(given).draws(middle, middle + 50)
    assert np.array_equal(again.row, drawn.row[middle : middle + 50])


def test_one_group_is_the_order_of_rows() -> None:
    """A source of no more shards than a group has the order it has without any: nothing changes for small sources."""
    plain = Mixture(1, {"a": 700, "b": 50}, {"a": 0.3, "b": 0.7})
    few = Mixture(
        1,
        {"a": 700, "b": 50},
        {"a": 0.3, "b": 0.7},
        None,
        {"a": Shards(np.full(7, 100), 7), "b": Shards(np.ones(50, dtype=np.int64), 99)},
    )
    for one, other in zip(plain.draws(0, 5000), few.draws(0, 5000), strict=True):
        assert np.array_equal(one, other)


def test_far_positions_of_many_shards_are_quick() -> None:
    """10^5 shards of 10^4 rows: position 10^12 costs one permutation of the shards, not of the rows."""
    sizes = np.full(100_000, 10_000)
    mix = Mixture(5, {"a": 10**9, "b": 1000}, {"a": 0.9, "b": 0.1}, None, {"a": Shards(sizes, 16)})
    begin = time.process_time()
    drawn = mix.draws(10**12, 10**12 + 8192)
    spent = time.process_time() - begin
    rows = drawn.row[drawn.source == 0]
    assert len(np.unique(rows // 10_000)) == 16 and len(np.unique(rows)) == len(rows)
    assert drawn.epoch[drawn.source == 0].min() == 900
    assert spent < 0.5  # measured 0.06 s


def test_groups_look_random() -> None:
    """Inside a group rows are no more in order than without groups, and two epochs are not alike."""
    mix = Mixture(0, {"a": 32_000}, {"a": 1.0}, None, {"a": Shards(np.full(320, 100), 16)})
    one, other = mix.draws(0, 32_000).row, mix.draws(32_000, 64_000).row
    first = one[:1600]
    # measured: neighbours 0.006, with the place 0.03, between epochs 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(np.arange(1600), first)[0, 1]) < 0.1
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_a_fixed_order_of_groups() -> None:
    """As `test_a_fixed_order`: part of the promise to resume."""
    shards = {"a": Shards(np.array([100, 300, 50, 250, 200, 100]), 2)}
    drawn = Mixture(1234, {"a": 1000, "b": 100}, {"a": 0.6, "b": 0.4}, None, shards).draws(5000, 5008)
    assert drawn.source.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert drawn.row.tolist() == [274, 42, 854, 185, 45, 300, 99, 282]
    assert drawn.epoch.tolist() == [3, 19, 3, 3, 19, 3, 19, 3]


@pytest.mark.parametrize("sizes", [[], [3, 0], [3, 4]])
def test_shards_must_hold_the_rows(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="the shards of 'a' do not hold its 3 rows"):
        Mixture(0, {"a": 3}, {"a": 1.0}, None, {"a": Shards(np.array(sizes, dtype=np.int64), 1)})


@pytest.mark.parametrize("given", [{}, {"a": (0, 1.0)}, {"a": (3, 0.0)}])
def test_impossible_mixtures(given: dict[str, tuple[int, float]]) -> None:
    with pytest.raises(ValueError, match="at least one source"):
        mixture(given)


def test_where_a_limit_of_epochs_ends() -> None:
    """One block; what is left of the source is spread over it."""
    mixture = Mixture(7, {"a": 700, "b": 5000, "c": 10}, {"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 2, "b": 1, "c": 0.5})
    ends = mixture.ends()
    assert ends == {"c": (0, 1024), "a": (2048, 3072), "b": (6144, 6405)}
    for name, (begin, end) in ends.items():
        d = mixture.names.index(name)
        limit = {"a": 1400, "b": 5000, "c": 5}[name]
        assert mixture.drawn(begin)[d] < limit == mixture.drawn(end)[d]
    assert Mixture(7, {"a": 700}, {"a": 1}).ends() == {}
