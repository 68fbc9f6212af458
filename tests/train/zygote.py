"""A warm parent for trainings that are to be killed: it has imported everything, and forks ranks on demand.

Importing torch and deepspeed takes a process ten seconds; a fork takes none. Each rank is a process of its own, runs
the command line as a user would, and can be killed, stopped and signalled.

    with Zygote() as zygote:
        job = zygote.start(["train", recipe, ...], ranks=2, log=path)
        os.kill(job.pids[1], signal.SIGKILL)
        assert job.wait(60) == [1, -9]

A *fault* is injected into one rank: `{"rank": 1, "at": "save", "step": 4, "how": "kill"}`. at: a phase of
`train.watch`, "fsync" (in the middle of a save), or a function of `train.preflight`. how: kill, stop, hang (busy, in
no collective), raise, full (the disk).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

TESTS = Path(__file__).parents[1]


class Job:
    """Ranks that a zygote has forked."""

    def __init__(self, zygote: Zygote, pids: list[int], log: Path) -> None:
        self.zygote, self.pids, self.log = zygote, pids, log

    def codes(self) -> list[int | None]:
        """Exit codes, negative for signals, None for ranks that run."""
        return [self.zygote.ended.get(pid) for pid in self.pids]

    def wait(self, limit_s: float) -> list[int | None]:
        """Waits for all ranks; exit codes. Kills what is still there at the end."""
        until = time.monotonic() + limit_s
        while None in self.codes() and time.monotonic() < until:
            time.sleep(0.02)
        found = self.codes()
        self.kill()
        return found

    def kill(self) -> None:
        for pid, code in zip(self.pids, self.codes(), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 10
        while None in self.codes() and time.monotonic() < until:
            time.sleep(0.02)

    def signal(self, number: int, rank: int | None = None) -> None:
        for one, pid in enumerate(self.pids):
            if rank in (None, one) and self.zygote.ended.get(pid) is None:
                os.kill(pid, number)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Zygote:
    """The parent process. `start` forks the ranks of one job."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        self._answers: dict[int, list[int]] = {}
        self._arrived = threading.Condition()
        self._number = 0
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            with self._arrived:
                if "pids" in said:
                    self._answers[said["number"]] = said["pids"]
                else:
                    self.ended[said["pid"]] = said["code"]
                self._arrived.notify_all()

    def start(
        self,
        argv: Sequence[str],
        *,
        ranks: int,
        log: Path,
        fault: dict[str, Any] | None = None,
        samples: Path | None = None,
        one_a_node: bool = False,
    ) -> Job:
        """Forks the ranks. samples: a folder where each rank writes which samples it trained on.

        one_a_node: rank N is alone on the node "nodeN", as far as SLURM's variables tell it.
        """
        from helpers import free_port

        self._number += 1
        order = {
            "number": self._number, "argv": list(argv), "ranks": ranks, "log": str(log), "fault": fault,
            "port": free_port(), "samples": None if samples is None else str(samples),
            "one_a_node": one_a_node,
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        with self._arrived:
            if not self._arrived.wait_for(lambda: order["number"] in self._answers, timeout=180):
                raise TimeoutError("the zygote did not start")
        return Job(self, self._answers[order["number"]], log)


# ------------------------------------------------------------------------------------------------- in the zygote itself


def _serve() -> None:
    import deepspeed  # noqa: F401
    import torch

    import nvlm_train.train.loop  # noqa: F401

    torch.set_num_threads(1)
    orders = threading.Thread(target=_reap, daemon=True)
    orders.start()
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["ranks"]):
            with _forking:
                pid = os.fork()
                if pid == 0:
                    _be_rank(rank, order)
                _children.add(pid)
            pids.append(pid)
        _say({"number": order["number"], "pids": pids})
    for pid in list(_children):
        os.kill(pid, signal.SIGKILL)


_children: set[int] = set()
_forking = threading.Lock()


def _say(value: dict[str, Any]) -> None:
    os.write(1, (json.dumps(value) + "\n").encode())


def _reap() -> None:
    while True:
        with _forking:
            for pid in list(_children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    _children.discard(pid)
                    _say({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
        time.sleep(0.02)


def _be_rank(rank: int, order: dict[str, Any]) -> None:
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(order["ranks"])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]))
        if order["one_a_node"]:
            os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", SLURMD_NODENAME=f"node{rank}")
        if order["samples"] is not None:
            _record_samples(Path(order["samples"]), order["number"], rank)
        if order["fault"] is not None and order["fault"]["rank"] == rank:
            _inject(order["fault"])
        from nvlm_train.cli import main

        code = main(order["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _record_samples(folder: Path, attempt: int, rank: int) -> None:
    """Writes {attempt, step, samples} for each step that this rank takes from its loader."""
    from nvlm_train.data.loader import StepLoader

    original = StepLoader.__next__
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / f"{attempt}_{rank}.jsonl").open("a")

    def recorded(self: StepLoader) -> Any:
        data = original(self)
        refs = [list(ref) for batch in data.micro_batches for ref in batch.samples]
        stream.write(json.dumps({"attempt": attempt, "step": data.step + 1, "samples": refs}) + "\n")
        stream.flush()
        return data

    StepLoader.__next__ = recorded  # type: ignore[method-assign]


def _inject(fault: dict[str, Any]) -> None:
    from nvlm_train.train.watch import Watch

    original_mark, original_fsync = Watch.mark, os.fsync
    here = {"phase": "", "step": 0}

    def strike() -> None:
        how, fault["how"] = fault["how"], "done"
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "hang":
            while True:
                time.sleep(1.0)
        elif how == "raise":
            raise ValueError("a bug of this rank")
        elif how == "full":
            raise OSError(28, "No space left on device")

    def mark(self: Watch, phase: str, step: int | None = None) -> None:
        original_mark(self, phase, step)
        here.update(phase=phase, step=self._step)
        if phase == fault["at"] and self._step >= fault.get("step", 0):
            strike()

    def fsync(descriptor: int) -> None:
        if fault["at"] == "fsync" and here["phase"] == "save" and here["step"] >= fault.get("step", 0):
            strike()
        original_fsync(descriptor)

    if fault["at"].startswith("check_"):
        from nvlm_train.train import preflight

        original_check = getattr(preflight, fault["at"])

        def check(*given: Any) -> Any:
            strike()
            return original_check(*given)

        setattr(preflight, fault["at"], check)
    Watch.mark, os.fsync = mark, fsync  # type: ignore[method-assign]


if __name__ == "__main__":
    _serve()
