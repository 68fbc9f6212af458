"""Windows of the order: packs planned a window at a time, so that a step can be a number of packs and still be found.

A window is a run of about 8192 positions of the order. Its packs depend on nothing outside it. Their number is counted
once and kept beside the index (16 bytes a window: packs and tokens), so that pack n of the run, and with it any step,
is looked up in that table at once, and the length of a run in samples, tokens or epochs is known in steps exactly.

Inside a window packs come in the order of a keyed permutation: the fullest and the emptiest are not neighbours.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.mixture import Draws, Mixture, permute
from nvlm_train.data.packing import fill_bins
from nvlm_train.errors import DataError

WINDOW = 8192
WAIT_TIMEOUT_S = 300.0  # without a new line in the table
_SAVE_S = 5.0
_WINDOWS_ALONE = 100  # some seconds of work: fewer are counted without other processes
_MOST_PROCESSES = 32
_KEPT = 4  # windows whose packs are remembered; a step rarely touches more than two

Table = NDArray[np.int64]  # i64[windows, 2]: packs and tokens of each window


def window_samples(rows: int) -> int:
    """Samples in a window for sources of `rows` rows together: about 8192, so that an epoch is whole windows.

    Example: 5000 rows make windows of 5000, 20000 rows make three windows of 6667 an epoch.
    """
    return -(-rows // -(-rows // WINDOW))


class Column(NamedTuple):
    """Lengths of the rows of one source that are trained on: row k of the order is row `chosen[k]` of the index."""

    tokens: NDArray[Any]
    tiles: NDArray[Any]
    chosen: NDArray[np.int64]


class Planned(NamedTuple):
    """A window: its draws in the order of positions, their lengths, and the packs as numbers of draws."""

    draws: Draws
    tokens: NDArray[np.int64]
    tiles: NDArray[np.int64]
    packs: list[list[int]]


@dataclass(frozen=True)
class Windows:
    """The windows of an order. `columns` stand in the order of `mixture.names`; `size` is positions in a window."""

    mixture: Mixture
    columns: Sequence[Column]
    capacity: int
    tile_capacity: int | None
    size: int
    _planned: dict[int, Planned] = field(default_factory=dict, repr=False, compare=False)

    @property
    def number(self) -> int | None:
        """How many windows there are; None: without end."""
        return None if self.mixture.length is None else -(-self.mixture.length // self.size)

    def lengths(self, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(tokens, tiles) of each draw."""
        tokens = np.empty(len(draws.source), dtype=np.int64)
        tiles = np.empty(len(draws.source), dtype=np.int64)
        for d, column in enumerate(self.columns):
            mine = np.flatnonzero(draws.source == d)
            rows = column.chosen[draws.row[mine]]
            tokens[mine] = column.tokens[rows]
            tiles[mine] = column.tiles[rows]
        return tokens, tiles

    def plan(self, window: int) -> Planned:
        """The packs of a window."""
        found = self._planned.get(window)
        if found is None:
            stop = (window + 1) * self.size
            if self.mixture.length is not None:
                stop = min(stop, self.mixture.length)
            draws = self.mixture.draws(window * self.size, stop)
            tokens, tiles = self.lengths(draws)
            bins = fill_bins(tokens, tiles, self.capacity, self.tile_capacity)
            places = permute(np.arange(len(bins), dtype=np.int64), len(bins), f"{self.mixture.seed}/packs/{window}")
            found = Planned(draws, tokens, tiles, [bins[place] for place in places.tolist()])
            while len(self._planned) >= _KEPT:
                self._planned.pop(next(iter(self._planned)), None)
            self._planned[window] = found
        return found

    def count(self, window: int) -> tuple[int, int]:
        """(packs, tokens) of a window: its line of the table."""
        planned = self.plan(window)
        return len(planned.packs), int(planned.tokens.sum())

    def count_tokens(self, window: int) -> tuple[int, int]:
        """(0, tokens) of a window, for orders whose steps are samples: nothing is packed."""
        begin, stop = window * self.size, (window + 1) * self.size
        stop = stop if self.mixture.length is None else min(stop, self.mixture.length)
        return 0, int(self.lengths(self.mixture.draws(begin, stop))[0].sum())


def locate(first: NDArray[np.int64], pack: int) -> tuple[int, int]:
    """(window, pack in it) of pack number `pack`; `first[w]` is the number of window w's first pack."""
    window = int(np.searchsorted(first, pack, side="right")) - 1
    return window, pack - int(first[window])


