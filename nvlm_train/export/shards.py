"""The weights of an export: safetensors files, written in pieces from whatever holds the weights.

Tensors are not read into memory. The slices that the ranks wrote, and files of frozen weights, are mapped, converted
and written a few megabytes at a time, so that memory is the same whatever the model's size. Only what must be computed
is made as a whole: a weight with a LoRA adapter in it, and the tower's attention with its dummy heads.

A finished shard is fsynced, then listed in DONE with its SHA-256. An interrupted export goes on with those that
still have that checksum.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from nvlm_train import __version__
from nvlm_train.errors import CheckpointError, SetupError
from nvlm_train.log import get_logger
from nvlm_train.model import key_map

if TYPE_CHECKING:
    from torch import Tensor

    from nvlm_train.checkpoint import Slice
    from nvlm_train.model.pretrained import Weights
    from nvlm_train.recipe.schema import Model

log = get_logger(__name__)

DTYPES = {"bf16": ("bfloat16", "BF16", 2), "fp32": ("float32", "F32", 4)}  # torch's name, safetensors' name, bytes
DONE, LOCK = "done.json", ".lock"  # in the folder of an export under way
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_AT_ONCE = 256 * 2**20  # bytes of computed tensors in memory, unless one alone is larger
_PIECE = 2**20  # elements that are converted at a time
_THREADS = 4


class Planned(NamedTuple):
    """A tensor of a shard: our name, the shape and the bytes that it has in the file."""

    name: str
    shape: tuple[int, ...]
    bytes: int


def parse_size(size: str | int) -> int:
    """Bytes of '4GB', '500MB', '2GiB' or a number; CheckpointError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?|)B?", str(size).strip().upper())
    value = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else 0
    if value <= 0:
        raise CheckpointError(f"--max-shard-size {size!r} is not a size; right would be 4GB, 500MB or 2GiB")
    return value


def plan_shards(
    model: Model, dtype: str, max_shard_bytes: int, num_dummy_heads: int = key_map.NUM_DUMMY_HEADS
) -> list[list[Planned]]:
    """The tensors of each shard in model order. A shard never exceeds the limit unless a single tensor does."""
    from nvlm_train.model.pretrained import expected_shapes

    shards: list[list[Planned]] = [[]]
    used = 0
    for name, shape in expected_shapes(model).items():
        shape = key_map.published_shape(name, shape, model.vision, num_dummy_heads)
        size = DTYPES[dtype][2] * math.prod(shape)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(Planned(name, shape, size))
        used += size
    return shards


def file_name(number: int, count: int) -> str:
    """The published form; number counts from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


# ----------------------------------------------------------------------------------------------- an export under way


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes `folder` if need be and keeps other exports out of it. SetupError where one is at work there, which is
    named, or where the folder cannot be made."""
    ended = SetupError(f"another export that was writing {folder} has ended just now; see what it wrote, and try again")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except FileNotFoundError:  # the other one gave the folder its name
        raise ended from None
    except OSError as error:
        raise SetupError(f"{folder}, in which the export is made, cannot be written: {error.strerror}") from None
    with lock as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                stream.seek(0)
                who = stream.read(200).strip() or "a process that has not said who it is"
                raise SetupError(
                    f"another export is writing {folder}: {who}; wait for it, or name another folder for this one"
                ) from None
            log.debug("%s: this file system has no locks (%s)", folder, error)
        try:
            current = (folder / LOCK).stat().st_ino == os.fstat(stream.fileno()).st_ino
        except OSError:
            current = False
        if not current:
            raise ended
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def fingerprint(identity: str | None, shards: list[list[Planned]], dtype: str) -> str | None:
    """What a shard's content depends on, as a hash. None where the weights' own identity is not known."""
    if identity is None:
        return None
    return hashlib.sha256(json.dumps([__version__, identity, dtype, shards]).encode()).hexdigest()


def finished(folder: Path, wanted: str | None) -> dict[str, str]:
    """{file: SHA-256} of the shards in `folder` that an interrupted export of the same `fingerprint` has finished and
    that are still what it wrote. Removes everything else there."""
    from nvlm_train.checkpoint import sha256_of

    try:
        record = json.loads((folder / DONE).read_text(encoding="utf-8"))
        listed: dict[str, str] = record["shards"] if wanted is not None and record["fingerprint"] == wanted else {}
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    there = {name: digest for name, digest in listed.items() if (folder / name).is_file()}
    found = sha256_of([folder / name for name in there], "checksums")
    kept = {name: there[name] for name, digest in zip(there, found, strict=True) if digest == there[name]}
    for path in folder.iterdir():
        if path.name not in (*kept, LOCK):
            path.unlink()
    return kept


