"""What a run records and shows. metrics.jsonl is the truth; console, wandb and tensorboard are downstream of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import resource
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)

SINK_PATIENCE_S = 20.0  # how long the end of a run waits for wandb or tensorboard to take what is queued


class Clock:
    """Where the time of a step goes. On a GPU the parts are measured by events, which do not stop the device."""

    def __init__(self, device: torch.device) -> None:
        self.events = device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def start(self) -> None:
        """Begins a part; `stop` names it."""
        if self.events:
            self._last = torch.cuda.Event(enable_timing=True)
            self._last.record()
        else:
            self._last = time.perf_counter()

    def stop(self, part: str) -> None:
        """Ends the part begun by the last `start` or `stop`, and begins the next."""
        begun = self._last
        self.start()
        if self.events:
            self._pending.append((part, begun, self._last))
        else:
            self.add(part, self._last - begun)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds by part since the last `take`."""
        if self._pending:
            torch.cuda.synchronize()
            for part, begun, ended in self._pending:
                self.add(part, begun.elapsed_time(ended) / 1000.0)
            self._pending = []
        taken, self.seconds = self.seconds, {}
        return taken


def peak_memory_gib(device: torch.device) -> float:
    """Peak of the device's memory since the start; on a CPU the peak of the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


class MetricsFile:
    """RUN/metrics.jsonl: one line a record, in the order of steps, none twice."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Drops what an attempt wrote after the checkpoint that this one resumes from."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= resumed_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # the half line of a crash
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")

        self._failed = False

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record. A full disk is told once and does not end the run: the next save will say what to do."""
        try:
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); records are lost until it can", self._stream.name, error.strerror
                )
            self._failed = True

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told already
            self._stream.close()


class Console:
    """A progress bar on a terminal, plain lines elsewhere; both on stderr."""

    def __init__(self, first: int, last: int) -> None:
        self.bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.first, self.last, self.begun = first, last, time.monotonic()

    def step(self, record: dict[str, Any]) -> None:
        loss = "not finite, left out" if record.get("skipped") else f"{record['loss']:.4f}"
        text = f"loss {loss}  {record['tokens_per_s']:,.0f} tokens/s  {record['tiles_per_s']:,.0f} tiles/s"
        if self.bar is not None:
            self.bar.n = record["step"]
            self.bar.set_postfix_str(text)
            return
        done = record["step"] - self.first
        left_s = (time.monotonic() - self.begun) / max(done, 1) * (self.last - record["step"])
        rates = " ".join(f"{module} {rate:.2e}" for module, rate in record["lr"].items())
        log.info(
            "step %d/%d  %s  grad norm %s  lr %s  ETA %s",
            record["step"], self.last, text, "-" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}",
            rates, _duration(left_s),
        )  # fmt: skip

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        log.info("%s", text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Sink:
    """wandb or tensorboard in a thread of its own: it may be slow, fail or hang, the run does neither."""

    def __init__(
        self, name: str, start: Callable[[], tuple[Callable[[dict[str, float], int], None], Callable[[], None]]]
    ):
        self.name, self._start = name, start
        self._queue: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(maxsize=10_000)
        self._thread = threading.Thread(target=self._work, name=f"log to {name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            write, finish = self._start()
            while (item := self._queue.get()) is not None:
                write(*item)
            finish()
        except BaseException as error:
            log.warning("logging to %s stopped: %s: %s; metrics.jsonl goes on", self.name, type(error).__name__, error)

    def write(self, record: dict[str, Any]) -> None:
        if self._thread.is_alive():
            try:
                self._queue.put_nowait((_flat(record), record["step"]))
            except queue.Full:
                pass  # it hangs; metrics.jsonl has the record

    def close(self) -> None:
        if self._thread.is_alive():
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(SINK_PATIENCE_S)
            if self._thread.is_alive():
                log.warning(
                    "%s did not finish within %.0f s; its last records may be missing", self.name, SINK_PATIENCE_S
                )


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}/"))
        elif isinstance(value, (int, float)) and name != "step":
            flat[prefix + name] = value
    return flat


def wandb_mode() -> Literal["online", "offline", "disabled", "shared"]:
    """ "online" where wandb can be reached and knows us, else "offline"; what WANDB_MODE says wins."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled", "shared"):
        return asked  # type: ignore[return-value]
    known = bool(os.environ.get("WANDB_API_KEY")) or "api.wandb.ai" in _text_of(Path.home() / ".netrc")
    if not known:
        return "offline"
    try:
        with socket.create_connection(("api.wandb.ai", 443), timeout=2.0):
            return "online"
    except OSError:
        return "offline"


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _wandb_id(run: Path) -> str:
    """An id of this run directory, kept in it: a resume goes on in the same wandb run, a new folder never does."""
    file = run / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(8), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def open_sinks(names: Sequence[str], run: Path, run_name: str, project: str, config: dict[str, Any]) -> list[Sink]:
    """Starts what `log.to` names."""

    def start_wandb() -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
        import wandb

        mode = wandb_mode()
        settings = wandb.Settings(init_timeout=30, silent=True)
        started = wandb.init(
            project=project,
            name=run_name,
            id=_wandb_id(run),
            resume="allow",
            dir=str(run),
            config=config,
            mode=mode,
            settings=settings,
        )
        if mode == "offline":
            log.info("wandb is offline; it logs into %s", run / "wandb")

        def finish() -> None:
            started.finish()
            if mode == "offline":
                log.info("wandb was offline; send its log with: wandb sync %s", run / "wandb" / "offline-*")

        return (lambda values, step: started.log(values, step=step)), finish

    def start_tensorboard() -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))

        def write(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return write, writer.close

    starts = {"wandb": start_wandb, "tensorboard": start_tensorboard}
    return [Sink(name, starts[name]) for name in names]
