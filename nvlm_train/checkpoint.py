"""Where a run keeps things on disk: saving, finding, loading and pruning checkpoints.

    RUN/recipe.json             what the run was started with
    RUN/base.json               frozen weights by name: which file and key they come from, with size and SHA-256
    RUN/metrics.jsonl           one line a logged step
    RUN/step_N/weights/         fp32 master and Adam moments of every trained parameter (torch.distributed.checkpoint)
    RUN/step_N/state.json       step, shapes, groups, data position, and a manifest with size and SHA-256 of each file
    RUN/step_N/COMMITTED        written last, the SHA-256 of state.json: a checkpoint without it does not exist
    RUN/weights_N/              the same with bf16 weights alone: exportable, not resumable
    RUN/base/                   copies of the frozen weights, with `checkpoint.base: copy`
    RUN/set_aside/              what going back to a step or a crash has left: nothing here is read again

A save has two phases: all ranks write and fsync into a temporary folder; only after every rank has reported size and
checksum does rank 0 write the manifest, rename the folder and set the marker. A save that is interrupted anywhere
leaves the previous checkpoint untouched. Files are written by a thread, so that training can go on meanwhile. The
format is torch.distributed.checkpoint's. Imports torch, never deepspeed, so that export and verify run on a laptop.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import mmap
import os
import pickle
import platform
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nvlm_train.errors import CheckpointError, PeerError

FORMAT = 1
STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
Part = tuple[int, list[tuple[int, int]]]  # of a stored tensor: what the ranges [begin, end) of one dimension hold
COMMITTED = "COMMITTED"
_MARKER_TO_BE = "COMMITTED.tmp"

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


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint, compared with the SHA-256 in its marker (empty in the first version's).

    Raises CheckpointError where it is missing, damaged, newer, or not what was saved.
    """
    file = checkpoint / "state.json"
    if not file.exists():
        raise CheckpointError(f"{file} is missing: the checkpoint is damaged")
    content = read_json(file)
    expected = (checkpoint / COMMITTED).read_text(encoding="ascii", errors="replace").strip()
    if expected and sha256(file) != expected:
        raise CheckpointError(
            f"{file} is not what was saved (its SHA-256 differs from the one in {COMMITTED}): the checkpoint is damaged"
        )
    return content


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


def sha256_of(files: Sequence[Path], desc: str | None = None) -> list[str]:
    """SHA-256 of several files at once, in their order. desc: for a progress bar; None: without."""
    from tqdm import tqdm

    sizes = [file.stat().st_size for file in files]
    with (
        ThreadPoolExecutor(4) as pool,
        tqdm(total=sum(sizes), desc=desc, disable=desc is None, unit="B", unit_scale=True, file=sys.stderr,
             leave=False, delay=2) as progress,
    ):  # fmt: skip
        found = []
        for digest, size in zip(pool.map(sha256, files), sizes, strict=True):
            found.append(digest)
            progress.update(size)
        return found


# ------------------------------------------------------------------------------------------------- finding checkpoints


_NAME = r"(step|weights)_\d+"  # of a checkpoint's folder


def committed_steps(run: Path, kind: str = "step") -> list[int]:
    """Steps of the complete checkpoints in a run directory, ascending; with kind "weights" those of its milestones."""
    if not run.is_dir():
        return []
    names = [folder.name for folder in run.iterdir() if (folder / COMMITTED).is_file()]
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"{kind}_(\d+)", name)))


def is_run(path: Path) -> bool:
    """Whether a path is a run directory with a complete checkpoint, one of its checkpoints, or its RUN/best."""
    if path.name == "best" and not path.is_dir():
        return bool(committed_steps(path.parent))
    one = re.fullmatch(_NAME, path.name) is not None and (path / COMMITTED).is_file()
    return one or bool(committed_steps(path))


def recorded_revisions(run: Path) -> dict[str, str]:
    """The Hub's revisions that a run was started with, as `hub.pin` returned them; nothing where there is no run."""
    path = run / "recipe.json"
    found: dict[str, str] = read_json(path).get("revisions", {}) if path.exists() else {}
    return found


