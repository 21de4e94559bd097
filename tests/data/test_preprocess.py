"""The preprocessing rule against Pillow and numpy by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from featherweight.data.preprocess import Preprocess, resize_image
from featherweight.errors import DataError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def test_apply_equals_the_formula_by_hand() -> None:
    spec = Preprocess(size=(8, 12), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    resized = np.asarray(Image.fromarray(COLOUR).resize((12, 8), Image.Resampling.BILINEAR), np.float64)
    expected = ((resized / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]).transpose(2, 0, 1)
    got = spec.apply(COLOUR)
    assert got.dtype == np.float32 and got.shape == (3, 8, 12) and got.flags.c_contiguous
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_halving_averages_the_triangle_of_antialiasing() -> None:
    """Bilinear with antialiasing at half the size weighs four neighbours 1, 3, 3, 1."""
    row = RNG.integers(0, 256, (1, 16), np.uint8)
    got = resize_image(Image.fromarray(np.repeat(row, 16, 0)), (8, 8), "L")[4, :, 0].astype(float)
    wide = row[0].astype(float)
    middle = [
        (wide[2 * i - 1] + 3 * wide[2 * i] + 3 * wide[2 * i + 1] + wide[2 * i + 2]) / 8 for i in range(1, 7)
    ]
    np.testing.assert_allclose(got[1:7], middle, atol=1.0)


def test_same_size_is_untouched() -> None:
    assert np.array_equal(resize_image(Image.fromarray(COLOUR), (20, 30)), COLOUR)


def test_crop_takes_the_centre_and_keeps_the_shape() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    assert (resize_image(Image.fromarray(wide), (10, 10), resize="crop") == 255).all()
    squashed = resize_image(Image.fromarray(wide), (10, 10), resize="squash")
    assert squashed[:, 0].max() == 0 and squashed[:, 5].min() == 255


def test_grey_and_colour_convert_both_ways() -> None:
    grey = Preprocess(size=(4, 4), mean=(0.0,), std=(1.0,), mode="L").apply(np.full((4, 4, 3), 51, np.uint8))
    np.testing.assert_allclose(grey, np.full((1, 4, 4), 0.2), atol=1e-6)
    colour = Preprocess(size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3).apply(np.full((4, 4), 51, np.uint8))
    assert colour.shape == (3, 4, 4)


def test_json_round_trip_gives_the_same_tensor() -> None:
    spec = Preprocess(
        size=(7, 9), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize="crop", interpolation="bicubic"
    )
    again = Preprocess.from_json(spec.to_json())
    assert again == spec and np.array_equal(again.apply(COLOUR), spec.apply(COLOUR))


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "CMYK"},
        {"size": (0, 4)},
        {"size": (4,)},
        {"mean": (0.5,)},
        {"std": (0.0, 1.0, 1.0)},
        {"std": (float("nan"), 1.0, 1.0)},
        {"resize": "fit"},
        {"interpolation": "lanczos"},
        {"version": 99},
    ],
)
def test_bad_fields(change: dict[str, object]) -> None:
    fields = {"size": (4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3} | change
    with pytest.raises(DataError):
        Preprocess(**fields)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"size": [4, 4], "surprise": 1}', "not json"])
def test_bad_json(text: str) -> None:
    with pytest.raises(DataError):
        Preprocess.from_json(text)
