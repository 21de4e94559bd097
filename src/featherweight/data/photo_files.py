"""Write a large picture strip by strip, so that it never lies in memory as a whole.

PNG, TIFF and JPEG are written as the rows arrive; WebP, whose format does not allow it, is collected first.
EXIF entries, colour profile and resolution go along. The file appears under its name only when complete.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, TiffImagePlugin

from featherweight.data.photos import EXIF_IFD, GPS_IFD, Photo, sized_exif
from featherweight.errors import DataError, WriteError
from featherweight.files import TEMPORARY_SUFFIX

SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp"}
"""Format -> the suffix that its files get."""

MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_BLOCK_ROWS = 64
"""Rows handled at a time; for JPEG eight rows of blocks, after which its restart markers begin anew."""

_FILTER_ROWS = 8
"""Rows of a PNG filtered at a time, which takes some thirty times their bytes."""

_DEFLATE, _PREDICTOR = 8, 2


@dataclass(frozen=True)
class Sheet:
    """What the file will hold: sides in pixels, channels (1 to 4, the last of 2 and 4 is alpha) and depth."""

    height: int
    width: int
    channels: int
    dtype: np.dtype
    exif: Image.Exif
    icc: bytes | None
    dpi: tuple[float, float] | None
    quality: int

    @classmethod
    def like(
        cls, photo: Photo, height: int, width: int, channels: int, dtype: np.dtype, quality: int
    ) -> Sheet:
        """Describe a picture of another size with the metadata of `photo`."""
        exif = sized_exif(photo.exif, height, width)
        return cls(height, width, channels, np.dtype(dtype), exif, photo.icc, photo.dpi, quality)


class Writer(Protocol):
    """Takes rows (any number, W, channels) from the top down."""

    def write(self, rows: np.ndarray) -> None:
        """Add rows."""

    def close(self) -> None:
        """Write what is left."""


@contextlib.contextmanager
def photo_writer(path: Path, kind: str, sheet: Sheet) -> Iterator[Writer]:
    """Give a writer of `kind` whose file replaces `path` when the block ends without an error.

    Raises:
        DataError: the format cannot hold so many pixels.
        WriteError: the disk is full or the folder cannot be written; no part of a file is left.
    """
    check_size(kind, sheet.height, sheet.width, path.name)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, f".{path.name[:48]}.", path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            writer = _WRITERS[kind](stream, sheet)
            yield writer
            writer.close()
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            reason = error.strerror or error
            raise WriteError(f"Cannot write {path}: {reason}. Choose another folder with --out.") from error
        raise


def check_size(kind: str, height: int, width: int, name: str) -> None:
    """Pass if the format can hold a picture of this size.

    Raises:
        DataError: it cannot.
    """
    if max(height, width) > MAX_SIDE[kind]:
        raise DataError(
            f"{name} would be {width} x {height} pixels; {kind} holds at most {MAX_SIDE[kind]:,} a side. "
            "Use --format png."
        )


class _Blocks:
    """Hands rows on in blocks of `_BLOCK_ROWS`."""

    def __init__(self, stream: BinaryIO, sheet: Sheet) -> None:
        self.stream, self.sheet, self.done = stream, sheet, 0
        self._waiting: list[np.ndarray] = []
        self._rows = 0
        self.start()

    def write(self, rows: np.ndarray) -> None:
        """Add rows."""
        self._waiting.append(rows)
        self._rows += len(rows)
        if self._rows >= _BLOCK_ROWS:
            self._flush(self._rows - self._rows % _BLOCK_ROWS)

    def close(self) -> None:
        """Write what is left and the end of the file."""
        self._flush(self._rows)
        self.end()

    def _flush(self, count: int) -> None:
        if not count:
            return
        rows = np.concatenate(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        for start in range(0, count, _BLOCK_ROWS):
            block = rows[start : min(start + _BLOCK_ROWS, count)]
            self.block(np.ascontiguousarray(block))
            self.done += len(block)
        self._waiting, self._rows = [rows[count:].copy()], len(rows) - count

    def start(self) -> None:
        raise NotImplementedError

    def block(self, rows: np.ndarray) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError


class _Png(_Blocks):
    """PNG (ISO/IEC 15948): each row by the filter of least absolute sum, one stream of deflate."""

    def start(self) -> None:
        sheet = self.sheet
        colour = {1: 0, 2: 4, 3: 2, 4: 6}[sheet.channels]
        self.stream.write(b"\x89PNG\r\n\x1a\n")
        depth = sheet.dtype.itemsize * 8
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", sheet.width, sheet.height, depth, colour, 0, 0, 0))
        if sheet.icc:
            self._chunk(b"iCCP", b"icc\0\0" + zlib.compress(sheet.icc))
        if sheet.dpi:
            across, down = (round(value / 0.0254) for value in sheet.dpi)
            self._chunk(b"pHYs", struct.pack(">IIB", across, down, 1))
        if len(sheet.exif):
            self._chunk(b"eXIf", sheet.exif.tobytes().removeprefix(b"Exif\0\0"))
        self._deflate = zlib.compressobj(6)
        self._above = np.zeros(sheet.width * sheet.channels * sheet.dtype.itemsize, np.uint8)

    def block(self, rows: np.ndarray) -> None:
        step = self.sheet.channels * self.sheet.dtype.itemsize
        raw = rows.astype(rows.dtype.newbyteorder(">"), copy=False).reshape(len(rows), -1).view(np.uint8)
        above = np.concatenate([self._above[None], raw[:-1]])
        self._above = raw[-1].copy()
        for start in range(0, len(raw), _FILTER_ROWS):
            part = slice(start, start + _FILTER_ROWS)
            filtered = _filter_rows(raw[part], above[part], step)
            self._chunk(b"IDAT", self._deflate.compress(filtered.tobytes()))

    def end(self) -> None:
        self._chunk(b"IDAT", self._deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, name: bytes, content: bytes) -> None:
        if content or name == b"IEND":
            self.stream.write(struct.pack(">I", len(content)) + name + content)
            self.stream.write(struct.pack(">I", zlib.crc32(name + content)))


def _filter_rows(raw: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    """Return PNG's rows with their filter's number in front: 1 left, 2 above or 4 Paeth, by row."""
    left, corner = np.zeros_like(raw), np.zeros_like(raw)
    left[:, step:], corner[:, step:] = raw[:, :-step], above[:, :-step]
    a, b, c = (part.astype(np.int16) for part in (left, above, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    paeth = np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, above, corner))
    choices = np.stack([raw - left, raw - above, raw - paeth])
    costs = np.abs(choices.view(np.int8).astype(np.int16)).sum(axis=2, dtype=np.int64)
    best = costs.argmin(axis=0)
    numbers = np.array([1, 2, 4], np.uint8)[best][:, None]
    return np.hstack([numbers, choices[best, np.arange(len(raw))]])


class _Jpeg(_Blocks):
    """Baseline JPEG without chroma subsampling, from blocks that libjpeg compresses one by one.

    With a restart marker after every row of 8 x 8 blocks nothing carries over from one row to the next, and
    the markers count to eight: strips of 64 rows follow one another seamlessly (ITU-T T.81, F.1.2 and E.1.4).
    """

    def start(self) -> None:
        pass

    def block(self, rows: np.ndarray) -> None:
        first = self.done == 0
        sheet, buffer = self.sheet, io.BytesIO()
        extra: dict[str, Any] = {}
        if first:
            extra = {"icc_profile": sheet.icc, "dpi": _whole(sheet.dpi)}
            if 0 < len(exif := sheet.exif.tobytes() if len(sheet.exif) else b"") <= 65_500:
                extra["exif"] = exif
        image = Image.fromarray(rows[:, :, 0] if sheet.channels == 1 else rows)
        image.save(
            buffer,
            "JPEG",
            quality=sheet.quality,
            subsampling=0,
            restart_marker_rows=1,
            **{key: value for key, value in extra.items() if value},
        )
        head, scan = _split_scan(buffer.getvalue(), sheet.height)
        self.stream.write(head if first else b"\xff\xd7")
        self.stream.write(scan)

    def end(self) -> None:
        self.stream.write(b"\xff\xd9")


def _split_scan(content: bytes, height: int) -> tuple[bytes, bytes]:
    """Return a JPEG's header, with the whole picture's height put in, and its compressed pixels."""
    head, place = bytearray(content), 2
    while True:
        mark, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if mark == 0xC0:
            head[place + 5 : place + 7] = height.to_bytes(2, "big")
        place += 2 + length
        if mark == 0xDA:
            return bytes(head[:place]), content[place:-2]


class _Tiff(_Blocks):
    """TIFF 6.0, little-endian, one strip for each block, deflate with horizontal differences."""

    def start(self) -> None:
        self.stream.write(struct.pack("<2sHI", b"II", 42, 0))
        self._places: list[int] = []
        self._sizes: list[int] = []

    def block(self, rows: np.ndarray) -> None:
        rows = rows.astype(rows.dtype.newbyteorder("<"), copy=False)
        changes = rows.copy()
        changes[:, 1:] -= rows[:, :-1]
        content = zlib.compress(changes.tobytes(), 6)
        self._places.append(self.stream.tell())
        self._sizes.append(len(content))
        self.stream.write(content)

    def end(self) -> None:
        place = self.stream.tell()
        place += place % 2
        if place > 2**32 - 2**20:
            raise DataError("The result is larger than the 4 GB that a TIFF can hold. Use --format png.")
        sheet, ifd = self.sheet, TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in sheet.exif.items():
            if tag not in (EXIF_IFD, GPS_IFD):
                ifd[tag] = value
        for group in (EXIF_IFD, GPS_IFD):
            if entries := sheet.exif.get_ifd(group):
                ifd[group] = dict(entries)
        colours = 3 if sheet.channels > 2 else 1
        ifd[256], ifd[257] = sheet.width, sheet.height
        ifd[258] = (sheet.dtype.itemsize * 8,) * sheet.channels
        ifd[259], ifd[317] = _DEFLATE, _PREDICTOR
        ifd[262] = 2 if colours == 3 else 1
        ifd.tagtype[273] = 4
        ifd[273], ifd[279] = (0,) * len(self._places), tuple(self._sizes)
        ifd[277], ifd[278], ifd[284] = sheet.channels, _BLOCK_ROWS, 1
        if sheet.channels > colours:
            ifd[338] = 2
        if sheet.dpi:
            ifd[282], ifd[283], ifd[296] = *sheet.dpi, 2
        if sheet.icc:
            ifd.tagtype[34675] = 7
            ifd[34675] = sheet.icc
        self.stream.seek(place)
        self.stream.write(_with_places(ifd.tobytes(place), place, self._places))
        self.stream.seek(4)
        self.stream.write(struct.pack("<I", place))


def _with_places(content: bytes, start: int, places: list[int]) -> bytes:
    """Put the places of the strips into a TIFF's directory; Pillow would count them from its end."""
    raw = bytearray(content)
    for entry in range(2, 2 + 12 * int.from_bytes(raw[:2], "little"), 12):
        tag, _, count, value = struct.unpack_from("<HHII", raw, entry)
        if tag == 273:
            struct.pack_into(f"<{count}I", raw, entry + 8 if count == 1 else value - start, *places)
    return bytes(raw)


class _Webp:
    """Collects the rows for Pillow: at most 16,383 pixels a side."""

    def __init__(self, stream: BinaryIO, sheet: Sheet) -> None:
        self.stream, self.sheet, self.done = stream, sheet, 0
        self._pixels = np.empty((sheet.height, sheet.width, sheet.channels), np.uint8)

    def write(self, rows: np.ndarray) -> None:
        """Add rows."""
        self._pixels[self.done : self.done + len(rows)] = rows
        self.done += len(rows)

    def close(self) -> None:
        """Compress and write."""
        sheet = self.sheet
        image = Image.fromarray(self._pixels[:, :, 0] if sheet.channels == 1 else self._pixels)
        extra = {"icc_profile": sheet.icc, "exif": sheet.exif.tobytes() if len(sheet.exif) else None}
        image.save(
            self.stream,
            "WEBP",
            quality=sheet.quality,
            **{key: value for key, value in extra.items() if value},
        )


def _whole(dpi: tuple[float, float] | None) -> tuple[int, int] | None:
    return None if dpi is None else (round(dpi[0]), round(dpi[1]))


_WRITERS: dict[str, Any] = {"PNG": _Png, "JPEG": _Jpeg, "TIFF": _Tiff, "WEBP": _Webp}
