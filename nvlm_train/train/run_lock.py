"""One training at a time in a run directory: a second start in the same folder would write over the first one's files.

Rank 0 holds a POSIX lock on RUN/.lock for as long as it lives; the operating system, or the file server, lets go of it
however the process ends. So nothing is left behind to be removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nvlm_train.errors import SetupError
from nvlm_train.log import get_logger

log = get_logger(__name__)

NAME = ".lock"
WAIT_S = 20.0  # a killed or requeued run may take so long to be gone


@contextlib.contextmanager
def held(run: Path, rank: int, wait_s: float = WAIT_S) -> Iterator[None]:
    """Holds the run directory on rank 0; other ranks pass.

    Raises SetupError that names host, process and time of the training that holds it after `wait_s` seconds. A folder
    that cannot be written is somebody else's error to tell, and passes.
    """
    stream: IO[str] | None = None
    if rank == 0:
        with contextlib.suppress(OSError):
            stream = _take(run, wait_s)
    try:
        yield
    finally:
        if stream is not None:
            _let_go(stream, run)


def _take(run: Path, wait_s: float) -> IO[str]:
    until = time.monotonic() + wait_s
    told = False
    run.mkdir(parents=True, exist_ok=True)
    while True:
        stream = (run / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_of(stream, run):
                break
            stream.close()  # its last holder removed it between our opening and our locking
            continue
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: this file system has no locks (%s), so nobody notices when a second training is started in "
                    "this folder", run, error.strerror,
                )  # fmt: skip
                return stream
        stream.seek(0)
        holder = stream.read().strip() or "another process"
        stream.close()
        if time.monotonic() >= until:
            raise SetupError(
                f"output_dir: '{run}' is in use by {holder}; two trainings would write over each other's files. Wait "
                f"for it, stop it (touch {run / 'stop'}), or give this one an output_dir of its own"
            )
        if not told:
            told = True
            log.info("%s is in use by %s; waiting up to %.0f s for it to end", run, holder, wait_s)
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        stream.truncate(0)
        stream.write(
            f"process {os.getpid()} on host {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        stream.flush()
    return stream


def _is_file_of(stream: IO[str], run: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), (run / NAME).stat())
    except FileNotFoundError:
        return False


def _let_go(stream: IO[str], run: Path) -> None:
    """Removes the file, and the folder of a training that was refused before it wrote anything."""
    with contextlib.suppress(OSError):
        (run / NAME).unlink()
        stream.close()
        run.rmdir()  # fails, as it should, where anything is in it
    with contextlib.suppress(OSError):
        stream.close()
