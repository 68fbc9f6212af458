"""A thread that ends this rank when the job cannot go on, and says why: which rank was lost, failed or stands still.

Python cannot interrupt a thread that waits inside a collective, so the process has to go. Four things end it, all with
exit 1 and without a save:

- another rank is lost, has failed or is silent (`engine.heartbeat`), or the store of the job is gone;
- no step, validation or save has ended for `distributed.hang_s`: every rank writes the stacks of its threads;
- ranks asked to stop have not agreed within `distributed.agree_s`;
- an error of a collective, which `guard` turns into the name of the rank behind it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed

from nvlm_train.attempts import Attempt
from nvlm_train.checkpoint import committed_steps
from nvlm_train.engine.heartbeat import LOOK_S, Heartbeat, Standing
from nvlm_train.engine.launch import Launch
from nvlm_train.errors import NvlmError, PeerError
from nvlm_train.recipe.schema import Distributed
from nvlm_train.train.stop import StopRequest

PHASES = ("data", "forward", "backward", "optimizer step", "agreement", "validation", "save")  # of a step, in order
TICK_S = 0.5
END_S = 3.0  # for the attempt's last words
CLEAN_UP_S = 10.0  # for the trainer to close its files after an error; then the process ends anyway
_PACKAGE = str(Path(__file__).parents[1])
_OF_A_CONNECTION = ("gloo", "NCCL", "Connection", "Timed out waiting", "Broken pipe", "ProcessGroup", "Socket")


class Watch:
    """Watches this rank and, through its heartbeat, the others. Use it in a `with`."""

    def __init__(
        self,
        launch: Launch,
        limits: Distributed,
        run: Path,
        stop: StopRequest,
        end: Callable[[int], None] = os._exit,
        attempt: Attempt | None = None,
    ) -> None:
        """attempt: is told where this rank stands, and why it ends where it is ended from here."""
        self.launch, self.limits, self.run, self.stop, self._exit = launch, limits, run, stop, end
        self.attempt = attempt
        self._words = ""  # the last that was said
        # a group that runs already belongs to somebody else, and so does the watch over its ranks
        alone = launch.world_size == 1 or torch.distributed.is_initialized()
        self.heartbeat = None if alone else Heartbeat(launch, limits.rendezvous_s)
        self.file = run / f"stacks_rank_{launch.rank}.txt"
        self._step, self._phase = 0, "start-up"
        self._starting = True
        self._silent_s = 0.0  # since the last sign of progress, as far as this process was awake
        self._asked_s: float | None = None  # since it was asked to stop
        self._explaining = False
        self._over = threading.Event()
        self._main = threading.current_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    # ------------------------------------------------------------------------------------------------ for the trainer

    def __enter__(self) -> Watch:
        if self.heartbeat is not None:
            self.heartbeat.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self.stop.wake()
        self._thread.join()
        if self.heartbeat is not None:
            self.heartbeat.__exit__(kind, error, trace)

    def join(self) -> torch.distributed.Store | None:
        """Waits for all ranks; where their groups meet. See `Heartbeat.join`."""
        return None if self.heartbeat is None else self.heartbeat.join()

    def mark(self, phase: str, step: int | None = None) -> None:
        """Where this rank stands now."""
        self._step, self._phase = self._step if step is None else step, phase
        if self._starting:
            self._silent_s = 0.0
        if self.heartbeat is not None:
            self.heartbeat.mark(self._step, phase)
        if self.attempt is not None:
            self.attempt.mark(self._step, phase)

    def alive(self) -> None:
        """The rank got on: a step, a validation or a save ended."""
        self._silent_s = 0.0

    def started(self) -> None:
        """The first step comes next: from now on a request to stop ends in a save."""
        self._starting = False
        if self.attempt is not None:
            self.attempt.started()
        self.alive()

    def stop_agreed(self) -> None:
        """All ranks know that they stop; what follows takes the time it takes."""
        self._asked_s = None
        self.stop.agreed = True

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turns the error of a collective into a PeerError that names the rank behind it, and tells the others."""
        try:
            yield
        except Exception as error:
            found = self._explain(error)
            if found is error:
                raise
            raise found from None

    def _explain(self, error: Exception) -> Exception:
        heartbeat = self.heartbeat
        if heartbeat is None or self._explaining or not heartbeat.members:
            if heartbeat is not None:
                heartbeat.leave("failed", _first_line(error))
            return error
        self._explaining = True
        if isinstance(error, NvlmError) or not _is_of_a_connection(error):
            text = _first_line(error)
            heartbeat.raise_alarm("failed", f"{heartbeat.own.name} failed in {self._place()}: {text}")
            heartbeat.leave("failed", text)
            return error
        found = heartbeat.look()
        if not found and "imed out" not in str(error):
            return error  # a broken connection between ranks that are all there: its own words are all there is
        text = self._sentence(found or self._behind(heartbeat), heartbeat)
        heartbeat.raise_alarm("lost", text)
        heartbeat.leave("left", "another rank was lost")
        text = f"{text}. {self._what_next()}"
        backstop = threading.Timer(CLEAN_UP_S, self._give_up, (text,))
        backstop.daemon = True
        backstop.start()
        return PeerError(text)

    def _give_up(self, text: str) -> None:
        self._print(f"error: {text}")
        self._end(1)

    def _end(self, code: int) -> None:
        """Ends the process. What the attempt writes down may wait for a disk that never answers: not for long."""
        if self.attempt is not None:
            ending = threading.Thread(target=self.attempt.end, args=self._outcome(code), daemon=True)
            ending.start()
            ending.join(END_S)
        self._exit(code)

    def _outcome(self, code: int) -> tuple[str, str]:
        return ("lost", self._words) if code == 1 else ("stopped", self.stop.heard)

    # ------------------------------------------------------------------------------------------------- its own thread

    def _watch(self) -> None:
        last = time.monotonic()
        tick = min(TICK_S, self.limits.hang_s / 4)
        while not self._over.is_set():
            heard = self.stop.listen(tick, self._over)
            now = time.monotonic()
            slept = min(now - last, 2 * tick)  # a process that was stopped for an hour has not been watching for one
            last = now
            self._silent_s += slept
            if self._explaining or self._over.is_set():
                continue
            if heard and self._asked_s is None and not self.stop.agreed:
                self._asked_s = 0.0
                if self.heartbeat is not None:
                    self.heartbeat.look_at_all = True
                    self.heartbeat.tell()
            if self._asked_s is not None and self._phase not in ("validation", "save"):
                self._asked_s += slept
            code = self._judge(slept)
            if code is not None:
                self._end(code)
                return

    def _judge(self, slept: float) -> int | None:
        """The exit code when this rank must end now."""
        heartbeat = self.heartbeat
        if heartbeat is not None and heartbeat.members:
            heartbeat.unanswered_s += slept
            if self._is_troubled(heartbeat):
                return self._end_for_trouble(heartbeat)
        # nothing at the start is as short as a step may be: imports, reading the data, loading the weights
        limit = max(self.limits.hang_s, self.limits.timeout_s) if self._starting else self.limits.hang_s
        if self._silent_s > limit:
            return self._end_for_hang(
                f"no step has ended for {self._silent_s:.0f} s (distributed.hang_s is {self.limits.hang_s:g})"
            )
        if self._asked_s is None:
            return None
        if self._starting and (heartbeat is None or self._asked_s > LOOK_S):
            reason = self.stop.heard
            if heartbeat is not None:
                heartbeat.leave("left", f"asked by {reason} before the first step")
            self._print(f"asked to stop by {reason} before the first step; there is nothing to save")
            return 130 if reason == "SIGINT" else 0
        if self._asked_s > self.limits.agree_s:
            return self._end_for_hang(
                f"asked to stop by {self.stop.heard} {self._asked_s:.0f} s ago, but the ranks have not "
                f"agreed at the end of a step (distributed.agree_s is {self.limits.agree_s:g})"
            )
        return None

    def _is_troubled(self, heartbeat: Heartbeat) -> bool:
        store_gone = heartbeat.store_gone or heartbeat.unanswered_s > self.limits.silent_s
        return heartbeat.alarm is not None or store_gone or bool(heartbeat.trouble(self._patience()))

    def _patience(self) -> float:
        """Seconds that a rank may be silent. Asked to stop, maybe because of a loss on another host: a few beats."""
        return self.limits.silent_s if self._asked_s is None else min(LOOK_S, self.limits.silent_s)

    def _end_for_trouble(self, heartbeat: Heartbeat) -> int | None:
        if heartbeat.alarm is not None and heartbeat.alarm["kind"] == "hang":
            return self._end_for_hang(heartbeat.alarm["text"])
        heartbeat.look_at_all = True
        # the trainer's own thread finds it as well, and can close its files
        told_all = heartbeat.alarm is not None and heartbeat.alarm["kind"] == "failed"  # the same mistake on each rank?
        until = time.monotonic() + (CLEAN_UP_S if told_all else 3.0)
        while time.monotonic() < until:
            if self._explaining or self._over.wait(0.05):
                return None
        found = heartbeat.trouble(self._patience())
        told = [one for one in found if one.state != "left"] or found
        if told:
            text = self._sentence(told, heartbeat)
        elif heartbeat.alarm is not None:
            text = heartbeat.alarm["text"]
        elif heartbeat.store_gone or heartbeat.unanswered_s > self.limits.silent_s:
            text = (
                f"torchrun's agent, which keeps the job's store at {self.launch.address}:{self.launch.port}, has not "
                f"answered for {heartbeat.unanswered_s:.0f} s"
            )
        else:
            return None  # it was silent, and beats again
        heartbeat.raise_alarm("lost", text)
        heartbeat.leave("left", "another rank was lost")
        self._print(f"error: {text}. {self._what_next()}")
        return 1

    def _end_for_hang(self, reason: str) -> int:
        heartbeat = self.heartbeat
        self._write_stacks(reason)
        if heartbeat is None or not heartbeat.members:
            self._print(f"error: {reason}, in {self._place()}; the stacks of this rank's threads are in {self.file}")
            return 1
        heartbeat.raise_alarm("hang", reason)
        heartbeat.look_at_all = True
        heartbeat.tell(collective=waits_in(sys._current_frames().get(self._main or 0)))
        until = time.monotonic() + LOOK_S
        while time.monotonic() < until:
            time.sleep(0.1)
            if all(one.collective is not None or one.state not in ("alive", "silent") for one in heartbeat.standings()):
                break
        missing = heartbeat.trouble(LOOK_S / 2)
        found = [one for one in missing if one.state != "left"] or self._behind(heartbeat)
        self._print(f"error: {reason}: {self._sentence(found, heartbeat)}. {self._what_next()}")
        heartbeat.leave("stuck", "")
        return 1

    # ------------------------------------------------------------------------------------------------------- its words

    def _behind(self, heartbeat: Heartbeat) -> list[Standing]:
        """Of ranks that are all alive, those which the others wait for; all of them where that cannot be told."""
        all_ranks = heartbeat.standings()
        if any(one.collective for one in all_ranks):
            busy = [one for one in all_ranks if one.collective == ""]
            if busy:
                return busy
        order = {phase: number for number, phase in enumerate(PHASES)}
        places = {one.member.rank: (one.step, order.get(one.phase, -1)) for one in all_ranks}
        return [one for one in all_ranks if places[one.member.rank] == min(places.values())]

    def _sentence(self, found: list[Standing], heartbeat: Heartbeat) -> str:
        texts = [one.text for one in found[:8]] + ([f"{len(found) - 8} more"] if len(found) > 8 else [])
        text = "; ".join(texts)
        named = {one.member.rank for one in found}
        waiting = [one for one in heartbeat.standings() if one.member.rank not in named and one.collective]
        if waiting:
            first = waiting[0]
            text += f"; {len(waiting)} wait for it, rank {first.member.rank} in {first.collective}"
        elif len(found) > 1 and len(found) == len(heartbeat.members) and all(one.collective for one in found):
            each = "; ".join(f"rank {one.member.rank} in {one.collective}" for one in found[:8])
            text = f"every rank waits in a collective, so they wait for different ones: {each}"
        return text

    def _place(self) -> str:
        return f"step {self._step}, {self._phase}" if self._step else self._phase

    def _what_next(self) -> str:
        steps = committed_steps(self.run)
        kept = f"the last checkpoint is {self.run / f'step_{steps[-1]}'}" if steps else "there is no checkpoint yet"
        return f"Nothing was saved; {kept}. Start the same command again to go on"

    def _print(self, text: str) -> None:
        rank, self._words = self.launch.rank, text.removeprefix("error: ")
        print(text if rank == 0 else f"[rank {rank}] {text}", file=sys.stderr, flush=True)
        sys.stdout.flush()

    def _write_stacks(self, reason: str) -> None:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            with self.file.open("w", encoding="utf-8") as stream:
                stream.write(f"{reason}; this is rank {self.launch.rank} in {self._place()}\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError as error:
            print(f"error: {self.file} could not be written: {error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)


def waits_in(frame: FrameType | None) -> str:
    """The collective in which a thread waits, and our line that asked for it; "" where it waits in none.

    Example: "all_reduce (train/loop.py:238)".
    """
    name = ""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.startswith(_PACKAGE):
            return f"{name} ({os.path.relpath(file, _PACKAGE)}:{frame.f_lineno})" if name else ""
        if file.endswith("torch/distributed/distributed_c10d.py"):
            name = function
        elif not name and function == "wait" and "deepspeed" in file:
            name = "a collective of DeepSpeed"
        frame = frame.f_back
    return name


def _is_of_a_connection(error: BaseException | None) -> bool:
    """Whether an error says that a collective broke off, itself or through what caused it."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OF_A_CONNECTION):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
