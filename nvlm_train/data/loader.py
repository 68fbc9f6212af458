"""From the plan to steps: what is prepared ahead, and what is said of samples that could not be used.

`StepLoader` prepares whole steps ahead, in threads of the trainer (`data.loader: inprocess`: Pillow, torch and the
tokenizer release the GIL, and nothing is handed over) or in threads of a process of its own (`process`).

A sample that turns out bad only now (a damaged image, a changed file) leaves a hole in its pack: it is counted,
logged to bad_samples.jsonl, and never replaced, so that no other sample moves. A source stops the run when it has
more bad samples than data.max_bad_share allows: among the last 10,000 samples seen of it, distinct bad rows > share *
min(rows of the source, max(samples among them, 1000)); or when the first 8 samples seen of it are all bad (unless the
share is 1). Each rank judges by what it has seen since its start.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from nvlm_train.batch import Batch
from nvlm_train.data import packing
from nvlm_train.data.assembly import Bad, Builder, Built
from nvlm_train.data.packing import Pack
from nvlm_train.data.plan import DataPlan
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger

if TYPE_CHECKING:
    import torch

log = get_logger(__name__)

_WINDOW = 10_000  # samples of a source that are judged together
_SEEN_AT_LEAST = 1000
_FIRST_SAMPLES = 8
_WARNINGS_PER_SOURCE = 5


@dataclass
class StepData:
    """One step's work of this rank; all counts are this rank's.

    tokens: planned for the model, padding left out. trained_tokens: labels that carry loss. tokens_by_source: trained
    tokens. bad: samples left out, by (source, reason).
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


class StepLoader:
    """Iterates `StepData` of this rank from `start_step` to before `end_step`, `data.prefetch_steps` steps ahead, fewer
    where they would take more than `data.prefetch_bytes`, but always one.

    What it yields depends on the plan alone, not on threads or processes. Any error in a thread, and DataError when a
    source has too many bad samples, is raised by `next`; the loader is closed then. Use it in a `with`, or `close` it.

    pin_for: the GPU that the batches go to: a thread puts them into page-locked memory ahead; None: they stay.
    """

    def __init__(self, plan: DataPlan, *, start_step: int, end_step: int, pin_for: torch.device | None = None) -> None:
        self._plan = plan
        self._next_step = start_step
        self._end_step = end_step
        self._dealt: list[list[list[Pack]]] | None = None  # of the next step, where there was no room for it yet
        self._closed = False
        self._steps: deque[_Ahead] = deque()
        self._watch = _BadSamples(plan)
        self._builder = _open_builder(plan)
        self._pin_for = pin_for
        self._pinning = ThreadPoolExecutor(1, "nvlm-pin") if pin_for is not None else None

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> StepData:
        try:
            self._submit()
            if not self._steps:
                self.close()
                raise StopIteration
            ahead = self._steps[0]
            built = [future.result() for future in ahead.futures]
            batches = [one.batch for one in built] if ahead.pinned is None else [p.result() for p in ahead.pinned]
            step = self._steps.popleft().step
            self._submit()
            for one in built:
                self._watch.account(step, one)
        except BaseException:
            self.close()
            raise
        return _summary(step, built, batches)

    def close(self) -> None:
        """Stops what prepares; what was prepared is dropped. May be called twice."""
        self._closed = True
        self._steps.clear()
        self._builder.close()
        if self._pinning is not None:
            self._pinning.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> None:
        data = self._plan.recipe.data
        while not self._closed and self._next_step < self._end_step and len(self._steps) < data.prefetch_steps:
            dealt = self._dealt if self._dealt is not None else self._plan.deal_step(self._next_step)
            mine = [ranks[self._plan.rank] for ranks in dealt]
            num_bytes = sum(_bytes_of(self._plan, item) for packs in mine for item in packs)
            if self._steps and num_bytes + sum(ahead.num_bytes for ahead in self._steps) > data.prefetch_bytes:
                self._dealt = dealt  # its turn comes later
                return
            self._dealt = None
            futures = [
                self._builder.submit(packs, self._plan.chunks(ranks)) for packs, ranks in zip(mine, dealt, strict=True)
            ]
            pinned = None
            if self._pinning is not None:
                pinned = [self._pinning.submit(_pinned, future, self._pin_for) for future in futures]
            self._steps.append(_Ahead(self._next_step, futures, num_bytes, pinned))
            self._next_step += 1


@dataclass(frozen=True)
class _Ahead:
    """A step that is being prepared."""

    step: int
    futures: list[Future[Built]]
    num_bytes: int
    pinned: list[Future[Batch]] | None


