"""Read a photograph without loss: 8 or 16 bits, grey or colour, transparency, EXIF and colour profile.

Where `featherweight.data.images` brings every picture to what a classifier wants, this keeps what a person
wants back. What becomes of each kind: pixels are turned upright and the EXIF orientation says so; palettes
become grey or colour; CMYK becomes RGB, by the file's colour profile where it has one; of an animation or a
file of several pages the first is taken, with a note. 16-bit colour, which Pillow cuts to 8 bits, is read in
full. Imports numpy and Pillow only.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from featherweight.data.images import is_grey, readable
from featherweight.errors import DataError

ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
EXIF_WIDTH, EXIF_HEIGHT = 0xA002, 0xA003
_DESCRIPTIVE = frozenset(
    [0x010D, 0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298, ORIENTATION, EXIF_IFD, GPS_IFD]
) | frozenset(range(0x9C9B, 0x9CA0))
"""Tags of a TIFF that describe the photograph; the others describe how this one file stores it."""

_SPACES = {b"RGB ": 3, b"GRAY": 1}
_DEEP = ("RGB", "RGBA", "LA")


@dataclass(frozen=True)
class Photo:
    """A photograph as arrays, with what describes it.

    Args:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8 or uint16, upright.
        alpha: (H, W) of the same type, or None where all is opaque.
        format: Pillow's name of the file's format.
        exif: the EXIF entries, orientation set to upright; empty where there are none.
        icc: the colour profile, or None.
        dpi: pixels an inch, across and down, or None.
        notes: what a person should know of the reading, in whole sentences.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    format: str
    exif: Image.Exif
    icc: bytes | None
    dpi: tuple[float, float] | None
    notes: tuple[str, ...]


def photo_size(source: str | Path) -> tuple[int, int]:
    """Return height and width of a picture from its header, as stored (before it is turned upright).

    Raises:
        DataError: as `read_photo`, as far as the header tells.
    """
    with readable(source) as image:
        return image.height, image.width


def read_photo(source: str | Path | bytes) -> Photo:
    """Read a JPEG, PNG, TIFF, WebP, BMP, GIF or PPM file.

    Raises:
        DataError: missing, empty, truncated, no image, too many pixels (a decompression bomb), or pixels that
            are neither 8 nor 16 bits deep.
    """
    with readable(source) as image:
        kind, notes = image.format or "", []
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            notes.append(f"Only the first of {frames} frames is taken.")
        pixels, alpha = _deep_pixels(source, image) or _pixels(image, notes)
        exif = _exif(image, notes)
        turn = exif.get(ORIENTATION, 1)
        if turn in range(2, 9):
            pixels, alpha = _upright(pixels, turn), None if alpha is None else _upright(alpha, turn)
        if len(exif):
            exif[ORIENTATION] = 1
        icc = image.info.get("icc_profile") or None
        if icc and _SPACES.get(icc[16:20]) != pixels.shape[2]:
            if icc[16:20] == b"RGB " and pixels.shape[2] == 1:
                pixels = np.repeat(pixels, 3, 2)
            else:
                icc = None
        dpi = image.info.get("dpi")
    if alpha is not None and (alpha == np.iinfo(alpha.dtype).max).all():
        alpha = None
    if dpi is not None and not (len(dpi) == 2 and all(0 < float(value) < 1e6 for value in dpi)):
        dpi = None
    return Photo(
        np.ascontiguousarray(pixels),
        None if alpha is None else np.ascontiguousarray(alpha),
        kind,
        exif,
        icc,
        None if dpi is None else (float(dpi[0]), float(dpi[1])),
        tuple(notes),
    )


def sized_exif(exif: Image.Exif, height: int, width: int) -> Image.Exif:
    """Return a copy of EXIF entries that gives another size in pixels, where it gives one at all."""
    copy = Image.Exif()
    if len(exif):
        copy.load(exif.tobytes())
        fields = copy.get_ifd(EXIF_IFD)
        for tag, value in ((EXIF_WIDTH, width), (EXIF_HEIGHT, height)):
            if tag in fields:
                fields[tag] = value
    return copy


