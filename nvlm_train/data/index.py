"""The length index: what planning needs to know of every sample, found in one pass over a source and kept on disk.

A folder per source, `<name>-<key>/` with `rows.npy` (32 bytes a usable sample, memory-mapped) and `meta.json` (what was
dropped and why). The key is a hash of everything a row depends on: the file's content, the tokenizer, template, tiling
and limits; what has changed is indexed anew and never silently reused. Images are opened only as far as their headers,
and they are no part of the key: an image that was missing stays dropped until the folder is deleted.

Rank 0 builds into a temporary folder and renames it when whole; other ranks wait for that name. They tell a slow build
from a dead one by a file that rank 0 touches while it works.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data import chat, tiling
from nvlm_train.data.images import BadSample, image_size
from nvlm_train.data.sources import JsonlSource, Line, Sample, parse_line
from nvlm_train.data.tokenizer import ChatTokenizer
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema

log = get_logger(__name__)

FORMAT = 1
OVERLONG = "over-long"
WAIT_TIMEOUT_S = 300.0  # without a sign of life of rank 0
_HEARTBEAT_S = 2.0
_TELL_S = 10.0  # between lines of the log where there is no terminal for a progress bar
_CHUNK_LINES = 512
_WHOLE_FILE_BYTES = 64 << 20  # larger files are keyed by size, time and both ends instead of all their bytes
_END_BYTES = 1 << 20
_BAD_KEPT = 1000  # messages kept; counts are exact
_BAD_SHOWN = 20
_LIMITS = (8, 6, 4, 2, 1)  # Megatron's order of lowering the tile maximum of an over-long sample

ROW = np.dtype(
    [
        ("offset", "<u8"),  # of the line in the file
        ("num_bytes", "<u4"),
        ("line", "<u4"),  # 1-based
        ("tokens", "<u4"),
        ("trained", "<u4"),  # labels that carry loss
        ("hash", "<u4"),  # of the line's bytes: stable when the file is reordered
        ("tiles", "<u2"),  # of all images, thumbnails counted
        ("max_tiles", "u1"),  # the tile maximum this sample is cut with
        ("lowered", "u1"),  # 1 when that is less than the recipe's
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

    @classmethod
    def of(cls, recipe: schema.Recipe, tokenizer: ChatTokenizer) -> IndexSettings:
        """The settings a recipe implies; Q = (image_size / patch_size / 2)^2 image tokens a tile."""
        tower = recipe.model.vision
        return cls(
            tokenizer=tokenizer,
            template=recipe.tokenizer.template,
            system=recipe.tokenizer.system,
            tiling=recipe.data.tiling,
            tile_size=tower.image_size,
            image_tokens_per_tile=(tower.image_size // tower.patch_size // 2) ** 2,
            max_tokens=recipe.data.max_tokens_per_sample,
            overlong=recipe.data.overlong,
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
        }


@dataclass(frozen=True)
class BadRow:
    """A line that was dropped, and why."""

    line: int
    reason: str
    message: str


@dataclass(frozen=True)
class SourceIndex:
    """The index of one source. `dropped` counts lines by reason (over-long ones too); `bad` holds the first of them."""

    name: str
    path: Path
    key: str
    rows: NDArray[Any]  # ROW[n]
    num_lines: int
    dropped: dict[str, int]
    bad: tuple[BadRow, ...]

    @property
    def num_bad(self) -> int:
        """Unusable lines; over-long samples are not among them."""
        return sum(count for reason, count in self.dropped.items() if reason != OVERLONG)


def index_dir_of(recipe: schema.Recipe) -> Path:
    """The folder that keeps the indexes of a recipe's sources."""
    return Path(recipe.data.index_dir) if recipe.data.index_dir else Path(recipe.output_dir) / "data_index"


def line_hash(data: bytes) -> int:
    """32 bits of a line's content, blanks around it ignored."""
    return int.from_bytes(hashlib.blake2b(data.strip(), digest_size=4).digest(), "little")


