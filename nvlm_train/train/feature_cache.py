"""Features of the frozen tower on disk, so that a tile seen before is read instead of computed. Off by default.

    PATH/<tower>/<ab>/<abcdef...>      one file a tile: 8 bytes of header and the features, [P, E]

A tile is known by a hash of its pixels, which holds everything that made them: image, tiling, decoding, augmentation.
<tower> is a hash of the tower's weights, sizes and types, so that another tower never answers. Files appear whole
(written beside, then renamed) and carry a checksum; one that is damaged counts as absent and is written anew. Any
number of ranks, nodes and runs may share a folder. Above the size limit each process removes what was used longest
ago; since every process counts only its own writes between two looks at the folder, the limit may be passed by
1/20 per process.

What is read is bit by bit what was computed, but in the company of other tiles: a matrix product may round by how many
rows it has, so a tile that comes again differs in its last bits from the same tile in a run without cache. Until a tile
comes again, losses are bit-equal; after that within rounding (measured on one CPU: 1e-7 of the largest feature in fp32,
0 in bf16, and 0 in the losses).

Nothing about the cache may end a run: what cannot be read is computed, and when writing fails it stops writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvlm_train.batch import Batch
from nvlm_train.log import get_logger
from nvlm_train.model.vision import IMAGE_MEAN, IMAGE_STD, InternVit, encode_tiles
from nvlm_train.recipe import schema

log = get_logger(__name__)

FORMAT = 1
_HEAD = struct.Struct("<4sI")  # magic, CRC-32 of the features
_MAGIC = b"NVF1"
_LOOK_SHARE = 20  # look at the folder again after writing this part of the limit
_KEEP_SHARE = 0.9  # of the limit, after removing


def tower_hash(tower: InternVit, dtype: torch.dtype) -> str:
    """32 hex digits over the weights, sizes and types that features depend on. Reads every weight: about a second a
    GiB."""
    digest = hashlib.blake2b(digest_size=16)
    facts = [FORMAT, tower.config.model_dump(exclude={"preset"}), str(dtype), IMAGE_MEAN, IMAGE_STD]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, parameter in sorted(tower.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_bytes(parameter.detach().cpu()))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


class FeatureCache:
    """Answers like `encode_tiles` for a batch that knows its tiles' hashes.

    hits, misses: tiles read and tiles computed so far.
    """

    def __init__(self, settings: schema.VisionFeatureCache, tower: InternVit, dtype: torch.dtype) -> None:
        self.hits = self.misses = 0
        self._dtype = dtype
        self._stored = torch.bfloat16 if settings.dtype == "bf16" else dtype
        patches = (tower.config.image_size // tower.config.patch_size) ** 2
        self._shape = (patches, tower.config.hidden_size)
        self._root = Path(settings.path)
        self._folder = self._root / f"{tower_hash(tower, dtype)}-{str(self._stored).removeprefix('torch.')}"
        self._limit = int(settings.max_gib * (1 << 30))
        self._writes = True
        self._size = self._room() if self._root.is_dir() else 0

    def encode(self, tower: InternVit, batch: Batch, tiles_per_chunk: int) -> Tensor:
        """Features of the batch's tiles, [T, P, E], read where they are known and computed (and kept) where not."""
        hashes = batch.tile_hashes
        if len(hashes) != len(batch.tiles):
            raise ValueError(f"{len(hashes)} tile hashes for {len(batch.tiles)} tiles; the loader makes one for each")
        features = torch.empty(len(hashes), *self._shape, dtype=self._dtype, device=batch.tiles.device)  # [T, P, E]
        absent: dict[bytes, list[int]] = {}
        for k, name in enumerate(hashes):
            if name in absent:
                absent[name].append(k)
                continue
            found = self._read(name)
            if found is None:
                absent[name] = [k]
            else:
                self.hits += 1
                features[k] = found.to(features.device)  # [P, E]
        if absent:
            self.misses += len(absent)
            first = torch.tensor([places[0] for places in absent.values()], device=batch.tiles.device)
            computed = encode_tiles(tower, batch.tiles[first], self._dtype, tiles_per_chunk=tiles_per_chunk)
            stored = computed.to(self._stored)  # [missing tiles, P, E]
            for (name, places), one in zip(absent.items(), stored, strict=True):
                features[places] = one.to(self._dtype)  # as every later reader will see it
                self._write(name, one.cpu())
        return features

    def summary(self) -> str:
        """A line for the log."""
        looked = self.hits + self.misses
        return f"vision_feature_cache: {self.hits} of {looked} tiles were read from {self._folder}"

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._folder / text[:2] / text

    def _read(self, name: bytes) -> Tensor | None:
        path = self._path(name)
        try:
            data = path.read_bytes()
            os.utime(path)  # used just now
        except OSError:
            return None
        body = np.frombuffer(data, dtype=np.uint8, offset=min(len(data), _HEAD.size)).copy()
        wanted = self._shape[0] * self._shape[1] * self._stored.itemsize
        if len(body) != wanted or _HEAD.unpack_from(data) != (_MAGIC, zlib.crc32(body)):
            log.warning("vision_feature_cache: %s is damaged; its tile is computed again", path)
            return None
        return torch.from_numpy(body).view(self._stored).reshape(self._shape)  # [P, E]

    def _write(self, name: bytes, features: Tensor) -> None:
        if not self._writes:
            return
        path = self._path(name)
        body = _bytes(features)
        temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(_HEAD.pack(_MAGIC, zlib.crc32(body)))
                file.write(body)
            os.replace(temporary, path)
        except OSError as error:
            self._writes = False
            with suppress(OSError):
                temporary.unlink()
            log.warning(
                "vision_feature_cache: cannot write to %s (%s); from now on it is only read", path.parent, error
            )
            return
        self._size += _HEAD.size + len(body)
        if self._size > self._limit:
            self._size = self._room()

    def _room(self) -> int:
        """Looks through the whole folder, of all towers, removes what was used longest ago if it is over the limit;
        bytes that this process believes are there, with a head start for what the others write meanwhile."""
        files: list[tuple[float, int, str]] = []
        for folder, _, names in os.walk(self._root):
            for name in names:
                try:
                    status = os.stat(os.path.join(folder, name))
                except OSError:
                    continue  # another process has removed it
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


def open_cache(recipe: schema.Recipe, tower: InternVit | None, dtype: torch.dtype) -> FeatureCache | None:
    """The recipe's cache, or None."""
    if recipe.vision_feature_cache is None or tower is None:
        return None
    return FeatureCache(recipe.vision_feature_cache, tower, dtype)
