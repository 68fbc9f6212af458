"""What every source can do, whatever its files look like.

A source is a list of parts (files, or row groups of files) whose records are read at any position. The index goes
through all of them once, unit by unit (`units`, `scan`), in several processes if need be; training reads single ones
(`sample`). A position is one 64-bit number: the part in its upper 24 bits, the offset inside the part in the lower 40.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.images import BadSample
from nvlm_train.data.sources.block_cache import BlockCache
from nvlm_train.data.sources.files import ByteFile, FilePool, ImageRoot, is_url, list_files, other_kind, read_url
from nvlm_train.data.sources.rows import Form, ImageRef, Sample
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

OFFSET_BITS = 40
_WHOLE_BYTES = 64 << 20  # sources up to this size are known by all their bytes
_END_BYTES = 1 << 20  # larger ones by size, time and both ends of every file
_SMALL_END_BYTES = 1 << 12  # ... of very many files


class Unit(NamedTuple):
    """A stretch of a part that one process indexes at a time: bytes or rows begin..end-1, whose first record (line,
    element, row) has the number `first`."""

    part: int
    begin: int
    end: int
    first: int


class Record(NamedTuple):
    """One record of a source: where it is, a 32-bit hash of its content, and the sample or what is wrong with it.

    number: of the line, element, sample or row in its file. where: what a message calls it.
    """

    part: int
    offset: int
    num_bytes: int
    number: int
    hash: int
    sample: Sample | BadSample


def position(part: int, offset: int) -> int:
    """Part and offset as one number."""
    return part << OFFSET_BITS | offset


def part_of(positions: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The parts of positions: i64[n]."""
    return (positions >> np.uint64(OFFSET_BITS)).astype(np.int64)


def content_hash(data: bytes) -> int:
    """32 bits of a record's content, blanks around it ignored."""
    return int.from_bytes(hashlib.blake2b(data.strip(), digest_size=4).digest(), "little")


