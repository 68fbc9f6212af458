"""Opening images: what counts as usable, and the one exception of a sample that is not.

Reference semantics: the picture as stored (EXIF orientation ignored), converted to RGB before anything else. A file
that is cut short is refused, never half decoded.
"""

from __future__ import annotations

import io
import os

from PIL import Image

from nvlm_train.errors import DataError

# Pillow warns above this many pixels and gives up above twice as many; here the first is already refused: such a
# picture takes a quarter of a GiB to decode and is more likely an attack or a mistake than a photograph.
MAX_PIXELS = 89_478_485


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
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadSample("unreadable image", f"image {name} cannot be read: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise BadSample("image too large", f"image {name} has {size} pixels; at most {MAX_PIXELS} are decoded")
    return image


def image_size(source: str | os.PathLike[str] | bytes, name: str = "") -> tuple[int, int]:
    """Width and height from the header alone. Raises BadSample."""
    with _open(source, name or _name(source)) as image:
        return image.width, image.height


def open_image(source: str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
    """The decoded image in RGB, from a path or from the file's bytes.

    Raises BadSample (a DataError) when it is missing, truncated, not an image, or larger than MAX_PIXELS.
    """
    name = name or _name(source)
    with _open(source, name) as image:
        try:
            return image.convert("RGB")
        except MemoryError as error:
            raise BadSample("image too large", f"image {name} does not fit the memory") from error
        except Exception as error:  # truncated files end up here: OSError, SyntaxError, struct.error, zlib.error ...
            raise BadSample("unreadable image", f"image {name} cannot be decoded: {error}") from error


def _name(source: str | os.PathLike[str] | bytes) -> str:
    return f"of {len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
