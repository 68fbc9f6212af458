"""Two-phase commit, damage, and what is never executed."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from helpers import run_distributed
from nvlm_train import checkpoint
from nvlm_train.errors import CheckpointError, PeerError

SHAPES = {"projector.fc1.weight": (5, 3), "projector.norm.bias": (7,)}


def _slices(offset: float = 0.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {
            key: torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 100 * i + offset
            for i, key in enumerate(checkpoint.STATE_KEYS)
        }
        for name, shape in SHAPES.items()
    }


def _save(run: Path, step: int, offset: float = 0.0, **more: Any) -> Path:
    state = {"adam_step": step}
    return checkpoint.save(
        run, step, _slices(offset), SHAPES, state, rank=0, world_size=1, gather=lambda v: [v], **more
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


# ---------------------------------------------------------------------------------------------- interrupted anywhere

FILE_CALLS = {"open", "write", "flush", "fsync", "close", "mkdir", "rename", "replace", "rmdir", "unlink", "scandir"}


def _state_of(run: Path) -> tuple[int, float]:
    """(step, offset) of the newest checkpoint, every value and checksum of which is right."""
    opened = checkpoint.Checkpoint(run)
    opened.verify_checksums()
    offset = float(opened.read_master("projector.norm.bias")[0])
    for name, parts in _slices(offset).items():
        for key, value in parts.items():
            assert torch.equal(opened.read_many({(name, key): (0, value.numel())})[name, key], value), (name, key)
    return opened.step, offset


def _killed(work: Callable[[], object], *, call: int | None = None, size: int | None = None) -> bool:
    """Runs `work` in a process of its own that dies by SIGKILL before its n-th file call, in any thread, or by SIGXFSZ
    when a file of its grows beyond `size` bytes; whether it died."""
    pid = os.fork()
    if pid == 0:
        seen = itertools.count(1)

        def count(frame: Any, event: str, function: Any) -> None:
            if event == "c_call" and getattr(function, "__name__", "") in FILE_CALLS and next(seen) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            logging.disable()  # lines of the log would grow the file that pytest reads them from beyond `size`
            if size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            if call is not None:
                threading.setprofile(count)
                sys.setprofile(count)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _num_file_calls(work: Callable[[], object]) -> int:
    seen = [0]

    def count(frame: Any, event: str, function: Any) -> None:
        seen[0] += event == "c_call" and getattr(function, "__name__", "") in FILE_CALLS

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen[0]


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_killed_before_a_file_operation_a_save_leaves_the_previous_checkpoint_or_the_new_one(
    tmp_path: Path, which: str
) -> None:
    """Saves step 6 over and over and dies before its 1st, 2nd, ... file call, pruning step 2 included."""
    for step in (2, 3):
        _save(tmp_path / "before", step)

    def save(run: Path) -> None:
        _save(run, 6, 0.5, committed=lambda: checkpoint.prune(run, 2))

    shutil.copytree(tmp_path / "before", tmp_path / "whole")
    last = _num_file_calls(lambda: save(tmp_path / "whole"))
    assert _state_of(tmp_path / "whole") == (6, 0.5) and checkpoint.committed_steps(tmp_path / "whole") == [3, 6]
    calls = list(range(1, last + 1))
    if which == "some":  # writing tensors takes most of them, committing and pruning the last ones
        calls = sorted({*calls[:4], *random.Random(6).sample(calls, 8), *calls[-24:]})
    found = []
    for call in calls:
        run = tmp_path / f"killed_{call}"
        shutil.copytree(tmp_path / "before", run)
        assert _killed(lambda run=run: save(run), call=call), call
        found.append(_state_of(run))
        _save(run, 6, 0.25)  # what the crash left is in nobody's way
        assert _state_of(run) == (6, 0.25)
        shutil.rmtree(run)
    assert set(found) == {(3, 0.0), (6, 0.5)} and found == sorted(found), (found, last)


def test_killed_at_any_byte_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 3)
    largest = max(file.stat().st_size for file in (tmp_path / "step_3" / "weights").iterdir())
    for size in [0, 1, *random.Random(6).sample(range(2, largest - 1), 6), largest - 1]:
        assert _killed(lambda: _save(tmp_path, 6), size=size), size
        assert _state_of(tmp_path) == (3, 0.0), size
    assert not _killed(lambda: _save(tmp_path, 6, 0.5), size=largest)
    assert _state_of(tmp_path) == (6, 0.5)


def test_leftovers_are_set_aside_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 3)
    (tmp_path / ".saving_step_9" / "weights").mkdir(parents=True)
    (tmp_path / "step_2").mkdir()
    (tmp_path / ".removing_step_1").mkdir()
    checkpoint.set_leftovers_aside(tmp_path)
    aside = tmp_path / "set_aside" / "incomplete"
    assert sorted(p.name for p in aside.iterdir()) == ["saving_step_9", "step_2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set_aside", "step_3"]
    checkpoint.set_leftovers_aside(tmp_path)  # nothing new: they stay
    assert sorted(p.name for p in aside.iterdir()) == ["saving_step_9", "step_2"]
    (tmp_path / "weights_6").mkdir()
    (tmp_path / "step_notes").mkdir()  # somebody else's
    checkpoint.set_leftovers_aside(tmp_path)  # of one crash only
    assert [p.name for p in aside.iterdir()] == ["weights_6"] and (tmp_path / "step_notes").is_dir()
    # they make room for a save that would not fit otherwise
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=300 * (not aside.exists())))
    _save(tmp_path, 6)
    assert not aside.exists() and _state_of(tmp_path) == (6, 0.0)


# ------------------------------------------------------------------------------------------------ several ranks at once


class _Ranks:
    """Ranks as threads, to look at what they say to each other without starting processes."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.barrier = world_size, threading.Barrier(world_size, timeout=60)
        self.values: list[Any] = [None] * world_size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What each rank returns or raises."""

        def one(rank: int) -> Any:
            try:
                return work(rank)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(one, range(self.world_size)))

    def save(self, run: Path, step: int, rank: int, *, limit_s: float = 60.0, offset: float = 0.0) -> checkpoint.Save:
        def gather(value: Any) -> list[Any]:
            return self.gather(rank, value)

        save = checkpoint.Save(run, step, SHAPES, {}, rank=rank, world_size=self.world_size, gather=gather)
        whole = _slices(offset)
        share = {n: -(-torch.Size(s).numel() // self.world_size) for n, s in SHAPES.items()}
        save.begin({n: {k: v[rank * share[n] : (rank + 1) * share[n]] for k, v in p.items()} for n, p in whole.items()})
        save.wait(limit_s)
        return save


@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_slices_of_any_number_of_ranks_make_one_checkpoint(tmp_path: Path, world_size: int) -> None:
    """7 elements on 6 ranks leave some of them without any. torch's own loader reads it as well."""
    ranks = _Ranks(world_size)
    saves = ranks.run(lambda rank: ranks.save(tmp_path, 3, rank, offset=0.5))
    assert _state_of(tmp_path) == (3, 0.5)
    files = json.loads((tmp_path / "step_3" / "state.json").read_text())["files"]
    assert saves[0].bytes == sum(entry["bytes"] for name, entry in files.items() if name != ".metadata")
    found = {"exp_avg/projector.fc1.weight": torch.zeros(15)}
    with checkpoint._quiet_dcp():
        torch.distributed.checkpoint.load(found, checkpoint_id=str(tmp_path / "step_3" / "weights"), no_dist=True)
    assert torch.equal(*found.values(), _slices(0.5)["projector.fc1.weight"]["exp_avg"])


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing on rank 1; then committing, which only rank 0 does."""
    ranks = _Ranks(3)
    ranks.run(lambda rank: ranks.save(tmp_path, 3, rank))

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = checkpoint._write_parts
    monkeypatch.setattr(checkpoint, "_write_parts", lambda f, *a: (full if f.name.startswith("__1_") else write)(f, *a))
    found = ranks.run(lambda rank: ranks.save(tmp_path, 6, rank))
    text = r"^saving .*step_6 failed, the previous checkpoint is untouched: rank 1: OSError: \[Errno 28\] No space left"
    assert all(isinstance(e, CheckpointError) and re.match(text, str(e)) for e in found), found
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "write_json", full)
    found = ranks.run(lambda rank: ranks.save(tmp_path, 6, rank))
    assert all(isinstance(e, CheckpointError) and "rank 0: OSError" in str(e) for e in found), found
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"] and _state_of(tmp_path) == (3, 0.0)


@pytest.mark.parametrize("part", ["_write_parts", "_commit"])
def test_a_rank_that_hangs_in_its_save_is_named_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    ranks, release = _Ranks(3), threading.Event()
    ranks.run(lambda rank: ranks.save(tmp_path, 3, rank))
    work, stuck = getattr(checkpoint, part), 1 if part == "_write_parts" else 0

    def hang(path: Path, *args: Any) -> Any:
        if part == "_commit" or path.name.startswith("__1_"):
            release.wait(60)
        return work(path, *args)

    monkeypatch.setattr(checkpoint, part, hang)
    try:
        found = ranks.run(lambda rank: ranks.save(tmp_path, 6, rank, limit_s=0.3))
        text = f"saving .*step_6: rank {stuck} on .* did not finish within checkpoint.timeout_s 0.3"
        assert all(isinstance(e, PeerError) and re.match(text, str(e)) for e in found), found
        assert _state_of(tmp_path) == (3, 0.0)
    finally:
        release.set()


# ----------------------------------------------------------------------------------------------------------- full disks


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


def test_a_really_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of a few pages, and nobody who looks at its free space before; the next save may fit again."""
    run = tmp_path / "small"
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(run)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        monkeypatch.setattr(checkpoint, "_require_space", lambda *args: None)
        _save(run, 3)
        for filled in range(4096, 65536, 4096):
            (run / "other").write_bytes(bytes(max(0, shutil.disk_usage(run).free - filled)))
            try:
                _save(run, 6)
            except CheckpointError as error:
                assert "No space left on device" in str(error) and _state_of(run) == (3, 0.0)
            else:
                break
            (run / "other").unlink()
            assert sorted(path.name for path in run.iterdir()) == ["step_3"]
        assert filled > 8192 and _state_of(run) == (6, 0.0)
    finally:
        subprocess.run(["umount", str(run)], check=True)


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
    (path / "COMMITTED").write_text("")  # as in the first version
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


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.slow)],
)
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
            with pytest.raises(CheckpointError, match=r"the checkpoint needs .* MB free; make room or lower"):
                _save(tmp_path, 6)
            assert [p.name for p in tmp_path.iterdir()] == ["step_3"]