def _pixels(image: Image.Image, notes: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode what Pillow keeps in full: up to 8 bits, and 16-bit grey."""
    key = image.info.get("transparency")
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"Its pixels are of Pillow's mode {image.mode}. Expected 8 or 16 bits a channel.")
        grey = grey.astype(np.uint16)
        return grey[:, :, None], None if not isinstance(key, int) else _keyed(grey[:, :, None], (key,))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or key is not None:
        if image.mode == "La":
            image = image.convert("LA")
        whole = np.asarray(image.convert("LA" if image.mode in ("L", "LA") else "RGBA"))
        colour, alpha = whole[:, :, :-1], whole[:, :, -1]
        return (colour[:, :, :1] if image.mode in ("1", "P", "PA") and is_grey(colour) else colour), alpha
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[:, :, None], None
    if image.mode == "CMYK":
        notes.append("CMYK became RGB.")
        image = _from_cmyk(image)
    colour = np.asarray(image.convert("RGB"))
    return (colour[:, :, :1] if image.mode == "P" and is_grey(colour) else colour), None


def _deep_pixels(
    source: str | Path | bytes, image: Image.Image
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Decode 16-bit colour or grey with alpha, None for anything else.

    Pillow's decoders keep one byte of each value, by the name of the raw mode the first or the second: two
    passes give both.
    """
    tiles = getattr(image, "tile", None) or []
    raw = tiles[0].args if tiles else ""
    raw = raw if isinstance(raw, str) else raw[0]
    mode, _, order = str(raw).partition(";")
    if mode not in _DEEP or not order.startswith("16"):
        return None
    key = image.info.get("transparency")
    halves = []
    for suffix in ("16B", "16L"):
        with readable(source) as other:
            if mode == "LA":
                # four bytes a pixel: both halves of grey and alpha at once
                halves = [_decode(other, "RGBA", "RGBA")]
                break
            halves.append(_decode(other, mode, f"{mode};{suffix}"))
    big = order == "16B" or (order == "16N" and sys.byteorder == "big")
    if mode == "LA":
        bytes_ = halves[0].astype(np.uint16)
        whole = np.dstack([bytes_[..., 0] << 8 | bytes_[..., 1], bytes_[..., 2] << 8 | bytes_[..., 3]])
    else:
        first, second = (half.astype(np.uint16) for half in halves)
        # a raw mode of big-endian values takes the first byte of each pair, which is the high one in a PNG
        whole = (first << 8 | second) if big else (second << 8 | first)
    image.load()  # the metadata behind the pixels
    if mode == "RGB":
        return whole, _keyed(whole, key) if isinstance(key, tuple) else None
    return whole[:, :, :-1], whole[:, :, -1]


def _decode(image: Image.Image, mode: str, raw: str) -> np.ndarray:
    """Decode an opened image with another raw mode."""
    tile = image.tile[0]
    args = raw if isinstance(tile.args, str) else (raw, *tile.args[1:])
    image._mode = mode
    image.tile = [entry._replace(args=args) for entry in image.tile]
    return np.asarray(image)


def _keyed(pixels: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Return the alpha of an image in which one colour is transparent."""
    clear = (pixels == np.array(key, pixels.dtype)).all(axis=2)
    return np.where(clear, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Convert by the embedded profile; plainly where there is none or it is damaged."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


def _exif(image: Image.Image, notes: list[str]) -> Image.Exif:
    """Return the EXIF entries that belong to the photograph; damaged ones are left out with a note."""
    try:
        exif = image.getexif()
        if image.format == "TIFF":
            for tag in [tag for tag in exif if tag not in _DESCRIPTIVE]:
                del exif[tag]
        exif.tobytes()
        return exif
    except Exception as error:  # Pillow's parser raises almost anything on damaged entries
        notes.append(f"The EXIF entries are damaged and left out ({type(error).__name__}).")
        return Image.Exif()


def _upright(array: np.ndarray, turn: int) -> np.ndarray:
    """Apply an EXIF orientation from 2 to 8 to (H, W, ...)."""
    if turn >= 5:
        array = array.swapaxes(0, 1)
    down = turn in (3, 4, 7, 8)
    across = turn in (2, 3, 6, 7)
    return array[:: -1 if down else 1, :: -1 if across else 1]
