"""One training at a time in a run directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nvlm_train.errors import SetupError
from nvlm_train.train import run_lock


def _hold_in_a_child(run: Path) -> tuple[int, int]:
    """A process that holds `run` until the pipe whose writing end is returned is closed; (pid, writing end)."""
    reading, writing = os.pipe()
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        try:
            with run_lock.held(run, 0):
                os.write(go, b"x")
                os.read(reading, 1)
        finally:
            os._exit(0)
    os.close(reading)
    assert os.read(ready, 1) == b"x"
    return pid, writing


def test_a_second_training_is_refused_and_names_the_first(tmp_path: Path) -> None:
    pid, writing = _hold_in_a_child(tmp_path / "run")
    message = rf"in use by process {pid} on host {socket.gethostname()} since .*output_dir of its own"
    with pytest.raises(SetupError, match=message), run_lock.held(tmp_path / "run", 0, wait_s=0.3):
        pass
    with run_lock.held(tmp_path / "run", 1, wait_s=0.3):  # rank 0 alone holds it
        pass
    os.close(writing)
    os.waitpid(pid, 0)
    with run_lock.held(tmp_path / "run", 0, wait_s=0.3):
        assert f"process {os.getpid()} " in (tmp_path / "run" / run_lock.NAME).read_text()
    assert not (tmp_path / "run").exists()  # nothing was written there


def test_one_that_is_killed_leaves_nothing_to_be_removed_by_hand(tmp_path: Path) -> None:
    pid, writing = _hold_in_a_child(tmp_path)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os.close(writing)
    (tmp_path / "recipe.json").touch()
    with run_lock.held(tmp_path, 0, wait_s=0.3):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_folder_that_cannot_be_written_is_told_by_who_needs_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with run_lock.held(tmp_path / "file" / "run", 0, wait_s=0.3):
        pass
