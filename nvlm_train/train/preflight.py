"""`nvlm-train preflight`: looks at every node of an allocation before hours of it are spent. Launched like `train`.

Each check gives findings: which node, good or not, and the figure. A node that fails any is named in the last line and
in `--out`, so that a batch script can leave it out and submit again. A node that does not answer within the limit is
named too. Nothing of the run directory is changed; a test file is written there and removed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed

from nvlm_train.attempts import nodes_of_job
from nvlm_train.checkpoint import bytes_per_parameter
from nvlm_train.data.sources import expand_sources, open_source
from nvlm_train.data.sources.files import is_url
from nvlm_train.data.tokenizer import load_tokenizer
from nvlm_train.engine import dist
from nvlm_train.engine.heartbeat import LOOK_S, Heartbeat, Member, this_process
from nvlm_train.engine.launch import Launch, resolve_launch
from nvlm_train.errors import NvlmError, PeerError, SetupError
from nvlm_train.hub import local_folder
from nvlm_train.log import get_logger
from nvlm_train.plan.communication import communication
from nvlm_train.recipe.load import load_recipe
from nvlm_train.recipe.resolve import Resolved, resolve
from nvlm_train.recipe.schema import Recipe
from nvlm_train.recipe.schema import Source as SourceSettings
from nvlm_train.train.announce import versions

log = get_logger(__name__)

LIMIT_S = 60.0
SKEW_S = 2.0  # of clocks; logs and files of two nodes that differ by more cannot be put in order
WRITE_BYTES = 32 << 20
SLOW_SHARE = 0.5  # of the median bandwidth: a node below it slows all others down


class Finding(NamedTuple):
    """One node in one check. detail: the figure, or what is wrong."""

    check: str
    node: str
    good: bool
    detail: str


def own_node() -> str:
    """The node's name as SLURM knows it, so that it can be excluded; else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# ------------------------------------------------------------------------------------------------ what one rank can see


def check_gpu(launch: Launch, node: str) -> list[Finding]:
    """Enough GPUs, no uncorrected memory errors, and a product that is right and the same twice."""
    if not torch.cuda.is_available():
        return [Finding("gpu", node, not shutil.which("nvidia-smi"), "none: ranks compute on the CPU")]
    shown, wanted = torch.cuda.device_count(), launch.local_world_size
    if shown not in (1, wanted) and shown < wanted:
        return [Finding("gpu", node, False, f"{shown} GPUs are shown to {wanted} ranks")]
    device = dist.own_gpu(launch)
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    right = a.double() @ a.double()
    there = a.to(device)
    first, second = there @ there, there @ there
    worst = float((first.cpu().double() - right).abs().max())
    if not torch.equal(first, second) or not worst < 1.0:  # TF32 or not; sums of 1024 products of size 1
        return [Finding("gpu", node, False, f"{device}: a matrix product is wrong (off by {worst:g})")]
    findings = [Finding("gpu", node, True, f"{torch.cuda.get_device_name(device)}, product right")]
    for line in _nvidia_smi("index,ecc.errors.uncorrected.volatile.total"):
        number, _, errors = line.partition(", ")
        if errors.isdigit() and int(errors):
            findings.append(Finding("gpu", node, False, f"GPU {number} has {errors} uncorrected memory errors"))
    return findings


def _nvidia_smi(fields: str) -> list[str]:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    return []


