"""From files and command-line overrides to a checked `Recipe`, with the origin of every value and all problems at once.

How values win: `extends: base.yaml` (relative to the file that says it; a chain is fine) is read first, the file itself
is laid over it, then each override. Laying over: mappings merge key by key; everything else, lists too, replaces.
`key: null` over a parent's value removes it, so that the default applies again (or a named source is gone). A section
that names its `preset`, or is written in short (`language_model: qwen2_7b_instruct`, `vision: /folder`), replaces the
parent's section whole, because sizes or a licence of the old one would be wrong for the new one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nvlm_train.errors import RecipeError
from nvlm_train.recipe.foreign_names import answer
from nvlm_train.recipe.schema import ONE_OF, REQUIRED, Key, Misfit, Recipe, Section, all_keys
from nvlm_train.recipe.yaml import Origin, Value, describe, parse_yaml, read_yaml, scalar

Place = tuple[Any, ...]  # a place in a recipe: ("data", "mixture", "coco", "weight"), ("optimizer", "betas", 0)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, where each of its values comes from, and the file it was read from.

    origins: dotted key of every effective value -> Origin (default / preset / parent file:line / file:line / override).
    """

    recipe: Recipe
    origins: dict[str, Origin]
    path: Path
    overrides: tuple[str, ...] = ()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads, merges and checks a recipe. Raises RecipeError with every problem, one a line: `file:line key: value`."""
    tree = read_merged(path)
    problems: list[str] = []
    for text in overrides:
        _apply_override(tree, text, problems)
    recipe, found = _validate(tree, str(path))
    problems += found
    if problems or recipe is None:
        lines = sorted(dict.fromkeys(problems), key=_line_of)
        head = [f"{path}: {len(lines)} problems"] if len(lines) > 1 else []
        raise RecipeError("\n".join(head + lines))
    return LoadedRecipe(recipe, _origins(recipe, tree), Path(path), tuple(overrides))


def _line_of(problem: str) -> tuple[str, int]:
    """Sorts problems by file and line, so that they are read beside the file; overrides first, as typed."""
    found = re.match(r"(.*?):(\d+)[ :]", problem)
    return (found[1], int(found[2])) if found and not problem.startswith("override ") else ("", 0)


# ----------------------------------------------------------------------------------------------------- files and merge


def read_merged(path: str | Path) -> Value:
    """The file laid over everything it extends, overrides and validation still to come."""
    return _read_chain(str(path), "file", ())


def _read_chain(path: str, kind: str, chain: tuple[str, ...]) -> Value:
    tree = read_yaml(path, kind)
    _expand_shorthands(tree)
    parent = tree.value.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent.value, str):
        raise RecipeError(
            f"{parent.origin.where} extends: {describe(parent.plain())} is not the path of one file; "
            "write `extends: base.yaml`"
        )
    base = os.path.normpath(os.path.join(os.path.dirname(path), parent.value))
    chain = (*chain, path)
    if os.path.realpath(base) in [os.path.realpath(file) for file in chain]:
        circle = " -> ".join((*chain, base))
        raise RecipeError(f"{parent.origin.where} extends: goes in a circle ({circle}); remove one `extends`")
    if not os.path.isfile(base):
        raise RecipeError(
            f"{parent.origin.where} extends: {parent.value!r} is not there ({base}); the path is relative to this file"
        )
    merged = _read_chain(base, "parent", chain)
    _lay_over(merged, tree)
    return merged


def _lay_over(below: Value, above: Value) -> None:
    """Merges `above` into `below` in place."""
    for name, child in above.value.items():
        old = below.value.get(name)
        if old is not None and child.value is None:
            del below.value[name]
        elif old is not None and isinstance(old.value, dict) and isinstance(child.value, dict) and not child.replaces:
            _lay_over(old, child)
            old.origin = child.origin
        else:
            below.value[name] = child


def _expand_shorthands(tree: Value) -> None:
    """`vision: NAME` -> {preset: NAME}; marks the mappings that replace a parent's whole."""

    def walk(value: Value, section: type[Section]) -> None:
        if not isinstance(value.value, dict):
            return
        level = all_keys(section)
        for name, child in value.value.items():
            key = level.get(name)
            if key is None or key.section is None:
                continue
            if key.named and isinstance(child.value, dict):
                for named in child.value.values():
                    walk(named, key.section)
                continue
            short = key.section.shorthand
            if short and isinstance(child.value, str):
                child.value = {short: Value(child.value, child.origin)}
                child.replaces = True
            elif short == "preset" and isinstance(child.value, dict) and "preset" in child.value:
                child.replaces = True
            walk(child, key.section)

    walk(tree, Recipe)


