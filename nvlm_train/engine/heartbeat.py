"""Who is in the job and where each rank stands: one heartbeat a second and rank, in the job's store.

The store is torchrun's (its agent keeps it, so it outlives any rank), else rank 0's. Ranks meet in a *room* that rank 0
opens: after torchrun has started the workers again, an old room is still in the store, and nobody may mistake it for
the new one. Joining does not block: a rank that reads data for an hour beats meanwhile, and the others wait for it, but
not longer than `distributed.rendezvous_s` for one that never came.

    current          the room
    ROOM/member/R    who rank R is
    ROOM/complete    when all are there: "" or what does not fit; else "missing: " and who
    ROOM/beat/R      count, step, phase; last of all how it left
    ROOM/alarm       the first rank that finds something wrong says so to all

Each rank reads the beat of the next rank, and looks whether the processes on its own host are there. While something is
wrong it reads all.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from nvlm_train.engine.dist import own_gpu
from nvlm_train.engine.launch import Launch
from nvlm_train.errors import PeerError, SetupError

_MISSING = "missing: "
BEAT_S = 1.0
LEAVE_S = 5.0  # how long to wait for an answer of the store at the end
LOOK_S = 6.0  # how long to look for a missing beat once something is wrong: several beats


@dataclass(frozen=True)
class Member:
    """One process of the job. `machine` and `born` tell whether a process id means the same process here."""

    rank: int
    world_size: int
    host: str
    pid: int
    machine: str
    born: str
    gpu: str

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


@dataclass(frozen=True)
class Standing:
    """What is known of a rank. state: alive, silent (no beat for `silent_s`), lost, failed or left (both with `why`),
    stuck (it has written its stacks and ended, as all do when the job hangs) or done.

    collective: where it waits for others, "" when it does not, None when it has not said.
    """

    member: Member
    state: str
    step: int
    phase: str
    why: str = ""
    silent_s: float = 0.0
    collective: str | None = None

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    @property
    def text(self) -> str:
        name = self.member.name
        if self.state == "lost":
            how = "its process ended without a word (killed, or out of memory)"
            return f"{name} was lost, last seen in {self.place}: {how}"
        if self.state == "failed":
            return f"{name} failed in {self.place}: {self.why}"
        if self.state == "left":
            return f"{name} has left in {self.place}: {self.why}"
        if self.state == "done":
            return f"{name} was done in {self.place} and has left"
        if self.state == "silent":
            how = self.why or "its process is stopped, or its host or network is gone"
            return f"{name} gives no sign of life for {self.silent_s:.0f} s, last in {self.place}: {how}"
        return f"{name} stands in {self.place}"


def this_process(launch: Launch, with_gpu: bool = True) -> Member:
    """This rank's own entry. with_gpu: False where asking the GPU who it is would fail."""
    gpu = ""
    if with_gpu and torch.cuda.is_available():
        gpu = str(torch.cuda.get_device_properties(own_gpu(launch)).uuid)
    machine = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = boot + os.readlink("/proc/self/ns/pid") + os.readlink("/proc/self/ns/net")
    born = (_process(os.getpid()) or ("", ""))[1]
    host = socket.gethostname()
    return Member(launch.rank, launch.world_size, host, os.getpid(), machine, born, gpu)


