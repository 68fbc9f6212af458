"""Trainings under a real torchrun, as a user starts them: killed, stopped, wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nvlm_train import checkpoint
from nvlm_train.attempts import past_attempts
from runs import metrics, trajectory, validations, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def start(
    recipe: Path, out: Path, *more: str, ranks: int = 2, log: Path, flags: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*torchrun, *flags, "-m", "nvlm_train", "train", str(recipe), f"output_dir={out}", *more]
    return subprocess.Popen(command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True)


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the workers that a torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes], limit_s: float = 120.0) -> None:
    until = time.monotonic() + limit_s
    while time.monotonic() < until and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(record["step"] >= step for record in metrics(run)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow  # the default run has the same from forked ranks: test_chaos.py, test_faults.py
def test_killed_at_a_random_point_and_resumed_equals_never_killed(inputs: Path, tmp_path: Path) -> None:
    """kill -9 of one rank somewhere in a run of 14 steps that saves beside the training; started again, it ends with
    the losses of a whole run that stood still for its saves."""
    log = tmp_path / "log"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    long = ["max_steps=14", "checkpoint.every_steps=2"]
    assert start(inputs, whole, *long, log=log).wait(150) == 0, log.read_text()[-3000:]
    long += ["checkpoint.asynchronous=true"]

    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    process = start(inputs, killed, *long, log=log)
    wait_for_step(killed, dice.randint(1, 8), process)
    time.sleep(dice.random() * 0.2)
    before, rank = len(log.read_text()), dice.randrange(2)
    pid = ranks_of(process)[rank]
    os.kill(pid, signal.SIGKILL)
    assert process.wait(60) != 0
    (line,) = [line for line in log.read_text()[before:].splitlines() if "error: " in line]
    assert f"rank {rank} (host {socket.gethostname()}, process {pid}) was lost" in line
    done = checkpoint.committed_steps(killed)
    assert start(inputs, killed, *long, log=log).wait(150) == 0, log.read_text()[-3000:]
    assert trajectory(killed) == trajectory(whole), f"dice {seed}, resumed from {done[-1:]}"
    assert validations(killed) == validations(whole)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR2", marks=pytest.mark.slow)])
def test_torchrun_passes_signals_on_and_all_ranks_save(inputs: Path, tmp_path: Path, name: str) -> None:
    """The signal goes to torchrun alone, as a batch system sends it. torchrun itself then reports 1, the ranks 0."""
    log, out = tmp_path / "log", tmp_path / "run"
    flags = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"]
    process = start(inputs, out, "max_steps=500", "checkpoint.every_steps=500", log=log, flags=flags)
    wait_for_step(out, 3, process)
    ranks = ranks_of(process)
    os.kill(process.pid, getattr(signal, name))
    process.wait(60)
    (saved,) = checkpoint.committed_steps(out)
    assert f"stopped after step {saved} of 500: asked by {name}" in log.read_text()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks), "a rank was left behind"
    (attempt,) = past_attempts(out)
    assert attempt.end is not None and attempt.end["outcome"] == "stopped" and attempt.end["reason"] == name
    assert attempt.end["last_step"] == attempt.end["saved_step"] == saved and attempt.begin["world_size"] == 2
    assert not (out / "DONE").exists()
    folder = out / "attempts" / attempt.name
    assert "stopped after step" in (folder / "rank_0.log").read_text() and (folder / "rank_1.log").is_file()


def test_alone_is_a_world_of_one_and_user_errors_have_no_traceback(inputs: Path, tmp_path: Path) -> None:
    alone = [sys.executable, "-m", "nvlm_train", "train", str(inputs)]
    done = subprocess.run(
        [*alone, f"output_dir={tmp_path / 'run'}", "max_steps=2", "schedule.warmup_steps=3",
         "log.to=[tensorboard, wandb]"],
        capture_output=True, text=True, timeout=150,
        env={k: v for k, v in os.environ.items() if not k.startswith("WANDB")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "alone: rank 0 of 1" in done.stderr and "from the beginning" in done.stderr
    assert "the run ends in the warm-up, at step 2" in done.stderr  # what `recipe check` warns of
    assert "wandb is offline" in done.stderr and "wandb sync" in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    (attempt,) = past_attempts(tmp_path / "run")
    assert attempt.end is not None and attempt.end["outcome"] == "done" and attempt.last_step == 2
    assert json.loads((tmp_path / "run" / "DONE").read_text())["attempt"] == attempt.name
    done = subprocess.run(
        [*alone, f"output_dir={tmp_path / 'other'}", "tokenizer.path=nowhere"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "nowhere" in done.stderr


@pytest.mark.slow
def test_a_stopped_process_is_noticed_and_the_run_ends(inputs: Path, tmp_path: Path) -> None:
    """SIGSTOP, as of a frozen host: the other rank waits in a collective, says where and for whom, and the job ends."""
    log, out = tmp_path / "log", tmp_path / "run"
    flags = ["--shutdown-timeout", "5"]  # else torchrun waits 30 s for the stopped one
    process = start(inputs, out, "max_steps=500", "distributed.hang_s=4", "validation=null", log=log, flags=flags)
    wait_for_step(out, 2, process)
    stopped = ranks_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    assert process.wait(90) != 0
    text = log.read_text()
    assert "no step has ended for" in text and "distributed.hang_s is 4" in text
    assert f"rank 1 (host {socket.gethostname()}, process {stopped}) gives no sign of life" in text
    assert "its process is stopped" in text
    assert "train/loop.py" in (out / "stacks_rank_0.txt").read_text()


@pytest.mark.slow
def test_without_a_network_start_up_is_not_slower(inputs: Path, tmp_path: Path) -> None:
    """In a network namespace with loopback alone, and a key that makes wandb want its server."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare and ip, to make a network namespace")
    words = [sys.executable, "-m", "nvlm_train", "train", str(inputs), "max_steps=2", "log.to=[wandb]"]
    environ = {**os.environ, "WANDB_API_KEY": "0" * 40}
    seconds = {}
    for name, around in (
        ("outside", []),
        ("inside", ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "-"]),
    ):
        out = tmp_path / name
        mode = {"WANDB_MODE": "offline"} if name == "outside" else {}  # a test never talks to a server
        done = subprocess.run(
            [*around, *words, f"output_dir={out}"], capture_output=True, text=True, timeout=120, env=environ | mode
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (attempt,) = past_attempts(out)
        assert attempt.end is not None
        seconds[name] = attempt.end["first_step_began"] - attempt.begin["started"]
    assert seconds["inside"] < seconds["outside"] + 3.0, seconds  # measured 0.0 to 0.4 s apart
    assert "wandb sync" in done.stderr
