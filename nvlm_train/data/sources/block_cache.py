"""Ranges of remote files on a local disk. Off by default (`data.remote_cache`).

    PATH/<ab>/<abcd...>      one file a block: 8 bytes of header and up to 1 MiB of a remote file

Reading a small sample over a network costs a request however few bytes it has. With the cache a block is fetched once
on each machine and answers all the samples in it, for every rank there; together with an order by groups of shards
(`shuffle: shard_groups`) the blocks of a group stay until it has passed. Neighbouring blocks that are missing are one
request. Nothing is fetched ahead of the loader, which itself works whole steps ahead.

A block is known by the file's address, size and version (ETag or time), so that a changed file never answers from
before; what has no version is not kept. Files appear whole (written beside, then renamed) and carry a checksum: any
number of processes may share a folder. Above the size limit each process removes what was used longest ago; since it
counts only its own writes between two looks at the folder, the limit may be passed by 1/20 per process.

Nothing about the cache may end a run: what cannot be read here is fetched, and when writing fails it stops writing.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from contextlib import suppress
from typing import Any

from nvlm_train.data.sources.files import ByteFile
from nvlm_train.log import get_logger
from nvlm_train.recipe import schema

log = get_logger(__name__)

BLOCK = 1 << 20
_HEAD = struct.Struct("<4sI")  # magic, CRC-32 of the bytes
_MAGIC = b"NVB1"
_LOOK_SHARE = 20  # look at the folder again after writing this part of the limit
_KEEP_SHARE = 0.9  # of the limit, after removing


class BlockCache:
    """Answers like `ByteFile.read`, from the disk where it can. Any thread may call. Raises OSError like it."""

    def __init__(self, settings: schema.RemoteCache) -> None:
        self._settings = settings
        self._root, self._limit = settings.path, int(settings.max_gib * (1 << 30))
        self._lock = threading.Lock()
        self._writes = True
        self._size: int | None = None  # not looked at yet

    def __reduce__(self) -> Any:  # the loader process counts for itself
        return type(self), (self._settings,)

    def read(self, file: ByteFile, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` of a remote file from `offset`; less only at its end."""
        end = min(offset + num_bytes, file.size)
        if not file.version or end <= offset:
            return file.read(offset, num_bytes)
        blocks = range(offset // BLOCK, -(-end // BLOCK))
        held = {block: self._get(file, block) for block in blocks}
        first = None  # of the blocks that are missing side by side
        for block in [*blocks, blocks.stop]:
            if held.get(block, b"") is None:
                first = block if first is None else first
            elif first is not None:
                data = file.read(first * BLOCK, (block - first) * BLOCK)
                for k in range(first, block):
                    piece = held[k] = data[(k - first) * BLOCK : (k - first + 1) * BLOCK]
                    self._put(file, k, piece)
                first = None
        whole = b"".join(held[block] or b"" for block in blocks)
        return whole[offset - blocks.start * BLOCK : end - blocks.start * BLOCK]

    def _path(self, file: ByteFile, block: int) -> str:
        name = hashlib.blake2b(
            f"{file.path}\0{file.size}\0{file.version}\0{block}".encode(), digest_size=16
        ).hexdigest()
        return os.path.join(self._root, name[:2], name)

    def _get(self, file: ByteFile, block: int) -> bytes | None:
        path = self._path(file, block)
        try:
            with open(path, "rb") as stream:
                head, body = stream.read(_HEAD.size), stream.read()
            os.utime(path)  # used just now
        except OSError:
            return None
        whole = min(BLOCK, file.size - block * BLOCK)
        if len(head) < _HEAD.size or len(body) != whole or _HEAD.unpack(head) != (_MAGIC, zlib.crc32(body)):
            log.warning("data.remote_cache: %s is damaged; its bytes are fetched again", path)
            return None
        return body

    def _put(self, file: ByteFile, block: int, body: bytes) -> None:
        if not self._writes or len(body) != min(BLOCK, file.size - block * BLOCK):
            return
        path = self._path(file, block)
        temporary = f"{path}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as stream:
                stream.write(_HEAD.pack(_MAGIC, zlib.crc32(body)))
                stream.write(body)
            os.replace(temporary, path)
        except OSError as error:
            self._writes = False
            with suppress(OSError):
                os.unlink(temporary)
            log.warning("data.remote_cache: cannot write to %s (%s); from now on it is only read", self._root, error)
            return
        with self._lock:
            self._size = self._room() if self._size is None else self._size + _HEAD.size + len(body)
            if self._size > self._limit:
                self._size = self._room()

    def _room(self) -> int:
        """Looks through the folder, removes what was used longest ago if it is over the limit; bytes that this process
        believes are there, with a head start for what others write meanwhile."""
        files: list[tuple[float, int, str]] = []
        for folder, _, names in os.walk(self._root):
            for name in names:
                with suppress(OSError):  # another process has removed it
                    status = os.stat(os.path.join(folder, name))
                    files.append((status.st_mtime, status.st_size, os.path.join(folder, name)))
        size = sum(one[1] for one in files)
        if size > self._limit:
            for _, num_bytes, path in sorted(files):
                with suppress(OSError):  # another process was faster
                    os.unlink(path)
                size -= num_bytes
                if size <= _KEEP_SHARE * self._limit:
                    break
        return max(size, self._limit - self._limit // _LOOK_SHARE)
