"""Two-phase commit, damage, and what is never executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import run_distributed
from nvlm_train import checkpoint
from nvlm_train.errors import CheckpointError

SHAPES = {"projector.fc1.weight": (5, 3), "projector.norm.bias": (7,)}


def _slices(offset: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {
            key: torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 100 * i + offset
            for i, key in enumerate(checkpoint.STATE_KEYS)
        }
        for name, shape in SHAPES.items()
    }


def _save(run: Path, step: int, offset: float = 0.0, kinds: Sequence[str] = ("step",)) -> Path:
    state = {"adam_step": step}
    return checkpoint.save(
        run, step, _slices(offset), SHAPES, state, rank=0, world_size=1, gather=lambda v: [v], kinds=kinds
    )


def test_saved_and_read_in_any_range(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    opened = checkpoint.Checkpoint(tmp_path)
    opened.verify_checksums()
    assert opened.step == 3 and opened.shapes["projector.fc1.weight"] == torch.Size((5, 3))
    expected = _slices()
    for name, shape in SHAPES.items():
        for begin, end in [(0, torch.Size(shape).numel()), (2, 5), (6, 6)]:
            found = opened.read_many({(name, "exp_avg"): (begin, end)})[name, "exp_avg"]
            assert torch.equal(found, expected[name]["exp_avg"][begin:end])
    assert torch.equal(
        opened.read_master("projector.fc1.weight"), expected["projector.fc1.weight"]["master"].view(5, 3)
    )


def test_the_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 4, 10, 12):
        _save(tmp_path, step)
    assert checkpoint.find_step(tmp_path) == tmp_path / "step_12"
    assert checkpoint.find_step(tmp_path / "step_4") == tmp_path / "step_4"
    assert checkpoint.prune(tmp_path, keep_last=1, keep=[4]) == [2, 10]
    assert checkpoint.committed_steps(tmp_path) == [4, 12]
    with pytest.raises(CheckpointError, match=r"step_10 does not exist; complete checkpoints in .*: step_4, step_12"):
        checkpoint.find_step(tmp_path / "step_10")


@pytest.mark.parametrize("moment", ["weights", "manifest", "rename", "marker"])
def test_a_save_cut_off_anywhere_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The process dies (nothing cleans up) in the middle of saving step 6; then step 6 is saved again."""
    _save(tmp_path, 3)

    class Killed(BaseException):
        pass

    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "weights":
            patch.setattr(checkpoint.dcp, "save", die)
        elif moment == "manifest":
            patch.setattr(checkpoint, "write_json", die)
        elif moment == "rename":
            patch.setattr(checkpoint.os, "replace", die)
        else:
            patch.setattr(Path, "touch", die)
        with pytest.raises(Killed):
            _save(tmp_path, 6)
    assert checkpoint.find_step(tmp_path) == tmp_path / "step_3"
    checkpoint.Checkpoint(tmp_path).verify_checksums()
    _save(tmp_path, 6, offset=0.5)
    found = checkpoint.Checkpoint(tmp_path).read_master("projector.norm.bias")
    assert torch.equal(found, _slices(0.5)["projector.norm.bias"]["master"])


def test_full_disk_is_an_error_that_names_the_cause_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # no file may grow beyond 200 bytes
    try:
        with pytest.raises(
            CheckpointError, match=r"saving .*step_6 failed, the previous checkpoint is untouched: rank 0"
        ):
            _save(tmp_path, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]
    checkpoint.Checkpoint(tmp_path).verify_checksums()


