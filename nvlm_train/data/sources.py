"""Where samples come from: rows of a file, read at any position, brought into one form.

The canonical sample is `Sample(messages, images)`: messages as `[{role, content: [{"text": str} | {"image": i}]}]`,
images as paths in the order of the indices i. Two row forms are understood:

    OpenAI style; content may also be a list of {"type": "text" | "image_url" | "image", ...}, images in their places
    {"messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...], "images": ["a.png"]}

    LLaVA and ShareGPT; roles human, user, gpt, assistant, system
    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...], "image": "a.png"}

The k-th `<image>` marker is the k-th image. Without any marker the images are put before the first user turn, a newline
after each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.data.images import BadSample
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

MARKER = "<image>"
_FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """One row in canonical form. Image paths are as written in the row."""

    messages: list[dict[str, Any]]
    images: list[str]


@dataclass(frozen=True)
class Line:
    """One non-blank line of a file: its 1-based number, where it begins, and its bytes without the line end."""

    number: int
    offset: int
    data: bytes


class JsonlSource:
    """A JSONL file of conversations, random access by byte offset. Raises DataError when it cannot be opened."""

    def __init__(self, name: str, settings: schema.Source) -> None:
        self.name = name
        self._settings = settings
        self.path = Path(settings.path)
        self.image_root = Path(settings.image_root) if settings.image_root is not None else self.path.parent
        self._inside = os.path.join(
            os.path.realpath(self.image_root), ""
        )  # with its last slash: a/data2 is not in a/data
        self._real_folders: dict[str, str] = {}
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(
                f"source {name!r}: cannot open {self.path} ({error.strerror}); "
                "`path` names a JSONL file, relative to the current directory."
            ) from error
        self.num_bytes = os.fstat(self._file).st_size

    def __reduce__(self) -> Any:  # on its way to the loader process, which opens the file for itself
        return type(self), (self.name, self._settings)

    def close(self) -> None:
        """Lets go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def lines(self) -> Iterator[Line]:
        """All non-blank lines in order."""
        offset = 0
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, start=1):
                begin, offset = offset, offset + len(data)
                if begin == 0 and data.startswith(b"\xef\xbb\xbf"):
                    data, begin = data[3:], 3
                stripped = data.rstrip(b"\r\n")
                if stripped.strip():
                    yield Line(number, begin, stripped)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """The bytes of one line; may be called from any thread."""
        return os.pread(self._file, num_bytes, offset)

    def image_path(self, image: str) -> str:
        """Where an image of a row lies, links resolved. Raises BadSample when that is outside the image root."""
        if "\0" in image:
            raise BadSample("bad image path", f"image path {image!r} holds a zero byte")
        path = os.path.join(self.image_root, image)
        folder, base = os.path.split(os.path.normpath(path))
        real_folder = self._real_folders.get(folder)
        if real_folder is None:
            real_folder = self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(real_folder, base)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if not real.startswith(self._inside):
            raise BadSample(
                "image outside root",
                f"image {image!r} lies outside {self.image_root}; set image_root to a folder that holds all",
            )
        return real


def parse_line(data: bytes) -> Sample:
    """One JSON line to a canonical sample. Raises BadSample with the reason."""
    try:
        row = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample(
            "not UTF-8", f"not UTF-8: byte {data[error.start]:#04x} at position {error.start} of the line"
        ) from error
    except (ValueError, RecursionError) as error:
        hint = " (a JSON array? jsonl holds one object a line)" if data.lstrip()[:1] == b"[" else ""
        raise BadSample("not JSON", f"not JSON: {error}{hint}") from error
    return parse_row(row)


