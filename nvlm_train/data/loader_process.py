"""The loader process: a rank's decode threads in a process of their own (`data.loader: process`).

    trainer                                       loader process (python -m nvlm_train.data.loader_process)
    LoaderProcess.submit -- job: packs, chunks --> Builder: threads read, decode, cut
    receiving thread     <-- batch without pixels, and the memory that holds them (a file descriptor)

Each batch's tiles lie in a piece of anonymous memory (memfd) of its own, which the decode threads write and the trainer
maps: pixels are never pickled or copied, and since the memory has no name, nothing is left behind however either side
ends; it is free as soon as the last tensor on it is gone.

The process asks nothing of its surroundings: jobs are pure, so when it dies it is started again and gets the jobs that
are open. It ignores the signals that ask a training to stop (the trainer decides), and it ends by itself when the
trainer is gone: its socket closes, and it looks for its parent every second.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.assembly import Builder, Built, Closed
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger, set_up_logging

log = get_logger(__name__)

MAX_DEATHS = 3  # in a row, without a batch in between
_CLOSE_S = 2.0  # for the process to end by itself
_ASK_TO_STOP = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_HEAD = struct.Struct("<BQ")  # whether a file descriptor comes with it, bytes of the message


class _Gone(Exception):
    """The other side of the socket has closed it."""


# ---------------------------------------------------------------------------------------------------------- messages


def _send(connection: socket.socket, message: bytes, descriptor: int | None = None) -> None:
    head = _HEAD.pack(descriptor is not None, len(message))
    # The descriptor travels with the first byte alone, so that it cannot end up in the middle of a longer read.
    if descriptor is not None:
        socket.send_fds(connection, [head[:1]], [descriptor])
        head = head[1:]
    connection.sendall(head)
    connection.sendall(message)


def _receive(connection: socket.socket) -> tuple[bytearray, int | None]:
    try:
        first, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as error:
        raise _Gone from error
    if not first:
        raise _Gone
    descriptor = descriptors[0] if descriptors else None
    try:
        _, size = _HEAD.unpack(first + _exactly(connection, _HEAD.size - 1))
        return _exactly(connection, size), descriptor
    except _Gone:
        if descriptor is not None:
            os.close(descriptor)
        raise


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        try:
            got = connection.recv_into(view[at:])
        except OSError as error:
            raise _Gone from error
        if not got:
            raise _Gone
        at += got
    return data


class _PlanPickler(pickle.Pickler):
    """Memory-mapped arrays travel as the name of their file: an index of 10^7 samples is mapped again, not copied."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.memmap) and isinstance(obj.base, mmap.mmap) and obj.filename is not None:
            return np.memmap, (str(obj.filename), obj.dtype, "r", obj.offset, obj.shape)
        return NotImplemented


