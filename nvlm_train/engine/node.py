"""Weights that every rank needs whole, read from shared storage once per node.

A frozen tower of 11 GB on 256 ranks would be 2.8 TB from the file system at the start of a run; on 32 nodes it is
0.35 TB. Local rank 0 reads a tensor and hands it to its node's other ranks, one tensor after the other.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.engine.dist import World, gather
from nvlm_train.errors import CheckpointError


def nodes(places: list[tuple[str, int]]) -> list[list[int]]:
    """The ranks of each node. places: (host, local rank) in rank order; a node begins with its local rank 0.

    Example, two nodes that got their ranks by turns: [(a, 0), (b, 0), (a, 1), (b, 1)] -> [[0, 2], [1, 3]].
    """
    found: list[list[int]] = []
    current: dict[str, list[int]] = {}
    for rank, (host, local_rank) in enumerate(places):
        if local_rank == 0 or host not in current:
            current[host] = []
            found.append(current[host])
        current[host].append(rank)
    return found


class ReadOncePerNode:
    """`model.pretrained.Weights` whose `read` every rank of a node calls alike, while one of them reads.

    `read_slice` stays each rank's own: what is shared out is read by whoever keeps it. Use it in a `with`.
    bytes_read: what this process has taken from storage so far.
    """

    def __init__(self, weights: Any, world: World, timeout_s: float) -> None:
        self._weights = weights
        self._rank = world.rank
        self.bytes_read = 0
        place = (socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")))
        found = nodes(gather(world, place))
        self._ranks = next(ranks for ranks in found if world.rank in ranks)
        # every rank makes every group, as torch wants it
        timeout = timedelta(seconds=timeout_s)
        groups = [dist.new_group(ranks, timeout, "gloo") if len(ranks) > 1 else None for ranks in found]
        self._group = groups[found.index(self._ranks)]

    def __enter__(self) -> ReadOncePerNode:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._weights, attribute)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        """This rank's own slice."""
        values: Tensor = self._weights.read_slice(name, begin, end)
        self.bytes_read += values.nbytes
        return values

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU, in its stored type. Raises CheckpointError on the whole node where it cannot be
        read."""
        leader = self._ranks[0]
        value: Tensor | None = None
        error: Exception | None = None
        if self._rank != leader:
            value = torch.empty(self._weights.shape(name), dtype=self._weights.dtype(name))
        else:
            try:
                value = self._weights.read(name)
                self.bytes_read += value.nbytes
            except Exception as raised:
                error = raised
        if self._group is not None:
            told = torch.tensor([int(error is None)])
            dist.broadcast(told, leader, group=self._group)
            if self._rank != leader and not told[0]:
                raise CheckpointError(f"{self._weights.where(name)}: rank {leader} of this node could not read it")
        if error is not None:
            raise error
        assert value is not None
        if self._group is not None:
            value = value.contiguous()
            dist.broadcast(value.view(-1).view(torch.uint8), leader, group=self._group)
        return value