def find_step(path: str | Path) -> Path:
    """The checkpoint folder that RUN, RUN/step_N, RUN/weights_N or RUN/best names; of a run the newest step.

    Raises CheckpointError.
    """
    path = Path(path)
    if path.name == "best" and not path.is_dir():
        newest = find_step(path.parent)
        best = read_state(newest).get("progress", {}).get("best_step")
        if best is None:
            raise CheckpointError(f"{path.parent} has no best checkpoint: no validation has run; name {newest}")
        path = path.parent / f"step_{best}"
    if re.fullmatch(_NAME, path.name):
        if (path / COMMITTED).is_file():
            return path
        state = "was never completed" if path.is_dir() else "does not exist"
        others = ", ".join(f"{kind}_{step}" for kind in KINDS for step in committed_steps(path.parent, kind)) or "none"
        raise CheckpointError(f"checkpoint {path} {state}; complete checkpoints in {path.parent}: {others}")
    if not path.is_dir():
        state = "is a file, no run" if path.exists() else "does not exist, so it holds no complete checkpoint"
        raise CheckpointError(f"{path} {state}; right would be the folder of a run (output_dir of its recipe)")
    steps = committed_steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds no complete checkpoint (no step_N/{COMMITTED}); train the run first")
    return path / f"step_{steps[-1]}"


# --------------------------------------------------------------------------------------------------------------- saving

# what a folder of a save holds: `step_N` goes on, `weights_N` is a milestone to export or to start a new run from
KINDS: dict[str, tuple[tuple[str, ...], torch.dtype]] = {
    "step": (STATE_KEYS, torch.float32),
    "weights": (("master",), torch.bfloat16),
}


def bytes_per_parameter(kind: str) -> int:
    """Bytes that a save of this kind takes for each trained parameter, over all ranks: 12 or 2."""
    keys, dtype = KINDS[kind]
    return len(keys) * dtype.itemsize


@contextmanager
def _together(gather: Callable[[Any], list[Any]], rank: int, what: str) -> Iterator[None]:
    """Runs a part of a save on every rank; when it failed on any of them it fails on all, with each one's cause."""
    cause = None
    try:
        yield
    except Exception as error:
        cause = _cause(error)
    _require_success(gather(cause), what)


def _require_success(causes: list[str | None], what: str) -> None:
    failed = [f"rank {rank}: {cause}" for rank, cause in enumerate(causes) if cause is not None]
    if failed:
        raise CheckpointError(f"{what} failed, the previous checkpoint is untouched: {'; '.join(failed)}")


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()


