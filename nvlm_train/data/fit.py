"""What becomes of a sample that is too long, or has too many tiles: one rule, for the index and for the loader.

`fit` decides from lengths alone, before any image is decoded: the tile maximum of all images of the sample, its tokens,
and whether its text is cut. The loader repeats nothing of it: it cuts with the tile maximum that the index kept, and
`shorten` takes off the text that the index did not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nvlm_train.batch import IGNORE_INDEX
from nvlm_train.data import chat, tiling
from nvlm_train.data.images import BadSample
from nvlm_train.recipe import schema

OVERLONG = "over-long"
TOO_MANY_IMAGES = "too many images"
FEWER_TILES, TRUNCATED = 1, 2  # bits of the index's `lowered`
_LIMITS = (8, 6, 4, 2, 1)  # Megatron's order of lowering the tile maximum of an over-long sample
_MOST_TILES = 65535  # an index row counts them in 16 bits


class Fit(NamedTuple):
    """How a sample is used. max_tiles: of each of its images. changed: bits FEWER_TILES, TRUNCATED; 0 as it came.

    `shared` images are cut into fewer tiles because of max_tiles_per_sample; that alone is not counted in `changed`.
    """

    max_tiles: int
    tiles: int
    tokens: int
    trained: int
    changed: int


def fit(
    sizes: Sequence[tuple[int, int]],
    max_tiles: int,
    settings: schema.Tiling,
    tile_size: int,
    max_tokens: int,
    policy: str,
    lay_out: Callable[[list[int]], list[chat.Run]],
    lengths_of: Callable[[list[chat.Run]], Mapping[str, int]],
) -> Fit:
    """How a sample with images of these sizes fits into `max_tokens`.

    policy: data.overlong. lay_out: tiles per image -> runs. lengths_of: runs -> the token count of each of their texts.
    Raises BadSample, reason OVERLONG or TOO_MANY_IMAGES, where it cannot be used.
    """

    def tiles_at(limit: int) -> list[int]:
        return [tiling.num_tiles(w, h, limit, tile_size, settings.thumbnail) for w, h in sizes]

    budget = settings.max_tiles_per_sample
    top = tiling.shared_limit(sizes, max_tiles, budget, tile_size, settings.thumbnail)
    if top == 0:
        raise BadSample(
            TOO_MANY_IMAGES,
            f"{len(sizes)} images are more than data.tiling.max_tiles_per_sample {budget}, one tile each",
        )
    limits = [top]
    if policy == "fewer_tiles" and sizes:
        limits += [limit for limit in _LIMITS if limit < top]
    for limit in limits:
        tiles = tiles_at(limit)
        runs = lay_out(tiles)
        length = lengths_of(runs)
        tokens, trained = chat.count_tokens(runs, length)
        if tokens <= max_tokens:
            if sum(tiles) > _MOST_TILES:
                raise BadSample(OVERLONG, f"{sum(tiles)} tiles are more than {_MOST_TILES}")
            return Fit(limit, sum(tiles), tokens, trained, FEWER_TILES if limit < top else 0)
    if policy == "truncate_text":
        kept, left = _whole_part(runs, length), chat.count_tokens(runs, length, max_tokens)[1]
        if kept <= max_tokens and left and sum(tiles) <= _MOST_TILES:
            return Fit(limit, sum(tiles), max_tokens, left, TRUNCATED)
        why = f"its images alone end at token {kept}" if kept > max_tokens else "nothing to train on would be left"
        raise BadSample(OVERLONG, f"{tokens} tokens are more than {max_tokens}, and {why}")
    raise BadSample(OVERLONG, f"{tokens} tokens are more than {max_tokens}")


def _whole_part(runs: Sequence[chat.Run], length_of: Mapping[str, int]) -> int:
    """Tokens up to the end of the text that closes the last image: what truncation must not touch."""
    at = whole = 0
    closing = False
    for run in runs:
        at += run.times if run.text is None else length_of[run.text]
        if run.is_tile or closing:
            whole, closing = at, run.is_tile
    return whole


def shorten(rendered: chat.Rendered, max_tokens: int) -> chat.Rendered:
    """The first `max_tokens` tokens; what the last of them would have predicted is gone, so its label is too.

    Example, at 3: ids [5, 6, 7, 8], labels [-100, 7, 8, -100] become [5, 6, 7] and [-100, 7, -100].
    """
    if len(rendered.input_ids) <= max_tokens:
        return rendered
    labels = rendered.labels[:max_tokens].copy()  # [max_tokens]
    labels[-1] = IGNORE_INDEX
    return chat.Rendered(rendered.input_ids[:max_tokens], labels, rendered.tile_starts, rendered.reads)
