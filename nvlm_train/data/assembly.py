"""From packs to batches: threads that read, decode and cut, each tile straight into its place in the batch's buffer.

A micro batch is one job; its samples are decoded side by side, and the thread that ends last lays the batch out. The
index knows how many tiles each sample has, so every sample's place is known before any image is opened; where a sample
turns out bad, those behind it move up.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import IGNORE_INDEX, Batch, Memory, SampleRef
from nvlm_train.data.chat import Rendered
from nvlm_train.data.images import BadSample
from nvlm_train.data.memory import lay_out_memory
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan, LoadedSample
from nvlm_train.data.slow import SlowReads
from nvlm_train.log import get_logger

log = get_logger(__name__)

CLOSE_TIMEOUT_S = 5.0  # for what is being decoded just now; a read that is stuck is left behind
HASH_BYTES = 16


@dataclass(frozen=True)
class Bad:
    """A sample that was left out, and why."""

    ref: SampleRef
    line: int
    where: str
    reason: str
    message: str


Arrays = dict[str, Any]  # the fields of a Batch, its tensors as numpy arrays


@dataclass(frozen=True)
class Built:
    """A micro batch and what is to be said about it. tokens: padding left out."""

    arrays: Arrays
    tokens: int
    trained_by_source: dict[str, int]
    bad: list[Bad]

    @cached_property
    def batch(self) -> Batch:
        """The batch; its tensors lie on the arrays' memory."""
        return as_batch(self.arrays)


class Closed(Exception):
    """The threads were stopped before this batch was built."""


def on_heap(num_bytes: int) -> NDArray[np.uint8]:
    """Memory for tiles: the process's own."""
    return np.empty(num_bytes, dtype=np.uint8)


class Builder:
    """Builds batches in `num_threads` threads (0: in the caller's), in the order they were submitted.

    allocate: where the tiles go: bytes -> u8[bytes]. augment: whether data.augment applies (never to held-out data).
    """

    def __init__(
        self,
        plan: DataPlan,
        num_threads: int,
        *,
        augment: bool,
        allocate: Callable[[int], NDArray[np.uint8]] = on_heap,
        name: str = "nvlm-data",
    ) -> None:
        self.plan = plan
        self.augment = augment
        self.allocate = allocate
        self.watch = SlowReads(plan.recipe.data.slow_read_s)
        self.stopped = threading.Event()
        self._tasks: queue.SimpleQueue[tuple[_Job, int] | None] = queue.SimpleQueue()
        # Daemons: a thread that hangs in a read must not keep the process from ending.
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{k}", daemon=True) for k in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, packs: Sequence[Pack], num_tile_chunks: int) -> Future[Built]:
        """The batch of these packs, as soon as it is built. Its exception is whatever was no bad sample."""
        job = _Job(self, packs, num_tile_chunks)
        for k in range(max(1, len(job.refs))):
            if self._threads:
                self._tasks.put((job, k))
            else:
                job.run(k)
        return job.future

    def close(self) -> None:
        """Stops at the next sample; what was submitted is dropped. May be called twice."""
        self.stopped.set()
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for name, seconds in self.watch.now():
            log.warning("gave up on reading %s after %.0f s", name, seconds)
        self.watch.close()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            job, k = task
            job.run(k)
            del task, job  # while it waits for the next, this thread must not keep the batch's memory


class _Job:
    """One micro batch in the making."""

    def __init__(self, builder: Builder, packs: Sequence[Pack], num_tile_chunks: int) -> None:
        self.future: Future[Built] = Future()
        self.refs = [ref for item in packs for ref in item.samples]
        self._builder = builder
        self._packs = packs
        self._num_tile_chunks = num_tile_chunks
        self._lock = threading.Lock()
        self._left = max(1, len(self.refs))
        self._done: list[LoadedSample | Bad | None] = [None] * len(self.refs)
        self._hashes: list[tuple[bytes, ...]] = [()] * len(self.refs)
        plan = builder.plan
        counts = [int(plan.indexes[ref.source].rows[ref.row]["tiles"]) for ref in self.refs]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # first tile of each sample
        self._tiles: NDArray[np.uint8] | None = None

    def run(self, k: int) -> None:
        """Loads sample k; the last call of all lays the batch out."""
        if self.future.done():
            return
        try:
            if self._builder.stopped.is_set():
                raise Closed
            if self.refs:
                self._load(k)
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                self.future.set_result(self._built())
        except BaseException as error:
            with self._lock:
                if not self.future.done():
                    self.future.set_exception(error)

    def _load(self, k: int) -> None:
        plan, ref = self._builder.plan, self.refs[k]
        with self._lock:
            if self._tiles is None:  # not before its turn: what waits takes no memory
                px = plan.settings.tile_size
                total = int(self._starts[-1])
                self._tiles = self._builder.allocate(total * 3 * px * px).reshape(total, 3, px, px)  # [T, 3, px, px]
        place = self._tiles[self._starts[k] : self._starts[k + 1]]  # [t, 3, px, px]
        try:
            loaded = plan.load(ref, place, self._builder.augment, self._builder.watch)
        except BadSample as error:
            index = plan.indexes[ref.source]
            line = int(index.rows[ref.row]["line"])
            self._done[k] = Bad(ref, line, index.where(ref.row), error.reason, str(error))
            return
        if plan.recipe.vision_feature_cache is not None:
            self._hashes[k] = tuple(hashlib.blake2b(tile, digest_size=HASH_BYTES).digest() for tile in place)
        self._done[k] = loaded

    def _built(self) -> Built:
        plan = self._builder.plan
        end = 0
        for k, one in enumerate(self._done):
            if isinstance(one, LoadedSample):
                count = len(one.rendered.tile_starts)
                if count and end != self._starts[k]:
                    assert self._tiles is not None
                    self._tiles[end : end + count] = self._tiles[self._starts[k] : self._starts[k] + count]
                end += count
        rows: list[list[LoadedSample]] = []
        at = 0
        for item in self._packs:
            mine = self._done[at : at + len(item.samples)]
            rows.append([one for one in mine if isinstance(one, LoadedSample)])
            at += len(item.samples)
        px = plan.settings.tile_size
        tiles = np.empty((0, 3, px, px), np.uint8) if self._tiles is None else self._tiles[:end]  # [T, 3, px, px]
        hashes = tuple(one for held in self._hashes for one in held)
        arrays = _lay_side_by_side(plan, rows, self._num_tile_chunks, tiles, hashes)
        trained: Counter[str] = Counter()
        for loaded in (one for row in rows for one in row):
            trained[loaded.ref.source] += int((loaded.rendered.labels != IGNORE_INDEX).sum())
        tokens = sum(len(one.rendered.input_ids) for row in rows for one in row)
        return Built(arrays, tokens, dict(trained), [one for one in self._done if isinstance(one, Bad)])


