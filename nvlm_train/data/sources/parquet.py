"""Hugging Face data: parquet files, and folders that `datasets.Dataset.save_to_disk` wrote.

A record is a row; a part is a row group of a parquet file, or the whole of a saved dataset. Images are taken as the
bytes they are stored as. To read one row its row group has to be decoded, so the last ones are kept: order with
locality (`part_of`) or small row groups make that cheap; a folder of `save_to_disk` is memory-mapped and needs neither.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvlm_train.data.images import BadSample
from nvlm_train.data.sources.files import is_url, list_files
from nvlm_train.data.sources.rows import ImageRef, Sample, parse_row
from nvlm_train.data.sources.source import Record, Source, Unit
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

_UNIT_ROWS = 512
_KEPT_BYTES = 256 << 20  # of decoded row groups, at least one
_KEPT_OF_GROUPS = 1 << 30  # where the order comes back to them soon
_LARGE_GROUP = 32 << 20  # decoding more than this for one sample is told
_BATCH_ROWS = 64


def row_hash(row: Any) -> int:
    """32 bits of a row's content; of an image its size and its first and last bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            edge = hashlib.blake2b(value[:4096] + value[-4096:], digest_size=8).hexdigest()
            return f"{len(value)}/{edge}"
        return str(value)

    text = json.dumps(row, sort_keys=True, default=plain, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


class RowsSource(Source):
    """A source whose records are rows of a table."""

    unit = "row"

    def columns_wanted(self, present: list[str]) -> list[str]:
        """Which columns are read."""
        mapped = {value for value in self.form.columns.model_dump().values() if value}
        ratings = {f"{kind}_ratings" for kind in self.form.ratings}
        return [name for name in present if name in _KNOWN or name in mapped or name in ratings]

    def misspelt(self, where: Path | str, present: list[str]) -> list[str]:
        """What to say of columns that the recipe maps and the table does not have."""
        mapped = self.form.columns.model_dump(exclude={"role", "content"})
        problems = []
        for field, column in mapped.items():
            if column and column not in present:
                near = difflib.get_close_matches(column, present, n=1, cutoff=0.5)
                problems.append(
                    f"source {self.name!r}: columns.{field}: {where} has no column {column!r}; it has "
                    f"{', '.join(present[:12])}" + (f"; did you mean {near[0]!r}?" if near else ".")
                )
        return problems

    def unknown(self, where: Path | str, names: list[str]) -> str:
        """What to say of a table none of whose columns is known."""
        return (
            f"source {self.name!r}: {where} has the columns {', '.join(names[:12])}; none of them is known: map them "
            "by `columns`, for example columns: {question: prompt}."
        )

    def _record(self, part: int, offset: int, number: int, row: Mapping[str, Any]) -> Record:
        seed = row_hash(row)
        sample: Sample | BadSample
        try:
            sample = self.located(parse_row(row, self.form, seed))
        except BadSample as error:
            sample = error
        return Record(part, offset, 0, number, seed, sample)

    def _checked(self, row: Mapping[str, Any], indexed: Any) -> Sample:
        seed = row_hash(row)
        if seed != int(indexed["hash"]):
            raise BadSample("changed file", "the row has changed since it was indexed; start again to index it anew")
        return self.located(parse_row(row, self.form, seed))

    def where(self, part: int, number: int) -> str:
        """file, row n (counted from 0)."""
        return f"{self.files[part]}, row {number}"


_KNOWN = {
    "messages", "conversations", "texts", "images", "image", "system", "question", "answer", "answers",
    "answer_weights", "choices", "caption", "text",
}  # fmt: skip


class _Ranges(io.RawIOBase):
    """A remote part as a file for pyarrow, which seeks and reads a column of a row group at a time."""

    def __init__(self, source: Source, part: int) -> None:
        super().__init__()
        self._source, self._part, self._at = source, part, 0
        self._size = source.file(part).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        data = self._source.read_range(self._part, self._at, self._size - self._at if size < 0 else size)
        self._at += len(data)
        return data


class ParquetSource(RowsSource):
    """Parquet files."""

    suffixes = (".parquet",)
    format = "a parquet file"
    wanted = "`path` names a parquet file or a folder of them, relative to the current directory."

    def __init__(self, name: str, settings: schema.Source) -> None:
        super().__init__(name, settings)
        self._lock = threading.Lock()
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._group_ends: list[int] = []  # of every file: how many row groups it and those before it have
        self._first_rows: list[int] = []  # of every row group: its first row in the file
        self._num_rows: list[int] = []
        self._columns: list[str] = []
        self._num_bytes = 0  # of all row groups, decoded
        problems = []
        for k in range(len(self.files)):
            try:
                reader = self._reader(k)
                problems += self._take_schema(k, reader)
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems[:20]))

    def _take_schema(self, k: int, reader: Any) -> list[str]:
        wanted = self.columns_wanted(list(reader.schema_arrow.names))
        if k == 0:
            self._columns = wanted
            if problems := self.misspelt(self.files[k], list(reader.schema_arrow.names)):
                return problems
            if not wanted:
                return [self.unknown(self.files[k], reader.schema_arrow.names)]
        missing = [column for column in self._columns if column not in wanted]
        if missing:
            return [
                f"source {self.name!r}: {self.files[k]} has another schema than {self.files[0]}: no column "
                f"{', '.join(missing)}; it has {', '.join(reader.schema_arrow.names[:12])}."
            ]
        row = 0
        for group in range(reader.metadata.num_row_groups):
            self._first_rows.append(row)
            found = reader.metadata.row_group(group)
            self._num_rows.append(found.num_rows)
            self._num_bytes += found.total_byte_size
            row += self._num_rows[-1]
        self._group_ends.append(len(self._first_rows))
        return []

    def notes(self) -> list[str]:
        """Whether reading one sample decodes much more than a sample."""
        groups = max(1, len(self._num_rows))
        mean = self._num_bytes / groups
        if mean < _LARGE_GROUP or self.by_groups:
            return []
        return [
            f"reading one sample decodes its whole row group: {sum(self._num_rows) / groups:,.0f} rows, "
            f"{mean / (1 << 20):,.0f} MiB; write row groups of some ten rows, save the data by save_to_disk, or set "
            "shuffle: shard_groups with few shards_per_group, so that what was decoded is used again"
        ]

    def _reader(self, k: int) -> Any:
        import pyarrow
        import pyarrow.parquet

        found = self._readers.get(k)
        if found is not None:
            self._readers.move_to_end(k)
            return found
        path = self.files[k]
        try:
            if is_url(path):
                found = pyarrow.parquet.ParquetFile(_Ranges(self, k))
            else:
                found = pyarrow.parquet.ParquetFile(path, memory_map=False)
        except (OSError, pyarrow.ArrowException, ImportError, ValueError) as error:
            raise DataError(f"source {self.name!r}: {path} is no readable parquet file ({error}).") from error
        self._readers[k] = found
        while len(self._readers) > 32:
            self._readers.popitem(last=False)
        return found

    def _file_of(self, group: int) -> int:
        return bisect_right(self._group_ends, group)

    @property
    def amount(self) -> int:
        """Rows of all files."""
        return sum(self._num_rows)

    def units(self) -> Iterator[Unit]:
        """A row group each, or pieces of 512 rows."""
        for group, rows in enumerate(self._num_rows):
            for begin in range(0, rows, _UNIT_ROWS):
                yield Unit(group, begin, min(begin + _UNIT_ROWS, rows), self._first_rows[group] + begin)

    def _table(self, group: int) -> Any:
        """The decoded row group; the last ones are kept."""
        import pyarrow

        with self._lock:
            table = self._tables.get(group)
            if table is not None:
                self._tables.move_to_end(group)
                return table
            k = self._file_of(group)
            inside = group - (self._group_ends[k - 1] if k else 0)
            try:
                table = self._reader(k).read_row_group(inside, columns=self._columns)
            except (OSError, pyarrow.ArrowException, DataError) as error:
                self._readers.pop(k, None)
                raise BadSample("unreadable rows", f"row group {inside} cannot be read: {error}") from error
            if table.num_rows != self._num_rows[group]:
                raise BadSample("changed file", "the row group has changed since the file was opened")
            self._tables[group] = table
            kept = _KEPT_OF_GROUPS if self.by_groups else _KEPT_BYTES
            while len(self._tables) > 1 and sum(held.nbytes for held in self._tables.values()) > kept:
                self._tables.popitem(last=False)
            return table

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The unit's rows."""
        try:
            table = self._table(unit.part)
        except BadSample as error:
            for k in range(unit.begin, unit.end):
                yield Record(unit.part, k, 0, unit.first + k - unit.begin, 0, error)
            return
        for begin in range(unit.begin, unit.end, _BATCH_ROWS):
            end = min(begin + _BATCH_ROWS, unit.end)
            for k, row in enumerate(table.slice(begin, end - begin).to_pylist(), start=begin):
                yield self._record(unit.part, k, unit.first + k - unit.begin, row)

    def sample(self, row: Any) -> Sample:
        """The sample of a row of the index. Raises BadSample."""
        part, offset = int(row["position"]) >> 40, int(row["position"]) & ((1 << 40) - 1)
        if part >= len(self._num_rows) or offset >= self._num_rows[part]:
            raise BadSample("changed file", "the file has fewer rows than when it was indexed")
        return self._checked(self._table(part).slice(offset, 1).to_pylist()[0], row)

    def where(self, part: int, number: int) -> str:
        """file, row n (counted from 0)."""
        return f"{self.files[self._file_of(part)]}, row {number}"

    def close(self) -> None:
        """Lets go of the files and of what was decoded."""
        with self._lock:
            self._tables.clear()
            self._readers.clear()
        super().close()


