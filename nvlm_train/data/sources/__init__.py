"""Where samples come from: files of many formats, read at any position, brought into one form.

    kind         what `path` names                                            a record
    jsonl        files of one JSON object a line                              a line
    json         one JSON array                                               an element
    internvl     a meta file naming annotations (JSONL)                       becomes a source of its own for each
    hf           parquet files, or a folder of Dataset.save_to_disk           a row
    webdataset   tars, or a folder prepared by Energon                        the members of one key
    energon      a blend of such folders, as Megatron-Energon's YAML has it   becomes a source of its own for each
    text         .jsonl, .json or .parquet with {text}, .txt                  a document

`rows` says which forms a record may have; `source.Source` is what all have in common.
"""

from __future__ import annotations

import os

from nvlm_train.data.sources.blends import expand_sources
from nvlm_train.data.sources.files import is_url, list_files
from nvlm_train.data.sources.lines import JsonlSource, JsonSource, Line, TextSource
from nvlm_train.data.sources.rows import BELOW_RATING, MARKER, ImageRef, Sample, parse_line, parse_row
from nvlm_train.data.sources.source import OFFSET_BITS, Record, Source, Unit, part_of, position
from nvlm_train.errors import DataError
from nvlm_train.recipe import schema

__all__ = [
    "BELOW_RATING", "MARKER", "OFFSET_BITS", "ImageRef", "JsonSource", "JsonlSource", "Line", "Record", "Sample",
    "Source", "TextSource", "Unit", "expand_sources", "open_source", "parse_line", "parse_row", "part_of", "position",
]  # fmt: skip

_TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".arrow")


def open_source(name: str, settings: schema.Source) -> Source:
    """The source that a recipe names. Raises DataError when it cannot be opened, or is unusable as a whole."""
    if settings.kind == "jsonl":
        return JsonlSource(name, settings)
    if settings.kind == "json":
        return JsonSource(name, settings)
    if settings.kind == "hf":
        return _open_hf(name, settings)
    if settings.kind == "webdataset":
        from nvlm_train.data.sources.tar import WebDatasetSource

        return WebDatasetSource(name, settings)
    if settings.kind == "text":
        return _open_text(name, settings)
    raise ValueError(f"kind {settings.kind!r} stands for several sources; expand_sources() first")


def _open_hf(name: str, settings: schema.Source) -> Source:
    try:
        from nvlm_train.data.sources.parquet import open_hf

        return open_hf(name, settings)
    except ImportError as error:
        raise DataError(
            f"source {name!r}: kind {settings.kind} needs the package {error.name}; pip install 'nvlm_train[hf]'."
        ) from error


def _open_text(name: str, settings: schema.Source) -> Source:
    what = "`path` names .txt, .jsonl, .json or .parquet files, or a folder of them."
    files = list_files(name, settings.path, _TEXT_SUFFIXES, what)
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) > 1 and not is_url(settings.path) and ".arrow" not in kinds:
        raise DataError(
            f"source {name!r}: {settings.path} holds files of several kinds ({', '.join(sorted(kinds))}); "
            "name those of one kind, for example by *.txt."
        )
    if kinds & {".parquet", ".arrow"}:
        return _open_hf(name, settings)
    if kinds == {".jsonl"}:
        return JsonlSource(name, settings)
    return JsonSource(name, settings) if kinds == {".json"} else TextSource(name, settings)