def _apply_override(tree: Value, text: str, problems: list[str]) -> None:
    name, equals, value_text = text.partition("=")
    shown = f"override {text}"
    if not equals or not name.strip():
        problems.append(f"{shown}: is not of the form key=value; write for example max_steps=100")
        return
    origin = Origin("override", text)
    try:
        value = parse_yaml(value_text, lambda line: origin)
    except RecipeError as error:
        problems.append(str(error))
        return
    parts = [part.strip() for part in name.strip().split(".")]
    if "" in parts:
        problems.append(f"{shown}: the key {name.strip()!r} has an empty part; write for example optimizer.lr=1e-5")
        return
    if parts == ["extends"]:
        problems.append(f"{shown}: extends belongs in a file; make a recipe that extends the other")
        return
    if parts[-1].isdigit():
        items = _list_at(tree, parts[:-1])
        if items is not None:
            if int(parts[-1]) >= len(items):
                problems.append(
                    f"{shown}: {'.'.join(parts[:-1])} is a list of {len(items)} values; "
                    f"number them from 0 to {len(items) - 1}"
                )
                return
            items[int(parts[-1])] = value
            value, parts = Value(items, origin), parts[:-1]
    for part in reversed(parts):
        value = Value({part: value}, origin)
    _expand_shorthands(value)
    _lay_over(tree, value)


def _list_at(tree: Value, parts: list[str]) -> list[Value] | None:
    """A copy of the list that is in force at a key: the tree's, or the default; None where there is no list."""
    node: Value | None = tree
    for part in parts:
        node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
    if node is not None:
        return list(node.value) if isinstance(node.value, list) else None
    key = find_key(tuple(parts))
    if key is not None and isinstance(key.default, list):
        return [Value(item, Origin("default")) for item in key.default]
    return None


# ---------------------------------------------------------------------------------------------------------- validation


def find_key(place: Place) -> Key | None:
    """The schema's key of a place; a name the user chose counts as `*`."""
    keys = all_keys()
    names: list[str] = []
    for part in place:
        above = keys.get(".".join(names))
        names.append("*" if above is not None and above.named else str(part))
    if names and names[-1] == "*":  # the section behind a name: data.mixture.coco
        return keys.get(".".join(names[:-1]))
    return keys.get(".".join(names))


def _validate(tree: Value, shown: str) -> tuple[Recipe | None, list[str]]:
    """The recipe, or what is wrong with it, every problem one line.

    Pydantic does not compare keys with each other while one of them is wrong, so what is wrong is taken out (or, if
    misspelt beyond doubt, put right) and the rest is looked at again, until nothing new turns up.
    """
    problems: list[str] = []
    plain = tree.plain()
    _expand_paths(tree, plain, problems)
    broken = bool(problems)
    for _ in range(4):
        try:
            recipe = Recipe.model_validate(plain)
        except ValidationError as error:
            broken = True
            before = len(problems)
            repaired = _explain(error, tree, plain, shown, problems)
            if not repaired or len(problems) == before:
                break
        else:
            return (None if broken else recipe), problems
    return None, problems