class Save:
    """One save on its way to disk, as this rank sees it. Every rank makes one at the same step boundary.

    Files are touched by a thread, ranks talk in the thread that calls these methods: `begin` starts writing this
    rank's slices; when all ranks are `ready` each calls `advance`, which exchanges size and checksum and lets rank 0
    write the manifest, rename the folder and set the marker; when all are `ready` again the next `advance` returns
    True: the checkpoint exists. `wait` does all of it at once. Every method but `ready` is called by all ranks
    together, and what fails on one raises the same CheckpointError on all; nothing of the save is left then.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        shapes: Mapping[str, Iterable[int]],
        state: Mapping[str, Any],
        *,
        rank: int,
        world_size: int,
        gather: Callable[[Any], list[Any]],
        kinds: Sequence[str] = ("step",),
        committed: Callable[[], object] = lambda: None,
    ) -> None:
        """Makes the folders after looking for space. shapes: full shape of each parameter. state: whatever else belongs
        into state.json. kinds: of `KINDS`. committed: called in rank 0's thread once the marker is set (pruning).
        """
        self.run, self.step, self.kinds = run, step, tuple(kinds)
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.paths = [run / f"{kind}_{step}" for kind in kinds]
        self.bytes = 0  # of all ranks' weights, once they are written
        self.began = time.monotonic()
        self._state = json.loads(json.dumps({**state, "step": step, "world_size": world_size}))  # as it is now
        self._rank, self._world_size, self._gather, self._committed = rank, world_size, gather, committed
        self._what = f"saving {' and '.join(str(path) for path in self.paths)}"
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._abandoned = threading.Event()
        self._reports: dict[str, _Report] | None = None
        with self._undone_on_error(), _together(gather, rank, self._what):
            if rank == 0:
                self._prepare()

    def begin(self, slices: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Starts writing. slices: {name: {STATE_KEYS: f32[n]}}, this rank's part of each flattened parameter, in memory
        that nobody changes until all ranks are ready."""
        self._reports = {}
        self._start(self._write, slices)

    def ready(self) -> bool:
        """Whether this rank's files are written, or it has none to write just now."""
        return self._thread is None or not self._thread.is_alive()

    def advance(self) -> bool:
        """Goes on once every rank is ready; True when the checkpoint is committed."""
        with self._undone_on_error():
            found = self._gather((self._error, self._reports))
            _require_success([error for error, _ in found], self._what)
            if self._reports is None:
                return True
            self._reports = None
            reports = [report for _, report in found]
            self.bytes = sum(part.bytes for report in reports for part in report.values())
            if self._rank == 0:
                self._start(self._commit, reports)
        return False

    def wait(self, limit_s: float = math.inf, alive: Callable[[], object] = lambda: None) -> None:
        """Goes on to the end. alive: called whenever the ranks have heard of each other."""
        pause = 0.001
        while True:
            found = self._gather((self.ready(), self.late(limit_s)))
            alive()
            if all(ready for ready, _ in found):
                pause = 0.001
                if self.advance():
                    return
            elif found[0][1]:  # by rank 0's clock
                self.raise_late(limit_s)
            if self._thread is None:
                time.sleep(pause)
            else:
                self._thread.join(pause)
            pause = min(2 * pause, 0.25)

    def late(self, limit_s: float) -> bool:
        """Whether this save has taken longer than it may."""
        return time.monotonic() - self.began > limit_s

    def raise_late(self, limit_s: float) -> None:
        """Raises PeerError on every rank, naming those that have not finished."""
        waiting = self._gather(None if self.ready() else platform.node())
        ranks = ", ".join(f"rank {rank} on {host}" for rank, host in enumerate(waiting) if host is not None)
        self._abandoned.set()
        raise PeerError(
            f"{self._what}: {ranks or 'every rank'} did not finish within checkpoint.timeout_s {limit_s:g}; the "
            f"previous checkpoint is untouched. Look at the file system there, or raise checkpoint.timeout_s"
        )

    def abandon(self) -> None:
        """Lets go of a save that will never be committed, because the run ends with an error."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(5)

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if self._rank == 0:
                for path in self.paths:
                    shutil.rmtree(_temporary(path), ignore_errors=True)
            raise

    def _start(self, work: Callable[[Any], None], argument: Any) -> None:
        def run() -> None:
            try:
                work(argument)
            except Exception as error:
                self._error = _cause(error)

        # a daemon: a file system that never answers must not keep the process from ending
        self._thread = threading.Thread(target=run, name=f"saving step {self.step}", daemon=True)
        self._thread.start()

    def _prepare(self) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        set_leftovers_aside(self.run)
        parameters = sum(shape.numel() for shape in self.shapes.values())
        _require_space(self.run, parameters * sum(map(bytes_per_parameter, self.kinds)))
        for path in self.paths:
            (_temporary(path) / "weights").mkdir(parents=True)

    def _write(self, slices: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert self._reports is not None
        for kind, path in zip(self.kinds, self.paths, strict=True):
            keys, dtype = KINDS[kind]
            parts = (slices[name][key] for name in self.shapes for key in keys)
            file = _temporary(path) / "weights" / _file_name(self._rank)
            self._reports[kind] = _write_parts(file, parts, dtype, self._abandoned)

    def _commit(self, reports: Sequence[Mapping[str, _Report]]) -> None:
        for kind, path in zip(self.kinds, self.paths, strict=True):
            files = {_file_name(rank): report[kind] for rank, report in enumerate(reports)}
            _commit(path, self._state, self.shapes, kind, files)
        self._committed()


class _Report(NamedTuple):
    """What a rank tells of its file: enough for rank 0 to write torch's metadata without having seen a tensor."""

    bytes: int
    sha256: str
    parts: list[tuple[int, int]]  # elements and stored bytes of each parameter and key, in the order of the shapes


class _HashedFile:
    """What torch.save writes into: a file and, on the way, its size and SHA-256."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.stream.write(data)
        self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self.stream.flush()


def _write_parts(file: Path, parts: Iterable[Tensor], dtype: torch.dtype, abandoned: threading.Event) -> _Report:
    """Writes this rank's slices one behind the other, each as torch.save does, and fsyncs. Empty ones are left out."""
    found = []
    with file.open("wb") as stream:
        hashed = _HashedFile(stream)
        for part in parts:
            if abandoned.is_set():
                raise CheckpointError("abandoned")
            begin = hashed.bytes
            if part.numel():
                # a copy of its own: torch.save would write the whole buffer that a slice is cut from
                torch.save(part.detach().to(dtype, copy=True), hashed)  # type: ignore[arg-type]
            found.append((part.numel(), hashed.bytes - begin))
        stream.flush()
        os.fsync(stream.fileno())
    return _Report(hashed.bytes, hashed.digest.hexdigest(), found)