def test_damage_is_found(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    shard = next((path / "weights").glob("__0_*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} has {len(content) - 1:,} bytes, its manifest says"):
        checkpoint.Checkpoint(path)
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=f"checksum differs from the manifest in {shard.name}"):
        checkpoint.Checkpoint(path).verify_checksums()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        checkpoint.Checkpoint(path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version of nvlm_train reads format 1"):
        checkpoint.Checkpoint(path)


class _Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_metadata_of_a_stranger_is_never_executed(tmp_path: Path) -> None:
    path = _save(tmp_path, 3)
    content = pickle.dumps(_Attack(tmp_path / "owned"))
    (path / "weights" / ".metadata").write_bytes(content)
    state = json.loads((path / "state.json").read_text())
    state["files"][".metadata"]["bytes"] = len(content)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        checkpoint.Checkpoint(path).read_master("projector.norm.bias")
    assert not (tmp_path / "owned").exists()


def test_all_weights_of_a_run_come_from_the_checkpoint_and_its_base(tmp_path: Path) -> None:
    base = tmp_path / "base" / "model.safetensors"
    base.parent.mkdir()
    save_file({"x.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3)}, str(base))
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        run.mkdir()
        checkpoint.write_json(run / "recipe.json", {"format": 1, "recipe": {"seed": 1}, "attempts": []})
    _save(first, 3)
    checkpoint.write_base(first, {"vision_model.x.weight": f"{base}:x.weight"})
    opened = checkpoint.open_checkpoint(first, checksums=True)
    assert set(opened.names()) == {*SHAPES, "vision_model.x.weight"}
    assert opened.dtype("vision_model.x.weight") == torch.bfloat16 and opened.shape("vision_model.x.weight") == (2, 3)
    assert torch.equal(opened.read("vision_model.x.weight").float(), torch.arange(6.0).view(2, 3))

    # a second run froze what the first one trained
    name = "projector.norm.bias"
    _save(second, 5)
    checkpoint.write_base(second, {"language_model.y": opened.where(name)})
    again = checkpoint.open_checkpoint(second)
    assert torch.equal(again.read("language_model.y"), _slices()[name]["master"])

    save_file({"x.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, str(base))
    checkpoint.open_checkpoint(first)  # same size: only the checksum tells
    with pytest.raises(CheckpointError, match="has changed since the run started"):
        checkpoint.open_checkpoint(first, checksums=True)
    shutil.rmtree(base.parent)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        checkpoint.open_checkpoint(first)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_saved_and_restored_goes_on_as_if_never_stopped(tmp_path: Path, stage: int, precision: str) -> None:
    """Steps 4-6 after a restore into a fresh engine (other initial weights) equal those of the run that went on."""
    job = "engine/zero_jobs.py:save_and_restore"
    found = run_distributed(2, job, folder=str(tmp_path), stage=stage, precision=precision)[0]
    assert found["resumed"] == found["uninterrupted"]
    for key, tensors in found["state_uninterrupted"].items():
        for name, value in tensors.items():
            assert torch.equal(found["state_resumed"][key][name], value), (key, name)
    if (stage, precision) == (3, "fp32"):
        # the same checkpoint on one rank: only the order of sums differs; worst case measured 1.4e-7
        other = run_distributed(1, job, folder=str(tmp_path), stage=3, precision=precision, restore_only=True)[0]
        torch.testing.assert_close(other["resumed"], found["uninterrupted"], rtol=0, atol=2e-6)


def test_frozen_weights_may_move_but_not_change(tmp_path: Path) -> None:
    run, first, second = tmp_path / "run", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    run.mkdir()
    save_file({"w": torch.arange(4.0)}, str(first))
    shutil.copy(first, second)
    checkpoint.write_base(run, {"vision_model.w": f"{first}:w"})
    checkpoint.write_base(run, {"vision_model.w": f"{second}:w"})  # moved
    assert json.loads((run / "base.json").read_text())["tensors"]["vision_model.w"]["file"] == str(second)
    save_file({"w": torch.arange(4.0) + 1}, str(second))  # the same size
    with pytest.raises(CheckpointError, match=r"1 frozen weights are not those .* the first vision_model\.w"):
        checkpoint.write_base(run, {"vision_model.w": f"{second}:w"})
    with pytest.raises(CheckpointError, match="now from nothing, then from"):
        checkpoint.write_base(run, {})


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 3)
    usage = shutil.disk_usage(tmp_path)
    needed = 22 * 3 * 4  # 22 elements, three fp32 tensors
    for free, fits in [(needed - 1, False), (needed, True)]:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            assert _save(tmp_path, 6).name == "step_6"
        else:
            with pytest.raises(CheckpointError, match=r"the checkpoint needs .* GiB free; make room or lower"):
                _save(tmp_path, 6)
            assert [p.name for p in tmp_path.iterdir()] == ["step_3"]


def test_weights_behind_links_are_found_again(tmp_path: Path) -> None:
    """A hub's cache holds links called model.safetensors to files that are called after their hash."""
    blob, snapshot, run = tmp_path / "blobs" / "abc123", tmp_path / "snapshot", tmp_path / "run"
    blob.parent.mkdir()
    snapshot.mkdir()
    run.mkdir()
    save_file({"w": torch.arange(4.0)}, str(blob))
    (snapshot / "model.safetensors").symlink_to(blob)
    checkpoint.write_base(run, {"vision_model.w": f"{snapshot / 'model.safetensors'}:w"})
    checkpoint.write_json(run / "recipe.json", {"format": 1, "recipe": {}, "attempts": []})
    _save(run, 3)
    assert torch.equal(checkpoint.open_checkpoint(run, checksums=True).read("vision_model.w"), torch.arange(4.0))


def test_slices_leftovers_and_the_best(tmp_path: Path) -> None:
    checkpoint.write_base(tmp_path, {})
    checkpoint.write_json(tmp_path / "recipe.json", {"format": 1, "recipe": {}, "attempts": []})
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoint.find_step(tmp_path / "best")
    _save(tmp_path, 3)
    name = "projector.fc1.weight"
    assert torch.equal(checkpoint.open_checkpoint(tmp_path).read_slice(name, 4, 9), _slices()[name]["master"][4:9])
    with pytest.raises(CheckpointError, match="no best checkpoint: no validation has run"):
        checkpoint.find_step(tmp_path / "best")
    state = json.loads((tmp_path / "step_3" / "state.json").read_text())
    (tmp_path / "step_3" / "state.json").write_text(json.dumps({**state, "progress": {"best_step": 3}}))
    assert checkpoint.find_step(tmp_path / "best") == tmp_path / "step_3"
    (tmp_path / ".saving_step_9" / "weights").mkdir(parents=True)
    (tmp_path / "step_2").mkdir()
    checkpoint.clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["step_3"]
