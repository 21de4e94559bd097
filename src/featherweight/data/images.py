"""Open one image file, whatever its kind, as plain 8-bit grey (`"L"`) or colour (`"RGB"`).

What becomes of each kind: 16-bit grey is divided by 257 (65535 becomes 255, rounded to nearest); transparent
pixels are composited onto white, as on paper; CMYK and the other colour spaces are converted to RGB; a
palette of greys becomes `"L"`; the EXIF orientation is applied; of an animation the first frame is taken.
Only the common raster formats are accepted: Pillow would hand an EPS file to an external interpreter.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from featherweight.errors import DataError, FeatherweightError

MAX_PIXELS = 89_000_000
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tif",
        ".tiff",
        ".webp",
        ".mpo",
    ]
)
_JPEG_MARK = b"\xff\xd8"
_ORIENTED = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})


def open_image(source: str | Path | bytes | np.ndarray | Image.Image) -> Image.Image:
    """Return the image as mode `"L"` or `"RGB"`, upright and fully decoded.

    Args:
        source: a path, the bytes of a file, an array (see `image_from_array`) or an opened image.

    Raises:
        DataError: missing, empty, truncated, not an image, without pixels, or more than `MAX_PIXELS` pixels
            (a decompression bomb; refused from its header, before anything is allocated).

    >>> open_image(np.full((2, 3), 65535, np.uint16)).getpixel((0, 0))
    255
    """
    if isinstance(source, np.ndarray):
        return plain_image(image_from_array(source))
    if isinstance(source, Image.Image):
        return plain_image(source)
    with readable(source) as image:
        return plain_image(image)


@contextlib.contextmanager
def readable(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Give the image of a file with only its header read; damage found within becomes a `DataError`.

    Raises:
        DataError: as `open_image`.
    """
    name = "image" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {name}: {error.strerror or error}. Expected an image file.") from error
    if not content:
        raise DataError(f"{name} is empty (0 bytes). Expected an image file.")
    try:
        # Naming the one format spares Pillow its trials: a quarter of the time of a small JPEG.
        formats = ("JPEG",) if content.startswith(_JPEG_MARK) else FORMATS
        image = Image.open(io.BytesIO(content), formats=formats)
        _check_size(image, name)
        yield image
    except FeatherweightError:
        raise
    except Exception as error:  # damaged files make Pillow's parsers raise almost anything
        raise DataError(f"{name} is not a readable image: {_reason(error)}") from error


def plain_image(image: Image.Image) -> Image.Image:
    """Return `image` upright as mode `"L"` or `"RGB"` (see the module's rules).

    Raises:
        DataError: the pixels are floats or 32-bit integers outside the ranges that have one clear meaning.
    """
    image.load()
    if image.format == "TIFF" or not _ORIENTED.isdisjoint(image.info):
        image = ImageOps.exif_transpose(image)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image_from_array(np.asarray(image))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    if image.mode in ("1", "L"):
        return image.convert("L")
    colour = image.convert("RGB")
    return colour.convert("L") if image.mode == "P" and is_grey(np.asarray(colour)) else colour


def image_from_array(array: np.ndarray) -> Image.Image:
    """Return an 8-bit image from pixels of shape (H, W) or (H, W, C) with C of 1, 3 or 4.

    Integers up to 255 are taken as they are, up to 65535 (unsigned 16 bits, or wider) divided by 257; floats
    within [0, 1] are multiplied by 255, floats within [0, 255] rounded.

    Raises:
        DataError: another shape, no pixels, NaN or infinity, or values outside these ranges.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise DataError(f"Cannot use an array of shape {array.shape} as an image. Expected (H, W[, 1|3|4]).")
    return Image.fromarray(np.ascontiguousarray(to_uint8(array)))


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale pixels of any number type to 8 bits by the rule of `image_from_array`, over the whole array."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise DataError(f"Pixels are of type {array.dtype}. Expected integers or floats.")
    if array.size == 0:
        return array.astype(np.uint8)
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise DataError(f"{bad} pixel value(s) are NaN or infinite. Expected finite numbers.")
    whole = array.dtype.kind in "iu"
    if low < 0 or high > (65535 if whole else 255):
        expected = "0..255 or 0..65535" if whole else "[0, 1] or [0, 255]"
        raise DataError(f"Pixel values run from {low:g} to {high:g}. Expected {expected}.")
    if whole:
        wide = array.dtype.itemsize > 1 and (high > 255 or array.dtype == np.uint16)
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8) if wide else array.astype(np.uint8)
    return np.rint(array * (255 if high <= 1 else 1)).astype(np.uint8)


def is_grey(pixels: np.ndarray) -> bool:
    """Return whether uint8 pixels (H, W) or (H, W, C) hold no colour."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return True
    red = pixels[..., 0]
    return bool((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all())


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{name} claims {width} x {height} pixels. Expected at most {MAX_PIXELS:,}: "
            "this looks like a decompression bomb; scale it down if it is a real picture."
        )
    if width * height == 0:
        raise DataError(f"{name} is {width} x {height}: it has no pixels.")


def _on_white(image: Image.Image) -> Image.Image:
    colour = image.convert("RGBA")
    white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, colour).convert("RGB")
    return flat.convert("L") if image.mode in ("L", "LA", "La") else flat


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels (decompression bomb), at most {MAX_PIXELS:,} are accepted"
    if type(error).__name__ == "UnidentifiedImageError":
        return "its content is none of " + ", ".join(FORMATS)
    return str(error) or type(error).__name__