class Source:
    """A source of samples. `path` is what the recipe says; `parts` are the files it stands for."""

    suffixes: tuple[str, ...] = ()
    unit = "B"  # of progress
    format = ""  # of its files, where they are none of text: as `files.other_kind` calls it
    remote_cache: BlockCache | None = None  # through which samples are read where the files are remote
    wanted = "`path` names a file or a folder, relative to the current directory, or a URL."

    def __init__(self, name: str, settings: schema.Source) -> None:
        self.name = name
        self.settings = settings
        self.path: Path | str = settings.path if is_url(settings.path) else Path(settings.path)
        self.form = Form.of(settings)
        self.files = self._list()
        if len(self.files) >= 1 << (64 - OFFSET_BITS):
            raise DataError(f"source {name!r}: {len(self.files)} files are too many; join some of them.")
        self._pool = FilePool()
        self._opened: dict[int, ByteFile] = {}
        self.image_root = self._image_root()
        self._images = ImageRoot(str(self.image_root))
        self._check_format(self.file(0))  # a file that is missing is told at once

    def __reduce__(self) -> Any:  # another process opens the files for itself
        return type(self), (self.name, self.settings), {"remote_cache": self.remote_cache}

    def _list(self) -> list[str]:
        return list_files(self.name, self.settings.path, self.suffixes, self.wanted)

    def _image_root(self) -> Path | str:
        if self.settings.image_root is not None:
            return self.settings.image_root if is_url(self.settings.image_root) else Path(self.settings.image_root)
        if is_url(self.settings.path):
            return self.files[0].rsplit("/", 1)[0]
        return Path(self.path) if os.path.isdir(self.path) else Path(self.files[0]).parent

    def _check_format(self, file: ByteFile) -> None:
        """Raises DataError where a local file is plainly of another kind."""
        found = other_kind(file.read(0, 512)) if file.is_local else None
        if found is not None and found[0] != self.format:
            kind = self.settings.kind
            raise DataError(
                f"source {self.name!r}: {file.path} is {found[0]}, which kind: {kind} cannot read; {found[1]}."
            )

    def close(self) -> None:
        """Lets go of the files; reading opens them again."""
        self._pool.close()

    def file(self, part: int) -> ByteFile:
        """The bytes of a part."""
        found = self._opened.get(part)
        if found is None:
            found = ByteFile(self.name, self.files[part], self._pool)
            if found.size >= 1 << OFFSET_BITS:
                raise DataError(f"source {self.name!r}: {found.path} has 1 TiB or more; split it.")
            self._opened[part] = found
        return found

    def read_range(self, part: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a part for one sample: by a range of its own, or from the cache of remote files. Raises OSError."""
        file = self.file(part)
        if self.remote_cache is None or file.is_local:
            return file.read(offset, num_bytes)
        return self.remote_cache.read(file, offset, num_bytes)

    def notes(self) -> list[str]:
        """What is legal, but good to know before training on it."""
        return []

    @property
    def by_groups(self) -> bool:
        """Whether its order keeps to groups of shards (`shuffle`)."""
        return self.settings.shuffle == "shard_groups" or (
            self.settings.shuffle == "auto" and is_url(self.settings.path)
        )

    @property
    def amount(self) -> int:
        """How much there is to index, in the unit of `Unit.begin` and `Unit.end`."""
        return sum(self.file(part).size for part in range(len(self.files)))

    num_bytes = amount

    def key_parts(self) -> dict[str, Any]:
        """Everything a row of the index depends on besides tokenizer and tiling: the content, and how it is read."""
        files = [self.file(part) for part in range(len(self.files))]
        total = sum(file.size for file in files)
        content = hashlib.sha256()
        ends = _END_BYTES if len(files) <= 256 else _SMALL_END_BYTES
        for file in files:
            content.update(f"{os.path.basename(file.path)}/{file.size}/".encode())
            if total <= _WHOLE_BYTES:
                for begin in range(0, file.size, _END_BYTES):
                    content.update(file.read_on(begin, _END_BYTES))
                continue
            content.update(file.version.encode())
            content.update(file.read(0, ends))
            content.update(file.read(max(0, file.size - ends), ends))
        read_as = self.settings.model_dump(
            include={
                "kind", "columns", "roles", "system", "train_on", "prompt", "min_ratings", "max_samples", "max_tiles",
                "max_tiles_shared", "split",
            }
        )  # fmt: skip
        root = str(self.image_root) if is_url(str(self.image_root)) else os.path.realpath(self.image_root)
        return {"content": content.hexdigest(), "read_as": read_as, "root": root}

    def units(self) -> Iterator[Unit]:
        """The work of indexing, in order. Raises DataError where the file as a whole is unusable."""
        raise NotImplementedError

    def scan(self, unit: Unit) -> Iterator[Record]:
        """The records of a unit, in order."""
        raise NotImplementedError

    def sample(self, row: Any) -> Sample:
        """The sample of a row of the index, as it is now. Raises BadSample, also when it has changed since."""
        raise NotImplementedError

    def where(self, part: int, number: int) -> str:
        """What a message calls a record: file:line."""
        return f"{self.files[part]}:{number}"

    def max_tiles(self, sample: Sample, top: int) -> int:
        """The tile maximum of each image of a sample; `top` is the recipe's."""
        top = self.settings.max_tiles or top
        return max(1, top // max(1, len(sample.images))) if self.settings.max_tiles_shared else top

    def image_path(self, image: str) -> str:
        """Where an image of a row lies, links resolved. Raises BadSample when that is outside the image root."""
        return self._images.locate(image)

    def located(self, sample: Sample) -> Sample:
        """The sample with every image found."""
        if not any(image.data is None and image.path is None for image in sample.images):
            return sample
        return Sample(sample.messages, [self._locate(image) for image in sample.images])

    def _locate(self, image: ImageRef) -> ImageRef:
        if image.data is not None or image.path is not None:
            return image
        path = self._images.locate(image.name)
        return RemoteImage(image.name, path) if is_url(path) else ImageRef(image.name, path)


class RemoteImage(ImageRef):
    """An image of its own behind a URL."""

    def open(self) -> bytes:
        """The file's bytes. Raises BadSample."""
        return read_url(str(self.path), self.name)
