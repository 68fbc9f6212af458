"""A real Slurm of a few nodes on this machine, without systemd, for tests: two nodes idle in about a second.

    with Cluster(folder, nodes=2).start() as cluster:
        job = cluster.sbatch("slurm/train.sbatch", "recipe.yaml", nodes=2)
        cluster.power_cut("node2")

Two modes. `namespaces`: a node is a process, host-name, mount, network and IPC namespace of its own, with an eth0 that
hangs on a bridge in a namespace too; killing its first process is an honest power cut, and there is no way to the
internet. `plain`, where namespaces are not allowed: several slurmd on the loopback interface, no power to cut.

GPUs are fake (some character devices, only counted), CPUs too. Every process is started by this class, remembered, and
ended by `close`; if the tests are killed the kernel ends it (PR_SET_PDEATHSIG). Nothing outside of the folder is
changed. Needs root, because slurmd becomes the user of a job.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "util-linux"]
COMMANDS = ["slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter"]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
UNSHARE = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
FINISHED = "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL PREEMPTED OUT_OF_MEMORY BOOT_FAIL DEADLINE".split()

# The first process of a node: its name, hosts, memory disk and network, then slurmd, and staying to reap orphans.
FIRST_PROCESS = """
set -e
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o mode=1777 shm /dev/shm; ip link set lo up
for _ in $(seq 500); do ip -o -4 addr show dev eth0 2>/dev/null | grep -q inet && break; sleep 0.02; done
slurmd -D -N "$1" -f "$2/slurm.conf" &
while :; do sleep 3600 & wait $!; done
"""


class NoCluster(Exception):
    """Slurm cannot run here, and why."""


def install() -> None:
    """Installs what is missing with apt, about 20 s. Raises NoCluster where that is not possible."""
    missing = [name for name in COMMANDS if shutil.which(name, path=PATH) is None]
    if os.geteuid() != 0:
        raise NoCluster("needs root: slurmd becomes the user of a job")
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise NoCluster(f"{', '.join(missing)} not installed, and this is neither Debian nor Ubuntu")
    quiet = dict(env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, timeout=180)
    words = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    try:
        done = subprocess.run(words, **quiet)  # type: ignore[call-overload]
        if done.returncode:
            subprocess.run(["apt-get", "update", "-qq"], **quiet)  # type: ignore[call-overload]
            done = subprocess.run(words, **quiet)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise NoCluster("apt-get did not end within 180 s") from None
    if done.returncode:
        raise NoCluster(f"Slurm is not installed, and apt-get says: {done.stderr.strip()[-300:]}")


def has_namespaces() -> bool:
    """Whether nodes may be namespaces. Tries the real thing; what it makes vanishes with the process."""
    probe = "mount -t tmpfs t /dev/shm && ip link add b0 type bridge && ip link add v0 type veth peer name v1"
    done = subprocess.run([*UNSHARE, "sh", "-c", probe], capture_output=True, env={**os.environ, "PATH": PATH})
    return done.returncode == 0


class Cluster:
    """A cluster; `start` it, and use it as a context manager or call `close`."""

    def __init__(self, folder: Path, nodes: int = 2, *, gpus: int = 32, plain: bool = False) -> None:
        self.folder = folder
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.gpus = gpus
        self.plain = plain or not has_namespaces()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.first: dict[str, int] = {}  # the first process of each node, as this machine numbers it
        self.small = folder / "small"  # a shared disk of 1.2 MB, to be full soon; not in plain mode
        self.network = "127.0.0" if self.plain else _free_network()
        self.port = _free_port(nodes + 1)
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in list(self.env):  # tests may run inside of a Slurm job themselves
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "NVLM_")) and name != "SLURM_CONF":
                del self.env[name]

    def start(self) -> Cluster:
        """Returns when all nodes are idle. Raises NoCluster, with nothing left behind."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        for name in ("munge", "state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        (self.folder / "state").chmod(0o700)
        self._write_configuration()
        munge = self.folder / "munge"
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(os.urandom(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={munge / name}" for option, name in files.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", "--num-threads=4", *options])
        if not self.plain:
            self.small.mkdir()
            _call("mount", "-t", "tmpfs", "-o", "size=1200k,mode=1777", "small", str(self.small))
            self._daemon("switch", ["unshare", "--net", "sleep", "infinity"])
            self._wait(lambda: _namespace(self.processes["switch"].pid) != _namespace(os.getpid()), "the switch")
            cable = f"nvlm{os.getpid()}"
            self._in_switch("ip", "link", "add", "br0", "type", "bridge")
            self._in_switch("ip", "link", "set", "br0", "up")
            _call("ip", "link", "add", cable, "type", "veth", "peer", "name", "up0", "netns", self._switch)
            self._in_switch("ip", "link", "set", "up0", "master", "br0", "up")
            _call("ip", "addr", "add", f"{self.network}.254/24", "dev", cable)
            _call("ip", "link", "set", cable, "up")
        self._wait(lambda: (munge / "socket").exists(), "munged")
        self._daemon("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")])
        for name in self.nodes:
            self._start_node(name)
        for name in self.nodes:
            self.wait_idle(name)

    def _write_configuration(self) -> None:
        host = socket.gethostname()
        control = "127.0.0.1" if self.plain else f"{self.network}.254"
        version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, env=self.env).stdout
        lines = [
            "ClusterName=nvlm",
            f"SlurmctldHost={host}({control})",
            f"SlurmctldPort={self.port}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # a requeued job does not start before its old credential has expired: 120 s by default, 5 at least
            f"AuthInfo=socket={self.folder}/munge/socket,cred_expire=5",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/spool/%n.pid",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log",
            f"SlurmdLogFile={self.folder}/log/slurmd-%n.log",
            f"PlugStackConfig={self.folder}/plugstack.conf",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",  # more CPUs than there are
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "ReturnToService=2",
            "SlurmdTimeout=6",
            "MessageTimeout=5",
            "BatchStartTimeout=20",
            "KillWait=10",
            "MinJobAge=86400",  # there is no accounting: finished jobs stay visible to scontrol
        ]
        if self.gpus:
            lines.append("GresTypes=gpu")
        for i, name in enumerate(self.nodes):
            address, port = ("127.0.0.1", self.port + 1 + i) if self.plain else (f"{self.network}.{i + 1}", 6818)
            lines.append(
                f"NodeName={name} NodeHostname={host if self.plain else name} NodeAddr={address} Port={port} CPUs=16 "
                "Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=100000 State=UNKNOWN"
                + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
            )
        same = "Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP"
        lines += [
            f"PartitionName=main {same} Default=YES PriorityTier=5 PreemptMode=OFF",
            f"PartitionName=low {same} PriorityTier=1 PreemptMode=REQUEUE GraceTime=20",
            f"PartitionName=high {same} PriorityTier=10 PreemptMode=OFF",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        devices = all(Path(f"/dev/tty{i}").is_char_device() for i in range(self.gpus))
        gres = [f"Name=gpu File=/dev/tty{i}" for i in range(self.gpus)] if devices else [f"Name=gpu Count={self.gpus}"]
        (self.folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *(gres if self.gpus else [])]) + "\n")
        (self.folder / "plugstack.conf").write_text("")
        old = re.search(r" (20|21|22)\.", version)  # later ones want a plugin for cgroups unless told otherwise
        (self.folder / "cgroup.conf").write_text("" if old else "CgroupPlugin=disabled\n")
        hosts = ["127.0.0.1 localhost", f"{control} {host}"]
        hosts += [f"{self.network}.{i + 1} {name}" for i, name in enumerate(self.nodes)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    # ------------------------------------------------------------------------------------------------------- processes

    def _daemon(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        log: IO[bytes] = (self.folder / "log" / f"{name}.out").open("ab")
        environ = {key: value for key, value in self.env.items() if key != "SLURM_CONF"}
        self.processes[name] = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, preexec_fn=_die_with_parent
        )
        return self.processes[name]

    def _start_node(self, name: str) -> None:
        if self.plain:
            self._daemon(name, ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")])
            return
        number = self.nodes.index(name) + 1
        words = ["--propagation", "private", "bash", "-c", FIRST_PROCESS, "node", name, str(self.folder)]
        outer = self._daemon(name, [*UNSHARE, *words])
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        self._wait(lambda: bool(children.read_text().split()), name)
        first = int(children.read_text().split()[0])
        self._wait(lambda: _namespace(first) != _namespace(os.getpid()), name)
        self.first[name] = first
        self._in_switch("ip", "link", "add", f"p{number}", "type", "veth", "peer", "name", "eth0", "netns", str(first))
        self._in_switch("ip", "link", "set", f"p{number}", "master", "br0", "up")
        inside = ["nsenter", "-t", str(first), "-n", "--"]
        _call(*inside, "ip", "addr", "add", f"{self.network}.{number}/24", "dev", "eth0")
        _call(*inside, "ip", "link", "set", "eth0", "up")

    @property
    def _switch(self) -> str:
        return str(self.processes["switch"].pid)

    def _in_switch(self, *words: str) -> None:
        _call("nsenter", "-t", self._switch, "-n", "--", *words)

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > until:
                raise NoCluster(f"{what} did not come within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.02)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        parts = []
        for path in sorted((self.folder / "log").glob("*")):
            if text := path.read_text(errors="replace").strip():
                parts.append(f"--- {path.name}\n{text[-1500:]}")
        return "\n".join(parts)

    def close(self) -> None:
        """Ends every process; safe to call twice."""
        if self.plain and "slurmctld" in self.processes and self.processes["slurmctld"].poll() is None:
            self.cancel_all()  # no namespace ends what a job has started
        for name in ("slurmctld", *self.nodes, "switch", "munged"):
            self._end(name)
        if self.small.is_mount():
            _call("umount", str(self.small))

    def _end(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if (first := self.first.pop(name, None)) is not None and process is not None and process.poll() is None:
            os.kill(first, signal.SIGKILL)  # its namespace ends with it
        if process is not None:
            process.kill()
            process.wait()

    # ------------------------------------------------------------------------------------------------- what can happen

    def power_cut(self, name: str) -> None:
        """Every process of the node is gone at once."""
        self._end(name)
        self._in_switch("sh", "-c", f"ip link del p{self.nodes.index(name) + 1} 2>/dev/null || true")

    def power_on(self, name: str) -> None:
        self._start_node(name)

    def cable(self, name: str, state: str) -> None:
        """Pulls ("down") or plugs ("up") the node's network cable."""
        self._in_switch("ip", "link", "set", f"p{self.nodes.index(name) + 1}", state)

    def inside(self, name: str, *words: str) -> str:
        """Runs a command inside of a node."""
        return _call("nsenter", "-t", str(self.first[name]), "-m", "-u", "-i", "-n", "-p", "--", *words)

    # ------------------------------------------------------------------------------------------------------------ Slurm

    def run(self, *words: str, user: str | None = None, cwd: Path | None = None, **environ: str) -> str:
        """stdout of a Slurm command. Raises AssertionError with its words where it fails."""
        done = subprocess.run(
            words, capture_output=True, text=True, env={**self.env, **environ}, user=user, cwd=cwd, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *words: str, cwd: Path, environ: Mapping[str, str] | None = None, user: str | None = None) -> int:
        """Submits; returns the number of the job."""
        out = self.run("sbatch", "--parsable", *words, cwd=cwd, user=user, **(environ or {}))
        return int(out.split(";")[0])

    def show(self, job: int | str) -> dict[str, str]:
        """What Slurm knows of a job, by field."""
        text = self.run("scontrol", "-o", "show", "job", str(job)).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def cancel_all(self, seconds: float = 20) -> None:
        """Ends all jobs and waits until they are gone."""
        until = time.monotonic() + seconds
        while (jobs := self.run("squeue", "-h", "-o", "%A").split()) and time.monotonic() < until:
            subprocess.run(["scancel", "--quiet", *jobs], env=self.env, capture_output=True)
            time.sleep(0.2)

    def state(self, job: int | str) -> str:
        return self.show(job)["JobState"]

    def wait_state(self, job: int | str, states: list[str], seconds: float) -> dict[str, str]:
        until = time.monotonic() + seconds
        while (found := self.show(job))["JobState"] not in states:
            if time.monotonic() > until:
                raise AssertionError(
                    f"job {job} is {found['JobState']} ({found.get('Reason')}) and not {' or '.join(states)} after "
                    f"{seconds:.0f} s\n{self.output(job)[-3000:]}"
                )
            time.sleep(0.1)
        return found

    def wait(self, job: int | str, seconds: float = 60) -> dict[str, str]:
        """Waits for the end of a job; returns what Slurm knows of it."""
        return self.wait_state(job, FINISHED, seconds)

    def wait_idle(self, name: str, seconds: float = 30) -> None:
        self._wait(lambda: self.run("sinfo", "-h", "-p", "main", "-n", name, "-o", "%T") == "idle", name, seconds)

    def output(self, job: int | str) -> str:
        """What a job has written so far."""
        path = Path(self.show(job).get("StdOut", "/nowhere"))
        return path.read_text(errors="replace") if path.exists() else ""


def _die_with_parent() -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
    if done.returncode:
        raise NoCluster(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _free_network() -> str:
    used = _call("ip", "-o", "-4", "addr")
    for number in range(100, 200):
        if f" 10.213.{number}." not in used:
            return f"10.213.{number}"
    raise NoCluster("no free network 10.213.x")


def _free_port(count: int) -> int:
    """The first of `count` ports in a row on which nothing listens, outside of those given out by themselves."""
    for first in range(16800, 19000, 50):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, each in enumerate(sockets):
                each.bind(("0.0.0.0", first + i))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise NoCluster("no free ports")
