"""Rank-aware logging on the standard library: rank 0 speaks, the others only warn."""

from __future__ import annotations

import logging
import os
import sys

FORMAT = "%(asctime)s %(levelname).1s %(message)s"


def rank_from_environment() -> int:
    """The global rank as the launcher wrote it (torchrun first, then SLURM); 0 where there is no launcher."""
    for key in ("RANK", "SLURM_PROCID"):
        if os.environ.get(key, "").isdigit():
            return int(os.environ[key])
    return 0


def set_up_logging(level: int = logging.INFO) -> None:
    """Sends the package's log to stderr: everything from rank 0, warnings from every other rank with its number.

    The logger itself takes everything on every rank, for the files of `nvlm_train.attempts`.
    """
    rank = rank_from_environment()
    logger = logging.getLogger("nvlm_train")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(level if rank == 0 else max(level, logging.WARNING))
        form = FORMAT if rank == 0 else FORMAT.replace("%(message)s", f"[rank {rank}] %(message)s")
        handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
        logger.addHandler(handler)
    logger.propagate = False


def get_logger(name: str) -> logging.Logger:
    """`get_logger(__name__)` in every module."""
    return logging.getLogger(name)
