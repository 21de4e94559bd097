"""Photographs of every kind, read against the arrays that they were made from."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from featherweight.data.photos import EXIF_IFD, EXIF_WIDTH, ORIENTATION, photo_size, read_photo, sized_exif
from featherweight.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (14, 9, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (23, 17, 4)).astype(np.uint16)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(pixels: np.ndarray, *, extra: bytes = b"") -> bytes:
    """Write a 16-bit PNG by the standard, with all five filters in turn."""
    height, width, channels = pixels.shape
    raw = pixels.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    step, lines, above = 2 * channels, [], np.zeros(raw.shape[1], int)
    for index, row in enumerate(raw):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        estimate = left + above - corner
        gaps = [np.abs(estimate - part) for part in (left, above, corner)]
        paeth = np.where(
            (gaps[0] <= gaps[1]) & (gaps[0] <= gaps[2]), left, np.where(gaps[1] <= gaps[2], above, corner)
        )
        guess = [0, left, above, (left + above) // 2, paeth][index % 5]
        lines.append(bytes([index % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes())
        above = row

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    pixels_ = chunk(b"IDAT", zlib.compress(b"".join(lines)))
    key = chunk(b"tRNS", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + key + pixels_ + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_png_is_read_in_full(channels: int) -> None:
    photo = read_photo(png16(DEEP[:, :, :channels]))
    colours = 3 if channels > 2 else 1
    assert photo.pixels.dtype == np.uint16
    assert np.array_equal(photo.pixels, DEEP[:, :, :colours])
    if channels in (2, 4):
        assert photo.alpha is not None
        assert np.array_equal(photo.alpha, DEEP[:, :, -1][: len(DEEP)] if channels == 4 else DEEP[:, :, 1])
    else:
        assert photo.alpha is None


def test_transparent_colour_of_sixteen_bits() -> None:
    key = DEEP[3, 4, :3]
    photo = read_photo(png16(DEEP[:, :, :3], extra=key.astype(">u2").tobytes()))
    assert photo.alpha is not None and photo.alpha[3, 4] == 0 and (photo.alpha == 0).sum() == 1


def test_plain_kinds_keep_their_pixels() -> None:
    colour, grey = Image.fromarray(COLOUR), Image.fromarray(COLOUR[:, :, 0])
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        photo = read_photo(saved(colour, kind))
        assert (photo.format, photo.alpha, photo.notes) == (kind, None, ())
        assert np.array_equal(photo.pixels, COLOUR)
        assert np.array_equal(read_photo(saved(grey, kind)).pixels, COLOUR[:, :, :1])
    deep = DEEP[:, :, 0]
    assert np.array_equal(read_photo(saved(Image.fromarray(deep), "TIFF")).pixels[:, :, 0], deep)
    bits = Image.fromarray(COLOUR[:, :, 0]).convert("1")
    assert set(np.unique(read_photo(saved(bits, "PNG")).pixels)) == {0, 255}


def test_palettes_become_grey_or_colour() -> None:
    indexed = Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_photo(saved(indexed, "PNG")).pixels, np.asarray(indexed.convert("RGB")))
    greys = Image.fromarray(COLOUR[:, :, 0]).convert("P")
    assert np.array_equal(read_photo(saved(greys, "GIF")).pixels, COLOUR[:, :, :1])
    clear = read_photo(saved(indexed, "PNG", transparency=3))
    assert clear.alpha is not None
    assert np.array_equal(clear.alpha == 0, np.asarray(indexed) == 3)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")]
)
def test_alpha_is_kept_apart(mode: str, kind: str) -> None:
    alpha = RNG.integers(0, 255, COLOUR.shape[:2], np.uint8)
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    photo = read_photo(saved(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert np.array_equal(photo.alpha, alpha)
    assert np.array_equal(photo.pixels, np.asarray(image)[:, :, :-1])
    image.putalpha(255)
    assert read_photo(saved(image, kind)).alpha is None, "wholly opaque is no transparency"


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_is_applied_and_the_tag_agrees(turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010F] = turn, "Maker"
    photo = read_photo(saved(Image.fromarray(COLOUR), kind, exif=exif))
    expected = Image.fromarray(COLOUR)
    expected.getexif()[ORIENTATION] = turn
    assert np.array_equal(photo.pixels, np.asarray(ImageOps.exif_transpose(expected)))
    assert photo.exif[ORIENTATION] == 1 and photo.exif[0x010F] == "Maker"


def test_sixteen_bits_turn_too() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = DEEP[:, :, 0]
    photo = read_photo(saved(Image.fromarray(deep), "PNG", exif=exif))
    assert np.array_equal(photo.pixels[:, :, 0], np.rot90(deep, -1))


def test_exif_profile_and_resolution_are_kept() -> None:
    exif = Image.Exif()
    exif[0x0110] = "Model"
    exif.get_ifd(EXIF_IFD)[EXIF_WIDTH] = 9
    exif.get_ifd(EXIF_IFD)[0x8827] = 400
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = read_photo(saved(Image.fromarray(COLOUR), "JPEG", exif=exif, icc_profile=icc, dpi=(300, 300)))
    assert photo.icc == icc and photo.dpi == (300, 300)
    larger = sized_exif(photo.exif, 56, 36)
    assert larger[0x0110] == "Model"
    assert larger.get_ifd(EXIF_IFD)[EXIF_WIDTH] == 36 and larger.get_ifd(EXIF_IFD)[0x8827] == 400
    assert photo.exif.get_ifd(EXIF_IFD)[EXIF_WIDTH] == 9, "the photograph's own entries stay"
    grey = read_photo(saved(Image.fromarray(COLOUR[:, :, 0]), "PNG", icc_profile=icc))
    assert grey.pixels.shape[2] == 3, "a colour profile needs colour"


def test_cmyk_becomes_rgb() -> None:
    flat = Image.new("RGB", (16, 16), (200, 60, 30))
    photo = read_photo(saved(flat.convert("CMYK"), "JPEG", quality=100))
    assert photo.notes == ("CMYK became RGB.",) and photo.icc is None
    assert np.abs(photo.pixels.astype(int) - [200, 60, 30]).max() <= 3


def test_first_frame_with_a_note() -> None:
    frames = [Image.fromarray(np.roll(COLOUR[:, :, 0], k)) for k in range(3)]
    photo = read_photo(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert photo.notes == ("Only the first of 3 frames is taken.",)
    assert np.array_equal(photo.pixels[:, :, 0], COLOUR[:, :, 0])


def test_damaged_exif_is_left_out() -> None:
    content = saved(Image.fromarray(COLOUR), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    photo = read_photo(content)
    assert photo.pixels.shape == COLOUR.shape and len(photo.exif) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"just text", "not a readable image"),
        (saved(Image.fromarray(COLOUR.repeat(9, 0).repeat(9, 1)), "JPEG")[:-900], "not a readable image"),
        (png16(DEEP)[:-300], "not a readable image"),
        (saved(Image.fromarray(RNG.random((4, 4)).astype(np.float32)), "TIFF"), "8 or 16 bits"),
    ],
)
def test_what_cannot_be_used_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_photo(path)


def test_decompression_bombs_are_refused_from_their_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0x35AF061E)
    )
    for function in (photo_size, read_photo):
        with pytest.raises(DataError, match="decompression bomb"):
            function(path)
