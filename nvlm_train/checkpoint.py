"""Where a run keeps things on disk: saving, finding, loading and pruning checkpoints.

    RUN/recipe.json             what the run was started with
    RUN/base.json               frozen weights by name: which file and key they come from, with size and SHA-256
    RUN/metrics.jsonl           one line a logged step
    RUN/step_N/weights/         fp32 master and Adam moments of every trained parameter (torch.distributed.checkpoint)
    RUN/step_N/state.json       step, shapes, groups, data position, and a manifest with size and SHA-256 of each file
    RUN/step_N/COMMITTED        written last: a checkpoint without it does not exist

A save has two phases: all ranks write and fsync into a temporary folder; only after every rank has reported success
does rank 0 write the manifest, rename the folder and set the marker. A save that is interrupted anywhere leaves the
previous checkpoint untouched. Imports torch, never deepspeed, so that export and verify run on a laptop.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from nvlm_train.errors import CheckpointError

FORMAT = 1
STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
COMMITTED = "COMMITTED"

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------- small files


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it, and a power cut keeps it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON mapping that this package wrote. Raises CheckpointError when it is missing, damaged or newer."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is not a complete run directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(f"{path} has format {found!r}; this version of nvlm_train reads format {FORMAT}")
    return value


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------- finding checkpoints


def committed_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints in a run directory, ascending."""
    if not run.is_dir():
        return []
    return sorted(
        int(folder.name.removeprefix("step_"))
        for folder in run.iterdir()
        if folder.name.removeprefix("step_").isdigit() and (folder / COMMITTED).is_file()
    )


def find_step(path: str | Path) -> Path:
    """The checkpoint folder that RUN, RUN/step_N or RUN/best names; of a run the newest. Raises CheckpointError."""
    path = Path(path)
    if path.name == "best" and not path.is_dir():
        newest = find_step(path.parent)
        best = read_json(newest / "state.json").get("progress", {}).get("best_step")
        if best is None:
            raise CheckpointError(f"{path.parent} has no best checkpoint: no validation has run; name {newest}")
        path = path.parent / f"step_{best}"
    if path.name.startswith("step_"):
        if (path / COMMITTED).is_file():
            return path
        state = "was never completed" if path.is_dir() else "does not exist"
        others = ", ".join(f"step_{step}" for step in committed_steps(path.parent)) or "none"
        raise CheckpointError(f"checkpoint {path} {state}; complete checkpoints in {path.parent}: {others}")
    steps = committed_steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds no complete checkpoint (no step_N/{COMMITTED}); train the run first")
    return path / f"step_{steps[-1]}"


# --------------------------------------------------------------------------------------------------------------- saving


@contextmanager
def _together(gather: Callable[[Any], list[Any]], rank: int, what: str) -> Iterator[None]:
    """Runs a part of a save on every rank; when it failed on any of them it fails on all, with each one's cause."""
    causes: dict[int, str] = {}
    try:
        yield
    except CheckpointException as error:  # DCP's, a BaseException: it brings what failed on every rank
        causes = {number: _cause(failure[0]) for number, failure in error.failures.items()}
    except Exception as error:
        causes = {rank: _cause(error)}
    for found in gather(causes):
        causes |= found
    if causes:
        lines = "; ".join(f"rank {number}: {cause}" for number, cause in sorted(causes.items()))
        raise CheckpointError(f"{what} failed, the previous checkpoint is untouched: {lines}")


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()


