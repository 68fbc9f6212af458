"""WebDataset tars: members of one key, side by side, are a sample.

`<key>.<ext>`: the key is the name up to the first dot of its last part, folders included. Images are jpg, jpeg, png or
webp, several in natural order (`key.2.jpg` before `key.10.jpg`); beside them `json` (a conversation as in LLaVA, or an
object with any of the forms of `rows`) or `txt` (a caption). A tar is never unpacked; only its headers and the members
that are needed are read, by their offsets. Names in it are names and never paths.

Energon's `.nv-meta` folder is used where it is there: `split.yaml` says which tars belong to the split, `dataset.yaml`
which member is which field, `index.sqlite` where samples begin, so that one tar can be indexed by several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nvlm_train.data.images import BadSample
from nvlm_train.data.sources.files import ByteFile, expand_braces, holds_file, is_url, natural
from nvlm_train.data.sources.rows import Form, ImageRef, Sample, parse_json, parse_row
from nvlm_train.data.sources.source import Record, Source, Unit
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

IMAGES = ("jpg", "jpeg", "png", "webp")
_BLOCK = tarfile.BLOCKSIZE
_HEADER_BYTES = 1 << 16  # of an image, enough for its size nearly always
_MAX_TEXT = 64 << 20
_MAX_NAME = 1 << 16
_UNIT_SAMPLES = 1024  # where an index tells the places of samples
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True)
class Member:
    """A file in a tar. begin: of its first header; offset, size: of its content; end: of the padding after it."""

    name: str
    begin: int
    offset: int
    size: int
    end: int
    is_link: bool = False

    @property
    def key(self) -> str:
        match = _KEY.fullmatch(self.name)
        return match[1] if match else ""

    @property
    def extension(self) -> str:
        match = _KEY.fullmatch(self.name)
        return match[2] if match else ""


class TarDamage(Exception):
    """The rest of a tar cannot be read. begin: of the member that is cut or damaged."""

    def __init__(self, begin: int, reason: str, message: str, name: str = "") -> None:
        super().__init__(message)
        self.begin, self.reason, self.name = begin, reason, name


def members(read: Callable[[int, int], bytes], begin: int, end: int) -> Iterator[Member]:
    """The files, and links, of a tar between two offsets. Raises TarDamage at the first place that makes no sense."""
    at = first = begin
    long_name: str | None = None
    long_size: int | None = None
    while at < end:
        header = read(at, _BLOCK)
        if not header.strip(b"\0"):
            if len(header) < _BLOCK or at + _BLOCK >= end:
                return
            # One empty block is the end of an archive; another archive may have been appended after it.
            at = first = at + _BLOCK
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            reason = "cut tar" if len(header) < _BLOCK else "damaged tar"
            raise TarDamage(first, reason, f"no tar header at byte {at} ({error})") from error
        size = info.size
        if info.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            size = long_size if long_size is not None else size
        if size < 0:
            raise TarDamage(first, "damaged tar", f"a size of {size} in the header at byte {at}")
        offset = at + _BLOCK
        after = offset + -(-size // _BLOCK) * _BLOCK
        name = long_name if long_name is not None else info.name
        if offset + size > end:
            missing = offset + size - end
            raise TarDamage(first, "cut tar", f"{name} should have {size} bytes, but the last {missing} are gone", name)
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if size > _MAX_NAME:
                raise TarDamage(first, "damaged tar", f"an extended header of {size} bytes at byte {at}")
            content = read(offset, size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                found = _pax(content)
                long_name = found.get("path", long_name)
                try:
                    long_size = int(found["size"]) if "size" in found else long_size
                except ValueError as error:
                    raise TarDamage(first, "damaged tar", f"size {found['size'][:20]!r} in a header") from error
        elif info.type != tarfile.GNUTYPE_LONGLINK:
            if info.type in tarfile.REGULAR_TYPES or info.issym() or info.islnk():
                yield Member(name, first, offset, size, after, info.issym() or info.islnk())
            first, long_name, long_size = after, None, None
        at = after
        if info.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            first = after


def _pax(content: bytes) -> dict[str, str]:
    """Entries `length key=value\\n` of an extended header."""
    found: dict[str, str] = {}
    while content:
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, sign, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if length <= len(digits) + 2 or length > len(content) or not sign:
            break
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return found


class TarImage(ImageRef):
    """A picture still in its tar."""

    def __init__(self, name: str, file: ByteFile, member: Member) -> None:
        super().__init__(name, path="")
        object.__setattr__(self, "_file", file)
        object.__setattr__(self, "_member", member)

    def _read(self, num_bytes: int) -> bytes:
        file, member = self.__dict__["_file"], self.__dict__["_member"]
        try:
            data: bytes = file.read_on(member.offset, num_bytes)
        except OSError as error:
            raise BadSample("missing file", f"{file.path} cannot be read any more: {error}") from error
        return data

    def header(self) -> bytes:
        """Its first 64 KiB."""
        return self._read(min(self.__dict__["_member"].size, _HEADER_BYTES))

    def open(self) -> bytes:
        """All of it."""
        return self._read(self.__dict__["_member"].size)


class WebDatasetSource(Source):
    """Tar shards, or a folder that Energon has prepared."""

    suffixes = (".tar",)
    format = "a tar"
    wanted = "`path` names a tar, a folder of tars, or many by a-{000..010}.tar, relative to the current directory."

    def __init__(self, name: str, settings: schema.Source) -> None:
        self._meta = None
        if not is_url(settings.path):
            self._meta = read_meta(name, settings)
        elif holds_file(settings.path, ".nv-meta"):
            raise DataError(
                f"source {name!r}: {settings.path} was prepared by Energon, whose .nv-meta is only read on a local path"
                "; name the tars of the split: URL/shard-{000..127}.tar."
            )
        super().__init__(name, settings)
        if self._meta is not None:
            columns = settings.columns.model_dump(exclude_none=True) if settings.columns else {}
            mapped = schema.Columns(**{**self._meta.columns, **columns})
            prompt = settings.prompt or self._meta.prompt
            given = settings.model_copy(update={"columns": mapped, "prompt": prompt})
            self.form = Form.of(given, megatron=True)

    def _list(self) -> list[str]:
        return self._meta.files if self._meta is not None else super()._list()

    def key_parts(self) -> dict[str, Any]:
        """And what Energon's files say."""
        parts = super().key_parts()
        if self._meta is not None:
            parts["energon"] = [self._meta.columns, self._meta.prompt]
        return parts

    def notes(self) -> list[str]:
        """Tars without the empty blocks that end one."""
        cut = [self.files[part] for part in range(len(self.files)) if not self._ends_whole(part)]
        if not cut:
            return []
        return [
            f"cut? {len(cut)} of {len(self.files)} tars have no end-of-archive block, as after a broken download or "
            f"copy; compare sizes with where they come from: {', '.join(cut[:3])}{', ...' if len(cut) > 3 else ''}"
        ]

    def _ends_whole(self, part: int) -> bool:
        """Whether the last block is empty, as writers leave it; what cannot be read is told where it is needed."""
        file = self.file(part)
        try:
            return not file.size or (file.size % _BLOCK == 0 and not file.read(file.size - _BLOCK, _BLOCK).strip(b"\0"))
        except OSError:
            return True

    def units(self) -> Iterator[Unit]:
        """A tar each, or about 1000 samples where an index tells where they are."""
        known = self._known_places()
        for part in range(len(self.files)):
            size = self.file(part).size
            places = known(part) if known is not None else None
            if not places or places != sorted(set(places)) or places[0] < 0 or places[-1] >= size:
                if size:
                    yield Unit(part, 0, size, 1)
                continue
            places[0] = 0
            for first in range(0, len(places), _UNIT_SAMPLES):
                end = places[first + _UNIT_SAMPLES] if first + _UNIT_SAMPLES < len(places) else size
                yield Unit(part, places[first], end, first + 1)

    def _known_places(self) -> Callable[[int], list[int]] | None:
        if self._meta is None or self._meta.index is None:
            return None
        ids, path = self._meta.ids, self._meta.index

        def places(part: int) -> list[int]:
            try:
                with sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True) as database:
                    found = database.execute(
                        "SELECT byte_offset FROM samples WHERE tar_file_id = ? ORDER BY sample_index", (ids[part],)
                    ).fetchall()
                return [int(row[0]) for row in found]
            except (sqlite3.Error, TypeError, ValueError):
                return []  # of another version: the tar is gone through instead

        return places

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The samples of a unit. A key that comes again later in it, or a member twice, is a bad sample; where the tar
        is cut or damaged, the sample it happens in is bad and the rest is lost."""
        file = self.file(unit.part)
        damage: list[TarDamage] = []

        def all_members() -> Iterator[Member]:
            try:
                yield from members(file.read_on, unit.begin, unit.end)
            except TarDamage as error:
                damage.append(error)

        seen: set[int] = set()
        number = unit.first - 1
        named = (member for member in all_members() if member.key)
        last: tuple[str, list[Member]] | None = None
        for key, group in groupby(named, key=lambda member: member.key):
            if last is not None:
                number += 1
                yield self._record(unit.part, number, *last, seen)
            last = (key, list(group))
        if last is not None and not (damage and Member(damage[0].name, 0, 0, 0, 0).key == last[0]):
            number += 1
            yield self._record(unit.part, number, *last, seen)
        for error in damage:
            name = f"{error.name}: " if error.name else ""
            bad = BadSample(error.reason, f"{name}{error}; what follows in this tar is lost")
            yield Record(unit.part, error.begin, 0, number + 1, 0, bad)

    def _record(self, part: int, number: int, key: str, group: list[Member], seen: set[int]) -> Record:
        file = self.file(part)
        begin, end = group[0].begin, group[-1].end
        identity = hash(key)
        sample: Sample | BadSample
        seed = 0
        try:
            if identity in seen:
                raise BadSample("duplicate key", f"key {key}: its samples are not side by side, or it is used twice")
            if end - begin >= 1 << 32:
                raise BadSample("too large", f"key {key}: {end - begin} bytes are too many for one sample")
            sample, seed = self._sample(
                key, group, lambda m: file.read_on(m.offset, m.size), lambda m: TarImage(m.name, file, m)
            )
        except BadSample as error:
            sample = error if key in str(error) else BadSample(error.reason, f"key {key}: {error}")
        except OSError as error:
            sample = BadSample("missing file", f"key {key}: {error}")
        seen.add(identity)
        return Record(part, begin, min(end - begin, (1 << 32) - 1), number, seed, sample)

    def _sample(
        self,
        key: str,
        group: list[Member],
        read: Callable[[Member], bytes],
        image_of: Callable[[Member], ImageRef],
    ) -> tuple[Sample, int]:
        extensions = [member.extension for member in group]
        twice = sorted({one for one in extensions if extensions.count(one) > 1})
        if twice:
            raise BadSample("duplicate key", f"key {key}: {', '.join(twice)} is there more than once")
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=4)
        row: dict[str, Any] = {}
        whole: dict[str, Any] = {}
        images: list[tuple[list[Any], ImageRef]] = []
        for member in sorted(group, key=lambda m: m.extension):
            kind = member.extension.rsplit(".", 1)[-1].lower()
            if member.is_link:
                raise BadSample("link in tar", f"key {key}: {member.name} is a link; store the file itself (tar -h)")
            digest.update(f"\0{member.extension}\0{member.size}\0".encode("utf-8", "surrogateescape"))
            if kind in IMAGES:
                image = image_of(member)
                whole[member.extension] = image
                images.append((natural(member.extension.lower()), image))
            elif kind in ("json", "txt") or member.extension in self._wanted:
                if member.size > _MAX_TEXT:
                    raise BadSample("too large", f"key {key}: {member.name} has {member.size} bytes")
                data = read(member)
                digest.update(data)
                whole[member.extension] = parse_json(data) if kind == "json" else _decode(data, member.name)
        for extension, value in whole.items():
            if isinstance(value, Mapping):
                row.update({name: inner for name, inner in value.items() if name not in ("image", "images")})
            elif extension == "json" and isinstance(value, list):
                row["conversations"] = value
        seed = int.from_bytes(digest.digest(), "little")
        ordered = [image for _, image in sorted(images, key=_image_order)]
        for field, wanted in self.form.columns.model_dump().items():
            if wanted is not None and field not in ("role", "content"):
                value = _access(whole, wanted)
                if value is not None:
                    row[wanted] = value
        columns = self.form.columns
        if columns.images and row.get(columns.images) is not None:
            chosen = row[columns.images]
            if isinstance(chosen, list):  # names of members, as in a document of text and images
                row[columns.images] = [_named_image(whole, name) for name in chosen]
        elif ordered:
            row[columns.images or "images"] = ordered
        if "txt" in whole and row.get("caption") is None:
            row["text" if not ordered else "caption"] = whole["txt"].strip()
        return parse_row(row, self.form, seed), seed

    @property
    def _wanted(self) -> set[str]:
        named = [value for value in self.form.columns.model_dump().values() if value]
        return {option.split("[", 1)[0] for value in named for option in value.split(",")}

    def sample(self, row: Any) -> Sample:
        """The sample of a row of the index. Raises BadSample."""
        part, begin = int(row["position"]) >> 40, int(row["position"]) & ((1 << 40) - 1)
        try:
            data = self.read_range(part, begin, int(row["num_bytes"]))
        except OSError as error:
            raise BadSample("missing file", f"{self.files[part]} cannot be read any more: {error}") from error

        def read(offset: int, num_bytes: int) -> bytes:
            return data[offset : offset + num_bytes]

        changed = BadSample("changed file", "the tar has changed since it was indexed; start again to index it anew")
        try:
            found = [member for member in members(read, 0, len(data)) if member.key]
        except TarDamage as error:
            raise changed from error
        if not found or found[0].key != found[-1].key:
            raise changed
        sample, seed = self._sample(
            found[0].key,
            found,
            lambda m: read(m.offset, m.size),
            lambda m: ImageRef(m.name, data=read(m.offset, m.size)),
        )
        if seed != int(row["hash"]):
            raise changed
        return sample

    def where(self, part: int, number: int) -> str:
        """tar, sample n."""
        return f"{self.files[part]}, sample {number}"


def _image_order(pair: tuple[list[Any], ImageRef]) -> list[tuple[int, int, str]]:
    return [(0, piece, "") if isinstance(piece, int) else (1, 0, piece) for piece in pair[0]]


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(
            "not UTF-8", f"{name} is not UTF-8: byte {data[error.start]:#04x} at position {error.start}"
        ) from error


def _access(whole: Mapping[str, Any], wanted: str) -> Any:
    """A field as Energon names it: `txt`, `json[caption]`, `json[0][value]`, `jpg,png` (the first that is there)."""
    for option in wanted.split(","):
        name, *steps = re.split(r"[\[\]]+", option.strip().rstrip("]"))
        value = whole.get(name)
        for step in steps:
            if isinstance(value, Mapping):
                value = value.get(step)
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                value = None
        if value is not None:
            return value
    return None


def _named_image(whole: Mapping[str, Any], name: Any) -> ImageRef:
    found = whole.get(name) if isinstance(name, str) else None
    if not isinstance(found, ImageRef):
        raise BadSample("missing image", f"image {str(name)[:60]!r} is no member of this sample")
    return found


# ------------------------------------------------------------------------------------------------------ Energon's files


@dataclass(frozen=True)
class EnergonMeta:
    """What a `.nv-meta` folder says of a split. ids: the number of each tar in the index. num_samples: as counted."""

    files: list[str]
    ids: list[int]
    index: str | None
    columns: dict[str, str]
    prompt: str | None
    num_samples: int | None


# Fields of Energon's sample types, by the column of ours that means the same.
_FIELDS = {
    "image": "images", "images": "images", "caption": "caption", "context": "question", "answers": "answer",
    "choices": "choices", "correct_choice_idx": "answer", "text": "text", "texts": "texts",
}  # fmt: skip
_PROMPTS = {"OCRSample": "ocr", "OCRWebdataset": "ocr"}


def read_meta(name: str, settings: schema.Source) -> EnergonMeta | None:
    """What the `.nv-meta` folder of a source says, or None where it has none. Raises DataError."""
    root = settings.path
    if os.path.basename(os.path.normpath(root)) == ".nv-meta":
        root = os.path.dirname(os.path.normpath(root))
    folder = os.path.join(root, ".nv-meta")
    if not os.path.isdir(folder):
        return None
    info_file = os.path.join(folder, ".info.json")
    if not os.path.isfile(info_file):
        info_file = os.path.join(folder, ".info.yaml")
    info = read_yaml(name, info_file) if os.path.isfile(info_file) else {}
    listed = [str(file) for file in info.get("shard_counts") or {}]
    split_file = os.path.join(folder, "split.yaml")
    chosen = listed
    if os.path.isfile(split_file):
        split = read_yaml(name, split_file)
        parts = split.get("split_parts")
        if not isinstance(parts, Mapping) or not isinstance(parts.get(settings.split), list):
            known = ", ".join(map(str, parts)) if isinstance(parts, Mapping) else "none"
            raise DataError(
                f"source {name!r}: {split_file} has no part {settings.split!r}; it has {known}; set `split` to one."
            )
        out = {file for pattern in split.get("exclude") or [] for file in expand_braces(str(pattern))}
        chosen = [file for pattern in parts[settings.split] for file in expand_braces(str(pattern)) if file not in out]
    if not chosen:
        raise DataError(f"source {name!r}: {folder} lists no tar for the split {settings.split!r}; prepare it again.")
    inside = os.path.join(os.path.realpath(root), "")
    files = [os.path.join(root, file) for file in chosen]
    outside = [file for file in files if not os.path.realpath(file).startswith(inside)]
    if outside:
        raise DataError(f"source {name!r}: {folder} names {outside[0]}, which lies outside of {root}.")
    index: str | None = os.path.join(folder, "index.sqlite")
    if index is not None and (not os.path.isfile(index) or any(file not in listed for file in chosen)):
        index = None
    ids = [listed.index(file) if file in listed else -1 for file in chosen]
    counts = info.get("shard_counts") or {}
    sizes = [counts.get(file) for file in chosen]
    total = sum(size for size in sizes if isinstance(size, int)) if None not in sizes else None
    return EnergonMeta(files, ids, index, *_read_fields(name, folder), total)


def _read_fields(name: str, folder: str) -> tuple[dict[str, str], str | None]:
    file = os.path.join(folder, "dataset.yaml")
    if not os.path.isfile(file):
        return {}, None
    dataset = read_yaml(name, file)
    kinds = [str((dataset.get(key) or {}).get("__class__", "")) for key in ("sample_type",) if dataset.get(key)]
    kinds.append(str(dataset.get("__class__", "")))
    columns = {}
    for field, place in (dataset.get("field_map") or {}).items():
        if field in _FIELDS and isinstance(place, str):
            columns[_FIELDS[field]] = place
    return columns, next((_PROMPTS[kind] for kind in kinds if kind in _PROMPTS), None)


def read_yaml(name: str, file: str) -> dict[str, Any]:
    """A YAML or JSON mapping of data, tags other than the plain ones refused. Raises DataError."""
    import yaml

    try:
        with open(file, encoding="utf-8") as text:
            content = json.load(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"source {name!r}: cannot read {file} ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"source {name!r}: {file} holds a {type(content).__name__}; a mapping is expected.")
    return content
