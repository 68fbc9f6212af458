"""Rows of every form, brought into one: the canonical sample.

`Sample(messages, images)`: messages as `[{role, content: [{"text": str} | {"image": i}]}]`, images in the order of the
indices i. A message that is not to be trained on carries `"loss": False`. A plain text is one message of the role
"text": no chat around it, all of it trained. The forms that are understood, by the fields a row has:

    OpenAI style; content may also be a list of {"type": "text" | "image_url" | "image", ...}, images in their places
    {"messages": [{"role": "user", "content": "<image>\\nWhat?"}, ...], "images": ["a.png"]}

    LLaVA and ShareGPT; roles human, user, gpt, assistant, system
    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...], "image": "a.png"}

    the_cauldron and FineVision; all images before the first user turn
    {"images": [...], "texts": [{"user": "What?", "assistant": "Yes."}], "relevance_ratings": [4]}

    question and answer, with or without choices; captions; texts
    {"image": ..., "question": "What?", "answer": "Yes."}  {"image": ..., "caption": "A cat."}  {"text": "Once ..."}

Images stand where the k-th `<image>` marker is the k-th image. Without any marker they are put before the first user
turn, a newline after each. An image is a path, or bytes that the row brings: `{"bytes": ..., "path": ...}` of parquet
files, a base64 `data:` URL.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvlm_train.data import prompts
from nvlm_train.data.images import BadSample, read_file
from nvlm_train.recipe import schema

MARKER = "<image>"
BELOW_RATING = "below rating"
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_NUMBERED_MARKER = re.compile(r"<image(?:-(\d{1,6}))?>")


@dataclass(frozen=True)
class ImageRef:
    """An image of a sample. name: as its row or archive calls it. path: where it lies, once its source has found it;
    data: the file's bytes, where the row brings them."""

    name: str
    path: str | None = None
    data: bytes | None = field(default=None, repr=False)

    def open(self) -> str | bytes:
        """What `images.open_image` takes: a local path or the file's bytes. May read; raises BadSample."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise BadSample("missing image", f"image {self.name} was named by a row but no source has found it")
        return self.path

    def read(self) -> bytes:
        """All bytes of the file. Raises BadSample."""
        found = self.open()
        return found if isinstance(found, bytes) else read_file(found, self.name)

    def header(self) -> str | bytes:
        """As `open`, but perhaps only the beginning: enough for the size of nearly every image."""
        return self.open()


@dataclass(frozen=True)
class Sample:
    """One row in canonical form."""

    messages: list[dict[str, Any]]
    images: list[ImageRef]


@dataclass(frozen=True)
class Form:
    """How the rows of a source are to be read. `text`: rows of {text} are documents. `megatron`: markers as the
    released SFT data has them (see `_megatron_markers`)."""

    columns: schema.Columns = schema.Columns()  # noqa: RUF009 - frozen
    roles: Mapping[str, str] = field(default_factory=lambda: _ROLES)
    system: str | None = None
    last_turn: bool = False
    prompt: str | None = None
    ratings: Mapping[str, int] = field(default_factory=dict)
    text: bool = False
    only_text: bool = False
    megatron: bool = False

    @classmethod
    def of(cls, settings: schema.Source, *, megatron: bool = False) -> Form:
        """What a source's settings say about its rows."""
        ratings = settings.min_ratings.model_dump() if settings.min_ratings else {}
        columns = settings.columns or schema.Columns()
        return cls(
            columns=columns,
            roles={**_ROLES, **settings.roles},
            system=settings.system,
            last_turn=settings.train_on == "last_turn",
            prompt=settings.prompt,
            ratings={name: least for name, least in ratings.items() if least is not None},
            text=settings.kind in ("text", "hf", "webdataset", "energon") or columns.text is not None,
            only_text=settings.kind == "text",
            megatron=megatron,
        )


_PLAIN = Form()