def save(
    run: Path,
    step: int,
    slices: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, Iterable[int]],
    state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    control: dist.ProcessGroup | None,
    gather: Callable[[Any], list[Any]],
) -> Path:
    """Saves RUN/step_N; every rank calls it at the same step boundary.

    slices: {name: {"master" | "exp_avg" | "exp_avg_sq": f32[n]}}, this rank's part of each flattened parameter.
    shapes: full shape of each parameter. state: whatever else belongs into state.json.
    Raises CheckpointError on every rank when it failed on any; the checkpoint then does not exist.
    """
    final, temporary = run / f"step_{step}", run / f".saving_step_{step}"
    what = f"saving {final}"
    mesh = _mesh(world_size, control)  # talks to the other ranks, so nothing that can fail on one comes before
    try:
        with _together(gather, rank, what):
            if rank == 0:
                for leftover in (temporary, final):  # of a crash: never a complete checkpoint, see COMMITTED
                    if leftover.exists() and not (leftover / COMMITTED).exists():
                        shutil.rmtree(leftover)
                (temporary / "weights").mkdir(parents=True)
                _require_space(run, sum(torch.Size(shape).numel() for shape in shapes.values()) * 4 * len(STATE_KEYS))
        with _together(gather, rank, what):
            tensors = {
                f"{key}/{name}": _sharded(mesh, part, torch.Size(shapes[name]).numel())
                for name, parts in slices.items()
                for key, part in parts.items()
            }
        with _together(gather, rank, what):
            writer = FileSystemWriter(temporary / "weights", sync_files=True)
            with _quiet_dcp():
                dcp.save(tensors, storage_writer=writer, process_group=control, no_dist=world_size == 1)
            own = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in (temporary / "weights").glob(f"__{rank}_*")
            }
        manifest = {name: entry for part in gather(own) for name, entry in part.items()}
        with _together(gather, rank, what):
            if rank == 0:
                metadata = temporary / "weights" / ".metadata"
                manifest[".metadata"] = {"bytes": metadata.stat().st_size, "sha256": sha256(metadata)}
                content = {"format": FORMAT, "step": step, "world_size": world_size, **state}
                content["shapes"] = {name: list(shape) for name, shape in shapes.items()}
                content["files"] = dict(sorted(manifest.items()))
                write_json(temporary / "state.json", content)
                _sync_folder(temporary / "weights")
                os.replace(temporary, final)
                _sync_folder(run)
                (final / COMMITTED).touch()
                _sync_folder(final)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _require_space(folder: Path, needed: int) -> None:
    """Raises OSError before a byte is written when the file system has no room for what is to come."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs {needed / 2**30:.2f} GiB, {folder} has {free / 2**30:.2f} GiB free; make room or "
            "lower checkpoint.keep_last",
        )


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _mesh(world_size: int, control: dist.ProcessGroup | None) -> DeviceMesh | None:
    return None if world_size == 1 or control is None else DeviceMesh.from_group(control, "cpu")


def _sharded(mesh: DeviceMesh | None, part: Tensor, numel: int) -> Tensor:
    if mesh is None:
        return part
    return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size([numel]), stride=(1,))


def clear_leftovers(run: Path) -> None:
    """Removes what a crash left of a save or of a removal; complete checkpoints are never touched."""
    for folder in [*run.glob(".saving_step_*"), *run.glob("step_*")]:
        if folder.is_dir() and not (folder / COMMITTED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, keep_last: int, keep: Iterable[int] = ()) -> list[int]:
    """Removes the oldest checkpoints; the newest `keep_last` and those in `keep` stay. Returns the removed steps."""
    steps = committed_steps(run)
    removed = [step for step in steps[: max(0, len(steps) - keep_last)] if step not in set(keep)]
    for step in removed:
        folder = run / f"step_{step}"
        (folder / COMMITTED).unlink()  # first, so that a half-removed checkpoint is none
        shutil.rmtree(folder, ignore_errors=True)
    return removed


# -------------------------------------------------------------------------------------------------------------- loading

_SAFE_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"), ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"),
} | {("torch", name) for name in ("float32", "bfloat16", "float16")}  # fmt: skip


class _DataOnlyUnpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`, which is a pickle, without letting it name anything but DCP's own plain classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE_CLASSES:
            raise CheckpointError(f"checkpoint metadata asks for {module}.{name}, which no checkpoint of ours holds")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """DCP's reader with the safe unpickler; reads the metadata once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            content = (Path(self.path) / ".metadata").read_bytes()
            self._metadata = _DataOnlyUnpickler(io.BytesIO(content)).load()
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()
        return self._metadata


class _SlicePlanner(LoadPlanner):
    """Asks DCP for any range of a flattened tensor, which its own planner cannot express without a process group."""

    def __init__(self, wanted: Mapping[str, tuple[int, Tensor]]) -> None:
        self.wanted = wanted
        self.metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, (begin, out) in self.wanted.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            part = ChunkStorageMetadata(offsets=torch.Size([begin]), sizes=torch.Size([out.numel()]))
            items += create_read_items_for_chunk_list(key, stored, [part])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"checkpoint entry {read_item.dest_index.fqn} is not a tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        out = self.wanted[read_item.dest_index.fqn][1]
        return out.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


