"""What the cross-attention layers of a micro batch read, and which token reads what (see `nvlm_train.batch.Memory`).

A token sees one range of its own sample's tiles: a tag its own tile; other text those of the images before it. Both are
consecutive in the memory, so a mask is never written down: consecutive tokens that see the same range are one run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.chat import Rendered
from nvlm_train.recipe import schema


class ReadingRun(NamedTuple):
    """Tokens [begin, end) of a sample read its tiles [first, last)."""

    begin: int
    end: int
    first: int
    last: int


def runs_of(rendered: Rendered, per_tile: int, model: schema.Model) -> Iterator[ReadingRun]:
    """The runs of one sample, in order, without those that would see nothing.

    Example, nvlm_x: <Image> <tile_1> <tile_2> </Image> why, a token each: (1, 2, 0, 1), (2, 3, 1, 2), (3, 5, 0, 2).
    """
    own = model.cross_attention
    # of each image: its tiles, where the tokens begin that read it alone or after it, and where ordinary text does
    images: list[tuple[list[int], int, int]] = []
    for k, tile in enumerate(rendered.reads):
        if tile.image == len(images):
            # a thumbnail's own tokens are the last of its image
            early = per_tile if model.architecture == "nvlm_h" and own.thumbnail_reads_tiles else 0
            text = tile.behind - early
            images.append(([], tile.own[0] if tile.own[0] < tile.own[1] else text, text))
        images[-1][0].append(k)
    for i, (tiles, _, behind) in enumerate(images):
        for k in tiles:
            begin, end = rendered.reads[k].own
            if begin < end:
                yield ReadingRun(begin, end, k, k + 1)
        until = images[i + 1][1] if i + 1 < len(images) else len(rendered.input_ids)
        first = 0 if own.text_reads == "preceding_images" else tiles[0]
        seen = any(tile.in_memory for tile in rendered.reads[first : tiles[-1] + 1])
        if own.text_reads != "tags_only" and behind < until and seen:
            yield ReadingRun(behind, until, first, tiles[-1] + 1)


def lay_out_memory(
    model: schema.Model, samples: Sequence[tuple[int, Rendered]], per_tile: int, pad: int
) -> dict[str, Any]:
    """The fields of `Memory` of a micro batch, its tensors as numpy arrays.

    samples: where each begins in the flattened tokens, in the order of their tiles. pad: id of rows that are no tag.
    """
    ids: list[NDArray[np.int64]] = []
    slots: list[NDArray[np.int64]] = []
    queries: list[NDArray[np.int64]] = []
    rows: list[NDArray[np.int64]] = []
    memory = slot = 0  # rows and image tokens of the samples before
    for start, rendered in samples:
        sizes = [len(tile.tag_ids) + per_tile if tile.in_memory else 0 for tile in rendered.reads]
        ends = np.cumsum([memory, *sizes])
        memory = int(ends[-1])
        for run in runs_of(rendered, per_tile, model):
            queries.append(np.arange(start + run.begin, start + run.end))
            rows.append(np.arange(ends[run.first], ends[run.last]))
        for k, tile in enumerate(rendered.reads):
            if not tile.in_memory:
                continue
            if model.architecture == "nvlm_h":
                first = slot + k * per_tile
                ids += [np.array(tile.tag_ids, dtype=np.int64), np.full(per_tile, pad)]
                slots += [np.full(len(tile.tag_ids), -1), np.arange(first, first + per_tile)]
        slot += len(rendered.tile_starts) * per_tile
    return {
        "ids": _joined(ids, np.int64),
        "slots": _joined(slots, np.int64),
        "query_rows": _joined(queries, np.int64),
        "cu_queries": np.cumsum([0, *map(len, queries)], dtype=np.int32),
        "rows": _joined(rows, np.int64),
        "cu_rows": np.cumsum([0, *map(len, rows)], dtype=np.int32),
        "max_queries": max(map(len, queries), default=0),
        "max_rows": max(map(len, rows), default=0),
    }


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype, copy=False)