def parse_line(data: bytes, form: Form = _PLAIN, seed: int = 0) -> Sample:
    """One JSON text to a canonical sample. Raises BadSample with the reason."""
    return parse_row(parse_json(data), form, seed)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises BadSample."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample(
            "not UTF-8", f"not UTF-8: byte {data[error.start]:#04x} at position {error.start} of the line"
        ) from error
    except (ValueError, RecursionError) as error:
        first = data.lstrip()[:1]
        hint = " (a JSON array? jsonl holds one object a line; use kind: json)" if first == b"[" else ""
        if first not in b'[]{}"':
            hint = " (plain text? use kind: text)"
        raise BadSample("not JSON", f"not JSON: {error}{hint}") from error


def parse_text(data: bytes) -> Sample:
    """A document of a text file."""
    try:
        return document(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample(
            "not UTF-8", f"not UTF-8: byte {data[error.start]:#04x} at position {error.start} of the document"
        ) from error


def document(text: Any) -> Sample:
    """A plain text, all of it trained."""
    if not isinstance(text, str):
        raise BadSample("bad content", f"the text is a {type(text).__name__}; a string is expected")
    if not text.strip():
        raise BadSample("empty text", "the text is empty: nothing to train on")
    return Sample([{"role": "text", "content": [{"text": _valid(text, "the text")}]}], [])


def parse_row(row: Any, form: Form = _PLAIN, seed: int = 0) -> Sample:
    """A decoded row to a canonical sample. `seed` is the hash of its content, by which variants of prompts and answers
    are chosen. Raises BadSample with the reason."""
    if not isinstance(row, Mapping):
        raise BadSample("not an object", f"the line holds a {type(row).__name__}; one JSON object a line is expected")
    if form.only_text:
        return document(_required(row, form.columns.text or "text"))
    images = _images_beside(row, form.columns.images)
    turns = _turns(row, form, seed, bool(images))
    if turns is None:
        return document(row[form.columns.text or "text"])
    system = row.get(form.columns.system or "system")
    if system is not None and not isinstance(system, str):
        raise BadSample("bad content", f"the system text is a {type(system).__name__}; a string is expected")
    if form.megatron:
        turns, images = _megatron_markers(turns, images)
    messages, images = _build(turns, images)
    system = system or form.system
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": [{"text": _valid(system, "the system text")}]})
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadSample("no assistant turn", "no assistant turn: nothing to train on")
    if form.last_turn:
        for message in answers[:-1]:
            message["loss"] = False
    if not any(message.get("loss", True) for message in answers):
        raise BadSample("no trained token", "every assistant turn has loss: false, so nothing would be trained")
    return Sample(messages, images)


# ------------------------------------------------------------------------------------------------- a row to its turns


@dataclass(frozen=True)
class _Turn:
    role: str
    parts: list[str | _Place | _Literal]
    loss: bool = True


@dataclass(frozen=True)
class _Place:
    """An image's place in a content list; without an image it is the next of the listed ones."""

    image: ImageRef | None


@dataclass(frozen=True)
class _Literal:
    """A text in which `<image>` means nothing."""

    text: str


def _turns(row: Mapping[str, Any], form: Form, seed: int, has_image: bool) -> list[_Turn] | None:
    """The turns of a row, or None when it is a document."""
    columns = form.columns
    named = [columns.messages] if columns.messages else ["messages", "conversations"]
    for name in named:
        if row.get(name) is not None:
            return _chat_turns(row[name], name, form)
    texts = columns.texts or "texts"
    if row.get(texts) is not None:
        listed = row[texts]
        if isinstance(listed, list) and listed and isinstance(listed[0], Mapping) and _is_turn(listed[0]):
            return _chat_turns(listed, texts, form)
        return _pair_turns(listed, texts, row, form)
    question = row.get(columns.question or "question")
    for name in [columns.answer] if columns.answer else ["answer", "answers"]:
        if row.get(name) is not None and (question is not None or form.prompt in prompts.ALONE):
            return _question_turns(row, question, row[name], form, seed)
    caption = row.get(columns.caption or "caption")
    if caption is None and form.text and has_image:
        caption = row.get(columns.text or "text")
    if caption is not None:
        if isinstance(caption, list) and caption:
            caption = caption[prompts.choose(len(caption), seed, "answer")]
        preset = form.prompt if form.prompt in prompts.ALONE else "caption"
        asked = prompts.ask(preset, seed)
        return [_Turn("user", [asked]), _Turn("assistant", [_Literal(_text_of(caption, "the caption"))])]
    if form.text and row.get(columns.text or "text") is not None:
        return None
    wanted = f"no column {columns.messages!r}" if columns.messages else "neither 'messages' nor 'conversations'"
    null = "".join(f", {name} is null" for name in sorted(map(str, row)) if row.get(name, 0) is None)
    raise BadSample("no conversation", f"{wanted}; the row has {sorted(map(str, row))[:8]}{null}")


def _required(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise BadSample("no text", f"no {name!r}; the row has {sorted(map(str, row))[:8]}")
    return row[name]


def _is_turn(turn: Mapping[str, Any]) -> bool:
    return "from" in turn or "role" in turn


def _chat_turns(turns: Any, name: str, form: Form) -> list[_Turn]:
    if not isinstance(turns, list):
        raise BadSample("no conversation", f"{name!r} is a {type(turns).__name__}, not a list of turns")
    if not turns:
        raise BadSample("empty conversation", f"{name!r} is empty")
    columns = form.columns
    found = []
    for number, turn in enumerate(turns, start=1):
        keys = ("from", "value") if name == "conversations" else ("role", "content")
        if isinstance(turn, Mapping) and keys[0] not in turn and _is_turn(turn):
            keys = ("role", "content") if "role" in turn else ("from", "value")
        role_key, content_key = columns.role or keys[0], columns.content or keys[1]
        role = turn.get(role_key) if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or role not in form.roles:
            known = ", ".join(form.roles)
            raise BadSample("unknown role", f"turn {number} has {role_key} {role!r}; known are {known}")
        loss = turn.get("loss")
        if loss is not None and not isinstance(loss, bool):
            raise BadSample("bad loss flag", f"turn {number} has loss {loss!r}; true or false is expected")
        if loss and form.roles[role] != "assistant":
            raise BadSample("bad loss flag", f"turn {number} ({role}) has loss true; only assistant turns are trained")
        found.append(_Turn(form.roles[role], list(_parts(turn.get(content_key), number)), loss is not False))
    return found


def _pair_turns(texts: Any, name: str, row: Mapping[str, Any], form: Form) -> list[_Turn]:
    """the_cauldron, FineVision: pairs of {user, assistant}; pairs with a rating below the least wanted are left out."""
    if not isinstance(texts, list) or not all(isinstance(pair, Mapping) for pair in texts):
        raise BadSample("no conversation", f"{name!r} is not a list of {{user, assistant}}")
    if not texts:
        raise BadSample("empty conversation", f"{name!r} is empty")
    ratings = {}
    for kind, least in form.ratings.items():
        given = row.get(f"{kind}_ratings")
        if given is not None and (not isinstance(given, list) or len(given) != len(texts)):
            raise BadSample("bad ratings", f"{kind}_ratings do not have one entry for each of {len(texts)} pairs")
        if given is not None:
            ratings[kind] = (given, least)
    turns: list[_Turn] = []
    for number, pair in enumerate(texts):
        marks = [(given[number], least) for given, least in ratings.values() if given[number] is not None]
        if any(not isinstance(mark, (int, float)) for mark, _ in marks):
            raise BadSample("bad ratings", f"a rating of pair {number + 1} is not a number")
        if any(mark < least for mark, least in marks):
            continue
        # Images of these sets have no place of their own: a marker in the text is only a leftover.
        asked = _text_of(pair.get("user"), f"the user text of pair {number + 1}").replace(MARKER, "").strip("\n")
        answer = _text_of(pair.get("assistant"), f"the assistant text of pair {number + 1}")
        turns += [_Turn("user", [_Literal(asked)]), _Turn("assistant", [_Literal(answer)])]
    if not turns:
        wanted = ", ".join(f"{kind} >= {least}" for kind, least in form.ratings.items())
        raise BadSample(BELOW_RATING, f"none of {len(texts)} pairs has ratings of {wanted}")
    return turns


def _question_turns(row: Mapping[str, Any], question: Any, answer: Any, form: Form, seed: int) -> list[_Turn]:
    choices = row.get(form.columns.choices or "choices")
    if question is None:
        asked = prompts.ask(str(form.prompt), seed)
    else:
        asked = _text_of(question, "the question")
    if choices:
        if question is None or not isinstance(choices, list) or len(choices) > len(prompts.LETTERS):
            raise BadSample("bad choices", f"choices need a question and a list of at most {len(prompts.LETTERS)}")
        options = [_text_of(choice, "a choice") for choice in choices]
        asked, said = prompts.with_options(asked, options, seed), _letter(answer, options)
    else:
        said = _one_answer(answer, row.get("answer_weights"), seed)
        if question is not None and form.prompt == "vqa":
            asked = prompts.with_hint(asked, seed)
    return [_Turn("user", [asked]), _Turn("assistant", [_Literal(said)])]


def _letter(answer: Any, options: Sequence[str]) -> str:
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return prompts.LETTERS[answer]
    letters = prompts.LETTERS[: len(options)]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return answer.strip().upper()
    if isinstance(answer, str) and answer in options:
        return letters[options.index(answer)]
    raise BadSample("bad choices", f"the answer {str(answer)[:40]!r} is none of {len(options)} choices")


def _one_answer(answer: Any, weights: Any, seed: int) -> str:
    if not isinstance(answer, list):
        return _text_of(answer, "the answer")
    texts = [_text_of(one.get("answer") if isinstance(one, Mapping) else one, "an answer") for one in answer]
    if not texts:
        raise BadSample("empty answer", "the list of answers is empty")
    if weights is None:
        return texts[prompts.choose(len(texts), seed, "answer")]
    numbers = [isinstance(w, (int, float)) and not isinstance(w, bool) and w >= 0 for w in weights] if weights else []
    if len(numbers) != len(texts) or not all(numbers) or not 0 < sum(weights) < float("inf"):
        raise BadSample("bad content", "answer_weights are not one number for each answer")
    place = prompts.choose(1 << 30, seed, "answer") / (1 << 30) * sum(weights)
    for text, weight in zip(texts, weights, strict=True):
        place -= weight
        if place < 0:
            return text
    return texts[-1]


def _text_of(value: Any, what: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadSample("bad content", f"{what} is a {type(value).__name__}; a text is expected")
    return value


def _parts(content: Any, number: int) -> Iterator[str | _Place | _Literal]:
    if isinstance(content, str):
        yield content
        return
    if not isinstance(content, list):
        raise BadSample(
            "bad content", f"turn {number} has content of type {type(content).__name__}; a text or a list is expected"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif kind == "image_url":
            url = part.get("image_url")
            yield _Place(_image(url.get("url") if isinstance(url, Mapping) else url))
        elif kind == "image":
            given = next((part[k] for k in ("image", "path", "url") if part.get(k) is not None), None)
            yield _Place(None if given is None else _image(given))
        else:
            raise BadSample(
                "bad content", f"turn {number} has a part of type {kind!r}; known are text, image_url, image"
            )


# ---------------------------------------------------------------------------------------------- turns and images joined


def _build(turns: Sequence[_Turn], images: list[ImageRef]) -> tuple[list[dict[str, Any]], list[ImageRef]]:
    messages: list[dict[str, Any]] = []
    placed: list[ImageRef] = []  # images whose place is given by a content part of their own
    markers = 0
    for number, turn in enumerate(turns, start=1):
        content: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, _Place):
                if part.image is None:
                    content.append({"image": markers})
                    markers += 1
                else:
                    content.append({"image": len(placed)})
                    placed.append(part.image)
                continue
            pieces = [part.text] if isinstance(part, _Literal) else part.split(MARKER)
            for k, text in enumerate(pieces):
                if k:
                    content.append({"image": markers})
                    markers += 1
                if text:
                    content.append({"text": _valid(text, f"turn {number}")})
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if not turn.loss:
            message["loss"] = False
        messages.append(message)
        _check_turn(message, number)
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
    return messages, images


def _megatron_markers(turns: list[_Turn], images: list[ImageRef]) -> tuple[list[_Turn], list[ImageRef]]:
    """Markers of the released SFT data, brought to one `<image>` for each image in order.

    `<image-k>` is the k-th image, counted from 1; a single image may be marked several times and is repeated; with
    fewer markers than images the first ones are put before the first user turn; without images markers mean nothing.
    """
    marks = [
        match[1]
        for turn in turns
        for part in turn.parts
        if isinstance(part, str)
        for match in _NUMBERED_MARKER.finditer(part)
    ]
    if any(isinstance(part, _Place) for turn in turns for part in turn.parts):
        return turns, images
    plain = MARKER if images else ""
    turns = [
        _Turn(
            turn.role,
            [_NUMBERED_MARKER.sub(plain, part) if isinstance(part, str) else part for part in turn.parts],
            turn.loss,
        )
        for turn in turns
    ]
    if not images or not marks:
        return turns, images
    if len(images) == 1:
        wrong = [int(mark) for mark in marks if mark is not None and int(mark) != 1]
        if wrong:
            raise BadSample("marker count", f"<image-{wrong[0]}>, but the sample has 1 image")
        return turns, images * len(marks)
    missing = len(images) - len(marks)
    if missing < 0:
        raise BadSample("marker count", f"{len(marks)} {MARKER} markers but {len(images)} images")
    if all(mark is not None for mark in marks):
        numbers = [int(mark) for mark in marks if mark is not None]
        if not all(1 <= number <= len(images) for number in numbers):
            raise BadSample("marker count", f"<image-{max(numbers)}>, but the sample has {len(images)} images")
        rest = [image for k, image in enumerate(images, start=1) if k not in numbers]
        images = rest[:missing] + [images[number - 1] for number in numbers]
    if missing:
        first = next((turn for turn in turns if turn.role == "user"), None)
        if first is None:
            raise BadSample("marker count", f"{len(marks)} {MARKER} markers, {len(images)} images and no user turn")
        first.parts.insert(0, (MARKER + "\n") * missing)
    return turns, images


def _images_beside(row: Mapping[str, Any], column: str | None) -> list[ImageRef]:
    found: list[ImageRef] = []
    given = False
    for name in (column,) if column else ("image", "images"):
        value = row.get(name)
        if value is None:
            continue
        if given:
            raise BadSample("bad image path", "both 'image' and 'images' are given; use one")
        given = True
        found = [_image(item, k) for k, item in enumerate(value if isinstance(value, list) else [value])]
    return found


def _image(value: Any, number: int = 0) -> ImageRef:
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, bytes):
        return ImageRef(f"{number}", data=value)
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return ImageRef(str(value.get("path") or number), data=value["bytes"])
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or not value:
        raise BadSample(
            "bad image path", f"an image is given as {type(value).__name__} {str(value)[:40]!r}; a path is expected"
        )
    head = value.split(":", 1)[0].lower() if ":" in value else ""
    if head == "data":
        return ImageRef(f"{value[:30]}...", data=_decode(value))
    if head in ("http", "https"):
        raise BadSample("bad image path", f"image {value[:60]!r} is not a file; training reads files only")
    return ImageRef(value[7:] if value.startswith("file://") else value)


def _decode(url: str) -> bytes:
    kind, _, data = url.partition(",")
    if not kind.lower().endswith(";base64"):
        raise BadSample("bad image path", f"image {url[:40]!r} is not a file; a data: URL must be base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("bad image path", f"image {url[:40]!r} is not a file, nor readable base64: {error}") from error


def _valid(text: str, where: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadSample("not UTF-8", f"{where} holds half a surrogate pair at character {error.start}") from error
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
