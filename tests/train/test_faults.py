"""What breaks from outside: a rank that is killed, stopped, stuck or has a bug, at any time of a run.

The others must end by themselves within seconds, with exit 1 and the rank's name, and the run must go on from its last
checkpoint. Ranks are forked by a warm parent (zygote.py), without torchrun, so nobody ends the survivors for us; those
under a real torchrun are in test_processes.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvlm_train import checkpoint
from nvlm_train.attempts import past_attempts
from runs import metrics, trajectory, write_inputs
from zygote import Job, Zygote

SHORT = ["max_steps=7", "checkpoint.every_steps=3", "validation.every_steps=4"]
END_S = 60  # a loaded machine; measured: 1 to 3 s from the fault to the last exit


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as warm:
        yield warm


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(zygote: Zygote, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 7 steps on 2 ranks that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    job = start(zygote, inputs, folder / "run", log=folder / "log")
    assert job.wait(200) == [0, 0], job.text()[-3000:]
    return folder / "run"


def start(zygote: Zygote, recipe: Path, out: Path, *more: str, log: Path, ranks: int = 2, fault: Any = None) -> Job:
    return zygote.start(["train", str(recipe), f"output_dir={out}", *SHORT, *more], ranks=ranks, log=log, fault=fault)


def wait_for(job: Job, word: str, limit_s: float = 120.0) -> None:
    until = time.monotonic() + limit_s
    while word not in job.text() and time.monotonic() < until and None in job.codes():
        time.sleep(0.05)
    assert word in job.text(), job.text()[-3000:]


KILLED = [
    ("fsync", 6, 0),
    ("opening the data", 0, 1),
    ("loading the weights", 0, 0),
    ("data", 5, 1),
    ("forward", 5, 0),
    ("optimizer step", 2, 1),
    ("validation", 4, 0),
    ("fsync", 3, 1),
]


@pytest.mark.parametrize(
    "at, step, rank", [KILLED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in KILLED[1:])]
)
def test_a_rank_killed_at_any_time_is_named_and_the_run_goes_on(
    zygote: Zygote, inputs: Path, whole: Path, tmp_path: Path, at: str, step: int, rank: int
) -> None:
    fault = {"rank": rank, "at": at, "step": step, "how": "kill"}
    job = start(zygote, inputs, tmp_path / "run", log=tmp_path / "log", fault=fault)
    codes = job.wait(120)
    assert codes[rank] == -signal.SIGKILL, job.text()[-3000:]
    assert codes[1 - rank] == 1
    lines = [line for line in job.text().splitlines() if "error: " in line]
    assert len(lines) == 1 and f"rank {rank} (host " in lines[0] and f"process {job.pids[rank]})" in lines[0]
    assert "was lost" in lines[0] and "Start the same command again" in lines[0]
    done = checkpoint.committed_steps(tmp_path / "run")
    kept = f"the last checkpoint is {tmp_path / 'run'}/step_{done[-1]}" if done else "there is no checkpoint yet"
    assert kept in lines[0] and "Traceback" not in job.text()
    (attempt,) = past_attempts(tmp_path / "run")
    assert (attempt.end is None) == (rank == 0)
    if attempt.end is not None:
        assert attempt.end["outcome"] == "lost" and f"rank {rank} (host " in attempt.end["reason"]
    job = start(zygote, inputs, tmp_path / "run", log=tmp_path / "log2")
    assert job.wait(120) == [0, 0], job.text()[-3000:]
    assert trajectory(tmp_path / "run") == trajectory(whole)


@pytest.mark.slow
def test_a_stopped_process_is_named_by_its_silence(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    fault = {"rank": 0, "at": "forward", "step": 3, "how": "stop"}
    job = start(zygote, inputs, tmp_path / "run", "distributed.silent_s=4", log=tmp_path / "log", ranks=3, fault=fault)
    wait_for(job, "gives no sign of life")
    until = time.monotonic() + END_S
    while job.codes() != [None, 1, 1] and time.monotonic() < until:
        time.sleep(0.05)
    assert job.codes() == [None, 1, 1], job.text()[-3000:]
    job.kill()
    assert f"rank 0 (host {os.uname().nodename}, process {job.pids[0]})" in job.text()


def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    fault = {"rank": 1, "at": "data", "step": 4, "how": "hang"}
    job = start(zygote, inputs, tmp_path / "run", "distributed.hang_s=15", log=tmp_path / "log", fault=fault)
    assert job.wait(120) == [1, 1], job.text()[-3000:]
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert "no step has ended for" in line and "distributed.hang_s is 15" in line
    assert f"rank 1 (host {os.uname().nodename}, process {job.pids[1]}) stands in step 4, data; 1 wait for it" in line
    assert "rank 0 in all_reduce (engine/dist.py:" in line
    stuck = (tmp_path / "run" / "stacks_rank_1.txt").read_text()
    assert "this is rank 1 in step 4, data" in stuck and "in strike" in stuck
    assert "all_reduce" in (tmp_path / "run" / "stacks_rank_0.txt").read_text()


@pytest.mark.slow
def test_a_bug_on_one_rank_keeps_its_traceback_and_ends_the_others(
    zygote: Zygote, inputs: Path, tmp_path: Path
) -> None:
    fault = {"rank": 1, "at": "backward", "step": 2, "how": "raise"}
    job = start(zygote, inputs, tmp_path / "run", log=tmp_path / "log", fault=fault)
    assert job.wait(120) == [1, 1], job.text()[-3000:]
    assert job.text().count("Traceback") == 1
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert "rank 1 (host " in line and "failed in step 2, backward: ValueError: a bug of this rank" in line


@pytest.mark.slow
def test_asked_to_stop_while_a_rank_is_stuck_ends_without_a_save(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    """As torchrun does when a host hangs: TERM to all. One of them never comes to the end of the step."""
    fault = {"rank": 0, "at": "optimizer step", "step": 5, "how": "stop"}
    job = start(
        zygote, inputs, tmp_path / "run", "distributed.agree_s=3", "validation=null", log=tmp_path / "log",
        ranks=2, fault=fault,
    )  # fmt: skip
    wait_for(job, "step 4/7")
    stopped = time.monotonic() + 60
    while Path(f"/proc/{job.pids[0]}/stat").read_text().split()[2] != "T" and time.monotonic() < stopped:
        time.sleep(0.05)
    job.signal(signal.SIGTERM, rank=1)
    until = time.monotonic() + END_S
    while job.codes()[1] is None and time.monotonic() < until:
        time.sleep(0.05)
    assert job.codes() == [None, 1], job.text()[-3000:]
    job.kill()
    assert f"rank 0 (host {os.uname().nodename}, process {job.pids[0]}) gives no sign of life" in job.text()
    assert "Nothing was saved" in job.text() and checkpoint.committed_steps(tmp_path / "run") == [3]


@pytest.mark.slow
def test_asked_to_stop_by_a_signal_all_ranks_save_once(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    job = start(zygote, inputs, tmp_path / "run", "max_steps=500", "checkpoint.every_steps=500", log=tmp_path / "log")
    wait_for(job, "step 3/500")
    job.signal(signal.SIGTERM)
    job.signal(signal.SIGTERM)  # SLURM sends it up to three times
    assert job.wait(60) == [0, 0], job.text()[-3000:]
    (saved,) = checkpoint.committed_steps(tmp_path / "run")
    assert (
        metrics(tmp_path / "run")[-1]["step"] == saved
        and job.text().count(f"saved {tmp_path}/run/step_{saved} in") == 1
    )


@pytest.mark.slow
def test_asked_to_stop_before_the_first_step(zygote: Zygote, inputs: Path, tmp_path: Path) -> None:
    fault = {"rank": 1, "at": "loading the weights", "how": "hang"}
    job = start(zygote, inputs, tmp_path / "run", log=tmp_path / "log", fault=fault)
    wait_for(job, "samples of 7 lines")
    time.sleep(2.0)
    job.signal(signal.SIGTERM)
    assert job.wait(60) == [0, 0], job.text()[-3000:]
    assert "asked to stop by SIGTERM before the first step; there is nothing to save" in job.text()