def _commit(
    path: Path, state: Mapping[str, Any], shapes: Mapping[str, torch.Size], kind: str, files: Mapping[str, _Report]
) -> None:
    """Makes a checkpoint of what all ranks have written: torch's metadata, manifest, rename, marker."""
    temporary = _temporary(path)
    keys, dtype = KINDS[kind]
    content = pickle.dumps(_metadata(shapes, keys, dtype, files))
    with (temporary / "weights" / ".metadata").open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    manifest = {name: {"bytes": report.bytes, "sha256": report.sha256} for name, report in files.items()}
    manifest[".metadata"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    whole: dict[str, Any] = {"format": FORMAT, "kind": kind, **state}
    whole["shapes"] = {name: list(shape) for name, shape in shapes.items()}
    whole["files"] = dict(sorted(manifest.items()))
    _sync_folder(temporary / "weights")
    write_json(temporary / "state.json", whole)
    with (temporary / _MARKER_TO_BE).open("w", encoding="ascii") as text:  # here, so that a full disk shows before
        text.write(sha256(temporary / "state.json"))
        text.flush()
        os.fsync(text.fileno())
    _sync_folder(temporary)
    _remove(path)  # a milestone that an earlier attempt has written after its last checkpoint
    os.replace(temporary, path)
    _sync_folder(path.parent)
    os.replace(path / _MARKER_TO_BE, path / COMMITTED)
    _sync_folder(path)


def _metadata(
    shapes: Mapping[str, torch.Size], keys: Sequence[str], dtype: torch.dtype, files: Mapping[str, _Report]
) -> Metadata:
    """torch's description of the flattened tensors "KEY/NAME": where the slices of each begin, in the tensor and in the
    ranks' files. Raises CheckpointError when the ranks' slices do not make up a tensor."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    places = dict.fromkeys(files, 0)
    for number, (name, key) in enumerate((name, key) for name in shapes for key in keys):
        chunks: list[ChunkStorageMetadata] = []
        begin = 0
        for file, report in files.items():
            elements, size = report.parts[number]
            if elements:
                offset = torch.Size([begin])
                storage[MetadataIndex(f"{key}/{name}", offset, len(chunks))] = _StorageInfo(file, places[file], size)
                chunks.append(ChunkStorageMetadata(offset, torch.Size([elements])))
            begin, places[file] = begin + elements, places[file] + size
        if begin != shapes[name].numel():
            raise CheckpointError(f"the ranks hold {begin} elements of {name}, its shape is {list(shapes[name])}")
        tensors[f"{key}/{name}"] = TensorStorageMetadata(TensorProperties(dtype), torch.Size([begin]), chunks)
    return Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION)


def _file_name(rank: int) -> str:
    return f"__{rank}_0.distcp"


def _temporary(path: Path) -> Path:
    return path.with_name(f".saving_{path.name}")


def save(
    run: Path,
    step: int,
    slices: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, Iterable[int]],
    state: Mapping[str, Any],
    **more: Any,
) -> Path:
    """Saves RUN/step_N and waits until it is there. See `Save`, which is given the rest."""
    saving = Save(run, step, shapes, state, **more)
    saving.begin(slices)
    saving.wait()
    return saving.paths[0]


def _require_space(run: Path, needed: int) -> None:
    """Raises OSError before a byte is written when the file system has no room for what is to come.

    What a crash has left makes room first: it can never be loaded, and must not keep the run from going on.
    """
    free = shutil.disk_usage(run).free
    if free < needed:
        _remove_set_aside(run, f"the next checkpoint needs its room, {free / 1e6:,.1f} MB are free")
        free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the checkpoint needs {needed / 1e6:,.1f} MB, {run} has {free / 1e6:,.1f} MB free; make room or "
            "lower checkpoint.keep_last",
        )


# ------------------------------------------------------------------------------------- leftovers of a crash, pruning


def set_leftovers_aside(run: Path) -> None:
    """Moves what a crash left of a save to RUN/set_aside/incomplete/; complete checkpoints are never touched.

    Only the newest crash's leftovers are kept, as long as there is room: they can be as large as a checkpoint.
    """
    for folder in run.glob(".removing_*"):  # complete checkpoints once, given up on purpose
        shutil.rmtree(folder, ignore_errors=True)
    found = [folder for folder in run.iterdir() if re.fullmatch(r"(\.saving_)?" + _NAME, folder.name)]
    found = [folder for folder in found if folder.is_dir() and not (folder / COMMITTED).exists()]
    if not found:
        return
    _remove_set_aside(run, "a later crash has left more")
    aside = run / "set_aside" / "incomplete"
    aside.mkdir(parents=True, exist_ok=True)
    for folder in found:
        os.replace(folder, aside / folder.name.removeprefix("."))
    log.warning("set aside in %s what a crash left: %s", aside, ", ".join(folder.name for folder in found))


def _remove_set_aside(run: Path, why: str) -> None:
    folder = run / "set_aside" / "incomplete"
    if folder.is_dir():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        names = ", ".join(sorted(entry.name for entry in folder.iterdir()))
        log.warning("removing %s (%s, %.2f GiB, never complete): %s", folder, names, size / 2**30, why)
        shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, keep_last: int, keep: Iterable[int] = (), keep_every_steps: int | None = None) -> list[int]:
    """Removes old checkpoints; the newest `keep_last`, those in `keep` and every multiple of `keep_every_steps` stay.

    Milestones of weights stay too. Returns the removed steps.
    """
    steps = committed_steps(run)
    kept = {*steps[-keep_last:], *keep}
    removed = [step for step in steps if step not in kept and (keep_every_steps is None or step % keep_every_steps)]
    for step in removed:
        _remove(run / f"step_{step}")
    return removed


def _remove(path: Path) -> None:
    """Removes a checkpoint, as far as readers can see in one step."""
    if path.exists():
        gone = path.with_name(f".removing_{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


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


class Slice(NamedTuple):
    """A piece of a flattened tensor that can be had alone. bytes: of memory that it takes; 0 where a file is mapped."""

    bytes: int
    load: Callable[[], Tensor]


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

    def slices(self, key: str) -> list[Slice]:
        """What the ranks wrote of the flattened tensor "KEY/NAME", in order."""
        metadata = self.read_metadata()
        stored = metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata) and metadata.storage_data is not None
        found, end = [], 0
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
            if chunk.offsets[0] != end:
                break
            end += chunk.sizes[0]
            place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            found.append(Slice(0, partial(self._map, place, stored.properties.dtype, chunk.sizes[0])))
        if end != stored.size[0]:
            raise CheckpointError(f"{self.path}: the slices of {key} leave a gap at element {end} of {stored.size[0]}")
        return found

    def _map(self, place: _StorageInfo, dtype: torch.dtype, count: int) -> Tensor:
        """A stored slice, [count], mapped from its file: torch.save puts the plain numbers into one record."""
        file = Path(self.path) / place.relative_path
        try:
            with file.open("rb") as stream:
                archive: Any = torch._C.PyTorchFileReader(self._slice_file(stream, place))
                if archive.get_record_size("data/0") != count * dtype.itemsize:
                    raise ValueError(f"it holds other than {count:,} values of {dtype}")
                begin = place.offset + archive.get_record_offset("data/0")
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read at byte {place.offset:,}: {_cause(error)}") from None


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


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
        self.state = read_state(self.path)
        self.step = int(self.state["step"])
        self.kind: str = self.state.get("kind", "step")  # runs of the first version hold nothing else
        self.dtype = KINDS[self.kind][1]
        self.shapes = {name: torch.Size(shape) for name, shape in self.state["shapes"].items()}
        for name, entry in self.state["files"].items():
            file = self.path / "weights" / name
            found = file.stat().st_size if file.is_file() else None
            if found != entry["bytes"]:
                wrong = "is missing" if found is None else f"has {found:,} bytes"
                raise CheckpointError(
                    f"{file} {wrong}, its manifest says {entry['bytes']:,} bytes: the checkpoint is damaged; "
                    + self._others()
                )
        self._reader = _Reader(self.path / "weights")
        self._reader.read_metadata()

    def verify_checksums(self, part: int = 0, parts: int = 1, desc: str | None = None) -> None:
        """Compares the files with the manifest's SHA-256, of several ranks each its part of them.

        desc: for a progress bar. Raises CheckpointError naming the files that differ.
        """
        files = {name: self.state["files"][name] for name in list(self.state["files"])[part::parts]}
        sums = sha256_of([self.path / "weights" / name for name in files], desc)
        wrong = [name for name, found in zip(files, sums, strict=True) if found != files[name]["sha256"]]
        if wrong:
            raise CheckpointError(
                f"{self.path / 'weights'}: checksum differs from the manifest in {', '.join(wrong)}: "
                f"the checkpoint is damaged; {self._others()}"
            )

    def _others(self) -> str:
        """What is left to use where this checkpoint is damaged."""
        names = [f"{kind}_{step}" for kind in KINDS for step in committed_steps(self.run, kind)]
        others = [name for name in names if name != self.path.name]
        return f"other complete checkpoints in {self.run}: {', '.join(others) or 'none'}"

    def read_many(self, wanted: Mapping[tuple[str, str], tuple[int, int]]) -> dict[tuple[str, str], Tensor]:
        """{(name, key): (begin, end)} → {(name, key): [end - begin]}, ranges of the flattened parameters.

        Of a milestone bf16 and "master" alone, else f32.
        """
        out = {pair: torch.empty(end - begin, dtype=self.dtype) for pair, (begin, end) in wanted.items()}
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
        """One trained parameter in its full shape: the fp32 master, of a milestone its bf16 rounding."""
        shape = self.shapes[name]
        return self.read_many({(name, "master"): (0, shape.numel())})[name, "master"].view(shape)

    def slices(self, name: str) -> list[Slice]:
        """The flattened `read_master` in the pieces that the ranks wrote, mapped: no memory is needed for them."""
        return self._reader.slices(f"master/{name}")

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin to end of the flattened `read_master`, cut where it ends; only they are read."""
        end = min(end, self.shapes[name].numel())
        return self.read_many({(name, "master"): (min(begin, end), end)})[name, "master"]


# --------------------------------------------------------------------------------------------- all weights of a run


def write_base(
    run: Path,
    frozen: Mapping[str, str],
    parts: Mapping[str, Part] | None = None,
    *,
    copy: bool = False,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> None:
    """Writes RUN/base.json: where each frozen weight comes from. On a later start: checks that it is still the same.

    frozen: {our name: "FILE:KEY"} for a tensor of a safetensors file, {our name: "RUN/step_N:NAME"} for a weight that
    an earlier run of ours trained. parts: of those that are only a part of what stands there, which one. copy: they are
    copied to RUN/base as well, once. Every rank calls it and hashes and copies its share of the files. Files may have
    moved, and be gone where there is a copy; raises CheckpointError, on every rank, where their content differs.
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
            mine = dict(zip(own, pool.map(lambda file: _identity(run, file, known.get(file)), own), strict=True))
    entries = {file: entry for part in gather(mine) for file, entry in part.items()}
    tensors: dict[str, dict[str, Any]] = {
        name: {"file": place, "key": key} for name, (place, key) in sorted(places.items())
    }
    for name, (dimension, ranges) in (parts or {}).items():
        tensors[name]["part"] = {"dimension": dimension, "ranges": ranges}
    if before is not None:
        _require_same_base(run, before, entries, tensors)
    with _together(gather, rank, f"copying the frozen weights of {run}"):
        copies = {file: _copy(run, file, entries[file]) for file in mine} if copy else {}
    for part in gather(copies):
        for file, place in part.items():
            entries[file]["copy"] = place
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


def _copy(run: Path, place: str, entry: Mapping[str, Any]) -> str:
    """Copies a file or a checkpoint of frozen weights below RUN/base; returns where, relative to RUN. Done once."""
    target = run / "base" / entry["sha256"][:16] / Path(place).name
    if not target.exists():
        source = Path(place)
        size = sum(file.stat().st_size for file in ([source] if source.is_file() else source.rglob("*")))
        if (free := shutil.disk_usage(run).free) < size:
            raise OSError(errno.ENOSPC, f"{place} needs {size / 2**30:.2f} GiB, {run} has {free / 2**30:.2f} GiB free")
        log.info("copying %s to %s, %.1f MB", place, target, size / 1e6)
        half = target.with_name(target.name + ".tmp")
        if half.is_dir():
            shutil.rmtree(half)
        half.parent.mkdir(parents=True, exist_ok=True)
        if entry["kind"] == "file":
            shutil.copyfile(place, half)
        else:
            _copy_beneath(Path(place), half.parent)
            shutil.copytree(place, half)
        for file in [half, *half.rglob("*")]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if sha256(_identity_file(str(half))) != entry["sha256"]:
            raise CheckpointError(f"the copy of {place} in {half} differs from it; look at the file system of {run}")
        os.replace(half, target)
        _sync_folder(target.parent)
        if entry["kind"] == "run":
            Checkpoint(target).verify_checksums()
    return str(target.relative_to(run))


def _copy_beneath(place: Path, folder: Path) -> None:
    """Of a checkpoint with LoRA adapters, copies to `folder` what lies beneath them, so that `folder` is to the copied
    checkpoint what the run is to `place`: base.json with the weights that adapters are merged into, recipe.json."""
    weights = sorted(_weight_of(name) for name in read_state(place)["shapes"] if _is_a(name))
    if not weights:
        return
    base = read_json(place.parent / "base.json")
    tensors = {name: base["tensors"][name] for name in weights}
    files = {entry["file"]: dict(base["files"][entry["file"]]) for entry in tensors.values()}
    for file, entry in files.items():
        entry["copy"] = _copy(folder, str(place.parent / entry["copy"]) if "copy" in entry else file, entry)
    write_json(folder / "recipe.json", read_json(place.parent / "recipe.json"))
    write_json(folder / "base.json", {"format": FORMAT, "files": files, "tensors": tensors})


def _is_a(name: str) -> bool:
    return ".lora_A." in name


def _weight_of(a: str) -> str:
    """The weight that the adapter matrix A of this name is merged into."""
    return a.split(".lora_A.")[0] + ".weight"


def _identity(run: Path, place: str, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """Size, time and SHA-256 of a safetensors file; of a checkpoint those of its state.json, which holds all sums."""
    file = _identity_file(place)
    if not file.is_file() and known is not None and "copy" in known:
        copied = _identity_file(str(run / known["copy"]))
        if not copied.is_file() or sha256(copied) != known["sha256"]:
            raise CheckpointError(f"{copied}, the run's copy of {place}, is missing or has changed")
        return dict(known)
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
    without: prefixes of frozen weights that are left out, because others bring them; their files may have gone.
    """

    def __init__(self, path: str | Path, *, checksums: bool = False, without: tuple[str, ...] = ()) -> None:
        self.checkpoint = Checkpoint(path)
        if checksums:
            self.checkpoint.verify_checksums(desc="checksums")
        self._checksums = checksums
        self.step, self.state, self.path = self.checkpoint.step, self.checkpoint.state, self.checkpoint.path
        content = read_json(self.checkpoint.run / "recipe.json")
        self.recipe: dict[str, Any] = content["recipe"]
        self.earlier_run: dict[str, Any] | None = content.get("earlier_run")
        self.continued_from: dict[str, Any] | None = content.get("continued_from")
        self.parts: list[dict[str, Any]] | None = content.get("parts")  # None: of an older version
        base = read_json(self.checkpoint.run / "base.json")
        shapes = self.checkpoint.shapes
        self.adapters: dict[str, tuple[str, str, float]] = {}
        for a in filter(_is_a, shapes):
            scale = float(self.state["lora"][a.split(".", 1)[0]])
            self.adapters[_weight_of(a)] = (a, a.replace(".lora_A.", ".lora_B."), scale)
        parts = {part for a, b, _ in self.adapters.values() for part in (a, b)}
        self._own = {name: shape for name, shape in shapes.items() if name not in parts}
        self.trained = {*self._own, *self.adapters}
        self._frozen: dict[str, dict[str, Any]] = {
            name: entry
            for name, entry in base["tensors"].items()
            if not name.startswith(without) or name in self.adapters
        }
        self._runs = {place for place, entry in base["files"].items() if entry["kind"] == "run"}
        copies = {
            place: str(self.checkpoint.run / entry["copy"]) for place, entry in base["files"].items() if "copy" in entry
        }
        self.self_contained = set(copies) == set(base["files"])  # needs no other folder than the run's
        self._copies = copies
        self._earlier: dict[str, Checkpoint] = {}
        self._merged: dict[str, _Merged] = {}
        self._open: dict[str, Any] = {}
        wrong = []
        needed = {entry["file"] for entry in self._frozen.values()}
        for file, entry in base["files"].items():
            if file not in needed:
                continue
            file = copies.get(file, file)
            path_ = _identity_file(file)
            if not path_.is_file():
                wrong.append(f"{file} is missing")
            elif path_.stat().st_size != entry["bytes"]:
                wrong.append(f"{file} has {path_.stat().st_size:,} bytes, was {entry['bytes']:,} when the run started")
            elif checksums and sha256(path_) != entry["sha256"]:
                wrong.append(f"{file} has changed since the run started (SHA-256 differs)")
        if wrong:
            raise CheckpointError("frozen weights of this run cannot be used:\n  " + "\n  ".join(wrong))

    @property
    def identity(self) -> str:
        """What this checkpoint holds, as a hash: of its manifest, of its frozen weights' origin, and of the recipe."""
        digest = hashlib.sha256()
        for file in (self.path / "state.json", self.checkpoint.run / "base.json", self.checkpoint.run / "recipe.json"):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return [*self._own, *self._frozen]

    def shape(self, name: str) -> torch.Size:
        if name in self._own:
            return self._own[name]
        earlier, entry = self._frozen_place(name)
        if earlier:
            return earlier.shapes[entry["key"]]
        shape = self._slice(entry).get_shape()
        if "part" in entry:
            shape[entry["part"]["dimension"]] = sum(end - begin for begin, end in entry["part"]["ranges"])
        return torch.Size(shape)

    def dtype(self, name: str) -> torch.dtype:
        if name in self.adapters:
            return torch.float32
        if name in self.trained:
            return self.checkpoint.dtype
        earlier, entry = self._frozen_place(name)
        return earlier.dtype if earlier else self._file(entry["file"]).get_slice(entry["key"])[0:0].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the dtype in which it is stored; in fp32 where an adapter is merged into it."""
        if name in self.adapters:
            a, b, scale = self.adapters[name]
            read = self.checkpoint.read_master
            return merged(self._read_frozen(name), read(a), read(b), scale)
        return self.checkpoint.read_master(name) if name in self._own else self._read_frozen(name)

    def _read_frozen(self, name: str) -> Tensor:
        earlier, entry = self._frozen_place(name)
        if earlier:
            return earlier.read_master(entry["key"])
        tensor: Tensor = self._file(entry["file"]).get_tensor(entry["key"])
        if "part" not in entry:
            return tensor
        dimension, ranges = entry["part"]["dimension"], entry["part"]["ranges"]
        return torch.cat([tensor.narrow(dimension, begin, end - begin) for begin, end in ranges], dimension)

    def read_slice(self, name: str, begin: int, end: int) -> Tensor:
        """Elements begin to end of the flattened tensor; of a trained one only they are read."""
        if name in self._own:
            return self.checkpoint.read_slice(name, begin, end)
        if name in self.adapters:
            return self._read_merged_slice(name, begin, end)
        return self._read_frozen_slice(name, begin, end)

    def _read_frozen_slice(self, name: str, begin: int, end: int) -> Tensor:
        earlier, entry = self._frozen_place(name)
        return earlier.read_slice(entry["key"], begin, end) if earlier else self._read_frozen(name).flatten()[begin:end]

    def slices(self, name: str) -> list[Slice]:
        """The flattened `read` in pieces, in order: what each rank wrote; all of a tensor that lies in a file, mapped,
        or that must be made in memory (with an adapter in it)."""
        if name in self._own:
            return self.checkpoint.slices(name)
        if name not in self.adapters:
            earlier, entry = self._frozen_place(name)
            if isinstance(earlier, Checkpoint):
                return earlier.slices(entry["key"])
            if earlier is None and "part" not in entry:
                return [Slice(0, lambda: self._read_frozen(name).flatten())]
        return [Slice(3 * 4 * self.shape(name).numel(), lambda: self.read(name).flatten())]  # base, product and sum

    def _read_merged_slice(self, name: str, begin: int, end: int) -> Tensor:
        """The rows that hold the slice are merged, no others."""
        rows, width = self.shape(name)
        begin, end = min(begin, rows * width), min(end, rows * width)
        first, last = begin // width, -(-end // width)
        a, b, scale = self.adapters[name]
        rank = self.checkpoint.shapes[a][0]
        base = self._read_frozen_slice(name, first * width, last * width).view(-1, width)
        part = self.checkpoint.read_slice(b, first * rank, last * rank).view(-1, rank)
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

    def part(self, name: str) -> Part | None:
        """Which part of what stands at `where` a weight is; None: all of it."""
        return self._part_frozen(name) if name not in self.trained else None

    def _part_frozen(self, name: str) -> Part | None:
        part = self._frozen[name].get("part")
        return None if part is None else (part["dimension"], [(begin, end) for begin, end in part["ranges"]])

    def _frozen_place(self, name: str) -> tuple[Checkpoint | _Merged | None, dict[str, Any]]:
        try:
            entry = self._frozen[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no weight named {name}") from None
        if entry["file"] not in self._runs:
            return None, entry
        place = self._copies.get(entry["file"], entry["file"])
        if place not in self._earlier:
            self._earlier[place] = Checkpoint(place)
        if entry["key"] in self._earlier[place].shapes:
            return self._earlier[place], entry
        if place not in self._merged:  # an adapter was merged into it, so what is beneath lies in that run's own base
            self._merged[place] = _Merged(CheckpointWeights(place, checksums=self._checksums, without=("",)))
        return self._merged[place], entry

    def _file(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self._copies.get(file, file), framework="pt")
        return self._open[file]

    def _slice(self, entry: dict[str, Any]) -> Any:
        return self._file(entry["file"]).get_slice(entry["key"])


class _Merged:
    """The merged weights of an earlier run, with the face of a `Checkpoint`."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self.shapes = {name: weights.shape(name) for name in weights.adapters}
        self.dtype, self.read_master, self.read_slice = torch.float32, weights.read, weights.read_slice


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
            return self._own.read_slice(name, begin, end)
        return self._all._read_frozen_slice(name, begin, end)

    def where(self, name: str) -> str:
        if name in self._own.shapes:
            return f"{os.path.abspath(self._all.path)}:{name}"
        return self._all._where_frozen(name)

    def part(self, name: str) -> Part | None:
        return self._all._part_frozen(name) if name not in self._own.shapes else None


def open_checkpoint(path: str | Path, *, checksums: bool = False, without: tuple[str, ...] = ()) -> CheckpointWeights:
    """All weights of the model behind RUN or RUN/step_N, with `.recipe`, `.step`, `.state` and `.trained`.

    without: see `CheckpointWeights`.
    """
    return CheckpointWeights(path, checksums=checksums, without=without)
