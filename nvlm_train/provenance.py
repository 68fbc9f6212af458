"""What weights derive from: base weights and data, each with its licence, where it comes from and what it held.

A run writes this down when it starts (`parts` in recipe.json, licence texts in RUN/licenses), because folders move and
change; what an earlier run or an export of ours recorded is taken on. An export carries it further in provenance.json.
What licences mean is judged when an export is made (`export/licence.py`), not here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nvlm_train.errors import CheckpointError
from nvlm_train.hub import local_folder
from nvlm_train.recipe.schema import HUB_PATH

RECORD = "provenance.json"  # of an export
FORMAT = 1
RESEARCH_KEY = "non_commercial_research"  # in an export's config.json: the licence that says so
TEXTS = "licenses"  # below a run: the licence texts of its parts, each as SHA256.txt
WEIGHTS = ("model", "vision", "language_model")  # folders below init_from
_TEXT_NAMES = ("LICENSE*", "LICENCE*", "NOTICE*", "Notice*", "incl_licenses/*")
_LARGEST_TEXT = 2**20


@dataclass(frozen=True)
class Part:
    """Something the weights derive from.

    kind: 'weights' or 'data'. name: its name in the recipe. license, source: as the recipe states them. found: what the
    folder says of its own licence. path: where the run found it. content: SHA-256 of each file of weights; of data,
    under 'index', that of its rows' contents and lengths. texts: SHA-256 of each licence text that lay beside it.
    recorded: what it is made of is recorded too, and follows in the list.
    """

    kind: str
    name: str
    license: str | None = None
    source: str | None = None
    found: tuple[str, ...] = ()
    path: str | None = None
    content: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    recorded: bool = False

    @property
    def key(self) -> str:
        """As people name it: `weights.vision`, `data.captions`."""
        return f"{self.kind}.{self.name}"

    @property
    def licences(self) -> tuple[str, ...]:
        """The stated one and those found beside it."""
        return tuple(dict.fromkeys([*([self.license] if self.license else []), *self.found]))


def as_record(part: Part, *, with_path: bool = True) -> dict[str, Any]:
    """The part for a JSON file, empty fields left out."""
    values = {item.name: getattr(part, item.name) for item in fields(Part)}
    values |= {"found": list(part.found), "content": dict(part.content), "texts": dict(part.texts)}
    values["path"] = part.path if with_path else None
    return {name: value for name, value in values.items() if value or name in ("license", "source")}


def from_record(values: Any) -> Part:
    """A part as `as_record` wrote it. Raises ValueError for anything else: the file may be anybody's."""
    if not isinstance(values, dict) or values.get("kind") not in ("weights", "data"):
        raise ValueError("a part is a mapping with kind 'weights' or 'data'")
    license, source, path = (values.get(name) for name in ("license", "source", "path"))
    content, texts = (values.get(name) or {} for name in ("content", "texts"))
    found = values.get("found") or []
    good = isinstance(values.get("name"), str) and all(v is None or isinstance(v, str) for v in (license, source, path))
    good &= isinstance(found, list) and all(isinstance(value, str) for value in found)
    for table in (content, texts):
        good &= isinstance(table, dict) and all(isinstance(text, str) for item in table.items() for text in item)
    if not good:
        raise ValueError(f"part {values.get('name')!r} has fields of other types")
    recorded = values.get("recorded") is True
    return Part(
        values["kind"], values["name"], license, source, tuple(found), path, content, texts, recorded
    )  # fmt: skip


def union(parts: Iterable[Part]) -> list[Part]:
    """The parts without repeats, in their order; of two that differ in hashes alone, the one that has them."""
    found: dict[tuple[Any, ...], Part] = {}
    for part in parts:
        key = (part.kind, part.name, part.license, part.source, part.found, part.path)
        before = found.get(key)
        if before is None or (part.content and not before.content):
            found[key] = part
    return list(found.values())


# ------------------------------------------------------------------------------------------------ what a folder says


@dataclass(frozen=True)
class Described:
    """found: licences that a folder states for itself. texts: name and content.

    parts: what an export of ours records; source: which run it is of.
    """

    found: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)
    source: str | None = None


def describe(folder: Path) -> Described:
    """Licences in the metadata of a folder's README.md, in its provenance.json and config.json, and its licence texts.

    Raises CheckpointError where there is a provenance.json that cannot be read: its parts would be lost.
    """
    if not folder.is_dir():
        return Described()
    found = [*_of_card(folder / "README.md"), *_of_config(folder / "config.json")]
    parts: tuple[Part, ...] = ()
    source = None
    if (folder / RECORD).is_file():
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')!r}, this version reads {FORMAT}")
            parts = tuple(from_record(part) for part in content["parts"])
            source = f"{content.get('run_name')}, an export of nvlm_train"
            found += [content["license"]] if isinstance(content.get("license"), str) else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / RECORD} cannot be read ({error}), so the licences behind these weights would be lost; put "
                "the file back that the export wrote"
            ) from None
    texts = {}
    for pattern in _TEXT_NAMES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.stat().st_size <= _LARGEST_TEXT:
                texts[str(file.relative_to(folder))] = file.read_bytes()
    unsaid = ("other", "not-stated", "not stated")
    once = {_spelling(text): text.strip() for text in reversed(found) if text.strip().lower() not in unsaid}
    return Described(tuple(reversed(once.values())), parts, texts, source)


def _spelling(text: str) -> str:
    return text.strip().lower().replace(" ", "-").replace("_", "-")


