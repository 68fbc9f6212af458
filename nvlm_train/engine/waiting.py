"""How long this rank stood still in the collectives of the model, which is how long it waited for slower ranks.

ZeRO-3 gathers weights layer by layer, so all ranks end a step at the same moment whoever was slow; what tells them
apart is how much of that time each spent waiting. On a CPU a collective blocks the process: its wall time counts. On a
GPU nothing blocks: an event is recorded on the compute stream before and after each wait of that stream for a
collective, and read when the step has ended. Waits of DeepSpeed's own side stream (reductions in the background) hold
nothing up by themselves and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_OPERATIONS = (
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "reduce_scatter", "reduce_scatter_tensor",
    "all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "all_to_all_single", "barrier",
)  # fmt: skip


class CollectiveWait:
    """Times DeepSpeed's collectives while `on`, between `install` and `remove`."""

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._events = device.type == "cuda"
        self._seconds = 0.0
        self._pending: list[tuple[Any, Any]] = []
        self._backend: Any = None

    def install(self) -> None:
        """Puts itself between DeepSpeed and torch's collectives, in the whole process."""
        import deepspeed.comm.comm as comm

        self._backend = comm.cdb
        for name in _OPERATIONS:
            if hasattr(self._backend, name):
                setattr(self._backend, name, self._timed(getattr(self._backend, name)))

    def remove(self) -> None:
        for name in _OPERATIONS:
            self._backend.__dict__.pop(name, None)  # the class's own method shows again

    def take(self) -> float:
        """Seconds since the last `take`. On a GPU it waits for the device."""
        if self._pending:
            torch.cuda.synchronize()
            self._seconds += sum(begun.elapsed_time(ended) for begun, ended in self._pending) / 1000.0
            self._pending = []
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _timed(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return operation(*args, **kwargs)
            work = self.measure(lambda: operation(*args, **kwargs))
            return _Work(work, self) if hasattr(work, "wait") else work

        return call

    def measure(self, wait: Callable[[], Any]) -> Any:
        """Does what may wait, and counts how long it took."""
        if not self._events:
            begun = time.perf_counter()
            try:
                return wait()
            finally:
                self._seconds += time.perf_counter() - begun
        stream = torch.cuda.current_stream()
        if stream != torch.cuda.default_stream():
            return wait()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record(stream)
        try:
            return wait()
        finally:
            events[1].record(stream)
            self._pending.append(events)


class _Work:
    """A collective under way; waiting for it is measured."""

    def __init__(self, work: Any, waited: CollectiveWait) -> None:
        self._work, self._waited = work, waited

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._waited.measure(lambda: self._work.wait(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