def write_shards(
    weights: Weights,
    model: Model,
    shards: list[list[Planned]],
    folder: Path,
    dtype: str,
    num_dummy_heads: int,
    done: dict[str, str],
    wanted: str | None,
) -> None:
    """Writes all shards into `folder` but those that are in `done`, {file: SHA-256}, and adds them to it.

    wanted: the `fingerprint` for DONE. Raises CheckpointError for weights that are not numbers, the first error of any
    shard; no other is begun then.
    """
    from tqdm import tqdm

    from nvlm_train.checkpoint import write_json

    files = {file_name(number, len(shards)): shard for number, shard in enumerate(shards, 1)}
    room, changing, stop = _Room(_AT_ONCE), threading.Lock(), threading.Event()

    def pieces(planned: Planned) -> Iterator[Tensor]:
        return _pieces(weights, planned.name, model, dtype, num_dummy_heads, room)

    def wrote(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        with changing:
            progress.update(size)

    def write(file: str) -> None:
        with (folder / file).open("wb") as stream:
            digest = write_safetensors(stream, files[file], dtype, pieces, wrote)
            stream.flush()
            os.fsync(stream.fileno())
        with changing:
            write_json(folder / DONE, {"fingerprint": wanted, "shards": {**done, file: digest}})
            done[file] = digest

    total = sum(planned.bytes for shard in shards for planned in shard)
    before = sum(planned.bytes for file in done for planned in files[file])
    with (
        tqdm(total=total, initial=before, unit="B", unit_scale=True, desc="export", file=sys.stderr, leave=False)
        as progress,
        ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool,
    ):  # fmt: skip
        try:
            for future in as_completed([pool.submit(write, file) for file in files if file not in done]):
                future.result()
        except BaseException:
            stop.set()
            room.open()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Ends the other shards when one has failed."""


class _Room:
    """Memory that several threads share: who needs more than is left waits, until it is alone if need be."""

    def __init__(self, size: int) -> None:
        self._size: float = size
        self._used, self._changed = 0, threading.Condition()

    def open(self) -> None:
        """Lets everybody in, so that they can find that there is nothing more to do."""
        with self._changed:
            self._size = math.inf
            self._changed.notify_all()

    @contextmanager
    def taking(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _pieces(
    weights: Weights, name: str, model: Model, dtype: str, num_dummy_heads: int, room: _Room
) -> Iterator[Tensor]:
    """A tensor as it is published, flattened, in pieces."""
    import torch

    to: torch.dtype = getattr(torch, DTYPES[dtype][0])

    def converted(flat: Tensor) -> Iterator[Tensor]:
        for part in flat.split(_PIECE):
            part = part.to(to)
            if not all(math.isfinite(bound) for bound in torch.aminmax(part)):  # NaN comes through
                raise CheckpointError(
                    f"{name} in {weights.where(name)} holds NaN or infinite values; it is not exported"
                )
            yield part

    parts = _slices(weights, name)
    if key_map.padded_kind(name) and num_dummy_heads:  # of the tower's attention: small, and padded as a whole
        shape = tuple(weights.shape(name))
        with room.taking(3 * 4 * math.prod(shape)):
            whole = torch.cat([part.load() for part in parts]).view(shape)
            yield from converted(key_map.pad(name, whole, model.vision, num_dummy_heads).reshape(-1))
        return
    for part in parts:
        with room.taking(part.bytes):
            yield from converted(part.load())


def _slices(weights: Weights, name: str) -> Sequence[Slice]:
    from nvlm_train.checkpoint import Slice

    slices = getattr(weights, "slices", None)  # only of a checkpoint
    found: Sequence[Slice] = (
        slices(name) if slices is not None else [Slice(0, lambda: weights.read(name).detach().cpu().reshape(-1))]
    )
    return found


def write_safetensors(
    stream: BinaryIO,
    tensors: Sequence[Planned],
    dtype: str,
    pieces: Callable[[Planned], Iterable[Tensor]],
    wrote: Callable[[int], object],
) -> str:
    """Writes a safetensors file piece by piece and returns its SHA-256; the library's writer needs it all in memory.

    The format: u64 length of the header, the header in JSON (padded with spaces to 8 bytes) with each tensor's dtype,
    shape and byte range, then the tensors' little-endian bytes. Readers of transformers 4 insist on `format: pt`.
    pieces: the tensor, flattened, in the file's type. wrote: is told how many bytes each piece had.
    """
    import torch

    digest = hashlib.sha256()

    def write(data: Any) -> None:
        stream.write(data)
        digest.update(data)

    tensors = sorted(tensors, key=lambda planned: key_map.to_published(planned.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, size in tensors:
        entry = {"dtype": DTYPES[dtype][1], "shape": list(shape), "data_offsets": [offset, offset + size]}
        header[key_map.to_published(name)] = entry
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    write(len(encoded).to_bytes(8, "little"))
    write(encoded)
    for planned in tensors:
        size = 0
        for piece in pieces(planned):
            write(piece.contiguous().view(torch.uint8).numpy().data)
            size += piece.nbytes
            wrote(piece.nbytes)
            del piece  # a view keeps all of its slice in memory, also while the next one is loaded
        if size != planned.bytes:
            raise CheckpointError(f"{planned.name}: read {size:,} bytes of {planned.bytes:,}")
    return digest.hexdigest()


def index(shards: list[list[Planned]]) -> dict[str, Any]:
    """model.safetensors.index.json: the file of each tensor, and the bytes of all."""
    weight_map = {
        key_map.to_published(planned.name): file_name(number, len(shards))
        for number, shard in enumerate(shards, 1)
        for planned in shard
    }
    total = sum(planned.bytes for shard in shards for planned in shard)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
