"""Windows: a step of packs is found anywhere, holds the same samples on any number of ranks, and a run ends exactly."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import make_recipe, write_image_rows, write_text_rows
from nvlm_train.batch import SampleRef
from nvlm_train.data import windows as windows_module
from nvlm_train.data.mixture import Mixture
from nvlm_train.data.plan import TOO_MANY_TILES, DataPlan, open_data
from nvlm_train.data.windows import (
    Column,
    RunLength,
    Windows,
    first_packs,
    locate,
    merge_stretches,
    open_table,
    resolve_steps,
    window_samples,
)
from nvlm_train.errors import DataError
from nvlm_train.recipe.schema import Recipe

CAPACITY = 500


def make_windows(
    sizes: dict[str, int],
    weights: dict[str, float] | None = None,
    max_epochs: dict[str, float | None] | None = None,
    tile_capacity: int | None = None,
    size: int | None = None,
) -> Windows:
    """Sources of random lengths; no file, no tokenizer."""
    mixture = Mixture(7, sizes, weights or {name: float(n) for name, n in sizes.items()}, max_epochs)
    columns = []
    for name, rows in zip(mixture.names, mixture.sizes, strict=True):
        draw = np.random.default_rng(len(name) + rows)
        tiles = draw.integers(0, 8, rows)
        columns.append(Column(tiles * 20 + draw.integers(1, 100, rows), tiles, np.arange(rows)))
    return Windows(mixture, columns, CAPACITY, tile_capacity, size or window_samples(sum(sizes.values())))


def packs_of(windows: Windows, number: int) -> list[list[tuple[int, int, int]]]:
    """The first packs of the run as (source, row, epoch) of their samples."""
    found: list[list[tuple[int, int, int]]] = []
    window = 0
    while len(found) < number and (windows.number is None or window < windows.number):
        planned = windows.plan(window)
        found += [
            [tuple(int(column[i]) for column in planned.draws) for i in held]
            for held in planned.packs  # type: ignore[misc]
        ]
        window += 1
    return found[:number]


# ------------------------------------------------------------------------------------------------------------- windows


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(1, 400), min_size=1, max_size=3),
    st.integers(0, 6),
    st.sampled_from([None, 7, 20]),
)
def test_a_window_packs_each_of_its_draws_once_within_both_capacities(
    sizes: dict[str, int], window: int, tile_capacity: int | None
) -> None:
    windows = make_windows(sizes, tile_capacity=tile_capacity)
    planned = windows.plan(window)
    assert sorted(i for held in planned.packs for i in held) == list(range(windows.size))
    for held in planned.packs:
        assert planned.tokens[held].sum() <= CAPACITY
        assert tile_capacity is None or planned.tiles[held].sum() <= tile_capacity
    assert windows.count(window) == (len(planned.packs), planned.tokens.sum())
    assert windows.count_tokens(window) == (0, planned.tokens.sum())
    again = make_windows(sizes, tile_capacity=tile_capacity).plan(window)  # whatever was asked for before
    assert again.packs == planned.packs


def test_windows_make_epochs_of_whole_windows() -> None:
    assert [window_samples(rows) for rows in (1, 5000, 8192, 8193, 20000)] == [1, 5000, 8192, 4097, 6667]
    windows = make_windows({"a": 500})
    for epoch in range(3):
        drawn = Counter(ref[:2] for pack in packs_of_window(windows, epoch) for ref in pack)
        assert len(drawn) == 500 and set(drawn.values()) == {1}


def packs_of_window(windows: Windows, window: int) -> list[list[tuple[int, int, int]]]:
    planned = windows.plan(window)
    return [[tuple(int(column[i]) for column in planned.draws) for i in held] for held in planned.packs]  # type: ignore[misc]


def test_the_order_of_packs_is_not_that_of_their_size() -> None:
    """Neighbours are no more alike than any two: the emptiest packs do not come together at the end."""
    windows = make_windows({"a": 5000}, size=5000)
    planned = windows.plan(0)
    tiles = np.array([planned.tiles[held].sum() for held in planned.packs])
    assert abs(np.corrcoef(tiles[:-1], tiles[1:])[0, 1]) < 0.15  # measured 0.03
    assert windows.plan(1).packs != planned.packs


# --------------------------------------------------------------------------------------------------------------- table


def test_the_table_grows_and_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, file = make_windows({"a": 300, "b": 200}), tmp_path / "windows" / "key.npy"
    counted: list[int] = []
    count = Windows.count

    def noted(self: Windows, window: int) -> tuple[int, int]:
        counted.append(window)
        return count(self, window)

    monkeypatch.setattr(Windows, "count", noted)
    table = open_table(windows, file, lambda table: max(0, 3 - len(table)), rank=0)
    assert [tuple(line) for line in table.tolist()] == [count(windows, w) for w in range(3)]
    longer = open_table(windows, file, lambda table: max(0, 5 - len(table)), rank=0)
    assert longer[:3].tolist() == table.tolist() and len(longer) == 5
    for rank in (0, 1):
        assert len(open_table(windows, file, lambda table: max(0, 4 - len(table)), rank=rank)) == 5
    assert counted == [0, 1, 2, 3, 4]
    file.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"key\.npy: the table of windows is damaged"):
        open_table(windows, file, lambda table: 0, rank=0)


def test_other_ranks_wait_and_name_a_rank_0_that_is_gone(tmp_path: Path) -> None:
    windows = make_windows({"a": 30})
    with pytest.raises(DataError, match=r"waited 0 s for rank 0 to count packs"):
        open_table(windows, tmp_path / "t.npy", lambda table: 1 - len(table), rank=1, timeout_s=0.2)


def test_many_processes_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "_WINDOWS_ALONE", 4)
    monkeypatch.setattr(windows_module.os, "sched_getaffinity", lambda pid: {0, 1})
    windows = make_windows({"a": 300, "b": 200})
    table = open_table(windows, tmp_path / "t.npy", lambda table: max(0, 9 - len(table)), rank=0)
    assert [tuple(line) for line in table.tolist()] == [windows.count(w) for w in range(9)]


def test_looking_up_a_pack() -> None:
    first = first_packs(np.array([[3, 0], [1, 0], [4, 0]]))
    assert first.tolist() == [0, 3, 4, 8]
    assert [locate(first, pack) for pack in (0, 2, 3, 4, 7, 8)] == [(0, 0), (0, 2), (1, 0), (2, 0), (2, 3), (3, 0)]


def test_a_billion_samples_are_sought_well_under_a_second() -> None:
    """A table of 122,071 windows (10^9 samples) and sources of 6 x 10^8 rows: the place of a step, and its draws."""
    table = np.stack([np.random.default_rng(0).integers(595, 605, 122_071), np.zeros(122_071, dtype=np.int64)], axis=1)
    mixture = Mixture(7, {"a": 6 * 10**8, "b": 4 * 10**8}, {"a": 0.6, "b": 0.4}, {"a": 1, "b": None})
    begin = time.process_time()
    first = first_packs(table)
    window, offset = locate(first, 64 * 1_140_000)
    assert 0 <= first[window] <= 64 * 1_140_000 < first[window + 1] and offset >= 0
    drawn = mixture.draws(10**9 - 8192, 10**9)
    far = Mixture(7, {"a": 6000, "b": 400}, {"a": 0.6, "b": 0.4})
    windows = Windows(
        far,
        [Column(np.full(n, 100), np.zeros(n, dtype=np.int64), np.arange(n)) for n in far.sizes],
        CAPACITY, None, 6400,
    )  # fmt: skip
    assert len(windows.plan(10**9 // 6400).packs) == 6400 // 5
    spent = time.process_time() - begin
    assert drawn.epoch[drawn.source == 0].max() == 0 and len(drawn.row) == 8192
    assert spent < 0.5  # measured 0.04 s


# ------------------------------------------------------------------------------------------------------ length of a run


def steps_by_force(windows: Windows, enough: Callable[[int, int], bool], samples: int | None, packs: int | None) -> int:
    """The fewest steps whose samples or tokens are enough, by going through them one after the other."""
    held = tokens = 0
    if packs is not None:
        whole = packs_of(windows, 700)
        column = [(c.tokens, c.chosen) for c in windows.columns]
        for step in range(1, 3000):
            for pack in whole[(step - 1) * packs : step * packs]:
                held += len(pack)
                tokens += sum(int(column[d][0][row]) for d, row, _ in pack)
            if enough(held, tokens):
                return step
    assert samples is not None
    for step in range(1, 3000):
        drawn = windows.mixture.draws((step - 1) * samples, step * samples)
        held, tokens = held + samples, tokens + int(windows.lengths(drawn)[0].sum())
        if enough(held, tokens):
            return step
    raise AssertionError


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 1500), st.booleans(), st.integers(1, 400), st.sampled_from([90, 333, 1000]))
def test_a_run_is_the_fewest_steps_that_hold_its_length(
    unit: int, target: int, by_packs: bool, size: int, window: int
) -> None:
    import tempfile

    windows = make_windows({"a": size, "b": 100}, {"a": 0.7, "b": 0.3}, size=window)
    samples, packs = (None, unit) if by_packs else (unit, None)
    with tempfile.TemporaryDirectory() as folder:

        def steps(**given: Any) -> int:
            keys: dict[str, Any] = dict(max_steps=None, max_samples=None, max_tokens=None, num_epochs=None)
            length = RunLength.of(**{**keys, **given}, rows=sum(windows.mixture.sizes))
            name = f"{'tokens' if samples else 'packs'}.npy"
            found = resolve_steps(windows, length, samples=samples, packs=packs, file=Path(folder) / name, rank=0)
            assert packs is None or found.table[:, 0].sum() >= found.number * packs
            return found.number

        assert steps(max_steps=target % 50 + 1) == target % 50 + 1
        assert steps(max_samples=target) == steps_by_force(windows, lambda s, t: s >= target, samples, packs)
        assert steps(max_tokens=60 * target) == steps_by_force(windows, lambda s, t: t >= 60 * target, samples, packs)
        epoch = -(-5 * (size + 100) // 2)
        assert steps(num_epochs=2.5) == steps_by_force(windows, lambda s, t: s >= epoch, samples, packs)


@pytest.mark.parametrize("by_packs", [False, True])
def test_an_order_that_ends_gives_its_whole_steps_and_no_more(tmp_path: Path, by_packs: bool) -> None:
    """500 samples once, 200 twice: 900 positions; an epoch of 700 is as it is, two epochs are 900."""
    windows = make_windows({"a": 500, "b": 200}, {"a": 1.0, "b": 1.0}, {"a": 1, "b": 2}, size=350)
    assert (windows.mixture.length, windows.number) == (900, 3)
    total = sum(windows.count(w)[0] for w in range(3))
    samples, packs = (None, 7) if by_packs else (40, None)
    whole = total // 7 if by_packs else 900 // 40

    def steps(length: RunLength) -> int:
        return resolve_steps(
            windows, length, samples=samples, packs=packs, file=tmp_path / f"{by_packs}.npy", rank=0
        ).number

    assert steps(RunLength(samples=1400, epochs=True, text="num_epochs 2")) == whole
    assert steps(RunLength(steps=whole, text="max_steps")) == whole
    # data that is left out is missing at the end; only what lies before the end counts
    file = tmp_path / f"{by_packs}.npy"
    two_epochs = RunLength(samples=1400, epochs=True, text="num_epochs 2")
    skips = ((3, 5), (whole, whole + 10))
    assert resolve_steps(
        windows, two_epochs, samples=samples, packs=packs, file=file, rank=0, skipped=skips
    ).number == (whole - 4)
    too_long = (RunLength(steps=whole + 1), RunLength(samples=901), RunLength(samples=10**6), RunLength(tokens=10**9))
    for length in too_long:
        if length.tokens and not by_packs:
            continue  # needs a table of tokens, in a file of its own
        with pytest.raises(DataError, match=f"end the order after 900 samples, which make {whole} whole steps"):
            steps(length)


# ----------------------------------------------------------------------------------------------- plans of whole recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windows")
    write_image_rows(folder / "images.jsonl", 40)
    write_text_rows(folder / "text.jsonl", 70)
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    mixture = {
        "images": {"path": str(folder / "images.jsonl"), "weight": 0.6},
        "text": {"path": str(folder / "text.jsonl"), "weight": 0.4},
    }
    return make_recipe(folder, mixture, **changes)


PACKS: dict[str, Any] = {"global_batch": {"packs": 9}, "max_steps": 24}


def digest(plans: list[DataPlan], step: int) -> str:
    """What all ranks together train on in a step: the samples of every pack, and in which micro-step it runs."""
    packs = []
    for plan in plans:
        dealt = plan.deal_step(step)
        packs += [p.samples for ranks in dealt for p in ranks[plan.rank] if not p.is_null]
    return hashlib.sha256(repr(sorted(packs)).encode()).hexdigest()


def plans_of(recipe: Recipe, world_size: int) -> list[DataPlan]:
    return [open_data(recipe, rank=rank, world_size=world_size) for rank in range(world_size)]


@pytest.mark.parametrize("changes", [PACKS, {"max_steps": 24}], ids=["packs", "samples"])
def test_same_global_batches_on_any_ranks_from_any_start_through_any_kills(folder: Path, changes: Any) -> None:
    recipe = recipe_of(folder, **changes)
    alone = open_data(recipe, rank=0, world_size=1)
    whole = [digest([alone], step) for step in range(24)]
    assert len(set(whole)) == 24
    for world_size in (1, 2, 3, 4):
        for start in (0, 1, 7, 23):  # a plan that has never seen the steps before
            plans = plans_of(recipe, world_size)
            assert [digest(plans, step) for step in range(start, 24)] == whole[start:]
            assert len({json.dumps(plan.state(start)) for plan in plans}) == 1
    draw = np.random.default_rng(0)
    for _ in range(6):  # two or three kills at random steps, each time on with another number of ranks
        step, found = 0, []
        states = []
        for end in [*sorted(draw.integers(1, 24, 2).tolist()), 24]:
            plans = plans_of(recipe, int(draw.integers(1, 5)))
            assert not states or states[-1] == plans[-1].state(step)  # what a checkpoint kept is where it goes on
            found += [digest(plans, s) for s in range(step, end)]
            step = end
            states.append(plans[0].state(step))
        assert found == whole
    assert all(len(json.dumps(alone.state(step))) < 1000 for step in (0, 24))


def test_steps_of_packs_are_exact_span_windows_and_lose_nothing(folder: Path) -> None:
    recipe = recipe_of(folder, **PACKS)
    plan = open_data(recipe, rank=0, world_size=3)
    assert plan.windows.size == 110  # 40 + 70: a window an epoch
    spans = 0
    refs: list[SampleRef] = []
    for step in range(24):
        packs = plan.plan_step(step)
        assert len(packs) == 9 and [p.cost for p in packs] == sorted((p.cost for p in packs), reverse=True)
        begin, end = plan.state(step), plan.state(step + 1)
        spans += begin["window"] != end["window"] and end["pack_in_window"] > 0
        refs += [ref for p in packs for ref in p.samples]
        assert sorted(plan.draws(step)) == sorted(ref for p in packs for ref in p.samples)
    assert spans > 0  # some steps begin in one window and end in the next
    window = plan.state(24)["window"]
    drawn = plan.mixture.draws(0, window * 110)
    names = plan.mixture.names
    whole = {
        SampleRef(names[d], int(plan.train_rows[names[d]][row]), int(epoch))
        for d, row, epoch in zip(*(column.tolist() for column in drawn), strict=True)
    }
    assert len(set(refs)) == len(refs) and whole <= set(refs)
    assert abs(plan.num_samples - len(refs)) < 110


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_epochs_of_packs_give_every_sample_its_times(folder: Path, world_size: int) -> None:
    """One source: after num_epochs 2 each sample came twice; the last step may hold some of the third."""
    mixture = {"text": {"path": str(folder / "text.jsonl")}}
    recipe = make_recipe(folder, mixture, global_batch={"packs": 4}, max_steps=None, num_epochs=2)
    plan = open_data(recipe, rank=0, world_size=world_size)
    times = Counter(ref[:2] for step in range(plan.num_steps) for ref in plan.draws(step) if ref.epoch < 2)
    assert len(times) == 70 and set(times.values()) == {2}
    before = Counter(ref[:2] for step in range(plan.num_steps - 1) for ref in plan.draws(step))
    assert sum(before.values()) < 140


def test_a_run_of_epochs_and_of_samples(folder: Path) -> None:
    for length, steps in (({"num_epochs": 2}, 14), ({"max_samples": 33}, 3), ({"max_steps": 5}, 5)):
        plan = open_data(recipe_of(folder, **{"max_steps": None, **length}), rank=0, world_size=1)
        assert (plan.num_steps, plan.num_samples) == (steps, 16 * steps)  # 220 / 16 rounded up, 33 / 16 rounded up
    plan = open_data(recipe_of(folder, max_steps=None, max_tokens=5000), rank=0, world_size=1)
    tokens = [sum(p.tokens for p in plan.plan_step(step)) for step in range(plan.num_steps)]
    assert sum(tokens) >= 5000 > sum(tokens[:-1])


def test_max_epochs_ends_a_source_and_then_the_order(folder: Path) -> None:
    recipe = recipe_of(folder, max_steps=None, num_epochs=20, data__mixture__images__max_epochs=1.5)
    plan = open_data(recipe, rank=0, world_size=1)
    refs = [ref for step in range(plan.num_steps) for ref in plan.draws(step)]
    assert Counter(ref.source for ref in refs)["images"] == 60
    both = recipe_of(folder, data__mixture__images__max_epochs=1, data__mixture__text__max_epochs=1)
    with pytest.raises(DataError, match=r"max_steps 8 needs 8 steps, .* after 110 samples, which make 6 whole steps"):
        open_data(both, rank=0, world_size=1)


def test_weights_of_tokens_give_shares_of_tokens(folder: Path) -> None:
    recipe = recipe_of(folder, data__weight_unit="tokens", max_steps=400)
    plan = open_data(recipe, rank=0, world_size=1)
    drawn = plan.mixture.draws(0, 50 * plan.mixture.block)
    tokens, _ = plan.windows.lengths(drawn)
    share = tokens[drawn.source == plan.mixture.names.index("images")].sum() / tokens.sum()
    assert share == pytest.approx(0.6, abs=0.002)  # whole epochs would be exact; measured 0.0001
    assert isinstance(plan.mixture.shares[0], Fraction)
    assert plan.fingerprint != open_data(recipe_of(folder, max_steps=400), rank=0, world_size=1).fingerprint


def test_more_tiles_than_a_pack_may_hold_are_dropped_and_counted(folder: Path) -> None:
    recipe = recipe_of(folder, data__pack_tiles=7, data__overlong="drop", **PACKS)
    plan = open_data(recipe, rank=0, world_size=1)
    tiles = plan.indexes["images"].rows["tiles"]
    assert plan.dropped_at_index["images", TOO_MANY_TILES] == int((tiles > 7).sum()) > 0
    assert all(p.tiles <= 7 for step in range(24) for p in plan.plan_step(step))
    with pytest.raises(DataError, match=r"have more tiles than data\.pack_tiles 7; raise it to"):
        open_data(recipe_of(folder, data__pack_tiles=7, data__overlong="error"), rank=0, world_size=1)


def test_a_longer_run_goes_on_in_the_same_order(folder: Path) -> None:
    """--accept max_steps: what was trained before is what the longer run begins with."""
    short, long = (open_data(recipe_of(folder, **{**PACKS, "max_steps": n}), rank=0, world_size=2) for n in (10, 40))
    assert short.fingerprint == long.fingerprint and short.state(10) == long.state(10)
    assert [short.draws(step) for step in range(10)] == [long.draws(step) for step in range(10)]


@pytest.mark.parametrize("unit", [{}, {"global_batch": {"packs": 9}}])
def test_steps_whose_data_is_left_out_are_found_as_all_others(folder: Path, unit: dict[str, Any]) -> None:
    """A pure mapping: step k is the k-th data step that is not skipped; the run takes as many steps."""
    recipe = recipe_of(folder, **{**PACKS, "max_steps": 20, **unit}) if unit else recipe_of(folder, max_steps=20)
    plan = open_data(recipe, rank=0, world_size=2)
    skipped = merge_stretches([(15, 16), (4, 5), (6, 9)])
    assert skipped == ((4, 9), (15, 16))
    past = open_data(recipe, rank=0, world_size=2, skipped=skipped)
    assert past.num_steps == plan.num_steps == 20 and past.fingerprint == plan.fingerprint
    longer = open_data(recipe.model_copy(update={"max_steps": 40}), rank=0, world_size=2)
    expected = [0, 1, 2, *range(9, 14), *range(16, 28)]
    assert [past.steps.data_step(step) for step in range(20)] == expected
    for step, data in enumerate(expected):
        assert past.plan_step(step) == longer.plan_step(data) and past.draws(step) == longer.draws(data)
    state, there = past.state(5), longer.state(11)
    assert (state["data_step"], state["skip_steps"]) == (11, [[4, 9], [15, 16]])
    assert {k: v for k, v in state.items() if k not in ("data_step", "skip_steps")} == {**there, "step": 5}
    assert past.state(3, ()) == plan.state(3)


def test_predictions(folder: Path) -> None:
    plan = open_data(recipe_of(folder, **PACKS), rank=0, world_size=2)
    found = plan.predict(24)
    assert found.steps == 24 and found.packs_per_step == 9 and found.null_share == pytest.approx(0.1)
    assert 0.5 < found.utilisation < 0.95 and 0.8 < found.efficiency <= 1  # 5 turns of 2 ranks for 9 packs
    assert found.balance.tokens > 1 and plan.balance(3) == plan.balance(3)
    assert plan.predict(100).steps == 24
    even = open_data(recipe_of(folder, **{**PACKS, "global_batch": {"packs": 8}}), rank=0, world_size=2).predict(24)
    assert even.null_share == 0 and even.utilisation > found.utilisation