def test_milestones_hold_bf16_weights_and_nothing_to_resume_from(tmp_path: Path) -> None:
    checkpoint.write_base(tmp_path, {})
    checkpoint.write_json(tmp_path / "recipe.json", {"format": 1, "recipe": {}, "attempts": []})
    for step in (2, 4):
        _save(tmp_path, step, 0.1, kinds=["weights", "step"])
    _save(tmp_path, 5, kinds=["weights"])
    assert checkpoint.find_step(tmp_path).name == "step_4"  # to go on from
    assert checkpoint.prune(tmp_path, keep_last=1) == [2]
    assert checkpoint.committed_steps(tmp_path, "weights") == [2, 4, 5]
    opened = checkpoint.open_checkpoint(tmp_path / "weights_4", checksums=True)
    for name, parts in _slices(0.1).items():
        assert opened.dtype(name) == torch.bfloat16
        rounded = parts["master"].bfloat16()
        assert torch.equal(opened.read(name), rounded.view(SHAPES[name]))
        assert torch.equal(opened.read_slice(name, 2, 6), rounded[2:6])
    with pytest.raises(CheckpointError, match=r"weights_3 does not exist; .*: step_4, weights_2, weights_4, weights_5"):
        checkpoint.find_step(tmp_path / "weights_3")
    _save(tmp_path, 4, 0.7, kinds=["weights"])  # passed again after a crash
    assert (
        checkpoint.Checkpoint(tmp_path / "weights_4").read_master("projector.norm.bias")[0]
        == torch.tensor(0.7).bfloat16()
    )


