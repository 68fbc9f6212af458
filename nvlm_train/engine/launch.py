"""Who am I: rank, world and address, from whatever launched this process.

torchrun's variables win over SLURM's: under torchrun SLURM_PROCID is the rank of the *agent*, not of the worker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nvlm_train.errors import SetupError

TORCHRUN_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process's place in the job and where the ranks meet."""

    launcher: str  # "torchrun", "srun" or "alone"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int

    @property
    def verdict(self) -> str:
        """One line for the first screen."""
        return (
            f"{self.launcher}: rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
            f"{self.local_world_size}, meeting at {self.address}:{self.port}"
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
        rank, world_size = _number(environ, "RANK", "torchrun"), _number(environ, "WORLD_SIZE", "torchrun")
        launch = Launch(
            launcher="torchrun",
            rank=rank,
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", "torchrun"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", "torchrun", str(world_size)),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environ, "MASTER_PORT", "torchrun", "29500"),
        )
    elif "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", "srun", "1") > 1:
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            raise SetupError(
                "srun started this step with several tasks, but MASTER_ADDR and MASTER_PORT are not set; export them "
                "in the batch script: the first host of the allocation and a free port"
            )
        launch = Launch(
            launcher="srun",
            rank=_number(environ, "SLURM_PROCID", "srun"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS", "srun"),
            local_rank=_number(environ, "SLURM_LOCALID", "srun"),
            local_world_size=int(environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]),
            address=environ["MASTER_ADDR"],
            port=_number(environ, "MASTER_PORT", "srun"),
        )
    else:
        launch = Launch("alone", 0, 1, 0, 1, "127.0.0.1", _free_port())
    if not 0 <= launch.rank < launch.world_size:
        raise SetupError(
            f"the environment says rank {launch.rank} in a world of {launch.world_size}; ranks run from 0 to "
            f"{launch.world_size - 1}"
        )
    return launch


def export_launch(launch: Launch, environ: dict[str, str] | os._Environ[str] | None = None) -> None:
    """Writes the launch as torchrun's variables, which torch.distributed and DeepSpeed read."""
    environ = os.environ if environ is None else environ
    values = (launch.rank, launch.world_size, launch.local_rank, launch.address, launch.port)
    environ.update({name: str(value) for name, value in zip(TORCHRUN_KEYS, values, strict=True)})
    environ["LOCAL_WORLD_SIZE"] = str(launch.local_world_size)
