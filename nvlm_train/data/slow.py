"""Names the reads that take too long: a job that hangs on storage should say on which file."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nvlm_train.log import get_logger

log = get_logger(__name__)


@dataclass
class _Read:
    name: str
    begin: float
    tell_s: float  # tell when it has taken so long


class SlowReads:
    """Watches reads from any number of threads; one that takes longer than `limit_s` is named in the log.

    It is named again whenever its time has doubled, and once more when it ends. `limit_s` infinite: never. The thread
    that looks starts with the first read; `close` ends it.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._reads: dict[int, _Read] = {}  # by thread
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Around one read of `name` (a path, with what tells its place)."""
        if math.isinf(self.limit_s):
            yield
            return
        thread, begin = threading.get_ident(), time.monotonic()
        with self._lock:
            if self._thread is None and not self._done.is_set():
                self._thread = threading.Thread(target=self._look, name="nvlm-slow-reads", daemon=True)
                self._thread.start()
            self._reads[thread] = _Read(name, begin, self.limit_s)
        try:
            yield
        finally:
            with self._lock:
                self._reads.pop(thread, None)
            seconds = time.monotonic() - begin
            if seconds > self.limit_s:
                log.warning("reading %s took %.0f s (data.slow_read_s is %g)", name, seconds, self.limit_s)

    def now(self) -> list[tuple[str, float]]:
        """What is being read just now, and for how many seconds; the longest first."""
        with self._lock:
            reads = [(read.name, time.monotonic() - read.begin) for read in self._reads.values()]
        return sorted(reads, key=lambda read: -read[1])

    def close(self) -> None:
        """Ends the thread that looks. May be called twice."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(1.0)

    def _look(self) -> None:
        while not self._done.wait(min(1.0, self.limit_s / 4)):
            slow: list[tuple[str, float]] = []
            with self._lock:
                for read in self._reads.values():
                    seconds = time.monotonic() - read.begin
                    if seconds > read.tell_s:
                        read.tell_s = 2 * seconds
                        slow.append((read.name, seconds))
            for name, seconds in slow:
                log.warning(
                    "reading %s has taken %.0f s so far (data.slow_read_s is %g): the storage is slow or stuck",
                    name,
                    seconds,
                    self.limit_s,
                )
