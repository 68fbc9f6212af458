"""Dynamic high-resolution tiling: which grid an image is cut into, and the cut itself.

The rule of InternVL 1.5, which the NVLM paper uses unchanged (section 4.1): of all grids of at most `max_tiles` tiles
take the one whose aspect is nearest to the image's, stretch the image onto it, cut row by row, and let a thumbnail of
the whole follow where there is more than one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grid = tuple[int, int]  # columns, rows


@lru_cache(maxsize=32)
def grids(max_tiles: int) -> tuple[Grid, ...]:
    """All grids of 1 to `max_tiles` tiles, smaller areas first; 14 of them for 6 tiles.

    Inside one area the order is ours; it never decides, because two grids of one area are never both nearest (tested
    for every limit up to 12 at all exact midpoints).
    """
    pairs = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles]
    return tuple(sorted(pairs, key=lambda grid: (grid[0] * grid[1], grid)))


@lru_cache(maxsize=65536)
def choose_grid(width: int, height: int, max_tiles: int, tile_size: int) -> Grid:
    """Columns and rows for an image of `width` x `height` pixels.

    The grid i:j with the smallest |W/H - i/j|; on an exact tie the later, larger grid wins only if the image has more
    than half its pixels: W*H > 0.5 * tile_size^2 * i * j. Example at 448 pixels and 6 tiles: a square of 600 x 600
    gives (1, 1), one of 640 x 640 (409,600 > 401,408 pixels) gives (2, 2). Source: the published model card's rule.
    """
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids(max_tiles):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * tile_size * tile_size * columns * rows:
            best = (columns, rows)
    return best


def num_tiles(width: int, height: int, max_tiles: int, tile_size: int, thumbnail: bool) -> int:
    """Tiles of an image of this size, thumbnail counted."""
    columns, rows = choose_grid(width, height, max_tiles, tile_size)
    return columns * rows + (1 if thumbnail and columns * rows > 1 else 0)


def shared_limit(
    sizes: Sequence[tuple[int, int]], max_tiles: int, budget: int | None, tile_size: int, thumbnail: bool
) -> int:
    """The tile maximum for every image of a sample whose tiles together may not be more than `budget`.

    The largest limit up to `max_tiles` that keeps within it, thumbnails counted; 0 where even one tile an image is too
    much (more images than tiles), and `max_tiles` where budget is None. Example: three square pages of 4 tiles + 1
    thumbnail and a budget of 10 tiles: limit 3, a tile each.
    """
    if budget is None:
        return max_tiles
    for limit in range(max_tiles, 0, -1):
        if sum(num_tiles(width, height, limit, tile_size, thumbnail) for width, height in sizes) <= budget:
            return limit
    return 0


def cut(
    image: Image.Image,
    max_tiles: int,
    tile_size: int,
    thumbnail: bool,
    fast: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Cuts an RGB image into tiles, row by row, the thumbnail last.

    Returns u8[t, 3, px, px]: the first t of `out` where it is given and long enough (else an array of its own). The
    image is stretched to the grid without keeping its aspect (Pillow's bicubic, or torch's where `fast`). An image of
    one tile gets no thumbnail: the tile is the whole image already.
    """
    if image.mode != "RGB":
        raise ValueError(f"image mode {image.mode!r}; cut() takes RGB, as open_image() returns it")
    columns, rows = choose_grid(image.width, image.height, max_tiles, tile_size)
    px = tile_size
    resize = _fast_resizer(image) if fast else _exact_resizer(image)
    whole = resize(columns * px, rows * px)  # [rows*px, columns*px, 3]
    count = columns * rows
    total = count + (1 if thumbnail and count > 1 else 0)
    tiles = out[:total] if out is not None and len(out) >= total else np.empty((total, 3, px, px), dtype=np.uint8)
    grid = whole.reshape(rows, px, columns, px, 3).transpose(0, 2, 4, 1, 3)  # [rows, columns, 3, px, px]
    tiles[:count].reshape(rows, columns, 3, px, px)[...] = grid
    if total > count:
        tiles[count] = resize(px, px).transpose(2, 0, 1)  # [3, px, px]
    return tiles


def _exact_resizer(image: Image.Image) -> Callable[[int, int], NDArray[np.uint8]]:
    half: dict[int, Image.Image] = {}  # a grid of one column and its thumbnail share the pass over rows

    def resized(width: int, height: int) -> NDArray[np.uint8]:
        if width not in half:
            half[width] = image.resize((width, image.height), Image.Resampling.BICUBIC)
        return np.asarray(half[width].resize((width, height), Image.Resampling.BICUBIC))  # [height, width, 3]

    return resized


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bicubic, rows first: the result of every Pillow before 13, and of this function with any.

    Pillow 13 takes the columns of tall images first. The order shows, because values are rounded and cut off at 0 and
    255 in between: by 0.4 of 255 on the mean pixel of a page of text, three times what rounding to bf16 costs. The
    models that are continued here saw rows first.
    """
    return image.resize((width, image.height), Image.Resampling.BICUBIC).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def _fast_resizer(image: Image.Image) -> Callable[[int, int], NDArray[np.uint8]]:
    """torch's bicubic with antialias on uint8: Pillow's filter in whole-number arithmetic. The same bytes on every CPU
    type that was tried (default, AVX2, AVX512)."""
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image))  # [H, W, 3]; a copy, because torch wants memory it may write to
    source = pixels.permute(2, 0, 1).unsqueeze(0)  # [1, 3, H, W], channels last

    def resize(width: int, height: int) -> NDArray[np.uint8]:
        if (width, height) == image.size:
            scaled = source
        else:
            scaled = interpolate(source, size=(height, width), mode="bicubic", antialias=True)  # [1, 3, height, width]
        found: NDArray[np.uint8] = scaled.squeeze(0).permute(1, 2, 0).numpy()  # [height, width, 3]
        return found

    return resize