def first_packs(table: Table) -> NDArray[np.int64]:
    """The number of each window's first pack, and behind the last window the number of all packs."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(table[:, 0])])


# ---------------------------------------------------------------------------------------------------------- the table


def open_table(
    windows: Windows,
    file: Path,
    enough: Callable[[Table], int],
    *,
    rank: int,
    packs: bool = True,
    timeout_s: float = WAIT_TIMEOUT_S,
) -> Table:
    """The table of windows: read where it exists, continued by rank 0 where it is too short, waited for by the others.

    `enough` says how many more windows a table needs (0: none). It grows in place, so a longer run counts only what
    is new. `file` names everything its lines depend on. Raises DataError when rank 0 shows no sign of life.
    """
    table = _read(file)
    last, changed = len(table), time.monotonic()
    while (more := _wanted(windows, table, enough)) > 0:
        if rank == 0:
            table = _continue(windows, table, more, file, packs)
            continue
        time.sleep(min(0.2, timeout_s / 4))
        table = _read(file)
        if len(table) != last:
            last, changed = len(table), time.monotonic()
        if time.monotonic() - changed > timeout_s:
            raise DataError(
                f"waited {timeout_s:.0f} s for rank 0 to count packs into {file} without a sign of life; "
                "data.index_dir must be a folder that all nodes share, and rank 0's log tells more."
            )
    return table


def _wanted(windows: Windows, table: Table, enough: Callable[[Table], int]) -> int:
    more = enough(table)
    return more if windows.number is None else min(more, windows.number - len(table))


def _read(file: Path) -> Table:
    try:
        table = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return np.empty((0, 2), dtype=np.int64)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: the table of windows is damaged ({error}); delete this file and start again"
        ) from error
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64:
        raise DataError(f"{file}: the table of windows is damaged; delete this file and start again")
    return table


def _write(file: Path, table: Table) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.save(stream, table)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except OSError as error:
        raise DataError(
            f"data.index_dir: cannot keep the number of packs in {file} ({error}); name a writable folder that all "
            "nodes share."
        ) from error


def _continue(windows: Windows, table: Table, more: int, file: Path, packs: bool) -> Table:
    """Counts `more` windows behind the table's last; what is done is saved every few seconds."""
    from tqdm import tqdm

    numbers = range(len(table), len(table) + more)
    lines: list[tuple[int, int]] = []
    saved = time.monotonic()
    count = windows.count if packs else windows.count_tokens
    pool = None
    try:
        processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)), more // (_WINDOWS_ALONE // 2))
        if processes > 1:
            # only lengths are sent: a memory map would be copied whole
            columns = [
                Column(np.asarray(c.tokens[c.chosen]), np.asarray(c.tiles[c.chosen]), np.arange(len(c.chosen)))
                for c in windows.columns
            ]
            pool = ProcessPoolExecutor(
                processes, get_context("spawn"), _begin, (replace(windows, columns=columns, _planned={}), packs)
            )
        found = map(count, numbers) if pool is None else pool.map(_count, numbers, chunksize=8)
        for line in tqdm(found, total=more, desc="packs per window", delay=3.0, leave=False, disable=None):
            lines.append(line)
            if time.monotonic() - saved > _SAVE_S:
                _write(file, np.concatenate([table, np.array(lines, dtype=np.int64)]))
                saved = time.monotonic()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    table = np.concatenate([table, np.array(lines, dtype=np.int64).reshape(-1, 2)])
    _write(file, table)
    return table


_of_process: list[Any] = []  # what a counting process works on


def _begin(windows: Windows, packs: bool) -> None:
    _of_process[:] = [windows.count if packs else windows.count_tokens]


def _count(window: int) -> tuple[int, int]:
    found: tuple[int, int] = _of_process[0](window)
    return found


# --------------------------------------------------------------------------------------------------- length of a run


class RunLength(NamedTuple):
    """How long a run is. One of steps, samples, tokens is given; `epochs` marks samples that came from num_epochs."""

    steps: int | None = None
    samples: int | None = None
    tokens: int | None = None
    epochs: bool = False
    text: str = ""  # as the recipe has it

    @classmethod
    def of(
        cls,
        *,
        max_steps: int | None,
        max_samples: int | None,
        max_tokens: int | None,
        num_epochs: float | None,
        rows: int,
    ) -> RunLength:
        """From the recipe's four keys; num_epochs are so many times the `rows` of all sources together, rounded up."""
        if num_epochs is not None:
            return cls(
                samples=math.ceil(rows * Fraction(str(num_epochs))), epochs=True, text=f"num_epochs {num_epochs:g}"
            )
        if max_samples is not None:
            return cls(samples=max_samples, text=f"max_samples {max_samples}")
        if max_tokens is not None:
            return cls(tokens=max_tokens, text=f"max_tokens {max_tokens}")
        return cls(steps=max_steps, text=f"max_steps {max_steps}")


Stretch = tuple[int, int]  # data steps A to B, both included, counted from 1 like the steps in a run's metrics


