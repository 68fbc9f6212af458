"""A thread that notices when a rank no longer gets on, and says where it is stuck."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


class HangWatch:
    """Ends the process with exit 1 when `alive` was not called for `limit_s` seconds.

    Before that it writes the stacks of all threads to `file` and to stderr. Python cannot interrupt a thread that waits
    inside a collective, so the process has to go; torchrun then ends the other ranks.
    """

    def __init__(self, limit_s: float, file: Path, end: Callable[[int], None] = os._exit) -> None:
        self.limit_s, self.file, self._end = limit_s, file, end
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def alive(self) -> None:
        """The rank got on: a step, a validation or a save ended."""
        self._last = time.monotonic()

    def __enter__(self) -> HangWatch:
        self.alive()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit_s / 4)):
            silent = time.monotonic() - self._last
            if silent > self.limit_s:
                self._tell(silent)
                self._end(1)
                return

    def _tell(self, silent: float) -> None:
        text = (
            f"no step has ended for {silent:.0f} s (distributed.hang_s is {self.limit_s:g}); the stacks of this rank's "
            f"threads are in {self.file}"
        )
        print(f"error: {text}", file=sys.stderr, flush=True)
        try:
            with self.file.open("w", encoding="utf-8") as stream:
                stream.write(text + "\n")
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError as error:
            print(f"error: {self.file} could not be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
