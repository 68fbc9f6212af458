"""Samples that are too long or have too many tiles: one rule, seen by the index and by the loader alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import IMAGE_TOKENS, TILE, make_recipe, turns, write_image, write_rows
from nvlm_train.batch import IGNORE_INDEX, SampleRef
from nvlm_train.data import chat, tiling
from nvlm_train.data.fit import FEWER_TILES, TRUNCATED, shorten
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.errors import DataError

torch.set_num_threads(1)


def test_shorten_by_hand() -> None:
    rendered = chat.Rendered(np.array([5, 6, 7, 8], np.int32), np.array([-100, 7, 8, -100], np.int32), (1,))
    cut = shorten(rendered, 3)
    assert (cut.input_ids.tolist(), cut.labels.tolist(), cut.tile_starts) == ([5, 6, 7], [-100, 7, -100], (1,))
    assert shorten(rendered, 4) is rendered
    assert rendered.labels.tolist() == [-100, 7, 8, -100]  # untouched


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(1, 60),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_the_shared_limit_keeps_within_the_budget_and_is_the_largest(
    sizes: list[tuple[int, int]], most: int, budget: int, thumbnail: bool
) -> None:
    def total(limit: int) -> int:
        return sum(tiling.num_tiles(w, h, limit, 448, thumbnail) for w, h in sizes)

    limit = tiling.shared_limit(sizes, most, budget, 448, thumbnail)
    if limit == 0:
        assert len(sizes) > budget
        return
    assert total(limit) <= budget
    assert all(total(more) > budget for more in range(limit + 1, most + 1))
    assert tiling.shared_limit(sizes, most, None, 448, thumbnail) == most


def plan_of(folder: Path, rows: list[Any], **changes: Any) -> DataPlan:
    mixture = {"s": {"path": str(write_rows(folder / "s.jsonl", rows))}}
    changes = {"data__max_bad_share": 1, "data__max_tokens_per_sample": 60, **changes}
    return open_data(make_recipe(folder, mixture, **changes), rank=0, world_size=1)


def whole_of(plan: DataPlan, tmp_path: Path, rows: list[Any]) -> DataPlan:
    """The same rows without a limit that matters."""
    folder = tmp_path / "whole"
    folder.mkdir()
    for image in tmp_path.glob("*.png"):
        (folder / image.name).write_bytes(image.read_bytes())
    return plan_of(folder, rows, data__max_tokens_per_sample=500, data__pack_tokens=500)


def test_truncated_text_is_a_prefix_with_consistent_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", TILE, TILE)
    rows = [
        {"messages": turns("what", "yes " * 200)},  # a long answer: cut in the middle
        {"messages": turns("what", "yes")},  # short: as it is
        {"messages": turns("what " * 200, "yes")},  # a long question: nothing to train on is left
        {"images": ["a.png"], "messages": turns("<image> what", "yes " * 200)},  # cut after the image
        {"messages": [*turns("what", "no " * 9), *turns("more", "yes " * 200)]},  # first answer whole
        {  # the image comes late: it would have to be cut
            "images": ["a.png"],
            "messages": [*turns("what", "yes " * 80), *turns("<image> what", "yes")],
        },
    ]
    plan = plan_of(tmp_path, rows, data__overlong="truncate_text")
    whole = whole_of(plan, tmp_path, rows)
    assert len(whole.indexes["s"].rows) == len(rows)
    index = plan.indexes["s"]
    assert index.rows["line"].tolist() == [1, 2, 4, 5]
    assert plan.dropped_at_index == {("s", "over-long"): 2}
    assert index.rows["lowered"].tolist() == [TRUNCATED, 0, TRUNCATED, TRUNCATED]
    assert plan.truncated == {"s": 3} and plan.fewer_tiles == {}
    messages = [bad.message for bad in index.bad]
    assert "nothing to train on would be left" in messages[0] and "its images alone end at token" in messages[1]
    for row, entry in enumerate(index.rows):
        loaded = plan.load(SampleRef("s", row, 0)).rendered
        full = whole.load(SampleRef("s", int(entry["line"]) - 1, 0)).rendered
        size = len(loaded.input_ids)
        assert size == entry["tokens"] <= 60
        assert (size == 60) == (entry["lowered"] == TRUNCATED)
        assert loaded.input_ids.tolist() == full.input_ids[:size].tolist()
        assert loaded.labels[:-1].tolist() == full.labels[: size - 1].tolist()
        assert loaded.labels[-1] == IGNORE_INDEX
        assert (loaded.labels != IGNORE_INDEX).sum() == entry["trained"] > 0
        assert loaded.tile_starts == full.tile_starts  # never an image


@pytest.mark.parametrize("policy", ["drop", "truncate_text", "fewer_tiles", "error"])
def test_what_each_policy_keeps(tmp_path: Path, policy: str) -> None:
    """One long text, one image of seven tiles with a short text, one short sample."""
    write_image(tmp_path / "wide.png", TILE * 3, TILE * 2)
    rows = [
        {"messages": turns("what", "yes " * 200)},
        {"images": ["wide.png"], "messages": turns("<image>", "yes")},
        {"messages": turns("what", "yes")},
    ]
    if policy == "error":
        with pytest.raises(DataError, match=r"2 of 3 samples are longer .* drop, truncate_text or fewer_tiles"):
            plan_of(tmp_path, rows, data__overlong=policy)
        return
    plan = plan_of(tmp_path, rows, data__overlong=policy)
    kept = dict(zip(plan.indexes["s"].rows["line"].tolist(), plan.indexes["s"].rows["lowered"].tolist(), strict=True))
    assert (
        kept
        == {
            "drop": {3: 0},
            "truncate_text": {1: TRUNCATED, 3: 0},
            "fewer_tiles": {2: FEWER_TILES, 3: 0},
        }[policy]
    )
    for row in range(len(kept)):
        plan.load(SampleRef("s", row, 0))


def test_tiles_are_shared_over_the_pages_of_a_document(tmp_path: Path) -> None:
    pages = [write_image(tmp_path / f"{k}.png", TILE * 2, TILE * 3, seed=k) for k in range(4)]
    rows = [{"images": pages[:count], "messages": turns("<image>" * count + "what", "yes")} for count in (1, 2, 3, 4)]
    plan = plan_of(
        tmp_path,
        rows,
        data__tiling={"max_tiles_per_sample": 10},
        data__max_tokens_per_sample=256,
        data__pack_tokens=256,
    )
    index = plan.indexes["s"]
    assert index.rows["max_tiles"].tolist() == [6, 5, 5, 1]  # a page: 7 tiles at 6, 3 at 5 (1 x 2, thumbnail)
    assert index.rows["tiles"].tolist() == [7, 6, 9, 4]
    assert index.rows["lowered"].tolist() == [0, 0, 0, 0]  # as asked for, not to fit
    for row in range(4):
        loaded = plan.load(SampleRef("s", row, 0))
        assert sum(len(t) for t in loaded.tiles) == index.rows["tiles"][row] <= 10
        assert (
            len(loaded.rendered.tile_starts) * IMAGE_TOKENS
            == (loaded.rendered.input_ids == plan.tokenizer.image_token).sum()
        )
    few = plan_of(tmp_path, rows, data__tiling={"max_tiles_per_sample": 3}, data__max_tokens_per_sample=256)
    assert few.dropped_at_index == {("s", "too many images"): 1}
    assert few.indexes["s"].bad[0].line == 4
