"""Which rank holds the others up: gathered at logging steps, named after several in a row.

What counts is a rank's own time in the logged step: computing (the step less its waits in collectives, see
`engine.waiting`) and waiting for its data. A rank whose packs cost more by the plan may take longer by as much.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nvlm_train.data.packing import Pack
from nvlm_train.engine import dist

RATIO = 1.2  # times the median
LOGS = 3  # in a row
_LEAST_S = 0.05  # above the median: a step of milliseconds is mostly noise


class RankTimes(NamedTuple):
    """Seconds of one rank in one step."""

    compute: float
    data_wait: float
    collective_wait: float


def gather_times(world: dist.World, own: RankTimes) -> list[RankTimes]:
    """Every rank's, in rank order, on every rank: one small all-reduce on the control group."""
    slots = [0.0] * (len(own) * world.world_size)
    slots[len(own) * world.rank : len(own) * (world.rank + 1)] = own
    summed = dist.sum_over_ranks(world, slots, torch.float64)
    return [RankTimes(*summed[i : i + len(own)]) for i in range(0, len(summed), len(own))]


def summary(times: Sequence[RankTimes]) -> dict[str, dict[str, float]]:
    """Median and maximum over the ranks of each part."""
    columns = zip(RankTimes._fields, zip(*times, strict=True), strict=True)
    return {
        part: {"median": round(statistics.median(values), 4), "max": round(max(values), 4)} for part, values in columns
    }


def planned_work(dealt: Sequence[Sequence[Sequence[Pack]]]) -> list[float]:
    """Cost of each rank's packs of a step, by the plan's cost model."""
    return [sum(p.cost for ranks in dealt for p in ranks[rank]) for rank in range(len(dealt[0]))]


class Stragglers:
    """Remembers from log to log which ranks were too slow. hosts: of each rank."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = hosts
        self._in_a_row: Counter[int] = Counter()

    def look(self, times: Sequence[RankTimes], work: Sequence[float]) -> list[dict[str, Any]]:
        """The ranks that were above RATIO x the median in each of the last LOGS logs, this one included.

        Of an even number of ranks the lower median counts: of two, one may be slow.
        """
        if not times:
            return []
        own = [found.compute + found.data_wait for found in times]
        median, usual = statistics.median_low(own), statistics.median_low(work)
        named = []
        for rank, seconds in enumerate(own):
            more_work = max(1.0, work[rank] / usual) if usual else 1.0
            if seconds <= max(RATIO * median * more_work, median + _LEAST_S):
                del self._in_a_row[rank]
                continue
            self._in_a_row[rank] += 1
            if self._in_a_row[rank] >= LOGS:
                named.append(
                    {
                        "rank": rank,
                        "host": self.hosts[rank],
                        "times_median": round(seconds / median, 2) if median else None,
                        "compute": round(times[rank].compute, 4),
                        "data_wait": round(times[rank].data_wait, 4),
                    }
                )
        return named

    def news(self, named: Sequence[dict[str, Any]]) -> list[str]:
        """What is to be said of them: once when a rank is named first, and again every hundredth log."""
        return [
            f"rank {one['rank']} on {one['host']} holds the others up: {one['times_median']} times the median of the "
            f"ranks in {self._in_a_row[one['rank']]} logs in a row (computing {one['compute']:.2f} s, waiting for data "
            f"{one['data_wait']:.2f} s a step)"
            for one in named
            if self._in_a_row[one["rank"]] % 100 == LOGS
        ]
