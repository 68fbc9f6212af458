"""The watch of one rank: silent while it gets on, loud when it does not. Several ranks: test_faults.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.engine.launch import resolve_launch
from nvlm_train.recipe.schema import Distributed
from nvlm_train.train import watch as module
from nvlm_train.train.stop import StopRequest
from nvlm_train.train.watch import Watch, waits_in


class Ended:
    """Takes the place of os._exit."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


def open_watch(run: Path, stop: StopRequest, end: Ended, **limits: int) -> Watch:
    return Watch(resolve_launch({}), Distributed(**limits), run, stop, end)


def test_a_stuck_rank_tells_where_and_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    end = Ended()

    def stuck_in_a_collective() -> None:
        end.event.wait(30)

    with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, end, hang_s=2) as watch:
        watch.started()
        for step in range(8):  # longer than the limit in all, never silent for so long
            time.sleep(0.4)
            watch.mark("forward", step)
            watch.alive()
        assert not end.codes
        stuck_in_a_collective()
    assert end.codes == [1]
    said = capfd.readouterr().err
    assert "no step has ended for" in said and "distributed.hang_s is 2" in said and "in step 7, forward" in said
    text = (tmp_path / "stacks_rank_0.txt").read_text()
    assert "this is rank 0 in step 7, forward" in text and "stuck_in_a_collective" in text


def test_it_ends_with_the_run_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    before, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    handler, begun = signal.getsignal(signal.SIGTERM), time.monotonic()
    for _ in range(5):
        with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, Ended()):
            assert threading.active_count() == before + 1
    assert time.monotonic() - begun < 2
    assert threading.active_count() == before and not (tmp_path / "stacks_rank_0.txt").exists()
    assert signal.getsignal(signal.SIGTERM) is handler and len(os.listdir("/proc/self/fd")) == fds


def test_a_process_that_was_stopped_itself_blames_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol suspend` stops all ranks for an hour: that is no hour without a step."""
    end, now = Ended(), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, end, hang_s=60) as watch:
        watch.started()
        now[0] += 3600.0
        assert not end.event.wait(1.2)


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_asked_to_stop_before_the_first_step_it_ends_even_if_python_does_not_run(
    tmp_path: Path, name: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The main thread waits in C, where no Python handler of a signal runs; the watch hears it all the same."""
    end = Ended()
    with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, end):
        threading.Timer(0.2, os.kill, (os.getpid(), getattr(signal, name))).start()
        end.event.wait(20)
    assert end.codes[:1] == [code]
    assert f"asked to stop by {name} before the first step; there is nothing to save" in capfd.readouterr().err


def test_ranks_asked_to_stop_have_a_deadline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    end = Ended()
    with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, end, agree_s=1) as watch:
        watch.started()
        watch.mark("save", 4)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not end.event.wait(2.0)  # a save may take as long as it takes
        watch.mark("optimizer step", 5)
        end.event.wait(20)
    assert end.codes[:1] == [1]
    said = capfd.readouterr().err
    assert "asked to stop by SIGUSR2" in said and "distributed.agree_s is 1" in said

    end = Ended()
    with StopRequest(tmp_path, "USR2", watch_files=True) as stop, open_watch(tmp_path, stop, end, agree_s=1) as watch:
        watch.started()
        os.kill(os.getpid(), signal.SIGUSR2)
        watch.stop_agreed()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not end.event.wait(2.0)


def test_a_collective_is_known_by_its_frames(tmp_path: Path) -> None:
    ours = str(Path(module.__file__).parents[1] / "train" / "loop.py")
    collective = "/somewhere/torch/distributed/distributed_c10d.py"
    space: dict[str, Any] = {}
    for file, source in [
        (collective, "def _wait(go):\n    go()\ndef all_reduce(go):\n    _wait(go)\n"),
        (ours, "def step(go):\n    all_reduce(go)\ndef load(go):\n    go()\n"),
    ]:
        exec(compile(source, file, "exec"), space)
    found: list[str] = []

    def look() -> None:
        found.append(waits_in(sys._getframe(0)))

    space["step"](look)
    space["load"](look)
    assert found == ["all_reduce (train/loop.py:2)", ""]
