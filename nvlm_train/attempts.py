"""Attempts of a run: what each start of it left behind, and what a batch script should do after one has ended.

A run that is preempted, requeued or killed is started many times. Each start is an attempt with a folder:

    RUN/attempts/JOB.RESTART/       under SLURM; local-DATE-TIME.RESTART elsewhere; NVLM_ATTEMPT names it otherwise
        begin.json                  when, where, from which step; versions, devices and variables (no secrets)
        rank_N.log                  what rank N logged, at full detail
        heartbeat.json              time, step and phase of rank 0, every few seconds
        nccl_trace_rank_N           NCCL's flight recorder, where a collective timed out
        end.json                    written last; an attempt without it was killed
    RUN/DONE                        the run has reached its end

`python -m nvlm_train.attempts next RUN --attempt NAME --rc RC` says what follows. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import logging.handlers
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nvlm_train.log import FORMAT

BEAT_S = 5.0
EXIT_CODES = {"done": 0, "requeue": 10, "stop": 11}
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|COOKIE|JWT|AUTH", re.IGNORECASE)  # SLURM_JWT is one
_LOGIN = re.compile(r"://[^/@\s]+@")  # in an address
_SHOWN = re.compile(
    r"SLURM_|CUDA_|NCCL_|TORCH|OMP_|MKL_|HF_|TRANSFORMERS_|DS_|NVLM_|WANDB_|FI_|UCX_|GLOO_|MASTER_|RANK$|WORLD_SIZE$|"
    r"LOCAL_|PYTHON|TRITON_|HOSTNAME$|VIRTUAL_ENV$|CONDA_PREFIX$"
)


def attempt_name(environ: Mapping[str, str] = os.environ) -> str:
    """The name of this start, the same on all ranks of a SLURM job: `JOB.RESTART`, of an array `ARRAYJOB_TASK.RESTART`.

    Elsewhere it says when rank 0 started: `local-20261126-225700.0`, the last number counting torchrun's restarts.
    """
    if environ.get("NVLM_ATTEMPT"):
        return re.sub(r"[^\w.+-]", "_", environ["NVLM_ATTEMPT"])
    if job := environ.get("SLURM_JOB_ID"):
        array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else job
        return f"{job}.{environ.get('SLURM_RESTART_COUNT') or 0}"
    restart = environ.get("TORCHELASTIC_RESTART_COUNT") or "0"
    return f"local-{time.strftime('%Y%m%d-%H%M%S')}.{restart}"


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint of a run; 0 where there is none."""
    steps = [int(f.name[5:]) for f in run.glob("step_*") if f.name[5:].isdigit() and (f / "COMMITTED").is_file()]
    return max(steps, default=0)