def metadata_of_card(file: Path) -> dict[str, Any]:
    """The YAML between the first two lines `---` of a README.md; empty where there is none that can be read."""
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            text = stream.read(_LARGEST_TEXT)
    except OSError:
        return {}
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((n for n, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
    try:
        found = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _of_card(file: Path) -> list[str]:
    metadata = metadata_of_card(file)
    stated = metadata.get("license")
    names = stated if isinstance(stated, list) else [stated]
    names = [metadata.get("license_name") if name == "other" else name for name in names]
    return [name for name in names if isinstance(name, str)]


def _of_config(file: Path) -> list[str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get(RESEARCH_KEY)
    except (OSError, ValueError, AttributeError):
        return []
    return [found] if isinstance(found, str) else []


# ------------------------------------------------------------------------------------------------- what a recipe says


def parts_of(
    recipe: Mapping[str, Any],
    earlier_run: Mapping[str, Any] | None = None,
    *,
    hashes: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    texts: dict[str, bytes] | None = None,
) -> list[Part]:
    """Weights and data named in a recipe (dictionary form), and all that is behind them, without repeats.

    earlier_run: what recipe.json recorded of the run behind `init_from.run`: path, sha256, recipe, earlier_run, parts.
    hashes: SHA-256 of files by absolute path. digests: of each source's index. texts: takes the licence texts that lie
    in the folders, by SHA-256. Folders that are gone say nothing.
    CheckpointError when the recipe started from a run that is not recorded: its licences would be lost.
    """
    parts: list[Part] = []
    init_from = recipe.get("init_from") or {}
    for name in WEIGHTS:
        if init_from.get(name):
            parts += _of_folder("weights", name, init_from[name], hashes or {}, {} if texts is None else texts)
    for name, source in ((recipe.get("data") or {}).get("mixture") or {}).items():
        found = _of_folder("data", name, source, {}, {})[0]
        digest = (digests or {}).get(name)
        parts.append(replace(found, content={"index": digest}) if digest else found)
    run = init_from.get("run")
    if run:
        if earlier_run is None:
            raise CheckpointError(
                f"init_from.run {run['path']!r} is not recorded in the run's recipe.json, so the licences behind it "
                "are not known; start the run once more with this version of nvlm_train, it records them"
            )
        stated = run.get("license") or earlier_run["recipe"].get("license")
        source = run.get("source") or Path(run["path"]).name
        digest = earlier_run.get("sha256")
        content = {"state.json": digest} if digest else {}  # which holds the sums of all files of a checkpoint
        parts.append(Part("weights", "run", stated, source, path=run["path"], content=content, recorded=True))
        parts += parts_of_run(earlier_run)
    return union(parts)


def parts_of_run(content: Mapping[str, Any]) -> list[Part]:
    """The parts in a run's recipe.json; of a run of an older version, what its recipe says."""
    if content.get("parts") is None:
        return parts_of(content["recipe"], content.get("earlier_run"))
    try:
        return [from_record(part) for part in content["parts"]]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"parts in recipe.json: {error}") from None


def _of_folder(
    kind: str, name: str, given: Mapping[str, Any], hashes: Mapping[str, str], texts: dict[str, bytes]
) -> list[Part]:
    """The part that one entry of a recipe names, and what is recorded behind it."""
    path = str(given.get("path"))
    in_hub = HUB_PATH.fullmatch(path)
    folder: Path | None = None
    if "://" not in path or in_hub:
        try:
            folder = local_folder(path)
        except CheckpointError:
            folder = None  # not on this machine any more
    described = describe(folder) if folder is not None else Described()
    content = {}
    if folder is not None:
        root = Path(os.path.abspath(folder))
        for place, digest in sorted(hashes.items()):
            if Path(place).is_relative_to(root):
                content[str(Path(place).relative_to(root))] = digest
    named = {}
    for file, text in described.texts.items():
        named[file] = hashlib.sha256(text).hexdigest()
        texts[named[file]] = text
    source = given.get("source") or (in_hub["repo"] if in_hub else described.source)
    part = Part(
        kind, name, given.get("license"), source, described.found, path, content, named, bool(described.parts)
    )  # fmt: skip
    return [part, *described.parts]


# --------------------------------------------------------------------------------------------------- in a run's folder


def later_parts(before: Sequence[Part], now: Sequence[Part]) -> list[Part]:
    """The parts of a run that goes on: what an earlier attempt trained on stays behind the weights.

    A part that is named as before (kind, name, path) has the licence that is stated now, and keeps its hashes.
    """

    def place(part: Part) -> tuple[str, str, str | None]:
        return part.kind, part.name, part.path

    then = {place(part): part for part in before}
    kept = []
    for part in now:
        old = then.get(place(part))
        if old is not None:
            part = replace(
                part,
                content=part.content or old.content,
                texts={**old.texts, **part.texts},
                found=part.found or old.found,
            )
        kept.append(part)
    named = {place(part) for part in now}
    return union([*kept, *(part for part in before if place(part) not in named)])


def write_texts(run: Path, texts: Mapping[str, bytes]) -> None:
    """Keeps licence texts below a run, by their SHA-256."""
    for digest, text in texts.items():
        file = run / TEXTS / f"{digest}.txt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text)


def read_texts(run: Path, parts: Iterable[Part]) -> dict[str, bytes]:
    """The texts of parts that are kept below a run, or lie in the part's folder still; others are left out."""
    found: dict[str, bytes] = {}
    for part in parts:
        for name, digest in part.texts.items():
            files = [run / TEXTS / f"{digest}.txt"]
            if part.path and not Path(name).is_absolute() and ".." not in Path(name).parts:
                files.append(Path(part.path) / name)  # of a run of which only recipe.json was copied
            for file in files:
                if file.is_file() and file.stat().st_size <= _LARGEST_TEXT:
                    text = file.read_bytes()
                    if hashlib.sha256(text).hexdigest() == digest:
                        found[digest] = text
                        break
    return found
