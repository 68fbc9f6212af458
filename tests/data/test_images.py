"""Opening images: every mode becomes RGB, every damage becomes a counted reason."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corpus import write_image
from nvlm_train.data import images
from nvlm_train.data.images import BadSample, image_size, open_image
from nvlm_train.errors import DataError


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_modes_become_rgb(mode: str) -> None:
    source = Image.new("I;16", (5, 4)) if mode == "I;16" else PHOTO.convert(mode)
    data = encoded(source, "TIFF" if mode == "CMYK" else "PNG")
    image = open_image(data)
    assert (image.mode, image.size) == ("RGB", source.size)
    assert image_size(data) == source.size


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    data = encoded(PHOTO, "JPEG", exif=exif)
    assert open_image(data).size == PHOTO.size == image_size(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_is_refused(form: str, share: float) -> None:
    data = encoded(PHOTO, form)
    with pytest.raises(BadSample, match=r"cannot be (read|decoded)") as error:
        open_image(data[: int(len(data) * share)], "a.jpg")
    assert error.value.reason == "unreadable image"
    assert isinstance(error.value, DataError)


@pytest.mark.parametrize("data", [b"", b"just text", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_not_an_image(data: bytes) -> None:
    for read in (open_image, image_size):
        with pytest.raises(BadSample, match=r"image a\.png cannot be read") as error:
            read(data, "a.png")
        assert error.value.reason == "unreadable image"


def test_missing(tmp_path: Path) -> None:
    for read in (open_image, image_size):
        with pytest.raises(BadSample, match=r"image a\.png does not exist \(.*a\.png\)") as error:
            read(tmp_path / "a.png", "a.png")
        assert error.value.reason == "missing image"


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(BadSample, match="cannot be read"):
        open_image(tmp_path)


def test_too_large_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", 30, 20)
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    assert image_size(tmp_path / "a.png") == (30, 20)
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    for read in (open_image, image_size):
        with pytest.raises(BadSample, match="30 x 20 pixels; at most 599") as error:
            read(tmp_path / "a.png")
        assert error.value.reason == "image too large"


def test_decompression_bomb() -> None:
    """A few kilobytes that claim 400 million pixels; Pillow itself refuses to open them."""
    header = encoded(Image.new("1", (8, 8)), "BMP")
    bomb = header[:18] + (20_000).to_bytes(4, "little") + (20_000).to_bytes(4, "little") + header[26:]
    with pytest.raises(BadSample) as error:
        open_image(bomb)
    assert error.value.reason == "image too large"


def test_damaged_at_random_never_crashes() -> None:
    """200 files with bytes changed or cut: an image or a BadSample, nothing else."""
    draw = np.random.default_rng(3)
    refused = 0
    for k in range(200):
        data = bytearray(encoded(PHOTO, ("JPEG", "PNG", "GIF", "BMP")[k % 4]))
        for at in draw.integers(0, len(data), 12):
            data[at] = int(draw.integers(0, 256))
        try:
            assert open_image(bytes(data[: int(draw.integers(1, len(data) + 1))])).mode == "RGB"
        except BadSample:
            refused += 1
    assert refused > 50