class SavedSource(RowsSource):
    """A folder of `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk`, memory-mapped."""

    suffixes = (".arrow",)
    format = "an Arrow file"
    wanted = "`path` names a folder that Dataset.save_to_disk wrote, relative to the current directory."

    def __init__(self, name: str, settings: schema.Source) -> None:
        folder = Path(settings.path)
        if (folder / "dataset_dict.json").is_file():
            splits = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
            if settings.split not in splits:
                raise DataError(
                    f"source {name!r}: {folder} has no split {settings.split!r}; it has {', '.join(splits)}; "
                    "set `split` to one."
                )
            folder = folder / settings.split
        self._folder = folder
        super().__init__(name, settings)
        import datasets
        import pyarrow

        try:
            table = datasets.load_from_disk(str(folder), keep_in_memory=False)
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise DataError(f"source {name!r}: {folder} is no readable dataset ({error}).") from error
        if problems := self.misspelt(folder, list(table.column_names)):
            raise DataError("\n".join(problems))
        wanted = self.columns_wanted(list(table.column_names))
        if not wanted:
            raise DataError(self.unknown(folder, table.column_names))
        # Taken out of `datasets`' own decoding: images stay the bytes they are stored as.
        self._rows = table.select_columns(wanted).with_format("arrow")
        self.files = [str(folder)]

    def _list(self) -> list[str]:
        return list_files(self.name, str(self._folder), self.suffixes, self.wanted)

    def key_parts(self) -> dict[str, Any]:
        """The content of the folder's files."""
        files, self.files = self.files, sorted(str(file) for file in Path(self.files[0]).iterdir() if file.is_file())
        opened, self._opened = self._opened, {}
        try:
            return super().key_parts()
        finally:
            self.files, self._opened = files, opened

    @property
    def amount(self) -> int:
        """Rows."""
        return len(self._rows)

    def units(self) -> Iterator[Unit]:
        """Pieces of 512 rows."""
        for begin in range(0, len(self._rows), _UNIT_ROWS):
            yield Unit(0, begin, min(begin + _UNIT_ROWS, len(self._rows)), begin)

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The unit's rows."""
        for begin in range(unit.begin, unit.end, _BATCH_ROWS):
            rows = self._rows[begin : min(begin + _BATCH_ROWS, unit.end)].to_pylist()
            for k, row in enumerate(rows, start=begin):
                yield self._record(0, k, k, row)

    def sample(self, row: Any) -> Sample:
        """The sample of a row of the index. Raises BadSample."""
        offset = int(row["position"])
        if offset >= len(self._rows):
            raise BadSample("changed file", "the dataset has fewer rows than when it was indexed")
        return self._checked(self._rows[offset : offset + 1].to_pylist()[0], row)


def open_hf(name: str, settings: schema.Source) -> RowsSource:
    """A saved dataset where the folder is one, else parquet files."""
    folder = Path(settings.path)
    saved = not is_url(settings.path) and any(
        (folder / file).is_file() for file in ("state.json", "dataset_dict.json", "dataset_info.json")
    )
    if saved and not any(os.path.splitext(file)[1] == ".parquet" for file in os.listdir(folder)):
        return SavedSource(name, settings)
    return ParquetSource(name, settings)


__all__ = ["ImageRef", "ParquetSource", "SavedSource", "open_hf", "row_hash"]
