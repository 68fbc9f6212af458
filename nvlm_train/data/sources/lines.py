"""Text files: JSONL, one JSON array, plain text. A record is a stretch of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nvlm_train.data.images import BadSample
from nvlm_train.data.sources.rows import Sample, parse_line, parse_text
from nvlm_train.data.sources.source import Record, Source, Unit, content_hash
from nvlm_train.errors import DataError

UNIT_BYTES = 4 << 20
_MAX_RECORD = 1 << 30
_BLOCK = 1 << 20
_HEAD_BYTES = 1 << 16
_BOM = b"\xef\xbb\xbf"
END_OF_TEXT = b"<|endoftext|>"


@dataclass(frozen=True)
class Line:
    """One non-blank line of a file: its 1-based number, where it begins, and its bytes without the line end."""

    number: int
    offset: int
    data: bytes


class BytesSource(Source):
    """A source whose records are stretches of bytes."""

    def parse(self, data: bytes, seed: int) -> Sample:
        """The bytes of a record to a sample. Raises BadSample."""
        return parse_line(data, self.form, seed)

    def _record(self, part: int, line: Line) -> Record:
        seed = content_hash(line.data)
        sample: Sample | BadSample
        try:
            if len(line.data) > _MAX_RECORD:
                raise BadSample("too large", f"{len(line.data)} bytes; a sample of text has at most {_MAX_RECORD}")
            sample = self.located(self.parse(line.data, seed))
        except BadSample as error:
            sample = error
        return Record(part, line.offset, len(line.data), line.number, seed, sample)

    def read(self, offset: int, num_bytes: int, part: int = 0) -> bytes:
        """The bytes of one record; may be called from any thread. Raises BadSample when the file cannot be read."""
        try:
            return self.read_range(part, offset, num_bytes)
        except OSError as error:
            raise BadSample("missing file", f"{self.files[part]} cannot be read any more: {error}") from error

    def sample(self, row: Any) -> Sample:
        """The sample of a row of the index. Raises BadSample."""
        part, offset = int(row["position"]) >> 40, int(row["position"]) & ((1 << 40) - 1)
        data = self.read(offset, int(row["num_bytes"]), part)
        if content_hash(data) != int(row["hash"]):
            raise BadSample("changed file", "the line has changed since it was indexed; start again to index it anew")
        return self.located(self.parse(data, int(row["hash"])))


class JsonlSource(BytesSource):
    """JSONL: one JSON object a line."""

    suffixes = (".jsonl",)
    wanted = "`path` names a JSONL file, relative to the current directory."

    def lines(self, unit: Unit | None = None) -> Iterator[Line]:
        """All non-blank lines, of one unit or of all files, in order."""
        for one in self.units() if unit is None else (unit,):
            file, offset, number = self.file(one.part), one.begin, one.first
            data = file.read(one.begin, one.end - one.begin)
            for text in data.split(b"\n"):
                begin, offset = offset, offset + len(text) + 1
                if begin == 0 and text.startswith(_BOM):
                    text, begin = text[3:], 3
                text = text.rstrip(b"\r")
                if text.strip():
                    yield Line(number, begin, text)
                number += 1

    def units(self) -> Iterator[Unit]:
        """Stretches of whole lines, of about 4 MiB."""
        for part in range(len(self.files)):
            file = self.file(part)
            begin = at = 0
            number = 1
            while at < file.size:
                block = file.read_on(at, UNIT_BYTES)
                if not block:
                    break  # became shorter
                last = block.rfind(b"\n")
                at += len(block)
                if at >= file.size:
                    yield Unit(part, begin, file.size, number)
                elif last >= 0:
                    end = at - len(block) + last + 1
                    yield Unit(part, begin, end, number)
                    number += block.count(b"\n")
                    begin = end

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The unit's lines."""
        if unit.end - unit.begin > _MAX_RECORD + UNIT_BYTES:
            error = BadSample("too large", f"a line of about {unit.end - unit.begin} bytes; is this a JSONL file?")
            yield Record(unit.part, unit.begin, 0, unit.first, 0, error)
            return
        for line in self.lines(unit):
            yield self._record(unit.part, line)


class JsonSource(BytesSource):
    """One JSON array of objects. Elements are found by counting brackets; the array is never in memory as a whole."""

    suffixes = (".json",)
    wanted = "`path` names a JSON file, relative to the current directory."

    def units(self) -> Iterator[Unit]:
        """Stretches of whole elements, of about 4 MiB."""
        for part in range(len(self.files)):
            first = None
            number = 0
            for number, (begin, end) in enumerate(self._elements(part), start=1):
                if first is None:
                    first = (begin, number)
                if end - first[0] >= UNIT_BYTES:
                    yield Unit(part, first[0], end, first[1])
                    first = None
                last = end
            if first is not None:
                yield Unit(part, first[0], last, first[1])

    def _elements(self, part: int) -> Iterator[tuple[int, int]]:
        file = self.file(part)
        head = file.read_on(0, _HEAD_BYTES)
        begin = len(_BOM) if head.startswith(_BOM) else 0
        opening = head[begin:].lstrip()
        if opening[:1] != b"[":
            if not opening and file.size < _HEAD_BYTES:
                return  # an empty file: told as an empty source
            hint = "an object; kind: jsonl reads one object a line" if opening[:1] == b"{" else repr(opening[:20])
            raise DataError(f"source {self.name!r}: {file.path} is no JSON array, it begins with {hint}.")
        begin = len(head) - len(opening) + 1
        yield from split_array(file.read_on, begin, file.size, file.path, self.name)

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The unit's elements."""
        file = self.file(unit.part)
        data = file.read(unit.begin, unit.end - unit.begin) + b"]"

        def read(offset: int, num_bytes: int) -> bytes:
            return data[offset : offset + num_bytes]

        for number, (begin, end) in enumerate(split_array(read, 0, len(data), file.path, self.name), start=unit.first):
            yield self._record(unit.part, Line(number, unit.begin + begin, data[begin:end]))

    def where(self, part: int, number: int) -> str:
        """file, element n."""
        return f"{self.files[part]}, element {number}"


