"""A process in which Triton's interpreter runs our kernels on the CPU, kept warm between tests.

The interpreter is chosen when a kernel is defined, by TRITON_INTERPRET=1; in pytest's own process kernels are real, so
that they can be compiled ahead of time.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240.0
_worker: list[tuple[Any, Connection]] = []


def run_interpreted(case: str, *arguments: Any) -> Any:
    """Calls `case` of triton_cases.py there, and returns what it does; its failure is raised with its traceback."""
    if not _worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            process.start()
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
        theirs.close()
        _worker.append((process, ours))
    process, pipe = _worker[0]
    pipe.send((case, arguments))
    try:
        if not pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"{case} gave no answer in {TIMEOUT_S:.0f} s")
        failed, value = pipe.recv()
    except (EOFError, TimeoutError):
        _end()
        raise
    if failed:
        raise AssertionError(f"{case}{arguments} failed in the interpreter:\n{value}")
    return value


@atexit.register
def _end() -> None:
    for process, _ in _worker:
        process.kill()
        process.join(10)
    _worker.clear()


def _work(pipe: Connection) -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # one case compiles
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, getattr(importlib.import_module("triton_cases"), case)(*arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