def _explain(error: ValidationError, tree: Value, plain: dict[str, Any], shown: str, problems: list[str]) -> bool:
    """Adds a line for every error; takes what is wrong out of `plain`. True if another look may show more."""
    found = error.errors(include_url=False)
    renamed = {
        place[:-1] + (guess,)
        for place in (tuple(e["loc"]) for e in found if e["type"] == "extra_forbidden")
        if (guess := _sure_guess(place, plain)) is not None
    }
    repaired = False
    unions: set[Place] = set()
    for item in found:
        kind = item["type"]
        if item["loc"][-1:] == ("[key]",):  # the name of a source
            bad_name = _line(
                tree, tuple(item["loc"][:-1]), shown, "is not a good name; use letters, digits, dash and underscore"
            )
            _add(problems, bad_name)
            continue
        place = _place_in_schema(tuple(item["loc"]))
        if place != tuple(item["loc"]):  # a branch of a union: one line for all of its branches
            if place in unions:
                continue
            unions.add(place)
        if kind == "missing":
            if place in renamed or _preset_is_wrong(place, plain, found):
                continue
            key = find_key(place)
            assert key is not None
            name = ".".join(map(str, place))
            _add(
                problems, f"{_where(tree, place[:-1], shown)} {name}: is missing; give {_article(key.kind)}: {key.doc}"
            )
        elif kind == "extra_forbidden":
            _add(problems, _line(tree, place, shown, _unknown(place, plain)))
            guess = _sure_guess(place, plain)
            value = _take(plain, place)
            if guess is not None:
                _put(plain, (*place[:-1], guess), value)
            repaired = True
        elif kind == "value_error" and isinstance(item.get("ctx", {}).get("error"), Misfit):
            for name, message in item["ctx"]["error"].problems:
                inner = (*place, *(name.split(".") if name else ()))
                _add(problems, _line(tree, inner, shown, message, _value_at(item["input"], name)))
        else:
            key = find_key(place[:-1] if place and isinstance(place[-1], int) else place)  # an item is told by its list
            _add(problems, _line(tree, place, shown, _wrong_value(item, key, place)))
            if place in ONE_OF:  # without it none of them would be there, which is no second mistake
                _put(plain, place, 1)
                repaired = True
            elif place and _has_default(place) and place[-1] != "preset":  # without it every size would be missing
                _take(plain, place)
                repaired = True
    return repaired


def _add(problems: list[str], line: str) -> None:
    if line not in problems:
        problems.append(line)


def _has_default(place: Place) -> bool:
    key = find_key(place)
    return key is not None and not isinstance(place[-1], int) and key.default != REQUIRED


def _place_in_schema(loc: Place) -> Place:
    """Pydantic's location without the branches of a union it names: ("schedule", "warmup_steps", "int")."""
    while loc and find_key(loc) is None and len(loc) > 1 and find_key(loc[:-1]) is not None:
        above = find_key(loc[:-1])
        assert above is not None
        if above.section is not None or isinstance(loc[-1], int):
            return loc  # an unknown key of a section, or an item of a list
        loc = loc[:-1]
    return loc


def _unknown(place: Place, plain: dict[str, Any]) -> str:
    """What is said of a key that no recipe has."""
    name = str(place[-1])
    foreign = answer(name)
    keys = all_keys()
    if foreign is not None:
        return foreign
    if "." in name and name in keys:
        nested = ": {".join(name.split(".")) + ": ..." + "}" * name.count(".")
        return f"is not a key here: in a file keys are nested, only overrides have dots; write `{nested}`"
    guesses = _same_level_guesses(place)
    if not guesses:
        last = {path: path.rsplit(".", 1)[-1] for path in keys}
        guesses = [path for path, end in last.items() if end == name]
        if not guesses:
            near = difflib.get_close_matches(name, sorted(set(last.values())), n=2, cutoff=0.75)
            guesses = [path for path, end in last.items() if end in near]
    if guesses:
        return "is not a key of a recipe; did you mean " + " or ".join(guesses[:3]) + "?"
    level = [key.rsplit(".", 1)[-1] for key in _level(place)]
    return f"is not a key of a recipe; here stand {', '.join(level)}"


def _level(place: Place) -> list[str]:
    """The dotted keys that may stand beside a place."""
    if len(place) == 1:
        return list(names_in(Recipe))
    above = find_key(place[:-1])
    if above is None or above.section is None:
        return []
    return [f"{'.'.join(map(str, place[:-1]))}.{name}" for name in names_in(above.section)]


def names_in(section: type[Section]) -> list[str]:
    """The names directly inside a section."""
    return list(section.model_fields)


def _same_level_guesses(place: Place) -> list[str]:
    level = {path.rsplit(".", 1)[-1]: path for path in _level(place)}
    near = difflib.get_close_matches(str(place[-1]), list(level), n=2, cutoff=0.7)
    return [level[name] for name in near]


