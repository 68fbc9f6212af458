"""Stopping well: signals and files ask, all ranks agree at the end of a step, then the run is saved."""

from __future__ import annotations

import select
import signal
import socket
import threading
from pathlib import Path
from types import FrameType, TracebackType


class StopRequest:
    """Remembers that somebody asked the run to stop or to save.

    SIGTERM, SIGINT and the recipe's signal ask for "finish the step, save, exit 0"; so does a file RUN/stop. A file
    RUN/save asks for a checkpoint and is removed. A second SIGINT interrupts at once, without a save.

    Python runs a handler only when the main thread is back from what it called, which may be a collective that never
    ends. So signals are also written to a socket, where `train.watch` hears them at once.
    """

    def __init__(self, run: Path, signal_name: str, *, watch_files: bool) -> None:
        self.run, self.watch_files = run, watch_files
        self.reason: str | None = None
        self.heard = ""  # the same, from the socket
        self.agreed = False  # all ranks know that they stop
        self._signals = [signal.SIGTERM, signal.SIGINT, signal.Signals[f"SIG{signal_name}"]]
        self._previous: dict[int, object] = {}
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._previous_mouth: int | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_mouth = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._previous_mouth is not None:
            signal.set_wakeup_fd(self._previous_mouth)
        self._ear.close()
        self._mouth.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def listen(self, seconds: float, over: threading.Event) -> bool:
        """Waits for a signal, not longer than `seconds`; True when one that asks to stop has come."""
        if over.is_set():
            return False
        select.select([self._ear], [], [], seconds)
        try:
            numbers = self._ear.recv(256)
        except (BlockingIOError, OSError):
            return False
        for number in numbers:
            if number in self._signals:
                self.heard = signal.Signals(number).name
                return True
        return False

    def wake(self) -> None:
        """Ends a `listen` early."""
        self._mouth.send(b"\0")

    def asked(self) -> tuple[int, int]:
        """(stop, save) as 0 or 1, as this rank sees it now; the caller sums them over the ranks."""
        save = 0
        if self.watch_files:
            if self.reason is None and (self.run / "stop").exists():
                self.reason = f"file {self.run / 'stop'}"
            if (self.run / "save").exists():
                (self.run / "save").unlink(missing_ok=True)
                save = 1
        return int(self.reason is not None), save

    def forget_file(self) -> None:
        """Removes RUN/stop once it has been obeyed, so that the next start is not stopped again."""
        if self.watch_files:
            (self.run / "stop").unlink(missing_ok=True)
