"""Pictures written in strips, read back by Pillow and by our own reader."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from featherweight.data.photo_files import Sheet, check_size, photo_writer
from featherweight.data.photos import EXIF_IFD, Photo, read_photo
from featherweight.errors import DataError, WriteError

RNG = np.random.default_rng(0)


def soft(height: int, width: int, channels: int, dtype: type = np.uint8) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    wave = np.sin(rows / 9)[..., None] + np.cos(columns / 7)[..., None] + 0.2 * np.arange(channels)
    noise = RNG.random((height, width, channels))
    return ((wave + 3 + 0.1 * noise) / 6 * np.iinfo(dtype).max).astype(dtype)


def sheet(pixels: np.ndarray, exif: Image.Exif | None = None, icc: bytes | None = None, dpi=None) -> Sheet:
    photo = Photo(pixels, None, "PNG", exif or Image.Exif(), icc, dpi, ())
    return Sheet.like(photo, *pixels.shape, pixels.dtype, 90)


def write(path: Path, kind: str, pixels: np.ndarray, step: int = 37, **about) -> Path:
    with photo_writer(path, kind, sheet(pixels, **about)) as writer:
        for start in range(0, len(pixels), step):
            writer.write(pixels[start : start + step])
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_formats_give_back_every_value(
    kind: str, channels: int, dtype: type, tmp_path: Path
) -> None:
    if (kind, channels, dtype) == ("TIFF", 2, np.uint16):
        pytest.skip("Pillow reads no TIFF of 16-bit grey with alpha")
    pixels = soft(131, 50, channels, dtype)
    path = write(tmp_path / "a", kind, pixels)
    photo = read_photo(path)
    assert photo.format == kind and photo.pixels.dtype == dtype
    colours = 3 if channels > 2 else 1
    assert np.array_equal(photo.pixels, pixels[:, :, :colours])
    if channels in (2, 4):
        assert np.array_equal(photo.alpha, pixels[:, :, -1])
    with Image.open(path) as image:
        image.load()
        if dtype == np.uint8:
            assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height", [5, 64, 65, 200])
def test_jpeg_of_strips_is_that_of_the_whole(channels: int, height: int, tmp_path: Path) -> None:
    """libjpeg at once, with the same settings, must give the same pixels."""
    pixels = soft(height, 83, channels)
    path = write(tmp_path / "a.jpg", "JPEG", pixels)
    plain = pixels[:, :, 0] if channels == 1 else pixels
    Image.fromarray(plain).save(tmp_path / "b.jpg", quality=90, subsampling=0)
    with Image.open(path) as got, Image.open(tmp_path / "b.jpg") as expected:
        assert got.size == (83, height)
        assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_webp_is_collected(tmp_path: Path) -> None:
    pixels = soft(70, 40, 4)
    got = read_photo(write(tmp_path / "a.webp", "WEBP", pixels))
    assert np.array_equal(got.alpha, pixels[:, :, 3])
    assert np.abs(got.pixels.astype(int) - pixels[:, :, :3]).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_metadata_arrive(kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 1
    exif.get_ifd(EXIF_IFD)[0x8827] = 400
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = read_photo(write(tmp_path / "a", kind, soft(20, 30, 3), exif=exif, icc=icc, dpi=(240.0, 240.0)))
    assert photo.icc == icc
    assert photo.exif[0x010F] == "Maker" and photo.exif.get_ifd(EXIF_IFD)[0x8827] == 400
    if kind != "WEBP":
        assert photo.dpi == pytest.approx((240, 240), abs=0.02)


def test_a_strip_at_a_time_lies_in_memory(tmp_path: Path) -> None:
    rows = soft(64, 4000, 3)
    photo = Photo(rows, None, "PNG", Image.Exif(), None, None, ())
    for kind in ("PNG", "TIFF", "JPEG"):
        tracemalloc.start()
        with photo_writer(tmp_path / "a", kind, Sheet.like(photo, 640, 4000, 3, rows.dtype, 90)) as writer:
            for _ in range(10):
                writer.write(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 15 * rows.nbytes, kind


def test_nothing_is_left_of_a_broken_write(tmp_path: Path) -> None:
    pixels = soft(100, 20, 3)
    path = tmp_path / "a.png"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), photo_writer(path, "PNG", sheet(pixels)) as writer:
        writer.write(pixels[:70])
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_folders_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pixels = soft(4, 4, 3)
    with (
        pytest.raises(WriteError, match="Cannot write"),
        photo_writer(tmp_path / "file" / "a.png", "PNG", sheet(pixels)),
    ):
        pass


def test_sides_that_a_format_cannot_hold() -> None:
    check_size("PNG", 10, 240_000, "a")
    for kind in ("JPEG", "WEBP"):
        with pytest.raises(DataError, match="--format png"):
            check_size(kind, 10, 240_000, "a")
