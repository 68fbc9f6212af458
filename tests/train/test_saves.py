"""Saves of whole trainings: beside the training, by minutes, milestones, copies, other ranks, older versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import TESTS, run_distributed
from nvlm_train import checkpoint
from nvlm_train.errors import CheckpointError
from nvlm_train.export import hf, licence
from nvlm_train.export.verify import verify
from runs import steps, trajectory, validations, write_inputs

JOBS = "train/train_jobs.py:"
EACH = ["checkpoint.every_steps=1", "checkpoint.keep_last=9"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def run(recipe: Path, out: Path, *overrides: str, ranks: int = 2, job: str = "train", **more: Any) -> tuple[Any, ...]:
    results = run_distributed(
        ranks,
        JOBS + job,
        recipe=str(recipe),
        overrides=[f"output_dir={out}", f"run_name={out.name}", *overrides],
        **more,
    )
    assert len({result[:2] for result in results}) == 1, results
    return results[0]


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that stood still for a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(inputs, out, *EACH) == (0, "")
    return out


def assert_same_state(one: Path, other: Path) -> None:
    """Two checkpoints hold the same masters and moments, bit for bit."""
    first, second = checkpoint.Checkpoint(one), checkpoint.Checkpoint(other)
    second.verify_checksums()
    assert first.shapes == second.shapes
    for name, shape in first.shapes.items():
        wanted = {(name, key): (0, shape.numel()) for key in checkpoint.STATE_KEYS}
        found = second.read_many(wanted)
        for pair, value in first.read_many(wanted).items():
            assert torch.equal(value, found[pair]), pair


def test_saved_beside_the_training_is_what_was_at_its_step(inputs: Path, whole: Path, tmp_path: Path) -> None:
    """Writing takes as long as some steps: the checkpoint is that of its step all the same, requests are put off."""
    out = tmp_path / "run"
    recipe = ["checkpoint.asynchronous=true", *EACH, "checkpoint.weights_every=5", "validation.every_steps=6"]
    code, text, beside = run(inputs, out, *recipe, job="train_with_slow_writing", seconds=1.0)
    assert (code, text) == (0, "") and beside > 0
    assert trajectory(out) == trajectory(whole)
    saved = checkpoint.committed_steps(out)
    assert saved[0] == 1 and saved[-1] == 8 and {6} < set(saved) < set(range(1, 9))  # 6: the best so far
    for step in saved:
        assert_same_state(whole / f"step_{step}", out / f"step_{step}")
    assert checkpoint.committed_steps(out, "weights") == [5]
    milestone, full = checkpoint.Checkpoint(out / "weights_5"), checkpoint.Checkpoint(whole / "step_5")
    for name in full.shapes:
        assert torch.equal(milestone.read_master(name), full.read_master(name).bfloat16()), name
    assert not list(out.glob(".*")) and not (out / "set_aside").exists()


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_rank_that_hangs_in_its_save_ends_the_run_and_is_named(
    inputs: Path, tmp_path: Path, asynchronous: str
) -> None:
    out = tmp_path / "run"
    recipe = ["checkpoint.every_steps=2", "checkpoint.timeout_s=1", f"checkpoint.asynchronous={asynchronous}"]
    assert run(inputs, out, "max_steps=2", "validation=null") == (0, "")
    job = JOBS + "train_with_slow_writing"
    overrides = [f"output_dir={out}", "run_name=run", "max_steps=500", "validation=null", *recipe]
    accepted = json.loads((out / "recipe.json").read_text())
    accepted["recipe"]["max_steps"] = 500
    (out / "recipe.json").write_text(json.dumps(accepted))
    for code, text, _ in run_distributed(2, job, recipe=str(inputs), overrides=overrides, seconds=60.0, on_rank=1):
        assert code == 1 and "step_4: rank 1 on " in text and "did not finish within checkpoint.timeout_s 1" in text
    assert checkpoint.committed_steps(out) == [2]
    checkpoint.Checkpoint(out).verify_checksums()


def test_saves_by_minutes_and_kept_for_good(inputs: Path, whole: Path, tmp_path: Path) -> None:
    by_minutes = ["checkpoint.every_steps=0", "validation=null"]
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    kept = ["checkpoint.keep_last=1", "checkpoint.keep_every_steps=3"]
    assert run(inputs, often, *by_minutes, *kept, "checkpoint.every_minutes=0.00001") == (0, "")
    assert checkpoint.committed_steps(often) == [3, 6, 8]
    assert run(inputs, seldom, *by_minutes, "checkpoint.every_minutes=1000") == (0, "")
    assert checkpoint.committed_steps(seldom) == [8]
    code, text = run(inputs, tmp_path / "never", *by_minutes)
    assert code == 2 and "is 0 and every_minutes is not given, so a crash would lose the whole run" in text
    assert_same_state(whole, seldom)


def test_a_milestone_is_exported_and_started_from_but_not_resumed(inputs: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = ["checkpoint.weights_every=2", "checkpoint.every_steps=3", "max_steps=4", "validation=null"]
    assert run(inputs, out, *recipe) == (0, "")
    assert checkpoint.committed_steps(out, "weights") == [2, 4] and checkpoint.committed_steps(out) == [3, 4]
    code, text = run(inputs, out, *recipe, resume="step_2")
    assert code == 2 and "weights_2 holds bf16 weights alone" in text
    assert run(inputs, out, *recipe, resume="step_3") == (0, "")  # passes weights_4 once more
    assert sorted(p.name for p in (out / "set_aside" / "1").iterdir()) == ["metrics.jsonl", "step_4", "weights_4"]
    assert checkpoint.committed_steps(out, "weights") == [2, 4]

    milestone = checkpoint.open_checkpoint(out / "weights_2", checksums=True)
    folder = hf.export(milestone, milestone.recipe, tmp_path / "export", step=2)
    assert verify(folder, milestone, milestone.recipe)["ok"]
    size = sum(file.stat().st_size for file in (out / "weights_2" / "weights").iterdir())
    full = sum(file.stat().st_size for file in (out / "step_3" / "weights").iterdir())
    assert size < full / 3  # a sixth, and the overhead of tiny tensors
    next_run = [f"init_from.run={out / 'weights_2'}", "max_steps=1", "validation=null"]
    assert run(inputs, tmp_path / "next", *next_run) == (0, "")
    assert steps(tmp_path / "next")[0]["loss"] != steps(out)[0]["loss"]


def test_a_run_with_copies_goes_on_without_the_folders_it_was_started_from(
    inputs: Path, whole: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(inputs.parent, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(inputs.parent), str(folder)))
    copied = ["checkpoint.base=copy", f"data.index_dir={tmp_path / 'index'}"]
    code = run(recipe, out, *copied, job="train_with_signal", signal_name="SIGUSR2", on_rank=1, after_step=3)
    assert code == (0, "")
    for name in ("vision", "language_model"):
        (folder / name).rename(folder / f"{name}_elsewhere")
    code, text = run(recipe, out, *copied, f"init_from.vision={folder / 'vision2'}")
    assert code == 2 and "vision2" in text  # what is named now and was not before is not passed over
    assert run(recipe, out, *copied) == (0, "")
    assert trajectory(out) == trajectory(whole) and validations(out)[8] == validations(whole)[8]
    own = checkpoint.open_checkpoint(out, checksums=True)
    folder = hf.export(own, own.recipe, tmp_path / "export", step=8)
    assert verify(folder, own, own.recipe)["ok"]


def test_a_run_of_format_1_is_resumed_and_exported(inputs: Path, tmp_path: Path) -> None:
    """Written by version 0.1.0 on 2 ranks, when torch's own planner wrote the files (run_of_format_1)."""
    out = tmp_path / "run"
    shutil.copytree(TESTS / "train" / "run_of_format_1", out)
    for file in (out / "recipe.json", out / "base.json"):
        file.write_text(file.read_text().replace("INPUTS", str(inputs.parent)))
    before = trajectory(out)
    old = checkpoint.open_checkpoint(out, checksums=True)
    assert old.step == 2 and old.checkpoint.kind == "step"
    with pytest.raises(CheckpointError, match=r"data\.text \(.*\) has no licence"):
        licence.of_run(old)  # nobody asked for it then
    licences = licence.of_run(old, "MIT", {"weights.*": "MIT", "data.*": "own"})
    folder = hf.export(old, old.recipe, tmp_path / "export", step=2, licences=licences)
    assert verify(folder, old, old.recipe)["ok"]
    recipe = ["train.language_model=frozen", "max_steps=4", "validation=null"]
    assert run(inputs, out, *recipe) == (0, "")
    attempts = json.loads((out / "recipe.json").read_text())["attempts"]
    assert [attempt["from_step"] for attempt in attempts] == [0, 2]
    now_recorded = {part.key for part in licence.of_run(checkpoint.open_checkpoint(out)).parts}
    assert now_recorded == {"weights.vision", "weights.language_model", "data.images", "data.text"}
    for now, then in zip(trajectory(out), before, strict=True):  # of another machine and version of torch perhaps
        assert now == pytest.approx(then, rel=1e-4)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_ranks_and_gone_on_with_others(inputs: Path, long: Path, tmp_path: Path, ranks: int) -> None:
    """20 steps with strong weight decay, which only some groups have: samples equal, losses but for rounding."""
    out = tmp_path / "run"
    shutil.copytree(long, out)
    assert run(inputs, out, *LONG, resume="step_4", ranks=ranks) == (0, "")
    assert len(steps(out)) == 24
    for one, two in zip(steps(out), steps(long), strict=True):
        counts = ("step", "samples", "trained_tokens", "tiles")
        assert [one[key] for key in counts] == [two[key] for key in counts]
        # the order of sums differs; Adam makes rounding of small gradients large
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    groups = checkpoint.Checkpoint(out).state["groups"]
    assert groups == checkpoint.Checkpoint(long).state["groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert checkpoint.Checkpoint(out).state["adam_step"] == 24


LONG = [
    "max_steps=24", "optimizer.weight_decay=0.5", "validation=null", "checkpoint.every_steps=4",
    "checkpoint.keep_last=9", "checkpoint.asynchronous=true", "checkpoint.keep_every_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def long(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps on 2 ranks, with the checkpoint of step 4."""
    out = tmp_path_factory.mktemp("runs") / "long"
    assert run(inputs, out, *LONG) == (0, "")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 8))
def test_resumed_at_any_step_is_never_stopped(inputs: Path, whole: Path, tmp_path: Path, step: int) -> None:
    """Every step lies in the middle of an epoch of the data: 90 samples, 9 a step."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert run(inputs, out, *EACH, resume=f"step_{step}") == (0, "")
    assert trajectory(out) == trajectory(whole) and validations(out) == validations(whole)
    assert_same_state(whole, out)