def test_pruning_keeps_the_newest_the_best_and_every_nth(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8, 10, 11):
        _save(tmp_path, step)
    assert checkpoint.prune(tmp_path, 2, keep=[6], keep_every_steps=5) == [2, 4, 8]
    assert checkpoint.committed_steps(tmp_path) == [5, 6, 10, 11]
    assert checkpoint.prune(tmp_path, 9) == []


def test_a_run_with_copies_of_its_frozen_weights_needs_no_other_folder(tmp_path: Path) -> None:
    base, run, earlier = tmp_path / "base" / "model.safetensors", tmp_path / "run", tmp_path / "earlier"
    base.parent.mkdir()
    save_file({"w": torch.arange(4.0)}, str(base))
    for folder in (run, earlier):
        folder.mkdir()
        checkpoint.write_json(folder / "recipe.json", {"format": 1, "recipe": {}, "attempts": []})
    name = "projector.norm.bias"
    frozen = {"vision_model.w": f"{base}:w", "language_model.y": f"{_save(earlier, 5)}:{name}"}
    checkpoint.write_base(run, frozen)
    _save(run, 3)
    assert not checkpoint.open_checkpoint(run).self_contained
    checkpoint.write_base(run, frozen, copy=True)
    copies = {path: path.stat().st_mtime_ns for path in (run / "base").rglob("*")}
    checkpoint.write_base(run, frozen, copy=True)
    assert {path: path.stat().st_mtime_ns for path in (run / "base").rglob("*")} == copies  # once

    save_file({"w": torch.arange(4.0) + 1}, str(base))  # the same size
    with pytest.raises(CheckpointError, match="1 frozen weights are not those"):
        checkpoint.write_base(run, frozen, copy=True)
    shutil.rmtree(base.parent)
    shutil.rmtree(earlier)
    moved = run.rename(tmp_path / "moved")
    checkpoint.write_base(moved, frozen, copy=True)
    opened = checkpoint.open_checkpoint(moved, checksums=True)
    assert opened.self_contained and opened.where("vision_model.w") == frozen["vision_model.w"]
    assert torch.equal(opened.read("vision_model.w"), torch.arange(4.0))
    assert torch.equal(opened.read("language_model.y"), _slices()[name]["master"])
    assert torch.equal(opened.read_slice("language_model.y", 2, 4), _slices()[name]["master"][2:4])

    (copy,) = (moved / "base").glob("*/model.safetensors")
    save_file({"w": torch.arange(4.0) + 1}, str(copy))
    with pytest.raises(CheckpointError, match=r"the run's copy of .* is missing or has changed"):
        checkpoint.write_base(moved, frozen, copy=True)
    with pytest.raises(CheckpointError, match="has changed since the run started"):
        checkpoint.open_checkpoint(moved, checksums=True)


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


def test_slices_and_the_best(tmp_path: Path) -> None:
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
    with pytest.raises(CheckpointError, match=r"state.json is not what was saved \(its SHA-256 differs"):
        checkpoint.find_step(tmp_path / "best")
    (tmp_path / "step_3" / "COMMITTED").write_text("")  # as in the first version
    assert checkpoint.find_step(tmp_path / "best") == tmp_path / "step_3"