def _sure_guess(place: Place, plain: dict[str, Any]) -> str | None:
    """The key beside it that a misspelt one must be: the only close one, and not given itself."""
    if answer(str(place[-1])) is not None:
        return None
    guesses = _same_level_guesses(place)
    if len(guesses) != 1:
        return None
    guess = guesses[0].rsplit(".", 1)[-1]
    section: Any = plain
    for part in place[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    return guess if isinstance(section, dict) and guess not in section else None


def _preset_is_wrong(place: Place, plain: dict[str, Any], found: Sequence[Any]) -> bool:
    """Sizes missing only because the preset's name is not known: the preset's error says it all."""
    return any(tuple(e["loc"]) == (*place[:-1], "preset") for e in found)


_EXPECTED = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_parsing": "is not a whole number",
    "float_type": "is not a number",
    "float_parsing": "is not a number",
    "bool_type": "is neither true nor false",
    "bool_parsing": "is neither true nor false",
    "string_type": "is not a string",
    "list_type": "is not a list",
    "dict_type": "is not a mapping of names",
    "model_type": "is not a section",
    "model_attributes_type": "is not a section",
    "finite_number": "is not a finite number",
}
_SIGNS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


# What other programs call a value of ours (kinds of sources).
_OTHER_NAMES = {
    "parquet": "hf", "arrow": "hf", "datasets": "hf", "huggingface": "hf", "tar": "webdataset", "tars": "webdataset",
    "wds": "webdataset", "txt": "text", "sharegpt": "json", "llava": "json", "ndjson": "jsonl",
}  # fmt: skip


def _wrong_value(item: Any, key: Key | None, place: Place) -> str:
    """What is wrong with a value of a known key, and what would be right."""
    kind, value, ctx = item["type"], item["input"], item.get("ctx", {})
    wanted = _article(key.kind) if key is not None else "another value"
    if key is not None and isinstance(place[-1], int):
        wanted = _article(key.kind.removeprefix("list of "))
    behind_a_name = key is not None and key.named and bool(place) and find_key(place[:-1]) is key
    if behind_a_name and key is not None and key.section is None:
        wanted = _article(key.kind.removeprefix("mapping of names to "))
    elif behind_a_name and key is not None:
        return f"is not a section; give one{_inside_named(key)}"  # what stands behind a name
    if value is None and kind != "none_required":
        return f"is empty; give {wanted}" + _inside(key)
    if kind == "literal_error":
        options = [option.strip() for option in wanted.removeprefix("one of: ").removesuffix(" or null").split(",")]
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        near = [_OTHER_NAMES[str(value)]] if _OTHER_NAMES.get(str(value)) in options else near
        return f"is not one of {', '.join(options)}" + (f"; did you mean {near[0]}?" if near else "")
    if kind in _SIGNS:
        limit, words = _SIGNS[kind]
        return f"is out of range; it must be {words} {_number(ctx[limit])}"
    if kind == "string_pattern_mismatch":
        return "holds characters that a file name should not; use letters, digits, dot, dash and underscore"
    if kind in ("too_short", "too_long"):
        few = "few" if kind == "too_short" else "many"
        bound = ctx.get("min_length", ctx.get("max_length"))
        words = "at least" if few == "few" else "exactly"
        return f"has too {few} values ({ctx.get('actual_length')}); it needs {words} {bound}"
    text = _EXPECTED.get(kind, str(item["msg"]).removeprefix("Value error, "))
    return f"{text}; {_right_form(value, kind) or 'give ' + wanted}" + ("" if kind != "model_type" else _inside(key))


def _right_form(value: Any, kind: str) -> str | None:
    """How a value should have been written, where that can be told."""
    if (
        kind.startswith("bool")
        and isinstance(value, str)
        and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false")
    ):
        meant = "true" if value.lower() in ("yes", "on", "y", "true") else "false"
        return f"YAML 1.2 has true and false only: write {meant}"
    if kind.startswith(("int", "float")) and isinstance(value, str):
        digits = value.replace("_", "").replace(",", "")
        meant = scalar(digits.strip())
        if isinstance(meant, (int, float)) and not isinstance(meant, bool):
            return f"write {digits.strip()} without quotes" if digits == value else f"write {digits.strip()}"
    if kind.startswith("int") and isinstance(value, float) and value == int(value):
        return f"write {int(value)}"
    if kind.startswith("string") and isinstance(value, (int, float, bool)):
        return f"write '{describe(value)}' in quotes"
    if kind.startswith("list") and not isinstance(value, dict):
        return f"write [{value}]"
    return None


