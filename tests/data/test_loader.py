"""From a recipe to batches: the same stream for every number of ranks and threads, holes instead of replacements."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corpus import IMAGE_TOKENS, TILE, make_recipe, turns, write_image, write_image_rows, write_rows, write_text_rows
from nvlm_train.batch import IGNORE_INDEX, Batch, SampleRef
from nvlm_train.data import assembly, chat, loader, tiling
from nvlm_train.data import plan as plan_module
from nvlm_train.data.assembly import Builder, null_batch
from nvlm_train.data.images import BadSample, open_image
from nvlm_train.data.loader import StepData, StepLoader, validation_batches
from nvlm_train.data.plan import DataPlan, open_data
from nvlm_train.data.sources import JsonlSource
from nvlm_train.data.sources import rows as rows_module
from nvlm_train.errors import DataError
from nvlm_train.recipe.schema import Recipe

torch.set_num_threads(1)
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_image_rows(folder / "images.jsonl", 40)
    write_text_rows(folder / "text.jsonl", 70)
    write_text_rows(folder / "other.jsonl", 25, seed=9)
    return folder


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    mixture = {
        "images": {"path": str(folder / "images.jsonl"), "weight": 0.6},
        "text": {"path": str(folder / "text.jsonl"), "weight": 0.4},
    }
    return make_recipe(folder, mixture, **changes)


def steps_of(plan: DataPlan, start: int = 0, end: int = STEPS) -> list[StepData]:
    with StepLoader(plan, start_step=start, end_step=end) as steps:
        return list(steps)


def segments(batch: Batch) -> dict[SampleRef, tuple[bytes, ...]]:
    """What each sample of a batch looks like to the model, by draw; checks the batch's own bookkeeping on the way."""
    width = batch.input_ids.shape[1]
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.input_ids.numel()
    assert batch.max_seqlen == max(np.diff(bounds))
    assert all(b in bounds for b in range(0, bounds[-1] + 1, width))  # no segment crosses a row
    flat = [t.flatten() for t in (batch.input_ids, batch.labels, batch.position_ids, batch.image_slots)]
    found: dict[SampleRef, tuple[bytes, ...]] = {}
    samples = iter(batch.samples)
    slots: list[int] = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        ids, labels, positions, image_slots = (t[begin:end] for t in flat)
        assert positions.tolist() == list(range(end - begin))
        if (labels == IGNORE_INDEX).all():  # padding, or a null pack
            assert len(set(ids.tolist())) == 1
            assert (image_slots == -1).all()
            continue
        mine = image_slots[image_slots >= 0].tolist()
        slots += mine
        tiles = batch.tiles[mine[0] // IMAGE_TOKENS : mine[-1] // IMAGE_TOKENS + 1] if mine else batch.tiles[:0]
        found[next(samples)] = (ids.numpy().tobytes(), labels.numpy().tobytes(), tiles.numpy().tobytes())
    assert next(samples, None) is None
    assert batch.tiles.dtype == torch.uint8 and batch.tiles.shape[1:] == (3, TILE, TILE)
    assert slots == list(range(len(batch.tiles) * IMAGE_TOKENS))
    assert batch.num_trained_tokens == int((batch.labels != IGNORE_INDEX).sum())
    return found


def global_stream(recipe: Recipe, world_size: int, start: int = 0, end: int = STEPS) -> list[str]:
    """For every step a digest of what all ranks together train on, contents and packs."""
    ranks = [steps_of(open_data(recipe, rank=rank, world_size=world_size), start, end) for rank in range(world_size)]
    digests = []
    for datas in zip(*ranks, strict=True):
        assert len({len(data.micro_batches) for data in datas}) == 1  # the same number of micro-steps everywhere
        for batches in zip(*(data.micro_batches for data in datas), strict=True):
            chunks = -(-max(len(batch.tiles) for batch in batches) // recipe.vision_tiles_per_chunk)
            assert {batch.num_tile_chunks for batch in batches} == {chunks}
        contents: dict[SampleRef, tuple[bytes, ...]] = {}
        packs = []
        for data in datas:
            for batch in data.micro_batches:
                held = segments(batch)
                assert not held.keys() & contents.keys()
                contents.update(held)
                if recipe.micro_batch_size == 1 and held:
                    packs.append(tuple(held))
        digests.append(hashlib.sha256(repr((sorted(contents.items()), sorted(packs))).encode()).hexdigest())
    return digests


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[str]:
    return global_stream(recipe_of(folder, data__num_threads=1), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_same_stream_for_ranks_and_threads(
    folder: Path, reference: list[str], world_size: int, num_threads: int
) -> None:
    assert global_stream(recipe_of(folder, data__num_threads=num_threads), world_size) == reference
    assert len(set(reference)) == STEPS


@pytest.mark.parametrize("start", [1, 4, 5])
def test_start_at_any_step(folder: Path, reference: list[str], start: int) -> None:
    recipe = recipe_of(folder, data__num_threads=4, data__prefetch_steps=5)
    assert global_stream(recipe, 2, start) == reference[start:]


def test_killed_at_random_steps_it_goes_on_with_other_ranks_and_threads(folder: Path, reference: list[str]) -> None:
    """Two kills at random steps, each time on with other ranks and threads, and what was prepared ahead is lost."""
    draw = np.random.default_rng(11)
    for _ in range(2):
        found: list[str] = []
        for end in [*sorted(draw.integers(1, STEPS, 2).tolist()), STEPS]:
            threads, world_size = int(draw.choice([0, 1, 4])), int(draw.integers(1, 5))
            recipe = recipe_of(folder, data__num_threads=threads, data__prefetch_steps=3)
            lost = StepLoader(open_data(recipe, rank=0, world_size=world_size), start_step=len(found), end_step=STEPS)
            next(lost)
            lost.close()
            found += global_stream(recipe, world_size, len(found), end)
        assert found == reference


def test_batch_stream_of_a_rank_does_not_depend_on_threads(folder: Path) -> None:
    """The very batches, in order, bit for bit."""
    streams = []
    for threads in (1, 4):
        plan = open_data(recipe_of(folder, data__num_threads=threads), rank=1, world_size=2)
        batches = [batch for data in steps_of(plan) for batch in data.micro_batches]
        streams.append(
            [(b.samples, b.input_ids.tolist(), b.cu_seqlens.tolist(), b.tiles.numpy().tobytes()) for b in batches]
        )
    assert streams[0] == streams[1]


@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("template", ["nvlm_qwen2", "hf_nvlm"])
def test_packed_streams_equal_rendered_samples(folder: Path, micro_batch_size: int, template: str) -> None:
    """Every sample in a batch is exactly what rendering it alone gives: tokens, labels, tiles; none is missing."""
    recipe = recipe_of(folder, micro_batch_size=micro_batch_size, tokenizer__template=template)
    plan = open_data(recipe, rank=0, world_size=1)
    sources = {name: JsonlSource(name, source) for name, source in recipe.data.mixture.items()}
    for data in steps_of(plan, 0, 3):
        contents = {ref: held for batch in data.micro_batches for ref, held in segments(batch).items()}
        assert sorted(contents) == sorted(plan.draws(data.step))
        assert len(contents) == 16 == data.samples
        for ref, (ids, labels, tiles) in contents.items():
            row = plan.indexes[ref.source].rows[ref.row]
            source = sources[ref.source]
            sample = source.sample(row)
            limit = int(row["max_tiles"])  # lower than 6 where the sample would be over-long
            cut = [tiling.cut(open_image(i.read()), limit, TILE, True) for i in sample.images]
            alone = chat.render(
                sample.messages, [len(c) for c in cut], plan.tokenizer, template, recipe.data.tiling, IMAGE_TOKENS, None
            )
            assert ids == alone.input_ids.astype(np.int64).tobytes()
            assert labels == alone.labels.astype(np.int64).tobytes()
            assert tiles == b"".join(c.tobytes() for c in cut)
        assert data.trained_tokens == sum(batch.num_trained_tokens for batch in data.micro_batches)
        assert data.tokens == sum(len(ids) // 8 for ids, _, _ in contents.values())
        assert data.tiles == sum(len(batch.tiles) for batch in data.micro_batches)
        assert data.samples_by_source == Counter(ref.source for ref in contents)
        assert sum(data.tokens_by_source.values()) == data.trained_tokens
        assert all(batch.input_ids.shape[1] <= recipe.data.pack_tokens for batch in data.micro_batches)
        assert all(batch.input_ids.shape[0] <= micro_batch_size for batch in data.micro_batches)


def test_every_sample_once_per_epoch(folder: Path) -> None:
    """Over 20 steps of 16 samples each source goes through its rows again and again, one epoch after the other."""
    plan = open_data(recipe_of(folder), rank=0, world_size=1)
    refs = [ref for step in range(20) for ref in plan.draws(step)]
    for name, size in (("images", 40), ("text", 70)):
        mine = [ref for ref in refs if ref.source == name]
        assert len(mine) > size
        for begin in range(0, len(mine), size):
            epoch = mine[begin : begin + size]
            assert {ref.epoch for ref in epoch} == {begin // size}
            assert len({ref.row for ref in epoch}) == len(epoch)


def test_null_batches_fill_up(folder: Path) -> None:
    """More ranks than packs: some ranks train one pad token, and still make every micro-step."""
    recipe = recipe_of(folder, global_batch__samples=2)
    plans = [open_data(recipe, rank=rank, world_size=4) for rank in range(4)]
    batches = [steps_of(plan, 0, 1)[0].micro_batches for plan in plans]
    assert {len(held) for held in batches} == {1}
    nulls = [held[0] for held in batches if not held[0].samples]
    assert nulls
    for batch in nulls:
        assert batch.input_ids.tolist() == [[plans[0].tokenizer.pad]]
        assert batch.labels.tolist() == [[IGNORE_INDEX]]
        assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.num_trained_tokens) == ([0, 1], 1, 0)
        assert batch.tiles.shape == (0, 3, TILE, TILE)
        assert batch.image_slots.tolist() == [[-1]]
        assert batch.num_tile_chunks == batches[0][0].num_tile_chunks
    assert torch.equal(null_batch(plans[0]).input_ids, nulls[0].input_ids)


def test_padding_is_a_segment_of_its_own(folder: Path) -> None:
    plan = open_data(recipe_of(folder, micro_batch_size=4), rank=0, world_size=1)
    batch = steps_of(plan, 0, 1)[0].micro_batches[0]
    assert batch.input_ids.shape[0] > 1
    padded = 0
    for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.input_ids.flatten()[begin:end]
        if ids[0] == plan.tokenizer.pad:
            padded += end - begin
            assert (ids == plan.tokenizer.pad).all()
            assert (batch.labels.flatten()[begin:end] == IGNORE_INDEX).all()
    assert padded == int((batch.input_ids == plan.tokenizer.pad).sum()) > 0


# ------------------------------------------------------------------------------------------------------- bad samples


def spoil(folder: Path, count: int) -> list[str]:
    """Cuts the files of the first `count` images short; their headers stay."""
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
    names = [row["images"][-1] for row in rows[:count]]
    for name in names:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return names


def test_a_bad_image_leaves_a_hole_and_moves_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Images spoilt after indexing (as between two attempts): the others stay in their packs, steps and places."""
    write_image_rows(tmp_path / "images.jsonl", 40)
    write_text_rows(tmp_path / "text.jsonl", 70)
    recipe = recipe_of(tmp_path, data__max_bad_share=0.5)
    before = steps_of(open_data(recipe, rank=0, world_size=1))
    names = spoil(tmp_path, 3)
    plan = open_data(recipe, rank=0, world_size=1)
    assert plan.dropped_at_index == {}
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_WARNINGS_PER_SOURCE", 2)
        after = steps_of(plan)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("dropped ")]
    assert len(told) == 2 and "only written" not in told[0]
    assert told[1].endswith(f"; more of source 'images' are only written to {tmp_path / 'run' / 'bad_samples.jsonl'}")
    holes = 0
    for old, new in zip(before, after, strict=True):
        assert len(old.micro_batches) == len(new.micro_batches)
        for one, other in zip(old.micro_batches, new.micro_batches, strict=True):
            whole, left = segments(one), segments(other)
            gone = whole.keys() - left.keys()
            assert all(ref.source == "images" and ref.row < 3 for ref in gone)
            assert left == {ref: held for ref, held in whole.items() if ref not in gone}
            assert other.num_tile_chunks == one.num_tile_chunks
            holes += len(gone)
        lost = old.samples - new.samples
        assert new.bad == ({("images", "unreadable image"): lost} if lost else {})
    assert holes >= 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == holes
    first = next(line for line in lines if line["line"] == 1)
    assert first["file"] == str(tmp_path / "images.jsonl")
    assert (first["source"], first["reason"]) == ("images", "unreadable image")
    assert names[0] in first["message"]


@pytest.mark.parametrize("num_threads", [1, 4])
def test_too_many_bad_images_stop_the_run(tmp_path: Path, num_threads: int) -> None:
    """At the same step whatever the threads; the message names share, file, line and cause."""
    write_image_rows(tmp_path / "images.jsonl", 40)
    write_text_rows(tmp_path / "text.jsonl", 70)
    recipe = recipe_of(tmp_path, data__max_bad_share=0.05, data__num_threads=num_threads)
    plan = open_data(recipe, rank=0, world_size=1)
    spoil(tmp_path, 3)  # 3 of 40 rows > 5 %
    done = []
    with StepLoader(plan, start_step=0, end_step=20) as steps, pytest.raises(DataError) as error:
        done = [data.step for data in steps]
    text = str(error.value)
    assert not done  # never finished
    assert "source 'images': 3 of " in text
    assert "more than data.max_bad_share 0.05 allows" in text
    assert "images.jsonl:" in text
    assert "cannot be" in text
    assert len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) >= 3
    with pytest.raises(StopIteration):
        next(steps)


def test_one_bad_image_of_many_does_not_stop_it(tmp_path: Path) -> None:
    """1 of 120 rows at 1 %: 1 <= 0.01 * 120."""
    write_image_rows(tmp_path / "images.jsonl", 120)
    recipe = make_recipe(tmp_path, {"images": {"path": str(tmp_path / "images.jsonl")}})
    plan = open_data(recipe, rank=0, world_size=1)
    spoil(tmp_path, 1)
    datas = steps_of(plan, 0, 16)
    assert sum(sum(data.bad.values()) for data in datas) >= 1  # met, possibly in two epochs, and counted as one row
    with pytest.raises(DataError, match="max_bad_share"):
        steps_of(open_data(recipe_of_share(recipe, 0.0), rank=0, world_size=1), 0, 16)


def recipe_of_share(recipe: Recipe, share: float) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_share": share})})


def test_a_source_that_is_all_bad_stops_early(tmp_path: Path) -> None:
    """2000 rows whose one image is broken: 1 % would allow 10, the first 8 are enough."""
    write_image(tmp_path / "a.png", 8, 8)
    rows = [{"messages": turns(str(k), "yes"), "images": ["a.png"]} for k in range(2000)]
    write_rows(tmp_path / "images.jsonl", rows)
    recipe = make_recipe(tmp_path, {"images": {"path": str(tmp_path / "images.jsonl")}}, global_batch__samples=4)
    plan = open_data(recipe, rank=0, world_size=1)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    steps = StepLoader(plan, start_step=0, end_step=100)
    assert next(steps).samples == 0  # a step of holes: null rows
    with pytest.raises(DataError, match="8 of 8 samples seen cannot be used"):
        next(steps)


def test_files_changed_after_indexing_are_bad_samples(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 8, 8)
    rows = [{"messages": turns(f"{k} what", "yes"), "images": ["a.png"] if k == 3 else []} for k in range(16)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    recipe = make_recipe(tmp_path, {"s": {"path": str(path)}}, data__max_bad_share=1)
    plan = open_data(recipe, rank=0, world_size=1)
    write_image(tmp_path / "a.png", 40, 8)
    path.write_bytes(path.read_bytes().replace(b"5 what", b"6 what"))
    data = steps_of(plan, 0, 1)[0]
    assert data.bad == {("s", "changed image"): 1, ("s", "changed file"): 2}  # rows 5 and 15
    assert data.samples == 13


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_source_that_vanishes_in_training_stops_the_run_with_the_cause(tmp_path: Path, how: str) -> None:
    path = write_text_rows(tmp_path / "a.jsonl", 60)
    plan = open_data(make_recipe(tmp_path, {"s": {"path": str(path)}}, data__num_threads=1), rank=0, world_size=1)
    with StepLoader(plan, start_step=0, end_step=8) as steps:
        assert next(steps).samples == 16
        if how == "removed":
            plan.sources["s"].close()  # an open file can still be read after it was removed
            path.unlink()
        else:
            path.write_bytes(b"")
        with pytest.raises(
            DataError, match=r"of .* samples seen cannot be used.*a\.jsonl:\d+: .*(read any more|changed)"
        ):
            list(steps)


# ------------------------------------------------------------------------------------------------------- validation


def validated(folder: Path, **changes: Any) -> Recipe:
    return recipe_of(
        folder,
        validation={"sources": {"other": {"path": str(folder / "other.jsonl")}}, "held_out_share": 0.2, **changes},
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_validation_packs_are_the_same_for_every_world_size(folder: Path, micro_batch_size: int) -> None:
    recipe = validated(folder)
    recipe = recipe.model_copy(update={"micro_batch_size": micro_batch_size})
    for name in ("other", "images", "text"):
        sets = []
        for world_size in (1, 2, 3):
            ranks = [
                validation_batches(open_data(recipe, rank=rank, world_size=world_size), name)
                for rank in range(world_size)
            ]
            assert len({len(batches) for batches in ranks}) == 1
            contents = [item for batches in ranks for batch in batches for item in segments(batch).items()]
            assert len(contents) == len(dict(contents))
            sets.append(sorted(contents))
        assert sets[0] == sets[1] == sets[2]
    plan = open_data(recipe, rank=0, world_size=1)
    assert plan.validation_sources() == ["other", "images", "text"]
    assert len([ref for p in plan.plan_validation("other") for ref in p.samples]) == 25
    with pytest.raises(DataError, match="'nothing' is no validation source; there are other, images, text"):
        validation_batches(plan, "nothing")


def test_held_out_samples_are_never_trained(folder: Path, tmp_path: Path) -> None:
    plan = open_data(validated(folder), rank=0, world_size=1)
    trained = {ref[:2] for step in range(30) for ref in plan.draws(step)}
    for name, rows in (("images", 40), ("text", 70)):
        held = {ref[:2] for p in plan.plan_validation(name) for ref in p.samples}
        mine = {ref for ref in trained if ref[0] == name}
        assert held
        assert not held & mine
        assert held | mine == {(name, row) for row in range(rows)}
    # the choice goes with the sample, not with its line
    lines = (folder / "text.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_bytes(b"".join(reversed(lines)))
    validation = {"held_out_share": 0.2}
    moved = open_data(
        make_recipe(tmp_path, {"text": {"path": str(tmp_path / "text.jsonl")}}, validation=validation),
        rank=0,
        world_size=1,
    )
    assert sorted(69 - moved.held_out["text"]) == plan.held_out["text"].tolist()


def test_validation_takes_the_first_samples(folder: Path) -> None:
    plan = open_data(validated(folder, max_samples=4), rank=0, world_size=1)
    assert sorted(ref.row for p in plan.plan_validation("other") for ref in p.samples) == [0, 1, 2, 3]
    held = plan.held_out["text"][:4].tolist()
    assert sorted(ref.row for p in plan.plan_validation("text") for ref in p.samples) == held


def test_without_validation_nothing_is_held_out(folder: Path) -> None:
    plan = open_data(recipe_of(folder), rank=0, world_size=1)
    assert plan.validation_sources() == []
    assert len(plan.train_rows["text"]) == 70


def test_a_share_that_leaves_nothing(tmp_path: Path) -> None:
    path = write_text_rows(tmp_path / "a.jsonl", 1)
    recipe = make_recipe(tmp_path, {"s": {"path": str(path)}}, validation={"held_out_share": 0.9999999})
    with pytest.raises(DataError, match="leaves none of its 1 samples to train on"):
        open_data(recipe, rank=0, world_size=1)


def test_a_share_that_holds_nothing_out(tmp_path: Path) -> None:
    """Otherwise the first validation, hours later, would find nothing under that name."""
    sources = {name: {"path": str(write_text_rows(tmp_path / f"{name}.jsonl", n))} for name, n in (("a", 9), ("b", 60))}
    message = r"validation.best: source 'a' has no held-out sample: validation.held_out_share 0.05 takes none of its 9"
    validation: dict[str, Any] = {"held_out_share": 0.05, "best": "a"}
    with pytest.raises(DataError, match=message + r" samples. Raise the share \(validation.held_out_share=0.5 takes"):
        open_data(make_recipe(tmp_path, sources, validation=validation), rank=0, world_size=1)
    plan = open_data(make_recipe(tmp_path, sources, validation={**validation, "best": "b"}), rank=0, world_size=1)
    assert plan.validation_sources() == ["b"]
    few = {"held_out_share": 1e-6}
    with pytest.raises(DataError, match=r"validation: no source has a held-out sample; the largest is 'b'.*0.17 takes"):
        open_data(make_recipe(tmp_path, sources, validation=few), rank=0, world_size=1)
    files = {"c": {"path": str(write_text_rows(tmp_path / "c.jsonl", 3))}}
    apart = make_recipe(tmp_path, sources, validation={**few, "sources": files})
    assert open_data(apart, rank=0, world_size=1).validation_sources() == ["c"]


# ------------------------------------------------------------------------------------------- errors, threads, opening


def test_problems_of_all_sources_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "broken.jsonl", [b"x"])
    mixture = {"a": {"path": str(tmp_path / "nowhere.jsonl")}, "b": {"path": str(tmp_path / "broken.jsonl")}}
    with pytest.raises(DataError) as error:
        open_data(make_recipe(tmp_path, mixture), rank=0, world_size=1)
    assert "source 'a': cannot open" in str(error.value)
    assert "broken.jsonl:1: not JSON" in str(error.value)


def test_tokenizer_must_fit_the_model(folder: Path) -> None:
    with pytest.raises(DataError, match=r"the tokenizer has 330 ids, but model.language_model.vocab_size is 329"):
        open_data(recipe_of(folder, model__language_model__vocab_size=329), rank=0, world_size=1)


def test_counts_at_the_index(tmp_path: Path) -> None:
    long = {"messages": turns("what " * 300, "yes")}
    rows = [long, b"x", {"messages": turns("what", "yes")}]
    write_rows(tmp_path / "a.jsonl", rows)
    mixture = {"s": {"path": str(tmp_path / "a.jsonl")}}
    plan = open_data(make_recipe(tmp_path, mixture, data__max_bad_share=0.5), rank=0, world_size=1)
    assert plan.dropped_at_index == {("s", "not JSON"): 1, ("s", "over-long"): 1}


def test_an_error_in_a_thread_reaches_the_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is no bad sample: it ends the run with its own message, and no thread is left."""
    plan = open_data(recipe_of(folder), rank=0, world_size=1)
    before = threading.active_count()
    calls = []

    def cut(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 30:
            raise RuntimeError("boom")
        return tiling_cut(*given)

    tiling_cut = tiling.cut
    monkeypatch.setattr(tiling, "cut", cut)
    with pytest.raises(RuntimeError, match="boom"):
        steps_of(plan, 0, 50)
    assert threading.active_count() == before


def test_close_in_the_middle_is_quick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being built stops at the next sample; closing twice is fine; an interrupt closes too."""
    slow = plan_module.open_image

    def slowly(*given: Any) -> Any:
        time.sleep(0.05)
        return slow(*given)

    monkeypatch.setattr(plan_module, "open_image", slowly)
    plan = open_data(recipe_of(folder, data__prefetch_steps=8), rank=0, world_size=1)
    before = threading.active_count()
    steps = StepLoader(plan, start_step=0, end_step=100)
    next(steps)
    begin = time.monotonic()
    steps.close()
    steps.close()
    assert time.monotonic() - begin < 0.5  # 8 steps of 16 samples would take seconds
    assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt), StepLoader(plan, start_step=0, end_step=100) as steps:
        next(steps)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_whole_steps_are_prepared_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    submit = Builder.submit

    def counted(*given: Any) -> Any:
        future = submit(*given)
        future.add_done_callback(lambda _: built.append(1))
        return future

    monkeypatch.setattr(Builder, "submit", counted)
    plan = open_data(recipe_of(folder, data__prefetch_steps=3), rank=0, world_size=1)
    with StepLoader(plan, start_step=0, end_step=100) as steps:
        next(steps)
        deadline = time.monotonic() + 5
        wanted = sum(len(plan.deal_step(step)) for step in range(4))  # the one in training and three ahead
        while len(built) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(built) == wanted


def test_fingerprint_is_of_content_and_order(folder: Path, tmp_path: Path) -> None:
    """Moving the data changes nothing; another seed, batch or pack size does, and so does another row."""
    one = open_data(recipe_of(folder), rank=0, world_size=1).fingerprint
    for file in (*folder.glob("*.jsonl"), *folder.glob("*.png")):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recipe = recipe_of(tmp_path)
    assert [open_data(recipe, rank=rank, world_size=3).fingerprint for rank in range(2)] == [one, one]
    changes: list[dict[str, Any]] = [{"seed": 5}, {"global_batch__samples": 8}, {"data__pack_tokens": 300}]
    for change in changes:
        assert open_data(recipe_of(folder, **change), rank=0, world_size=1).fingerprint != one
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write(json.dumps({"messages": turns("more", "yes")}) + "\n")
    assert open_data(recipe, rank=0, world_size=1).fingerprint != one


# --------------------------------------------------------------------------------------- memory, slow reads, limits


def test_bytes_bound_what_is_prepared(folder: Path) -> None:
    """Room for a byte: one step ahead all the same. Room for about three: no more, whatever prefetch_steps says."""
    for num_bytes, most in ((1, 1), (None, 3)):
        plan = open_data(recipe_of(folder, data__prefetch_steps=50), rank=0, world_size=1)
        per_step = [
            sum(loader._bytes_of(plan, item) for ranks in plan.deal_step(step) for item in ranks[0])
            for step in range(9)
        ]
        limit = num_bytes or sum(per_step[:3])
        plan = open_data(recipe_of(folder, data__prefetch_steps=50, data__prefetch_bytes=limit), rank=0, world_size=1)
        with StepLoader(plan, start_step=0, end_step=9) as steps:
            seen = []
            for data in steps:
                seen.append(data.step)
                ahead = list(steps._steps)
                assert len(ahead) <= 1 or sum(one.num_bytes for one in ahead) <= limit
                assert ahead or data.step == 8
            assert seen == list(range(9))
        assert most == 1 or per_step[0] > 1000


@pytest.fixture
def warnings_of_data() -> Iterator[list[str]]:
    """What the data package warns of; independent of handlers that other tests have set up."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("nvlm_train.data"), Kept(logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_a_slow_read_is_named_while_it_lasts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_data: list[str]
) -> None:
    read = rows_module.read_file
    slow: list[str] = []

    def slowly(path: str, name: str) -> bytes:
        if not slow:
            slow.append(path)
            time.sleep(0.8)
        return read(path, name)

    monkeypatch.setattr(rows_module, "read_file", slowly)
    plan = open_data(recipe_of(folder, data__slow_read_s=0.2), rank=0, world_size=1)
    assert len(steps_of(plan, 0, 2)) == 2
    during = [text for text in warnings_of_data if "so far" in text]
    assert 1 <= len(during) <= 3  # told again when its time has doubled, not every second
    assert all(slow[0] in text and "data.slow_read_s is 0.2" in text for text in during)
    assert any(f"reading {slow[0]} took 1 s" in text for text in warnings_of_data)
    assert not [thread for thread in threading.enumerate() if "slow" in thread.name]


def test_a_stuck_read_does_not_keep_the_trainer_from_ending(
    folder: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_data: list[str]
) -> None:
    release = threading.Event()

    def stuck(path: str, name: str) -> bytes:
        release.wait(30)
        raise BadSample("unreadable image", "released")

    monkeypatch.setattr(rows_module, "read_file", stuck)
    monkeypatch.setattr(assembly, "CLOSE_TIMEOUT_S", 0.3)
    steps = StepLoader(open_data(recipe_of(folder), rank=0, world_size=1), start_step=0, end_step=5)
    begin = time.monotonic()
    steps._submit()
    time.sleep(0.2)
    steps.close()
    assert time.monotonic() - begin < 2
    assert any("gave up on reading" in text and ".png" in text for text in warnings_of_data)
    release.set()


def test_the_share_of_bad_samples_is_that_of_the_last_ten_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 40 here. Rows that were bad long ago are forgotten; as many within the window stop the run."""
    monkeypatch.setattr(loader, "_WINDOW", 40)
    monkeypatch.setattr(loader, "_SEEN_AT_LEAST", 40)
    path = write_text_rows(tmp_path / "a.jsonl", 400)
    plan = open_data(make_recipe(tmp_path, {"s": {"path": str(path)}}, data__max_bad_share=0.1), rank=0, world_size=1)

    def account(bad_at: set[int], count: int) -> int:
        watch = loader._BadSamples(plan)
        for k in range(count):
            ref = SampleRef("s", k, 0)
            bad = [assembly.Bad(ref, k + 1, f"{path}:{k + 1}", "unreadable image", "broken")] if k in bad_at else []
            arrays = {"samples": () if bad else (ref,)}
            watch.account(0, assembly.Built({**assembly_arrays(plan), **arrays}, 1, {}, bad))
        return count

    assert account({20, 60, 100, 140, 180, 220, 260, 300}, 350) == 350  # 8 of 350, never more than 1 of 40
    assert account({300, 301, 302, 303}, 350) == 350  # 4 of 40: just allowed
    with pytest.raises(DataError, match=r"5 of the last 40 samples seen cannot be used, more than .* 0\.1"):
        account({300, 301, 302, 303, 304}, 350)


def assembly_arrays(plan: DataPlan) -> dict[str, Any]:
    batch = null_batch(plan)
    return dict(vars(batch))


def test_decode_threads_share_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pack of 16 samples a step: with 4 threads, 4 of its samples are in the making at the same time."""
    write_image_rows(tmp_path / "images.jsonl", 16)
    busy: list[int] = []
    now = [0]
    lock = threading.Lock()
    opened = plan_module.open_image

    def slowly(*given: Any) -> Any:
        with lock:
            now[0] += 1
            busy.append(now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return opened(*given)

    monkeypatch.setattr(plan_module, "open_image", slowly)
    mixture = {"images": {"path": str(tmp_path / "images.jsonl")}}
    recipe = make_recipe(
        tmp_path, mixture, data__num_threads=4, data__prefetch_steps=1, data__pack_tokens=4096, data__max_bad_share=1
    )
    plan = open_data(recipe, rank=0, world_size=1)
    assert len(plan.deal_step(0)) == 1
    steps_of(plan, 0, 1)
    assert max(busy) == 4


def test_batches_for_a_gpu_are_pinned_ahead_in_a_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what pins is replaced, the rest is real."""
    seen: list[tuple[str, Any]] = []

    def pin(batch: Batch) -> Batch:
        seen.append((threading.current_thread().name, batch))
        return replace(batch, num_tile_chunks=77)

    monkeypatch.setattr(Batch, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(("set_device", device)))
    plan = open_data(recipe_of(folder), rank=0, world_size=1)
    plain = steps_of(plan)
    device = torch.device("cuda", 3)
    with StepLoader(plan, start_step=0, end_step=STEPS, pin_for=device) as steps:
        pinned = list(steps)
    assert [[segments(b) for b in one.micro_batches] for one in pinned] == [
        [segments(b) for b in one.micro_batches] for one in plain
    ]
    assert {b.num_tile_chunks for one in pinned for b in one.micro_batches} == {77}
    assert {name.split("_")[0] for name, _ in seen} == {"set", "nvlm-pin"} and ("set_device", device) in seen
    with StepLoader(plan, start_step=0, end_step=100, pin_for=device) as steps:  # ends in the middle, thread and all
        next(steps)