def merge_stretches(stretches: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """The same steps in ascending stretches that do not touch. Example: (7, 9), (2, 3), (4, 4) give (2, 4), (7, 9)."""
    merged: list[Stretch] = []
    for first, last in sorted(stretches):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def data_step(step: int, skipped: Sequence[Stretch]) -> int:
    """The data step that the run's step `step` trains, both from 0: the one at this place among those not skipped.

    skipped: of `merge_stretches`. Example, data steps 3 and 4 (counted from 1) skipped: 0, 1, 4, 5, ... for 0, 1, 2, 3.
    """
    for first, last in skipped:
        if step + 1 < first:
            break
        step += last - first + 1
    return step


@dataclass(frozen=True)
class Steps:
    """The steps of a run: how many, the table they are found by (empty where nothing needs it), and the data steps
    that it never draws (`train --skip-steps`)."""

    number: int
    table: Table
    skipped: tuple[Stretch, ...] = ()

    def data_step(self, step: int) -> int:
        """See `data_step`."""
        return data_step(step, self.skipped)


def resolve_steps(
    windows: Windows,
    length: RunLength,
    *,
    samples: int | None,
    packs: int | None,
    file: Path,
    rank: int,
    skipped: tuple[Stretch, ...] = (),
) -> Steps:
    """A run of `length` in steps of `samples` samples or `packs` packs: the fewest steps that hold it.

    The order may end (every source has max_epochs): a length in epochs then ends with its last whole step; any other
    that needs more raises DataError. Data steps that are `skipped` are replaced by later ones: the run takes as many
    steps as without them, so that its schedule reaches its end.
    """

    def table_for(column: int, target: int) -> Table:
        def more(table: Table) -> int:
            missing = target - int(table[:, column].sum())
            if missing <= 0:
                return 0
            mean = float(table[:, column].mean()) if len(table) else 0.0
            return max(1, math.ceil(missing / mean)) if mean else 1

        return open_table(windows, file, more, rank=rank, packs=packs is not None)

    unit = samples if samples is not None else packs
    assert unit is not None
    table = np.empty((0, 2), dtype=np.int64)
    units: int | None = None if length.steps is None else length.steps * unit
    if length.tokens is not None:
        table = table_for(1, length.tokens)
        units = _units_of_tokens(windows, table, length.tokens, packs is not None)
    elif length.samples is not None and samples is not None:
        units = length.samples
    elif length.samples is not None:
        wanted = -(-length.samples // windows.size)
        table = open_table(windows, file, lambda table: max(0, wanted - len(table)), rank=rank)
        units = _packs_of_samples(windows, table, length.samples)
    steps = None if units is None else -(-units // unit)
    if packs is not None and steps is not None:
        table = table_for(0, (data_step(steps - 1, skipped) + 1) * packs)
    available = _available(windows, table, unit, packs is not None, table_for)
    if available is not None:
        available -= sum(max(0, min(last, available) - first + 1) for first, last in skipped)
    if available is not None and (steps is None or steps > available):
        if available == 0 or not length.epochs:
            raise DataError(
                f"{length.text} needs {'more' if steps is None else steps} steps, but max_epochs of the sources end "
                f"the order after {windows.mixture.length} samples, which make {available} whole steps of {unit} "
                f"{'samples' if packs is None else 'packs'}; "
                + (
                    f"use max_steps={available} or fewer, or raise"
                    if available
                    else "make global_batch smaller, or raise"
                )
                + " data.mixture.*.max_epochs."
            )
        steps = available
    assert steps is not None
    return Steps(steps, table, skipped)


def _available(
    windows: Windows, table: Table, unit: int, packs: bool, table_for: Callable[[int, int], Table]
) -> int | None:
    """Whole steps in an order that ends; None where it does not, or where the table has not come to its end."""
    if windows.mixture.length is None:
        return None
    if not packs:
        return windows.mixture.length // unit
    return int(table[:, 0].sum()) // unit if len(table) == windows.number else None


def _packs_of_samples(windows: Windows, table: Table, samples: int) -> int | None:
    """The fewest first packs that hold so many samples; None: the order ends before."""
    if windows.mixture.length is not None and samples > windows.mixture.length:
        return None
    window, missing = divmod(samples, windows.size)
    before = int(table[:window, 0].sum())
    if not missing:
        return before
    held = np.cumsum([len(pack) for pack in windows.plan(window).packs])
    return before + int(np.searchsorted(held, missing)) + 1


def _units_of_tokens(windows: Windows, table: Table, tokens: int, packs: bool) -> int | None:
    """The fewest first packs (or positions) that hold so many tokens; None: the order ends before."""
    ends = np.cumsum(table[:, 1])
    window = int(np.searchsorted(ends, tokens))
    if window == len(table):
        return None
    missing = tokens - (int(ends[window - 1]) if window else 0)
    if packs:
        planned = windows.plan(window)
        held = np.cumsum([int(planned.tokens[pack].sum()) for pack in planned.packs])
        return int(table[:window, 0].sum()) + int(np.searchsorted(held, missing)) + 1
    stop = (window + 1) * windows.size
    stop = stop if windows.mixture.length is None else min(stop, windows.mixture.length)
    held = np.cumsum(windows.lengths(windows.mixture.draws(window * windows.size, stop))[0])
    return window * windows.size + int(np.searchsorted(held, missing)) + 1