def _anonymous_file(num_bytes: int) -> int:
    """The descriptor of memory without a name; a file without a name where there is no memfd."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("nvlm-tiles", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


# The order of data is the trainer's: arrays as long as the sources, of which the process needs nothing.
_ORDER: dict[str, Any] = dict(mixture=None, windows=None, steps=None, train_rows={}, held_out={}, _dealt={})


def _packed_plan(plan: DataPlan) -> int:
    """What the process needs of a plan, all but the order of data, in a file that every new process can read."""
    descriptor = _anonymous_file(0)
    with open(os.dup(descriptor), "wb") as file:
        _PlanPickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(replace(plan, **_ORDER))
    return descriptor


def _unpacked_plan(descriptor: int) -> DataPlan:
    """Written by the trainer that started this process, and read by nobody else."""
    plan: DataPlan = pickle.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    os.close(descriptor)
    return plan


def _without_pixels(built: Built) -> Built:
    tiles = built.arrays["tiles"]
    return replace(built, arrays={**built.arrays, "tiles": tiles.shape})


def _with_pixels(built: Built, descriptor: int | None) -> Built:
    shape = built.arrays["tiles"]
    if descriptor is None:
        tiles = np.empty(shape, dtype=np.uint8)  # [0, 3, px, px]
    else:
        memory = mmap.mmap(descriptor, int(np.prod(shape)))  # stays mapped as long as there is a tensor on it
        tiles = np.frombuffer(memory, dtype=np.uint8).reshape(shape)  # [T, 3, px, px]
    return replace(built, arrays={**built.arrays, "tiles": tiles})


# --------------------------------------------------------------------------------------------------- the trainer's side


@dataclass(frozen=True)
class _Open:
    """A job without an answer yet."""

    message: bytes
    future: Future[Built]
    packs: Sequence[Pack]


class LoaderProcess:
    """Builds batches like `assembly.Builder`, in another process."""

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self._packed = _packed_plan(plan)
        self._lock = threading.Lock()
        self._jobs: dict[int, _Open] = {}
        self._next = 0
        self._deaths = 0
        self._closing = False
        self._ended: BaseException | None = None  # why no job will be answered any more
        self._process, self._connection = self._start()
        self._receiver = threading.Thread(target=self._receive_all, name="nvlm-loader-process", daemon=True)
        self._receiver.start()

    @property
    def pid(self) -> int:
        """Of the process that is loading just now."""
        return self._process.pid

    def submit(self, packs: Sequence[Pack], num_tile_chunks: int) -> Future[Built]:
        """The batch of these packs, as soon as it is there."""
        future: Future[Built] = Future()
        with self._lock:
            number, self._next = self._next, self._next + 1
            job = _Open(pickle.dumps((number, list(packs), num_tile_chunks)), future, packs)
            if self._ended is None:
                self._jobs[number] = job
                self._tell(job)
            else:
                future.set_exception(self._ended)
        return future

    def close(self) -> None:
        """Ends the process, by force where it does not end itself. May be called twice."""
        with self._lock:
            self._closing = True
            process, connection = self._process, self._connection
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone already
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            try:
                process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:  # stuck in the kernel, on a read of a storage that is gone
                log.warning("the loader process %d does not end; it hangs in a read", process.pid)
        if self._receiver is not threading.current_thread():
            self._receiver.join(_CLOSE_S)
        connection.close()
        if self._packed >= 0:
            os.close(self._packed)
            self._packed = -1
        self._fail(Closed())

    def _tell(self, job: _Open) -> None:
        try:
            _send(self._connection, job.message)
        except OSError:
            pass  # it has died; the receiving thread notices and sends all open jobs to the next one

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        passed = (theirs.fileno(), self._packed)
        asked = {getattr(signal, name) for name in _ASK_TO_STOP if hasattr(signal, name)}
        # Blocked while the process starts, and so from its first moment on: a signal to the whole job must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, asked)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "nvlm_train.data.loader_process", *map(str, passed)],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        return process, ours

    def _receive_all(self) -> None:
        while True:
            try:
                data, descriptor = _receive(self._connection)
            except _Gone:
                try:
                    if self._closing or not self._again():
                        return
                except BaseException as error:  # no process can be started any more
                    self._fail(error)
                    return
                continue
            try:
                number, kind, content = pickle.loads(data)
                with self._lock:
                    job = self._jobs.pop(number, None)
                    self._deaths = 0
                if job is None:
                    continue
                if kind == "built":
                    job.future.set_result(_with_pixels(content, descriptor))
                else:
                    job.future.set_exception(_error(kind, content))
            except BaseException as error:  # whatever it is, the trainer must hear of it
                self._fail(error)
                return
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def _again(self) -> bool:
        """Starts the process anew and gives it the open jobs; False where that is no use."""
        code = self._process.wait()
        with self._lock:
            if self._closing:
                return False
            self._deaths += 1
            self._connection.close()
            jobs = [self._jobs[number] for number in sorted(self._jobs)]
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            if self._deaths < MAX_DEATHS:
                log.warning(
                    "rank %d: the loader process ended %s; started again, %d batches to make",
                    self._plan.rank,
                    how,
                    len(jobs),
                )
                self._process, self._connection = self._start()
                for job in jobs:
                    self._tell(job)
                return True
        self._fail(
            DataError(
                f"rank {self._plan.rank}: the loader process ended {how}, {self._deaths} times in a row without a batch"
                f" in between{_names(jobs)}. If memory ran out, lower data.prefetch_bytes or "
                "data.num_threads; data.loader: inprocess shows a crash where it happens."
            )
        )
        return False

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._ended = self._ended or error
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.future.set_exception(error)


def _names(jobs: Sequence[_Open]) -> str:
    refs = [f"{ref.source}:{ref.row}" for job in jobs[:1] for item in job.packs for ref in item.samples]
    return f", at samples {', '.join(refs[:8])}{' ...' if len(refs) > 8 else ''} or behind" if refs else ""


def _error(kind: str, content: Any) -> BaseException:
    if kind == "data error":
        return DataError(content)
    return RuntimeError(f"in the loader process:\n{content}")


# --------------------------------------------------------------------------------------------------- the process's side


class _Piece(mmap.mmap):
    """Anonymous memory that knows its descriptor. The descriptor goes with the object, not with the address: another
    thread may get the same address before Python has told that this one is gone."""

    descriptor = -1

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _shared(num_bytes: int) -> NDArray[np.uint8]:
    """u8[num_bytes] in a piece of memory of its own that can be sent to another process; not touched yet."""
    if num_bytes == 0:
        return np.empty(0, dtype=np.uint8)
    descriptor = _anonymous_file(num_bytes)
    try:
        piece = _Piece(descriptor, num_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    piece.descriptor = descriptor
    return np.frombuffer(piece, dtype=np.uint8)


def _descriptor_of(tiles: NDArray[np.uint8]) -> int:
    """A descriptor of the memory that `tiles` of `_shared` lie at the beginning of; the caller closes it."""
    base: Any = tiles
    while not isinstance(base, _Piece):
        base = base.obj if isinstance(base, memoryview) else base.base
    return os.dup(base.descriptor)


def main(socket_descriptor: int, plan_descriptor: int) -> None:
    """What the process does: builds what it is asked for until the trainer is gone."""
    for name in _ASK_TO_STOP:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    set_up_logging()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    connection = socket.socket(fileno=socket_descriptor)
    sending = threading.Lock()

    def answer(number: int, future: Future[Built]) -> None:
        descriptor = None
        try:
            error = future.exception()
            message: tuple[int, str, Any]
            if error is None:
                built = future.result()
                message = (number, "built", _without_pixels(built))
                if len(built.arrays["tiles"]):
                    descriptor = _descriptor_of(built.arrays["tiles"])
            elif isinstance(error, DataError):
                message = (number, "data error", str(error))
            else:
                message = (number, "error", "".join(traceback.format_exception(error)))
            data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
            with sending:
                _send(connection, data, descriptor)
        except OSError:
            os._exit(0)  # nobody is left to load for
        except BaseException:
            traceback.print_exc()  # the trainer must not wait for an answer that never comes
            os._exit(1)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    try:
        plan = _unpacked_plan(plan_descriptor)
        builder = Builder(plan, plan.recipe.data.num_threads, augment=True, allocate=_shared)
        while True:
            number, packs, num_tile_chunks = pickle.loads(_receive(connection)[0])
            try:
                future = builder.submit(packs, num_tile_chunks)
            except Exception as error:
                future = Future()
                future.set_exception(error)
            future.add_done_callback(partial(answer, number))
            del future  # or its batch would stay until the next job
    except _Gone:
        os._exit(0)  # at once, whatever the threads are reading


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    # Not as __main__: what it pickles must be known to the trainer under the module's name.
    from nvlm_train.data import loader_process

    loader_process.main(int(sys.argv[1]), int(sys.argv[2]))