def _inside(key: Key | None) -> str:
    if key is None or key.section is None or key.named:
        return ""
    return f" with {', '.join(names_in(key.section))}"


def _inside_named(key: Key) -> str:
    return f" with {', '.join(names_in(key.section))}" if key.section is not None else ""


def _article(kind: str) -> str:
    return kind if kind.startswith("one of") else f"an {kind}" if kind[0] in "aeio" else f"a {kind}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


# -------------------------------------------------------------------------------------------- places, lines and paths


def _where(tree: Value, place: Place, shown: str) -> str:
    """The line of a place, or of the nearest section above it that has one."""
    node, best = tree, Origin("file", f"{shown}:1")
    for part in place:
        child = _child(node, part)
        if child is None:
            break
        node, best = child, child.origin
    return best.place


def _child(node: Value, part: str | int) -> Value | None:
    if isinstance(node.value, dict):
        found = node.value.get(part)
        return found if isinstance(found, Value) else None
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item if isinstance(item, Value) else None
    return None


def _line(tree: Value, place: Place, shown: str, message: str, value: Any = None) -> str:
    node: Value | None = tree
    for part in place:
        node = _child(node, part) if node is not None else None
    if node is not None:
        value = node.plain()
    # the key of an unknown section shows no value: its keys would only blur the line
    text = "" if isinstance(value, dict) or (node is None and value is None) else f"{describe(value)} "
    return f"{_where(tree, place, shown)} {'.'.join(map(str, place)) or 'recipe'}: {text}{message}"


def _value_at(section: Any, name: str) -> Any:
    """The value of a dotted key inside a validated section or a mapping; None where there is none."""
    for part in name.split(".") if name else ():
        section = section.get(part) if isinstance(section, dict) else getattr(section, part, None)
    return None if isinstance(section, (dict, Section)) else section


def _take(plain: Any, place: Place) -> Any:
    for part in place[:-1]:
        plain = plain[part]
    return plain.pop(place[-1])


def _put(plain: Any, place: Place, value: Any) -> None:
    for part in place[:-1]:
        plain = plain[part]
    plain[place[-1]] = value


def _expand_paths(tree: Value, plain: dict[str, Any], problems: list[str]) -> None:
    """Expands `~` and `${VAR}` of every path key in `plain`; a variable that is not set is a problem."""

    def walk(value: Any, place: Place) -> Any:
        key = find_key(place) if place else None
        if isinstance(value, dict):
            return {name: walk(child, (*place, name)) for name, child in value.items()}
        if key is None or not key.is_path or not isinstance(value, str):
            return value
        for variable in dict.fromkeys(_VARIABLE.findall(value)):
            if variable not in os.environ:
                problems.append(
                    _line(
                        tree,
                        place,
                        "",
                        f"names the environment variable {variable}, which is not set; "
                        f"export {variable}=..., or write the path itself",
                    )
                )
        expanded = _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)
        return os.path.expanduser(expanded) if expanded.startswith("~") else expanded

    expanded = walk(plain, ())
    plain.clear()
    plain.update(expanded)


# ------------------------------------------------------------------------------------------------------------- origins


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings are values. {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _origins(recipe: Recipe, tree: Value) -> dict[str, Origin]:
    """The origin of every effective key."""
    origins: dict[str, Origin] = {}

    def walk(section: Section, node: Value | None, prefix: str) -> None:
        preset = getattr(section, "preset", None)
        table = getattr(section, "presets", {}).get(preset, {})
        for name in type(section).model_fields:
            value = getattr(section, name)
            child = _child(node, name) if node is not None else None
            if isinstance(value, Section):
                walk(value, child, f"{prefix}{name}.")
            elif isinstance(value, dict) and value:
                for inner, named in value.items():
                    node_of = _child(child, inner) if child is not None else None
                    if isinstance(named, Section):
                        walk(named, node_of, f"{prefix}{name}.{inner}.")
                    else:  # a mapping of names to plain values
                        origin = node_of.origin if node_of is not None else Origin("default")
                        origins[f"{prefix}{name}.{inner}"] = origin
            elif child is not None:
                origins[prefix + name] = child.origin
            else:
                origins[prefix + name] = Origin("preset", preset) if preset and name in table else Origin("default")

    walk(recipe, tree, "")
    return origins
