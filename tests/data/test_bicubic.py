"""MATLAB's bicubic resizing against the low-resolution images of Set5, Pillow's floats and a naive oracle."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featherweight.data.bicubic import Bicubic, imresize
from featherweight.errors import UsageError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (21, 30, 3), np.uint8)


def naive(row: list[float], length: int, scale: float, edge: str) -> list[float]:
    """One axis by the definition: sum over whole-number positions, kernel written out, edges by rule."""
    shrink = min(scale, 1.0)
    result = []
    for k in range(1, length + 1):
        centre = k / scale + 0.5 * (1 - 1 / scale)
        total = weight = 0.0
        for i in range(math.floor(centre - 2 / shrink) - 1, math.ceil(centre + 2 / shrink) + 2):
            x = abs(shrink * (centre - i))
            w = (
                (1.5 * x - 2.5) * x * x + 1
                if x <= 1
                else max(2 - x, 0) and ((-0.5 * x + 2.5) * x - 4) * x + 2
            )
            j = i
            while edge == "mirror" and not 1 <= j <= len(row):
                j = 1 - j if j < 1 else 2 * len(row) + 1 - j
            total += w * row[min(max(j, 1), len(row)) - 1]
            weight += w
        result.append(total / weight)
    return result


@pytest.mark.parametrize("name", ["set5", "bsd100"])
def test_published_low_resolution_images_come_out_in_every_pixel(name: str) -> None:
    path = SHARED / name / f"{name}.zip"
    if not path.is_file():
        pytest.skip(f"shared data set {name} is not beside the project")
    with zipfile.ZipFile(path) as archive:

        def read(member: str) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(archive.read(member))))

        if name == "set5":
            pairs = [
                (s, f"x{s}/img_00{i}_HR.png", f"x{s}/img_00{i}_LR.png")
                for s in (2, 3, 4)
                for i in range(1, 6)
            ]
        else:
            pairs = [(s, f"HR/img_0{i}.png", f"LRx{s}/img_0{i}.png") for s in (2, 4) for i in (10, 57)]
        for scale, high, low in pairs:
            assert np.array_equal(imresize(read(high), 1 / scale), read(low)), low


@pytest.mark.parametrize("edge", ["replicate", "mirror"])
@pytest.mark.parametrize("scale", [0.25, 1 / 3, 0.7, 1.0, 1.5, 2, 4])
def test_one_axis_equals_the_definition(scale: float, edge: str) -> None:
    row = RNG.normal(size=11)
    got = imresize(np.tile(row, (11, 1)), scale, edge=edge)
    assert got.shape == (math.ceil(11 * scale),) * 2
    np.testing.assert_allclose(got[2], naive(list(row), got.shape[1], scale, edge), atol=1e-12)
    turned = imresize(np.tile(row[:, None], (1, 11)), scale, edge=edge)
    np.testing.assert_allclose(turned[:, 2], got[2], atol=1e-12)


@pytest.mark.parametrize("size", [(16, 24), (10, 15), (64, 96), (40, 24), (80, 12)])
def test_floats_equal_pillow_within_the_edges(size: tuple[int, int]) -> None:
    """Pillow leaves pixels beyond the edge out, so only the inner part can agree."""
    image = RNG.random((32, 48)).astype(np.float32)
    expected = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    got = imresize(image, size=size)
    assert got.dtype == np.float32 and got.shape == size
    rim = [math.ceil(2 * max(new / old, 1)) for new, old in zip(size, image.shape, strict=True)]
    inner = tuple(slice(r, -r) for r in rim)
    np.testing.assert_allclose(got[inner], expected[inner], atol=2e-6)


def test_rounding_between_the_axes_and_clipping() -> None:
    """An 8-bit image is rounded half up after each axis, and the smaller factor goes first."""
    image = RNG.integers(0, 256, (12, 12), np.uint8)

    def once(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.floor(np.clip(imresize(pixels.astype(float), size=size), 0, 255) + 0.5)

    assert np.array_equal(imresize(image, size=(5, 8)), once(once(image, (5, 12)), (5, 8)))
    assert np.array_equal(imresize(image, size=(8, 5)), once(once(image, (12, 5)), (8, 5)))
    steep = np.repeat(np.uint8([[0, 0, 255, 255]]), 4, 0)
    assert imresize(steep, 4).min() == 0 and imresize(steep, 4).max() == 255
    assert imresize(steep / 255, 4).min() < 0, "floats keep the overshoot"


def test_sixteen_bits_are_kept() -> None:
    deep = RNG.integers(20000, 40000, (9, 12, 3), np.uint16)  # nothing clips
    got = imresize(deep, 2)
    assert got.dtype == np.uint16
    assert np.abs(got - imresize(deep.astype(float), 2)).max() < 2


def test_sizes_are_matlabs() -> None:
    assert imresize(COLOUR, 0.25).shape == (6, 8, 3)
    assert imresize(COLOUR, 1 / 3).shape == (7, 10, 3), "7.000000001 is 7"
    assert imresize(COLOUR, 1e-3).shape == (1, 1, 3)
    assert imresize(COLOUR[:1, :1], 3).shape == (3, 3, 3)
    assert np.array_equal(imresize(COLOUR, 1), COLOUR)


def test_rows_are_parts_of_the_whole() -> None:
    for size in ((50, 90), (9, 50), (50, 9)):
        whole = imresize(COLOUR, size=size)
        rows = Bicubic.of(COLOUR, size=size)
        parts = [rows.rows(COLOUR, start, min(start + 7, size[0])) for start in range(0, size[0], 7)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("image", [np.zeros((0, 3), np.uint8), np.zeros(3), np.zeros((2, 2), np.int32)])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(UsageError, match="Cannot resize an array"):
        imresize(image, 2)


@pytest.mark.parametrize(
    "asked",
    [{}, {"scale": 2, "size": (1, 1)}, {"scale": 0}, {"scale": math.nan}, {"size": (0, 3)}],
)
def test_sizes_that_cannot_be_are_refused(asked: dict) -> None:
    with pytest.raises(UsageError):
        imresize(COLOUR, **asked)
    with pytest.raises(UsageError, match="Edge 'wrap'"):
        imresize(COLOUR, 2, edge="wrap")
