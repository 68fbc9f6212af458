"""Who am I: rank, world and address, from whatever launched this process.

Four ways are known: alone, torchrun (on any number of hosts), srun with one torchrun per host, srun with one task per
rank. torchrun's variables win over SLURM's: under torchrun SLURM_PROCID is the rank of the *agent*, not of the worker.
What only the ranks together can tell (a WORLD_SIZE that differs, a rank twice) is found when they meet, see
`engine.heartbeat`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_train.errors import SetupError

TORCHRUN_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process's place in the job and where the ranks meet."""

    launcher: str  # "torchrun", "environment" (RANK set by something else), "srun" or "alone"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    agent_store: bool = False  # torchrun's agent keeps the store at this address, else rank 0 does
    note: str = ""

    @property
    def verdict(self) -> str:
        """One line for the first screen."""
        where = f", meeting at {self.address}:{self.port}" if self.world_size > 1 else ""
        return (
            f"{self.launcher}: rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
            f"{self.local_world_size}{where}{self.note}"
        )


def _number(environ: Mapping[str, str], key: str, launcher: str, default: str | None = None) -> int:
    value = environ.get(key, default)
    if value is None:
        raise SetupError(
            f"{launcher} sets RANK, WORLD_SIZE and LOCAL_RANK together, but {key} is not set; start with torchrun, or "
            "unset RANK and WORLD_SIZE to run alone"
        )
    if not value.isdigit():
        raise SetupError(f"{key}={value!r} in the environment is not a whole number")
    return int(value)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def resolve_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """Reads torchrun's variables, else those of `srun` with one task per rank, else a world of one.

    Raises SetupError where the environment contradicts itself.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        launch = _from_ranks(environ)
    elif _step_tasks(environ) > 1:
        launch = _from_slurm(environ)
    else:
        launch = _alone(environ)
    _require_sense(launch)
    return launch


def _from_ranks(environ: Mapping[str, str]) -> Launch:
    torchrun = "TORCHELASTIC_RUN_ID" in environ
    name = "torchrun" if torchrun else "environment"
    rank, world_size = _number(environ, "RANK", "torchrun"), _number(environ, "WORLD_SIZE", "torchrun")
    missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if world_size > 1 and key not in environ]
    if missing:
        raise SetupError(
            f"WORLD_SIZE={world_size}, but not {' and '.join(missing)}: ranks could not find each other; export the "
            "address of rank 0's host and a free port there, or start with torchrun, which sets all"
        )
    launch = Launch(
        launcher=name,
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", "torchrun"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", "torchrun", str(world_size)),
        address=environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(environ, "MASTER_PORT", "torchrun", "29500"),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    tasks = _step_tasks(environ)
    if torchrun or tasks <= 1:
        return launch
    # srun started several of us, each for itself: then the variables are somebody's left in the batch script
    task = _number(environ, "SLURM_PROCID", "srun")
    if (rank, world_size) != (task, tasks):
        raise SetupError(
            f"RANK={rank} and WORLD_SIZE={world_size}, but srun started this process as task SLURM_PROCID={task} of "
            f"SLURM_STEP_NUM_TASKS={tasks}, and no torchrun stands in between; unset RANK and WORLD_SIZE (this package "
            "reads srun's own variables), or let srun start torchrun with one task per host"
        )
    return launch


def _step_tasks(environ: Mapping[str, str]) -> int:
    """Tasks of the SLURM step that this process belongs to; 1 outside of any (a batch script, a login shell)."""
    if "SLURM_STEP_ID" not in environ:
        return 1
    return _number(environ, "SLURM_STEP_NUM_TASKS", "srun", "1")


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    tasks, rank = _step_tasks(environ), _number(environ, "SLURM_PROCID", "srun")
    ntasks = _number(environ, "SLURM_NTASKS", "srun", str(tasks))
    if ntasks != tasks:
        raise SetupError(
            f"SLURM_NTASKS={ntasks}, but SLURM_STEP_NUM_TASKS={tasks}: the variables of two different steps are mixed; "
            "do not export SLURM_NTASKS by hand"
        )
    per_host = expand_tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    host = _number(environ, "SLURM_NODEID", "srun", "0")
    if sum(per_host) != tasks or host >= len(per_host):
        raise SetupError(
            f"SLURM_STEP_TASKS_PER_NODE={environ.get('SLURM_STEP_TASKS_PER_NODE')!r} counts {sum(per_host)} tasks on "
            f"{len(per_host)} hosts, but SLURM_STEP_NUM_TASKS={tasks} and SLURM_NODEID={host}"
        )
    address = environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise SetupError(
            "srun started several tasks, but neither MASTER_ADDR nor SLURM_STEP_NODELIST says where rank 0 is; export "
            "MASTER_ADDR, the first host of the step"
        )
    job = _number(environ, "SLURM_JOB_ID", "srun", "0")
    port = _number(environ, "MASTER_PORT", "srun", str(20000 + job % 10000))  # below the ports given out by themselves
    return Launch("srun", rank, tasks, _number(environ, "SLURM_LOCALID", "srun"), per_host[host], address, port)


def _alone(environ: Mapping[str, str]) -> Launch:
    if environ.get("LOCAL_RANK", "0") not in ("", "0", "-1"):
        raise SetupError(
            f"LOCAL_RANK={environ['LOCAL_RANK']}, but RANK and WORLD_SIZE are not set: this process would train alone; "
            "start with torchrun, or unset LOCAL_RANK"
        )
    for key in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if "SLURM_STEP_ID" not in environ and environ.get(key, "1") not in ("0", "1"):
            raise SetupError(
                f"{key}={environ[key]}: mpirun started several processes, but RANK and WORLD_SIZE are not set, so each "
                "would train alone in the same folder; start with torchrun, or export RANK, WORLD_SIZE, LOCAL_RANK, "
                "MASTER_ADDR and MASTER_PORT"
            )
    note = ""
    if environ.get("SLURM_NTASKS", "1") not in ("", "0", "1") and "SLURM_STEP_ID" not in environ:
        note = f" (the SLURM allocation has {environ['SLURM_NTASKS']} tasks, but no srun or torchrun started this)"
    return Launch("alone", 0, 1, 0, 1, "127.0.0.1", _free_port(), note=note)


def _require_sense(launch: Launch) -> None:
    if not 0 <= launch.rank < launch.world_size:
        raise SetupError(
            f"the environment says rank {launch.rank} in a world of {launch.world_size}; ranks run from 0 to "
            f"{launch.world_size - 1}"
        )
    if launch.local_world_size > launch.world_size:
        raise SetupError(
            f"the environment says {launch.local_world_size} ranks on this host (LOCAL_WORLD_SIZE) in a world of "
            f"{launch.world_size} (WORLD_SIZE); a host cannot have more than all"
        )
    if launch.local_rank >= launch.local_world_size:
        raise SetupError(
            f"the environment says local rank {launch.local_rank} (LOCAL_RANK) on a host with "
            f"{launch.local_world_size} ranks (LOCAL_WORLD_SIZE); local ranks run from 0 to "
            f"{launch.local_world_size - 1}"
        )


def expand_tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of tasks on each host. Example: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise SetupError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not in SLURM's form, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """The first of SLURM's list of hosts. Examples: "gpu[07-09,12],login" is "gpu07"; "a1-ib,b" is "a1-ib"."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\]([^,\[]*))?", nodelist)
    if match is None:
        return ""
    return match[1] + (re.split(r"[-,]", match[2])[0] if match[2] else "") + (match[3] or "")


def export_launch(launch: Launch, environ: dict[str, str] | os._Environ[str] | None = None) -> None:
    """Writes the launch as torchrun's variables, which torch.distributed and DeepSpeed read."""
    environ = os.environ if environ is None else environ
    values = (launch.rank, launch.world_size, launch.local_rank, launch.address, launch.port)
    environ.update({name: str(value) for name, value in zip(TORCHRUN_KEYS, values, strict=True)})
    environ["LOCAL_WORLD_SIZE"] = str(launch.local_world_size)