def index_key(source: JsonlSource, settings: IndexSettings) -> str:
    """Names the index of this very content with these very settings."""
    status = os.stat(source.path)
    content = hashlib.sha256()
    parts: dict[str, Any] = {"format": FORMAT, "size": status.st_size, "root": os.path.realpath(source.image_root)}
    with open(source.path, "rb") as file:
        if status.st_size <= _WHOLE_FILE_BYTES:
            content.update(file.read())
        else:
            parts["mtime_ns"] = status.st_mtime_ns
            content.update(file.read(_END_BYTES))
            file.seek(-_END_BYTES, os.SEEK_END)
            content.update(file.read())
    parts |= {"content": content.hexdigest(), "settings": settings.key_parts()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def open_index(
    source: JsonlSource,
    settings: IndexSettings,
    index_dir: Path,
    *,
    max_bad_share: float,
    rank: int,
    timeout_s: float = WAIT_TIMEOUT_S,
    judge: bool = True,
) -> SourceIndex:
    """The index of a source: read where it exists, built by rank 0, waited for by the others.

    With `judge=False` it is returned however bad it is, for those who report on it and train nothing.

    Raises DataError when more than `max_bad_share` of the lines are unusable (bad > share * lines), when a sample is
    over-long and that is an error, when nothing is left, or when rank 0 shows no sign of life for `timeout_s`.
    """
    key = index_key(source, settings)
    folder = index_dir / f"{source.name}-{key}"
    try:
        if not (folder / "meta.json").exists():
            if rank == 0:
                _build(source, settings, folder, key)
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


def too_bad(index: SourceIndex, settings: IndexSettings, max_bad_share: float) -> str | None:
    """Why nothing may be trained on this index, or None."""
    head = f"source {index.name!r} ({index.path})"
    if index.num_lines == 0:
        return f"{head} is empty; one JSON object a line is expected."
    if settings.overlong == "error" and index.dropped.get(OVERLONG):
        return _listing(
            f"{head}: {index.dropped[OVERLONG]} of {index.num_lines} samples are longer than "
            f"data.max_tokens_per_sample {settings.max_tokens} and data.overlong is 'error'; "
            "raise the limit, or set overlong to drop or fewer_tiles.",
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
            lambda row: row.reason != OVERLONG,
        )
    if len(index.rows) == 0:
        causes = ", ".join(f"{count} {reason}" for reason, count in index.dropped.items())
        return _listing(
            f"{head}: none of {index.num_lines} lines can be used ({causes}).", index, index.num_lines, lambda _: True
        )
    return None


def _listing(head: str, index: SourceIndex, total: int, wanted: Callable[[BadRow], bool]) -> str:
    shown = [row for row in index.bad if wanted(row)][:_BAD_SHOWN]
    lines = [head] + [f"  {index.path}:{row.line}: {row.message}" for row in shown]
    if total > len(shown):
        lines.append(f"  ... and {total - len(shown)} more")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- building


def _build(source: JsonlSource, settings: IndexSettings, folder: Path, key: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    heartbeat = _heartbeat_file(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        rows, num_lines, dropped, bad = _scan(source, settings, heartbeat)
        with open(temporary / "rows.npy", "wb") as file:
            np.save(file, rows)
            file.flush()
            os.fsync(file.fileno())
        meta = {
            "format": FORMAT,
            "key": key,
            "source": source.name,
            "path": str(source.path),
            "num_rows": len(rows),
            "num_lines": num_lines,
            "dropped": dict(dropped),
            "bad": [[row.line, row.reason, row.message] for row in bad],
        }
        with open(temporary / "meta.json", "w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another job built the same index meanwhile: it is the same by its key.
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        heartbeat.unlink(missing_ok=True)


def _scan(
    source: JsonlSource, settings: IndexSettings, heartbeat: Path
) -> tuple[NDArray[Any], int, Counter[str], list[BadRow]]:
    from tqdm import tqdm

    heartbeat.touch()
    beaten = time.monotonic()
    blocks: list[NDArray[Any]] = []
    dropped: Counter[str] = Counter()
    bad: list[BadRow] = []
    num_lines = 0

    @lru_cache(maxsize=1 << 16)
    def size_of(path: str, name: str) -> tuple[int, int]:
        return image_size(path, name)

    told = beaten
    with tqdm(
        total=source.num_bytes,
        desc=f"index {source.name}",
        unit="B",
        unit_scale=True,
        delay=3.0,
        leave=False,
        disable=None,
    ) as bar:
        for chunk in _chunks(source.lines(), _CHUNK_LINES):
            num_lines += len(chunk)
            rows, problems = _index_lines(chunk, source, settings, size_of)
            blocks.append(rows)
            dropped.update(row.reason for row in problems)
            bad.extend(problems[: _BAD_KEPT - len(bad)])
            done = chunk[-1].offset + len(chunk[-1].data)
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                log.info("index of source %r: %d lines, %.0f %%", source.name, num_lines, 100 * done / source.num_bytes)
            if time.monotonic() - beaten > _HEARTBEAT_S:
                heartbeat.touch()
                beaten = time.monotonic()
    rows = np.concatenate(blocks) if blocks else np.empty(0, dtype=ROW)
    return rows, num_lines, dropped, bad


def _index_lines(
    chunk: Sequence[Line], source: JsonlSource, settings: IndexSettings, size_of: Callable[[str, str], tuple[int, int]]
) -> tuple[NDArray[Any], list[BadRow]]:
    problems: list[BadRow] = []
    found: list[tuple[Line, Sample, list[tuple[int, int]], list[chat.Run]]] = []
    top = settings.tiling.max_tiles
    for line in chunk:
        try:
            sample = parse_line(line.data)
            sizes = [size_of(source.image_path(image), image) for image in sample.images]
        except BadSample as error:
            problems.append(BadRow(line.number, error.reason, str(error)))
            continue
        found.append((line, sample, sizes, settings.lay_out(sample, _tiles(sizes, top, settings))))
    lengths: dict[str, int] = {}
    _measure(lengths, (text for _, _, _, runs in found for text in chat.texts(runs)), settings.tokenizer)
    rows = np.zeros(len(found), dtype=ROW)
    kept = 0
    for line, sample, sizes, runs in found:
        limit = top
        tokens, trained = chat.count_tokens(runs, lengths)
        if tokens > settings.max_tokens and settings.overlong == "fewer_tiles" and sizes:
            for limit in (lower for lower in _LIMITS if lower < top):
                runs = settings.lay_out(sample, _tiles(sizes, limit, settings))
                _measure(lengths, chat.texts(runs), settings.tokenizer)
                tokens, trained = chat.count_tokens(runs, lengths)
                if tokens <= settings.max_tokens:
                    break
        tiles = sum(_tiles(sizes, limit, settings))
        if tokens > settings.max_tokens or tiles > np.iinfo(np.uint16).max:
            problems.append(BadRow(line.number, OVERLONG, f"{tokens} tokens are more than {settings.max_tokens}"))
            continue
        rows[kept] = (
            line.offset,
            len(line.data),
            line.number,
            tokens,
            trained,
            line_hash(line.data),
            tiles,
            limit,
            limit < top,
        )
        kept += 1
    problems.sort(key=lambda row: row.line)
    return rows[:kept], problems


def _tiles(sizes: Sequence[tuple[int, int]], max_tiles: int, settings: IndexSettings) -> list[int]:
    thumbnail = settings.tiling.thumbnail
    return [tiling.num_tiles(width, height, max_tiles, settings.tile_size, thumbnail) for width, height in sizes]


def _measure(lengths: dict[str, int], texts: Iterable[str], tokenizer: ChatTokenizer) -> None:
    new = list({text: None for text in texts if text not in lengths})
    lengths.update(zip(new, tokenizer.lengths(new), strict=True))


def _chunks(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    while chunk := list(islice(lines, size)):
        yield chunk


# ------------------------------------------------------------------------------------------------- reading, waiting


def _read(source: JsonlSource, folder: Path, key: str) -> SourceIndex:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows = np.load(folder / "rows.npy", mmap_mode="r" if meta["num_rows"] else None, allow_pickle=False)
        if meta["key"] != key or rows.dtype != ROW or rows.shape != (meta["num_rows"],):
            raise ValueError("its parts do not belong together")
        bad = tuple(BadRow(int(line), str(reason), str(message)) for line, reason, message in meta["bad"])
        return SourceIndex(source.name, source.path, key, rows, int(meta["num_lines"]), dict(meta["dropped"]), bad)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: the index is damaged ({error}); delete this folder and start again.") from error


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
