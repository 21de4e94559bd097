"""Every kind of image file against values worked out by hand, and every kind of damage."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data.images import image_from_array, is_grey, open_image, to_uint8
from featherweight.errors import DataError


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb() -> bytes:
    """A PNG whose header claims 30,000 x 30,000 pixels; 100 bytes long."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


def test_grey_and_rgb_are_kept_exactly() -> None:
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (5, 7), np.uint8), rng.integers(0, 256, (5, 7, 3), np.uint8)
    for pixels, mode in ((grey, "L"), (colour, "RGB")):
        for kind in ("PNG", "BMP", "PPM", "TIFF"):
            image = open_image(encode(Image.fromarray(pixels), kind))
            assert image.mode == mode
            assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_scale_by_257(kind: str) -> None:
    values = np.array([[0, 128, 129, 257], [32896, 65406, 65407, 65535]], np.uint16)
    expected = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], np.uint8)  # 128 / 257 < 0.5 < 129 / 257
    image = open_image(encode(Image.fromarray(values), kind))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), expected)


def test_dark_sixteen_bit_image_is_not_taken_for_eight_bits() -> None:
    assert np.asarray(image_from_array(np.full((2, 2), 200, np.uint16))).max() == 1


@pytest.mark.parametrize(("alpha", "red"), [(255, 200), (0, 255), (128, 227)])
def test_transparency_is_composited_on_white(alpha: int, red: int) -> None:
    image = open_image(encode(Image.new("RGBA", (3, 3), (200, 0, 0, alpha))))
    assert image.mode == "RGB"
    assert image.getpixel((1, 1))[0] == pytest.approx(red, abs=1)
    assert image.getpixel((1, 1))[1] == pytest.approx(255 - alpha, abs=1)


def test_grey_with_alpha_stays_grey() -> None:
    image = open_image(encode(Image.new("LA", (3, 3), (100, 0))))
    assert (image.mode, image.getpixel((0, 0))) == ("L", 255)


def test_palette_with_transparency() -> None:
    source = Image.new("P", (2, 1))
    source.putpalette([10, 20, 30, 200, 100, 0])
    source.putdata([0, 1])
    image = open_image(encode(source, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 0)) == (200, 100, 0)


def test_palette_and_bilevel() -> None:
    source = Image.new("P", (1, 1))
    source.putpalette([10, 20, 30])
    assert open_image(encode(source)).getpixel((0, 0)) == (10, 20, 30)
    source.putpalette([40, 40, 40])
    assert open_image(encode(source)).mode == "L"
    assert open_image(encode(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == 255


def test_cmyk_jpeg() -> None:
    image = open_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = image.getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str) -> None:
    source = Image.new("RGB", (32, 16), (0, 0, 255))
    source.paste((255, 0, 0), (0, 0, 16, 16))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise, so that left becomes top
    image = open_image(encode(source, kind, exif=exif))
    assert image.size == (16, 32)
    assert image.getpixel((8, 4))[0] > 200 and image.getpixel((8, 28))[2] > 200


def test_bomb_is_refused_without_allocating() -> None:
    code = (
        "import resource, sys; from featherweight.data.images import open_image;"
        "resource.setrlimit(resource.RLIMIT_AS, (800 << 20,) * 2);"
        "open_image(sys.stdin.buffer.read())"
    )
    result = subprocess.run([sys.executable, "-c", code], input=bomb(), capture_output=True, timeout=60)
    assert b"DataError" in result.stderr and b"bomb" in result.stderr and b"MemoryError" not in result.stderr


def test_bomb_under_pillows_own_limit_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 10_000, 9_000, 8, 2, 0, 0, 0)
    with pytest.raises(DataError, match="10000 x 9000"), pytest.warns(Image.DecompressionBombWarning):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"just a text file\n" * 20, "content is none of"),
        (b"\xff\xd8\xff\xe0 nonsense", "not a readable"),
    ],
)
def test_no_image(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encode(Image.fromarray(noise), kind)
    with pytest.raises(DataError):
        open_image(content[: len(content) // 2])


def test_random_damage_raises_nothing_else() -> None:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        content = encode(noise, kind)
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
            try:
                assert open_image(damaged.tobytes()).mode in ("L", "RGB")
            except DataError:
                continue


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read"):
        open_image(tmp_path / "none.png")


def test_postscript_is_not_interpreted() -> None:
    with pytest.raises(DataError, match="content is none of"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_float_arrays() -> None:
    assert to_uint8(np.array([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    assert to_uint8(np.array([0.0, 127.6, 255.0])).tolist() == [0, 128, 255]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]
    assert to_uint8(np.array([0, 255], np.int64)).tolist() == [0, 255]
    for bad in (np.nan, np.inf, -1.0, 300.0):
        with pytest.raises(DataError):
            to_uint8(np.array([0.5, bad]))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0, 3), (4,), (2, 2, 2), (1, 2, 2, 3)])
def test_shapes_that_are_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="shape"):
        open_image(np.zeros(shape, np.uint8))


def test_is_grey() -> None:
    colour = np.zeros((2, 2, 3), np.uint8)
    assert is_grey(colour) and is_grey(colour[..., 0])
    colour[1, 1, 2] = 1
    assert not is_grey(colour)


def test_imports_no_torch() -> None:
    code = "import sys, featherweight.data.preprocess as p; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
