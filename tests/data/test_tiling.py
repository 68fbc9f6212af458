"""Tiling against a second implementation of the rule and against transformers' processor."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow_version

from nvlm_train.data.tiling import choose_grid, cut, grids, num_tiles


def naive_grid(width: int, height: int, limit: int, size: int) -> tuple[int, int]:
    """The published rule in its own order: grids of a hash set sorted by area alone; the later may win a tie."""
    found = {
        (i, j) for n in range(1, limit + 1) for i in range(1, n + 1) for j in range(1, n + 1) if 1 <= i * j <= limit
    }
    ordered = sorted(found, key=lambda grid: grid[0] * grid[1])
    best, nearest = (1, 1), float("inf")
    for grid in ordered:
        difference = abs(width / height - grid[0] / grid[1])
        if difference < nearest:
            nearest, best = difference, grid
        elif difference == nearest and width * height > 0.5 * size * size * grid[0] * grid[1]:
            best = grid
    return best


def sizes(limit: int, size: int) -> list[tuple[int, int]]:
    """Random sizes, equal ratios on both sides of the area rule, and every exact midpoint between two grids."""
    draw = random.Random(limit)
    out = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(300)]
    out += [(k, k) for k in (1, size, 633, 634, 635, int(0.7072 * size * 2))]
    for (a, b), (c, d) in itertools.combinations(grids(limit), 2):
        # (a/b + c/d) / 2 = (ad + cb) / 2bd, at several scales
        width, height = a * d + c * b, 2 * b * d
        for scale in (1, 16, 32, 60):
            out.append((width * scale, height * scale))
    for i, j in grids(limit):
        for scale in (size // 2, size, int(size * 0.7072)):
            out.append((i * scale, j * scale))
    return out


def test_the_fourteen_grids() -> None:
    assert set(grids(6)) == {
        *((1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 1)),
        *((2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (5, 1), (6, 1)),
    }
    assert len(grids(6)) == 14
    assert len(grids(12)) == 35


@pytest.mark.parametrize("limit", range(1, 13))
@pytest.mark.parametrize("size", [448, 28])
def test_equals_the_rule(limit: int, size: int) -> None:
    """At least 340 sizes for each limit, 924 for 6; the order inside one area never decides."""
    checked = sizes(limit, size)
    assert len(checked) >= (500 if limit >= 6 else 300)
    for width, height in checked:
        assert choose_grid(width, height, limit, size) == naive_grid(width, height, limit, size), (width, height)


def test_tie_rule() -> None:
    """A square is as far from 1:1 as from 2:2; the larger wins above 0.5 * 448^2 * 4 = 401,408 pixels."""
    assert choose_grid(633, 634, 6, 448) == (1, 1)  # not quite square: 1:1 is as near as 2:2 and 401,322 pixels are few
    assert choose_grid(633, 633, 6, 448) == (1, 1)
    assert choose_grid(634, 634, 6, 448) == (2, 2)
    assert choose_grid(1200, 600, 6, 448) == (2, 1)
    assert choose_grid(5000, 10, 6, 448) == (6, 1)


def test_thumbnail_counts_only_beside_several_tiles() -> None:
    assert num_tiles(448, 448, 6, 448, True) == 1
    assert num_tiles(900, 450, 6, 448, True) == 3
    assert num_tiles(900, 450, 6, 448, False) == 2
    assert num_tiles(900, 450, 1, 448, True) == 1


PIL_MAJOR = int(pillow_version.split(".")[0])


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rows_first(image: Image.Image, width: int, height: int) -> Image.Image:
    """What Pillow's bicubic resize gives before version 13; later versions take the columns of tall images first."""
    half = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return half.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (31, 44), (8, 8), (100, 17), (1, 1), (3, 60)])
def test_cut_equals_cropping(width: int, height: int) -> None:
    """Tiles are crops of the stretched image, row by row, and the stretched whole comes last."""
    image, px = picture(width, height, 1), 14
    columns, rows = choose_grid(width, height, 6, px)
    stretched = rows_first(image, columns * px, rows * px)
    expected = [
        np.asarray(stretched.crop((x * px, y * px, (x + 1) * px, (y + 1) * px)))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(expected) > 1:
        expected.append(np.asarray(rows_first(image, px, px)))
    got = cut(image, 6, px, True)
    assert got.dtype == np.uint8
    assert got.shape == (num_tiles(width, height, 6, px, True), 3, px, px)
    assert np.array_equal(got, np.stack(expected).transpose(0, 3, 1, 2))
    assert np.array_equal(cut(image, 6, px, False), got[: columns * rows])


def test_cut_wants_rgb() -> None:
    with pytest.raises(ValueError, match="'L'"):
        cut(Image.new("L", (8, 8)), 6, 8, True)


@pytest.mark.slow
def test_pixels_equal_transformers() -> None:
    """GotOcr2's processor cuts by the same rule; its tiles before normalisation are ours, bit for bit."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    processor = GotOcr2ImageProcessorPil(
        crop_to_patches=True,
        min_patches=1,
        max_patches=6,
        size={"height": 56, "width": 56},
        do_rescale=False,
        do_normalize=False,
    )
    draw = random.Random(5)
    for k in range(40):
        image = picture(draw.randint(5, 300), draw.randint(5, 300), k)
        theirs = np.stack([np.asarray(tile) for tile in processor(image, return_tensors="np")["pixel_values"]])
        ours = cut(image, 6, 56, True)
        if image.width >= image.height or PIL_MAJOR < 13:
            assert np.array_equal(ours, theirs), image.size
        else:  # noise, the worst there is for the order of passes: measured up to 2.1 of 255 on the mean
            assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).mean() < 4, image.size