def as_batch(arrays: Arrays) -> Batch:
    """The Batch of these arrays; nothing is copied."""
    import torch

    def tensors(of: Arrays) -> Arrays:
        return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in of.items()}

    given = tensors(arrays)
    if given["memory"] is not None:
        given["memory"] = Memory(**tensors(given["memory"]))
    return Batch(**given)


def collate(plan: DataPlan, rows: Sequence[Sequence[LoadedSample]], num_tile_chunks: int) -> Batch:
    """Rows of samples to one Batch; shorter rows are padded at the end, a row without samples is one pad token.

    Example, rows of 3 + 2 and 4 tokens: S = 5, cu_seqlens [0, 3, 5, 9, 10], position_ids [0 1 2 0 1] and [0 1 2 3 0].
    """
    px = plan.settings.tile_size
    cut = [held for row in rows for one in row for held in one.tiles]
    tiles = np.concatenate(cut) if cut else np.empty((0, 3, px, px), dtype=np.uint8)  # [T, 3, px, px]
    return as_batch(_lay_side_by_side(plan, rows, num_tile_chunks, tiles, ()))


def _lay_side_by_side(
    plan: DataPlan,
    rows: Sequence[Sequence[LoadedSample]],
    num_tile_chunks: int,
    tiles: NDArray[np.uint8],
    tile_hashes: tuple[bytes, ...],
) -> Arrays:
    lengths = [[len(one.rendered.input_ids) for one in row] for row in rows]
    width = max(1, max(sum(row) for row in lengths))
    shape = (len(rows), width)
    per_tile = plan.settings.image_tokens_per_tile
    input_ids = np.full(shape, plan.tokenizer.pad, dtype=np.int64)  # [B, S]
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)  # [B, S]
    position_ids = np.zeros(shape, dtype=np.int64)  # [B, S]
    image_slots = np.full(shape, -1, dtype=np.int64)  # [B, S]
    bounds = [0]
    samples: list[tuple[int, Rendered]] = []
    tile = 0
    for b, row in enumerate(rows):
        at = 0
        for one in row:
            end = at + len(one.rendered.input_ids)
            input_ids[b, at:end] = one.rendered.input_ids
            labels[b, at:end] = one.rendered.labels
            position_ids[b, at:end] = np.arange(end - at)
            samples.append((b * width + at, one.rendered))
            for k, start in enumerate(one.rendered.tile_starts):
                if start < 0:  # not in the sequence
                    continue
                slot = (tile + k) * per_tile
                image_slots[b, at + start : at + start + per_tile] = np.arange(slot, slot + per_tile)
            tile += len(one.rendered.tile_starts)
            bounds.append(b * width + end)
            at = end
        if at < width:
            position_ids[b, at:] = np.arange(width - at)
            bounds.append((b + 1) * width)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "cu_seqlens": np.array(bounds, dtype=np.int32),  # [G+1]
        "max_seqlen": int(np.diff(bounds).max()),
        "tiles": tiles,
        "image_slots": image_slots,
        "num_trained_tokens": int((labels != IGNORE_INDEX).sum()),
        "num_tile_chunks": num_tile_chunks,
        "samples": tuple(one.ref for row in rows for one in row),
        "tile_hashes": tile_hashes,
        "memory": None
        if plan.recipe.model.architecture == "nvlm_d"
        else lay_out_memory(plan.recipe.model, samples, per_tile, plan.tokenizer.pad),
    }


def null_batch(plan: DataPlan) -> Batch:
    """One pad token, no label, no tile: the same module calls with weight 0."""
    return collate(plan, [[]], 0)