def _process(pid: int) -> tuple[str, str] | None:
    """(state letter, start time) of a process on this machine; None when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


class Heartbeat:
    """This rank's beat, and what the store says of the others. Use it in a `with`; `join` waits for all."""

    def __init__(self, launch: Launch, rendezvous_s: float, own: Member | None = None) -> None:
        self.launch, self.rendezvous_s = launch, rendezvous_s
        self.own = this_process(launch) if own is None else own
        self.members: dict[int, Member] = {}
        self.missing: list[int] = []  # ranks that did not come in time, as rank 0 sees it
        self.alarm: dict[str, str] | None = None  # what another rank found, or this one
        self.store_gone = False
        self.look_at_all = False
        self.unanswered_s = 0.0  # since the store last answered
        self._position: tuple[int, str] = (0, "start-up")
        self._extra: dict[str, Any] = {}
        self._beats: dict[int, dict[str, Any]] = {}
        self._silent_s: dict[int, float] = {}
        self._lost: set[int] = set()
        self._count = 0
        self._room = ""
        self._server: dist.TCPStore | None = None
        self._store: dist.TCPStore | None = None
        self._error: BaseException | None = None
        self._joined, self._over, self._now = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of the connection that beats
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    # ------------------------------------------------------------------------------------------------- for the trainer

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave("done" if kind is None else "failed", "" if kind is None else kind.__name__)
        # Python ends threads that are inside torch's store by aborting the process
        self._thread.join(LEAVE_S)

    def join(self) -> dist.Store:
        """Waits for all ranks; returns the store in which the process groups meet.

        Raises PeerError that names the missing ranks and the address (starting again may help: a node may be gone), or
        SetupError for what does not fit between ranks.
        """
        self._joined.wait()
        if self._error is not None:
            raise self._error
        store = self._connect(self.rendezvous_s)
        return dist.PrefixStore(f"{self._room}/groups", store)

    def mark(self, step: int, phase: str) -> None:
        """Where this rank stands; told with the next beat."""
        self._position = (step, phase)

    def tell(self, **extra: Any) -> None:
        """Adds to what this rank says of itself, at once."""
        self._extra |= extra
        self._now.set()

    def raise_alarm(self, kind: str, text: str) -> None:
        """Tells all ranks that this one found something wrong; the first word stands."""
        self.alarm = self.alarm or {"kind": kind, "text": text}
        with contextlib.suppress(RuntimeError):
            if self._store is not None and self._lock.acquire(timeout=2.0):
                try:
                    self._store.compare_set(self._key("alarm"), "", json.dumps(self.alarm))
                finally:
                    self._lock.release()

    def leave(self, state: str, why: str) -> None:
        """Says how this rank leaves ("done", "left", "stuck" or "failed"); the first word stands.

        Where rank 0 keeps the store, it waits for the others' words, not for long.
        """
        if self._over.is_set():
            return
        self._over.set()
        self._now.set()
        if not self._room or self._store is None or self.store_gone:
            return
        with contextlib.suppress(RuntimeError):
            if self._lock.acquire(timeout=2.0):
                try:
                    self._beat_once({"state": state, "why": why})
                finally:
                    self._lock.release()
        if self._server is not None:
            self._wait_for_the_others(3.0 if state == "failed" else 10.0)

    def standings(self) -> list[Standing]:
        """Every rank, as far as it is known; of ranks that are not looked at, the last that was."""
        found = []
        for rank, member in sorted(self.members.items()):
            beat = self._beats.get(rank, {})
            silent = self._silent_s.get(rank, 0.0)
            state, why = beat.get("state", "alive"), beat.get("why", "")
            if state == "alive":
                if rank in self._lost:
                    state = "lost"
                elif silent > LOOK_S / 2:
                    state, why = "silent", self._is_stopped(member)
            step, phase = beat.get("step", 0), beat.get("phase", "start-up")
            found.append(Standing(member, state, step, phase, why, silent, beat.get("collective")))
        if not self.launch.agent_store and found and self.launch.rank != 0:  # then rank 0 keeps the store
            first = found[0]
            if self.store_gone and first.state in ("alive", "silent"):
                found[0] = replace(first, state="lost")
            elif self.unanswered_s > LOOK_S / 2 and first.state == "alive":
                why = self._is_stopped(first.member)
                found[0] = replace(first, state="silent", silent_s=self.unanswered_s, why=why)
        return found

    def trouble(self, silent_s: float) -> list[Standing]:
        """Ranks without which this job cannot go on: lost, failed, gone, or silent for longer than `silent_s`."""
        return [
            one for one in self.standings()
            if one.state in ("lost", "failed", "left") or (one.state == "silent" and one.silent_s > silent_s)
        ]  # fmt: skip

    def look(self) -> list[Standing]:
        """Who is missing now that something is wrong; takes a few beats where nobody has said anything."""
        self.look_at_all = True
        self.tell()
        until = time.monotonic() + LOOK_S
        while time.monotonic() < until:
            found = [one for one in self.trouble(LOOK_S) if one.state in ("lost", "failed", "left")]
            if found:
                return [one for one in found if one.state != "left"] or found
            time.sleep(0.1)
        gone = [one for one in self.standings() if one.state == "done"]
        return self.trouble(LOOK_S * 0.6) or gone

    # --------------------------------------------------------------------------------------------------- its own thread

    def _work(self) -> None:
        try:
            self._join()
        except (SetupError, PeerError) as error:
            self._error = error
            return
        except RuntimeError as error:  # torch's DistError
            self._error = PeerError(
                f"the job's store at {self.launch.address}:{self.launch.port} went away while the ranks were meeting "
                f"({str(error).splitlines()[0]}): see why rank 0 ended"
            )
            return
        finally:
            self._joined.set()
        last = time.monotonic()
        while not self._over.is_set():
            with self._lock:
                if self._over.is_set():
                    return
                now = time.monotonic()
                try:
                    self._beat(min(now - last, 2 * BEAT_S))
                except RuntimeError:  # torch's DistError: nobody answers any more
                    self.store_gone = True
                    return
                last = now
            self._now.wait(BEAT_S / 4 if self.look_at_all else BEAT_S)
            self._now.clear()

    def _key(self, name: str) -> str:
        return f"{self._room}/{name}"

    def _beat(self, seconds: float) -> None:
        """Beats, and looks at the others. seconds: since the last beat, without those that this process was stopped."""
        assert self._store is not None
        self._beat_once({})
        alarm = self._store.get(self._key("alarm")).decode()
        if alarm:
            self.alarm, self.look_at_all = self.alarm or json.loads(alarm), True
        world = self.launch.world_size
        some = set(range(world)) if self.look_at_all else {(self.launch.rank + 1) % world}
        gone = {rank for rank, member in self.members.items() if self._is_gone(member)}
        watched = sorted((some | gone) - {self.launch.rank})
        texts = self._store.multi_get([self._key(f"beat/{rank}") for rank in watched])
        for rank, text in zip(watched, texts, strict=True):
            beat = json.loads(text)
            before = self._beats.get(rank)
            moved = before is None or before["count"] != beat["count"] or rank not in self._silent_s
            self._silent_s[rank] = 0.0 if moved else self._silent_s[rank] + seconds
            self._beats[rank] = beat
        for rank in set(self._silent_s) - set(watched):
            del self._silent_s[rank]
        self._lost |= {rank for rank in gone if self._beats.get(rank, {}).get("state", "alive") == "alive"}
        self.unanswered_s = 0.0

    def _beat_once(self, end: dict[str, str]) -> None:
        assert self._store is not None
        self._count += 1
        step, phase = self._position
        beat = {"count": self._count, "step": step, "phase": phase, **self._extra, **end}
        self._beats[self.launch.rank] = beat
        self._store.set(self._key(f"beat/{self.launch.rank}"), json.dumps(beat))

    def _is_gone(self, member: Member) -> bool:
        if member.machine != self.own.machine or not self.own.machine or member.rank == self.launch.rank:
            return False
        process = _process(member.pid)
        return process is None or process[0] in "ZX" or process[1] != member.born

    def _is_stopped(self, member: Member) -> str:
        process = _process(member.pid) if member.machine == self.own.machine else None
        return "its process is stopped" if process and process[0] in "Tt" else ""

    def _wait_for_the_others(self, limit_s: float) -> None:
        """The store ends with this process; others may still read in it how it left."""
        assert self._store is not None
        until = time.monotonic() + limit_s
        others = [rank for rank in self.members if rank != self.launch.rank]
        while others and time.monotonic() < until:
            with contextlib.suppress(RuntimeError):
                texts = self._store.multi_get([self._key(f"beat/{rank}") for rank in others])
                for rank, text in zip(list(others), texts, strict=True):
                    if json.loads(text).get("state") or self._is_gone(self.members[rank]):
                        others.remove(rank)
            time.sleep(0.05)

    # --------------------------------------------------------------------------------------------------- the rendezvous

    def _connect(self, limit_s: float) -> dist.TCPStore:
        """A connection to the store. Tried with a plain socket first, whose errors say what is wrong."""
        address, port = self.launch.address, self.launch.port
        until, cause = time.monotonic() + limit_s, ""
        while not self._over.is_set():
            try:
                socket.create_connection((address, port), timeout=5.0).close()
                limit = timedelta(seconds=limit_s)
                return dist.TCPStore(address, port, None, False, limit, wait_for_workers=False)
            except (OSError, RuntimeError) as error:
                cause = str(error)
            if time.monotonic() > until:
                keeper = "torchrun's agent" if self.launch.agent_store else "rank 0"
                raise PeerError(
                    f"{self.own.name} of {self.launch.world_size} found nobody at {address}:{port} in {limit_s:g} s "
                    f"(distributed.rendezvous_s): {cause}. There {keeper} should answer: it has not started, or "
                    "MASTER_ADDR and MASTER_PORT are wrong, or this host cannot reach it"
                )
            time.sleep(0.2)
        raise SetupError("the rank left before it had joined")

    def _join(self) -> None:
        world, rank = self.launch.world_size, self.launch.rank
        if rank == 0 and not self.launch.agent_store:
            try:
                limit = timedelta(seconds=self.rendezvous_s)
                self._server = dist.TCPStore(
                    self.launch.address, self.launch.port, None, True, limit, wait_for_workers=False
                )
            except RuntimeError as error:
                raise SetupError(
                    f"rank 0 cannot open port {self.launch.port} on host {self.own.host}: "
                    f"{str(error).splitlines()[0]}. Is another job, or a second rank 0, on this host? Set MASTER_PORT "
                    "to a free port"
                ) from None
        self._store = store = self._connect(self.rendezvous_s)
        until = time.monotonic() + self.rendezvous_s
        if rank == 0:
            self._room = uuid.uuid4().hex
            self._store.set(self._key("alarm"), "")
            self._enter_room()
            self._store.set("current", self._room)
        refused = ""  # a room that held this rank already
        while not self._over.wait(0.05):
            if rank != 0 and store.check(["current"]):
                room = store.get("current").decode()
                if room not in (self._room, refused):
                    self._room = room
                    if store.add(self._key(f"seen/{rank}"), 1) > 1:
                        self._room, refused = "", room
                    else:
                        self._enter_room()
            if self._room:
                self._beat_once({})
                if rank == 0:
                    self._call_the_roll(time.monotonic() > until)
                if store.check([self._key("complete")]):
                    problem = store.get(self._key("complete")).decode()
                    if problem.startswith(_MISSING):
                        raise PeerError(problem.removeprefix(_MISSING))
                    if problem:
                        raise SetupError(problem)
                    texts = store.multi_get([self._key(f"member/{other}") for other in range(world)])
                    self.members = {other: Member(**json.loads(text)) for other, text in enumerate(texts)}
                    return
            if rank != 0 and time.monotonic() > until + 5.0:  # rank 0 speaks first
                why = f"another process is rank {rank} already" if refused else "rank 0 has not come"
                kind = SetupError if refused else PeerError
                raise kind(
                    f"{self.own.name} of {world} was not let in at {self.launch.address}:{self.launch.port} in "
                    f"{self.rendezvous_s:g} s (distributed.rendezvous_s): {why}"
                )

    def _enter_room(self) -> None:
        assert self._store is not None
        self._beat_once({})
        self._store.set(self._key(f"member/{self.launch.rank}"), json.dumps(asdict(self.own)))

    def _call_the_roll(self, too_late: bool) -> None:
        """Rank 0: lets all in when all are there and fit, or says what does not."""
        assert self._store is not None
        world = self.launch.world_size
        there = [rank for rank in range(world) if self._store.check([self._key(f"member/{rank}")])]
        texts = self._store.multi_get([self._key(f"member/{rank}") for rank in there])
        members = [Member(**json.loads(text)) for text in texts]
        problem = _contradiction(members)
        missing = sorted(set(range(world)) - set(there))
        if not problem and missing:
            if not too_late:
                return
            self.missing = missing
            some = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
            hosts = ", ".join(sorted({member.host for member in members}))
            problem = _MISSING + (
                f"{len(missing)} of {world} ranks have not come to {self.launch.address}:{self.launch.port} in "
                f"{self.rendezvous_s:g} s (distributed.rendezvous_s): rank {some}. The others came from {hosts}; see "
                "why the missing ones did not start, or whether their hosts reach this address"
            )
        self._store.set(self._key("complete"), problem)


def _contradiction(members: list[Member]) -> str:
    """What does not fit between ranks; "" when all does."""
    first = members[0]
    for other in members:
        if other.world_size != first.world_size:
            return (
                f"WORLD_SIZE is {first.world_size} for {first.name}, but {other.world_size} for {other.name}: the "
                "ranks were started for different jobs; start all with the same number of hosts and ranks per host"
            )
    gpus: dict[str, Member] = {}
    for member in members:
        if member.gpu:
            before = gpus.setdefault(member.gpu, member)
            if before is not member:
                return (
                    f"{before.name} and {member.name} have the same GPU ({member.gpu}): start as many ranks per host "
                    "as it has GPUs, and give each its own"
                )
    return ""