class Checkpoint:
    """One committed checkpoint, opened for reading. Verified against its manifest's sizes; checksums on request."""

    def __init__(self, path: str | Path) -> None:
        self.path = find_step(path)
        self.run = self.path.parent
        self.state = read_json(self.path / "state.json")
        self.step = int(self.state["step"])
        self.shapes = {name: torch.Size(shape) for name, shape in self.state["shapes"].items()}
        for name, entry in self.state["files"].items():
            file = self.path / "weights" / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                wrong = "is missing" if found is None else f"has {found:,} bytes"
                raise CheckpointError(
                    f"{file} {wrong}, its manifest says {entry['bytes']:,}: the checkpoint is damaged"
                )
        self._reader = _Reader(self.path / "weights")
        self._reader.read_metadata()

    def verify_checksums(self, part: int = 0, parts: int = 1) -> None:
        """Compares the files with the manifest's SHA-256, of several ranks each its part of them.

        Raises CheckpointError naming those that differ.
        """
        files = {name: self.state["files"][name] for name in list(self.state["files"])[part::parts]}
        with ThreadPoolExecutor(4) as pool:
            sums = pool.map(lambda name: sha256(self.path / "weights" / name), files)
            wrong = [name for name, found in zip(files, sums, strict=True) if found != files[name]["sha256"]]
        if wrong:
            raise CheckpointError(f"{self.path / 'weights'}: checksum differs from the manifest in {', '.join(wrong)}")

    def read_many(self, wanted: Mapping[tuple[str, str], tuple[int, int]]) -> dict[tuple[str, str], Tensor]:
        """{(name, key): (begin, end)} → {(name, key): f32[end - begin]}, ranges of the flattened parameters."""
        out = {pair: torch.empty(end - begin, dtype=torch.float32) for pair, (begin, end) in wanted.items()}
        ranges = {
            f"{key}/{name}": (wanted[name, key][0], tensor) for (name, key), tensor in out.items() if tensor.numel()
        }
        if ranges:
            tensors = {key: tensor for key, (_, tensor) in ranges.items()}
            try:
                with _quiet_dcp():
                    dcp.load(tensors, storage_reader=self._reader, planner=_SlicePlanner(ranges), no_dist=True)
            except CheckpointException as error:
                causes = "; ".join(_cause(failure[0]) for failure in error.failures.values())
                raise CheckpointError(f"{self.path / 'weights'} cannot be read: {causes}") from None
        return out

    def read_master(self, name: str) -> Tensor:
        """The fp32 master of one trained parameter in its full shape."""
        shape = self.shapes[name]
        return self.read_many({(name, "master"): (0, shape.numel())})[name, "master"].view(shape)


# --------------------------------------------------------------------------------------------- all weights of a run


