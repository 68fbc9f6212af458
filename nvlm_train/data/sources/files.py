"""The bytes of a source: which files its path names, and reading them at any offset.

A path is a file, a folder, a glob, or has braces (`a-{000..010}.tar`, `{train,extra}.jsonl`); or a URL that fsspec
knows (`s3://`, `gs://`, `http://`, `memory://`). Local files are read with pread, so that any thread may; of remote
ones only the ranges that are asked for.
"""

from __future__ import annotations

import os
import posixpath
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, BinaryIO

from nvlm_train.data.images import BadSample
from nvlm_train.errors import DataError
from nvlm_train.log import get_logger

log = get_logger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_FILES = 1 << 22
_OPEN_FILES = 64
_REMOTE_TRIES = 4
_AHEAD = 8 << 20  # read at once when a remote file is gone through from front to back


def is_url(path: str) -> bool:
    """Whether fsspec is to open it. `file://` is a local path."""
    return bool(_URL.match(path)) and not path.startswith("file://")


def natural(name: str) -> list[Any]:
    """Sort key by which 2 comes before 10: "img10" -> ["img", 10, ""]."""
    return [int(piece) if piece.isdigit() and piece.isascii() else piece for piece in re.split(r"([0-9]+)", name)]


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` -> x, y. Raises ValueError for endless ranges."""
    done: list[str] = []
    todo = [pattern]
    while todo:
        text = todo.pop()
        match = _BRACES.search(text)
        inner = match[1] if match else ""
        span = _RANGE.fullmatch(inner)
        if match is None or (span is None and "," not in inner):
            done.append(text)
            if len(done) > _MAX_FILES:
                raise ValueError(f"more than {_MAX_FILES} files")
            continue
        if span:
            low, high = int(span[1]), int(span[2])
            if high - low >= _MAX_FILES:
                raise ValueError(f"more than {_MAX_FILES} files")
            choices = [str(k).zfill(len(span[1])) for k in range(low, high + 1)]
        else:
            choices = inner.split(",")
        todo += [text[: match.start()] + choice + text[match.end() :] for choice in reversed(choices)]
    return done


def list_files(name: str, path: str, suffixes: Sequence[str], what: str) -> list[str]:
    """The files of a source, in natural order for folders and globs, as written for braces.

    A single file may have any suffix. Raises DataError when there is none.
    """
    try:
        patterns = expand_braces(path[7:] if path.startswith("file://") else path)
    except ValueError as error:
        raise DataError(f"source {name!r}: path {path!r} names {error}; use a narrower range.") from error
    found: list[str] = []
    for pattern in patterns:
        try:
            files = _remote_files(pattern, suffixes) if is_url(pattern) else _local_files(pattern, suffixes)
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"source {name!r}: cannot open {pattern} ({_said(error)}); {what}") from error
        if not files:
            raise DataError(
                f"source {name!r}: cannot open {pattern} (it holds no {' or '.join(suffixes)} file); {what}"
            )
        found += files
    return found


def _local_files(pattern: str, suffixes: Sequence[str]) -> list[str]:
    if os.path.isdir(pattern):
        found = []
        for folder, folders, names in os.walk(pattern):
            folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
            found += [os.path.join(folder, name) for name in names if name.lower().endswith(tuple(suffixes))]
        return sorted((file for file in found if not os.path.basename(file).startswith(".")), key=natural)
    if any(sign in pattern for sign in "*?[") and not os.path.exists(pattern):
        import glob

        return sorted((file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file)), key=natural)
    os.stat(pattern)
    return [pattern]


def _remote_files(pattern: str, suffixes: Sequence[str]) -> list[str]:
    fs, inner = _filesystem(pattern)
    scheme = pattern.split("://", 1)[0]

    def full(path: str) -> str:
        return path if is_url(path) else f"{scheme}://{path.lstrip('/') if scheme != 'memory' else path}"

    if any(sign in inner for sign in "*["):
        return [full(path) for path in sorted(fs.glob(inner), key=natural)]
    if posixpath.splitext(inner)[1].lower() not in suffixes and fs.isdir(inner):
        files = [path for path in fs.find(inner) if path.lower().endswith(tuple(suffixes))]
        return [full(path) for path in sorted(files, key=natural)]
    fs.info(inner)
    return [pattern]


def holds_file(url: str, name: str) -> bool:
    """Whether a remote folder has something of this name; what cannot be looked at has not."""
    if any(sign in url for sign in "*[{") or posixpath.splitext(url)[1]:
        return False
    try:
        fs, inner = _filesystem(url)
        return bool(fs.exists(posixpath.join(inner, name)))
    except Exception:  # told when the files are listed
        return False


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    fs, inner = fsspec.core.url_to_fs(url)
    return fs, inner


def _said(error: BaseException) -> str:
    """What went wrong in words. fsspec hides the cause: FileNotFoundError(URL) may be any failure of HTTP."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    cause = error.__cause__ or error.__context__
    if cause is None or not is_url(text):
        return "not found" if is_url(text) else text
    return str(cause) or type(cause).__name__


_MAGIC = (  # of files that hold samples, or are packed: (offset, bytes, what it is, what to do)
    (0, b"PAR1", "a parquet file", "use kind: hf"),
    (0, b"ARROW1", "an Arrow file", "use kind: hf on the folder that save_to_disk wrote"),
    (257, b"ustar", "a tar", "use kind: webdataset"),
    (0, b"\x1f\x8b", "a gzip file", "decompress it: samples are read by their place in the file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "decompress it: samples are read by their place in the file"),
    (0, b"PK\x03\x04", "a zip file", "unpack it, or make a tar of it for kind: webdataset"),
)


def other_kind(head: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and what to do with it: for kinds of sources that expect something else."""
    for offset, magic, what, way in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return what, way
    return None


class ByteFile:
    """One file's bytes, local or remote. Raises DataError when it cannot be looked at."""

    def __init__(self, source: str, path: str, pool: FilePool | None = None) -> None:
        self.source, self.path = source, path
        self._pool = pool or FilePool()
        try:
            if is_url(path):
                self._fs, self._inner = _filesystem(path)
                info = self._fs.info(self._inner)
                self.size = int(info["size"])
                told = [info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "created")]
                self.version = str(next((value for value in told if value), ""))
            else:
                self._fs = None
                status = os.stat(path)
                self.size, self.version = status.st_size, str(status.st_mtime_ns)
                os.close(os.open(path, os.O_RDONLY))
                if os.path.isdir(path):
                    raise IsADirectoryError(21, "Is a directory")
        except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"source {source!r}: cannot open {path} ({_said(error)}); "
                "`path` names a file, relative to the current directory, or a URL."
            ) from error
        self._ahead = (0, b"")

    @property
    def is_local(self) -> bool:
        return self._fs is None

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` from `offset`; less only at the end of the file. Any thread may call. Raises OSError."""
        num_bytes = min(num_bytes, self.size - offset)
        if num_bytes <= 0:
            return b""
        if self._fs is None:
            file = self._pool.get(self.path)
            pieces = []
            while num_bytes > 0:
                piece = os.pread(file.fileno(), num_bytes, offset)
                if not piece:
                    break
                pieces.append(piece)
                offset, num_bytes = offset + len(piece), num_bytes - len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        for attempt in range(_REMOTE_TRIES):
            try:
                data = bytes(self._fs.cat_file(self._inner, start=offset, end=offset + num_bytes))
                if len(data) == self.size and num_bytes < self.size:  # a server that knows no ranges
                    self._pool.warn_of_no_ranges(self.source, self.path, self.size)
                    data = data[offset : offset + num_bytes]
                return data
            except FileNotFoundError:
                raise
            except Exception as error:  # each service has its own exceptions for a connection that broke
                if attempt == _REMOTE_TRIES - 1:
                    raise OSError(f"{self.path}: bytes {offset} to {offset + num_bytes}: {_said(error)}") from error
                time.sleep(0.2 * 4**attempt)
        raise AssertionError("unreachable")

    def read_on(self, offset: int, num_bytes: int) -> bytes:
        """As `read`, for one thread that goes through the file: a remote file is fetched in large pieces."""
        if self._fs is None:
            return self.read(offset, num_bytes)
        begin, data = self._ahead
        if not (begin <= offset and offset + num_bytes <= begin + len(data)):
            begin, data = self._ahead = (offset, self.read(offset, max(num_bytes, _AHEAD)))
        return data[offset - begin : offset - begin + num_bytes]


class FilePool:
    """Open local files, at most 64 at a time; one is closed once nobody reads it any more."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()
        self._warned = False

    def get(self, path: str) -> BinaryIO:
        """The open file; whoever holds the result keeps it open."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = open(path, "rb", buffering=0)  # closed with its last user
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

    def warn_of_no_ranges(self, source: str, url: str, size: int) -> None:
        """Once for all files of a source."""
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning(
                "source %r: the server of %s ignores byte ranges, so each read fetches a whole file (this one: %d "
                "bytes); copy the files to a disk, or use a server with ranges", source, url, size,
            )  # fmt: skip

    def close(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._files.clear()


class ImageRoot:
    """The folder that image paths of rows are relative to; what lies outside of it is refused."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._remote = is_url(root)
        # with its last slash: a/data2 is not in a/data
        self._inside = root.rstrip("/") + "/" if self._remote else os.path.join(os.path.realpath(root), "")
        self._real_folders: dict[str, str] = {}

    def locate(self, image: str) -> str:
        """Where an image of a row lies, links resolved. Raises BadSample when that is outside the root."""
        if "\0" in image:
            raise BadSample("bad image path", f"image path {image!r} holds a zero byte")
        if self._remote:
            return self._locate_remote(image)
        if is_url(image):
            raise self._outside(image)
        path = os.path.join(self.root, image)
        folder, base = os.path.split(os.path.normpath(path))
        real_folder = self._real_folders.get(folder)
        if real_folder is None:
            if len(self._real_folders) > 1 << 16:
                self._real_folders.clear()
            real_folder = self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(real_folder, base)
        try:
            if os.path.islink(real):
                real = os.path.realpath(real)
        except (OSError, ValueError) as error:
            raise BadSample("bad image path", f"image path {image[:60]!r} is none: {error}") from error
        if not real.startswith(self._inside):
            raise self._outside(image)
        return real

    def _locate_remote(self, image: str) -> str:
        path = image if is_url(image) else self._inside + image
        scheme, rest = path.split("://", 1)
        if ".." in rest.split("/") or image.startswith("/"):
            raise self._outside(image)
        path = f"{scheme}://{rest}"
        if not path.startswith(self._inside):
            raise self._outside(image)
        return path

    def _outside(self, image: str) -> BadSample:
        return BadSample(
            "image outside root",
            f"image {image!r} lies outside {self.root}; set image_root to a folder that holds all",
        )


def read_url(url: str, name: str) -> bytes:
    """A whole remote file. Raises BadSample."""
    try:
        fs, inner = _filesystem(url)
        for attempt in range(_REMOTE_TRIES):
            try:
                return bytes(fs.cat_file(inner))
            except FileNotFoundError:
                raise
            except Exception:
                if attempt == _REMOTE_TRIES - 1:
                    raise
                time.sleep(0.2 * 4**attempt)
    except FileNotFoundError as error:
        raise BadSample("missing image", f"image {name} cannot be fetched from {url}: {_said(error)}") from error
    except Exception as error:
        raise BadSample("unreadable image", f"image {name} cannot be read from {url}: {_said(error)}") from error
    raise AssertionError("unreachable")