_OUTSIDE = re.compile(rb'["{}\[\]]')
_TOP = re.compile(rb'["{}\[\],]')
_STRING = re.compile(rb'["\\]')


def split_array(read: Any, begin: int, size: int, path: str, name: str) -> Iterator[tuple[int, int]]:
    """Where the elements of a JSON array begin and end; `begin` is the byte after its `[`.

    Only brackets, commas and strings are looked at: whether an element is good JSON is for its reader to say. Raises
    DataError when the array is not closed, or something follows it.
    """
    depth, in_string = 1, False
    start = at = begin
    base, block = begin, b""
    count = 0
    empty = True  # nothing but blanks since `start`
    while True:
        if at >= base + len(block):
            base, block = at, read(at, _BLOCK)
            if not block:
                raise DataError(
                    f"source {name!r}: the array in {path} is cut: the file ends after {count} whole elements, at byte "
                    f"{at} of {size}, before the closing bracket."
                )
        pattern = _STRING if in_string else _TOP if depth == 1 else _OUTSIDE
        match = pattern.search(block, at - base)
        if match is None:
            empty = empty and not block[at - base :].strip()
            at = base + len(block)
            continue
        empty = empty and not block[at - base : match.start()].strip()
        sign, at = match[0], base + match.end()
        if sign == b"\\":
            at += 1
        elif sign == b'"':
            in_string, empty = not in_string, False
        elif sign in b"{[":
            depth, empty = depth + 1, False
        elif sign in b"]}" and depth > 1:
            depth -= 1
        else:  # a comma between elements, or the end
            last = sign != b","
            if sign == b"}":
                raise DataError(f"source {name!r}: {path} is no JSON array: a }} closes it at byte {at - 1}.")
            if not (last and empty):
                count += 1
                yield start, at - 1
            if last:
                break
            start, empty = at, True
    rest = read(at, 1024)
    if rest.strip():
        raise DataError(f"source {name!r}: {path} has more after its array, at byte {at}: {rest.strip()[:20]!r}.")


def _pieces(read: Any, begin: int, end: int) -> Iterator[bytes]:
    """Lines with their ends; a line of more than 1 MiB comes in several pieces."""
    held = b""
    while begin < end or held:
        block = read(begin, min(_BLOCK, end - begin)) if begin < end else b""
        begin += len(block)
        lines = re.findall(rb"[^\n]*\n|[^\n]+", held + block)
        held = b""
        if not block:
            begin = end
        elif lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < _BLOCK:
            held = lines.pop()
        yield from lines


class TextSource(BytesSource):
    """Plain text files. A file is one document; lines that hold only <|endoftext|> divide it into several."""

    suffixes = (".txt",)
    wanted = "`path` names a text file or a folder of them, relative to the current directory."

    def units(self) -> Iterator[Unit]:
        """The documents of each file, several to a unit."""
        for part in range(len(self.files)):
            begin = end = 0
            first, number = 1, 0
            for number, (start, stop) in enumerate(self._documents(part, 0, self.file(part).size), start=1):
                if number == first:
                    begin = start
                end = stop
                if end - begin >= UNIT_BYTES:
                    yield Unit(part, begin, end, first)
                    first = number + 1
            if number >= first:
                yield Unit(part, begin, end, first)

    def _documents(self, part: int, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Where documents begin and end. Blank ones are skipped, unless the file holds nothing else."""
        file = self.file(part)
        start = at = begin
        blank = line_start = True
        found = False
        for piece in _pieces(file.read_on, begin, end):
            if line_start and piece.rstrip(b"\r\n") == END_OF_TEXT:
                if not blank:
                    found = True
                    yield start, at
                start, blank = at + len(piece), True
            else:
                blank = blank and not piece.strip()
            line_start = piece.endswith(b"\n")
            at += len(piece)
        if not blank or (not found and begin == 0):
            yield start, at

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The unit's documents."""
        file = self.file(unit.part)
        for number, (begin, end) in enumerate(self._documents(unit.part, unit.begin, unit.end), start=unit.first):
            data = file.read(begin, end - begin)
            if begin == 0 and data.startswith(_BOM):
                data, begin = data[3:], 3
            data = data.rstrip(b"\r\n")
            yield self._record(unit.part, Line(number, begin, data))

    def parse(self, data: bytes, seed: int) -> Sample:
        """The bytes of a document."""
        return parse_text(data)

    def where(self, part: int, number: int) -> str:
        """file, document n."""
        return f"{self.files[part]}, document {number}"
