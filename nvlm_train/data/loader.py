"""From the plan to batches: the threads that carry it out.

`StepLoader` decodes whole steps ahead with threads in the trainer's process: Pillow and the tokenizer release
the GIL, and nothing needs to be handed over between processes.

A sample that turns out bad only now (a damaged image, a changed file) leaves a hole in its pack: it is counted,
logged to bad_samples.jsonl, and never replaced, so that no other sample moves. A source stops the run when it has
more bad samples than data.max_bad_share allows: distinct bad rows > share * min(rows of the source, max(samples seen,
1000)); or when the first 8 samples seen of it are all bad (unless the share is 1). Each rank judges by what it has
seen since its start.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from nvlm_train.batch import IGNORE_INDEX, Batch, SampleRef
from nvlm_train.data import packing
from nvlm_train.data.images import BadSample
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan, LoadedSample
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger

log = get_logger(__name__)

_SEEN_AT_LEAST = 1000
_FIRST_SAMPLES = 8
_WARNINGS_PER_SOURCE = 5


@dataclass
class StepData:
    """One step's work of this rank; all counts are this rank's.

    tokens: planned for the model, padding left out. trained_tokens: labels that carry loss. tokens_by_source: trained
    tokens. bad: samples left out, by (source, reason). wait_s: how long the trainer waited for it.
    """

    step: int
    micro_batches: list[Batch]
    trained_tokens: int
    tokens: int
    tiles: int
    samples: int
    samples_by_source: dict[str, int]
    tokens_by_source: dict[str, int]
    bad: dict[tuple[str, str], int]
    wait_s: float


@dataclass(frozen=True)
class _Bad:
    ref: SampleRef
    line: int
    where: str
    reason: str
    message: str


@dataclass(frozen=True)
class _Built:
    """A micro batch and what is to be said about it."""

    batch: Batch
    tokens: int
    trained_by_source: dict[str, int]
    bad: list[_Bad]


# ------------------------------------------------------------------------------------------------------------ batches


def build_batch(
    plan: DataPlan, packs: Sequence[Pack], num_tile_chunks: int, stop: threading.Event | None = None
) -> _Built:
    """Loads the samples of `packs` and lays them side by side; bad samples are left out of their pack."""
    rows: list[list[LoadedSample]] = []
    bad: list[_Bad] = []
    for item in packs:
        row: list[LoadedSample] = []
        for ref in item.samples:
            if stop is not None and stop.is_set():
                raise _Closed
            try:
                row.append(plan.load(ref))
            except BadSample as error:
                index = plan.indexes[ref.source]
                line = int(index.rows[ref.row]["line"])
                bad.append(_Bad(ref, line, index.where(ref.row), error.reason, str(error)))
        rows.append(row)
    batch = collate(plan, rows, num_tile_chunks)
    trained: Counter[str] = Counter()
    for loaded in (one for row in rows for one in row):
        trained[loaded.ref.source] += int((loaded.rendered.labels != IGNORE_INDEX).sum())
    tokens = sum(len(one.rendered.input_ids) for row in rows for one in row)
    return _Built(batch, tokens, dict(trained), bad)


def collate(plan: DataPlan, rows: Sequence[Sequence[LoadedSample]], num_tile_chunks: int) -> Batch:
    """Rows of samples to one Batch; shorter rows are padded at the end, a row without samples is one pad token.

    Example, rows of 3 + 2 and 4 tokens: S = 5, cu_seqlens [0, 3, 5, 9, 10], position_ids [0 1 2 0 1] and [0 1 2 3 0].
    """
    lengths = [[len(one.rendered.input_ids) for one in row] for row in rows]
    width = max(1, max(sum(row) for row in lengths))
    shape = (len(rows), width)
    per_tile = plan.settings.image_tokens_per_tile
    px = plan.settings.tile_size
    input_ids = np.full(shape, plan.tokenizer.pad, dtype=np.int64)  # [B, S]
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)  # [B, S]
    position_ids = np.zeros(shape, dtype=np.int64)  # [B, S]
    image_slots = np.full(shape, -1, dtype=np.int64)  # [B, S]
    num_tiles = sum(len(t) for row in rows for one in row for t in one.tiles)
    tiles = np.empty((num_tiles, 3, px, px), dtype=np.uint8)  # [T, 3, px, px]
    bounds = [0]
    tile = 0
    for b, row in enumerate(rows):
        at = 0
        for one in row:
            end = at + len(one.rendered.input_ids)
            input_ids[b, at:end] = one.rendered.input_ids
            labels[b, at:end] = one.rendered.labels
            position_ids[b, at:end] = np.arange(end - at)
            first = tile
            for cut_image in one.tiles:
                tiles[tile : tile + len(cut_image)] = cut_image
                tile += len(cut_image)
            for k, start in enumerate(one.rendered.tile_starts):
                slot = (first + k) * per_tile
                image_slots[b, at + start : at + start + per_tile] = np.arange(slot, slot + per_tile)
            bounds.append(b * width + end)
            at = end
        if at < width:
            position_ids[b, at:] = np.arange(width - at)
            bounds.append((b + 1) * width)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),  # [G+1]
        max_seqlen=int(np.diff(bounds).max()),
        tiles=torch.from_numpy(tiles),
        image_slots=torch.from_numpy(image_slots),
        num_trained_tokens=int((labels != IGNORE_INDEX).sum()),
        num_tile_chunks=num_tile_chunks,
        samples=tuple(one.ref for row in rows for one in row),
    )


def null_batch(plan: DataPlan) -> Batch:
    """One pad token, no label, no tile: the same module calls with weight 0."""
    return collate(plan, [[]], 0)


class _Closed(Exception):
    """The loader was closed while this batch was being built."""


class StepLoader:
    """Iterates `StepData` of this rank from `start_step` to before `end_step`, `data.prefetch_steps` steps ahead.

    What it yields depends on the plan alone, not on the number of threads. Any error in a thread, and DataError when a
    source has too many bad samples, is raised by `next`; the loader is closed then. Use it in a `with`, or `close` it.
    """

    def __init__(self, plan: DataPlan, *, start_step: int, end_step: int) -> None:
        self._plan = plan
        self._next_step = start_step
        self._end_step = end_step
        self._stop = threading.Event()
        self._steps: deque[tuple[int, list[Future[_Built]]]] = deque()
        self._watch = _BadSamples(plan)
        self._threads = ThreadPoolExecutor(plan.recipe.data.num_threads, thread_name_prefix="nvlm-data")

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> StepData:
        begin = time.perf_counter()
        try:
            self._submit()
            if not self._steps:
                self.close()
                raise StopIteration
            step, futures = self._steps.popleft()
            built = [future.result() for future in futures]
            self._submit()
            wait_s = time.perf_counter() - begin
            for one in built:
                self._watch.account(step, one)
        except BaseException:
            self.close()
            raise
        return _summary(step, built, wait_s)

    def close(self) -> None:
        """Stops the threads; what was prepared is dropped. May be called twice."""
        self._stop.set()
        self._steps.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        if self._stop.is_set():
            return
        plan = self._plan
        while self._next_step < self._end_step and len(self._steps) < plan.recipe.data.prefetch_steps:
            futures = [
                self._threads.submit(build_batch, plan, ranks[plan.rank], plan.chunks(ranks), self._stop)
                for ranks in plan.deal_step(self._next_step)
            ]
            self._steps.append((self._next_step, futures))
            self._next_step += 1


def _summary(step: int, built: Sequence[_Built], wait_s: float) -> StepData:
    samples: Counter[str] = Counter(ref.source for one in built for ref in one.batch.samples)
    trained: Counter[str] = Counter()
    for one in built:
        trained.update(one.trained_by_source)
    return StepData(
        step=step,
        micro_batches=[one.batch for one in built],
        trained_tokens=sum(one.batch.num_trained_tokens for one in built),
        tokens=sum(one.tokens for one in built),
        tiles=sum(len(one.batch.tiles) for one in built),
        samples=sum(samples.values()),
        samples_by_source=dict(samples),
        tokens_by_source=dict(trained),
        bad=dict(Counter((item.ref.source, item.reason) for one in built for item in one.bad)),
        wait_s=wait_s,
    )


class _BadSamples:
    """Counts, writes down and judges the bad samples of this rank."""

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self._seen: Counter[str] = Counter()
        self._bad_rows: dict[str, set[int]] = {}
        self._warned: Counter[str] = Counter()
        name = "bad_samples.jsonl" if plan.rank == 0 else f"bad_samples.rank{plan.rank}.jsonl"
        self._file = Path(plan.recipe.output_dir) / name

    def account(self, step: int | None, built: _Built) -> None:
        """Takes one micro batch into account. Raises DataError when a source has too many bad samples."""
        self._seen.update(ref.source for ref in built.batch.samples)
        self._seen.update(item.ref.source for item in built.bad)
        for item in built.bad:
            self._write(step, item)
            self._bad_rows.setdefault(item.ref.source, set()).add(item.ref.row)
            self._judge(item)

    def _judge(self, item: _Bad) -> None:
        name, share = item.ref.source, self._plan.recipe.data.max_bad_share
        bad, seen = len(self._bad_rows[name]), self._seen[name]
        rows = len(self._plan.train_rows[name] if name in self._plan.train_rows else self._plan.held_out[name])
        allowed = share * min(rows, max(seen, _SEEN_AT_LEAST))
        only_bad = share < 1 and seen >= min(_FIRST_SAMPLES, rows) and bad >= min(seen, rows)
        if bad > allowed or only_bad:
            raise DataError(
                f"source {name!r}: {bad} of {seen} samples seen cannot be used, more than data.max_bad_share {share} "
                f"allows; the last is {item.where}: {item.message}. "
                f"All are in {self._file}."
            )

    def _write(self, step: int | None, item: _Bad) -> None:
        path = self._plan.indexes[item.ref.source].path
        if self._warned[item.ref.source] < _WARNINGS_PER_SOURCE:
            self._warned[item.ref.source] += 1
            log.warning("dropped %s: %s (%s)", item.where, item.message, item.reason)
        record = {
            "step": step,
            "source": item.ref.source,
            "file": str(path),
            "line": item.line,
            "where": item.where,
            "epoch": item.ref.epoch,
            "reason": item.reason,
            "message": item.message,
        }
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("cannot write %s: %s", self._file, error)


def validation_batches(plan: DataPlan, source_name: str) -> list[Batch]:
    """This rank's share of a validation source: the same number of batches on every rank, null packs fill up.

    The packs are the same for every number of ranks. Bad samples are left out and logged.
    """
    dealt = packing.deal(plan.plan_validation(source_name), plan.world_size, plan.recipe.micro_batch_size)
    watch = _BadSamples(plan)
    batches = []
    with ThreadPoolExecutor(plan.recipe.data.num_threads, thread_name_prefix="nvlm-validation") as threads:
        futures = [threads.submit(build_batch, plan, ranks[plan.rank], plan.chunks(ranks)) for ranks in dealt]
        try:
            for future in futures:
                built = future.result()
                watch.account(None, built)
                batches.append(built.batch)
        except BaseException:
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return batches