def logged_step(run: Path) -> int:
    """Step of the last line of metrics.jsonl: how far the attempt before came, until this one cuts the file."""
    with contextlib.suppress(OSError), (run / "metrics.jsonl").open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 16)))
        for line in reversed(stream.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def _write(path: Path, value: Any) -> None:
    """Old file or new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


# ------------------------------------------------------------------------------------------------------- for a training


class Attempt:
    """This process's part in the attempt. It never stops a training: what cannot be written is told once."""

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self.rank = run, rank
        self.folder: Path | None = None
        self.reason = ""  # the last words of whoever ends this rank
        self._place: tuple[int, str] = (0, "start-up")
        self._started: float | None = None  # when the first step began
        self._first = 0
        self._ended = threading.Event()
        self._logger = logging.getLogger("nvlm_train")
        self._early = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        self._logger.addHandler(self._early)
        self._file: logging.Handler | None = None

    def begin(self, facts: Mapping[str, Any], from_step: int) -> None:
        """Rank 0: makes the folder and begin.json, and tells the other ranks in `share`."""
        name = self._make(attempt_name())
        self._first = from_step
        begin = {
            "attempt": name,
            "started": time.time(),
            "from_step": self._first,
            "logged_step": logged_step(self.run),
            "nodes": nodes_of_job(),
            "command": sys.argv,
            "environment": shown_environment(os.environ),
            "gpus": _gpus(),
            **facts,
        }
        with self._told("begin.json"):
            _write(self.run / "attempts" / name / "begin.json", begin)
        with self._told("DONE"):
            (self.run / "DONE").unlink(missing_ok=True)  # it goes on: max_steps was raised
        self.join(name)
        threading.Thread(target=self._beat, name="heartbeat.json", daemon=True).start()

    def share(self, store: Any) -> None:
        """Agrees on the folder through the job's store (torch.distributed.Store), once all ranks have met."""
        if self.rank == 0:
            store.set("attempt", self.folder.name if self.folder is not None else "")
        elif name := store.get("attempt").decode():
            self.join(name)

    def join(self, name: str) -> None:
        """Opens rank_N.log in the folder that rank 0 made, with what was logged so far."""
        self.folder = self.run / "attempts" / name
        with self._told(f"rank_{self.rank}.log"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = logging.FileHandler(self.folder / f"rank_{self.rank}.log", encoding="utf-8")
            self._file.setFormatter(logging.Formatter(FORMAT))
            self._early.setTarget(self._file)
            self._early.flush()
            self._logger.addHandler(self._file)
        self._logger.removeHandler(self._early)
        if not shutil.which("nvidia-smi"):
            return
        # NCCL's flight recorder: torch adds the rank; the first name is the older one
        for variable in ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"):
            os.environ.setdefault(variable, str(self.folder.absolute() / "nccl_trace_rank_"))
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")

    def mark(self, step: int, phase: str) -> None:
        """Where this rank stands, for heartbeat.json."""
        self._place = (step, phase)

    def started(self) -> None:
        """The first step begins."""
        self._started = time.time()

    def end(self, outcome: str, reason: str = "", **facts: Any) -> None:
        """Rank 0 writes end.json; every rank closes its log. The first call counts.

        outcome: "done" the run reached its end; "stopped" somebody asked and it was saved; "failed" an error that would
        come again (the user's to mend, where `user` is true); "lost" another rank or a hang ended it.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        if self._file is not None:
            level = logging.INFO if outcome in ("done", "stopped") else logging.ERROR
            record = logging.LogRecord("nvlm_train", level, __file__, 0, f"{outcome}: {reason}", None, None)
            self._file.handle(record)
            self._logger.removeHandler(self._file)
            self._file.close()
        self._logger.removeHandler(self._early)
        if self.rank != 0 or self.folder is None:
            return
        step, phase = self._place
        now = time.time()
        if phase not in ("validation", "save"):  # the step at work has not ended
            step -= 1
        step = max(step, self._first)
        value = {
            "outcome": outcome,
            "reason": reason,
            "ended": now,
            "from_step": self._first,
            "last_step": step,
            "phase": phase,
            "saved_step": newest_step(self.run),
            "first_step_began": self._started,
            **facts,
        }
        with self._told("end.json"):
            _write(self.folder / "end.json", value)
            if outcome == "done":
                _write(self.run / "DONE", {"step": step, "ended": now, "attempt": self.folder.name})

    def _make(self, name: str) -> str:
        parent, wanted, number = self.run / "attempts", name, 1
        with self._told("attempts"):
            parent.mkdir(parents=True, exist_ok=True)
            while (parent / name / "begin.json").exists():  # started again inside one job
                number += 1
                name = f"{wanted}-{number}"
            (parent / name).mkdir(exist_ok=True)
        return name

    def _beat(self) -> None:
        assert self.folder is not None
        while True:
            step, phase = self._place
            with contextlib.suppress(OSError):
                beat = {"time": time.time(), "step": step, "phase": phase, "first_step_began": self._started}
                _write(self.folder / "heartbeat.json", beat)
            if self._ended.wait(BEAT_S):
                return

    @contextlib.contextmanager
    def _told(self, what: str) -> Any:
        try:
            yield
        except OSError as error:
            self._logger.warning("%s of this attempt cannot be written (%s)", what, error)


def mark_done(run: Path, step: int) -> None:
    """Writes RUN/DONE of a run that was complete before there was such a file."""
    with contextlib.suppress(OSError):
        if not (run / "DONE").exists():
            _write(run / "DONE", {"step": step, "ended": time.time(), "attempt": None})


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that explain a training, without what could be a secret."""
    shown = {key: value for key, value in sorted(environ.items()) if _SHOWN.match(key)}
    return {
        key: "(not shown)" if _SECRET.search(key) else _LOGIN.sub("://(not shown)@", value)
        for key, value in shown.items()
    }


def nodes_of_job() -> list[str]:
    """Names of the SLURM job's nodes, in its order; outside of one, this host."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if nodelist and shutil.which("scontrol"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=10, check=True
            )
            return listed.stdout.split()
    return [nodelist] if nodelist else [platform.node()]


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return []


# -------------------------------------------------------------------------------------------------- after it has ended


class Past(NamedTuple):
    """An attempt as its folder tells it. end: None where it was killed, or is still running."""

    name: str
    begin: dict[str, Any]
    end: dict[str, Any] | None
    heartbeat: dict[str, Any] | None

    @property
    def ended(self) -> float:
        """When it ended, as far as is known (seconds since the epoch)."""
        return float((self.end or {}).get("ended") or (self.heartbeat or {}).get("time") or self.begin["started"])

    @property
    def last_step(self) -> int:
        """The last step it is known to have reached."""
        if self.end is not None and "last_step" in self.end:
            return int(self.end["last_step"])
        beat = self.heartbeat or {}
        return max(int(beat.get("step") or 0) - 1, int(self.begin["from_step"]))


def past_attempts(run: Path) -> list[Past]:
    """All attempts of a run, in the order in which they began. Folders without a readable begin.json are left out."""
    found = []
    for folder in (run / "attempts").glob("*"):
        begin = _read(folder / "begin.json")
        if begin is not None and "started" in begin and "from_step" in begin:
            found.append(Past(folder.name, begin, _read(folder / "end.json"), _read(folder / "heartbeat.json")))
    return sorted(found, key=lambda past: float(past.begin["started"]))


class Decision(NamedTuple):
    """word: "done", "requeue" or "stop"; why: one line."""

    word: str
    why: str


def decide(
    done: bool,
    attempts: Sequence[Past],
    newest: int,
    *,
    rc: int,
    warned: bool = False,
    cancelled: bool = False,
    max_without_progress: int = 3,
) -> Decision:
    """What a batch script does after an attempt.

    done: RUN/DONE is there. attempts: all, the one that has just ended last. newest: step of the newest checkpoint.
    rc: exit code of the training (srun's). warned: the scheduler announced the end (time limit, preemption).
    cancelled: a person ended the job.
    """
    if done:
        return Decision("done", "the run has reached its end")
    if cancelled:
        return Decision("stop", "the job was cancelled; submit it again to go on")
    last = attempts[-1] if attempts else None
    end = (last.end if last is not None else None) or {}
    if end.get("user") or (rc == 2 and not warned):
        why = str(end.get("reason") or "an error that starting again would not mend (exit code 2)")
        return Decision("stop", why.splitlines()[0])
    reason = str(end.get("reason") or "")
    if end.get("outcome") == "stopped" and (reason.startswith("file ") or reason == "SIGINT"):
        return Decision("stop", f"somebody asked it to stop ({reason}); submit it again to go on")
    idle = 0
    for past in reversed(attempts):
        if int(past.begin["from_step"]) < newest:
            break
        idle += 1
    if idle >= max_without_progress:
        return Decision("stop", f"{idle} attempts in a row saved nothing beyond step {newest}; see the last rank_0.log")
    if end.get("outcome") == "stopped":
        return Decision("requeue", f"stopped by {reason}, saved at step {newest}")
    if end:
        return Decision("requeue", f"{end['outcome']}: {reason.splitlines()[0] if reason else 'no reason is known'}")
    return Decision("requeue", f"ended without a word (exit code {rc}); the newest checkpoint is of step {newest}")


def next_command(args: argparse.Namespace) -> int:
    """`python -m nvlm_train.attempts next`."""
    run = Path(args.run)
    if not any(past.name == args.attempt or past.name.startswith(f"{args.attempt}-") for past in past_attempts(run)):
        # the training did not come as far as its folder: it counts as an attempt all the same
        folder = run / "attempts" / args.attempt
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "begin.json", {
            "attempt": args.attempt, "started": time.time(), "from_step": newest_step(run), "nodes": nodes_of_job(),
            "by": "batch script: the training did not start",
        })  # fmt: skip
    decision = decide(
        (run / "DONE").exists(),
        past_attempts(run),
        newest_step(run),
        rc=args.rc,
        warned=bool(args.warned),
        cancelled=bool(args.cancelled),
        max_without_progress=args.max_without_progress,
    )
    print(f"{decision.word}: {decision.why}")
    return EXIT_CODES[decision.word]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nvlm_train.attempts",
        description="What a batch script does after an attempt: prints done, requeue or stop with the reason.",
        epilog="exit codes: 0 done, 10 requeue, 11 stop\n\nexample:\n"
        '  python -m nvlm_train.attempts next runs/sft --attempt "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rc 1',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    following = verbs.add_parser("next", help="after an attempt has ended", allow_abbrev=False)
    following.add_argument("run", help="the run directory")
    following.add_argument("--attempt", required=True, help="its name, JOB.RESTART")
    following.add_argument("--rc", type=int, required=True, help="exit code of the training")
    following.add_argument("--warned", type=int, choices=(0, 1), default=0, help="1: the scheduler announced the end")
    following.add_argument("--cancelled", type=int, choices=(0, 1), default=0, help="1: a person ended the job")
    following.add_argument(
        "--max-without-progress", type=int, default=3, help="attempts in a row without a new checkpoint (default 3)"
    )
    return next_command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
