"""Running a function on several real ranks: gloo, DeepSpeed, one process each, kept warm between tests.

Importing deepspeed costs a process seconds, so the groups live for the whole test session:

    results = run_distributed(2, "engine/zero_jobs.py:train_steps", stage=3, ...)   # one result per rank

A job is a function in a file below tests/; it is called as job(rank=..., world_size=..., **arguments) with the process
group running. A job that fails ends its group; the next call starts a new one.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
TIMEOUT_S = 240.0
EXTENSIONS = Path(tempfile.gettempdir()) / f"nvlm_train_tests_{os.getpid()}"  # what DeepSpeed would compile
_groups: dict[int, _Group] = {}


def run_distributed(world_size: int, job: str, **arguments: Any) -> list[Any]:
    """Runs `job` ("file.py:function" below tests/) on warm ranks; returns their results in rank order."""
    group = _groups.get(world_size)
    if group is None:
        group = _groups[world_size] = _Group(world_size)
    try:
        return group.call(job, arguments)
    except BaseException:
        group.end()
        _groups.pop(world_size, None)
        raise


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def load_script(name: str) -> Any:
    """A module of scripts/ by file name, for the functions in it that tests share."""
    return _load(TESTS.parent / "scripts" / name)


class _Group:
    """`world_size` processes with a running process group."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world_size, port, EXTENSIONS, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, job: str, arguments: dict[str, Any]) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((job, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"{job}: rank {rank} gave no answer in {TIMEOUT_S:.0f} s")
            try:
                failed, value = pipe.recv()
            except EOFError:
                raise RuntimeError(f"{job}: the process of rank {rank} died") from None
            if failed:
                raise RuntimeError(f"{job} failed on rank {rank}:\n{value}")
            results.append(value)
        return results

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


@atexit.register
def _end_all() -> None:
    for group in _groups.values():
        group.end()


def _load(path: Path) -> Any:
    name = "_job_" + path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _work(rank: int, world_size: int, port: int, extensions: Path, pipe: Connection) -> None:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in values.items()})
    os.environ["TRITON_INTERPRET"] = "1"  # `kernels: triton` is run by Triton's interpreter; `auto` is not changed
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCH_EXTENSIONS_DIR=str(extensions))
    sys.path.insert(0, str(TESTS))
    import torch

    torch.set_num_threads(1)
    from nvlm_train.engine import dist
    from nvlm_train.engine.launch import resolve_launch

    dist.start(resolve_launch(), timeout_s=TIMEOUT_S)
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            return
        try:
            file, _, function = job.partition(":")
            call: Callable[..., Any] = getattr(_load(TESTS / file), function)
            pipe.send((False, call(rank=rank, world_size=world_size, **arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
