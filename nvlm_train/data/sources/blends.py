"""Files that name other data: InternVL's meta files and Energon's blends. Each entry becomes a source of its own.

The names of the new sources are `<source>-<entry>`; together they have the weight of the source that named them.

InternVL: an entry's share is its number of lines times its repeat_time, as in a concatenation. A repeat_time below 1
also takes only that first part of the lines, one above 1 lets them come so many times as often; max_dynamic_patch is
the entry's max_tiles, shared by the images of a sample.

Energon: `blend` has weights. `blend_epochized` has repetitions, so that shares are repetitions times the samples that
`.nv-meta/.info.json` counts. Blends may name further blends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from nvlm_train.data.sources.files import ByteFile
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

_DEEPEST = 8
_BLOCK = 8 << 20


def expand_sources(recipe: schema.Recipe) -> schema.Recipe:
    """The recipe with every source that stands for several replaced by those. Raises DataError with all problems."""
    problems: list[str] = []
    mixture = _expand_all(recipe.data.mixture, problems)
    given = recipe.validation.sources if recipe.validation else {}
    validation = _expand_all(given, problems)
    for name in sorted(set(mixture) & set(validation)):
        problems.append(f"source {name!r} is named by data.mixture and by validation.sources; rename one of the two.")
    if problems:
        raise DataError("\n".join(problems))
    if mixture != recipe.data.mixture:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mixture": mixture})})
    if recipe.validation is not None and validation != given:
        recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"sources": validation})})
    return recipe


def _expand_all(sources: Mapping[str, schema.Source], problems: list[str]) -> dict[str, schema.Source]:
    found: dict[str, schema.Source] = {}
    for name, settings in sources.items():
        try:
            parts = _expand(name, settings)
        except DataError as error:
            problems.append(str(error))
            continue
        for part, inner in parts.items():
            if part in found or (part != name and part in sources):
                problems.append(f"source {part!r} comes twice; rename {name!r} or the other.")
            found[part] = inner
    return found


def _expand(name: str, settings: schema.Source) -> dict[str, schema.Source]:
    if settings.kind == "internvl":
        return _internvl(name, settings)
    if settings.kind == "energon":
        return _shares(name, settings, _energon(name, settings, settings.path, settings.split, 1.0, 0))
    return {name: settings}


def _shares(
    name: str, settings: schema.Source, entries: list[tuple[str, schema.Source, float]]
) -> dict[str, schema.Source]:
    """Names that are unique, and weights that add up to the source's."""
    total = sum(share for _, _, share in entries)
    if not entries or not 0 < total < float("inf"):
        raise DataError(f"source {name!r}: the weights in {settings.path} sum to {total:g}; they must be above 0.")
    found: dict[str, schema.Source] = {}
    for label, inner, share in entries:
        if share == 0:
            continue
        base = f"{name}-{re.sub(r'[^A-Za-z0-9_-]+', '_', label).strip('_') or 'part'}"
        unique, k = base, 1
        while unique in found:
            unique, k = f"{base}_{k}", k + 1
        found[unique] = inner.model_copy(update={"weight": settings.weight * share / total})
    return found


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if good else None


# ------------------------------------------------------------------------------------------------------------ InternVL


def _internvl(name: str, settings: schema.Source) -> dict[str, schema.Source]:
    from nvlm_train.data.sources.tar import read_yaml

    meta = read_yaml(name, settings.path)
    problems: list[str] = []
    entries = []
    for label, entry in meta.items():
        where = f"source {name!r}: {settings.path}: {label}"
        annotation = entry.get("annotation") if isinstance(entry, dict) else None
        if not isinstance(annotation, str):
            problems.append(f"{where} has no annotation; an entry is {{root, annotation, repeat_time}}.")
            continue
        repeat = _number(entry.get("repeat_time", 1))
        patches = entry.get("max_dynamic_patch")
        if repeat is None or repeat == 0:
            problems.append(f"{where}: repeat_time {entry.get('repeat_time')!r} is not a number above 0.")
            continue
        if patches is not None and not (type(patches) is int and 1 <= patches <= 12):
            problems.append(f"{where}: max_dynamic_patch {patches!r} is not a whole number from 1 to 12.")
            continue
        try:
            lines = count_lines(name, annotation)
        except DataError as error:
            problems.append(str(error))
            continue
        taken = max(1, int(lines * repeat)) if repeat < 1 else lines
        root = entry.get("root")
        inner = settings.model_copy(
            update={
                "kind": "jsonl",
                "path": annotation,
                "image_root": root if isinstance(root, str) and root else settings.image_root,
                "max_tiles": patches or settings.max_tiles,
                "max_tiles_shared": True,
                "max_samples": min(taken, settings.max_samples or taken) if repeat < 1 else settings.max_samples,
            }
        )
        entries.append((str(label), inner, lines * repeat))
    if problems:
        raise DataError("\n".join(problems))
    return _shares(name, settings, entries)


