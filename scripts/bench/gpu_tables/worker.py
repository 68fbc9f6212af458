"""The process that measures: reads a task from stdin, runs its cells one by one, and reports each on stdout.

Task: {"device", "table", "cells": [{"key", ...}], ...}. Lines back: `{"begin": key}` and `{"key", "status", "values"}`.
Out of memory ends a cell and not the process; what kills the process costs the cell that had begun.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

import torch

from gpu_tables.results import DONE, FAILED, OUT_OF_MEMORY

COPY_BYTES = {"cuda": 2**31, "cpu": 2**22}
FLUSHED_BYTES = 2**28  # written between two measurements: several times the L2 of any of these cards
AHEAD_CYCLES = 2_000_000  # about a millisecond in which the host queues what is to be measured


class Timer:
    """Milliseconds of a piece of work: between two events on the stream on a GPU, on the wall on a CPU.

    On a GPU the caches are overwritten before, and the device sleeps while the host queues the work, so that gaps of
    launches do not count; a wait for the device inside the work does.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.flush = torch.empty(FLUSHED_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """(milliseconds, what the work returned)."""
        if not self.cuda:
            begun = time.perf_counter()
            found = work()
            return (time.perf_counter() - begun) * 1e3, found
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        begin.record()
        found = work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), found


def spread(times: list[float]) -> dict[str, Any]:
    """Median with the 20th and 80th percentile, and how many. Example, [3, 1, 2]: 2, 1.4, 2.6, 3."""
    ordered = sorted(times)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8), "runs": len(ordered)}


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def free_all(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def ceiling(cell: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """Table 1: {"ms": spread, "rate": bytes/s read and written, or operations/s}."""
    device, timer = task["device"], Timer(task["device"])
    if cell["what"] == "copy":
        amount = 2.0 * COPY_BYTES[device]
        source, target = (torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))

        def work() -> Any:
            return target.copy_(source)
    else:
        m, n, k = cell["sizes"]
        amount = 2.0 * m * n * k
        a, b = (torch.randn(*shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))

        def work() -> Any:
            return torch.mm(a, b)

    rounds = 50 if device == "cuda" else 3
    times = [timer.time(work)[0] for _ in range(rounds + 5)][5:]
    return {"ms": spread(times), "rate": amount / statistics.median(times) * 1e3}


def about(device: str) -> dict[str, Any]:
    """The machine, for the head of the results."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("triton", "liger_kernel", "transformers", "deepspeed", "flash_attn"):
        try:
            from importlib import metadata

            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if device == "cpu":
        return {"gpu": "cpu", "memory": None, "versions": versions, "cores": os.cpu_count()}
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    versions["cuda"] = str(torch.version.cuda)
    try:
        import subprocess

        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        versions["driver"] = "unknown"
    return {"gpu": properties.name, "memory": properties.total_memory, "versions": versions, "cores": os.cpu_count()}


def _run(cell: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    if task["table"] == 1:
        return ceiling(cell, task)
    if task["table"] == 2:
        from gpu_tables.kernel_cells import measure

        return measure(cell["case"], task["device"])
    from gpu_tables.step_cells import measure_step

    return measure_step(cell, task)


def work(task: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """All cells of a task."""
    torch.manual_seed(0)
    for cell in task["cells"]:
        answer({"begin": cell["key"]})
        try:
            found = {"status": DONE, "values": _run(cell, task)}
        except Exception as error:
            # the frames of the traceback hold the tensors: only text goes on
            kind = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            text = "".join(traceback.format_exception(error)) if kind == FAILED else ""
            print(text, file=sys.stderr, flush=True)
            found = {"status": kind, "error": f"{type(error).__name__}: {error}"[:500]}
        free_all(task["device"])
        answer({"key": cell["key"], **found})


def _end_with_parent() -> None:
    """A bench that is killed leaves no process on the GPU."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> int:
    _end_with_parent()
    out: IO[str] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints goes to the log

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    task = json.load(sys.stdin)
    if task["table"] == 0:
        answer(about(task["device"]))
        return 0
    if task["device"] == "cpu":
        torch.set_num_threads(task.get("threads") or 1)
    work(task, answer)
    out.flush()
    os._exit(0)  # communicators of a GPU may take long to end, and nothing is left to do


if __name__ == "__main__":
    sys.exit(main())