def _pinned(future: Future[Built], device: torch.device | None) -> Batch:
    import torch

    torch.cuda.set_device(device)  # each thread has a current GPU of its own, at first number 0: all ranks would use it
    return future.result().batch.pin_memory()


class _Builds(Protocol):
    def submit(self, packs: Sequence[Pack], num_tile_chunks: int) -> Future[Built]: ...

    def close(self) -> None: ...


def _open_builder(plan: DataPlan) -> _Builds:
    if plan.recipe.data.loader == "process":
        from nvlm_train.data.loader_process import LoaderProcess

        return LoaderProcess(plan)
    return Builder(plan, plan.recipe.data.num_threads, augment=True)


def _bytes_of(plan: DataPlan, item: Pack) -> int:
    """Memory of a prepared pack: u8 pixels, and four i64 for each token."""
    px = plan.settings.tile_size
    return item.tiles * 3 * px * px + item.tokens * 32


def _summary(step: int, built: Sequence[Built], batches: list[Batch]) -> StepData:
    samples: Counter[str] = Counter(ref.source for one in built for ref in one.batch.samples)
    trained: Counter[str] = Counter()
    for one in built:
        trained.update(one.trained_by_source)
    return StepData(
        step=step,
        micro_batches=batches,
        trained_tokens=sum(one.batch.num_trained_tokens for one in built),
        tokens=sum(one.tokens for one in built),
        tiles=sum(len(one.batch.tiles) for one in built),
        samples=sum(samples.values()),
        samples_by_source=dict(samples),
        tokens_by_source=dict(trained),
        bad=dict(Counter((item.ref.source, item.reason) for one in built for item in one.bad)),
    )


class _BadSamples:
    """Counts, writes down and judges the bad samples of this rank."""

    def __init__(self, plan: DataPlan) -> None:
        self._plan = plan
        self._seen: Counter[str] = Counter()
        self._bad_rows: dict[str, dict[int, int]] = {}  # source -> row -> samples of it seen then; the oldest first
        self._warned: Counter[str] = Counter()
        name = "bad_samples.jsonl" if plan.rank == 0 else f"bad_samples.rank{plan.rank}.jsonl"
        self._file = Path(plan.recipe.output_dir) / name

    def account(self, step: int | None, built: Built) -> None:
        """Takes one micro batch into account. Raises DataError when a source has too many bad samples."""
        self._seen.update(ref.source for ref in built.batch.samples)
        self._seen.update(item.ref.source for item in built.bad)
        for item in built.bad:
            self._write(step, item)
            rows = self._bad_rows.setdefault(item.ref.source, {})
            rows.pop(item.ref.row, None)
            rows[item.ref.row] = self._seen[item.ref.source]
            self._judge(item)

    def _judge(self, item: Bad) -> None:
        name, share = item.ref.source, self._plan.recipe.data.max_bad_share
        seen, bad_rows = self._seen[name], self._bad_rows[name]
        for row in [row for row, at in bad_rows.items() if at <= seen - _WINDOW]:
            del bad_rows[row]
        bad, window = len(bad_rows), min(seen, _WINDOW)
        rows = len(self._plan.train_rows[name] if name in self._plan.train_rows else self._plan.held_out[name])
        allowed = share * min(rows, max(window, _SEEN_AT_LEAST))
        only_bad = share < 1 and seen >= min(_FIRST_SAMPLES, rows) and bad >= min(seen, rows)
        if bad > allowed or only_bad:
            of = f"of {'the last ' if window < seen else ''}{window} samples seen"
            raise DataError(
                f"source {name!r}: {bad} {of} cannot be used, more than data.max_bad_share {share} allows; the last is "
                f"{item.where}: {item.message}. All are in {self._file}."
            )

    def _write(self, step: int | None, item: Bad) -> None:
        path = self._plan.indexes[item.ref.source].path
        if self._warned[item.ref.source] < _WARNINGS_PER_SOURCE:
            self._warned[item.ref.source] += 1
            last = self._warned[item.ref.source] == _WARNINGS_PER_SOURCE
            rest = f"; more of source {item.ref.source!r} are only written to {self._file}" if last else ""
            log.warning("dropped %s: %s (%s)%s", item.where, item.message, item.reason, rest)
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
    builder = Builder(plan, plan.recipe.data.num_threads, augment=False, name="nvlm-validation")
    try:
        for future in [builder.submit(ranks[plan.rank], plan.chunks(ranks)) for ranks in dealt]:
            built = future.result()
            watch.account(None, built)
            batches.append(built.batch)
    finally:
        builder.close()
    return batches