def write_base(
    run: Path,
    frozen: Mapping[str, str],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> None:
    """Writes RUN/base.json: where each frozen weight comes from. On a later start: checks that it is still the same.

    frozen: {our name: "FILE:KEY"} for a tensor of a safetensors file, {our name: "RUN/step_N:NAME"} for a weight that
    an earlier run of ours trained. Every rank calls it and hashes its share of the files. Files may have moved; raises
    CheckpointError, on every rank, where their content differs.
    """
    path = run / "base.json"
    split = {name: where.rsplit(":", 1) for name, where in frozen.items()}
    # absolute, but links stay: in a hub's cache the link is called model.safetensors, the file a bare hash
    places = {name: (os.path.abspath(place), key) for name, (place, key) in split.items()}
    files = sorted({place for place, _ in places.values()})
    with _together(gather, rank, f"hashing the frozen weights of {run}"):
        before = read_json(path) if path.exists() else None
        known = before["files"] if before is not None else {}
        with ThreadPoolExecutor(4) as pool:
            own = files[rank::world_size]
            mine = dict(zip(own, pool.map(lambda file: _identity(file, known.get(file)), own), strict=True))
    entries = {file: entry for part in gather(mine) for file, entry in part.items()}
    tensors = {name: {"file": place, "key": key} for name, (place, key) in sorted(places.items())}
    if before is not None:
        _require_same_base(run, before, entries, tensors)
    with _together(gather, rank, f"writing {path}"):
        if rank == 0:
            write_json(path, {"format": FORMAT, "files": entries, "tensors": tensors})


def _require_same_base(
    run: Path, before: Mapping[str, Any], files: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    def origins(files: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        return {name: (files[entry["file"]]["sha256"], entry["key"]) for name, entry in tensors.items()}

    old, new = origins(before["files"], before["tensors"]), origins(files, tensors)
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        now = tensors.get(changed[0], {}).get("file", "nothing")
        then = before["tensors"].get(changed[0], {}).get("file", "nothing")
        raise CheckpointError(
            f"{len(changed)} frozen weights are not those that {run} was started with, the first {changed[0]}: now "
            f"from {now}, then from {then}; name the same weights in init_from, or start a new run"
        )


def _identity(place: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, time and SHA-256 of a safetensors file; of a checkpoint those of its state.json, which holds all sums."""
    file = _identity_file(place)
    found = file.stat()
    if known is not None and (known["bytes"], known["mtime_ns"]) == (found.st_size, found.st_mtime_ns):
        return dict(known)  # 150 GB need not be read again at every start
    kind = "run" if Path(place).is_dir() else "file"
    return {"kind": kind, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": sha256(file)}


def _identity_file(place: str) -> Path:
    return Path(place) / "state.json" if Path(place).is_dir() else Path(place)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`weight + scale * b @ a` in fp32: a linear layer's weight, or rows of it, with its LoRA adapter in it."""
    return weight.float() + scale * (b.float() @ a.float())


class CheckpointWeights:
    """Every weight of the model a checkpoint stands for: trained ones from it, frozen ones from where base.json says.

    The same protocol as `model.pretrained.Weights`: names, shape, dtype, read, where. A weight with a LoRA adapter is
    given with the adapter in it, merged in fp32 when it is read.

    trained: names of the weights that this run changed, merged ones included.
    adapters: {name of a merged weight: (name of A, name of B, alpha / rank)}; `without_adapters` gives both apart.
    """

    def __init__(self, path: str | Path, *, checksums: bool = False) -> None:
        self.checkpoint = Checkpoint(path)
        if checksums:
            self.checkpoint.verify_checksums()
        self.step, self.state, self.path = self.checkpoint.step, self.checkpoint.state, self.checkpoint.path
        content = read_json(self.checkpoint.run / "recipe.json")
        self.recipe: dict[str, Any] = content["recipe"]
        self.earlier_run: dict[str, Any] | None = content.get("earlier_run")
        base = read_json(self.checkpoint.run / "base.json")
        shapes = self.checkpoint.shapes
        self.adapters: dict[str, tuple[str, str, float]] = {}
        for a in (name for name in shapes if ".lora_A." in name):
            scale = float(self.state["lora"][a.split(".", 1)[0]])
            self.adapters[a.split(".lora_A.")[0] + ".weight"] = (a, a.replace(".lora_A.", ".lora_B."), scale)
        parts = {part for a, b, _ in self.adapters.values() for part in (a, b)}
        self._own = {name: shape for name, shape in shapes.items() if name not in parts}
        self.trained = {*self._own, *self.adapters}
        self._frozen: dict[str, dict[str, str]] = base["tensors"]
        self._runs = {place for place, entry in base["files"].items() if entry["kind"] == "run"}
        self._earlier: dict[str, CheckpointWeights] = {}
        self._open: dict[str, Any] = {}
        wrong = []
        for file, entry in base["files"].items():
            path_ = _identity_file(file)
            if not path_.is_file():
                wrong.append(f"{file} is missing")
            elif path_.stat().st_size != entry["bytes"]:
                wrong.append(f"{file} has {path_.stat().st_size:,} bytes, was {entry['bytes']:,} when the run started")
            elif checksums and sha256(path_) != entry["sha256"]:
                wrong.append(f"{file} has changed since the run started (SHA-256 differs)")
        if wrong:
            raise CheckpointError("frozen weights of this run cannot be used:\n  " + "\n  ".join(wrong))

    def names(self) -> list[str]:
        return [*self._own, *self._frozen]

    def shape(self, name: str) -> torch.Size:
        if name in self._own:
            return self._own[name]
        earlier, entry = self._frozen_place(name)
        return earlier.shape(entry["key"]) if earlier else torch.Size(self._slice(entry).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        if name in self.trained:  # masters, and what is merged
            return torch.float32
        earlier, entry = self._frozen_place(name)
        return earlier.dtype(entry["key"]) if earlier else self._file(entry["file"]).get_slice(entry["key"])[0:0].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype in which it is stored; in fp32 where an adapter is merged into it."""
        if name in self.adapters:
            a, b, scale = self.adapters[name]
            read = self.checkpoint.read_master
            return merged(self._read_frozen(name), read(a), read(b), scale)
        return self.checkpoint.read_master(name) if name in self._own else self._read_frozen(name)

    def _read_frozen(self, name: str) -> Tensor:
        earlier, entry = self._frozen_place(name)
        return earlier.read(entry["key"]) if earlier else self._file(entry["file"]).get_tensor(entry["key"])

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin to end of the flattened tensor; of a trained one only they are read."""
        if name in self._own:
            end = min(end, self._own[name].numel())
            return self.checkpoint.read_many({(name, "master"): (min(begin, end), end)})[name, "master"]
        if name in self.adapters:
            return self._read_merged_slice(name, begin, end)
        return self._read_frozen_slice(name, begin, end)

    def _read_frozen_slice(self, name: str, begin: int, end: int) -> Tensor:
        earlier, entry = self._frozen_place(name)
        return earlier.read_slice(entry["key"], begin, end) if earlier else self._read_frozen(name).flatten()[begin:end]

    def _read_merged_slice(self, name: str, begin: int, end: int) -> Tensor:
        """The rows that hold the slice are merged, no others."""
        rows, width = self.shape(name)
        begin, end = min(begin, rows * width), min(end, rows * width)
        first, last = begin // width, -(-end // width)
        a, b, scale = self.adapters[name]
        rank = self.checkpoint.shapes[a][0]
        base = self._read_frozen_slice(name, first * width, last * width).view(-1, width)
        part = self.checkpoint.read_many({(b, "master"): (first * rank, last * rank)})[b, "master"].view(-1, rank)
        return merged(base, self.checkpoint.read_master(a), part, scale).flatten()[
            begin - first * width : end - first * width
        ]

    def without_adapters(self) -> WithoutAdapters:
        """The same weights with adapters and what lies beneath them apart."""
        return WithoutAdapters(self)

    def where(self, name: str) -> str:
        """Where a weight lives, in the form that `write_base` takes."""
        if name in self.trained:
            return f"{os.path.abspath(self.path)}:{name}"
        return self._where_frozen(name)

    def _where_frozen(self, name: str) -> str:
        entry = self._frozen[name]
        return f"{entry['file']}:{entry['key']}"

    def _frozen_place(self, name: str) -> tuple[CheckpointWeights | None, dict[str, str]]:
        try:
            entry = self._frozen[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no weight named {name}") from None
        if entry["file"] not in self._runs:
            return None, entry
        if entry["file"] not in self._earlier:
            self._earlier[entry["file"]] = CheckpointWeights(entry["file"])
        return self._earlier[entry["file"]], entry

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def _slice(self, entry: dict[str, str]) -> Any:
        return self._file(entry["file"]).get_slice(entry["key"])


class WithoutAdapters:
    """The weights of a checkpoint with its LoRA adapters apart: what is beneath one is given as it was frozen."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._all, self._own = weights, weights.checkpoint

    def names(self) -> list[str]:
        return [*self._own.shapes, *self._all._frozen]

    def shape(self, name: str) -> torch.Size:
        return self._own.shapes[name] if name in self._own.shapes else self._all.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._own.shapes else self.read(name).dtype

    def read(self, name: str) -> Tensor:
        return self._own.read_master(name) if name in self._own.shapes else self._all._read_frozen(name)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        if name in self._own.shapes:
            end = min(end, self._own.shapes[name].numel())
            return self._own.read_many({(name, "master"): (min(begin, end), end)})[name, "master"]
        return self._all._read_frozen_slice(name, begin, end)

    def where(self, name: str) -> str:
        if name in self._own.shapes:
            return f"{os.path.abspath(self._all.path)}:{name}"
        return self._all._where_frozen(name)


def open_checkpoint(path: str | Path, *, checksums: bool = False) -> CheckpointWeights:
    """All weights of the model behind RUN or RUN/step_N, with `.recipe`, `.step`, `.state` and `.trained`."""
    return CheckpointWeights(path, checksums=checksums)
