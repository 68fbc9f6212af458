"""Dynamic high-resolution tiling: which grid an image is cut into, and the cut itself.

The rule of InternVL 1.5, which the NVLM paper uses unchanged (section 4.1): of all grids of at most `max_tiles` tiles
take the one whose aspect is nearest to the image's, stretch the image onto it, cut row by row, and let a thumbnail of
the whole follow where there is more than one tile.
"""

from __future__ import annotations

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


def cut(image: Image.Image, max_tiles: int, tile_size: int, thumbnail: bool) -> NDArray[np.uint8]:
    """Cuts an RGB image into tiles, row by row, the thumbnail last.

    Returns u8[t, 3, px, px]. The image is stretched to the grid without keeping its aspect (Pillow's bicubic). An image
    of one tile gets no thumbnail: the tile is the whole image already.
    """
    if image.mode != "RGB":
        raise ValueError(f"image mode {image.mode!r}; cut() takes RGB, as open_image() returns it")
    columns, rows = choose_grid(image.width, image.height, max_tiles, tile_size)
    px = tile_size
    whole = np.asarray(image.resize((columns * px, rows * px), Image.Resampling.BICUBIC))  # [rows*px, columns*px, 3]
    count = columns * rows
    tiles = np.empty((count + (1 if thumbnail and count > 1 else 0), 3, px, px), dtype=np.uint8)  # [T, 3, px, px]
    grid = whole.reshape(rows, px, columns, px, 3).transpose(0, 2, 4, 1, 3)  # [rows, columns, 3, px, px]
    tiles[:count] = grid.reshape(count, 3, px, px)
    if len(tiles) > count:
        small = np.asarray(image.resize((px, px), Image.Resampling.BICUBIC))  # [px, px, 3]
        tiles[count] = small.transpose(2, 0, 1)
    return tiles
