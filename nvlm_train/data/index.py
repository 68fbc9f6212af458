"""The length index: what planning needs to know of every sample, found in one pass over a source and kept on disk.

A folder per source, `<name>-<key>/` with `rows.npy` (32 bytes a usable sample, memory-mapped) and `meta.json` (what was
dropped and why). The key is a hash of everything a row depends on: the files' content, the tokenizer, template, tiling
and limits; what has changed is indexed anew and never silently reused. Images are opened only as far as their headers,
and those beside the source's files are no part of the key: an image that was missing stays dropped until the folder is
deleted.

Rank 0 builds, unit by unit (a few MiB of lines, a tar, some hundred rows), in several processes for large sources. Each
unit's rows go to disk at once, so that memory does not grow with the source and a build that was cut off goes on where
it was; at the end they are joined in a temporary folder that is renamed when whole. Other ranks wait for that name.
They tell a slow build from a dead one by a file that rank 0 touches while it works.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError  # the builtin one only from Python 3.11 on
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data import chat, tiling
from nvlm_train.data.fit import FEWER_TILES, OVERLONG, TRUNCATED, fit
from nvlm_train.data.images import REFERENCE, BadSample, ImageOptions, image_size
from nvlm_train.data.sources import BELOW_RATING, ImageRef, Record, Sample, Source, Unit, expand_sources, open_source
from nvlm_train.data.sources.source import part_of, position
from nvlm_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema

log = get_logger(__name__)

FORMAT = 2
WAIT_TIMEOUT_S = 300.0  # without a sign of life of rank 0
_HEARTBEAT_S = 2.0
_TELL_S = 10.0  # between lines of the log where there is no terminal for a progress bar
_CHUNK_ROWS = 512  # texts of so many samples are tokenised at once
_ALONE = {"B": 8 << 20, "row": 2000}  # amounts that one process indexes faster than others start
_BAD_KEPT = 1000  # messages kept; counts are exact
_BAD_SHOWN = 20
_PIECE_ROWS = 1 << 18
_NO_ROWS = 128  # bytes of a file of numpy without any
_SHARED_ROWS = 1 << 16  # fewer numbers of rows are kept by each process for itself
_NOT_BAD = (OVERLONG, BELOW_RATING)  # left out on purpose

ROW = np.dtype(
    [
        ("position", "<u8"),  # part (file or row group) in the upper 24 bits, offset in the lower 40
        ("num_bytes", "<u4"),  # 0 for rows of tables
        ("line", "<u4"),  # number of the line, element, sample or row in its file
        ("tokens", "<u4"),
        ("trained", "<u4"),  # labels that carry loss
        ("hash", "<u4"),  # of the record's content: stable when the file is reordered
        ("tiles", "<u2"),  # of all images, thumbnails counted
        ("max_tiles", "u1"),  # the tile maximum this sample is cut with
        ("lowered", "u1"),  # bits: FEWER_TILES when that is less than the recipe's, TRUNCATED when its text is cut
    ]
)


@dataclass(frozen=True)
class IndexSettings:
    """What a row of the index depends on besides the file."""

    tokenizer: ChatTokenizer
    template: str
    system: str | None
    tiling: schema.Tiling
    tile_size: int
    image_tokens_per_tile: int
    max_tokens: int
    overlong: str
    images: ImageOptions = REFERENCE
    architecture: str = "nvlm_d"

    @classmethod
    def of(cls, recipe: schema.Recipe, tokenizer: ChatTokenizer) -> IndexSettings:
        """The settings a recipe implies; Q = (image_size / patch_size / 2)^2 image tokens a tile."""
        tower = recipe.model.vision
        chat.check_tokenizer(tokenizer, recipe.tokenizer.template, recipe.tokenizer.path)
        return cls(
            tokenizer=tokenizer,
            template=recipe.tokenizer.template,
            system=recipe.tokenizer.system,
            tiling=recipe.data.tiling,
            tile_size=tower.image_size,
            image_tokens_per_tile=(tower.image_size // tower.patch_size // 2) ** 2,
            max_tokens=recipe.data.max_tokens_per_sample,
            overlong=recipe.data.overlong,
            images=ImageOptions(recipe.data.exif, recipe.data.alpha, recipe.data.sixteen_bit),
            architecture=recipe.model.architecture,
        )

    def lay_out(self, sample: Sample, tiles_per_image: Sequence[int]) -> list[chat.Run]:
        """The sample's runs with so many tiles for each image."""
        return chat.lay_out(
            sample.messages,
            tiles_per_image,
            self.tokenizer,
            self.template,
            self.tiling,
            self.image_tokens_per_tile,
            self.system,
            architecture=self.architecture,
        )

    def key_parts(self) -> dict[str, Any]:
        """Everything of these settings that a row depends on."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.template,
            "system": self.system,
            "tiling": self.tiling.model_dump(),
            "tile_size": self.tile_size,
            "image_tokens_per_tile": self.image_tokens_per_tile,
            "max_tokens": self.max_tokens,
            "overlong": self.overlong,
            "images": self.images._asdict(),
            # left out in nvlm_d: indexes and runs from before there was another keep their key
            **({} if self.architecture == "nvlm_d" else {"architecture": self.architecture}),
        }


class BadRow(NamedTuple):
    """A record that was dropped, and why. where: file:line, or what its format calls the place."""

    line: int
    reason: str
    message: str
    where: str


@dataclass(frozen=True)
class SourceIndex:
    """The index of one source. `dropped` counts records by reason (over-long ones too); `bad` holds the first."""

    name: str
    path: Path | str
    key: str
    rows: NDArray[Any]  # ROW[n]
    num_lines: int
    dropped: dict[str, int]
    bad: tuple[BadRow, ...]
    source: Source

    def where(self, row: int) -> str:
        """What a message calls a row's record: file:line."""
        found = self.rows[row]
        return self.source.where(int(part_of(found["position"])), int(found["line"]))

    def shard_sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of some rows lie in each file or row group that holds any of them, in order: i64[shards]."""
        sizes = np.zeros(int(part_of(self.rows["position"][rows[-1:]]).max(initial=-1)) + 1, dtype=np.int64)
        for piece in pieces(rows):  # not all at once: a source may have 10^8 rows
            sizes += np.bincount(part_of(self.rows["position"][piece]), minlength=len(sizes))
        return sizes[sizes > 0]

    @property
    def fewer_tiles(self) -> int:
        """Samples whose images are cut into fewer tiles to fit."""
        return int((self.rows["lowered"] & FEWER_TILES > 0).sum())

    @property
    def truncated(self) -> int:
        """Samples whose text is cut to fit."""
        return int((self.rows["lowered"] & TRUNCATED > 0).sum())

    @property
    def num_bad(self) -> int:
        """Unusable records; those left out on purpose (over-long, below a rating) are not among them."""
        return sum(count for reason, count in self.dropped.items() if reason not in _NOT_BAD)


def pieces(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Stretches of an array, so that what is worked out of them does not grow with it."""
    return (rows[begin : begin + _PIECE_ROWS] for begin in range(0, len(rows), _PIECE_ROWS))


