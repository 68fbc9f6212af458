"""Opening images: what counts as usable, and the one exception of a sample that is not.

Reference semantics unless the recipe says otherwise: the picture as stored (EXIF orientation ignored), its first frame,
converted to RGB before anything else. A file that is cut short is refused, never half decoded.
"""

from __future__ import annotations

import hashlib
import io
import os
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nvlm_train.errors import DataError

# Pillow warns above this many pixels and gives up above twice as many; here the first is already refused: such a
# picture takes a quarter of a GiB to decode and is more likely an attack or a mistake than a photograph.
MAX_PIXELS = 89_478_485


_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_PROGRAMS = ("EPS", "WMF")  # Pillow starts a program or the system's renderer to decode these


class ImageOptions(NamedTuple):
    """How an image becomes RGB, as the recipe's data.exif, data.alpha and data.sixteen_bit say; the reference's way
    by default."""

    exif: str = "ignore"
    alpha: str = "ignore"
    sixteen_bit: str = "clip"


REFERENCE = ImageOptions()


class BadSample(DataError):
    """One sample that cannot be used. `reason` is the short name it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _open(source: str | os.PathLike[str] | bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        where = "" if isinstance(source, bytes) or os.fspath(source) == name else f" ({os.fspath(source)})"
        raise BadSample("missing image", f"image {name} does not exist{where}") from error
    except Image.DecompressionBombError as error:
        raise BadSample("image too large", f"image {name} is too large: {error}") from error
    except MemoryError as error:
        raise BadSample("image too large", f"image {name} does not fit the memory") from error
    except UnidentifiedImageError as error:  # its own message names an object in memory
        raise BadSample("unreadable image", f"image {name} cannot be read: no known image format") from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadSample("unreadable image", f"image {name} cannot be read: {error}") from error
    if image.format in _PROGRAMS:
        image.close()
        raise BadSample("unreadable image", f"image {name} is {image.format}, which is not decoded; convert it to PNG")
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise BadSample("image too large", f"image {name} has {size} pixels; at most {MAX_PIXELS} are decoded")
    return image


def read_file(path: str, name: str) -> bytes:
    """The bytes of an image file: read apart from decoding, so that slow storage can be told from slow work."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadSample("missing image", f"image {name} does not exist ({path})") from error
    except OSError as error:
        raise BadSample("unreadable image", f"image {name} cannot be read: {error}") from error


def image_size(
    source: str | os.PathLike[str] | bytes, name: str = "", options: ImageOptions = REFERENCE
) -> tuple[int, int]:
    """Width and height of what `open_image` would return, from the header alone. Raises BadSample."""
    name = name or _name(source)
    with _open(source, name) as image:
        width, height = image.size
        # Pillow turns TIFF files by itself when they are decoded, whatever the option says, and its size says so.
        if options.exif == "apply" and image.format != "TIFF" and _orientation(image, name) in _TURNED:
            return height, width
        return width, height


def open_image(
    source: str | os.PathLike[str] | bytes, name: str = "", options: ImageOptions = REFERENCE
) -> Image.Image:
    """The decoded image in RGB, from a path or from the file's bytes; of an animation the first frame.

    Raises BadSample (a DataError) when it is missing, truncated, not an image, or larger than MAX_PIXELS.
    """
    name = name or _name(source)
    with _open(source, name) as image:
        try:
            if options == REFERENCE:
                return image.convert("RGB")
            return _convert(image, options)
        except MemoryError as error:
            raise BadSample("image too large", f"image {name} does not fit the memory") from error
        except Exception as error:  # truncated files end up here: OSError, SyntaxError, struct.error, zlib.error ...
            raise BadSample("unreadable image", f"image {name} cannot be decoded: {error}") from error


def _convert(image: Image.Image, options: ImageOptions) -> Image.Image:
    if options.exif == "apply" and image.format != "TIFF":
        image = ImageOps.exif_transpose(image)
    if options.sixteen_bit == "scale" and image.mode in _DEEP:
        values = np.asarray(image, dtype=np.float64)  # [H, W]
        return Image.fromarray(np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if options.alpha == "white" and image.has_transparency_data:
        drawn = image.convert("RGBA")
        paper = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, drawn).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged marks: the picture is taken as it is, as exif_transpose does
        return 1


def recompress(image: Image.Image, seed: int, source: str, row: int, epoch: int) -> Image.Image:
    """The image after one more JPEG compression, quality 75 to 100, drawn by a hash of all that names this draw.

    The augmentation `jpeg`: it keeps the size, so that tiles and tokens stay as planned.
    """
    drawn = hashlib.blake2b(f"{seed}/jpeg/{source}/{row}/{epoch}".encode(), digest_size=8).digest()
    quality = 75 + int.from_bytes(drawn, "little") % 26
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as again:
        return again.convert("RGB")


# (image, seed, source, row, epoch) -> image of the same size; what data.augment names. Rank RNG is never used.
AUGMENTATIONS = {"jpeg": recompress}


def _name(source: str | os.PathLike[str] | bytes) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
