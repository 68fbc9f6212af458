"""Stopping well: signals and files ask, all ranks agree at the end of a step, then the run is saved."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType


class StopRequest:
    """Remembers that somebody asked the run to stop or to save.

    SIGTERM, SIGINT and the recipe's signal ask for "finish the step, save, exit 0"; so does a file RUN/stop. A file
    RUN/save asks for a checkpoint and is removed. A second SIGINT interrupts at once, without a save.
    """

    def __init__(self, run: Path, signal_name: str, *, watch_files: bool) -> None:
        self.run, self.watch_files = run, watch_files
        self.reason: str | None = None
        self._signals = [signal.SIGTERM, signal.SIGINT, signal.Signals[f"SIG{signal_name}"]]
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

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