def index_dir_of(recipe: schema.Recipe) -> Path:
    """The folder that keeps the indexes of a recipe's sources."""
    return Path(recipe.data.index_dir) if recipe.data.index_dir else Path(recipe.output_dir) / "data_index"


def make_index_dir(recipe: schema.Recipe) -> Path:
    """The same folder, made where it is missing. Raises DataError that names the key which the folder comes from."""
    folder = index_dir_of(recipe)
    key, value = ("data.index_dir", folder) if recipe.data.index_dir else ("output_dir", recipe.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{key} {value}: cannot be written ({error}); name a folder of yours that all nodes share."
        ) from error
    return folder


def index_key(source: Source, settings: IndexSettings) -> str:
    """Names the index of this very content with these very settings."""
    try:
        parts = {"format": FORMAT, **source.key_parts(), "settings": settings.key_parts()}
    except OSError as error:
        raise DataError(f"source {source.name!r}: cannot read {source.path} ({error}).") from error
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def build_index(recipe: schema.Recipe, num_workers: int | None = None, *, judge: bool = True) -> dict[str, SourceIndex]:
    """The indexes of all sources of a recipe by name, built where they are missing.

    num_workers: processes that build; None: data.index_workers. Raises DataError with every problem of every source.
    """
    recipe = expand_sources(recipe)
    settings = IndexSettings.of(recipe, load_tokenizer(recipe.tokenizer.path))
    given = {**recipe.data.mixture, **(recipe.validation.sources if recipe.validation else {})}
    workers = recipe.data.index_workers if num_workers is None else num_workers
    share, folder = recipe.data.max_bad_share, make_index_dir(recipe)
    found: dict[str, SourceIndex] = {}
    problems: list[str] = []
    for name, source in given.items():
        try:
            opened = open_source(name, source)
            found[name] = open_index(
                opened, settings, folder, max_bad_share=share, rank=0, judge=judge, num_workers=workers
            )
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def open_index(
    source: Source,
    settings: IndexSettings,
    index_dir: Path,
    *,
    max_bad_share: float,
    rank: int,
    timeout_s: float = WAIT_TIMEOUT_S,
    judge: bool = True,
    num_workers: int = 0,
) -> SourceIndex:
    """The index of a source: read where it exists, built by rank 0, waited for by the others.

    With `judge=False` it is returned however bad it is, for those who report on it and train nothing.

    num_workers: processes that build it; 0: one for each core that may be used. Small sources are built by this one.
    Raises DataError when more than `max_bad_share` of the lines are unusable (bad > share * lines), when a sample is
    over-long and that is an error, when nothing is left, or when rank 0 shows no sign of life for `timeout_s`.
    """
    key = index_key(source, settings)
    folder = index_dir / f"{source.name}-{key}"
    try:
        if not (folder / "meta.json").exists():
            if rank == 0:
                _build(source, settings, folder, key, num_workers)
            else:
                _wait(folder, timeout_s)
        index = _read(source, folder, key)
    except OSError as error:
        raise DataError(
            f"data.index_dir {index_dir}: cannot keep the index of source {source.name!r} there ({error}); "
            "name a writable folder that all nodes share."
        ) from error
    problem = too_bad(index, settings, max_bad_share) if judge else None
    if problem is not None:
        if rank == 0 and any("image" in reason for reason in index.dropped):
            # Images are no part of the key: keeping this index would hide their repair.
            shutil.rmtree(folder, ignore_errors=True)
        raise DataError(problem)
    return index