def count_lines(name: str, path: str) -> int:
    """Lines of a file that are not blank; the file is not held in memory."""
    file = ByteFile(name, path)
    count, held, at = 0, b"", 0
    while at < file.size:
        block = file.read_on(at, _BLOCK)
        if not block:
            break
        at += len(block)
        lines = (held + block).split(b"\n")
        held = lines.pop()
        count += sum(1 for line in lines if line.strip())
        held = held if len(held) < _BLOCK else held[:1]
    return count + (1 if held.strip() else 0)


# ------------------------------------------------------------------------------------------------------------- Energon


def _energon(
    name: str, settings: schema.Source, path: str, split: str, share: float, depth: int
) -> list[tuple[str, schema.Source, float]]:
    if depth > _DEEPEST:
        raise DataError(f"source {name!r}: {path} names blends that name blends, more than {_DEEPEST} deep; a circle?")
    if os.path.isdir(path):
        folder = path if os.path.basename(os.path.normpath(path)) != ".nv-meta" else os.path.dirname(path)
        inner = settings.model_copy(update={"kind": "webdataset", "path": folder, "split": split})
        return [(os.path.basename(os.path.normpath(folder)), inner, share)]
    if path.endswith(".jsonl"):
        inner = settings.model_copy(update={"kind": "jsonl", "path": path})
        return [(os.path.splitext(os.path.basename(path))[0], inner, share)]
    from nvlm_train.data.sources.tar import read_yaml

    content = read_yaml(name, path)
    splits = content.get("splits")
    part = splits.get(split) if isinstance(splits, dict) else None
    if not isinstance(part, dict):
        known = ", ".join(map(str, splits)) if isinstance(splits, dict) else "none"
        raise DataError(f"source {name!r}: {path} has no split {split!r}; it has {known}; set `split` to one.")
    by_repetition = "blend_epochized" in part
    listed = next((part[key] for key in ("blend", "blend_epochized", "datasets") if key in part), None)
    if listed is None:
        listed = [{**part, "weight": 1}]  # a single data set
    if not isinstance(listed, list) or not listed:
        raise DataError(f"source {name!r}: {path}: the blend of {split!r} is not a list of data sets.")
    problems: list[str] = []
    found = []
    for number, entry in enumerate(listed, start=1):
        where = f"source {name!r}: {path}: entry {number} of {split!r}"
        inner_path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(inner_path, str):
            problems.append(f"{where} has no path (joined data sets are not read).")
            continue
        key = "repetitions" if by_repetition else "weight"
        weight = _number(entry.get(key, 1))
        if weight is None:
            problems.append(f"{where}: {key} {entry.get(key)!r} is not a number of 0 or more.")
            continue
        inner_path = os.path.join(os.path.dirname(path), inner_path)
        if not os.path.exists(inner_path):
            problems.append(f"{where}: {inner_path} is not there; paths are relative to this file.")
            continue
        try:
            parts = _energon(name, settings, inner_path, str(entry.get("split_part") or split), 1.0, depth + 1)
            counts = [_count_samples(name, one) * amount for _, one, amount in parts] if by_repetition else None
        except DataError as error:
            problems.append(str(error))
            continue
        total = sum(amount for _, _, amount in parts)
        for k, (label, one, amount) in enumerate(parts):
            portion = counts[k] if counts is not None else amount / total if total else 0.0
            found.append((label, one, share * weight * portion))
    if problems:
        raise DataError("\n".join(problems))
    return found


def _count_samples(name: str, settings: schema.Source) -> float:
    """How many samples an Energon folder's own count says it has in the chosen split."""
    if settings.kind == "jsonl":
        return float(count_lines(name, settings.path))
    from nvlm_train.data.sources.tar import read_meta

    meta = read_meta(name, settings)
    if meta is None or meta.num_samples is None:
        raise DataError(f"source {name!r}: {settings.path} has no .nv-meta with counts, which repetitions need.")
    return float(meta.num_samples)