def parse_row(row: Any) -> Sample:
    """A decoded row to a canonical sample. Raises BadSample with the reason."""
    if not isinstance(row, dict):
        raise BadSample("not an object", f"the line holds a {type(row).__name__}; one JSON object a line is expected")
    field = next((name for name in _FORMS if row.get(name) is not None), None)
    if field is None:
        raise BadSample("no conversation", f"neither 'messages' nor 'conversations'; the row has {sorted(row)[:8]}")
    role_key, content_key = _FORMS[field]
    turns = row[field]
    if not isinstance(turns, list):
        raise BadSample("no conversation", f"{field!r} is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise BadSample("empty conversation", f"{field!r} is empty")
    images = _images_beside(row)
    messages: list[dict[str, Any]] = []
    placed: list[str] = []  # images whose place is given by a content part of their own
    markers = 0
    for number, turn in enumerate(turns, start=1):
        role = turn.get(role_key) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise BadSample("unknown role", f"turn {number} has {role_key} {role!r}; known are {', '.join(_ROLES)}")
        content: list[dict[str, Any]] = []
        for part in _parts(turn.get(content_key), number):
            if isinstance(part, _Place):
                if part.path is None:
                    content.append({"image": markers})
                    markers += 1
                else:
                    content.append({"image": len(placed)})
                    placed.append(part.path)
                continue
            for k, text in enumerate(part.split(MARKER)):
                if k:
                    content.append({"image": markers})
                    markers += 1
                if text:
                    content.append({"text": text})
        messages.append({"role": _ROLES[role], "content": content})
        _check_turn(messages[-1], number)
    if placed:
        if images or markers:
            raise BadSample(
                "marker count",
                f"{len(placed)} image parts with a path beside {markers} {MARKER} markers and {len(images)} listed "
                "images; use one way of placing images",
            )
        images = placed
    elif markers == 0 and images:
        _prepend(messages, len(images))
    elif markers != len(images):
        raise BadSample("marker count", f"{markers} {MARKER} markers but {len(images)} images")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadSample("no assistant turn", "no assistant turn: nothing to train on")
    return Sample(messages, images)


@dataclass(frozen=True)
class _Place:
    """An image's place in a content list; without a path it is the next of the listed images."""

    path: str | None


def _parts(content: Any, number: int) -> Iterator[str | _Place]:
    if isinstance(content, str):
        yield _valid(content, number)
        return
    if not isinstance(content, list):
        raise BadSample(
            "bad content", f"turn {number} has content of type {type(content).__name__}; a text or a list is expected"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield _valid(part["text"], number)
        elif kind == "image_url":
            url = part.get("image_url")
            yield _Place(_image_name(url.get("url") if isinstance(url, Mapping) else url))
        elif kind == "image":
            given = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
            yield _Place(None if given is None else _image_name(given))
        else:
            raise BadSample(
                "bad content", f"turn {number} has a part of type {kind!r}; known are text, image_url, image"
            )


def _images_beside(row: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for field in ("image", "images"):
        value = row.get(field)
        if value is None:
            continue
        if found:
            raise BadSample("bad image path", "both 'image' and 'images' are given; use one")
        found = [_image_name(item) for item in (value if isinstance(value, list) else [value])]
    return found


def _image_name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BadSample(
            "bad image path", f"an image is given as {type(value).__name__} {str(value)[:40]!r}; a path is expected"
        )
    head = value.split(":", 1)[0].lower()
    if head in ("http", "https", "data") and ":" in value:
        raise BadSample("bad image path", f"image {value[:60]!r} is not a file; training reads files only")
    return value[7:] if value.startswith("file://") else value


def _valid(text: str, number: int) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample(
                "not UTF-8", f"turn {number} holds half a surrogate pair at character {error.start}"
            ) from error
    return text


def _check_turn(message: dict[str, Any], number: int) -> None:
    has_image = any("image" in part for part in message["content"])
    if has_image and message["role"] != "user":
        raise BadSample("image place", f"turn {number} ({message['role']}) holds an image; only user turns may")
    if message["role"] == "assistant" and not "".join(part["text"] for part in message["content"]).strip():
        raise BadSample("empty answer", f"turn {number} is an empty assistant turn")


def _prepend(messages: list[dict[str, Any]], count: int) -> None:
    for message in messages:
        if message["role"] == "user":
            head: list[dict[str, Any]] = []
            for k in range(count):
                head += [{"image": k}, {"text": "\n"}]
            message["content"] = head + message["content"]
            return
    raise BadSample("marker count", f"0 {MARKER} markers, {count} images and no user turn to put them before")