_RECORDS = {
    "jsonl": "one JSON object a line", "json": "a JSON array of objects", "hf": "rows",
    "webdataset": "tars with samples", "text": "texts",
}  # fmt: skip


def too_bad(index: SourceIndex, settings: IndexSettings, max_bad_share: float) -> str | None:
    """Why nothing may be trained on this index, or None."""
    head = f"source {index.name!r} ({index.path})"
    if index.num_lines == 0:
        return f"{head} is empty; {_RECORDS.get(index.source.settings.kind, 'samples')} are expected."
    if settings.overlong == "error" and index.dropped.get(OVERLONG):
        return _listing(
            f"{head}: {index.dropped[OVERLONG]} of {index.num_lines} samples are longer than "
            f"data.max_tokens_per_sample {settings.max_tokens} and data.overlong is 'error'; "
            "raise the limit, or set overlong to drop, truncate_text or fewer_tiles.",
            index,
            index.dropped[OVERLONG],
            lambda row: row.reason == OVERLONG,
        )
    if index.num_bad > max_bad_share * index.num_lines:
        return _listing(
            f"{head}: {index.num_bad} of {index.num_lines} lines cannot be used, more than data.max_bad_share "
            f"{max_bad_share} allows; mend them or raise the share.",
            index,
            index.num_bad,
            lambda row: row.reason not in _NOT_BAD,
        )
    if len(index.rows) == 0:
        causes = ", ".join(f"{count} {reason}" for reason, count in index.dropped.items())
        return _listing(
            f"{head}: none of {index.num_lines} lines can be used ({causes}).", index, index.num_lines, lambda _: True
        )
    return None


def _listing(head: str, index: SourceIndex, total: int, wanted: Callable[[BadRow], bool]) -> str:
    shown = [row for row in index.bad if wanted(row)][:_BAD_SHOWN]
    lines = [head] + [f"  {row.where}: {row.message}" for row in shown]
    if total > len(shown):
        lines.append(f"  ... and {total - len(shown)} more")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- building