def software() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {**versions(), "machine": platform.machine()}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = ", ".join(sorted(set(_nvidia_smi("driver_version"))))
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def check_disk(run: Path, needed: int, node: str) -> list[Finding]:
    """Free space for a checkpoint beside those that are kept, and how fast this node writes there."""
    file = run / f".preflight_{node}_{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(run).free
        began = time.perf_counter()
        with file.open("wb") as stream:
            for _ in range(8):
                stream.write(os.urandom(WRITE_BYTES // 8))
            stream.flush()
            os.fsync(stream.fileno())
        rate = WRITE_BYTES / (time.perf_counter() - began)
    except OSError as error:
        return [Finding("disk", node, False, f"{run}: {error.strerror}")]
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    detail = f"{run}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.2f} GB a checkpoint, writes {rate / 1e6:,.0f} MB/s"
    return [Finding("disk", node, free > needed, detail if free > needed else f"{detail}: not enough room")]


def check_inputs(recipe: Recipe, node: str) -> list[Finding]:
    """Tokenizer, weight folders and the first and last file of each source can be read on this node."""
    findings = []

    def look(what: str, read: Callable[[], str]) -> None:
        try:
            findings.append(Finding("inputs", node, True, f"{what}: {read()}"))
        except (NvlmError, OSError) as error:
            findings.append(Finding("inputs", node, False, f"{what}: {str(error).splitlines()[0]}"))

    look("tokenizer", lambda: f"{load_tokenizer(local_folder(recipe.tokenizer.path)).vocab_size:,} ids")
    for name in ("model", "vision", "language_model", "run"):
        given = getattr(recipe.init_from, name, None)
        if given is not None:
            look(f"init_from.{name}", partial(_readable, given.path))
    try:
        sources = expand_sources(recipe).data.mixture
    except (NvlmError, OSError) as error:
        return [*findings, Finding("inputs", node, False, str(error).splitlines()[0])]
    for name, source in sources.items():
        if not is_url(source.path):  # a preflight makes no requests
            look(f"data.mixture.{name}", partial(_opened, name, source))
    return findings


def _readable(path: str) -> str:
    folder = local_folder(path)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if not files:
        raise SetupError(f"'{folder}' is missing or empty")
    for file in files:
        with file.open("rb") as stream:
            stream.read(1)
    return f"{len(files)} files"


def _opened(name: str, settings: SourceSettings) -> str:
    source = open_source(name, settings)
    source.close()
    return f"{len(source.files)} files"


# -------------------------------------------------------------------------------------------- what ranks see together


def check_same(software_of: dict[str, dict[str, str]]) -> list[Finding]:
    """Each node against what most nodes have."""
    findings = []
    names = sorted({name for found in software_of.values() for name in found})
    usual = {
        name: Counter(found.get(name, "none") for found in software_of.values()).most_common(1)[0][0] for name in names
    }
    for node, found in software_of.items():
        other = [f"{name} {found.get(name, 'none')} (others: {usual[name]})" for name in names
                 if found.get(name, "none") != usual[name]]  # fmt: skip
        detail = ", ".join(other) or f"torch {usual.get('torch')}, deepspeed {usual.get('deepspeed')}, as on all nodes"
        findings.append(Finding("software", node, not other, detail))
    return findings


def check_clocks(times: list[list[float]], nodes: list[str]) -> list[Finding]:
    """times: of each round, every rank's clock at about the same moment. The round with the least spread counts."""
    best = min(times, key=lambda clocks: max(clocks) - min(clocks))
    middle = sorted(best)[len(best) // 2]
    off = {node: clock - middle for node, clock in zip(nodes, best, strict=True)}
    good = {node: abs(seconds) <= SKEW_S for node, seconds in off.items()}
    worst = max((abs(off[node]) for node in off if good[node]), default=0.0)
    return [
        Finding("clock", node, good[node], f"at most {worst:.3f} s from the median" if good[node] else
                f"{seconds:+.3f} s from the median of the nodes (at most {SKEW_S:g} s)")
        for node, seconds in off.items()
    ]  # fmt: skip


def check_names(nodes: Iterable[str], resolve_name: Callable[[str], Any], own: str) -> list[Finding]:
    """Every host's name means an address on this node."""
    unknown = []
    for name in sorted(set(nodes)):
        try:
            resolve_name(name)
        except OSError:
            unknown.append(name)
    detail = f"{', '.join(unknown)} cannot be resolved here" if unknown else "all hosts are known here"
    return [Finding("names", own, not unknown, detail)]


def bandwidth(world: dist.World, group: Any, size: int, seconds: float = 0.5) -> float:
    """Bytes a second that each rank of the group receives in an all-reduce of fp32 (a ring: 2 (n - 1) / n of them)."""
    vector = torch.ones(size // 4, dtype=torch.float32, device=world.device)
    ranks = torch.distributed.get_world_size(group)

    def reduce(times: int) -> float:
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            torch.distributed.all_reduce(vector, group=group)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    reduce(2)
    once = torch.tensor([reduce(2) / 2], dtype=torch.float64)
    torch.distributed.all_reduce(once, torch.distributed.ReduceOp.MAX, group=group)  # gloo carries it
    times = max(2, min(50, int(seconds / max(float(once), 1e-6))))
    vector.fill_(0.0)
    return 2 * (ranks - 1) / ranks * size / (reduce(times) / times)


def check_network(world: dist.World, nodes: list[str], needed: dict[str, Any], deadline: _Deadline) -> list[Finding]:
    """All-reduce inside each node, and across all, against what the recipe needs to hide its exchange."""
    if world.world_size == 1:
        return []
    size = (64 << 20) if world.device.type == "cuda" else (4 << 20)
    of_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        of_node.setdefault(node, []).append(rank)
    findings: list[Finding] = []
    gpu, across = needed["needed_gpu_gbps"], needed["needed_node_gbps"]
    judged = world.device.type == "cuda"  # on a CPU the figures say nothing about a training
    inside: dict[str, float] = {}
    own = None
    for ranks in of_node.values():
        group = torch.distributed.new_group(ranks)
        if world.rank in ranks:
            own = group
    if min(map(len, of_node.values())) > 1:
        deadline.begin("network in node")
        own_rate = bandwidth(world, own, size) * 8 / 1e9
        deadline.ended()
        rates = dist.gather(world, own_rate)
        inside = {node: min(rates[rank] for rank in ranks) for node, ranks in of_node.items()}
        median = sorted(inside.values())[len(inside) // 2]
        for node, rate in inside.items():
            slow = judged and rate < SLOW_SHARE * median
            short = judged and rate < gpu
            detail = f"{rate:,.1f} Gbit/s a rank inside the node; the recipe needs {gpu:,.1f}"
            if slow:
                detail += f"; half of the nodes have {median:,.1f}"
            findings.append(
                Finding("network in node", node, not slow, detail + ("; training will wait" if short else ""))
            )
    deadline.begin("network")
    rate = min(dist.gather(world, bandwidth(world, None, size) * 8 / 1e9))
    if len(of_node) > 1:
        into_node = rate * max(map(len, of_node.values()))
        short = judged and into_node < across
        detail = f"{into_node:,.1f} Gbit/s into each node in an all-reduce over all; the recipe needs {across:,.1f}"
        findings.append(Finding("network", "all", True, detail + ("; training will wait for it" if short else "")))
    elif not inside:
        findings.append(Finding("network", "all", True, f"{rate:,.1f} Gbit/s a rank in an all-reduce over all"))
    return findings


# ------------------------------------------------------------------------------------------------------------- the verb


class _Deadline:
    """Ends the process when a check takes too long, and names the nodes whose ranks have not ended the one at work.

    Each rank says in the job's store which checks it has ended. The deadline asks over a connection of its own, because
    the trainer's own thread may wait in the other for ever; and not longer than a few seconds, for the store's host may
    be the one that is gone.
    """

    def __init__(self, launch: Launch, node: str, limit_s: float, out: Path | None) -> None:
        self.launch, self.node, self.limit_s, self.out = launch, node, limit_s, out
        self.stage = "start"
        self.over = False
        self.nodes: list[str] = []  # of each rank, once they have met
        self.findings: list[Finding] = []  # so far
        self._heartbeat: Heartbeat | None = None
        self._store: Any = None
        self._asks: Any = None
        self._missing: list[str] | None = None
        self._timer = threading.Timer(limit_s, self._over)
        self._timer.daemon = True
        self._timer.start()

    def meet(self, heartbeat: Heartbeat, store: Any) -> None:
        """All ranks are there. store: of the trainer's own thread."""
        self._heartbeat, self._store, self._asks = heartbeat, store, heartbeat.join()

    def begin(self, stage: str) -> None:
        self.stage = stage

    def node_of(self, member: Member) -> str:
        return self.nodes[member.rank] if self.nodes else member.host

    def ended(self) -> None:
        """This rank has done its part of the check, and waits for the others."""
        if self._store is not None:
            self._store.set(f"preflight/{self.stage}/{self.launch.rank}", "")

    def stop(self) -> None:
        self._timer.cancel()

    def _over(self) -> None:
        self.over = True
        self._within(4.0 + LOOK_S, self._ask)
        who = "on all nodes alike" if self._missing == [] else f"on {', '.join(self._missing or [self.node])}"
        failed = [self.node] if self._missing is None else self._missing
        if self._missing is None and self.nodes:  # the store does not answer: rank 0 or its host keeps it
            failed, who = [self.nodes[0]], f"on {self.nodes[0]}, where nobody answers"
        text = f"preflight has not ended within {self.limit_s:g} s: {self.stage} {who}"
        # rank 0 speaks, and before the others end: srun and torchrun end a job with its first bad rank
        if self.launch.rank == 0 or not self._within(30.0, self._hear):
            print(f"error: {text}\nfailed nodes: {','.join(failed)}", flush=True)
            self._within(5.0, partial(self._tell, text, failed))
            time.sleep(1.0)  # for the others to hear it, if the store is kept here
        os._exit(1)

    def _within(self, limit_s: float, do: Callable[[], None]) -> bool:
        """Whether it was done, and in time."""
        done = threading.Event()

        def run() -> None:
            with contextlib.suppress(RuntimeError):  # nobody answers
                do()
                done.set()

        threading.Thread(target=run, daemon=True).start()
        return done.wait(limit_s)

    def _ask(self) -> None:
        """Sets _missing: nodes that have not ended this check; none where that says nothing of a node."""
        if self._asks is None:
            return
        ranks = [n for n in range(self.launch.world_size) if not self._asks.check([f"preflight/{self.stage}/{n}"])]
        everyone = {self.nodes[rank] for rank in range(self.launch.world_size)} if self.nodes else set()
        missing = {self.nodes[rank] for rank in ranks} if self.nodes else set()
        if len(everyone) != 1 and missing in (everyone, set()):  # they wait for each other; is one of them silent?
            assert self._heartbeat is not None
            silent = [one for one in self._heartbeat.look() if one.state in ("lost", "failed", "silent")]
            missing = {self.node_of(one.member) for one in silent}
            missing = set() if missing == everyone else missing
        self._missing = sorted(missing)

    def _hear(self) -> None:
        while not self._asks.check(["preflight/told"]):
            time.sleep(0.1)

    def _tell(self, text: str, failed: list[str]) -> None:
        _write_out(self.out, [*self.findings, *(Finding(self.stage, name, False, text) for name in failed)])
        if self._asks is not None and self.launch.rank == 0:
            self._asks.set("preflight/told", "")


def _write_out(out: Path | None, findings: list[Finding]) -> None:
    if out is not None:
        failed = sorted({one.node for one in findings if not one.good})
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"failed": failed, "findings": [one._asdict() for one in findings]}, indent=1) + "\n")


def _looked(check: str, node: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """A check that breaks is a finding too: a GPU that answers with an error is why it was asked."""
    try:
        return look()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return [
            Finding(check, node, False, first if isinstance(error, NvlmError) else f"{type(error).__name__}: {first}")
        ]


def preflight(recipe: Recipe, *, limit_s: float = LIMIT_S, out: Path | None = None) -> list[Finding]:
    """Runs every check; all findings, on every rank.

    Raises PeerError that names ranks which never came or were lost. Where it takes longer than
    limit_s the process ends with exit code 1.
    """
    launch = resolve_launch()
    resolved = resolve(recipe, launch.world_size)
    node = own_node()
    deadline = _Deadline(launch, node, limit_s, out)
    with contextlib.ExitStack() as stack:
        stack.callback(deadline.stop)
        own = _first_look(launch, node)
        deadline.begin("start")
        patience_s = limit_s + 60.0  # of collectives: the deadline comes first, and says more
        if launch.world_size == 1 or torch.distributed.is_initialized():
            world = dist.start(launch, patience_s)
            stack.callback(dist.stop, world)
            _take(deadline, dist.gather(world, own))
            _check(recipe, resolved, launch, world, node, deadline)
            return deadline.findings
        member = this_process(launch, with_gpu=bool(own[2]))
        rendezvous_s = min(recipe.distributed.rendezvous_s, limit_s / 2)
        heartbeat = stack.enter_context(Heartbeat(launch, rendezvous_s, member))
        try:
            store = heartbeat.join()
        except (SetupError, PeerError) as error:
            if launch.rank == 0:
                _tell_missing(launch, heartbeat.missing, str(error), out)
            raise
        try:
            deadline.meet(heartbeat, store)
            store.set(f"preflight/{launch.rank}", json.dumps(own))
            told = [json.loads(store.get(f"preflight/{rank}")) for rank in range(launch.world_size)]
            _take(deadline, [(name, [Finding(*one) for one in seen], what) for name, seen, what in told])
            if torch.cuda.is_available() and not all(one.good for one in deadline.findings):
                return deadline.findings  # NCCL would wait for a GPU that is not there, or for another NCCL
            world = dist.start(launch, patience_s, store)
            stack.callback(dist.stop, world)
            _check(recipe, resolved, launch, world, node, deadline)
        except RuntimeError:
            _tell_lost(launch, heartbeat, deadline, out)
            raise
        return deadline.findings


_Look = tuple[str, list[Finding], dict[str, str]]


def _first_look(launch: Launch, node: str) -> _Look:
    """(node, findings of its GPU, software): what a rank can tell before it meets the others.

    No software where the GPU failed: asking its libraries might end the process.
    """
    found = _looked("gpu", node, lambda: check_gpu(launch, node))
    return node, found, software() if all(one.good for one in found) else {}


def _take(deadline: _Deadline, looks: list[_Look]) -> None:
    deadline.nodes = [node for node, _, _ in looks]
    for _, found, _ in looks:
        deadline.findings.extend(one for one in found if one not in deadline.findings)
    deadline.findings.extend(check_same({node: what for node, _, what in looks if what}))


def _tell_missing(launch: Launch, missing: list[int], why: str, out: Path | None) -> None:
    """Names the nodes of ranks that never came, where SLURM's list of nodes says which they are."""
    hosts = nodes_of_job()
    if missing and len(hosts) * launch.local_world_size == launch.world_size:
        names = sorted({hosts[rank // launch.local_world_size] for rank in missing})
        _write_out(out, [Finding("start", name, False, why) for name in names])
        print(f"failed nodes: {','.join(names)}", flush=True)


def _tell_lost(launch: Launch, heartbeat: Heartbeat, deadline: _Deadline, out: Path | None) -> None:
    """Names the nodes of ranks that ended in a check, and raises PeerError; returns where none did."""
    gone = heartbeat.look()
    if deadline.over:  # it speaks, and ends this process
        time.sleep(120.0)
    if not gone:
        return
    lost = {one.member.rank for one in gone}
    text = "; ".join(one.text for one in gone[:8])
    if launch.rank == min(set(range(launch.world_size)) - lost, default=0):
        findings = [Finding(deadline.stage, deadline.node_of(one.member), False, one.text) for one in gone]
        _write_out(out, [*deadline.findings, *findings])
        print(f"failed nodes: {','.join(sorted({one.node for one in findings}))}", flush=True)
    raise PeerError(f"preflight, {deadline.stage}: {text}") from None


def _check(
    recipe: Recipe, resolved: Resolved, launch: Launch, world: dist.World, node: str, deadline: _Deadline
) -> None:
    """What needs the ranks' groups; adds to deadline.findings."""
    findings, nodes = deadline.findings, deadline.nodes

    def together(stage: str, look: Callable[[], list[Finding]]) -> None:
        """Findings of one rank of each node."""
        deadline.begin(stage)
        own = _looked(stage, node, look) if launch.local_rank == 0 else []
        deadline.ended()
        for one in dist.gather(world, own):
            findings.extend(finding for finding in one if finding not in findings)

    trained = sum(resolved.parameters["trainable"].values())
    needed = trained * bytes_per_parameter("step")
    together("disk", lambda: check_disk(Path(recipe.output_dir), needed, node))
    findings.extend(_one_folder(Path(recipe.output_dir), world, nodes, deadline))
    together("inputs", lambda: check_inputs(recipe, node))
    deadline.begin("clock")
    rounds = []
    for _ in range(5):
        dist.barrier(world)
        rounds.append(dist.gather(world, time.time()))
    findings.extend(check_clocks(rounds, nodes))
    hosts = dist.gather(world, socket.gethostname())
    together("names", lambda: check_names(hosts, socket.gethostbyname, node))
    deadline.begin("network")
    asked = communication(recipe, world.world_size, launch.local_world_size)
    findings.extend(check_network(world, nodes, asked, deadline))


def _one_folder(run: Path, world: dist.World, nodes: list[str], deadline: _Deadline) -> list[Finding]:
    """Whether every node sees in the run directory what rank 0 writes there."""
    deadline.begin("shared folder")
    name = dist.gather(world, f".preflight_shared_{os.getpid()}")[0]
    if world.rank == 0:
        with contextlib.suppress(OSError):
            run.mkdir(parents=True, exist_ok=True)
            (run / name).touch()
    dist.barrier(world)
    seen = False
    with contextlib.suppress(OSError):
        seen = name in os.listdir(run)
    deadline.ended()
    found = dist.gather(world, seen)
    if world.rank == 0:
        with contextlib.suppress(OSError):
            (run / name).unlink(missing_ok=True)
    blind = sorted({node for node, seen in zip(nodes, found, strict=True) if not seen})
    shown = dist.gather(world, str(run))[0]
    detail = f"{shown} is another folder there than on {nodes[0]}: it must be on storage that all nodes share"
    return [Finding("shared folder", node, False, detail) for node in blind]


def table(findings: list[Finding]) -> str:
    """A line a check where all nodes agree, else one for each node that fails and a count of the good."""
    lines = []
    for check in dict.fromkeys(one.check for one in findings):
        of_it = [one for one in findings if one.check == check]
        bad = [one for one in of_it if not one.good]
        good = [one for one in of_it if one.good]
        if good:
            details = list(dict.fromkeys(one.detail for one in good))
            shown = details if len(details) <= 6 else [*details[:3], f"and {len(details) - 3} more like these"]
            names = sorted({one.node for one in good})
            who = names[0] if len(names) == 1 else f"{len(names)} nodes"
            lines += [f"{'ok':<6} {check:<16} {who:<12} {detail}" for detail in shown]
        lines += [f"{'FAILED':<6} {check:<16} {one.node:<12} {one.detail}" for one in bad]
    return "\n".join(lines)


def preflight_command(args: argparse.Namespace) -> int:
    # srun and torchrun end all ranks as soon as one has ended badly: time for the others to say which
    signal.signal(signal.SIGTERM, _end_soon)
    loaded = load_recipe(args.recipe, args.overrides)
    out = Path(args.out) if args.out else None
    began = time.monotonic()
    findings = preflight(loaded.recipe, limit_s=args.limit_s, out=out)
    failed = sorted({one.node for one in findings if not one.good})
    if resolve_launch().rank == 0:
        _write_out(out, findings)
        print(table(findings))
        print(f"{time.monotonic() - began:.1f} s; " + (f"failed nodes: {','.join(failed)}" if failed else "all good"))
        sys.stdout.flush()
    return 1 if failed else 0


def _end_soon(number: int, frame: FrameType | None) -> None:
    end = threading.Timer(2 * LOOK_S, os._exit, (128 + number,))
    end.daemon = True
    end.start()
