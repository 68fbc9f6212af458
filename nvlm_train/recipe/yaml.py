"""Recipe files: YAML 1.2 scalars, a line for every key and value, nothing that a file can do besides saying something.

Built on PyYAML's composer (text to node graph); its YAML 1.1 meaning of scalars is not used, because there `2e-5` is a
string, `no` is false and `1:30` is 90. Here (YAML 1.2 core schema, https://yaml.org/spec/1.2.2/#103-core-schema):

    null  ~ (nothing)    true false      12 -3 0o17 0xff    2e-5 1.5 .5 -1e3 .inf .nan    everything else is a string

Anchors and aliases work. Refused: tags (`!!python/...`), merge keys (`<<`, use `extends`), duplicate keys, several
documents, files that expand to more than 100,000 values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from nvlm_train.errors import RecipeError

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Origin:
    """Where an effective value comes from.

    kind: default, preset, parent (a file named by `extends`), file, override, or run (a saved recipe).
    where: `file:line` of a file, the text of an override, the name of a preset.
    """

    kind: str
    where: str = ""

    @property
    def place(self) -> str:
        """Where to look when something is wrong with the value: `file:line`, or the override."""
        return f"override {self.where}" if self.kind == "override" else self.where

    def __str__(self) -> str:
        if self.kind == "file":
            return self.where
        return f"{self.kind} {self.where}" if self.where else self.kind


@dataclass
class Value:
    """A value with the place its key stands at. `value` is a scalar, a dict of Values or a list of Values."""

    value: Any
    origin: Origin
    replaces: bool = False  # takes the place of a parent's mapping instead of being merged into it

    def plain(self) -> Any:
        """The value without its places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


def scalar(text: str) -> Any:
    """The meaning of an unquoted scalar: None, bool, int, float or str."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float("-inf") if text.startswith("-") else float("inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


class _TagsRefused(Composer):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[attr-defined]  # of the Parser it is mixed with
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the tag {tag!r} is refused: a recipe holds plain values only; remove the tag",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


class _Loader(Reader, Scanner, Parser, _TagsRefused, BaseResolver):
    """Text to node graph without any implicit meaning: every untagged scalar stays text."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        _TagsRefused.__init__(self)
        BaseResolver.__init__(self)


def read_yaml(path: str | Path, kind: str = "file") -> Value:
    """The mapping in a file; every key's origin is (`kind`, `path:line`).

    Raises RecipeError where the file cannot be read, is not YAML, or is not one mapping; with all duplicate keys.
    """
    shown = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{shown}: there is no such file; give the path of a recipe (YAML)") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read ({error.strerror}); give the path of a recipe (YAML)") from None
    root = parse_yaml(text, lambda line: Origin(kind, f"{shown}:{line}"))
    if root.value is None:
        raise RecipeError(f"{shown}: is empty; a recipe is a mapping of keys (`nvlm-train recipe keys` lists them)")
    if not isinstance(root.value, dict):
        raise RecipeError(
            f"{root.origin.where}: holds {describe(root.plain())} instead of a mapping; write `key: value` lines"
        )
    return root


def parse_yaml(text: str, origin: Callable[[int], Origin]) -> Value:
    """A YAML text as Values; `origin(line)` makes the origin of a line, counted from 1."""
    try:
        node = _Loader(text).get_single_node()
    except ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        raise RecipeError(
            f"{origin(line).place}: holds the character {error.character!r}, which YAML does not allow"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_syntax_error(error, origin)) from None
    except RecursionError:
        raise RecipeError(f"{origin(1).place}: is nested too deeply to be a recipe") from None
    if node is None:
        return Value(None, origin(1))
    problems: list[str] = []
    try:
        value = _build(node, node.start_mark.line + 1, origin, problems, iter(range(_MOST_VALUES)), ())
    except RecursionError:
        raise RecipeError(f"{origin(1).place}: is nested too deeply to be a recipe") from None
    if problems:
        raise RecipeError("\n".join(problems))
    return value


def _syntax_error(error: yaml.MarkedYAMLError, origin: Callable[[int], Origin]) -> str:
    mark = error.problem_mark or error.context_mark
    place = origin(mark.line + 1 if mark is not None else 1).place
    problem = error.problem or str(error)
    if "is refused" in problem:
        return f"{place}: {problem}"
    if "expected a single document" in (error.context or ""):
        return f"{place}: begins a second document; a recipe is one document, remove the `---`"
    if "'\\t'" in problem:
        problem += " (a tab; YAML indents with spaces)"
    started = error.context_mark.line + 1 if error.context_mark is not None else None
    context = f" ({error.context}, from line {started})" if error.context and started else ""
    return f"{place}: is not YAML: {problem}{context}"


def _build(
    node: yaml.Node,
    line: int,
    origin: Callable[[int], Origin],
    problems: list[str],
    counter: Iterator[int],
    above: tuple[int, ...],
) -> Value:
    here = origin(line)
    if next(counter, None) is None:
        raise RecipeError(f"{here.place}: the anchors expand to more than {_MOST_VALUES} values; a recipe is small")
    if id(node) in above:
        raise RecipeError(f"{here.place}: an alias stands inside its own anchor; remove it")
    above = (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        return Value(scalar(node.value) if plain else node.value, here)
    if isinstance(node, yaml.SequenceNode):
        items = [_build(item, item.start_mark.line + 1, origin, problems, counter, above) for item in node.value]
        return Value(items, here)
    children: dict[str, Value] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        place = origin(key_line).place
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{place}: a key must be a word, not a list or a mapping")
            continue
        name = key_node.value
        if name == "<<" and key_node.style is None:
            problems.append(f"{place} <<: merge keys are not YAML 1.2; use `extends: other.yaml`")
            continue
        if name in lines:
            problems.append(f"{place} {name}: is given a second time (first on line {lines[name]}); keep one of them")
            continue
        lines[name] = key_line
        children[name] = _build(value_node, key_line, origin, problems, counter, above)
    return Value(children, here)


def describe(value: Any) -> str:
    """A value as shown in messages: strings quoted, the others as YAML writes them, long ones cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(str(name) for name in list(value)[:3]) + (", ..." if len(value) > 3 else "") + "}"
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + "..." + text[-1]