def _build(source: Source, settings: IndexSettings, folder: Path, key: str, num_workers: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    heartbeat = _heartbeat_file(folder)
    chunks = folder.with_name(f".{folder.name}.parts")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    chunks.mkdir(exist_ok=True)
    done = False
    try:
        count = _scan(source, settings, chunks, heartbeat, num_workers)
        meta = {"format": FORMAT, "key": key, "source": source.name, "path": str(source.path)}
        meta |= _join(chunks, count, temporary / "rows.npy", source)
        with open(temporary / "meta.json", "w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        os.rename(temporary, folder)
        done = True
    except OSError:
        # Another job built the same index meanwhile: it is the same by its key.
        if not (folder / "meta.json").exists():
            raise
        done = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if done:  # otherwise the next start goes on from here
            shutil.rmtree(chunks, ignore_errors=True)
        heartbeat.unlink(missing_ok=True)


def _scan(source: Source, settings: IndexSettings, chunks: Path, heartbeat: Path, num_workers: int) -> int:
    """Indexes every unit that has no file in `chunks` yet. Returns how many units there are."""
    from tqdm import tqdm

    total = source.amount
    if total <= _ALONE[source.unit]:
        num_workers = 1
    elif num_workers == 0:
        num_workers = len(os.sched_getaffinity(0))
    told = time.monotonic()
    samples = count = done = 0

    def account(unit: Unit, usable: int) -> None:
        nonlocal samples, done, told
        samples, done = samples + usable, done + unit.end - unit.begin
        bar.update(unit.end - unit.begin)
        if bar.disable and time.monotonic() - told > _TELL_S:
            told = time.monotonic()
            log.info("index of source %r: %d samples, %.0f %%", source.name, samples, 100 * done / max(1, total))

    # Processes are spawned, never forked: this one may have threads, and a GPU.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (source, settings)) if num_workers > 1 else None
    waiting: deque[tuple[Unit, Future[int]]] = deque()
    beat = _Heartbeat(heartbeat)
    try:
        with tqdm(
            total=total,
            desc=f"index {source.name}",
            unit=source.unit,
            unit_scale=True,
            delay=3.0,
            leave=False,
            disable=None,
        ) as bar:
            for unit in source.units():
                beat()
                limit = source.settings.max_samples
                if limit is not None and samples >= limit:
                    break
                file = chunks / f"{count}.npy"
                count += 1
                usable = _finished(file, unit)
                if usable is not None:
                    account(unit, usable)
                elif pool is None:
                    account(unit, _index_unit(source, settings, unit, file, beat))
                else:
                    waiting.append((unit, pool.submit(_index_in_process, unit, file)))
                while len(waiting) >= 4 * num_workers:
                    account(*_result(waiting, beat))
            while waiting:
                account(*_result(waiting, beat))
    except BrokenProcessPool as error:
        raise DataError(
            f"source {source.name!r}: a process that builds the index died (out of memory?); start again to go on from "
            "there, with fewer data.index_workers."
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    return count


class _Heartbeat:
    def __init__(self, file: Path) -> None:
        self._file, self._last = file, -_HEARTBEAT_S

    def __call__(self) -> None:
        if time.monotonic() - self._last > _HEARTBEAT_S:
            self._file.touch()
            self._last = time.monotonic()


def _result(waiting: deque[tuple[Unit, Future[int]]], beat: Callable[[], None]) -> tuple[Unit, int]:
    unit, future = waiting.popleft()
    while True:
        beat()
        try:
            return unit, future.result(timeout=_HEARTBEAT_S)
        except FutureTimeoutError:
            if future.done():
                raise


def _finished(file: Path, unit: Unit) -> int | None:
    """Rows of a unit that an earlier start has indexed, or None."""
    try:
        meta = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return int(meta["num_rows"]) if meta["unit"] == list(unit) and file.exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


_given: tuple[Source, IndexSettings]  # of a worker process, opened once


def _start_worker(source: Source, settings: IndexSettings) -> None:
    global _given
    _given = (source, settings)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have processes of their own


def _index_in_process(unit: Unit, file: Path) -> int:
    return _index_unit(*_given, unit, file, lambda: None)


def _index_unit(source: Source, settings: IndexSettings, unit: Unit, file: Path, beat: Callable[[], None]) -> int:
    """Writes the rows of a unit, and beside them what was dropped. Returns the number of rows."""
    size_of = _sizes(settings.images)
    records = source.scan(unit)
    blocks: list[NDArray[Any]] = []
    problems: list[BadRow] = []
    while chunk := list(islice(records, _CHUNK_ROWS)):
        beat()
        rows, bad = _index_records(chunk, source, settings, size_of)
        blocks.append(rows)
        problems += bad
    found = np.concatenate(blocks) if blocks else np.empty(0, dtype=ROW)
    meta = {"unit": list(unit), "num_rows": len(found), "bad": [list(row) for row in problems]}
    own = file.with_name(f"{file.stem}.{os.getpid()}")
    with open(own, "wb") as binary:
        np.save(binary, found)
    os.replace(own, file)
    own.write_text(json.dumps(meta), encoding="utf-8")
    os.replace(own, file.with_suffix(".json"))  # last: it says that the rows are whole
    return len(found)


def _join(chunks: Path, count: int, file: Path, source: Source) -> dict[str, Any]:
    """Puts the rows of all units into one file, one unit at a time. Returns what meta.json says of them."""
    metas = [chunks / f"{k}.json" for k in range(count)]
    limit = source.settings.max_samples
    sizes = [int(json.loads(meta.read_text(encoding="utf-8"))["num_rows"]) for meta in metas]
    num_rows = sum(sizes) if limit is None else min(limit, sum(sizes))
    dropped: Counter[str] = Counter()
    bad: list[BadRow] = []
    num_lines = at = 0
    rows = np.lib.format.open_memmap(file, mode="w+", dtype=ROW, shape=(num_rows,)) if num_rows else None
    for k in range(count):
        problems = [BadRow(*row) for row in json.loads(metas[k].read_text(encoding="utf-8"))["bad"]]
        if rows is not None and sizes[k]:
            found = np.load(chunks / f"{k}.npy", allow_pickle=False)[: num_rows - at]
            rows[at : at + len(found)] = found
            at += len(found)
            num_lines += len(found)
            if at == num_rows and limit is not None:  # what comes after the last sample is not looked at
                problems = [row for row in problems if row.line < found[-1]["line"]]
        num_lines += len(problems)
        dropped.update(row.reason for row in problems)
        bad += problems[: _BAD_KEPT - len(bad)]
        if at == num_rows and limit is not None:
            break
    if rows is None:
        np.save(file, np.empty(0, dtype=ROW))
    else:
        rows.flush()
    return {
        "num_rows": num_rows,
        "num_lines": num_lines,
        "dropped": dict(dropped),
        "bad": [list(row) for row in bad],
    }


@lru_cache(maxsize=4)
def _sizes(options: ImageOptions) -> Callable[[ImageRef], tuple[int, int]]:
    @lru_cache(maxsize=1 << 16)
    def by_path(path: str, name: str) -> tuple[int, int]:
        return image_size(path, name, options)

    def size_of(image: ImageRef) -> tuple[int, int]:
        head = image.header()
        if isinstance(head, str):
            return by_path(head, image.name)
        try:
            return image_size(head, image.name, options)
        except BadSample:
            whole = image.read()
            if len(whole) == len(head):
                raise
            return image_size(whole, image.name, options)

    return size_of


def _index_records(
    chunk: Sequence[Record],
    source: Source,
    settings: IndexSettings,
    size_of: Callable[[ImageRef], tuple[int, int]],
) -> tuple[NDArray[Any], list[BadRow]]:
    problems: list[BadRow] = []
    found: list[tuple[Record, Sample, list[tuple[int, int]]]] = []
    runs: list[chat.Run] = []

    def drop(record: Record, error: BadSample) -> None:
        where = source.where(record.part, record.number)
        problems.append(BadRow(record.number, error.reason, str(error), where))

    for record in chunk:
        if isinstance(record.sample, BadSample):
            drop(record, record.sample)
            continue
        try:
            sizes = [size_of(image) for image in record.sample.images]
        except BadSample as error:
            drop(record, error)
            continue
        found.append((record, record.sample, sizes))
        top, thumbnail = source.max_tiles(record.sample, settings.tiling.max_tiles), settings.tiling.thumbnail
        guess = [tiling.num_tiles(width, height, top, settings.tile_size, thumbnail) for width, height in sizes]
        runs += settings.lay_out(record.sample, guess)
    lengths: dict[str, int] = {}
    _measure(lengths, chat.texts(runs), settings.tokenizer)  # most texts at once: the tokenizer works in parallel

    def lengths_of(more: Sequence[chat.Run]) -> dict[str, int]:
        _measure(lengths, chat.texts(more), settings.tokenizer)
        return lengths

    rows = np.zeros(len(found), dtype=ROW)
    kept = 0
    for record, sample, sizes in found:
        try:
            found_fit = fit(
                sizes,
                source.max_tiles(sample, settings.tiling.max_tiles),
                settings.tiling,
                settings.tile_size,
                settings.max_tokens,
                settings.overlong,
                partial(settings.lay_out, sample),
                lengths_of,
            )
            if found_fit.trained == 0:
                raise BadSample("no trained token", "no token of it carries loss")
        except BadSample as error:
            drop(record, error)
            continue
        rows[kept] = (
            position(record.part, record.offset),
            record.num_bytes,
            record.number,
            found_fit.tokens,
            found_fit.trained,
            record.hash,
            found_fit.tiles,
            found_fit.max_tiles,
            found_fit.changed,
        )
        kept += 1
    problems.sort(key=lambda row: row.line)
    return rows[:kept], problems


def _measure(lengths: dict[str, int], texts: Iterable[str], tokenizer: ChatTokenizer) -> None:
    new = list({text: None for text in texts if text not in lengths})
    lengths.update(zip(new, tokenizer.lengths(new), strict=True))


# ------------------------------------------------------------------------------------------------- reading, waiting


def _read(source: Source, folder: Path, key: str) -> SourceIndex:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows = np.load(folder / "rows.npy", mmap_mode="r" if meta["num_rows"] else None, allow_pickle=False)
        if meta["key"] != key or rows.dtype != ROW or rows.shape != (meta["num_rows"],):
            raise ValueError("its parts do not belong together")
        bad = tuple(BadRow(int(line), *map(str, said)) for line, *said in meta["bad"])
        num_lines, dropped = int(meta["num_lines"]), dict(meta["dropped"])
        return SourceIndex(source.name, source.path, key, rows, num_lines, dropped, bad, source)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the index is damaged ({error}); delete this folder and start again.") from error


def split_rows(
    index: SourceIndex, held_out_share: float, most_tiles: int | None, index_dir: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows that are trained on and those held out (by the hash of their content), rising: i64[n], i64[m].

    most_tiles: rows with more tiles are in neither. Of large sources the numbers are kept beside the index and mapped,
    so that all processes of a machine share one copy of them.
    """
    folder = index_dir / f"{index.name}-{index.key}"
    label = f"{held_out_share!r}" + (f"-{most_tiles}" if most_tiles is not None else "")
    files = [folder / f"{side}-{label}.npy" for side in ("train", "held_out")]
    if len(index.rows) > _SHARED_ROWS and all(file.exists() for file in files):
        try:
            return _map(files[0]), _map(files[1])
        except (OSError, ValueError):  # damaged: found anew
            for file in files:
                file.unlink(missing_ok=True)
    sides: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for begin in range(0, len(index.rows), _PIECE_ROWS):
        rows = index.rows[begin : begin + _PIECE_ROWS]
        fits = np.full(len(rows), True) if most_tiles is None else rows["tiles"] <= most_tiles
        apart = rows["hash"] < held_out_share * 2.0**32
        for side, chosen in zip(sides, (~apart & fits, apart & fits), strict=True):
            side.append(begin + np.flatnonzero(chosen))
    train, held_out = (np.concatenate([np.empty(0, dtype=np.int64), *side]) for side in sides)
    if len(index.rows) <= _SHARED_ROWS:
        return train, held_out
    try:
        return _mapped(train, files[0]), _mapped(held_out, files[1])
    except OSError as error:
        log.warning("%s: cannot be written (%s); each process keeps %d bytes of its own", files[0], error, train.nbytes)
        return train, held_out


def _mapped(rows: NDArray[np.int64], file: Path) -> NDArray[np.int64]:
    own = file.with_name(f".{file.name}.{os.uname().nodename}.{os.getpid()}")
    with open(own, "wb") as stream:
        np.save(stream, rows)
        stream.flush()
        os.fsync(stream.fileno())
    if file.exists():
        own.unlink()  # another process was faster and wrote the same: one copy for all
    else:
        os.replace(own, file)
    return _map(file)


def _map(file: Path) -> NDArray[np.int64]:
    """The numbers in a file, mapped; of none there is nothing to map."""
    found: NDArray[np.int64] = np.load(file, mmap_mode="r" if file.stat().st_size > _NO_ROWS else None)
    return found


def _heartbeat_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def _wait(folder: Path, timeout_s: float) -> None:
    heartbeat = _heartbeat_file(folder)
    seen, since = _mtime(heartbeat), time.monotonic()
    while not (folder / "meta.json").exists():
        # Only changes count: the clocks of two nodes need not agree.
        now = _mtime(heartbeat)
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > timeout_s:
            raise DataError(
                f"waited {timeout_s:.0f} s for rank 0 to build {folder} without a sign of life; "
                "data.index_dir must be a folder that all nodes share, and rank 0's log tells more."
            )
        time.sleep(min(0.2, timeout_s / 4))


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
