"""PSNR, SSIM and luma against scipy's filters, published values of bicubic, and the formulas by hand."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from featherweight.data.bicubic import imresize
from featherweight.errors import DataError
from featherweight.measure.image_quality import psnr, ssim, to_y

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RNG = np.random.default_rng(0)
TRUTH = RNG.integers(0, 256, (30, 40)).astype(float)
NOISY = np.clip(TRUTH + RNG.normal(0, 20, TRUTH.shape), 0, 255)


def test_luma_is_bt601() -> None:
    pixels = RNG.integers(0, 256, (5, 7, 3), np.uint8)
    red, green, blue = np.moveaxis(pixels / 255, -1, 0)
    expected = 16 + 65.481 * red + 128.553 * green + 24.966 * blue
    np.testing.assert_allclose(to_y(pixels), expected, atol=1e-9)
    np.testing.assert_allclose(to_y(pixels.astype(np.uint16) * 257), expected, atol=1e-9)
    np.testing.assert_allclose(to_y(pixels / 255), expected, atol=1e-9)
    assert np.array_equal(to_y(pixels, rounded=True), np.floor(expected + 0.5))
    grey = pixels[..., :1]
    np.testing.assert_allclose(to_y(grey), to_y(np.repeat(grey, 3, -1)), atol=1e-9)
    assert np.array_equal(to_y(grey[..., 0]), to_y(grey))


def test_psnr_is_the_formula() -> None:
    assert psnr(TRUTH, TRUTH) == math.inf
    assert psnr(TRUTH + 1, TRUTH) == pytest.approx(10 * math.log10(255**2))
    assert psnr(TRUTH / 255 + 0.1, TRUTH / 255, peak=1) == pytest.approx(20)
    spoilt = TRUTH.copy()
    spoilt[:3] = 0
    assert psnr(spoilt, TRUTH, border=3) == math.inf
    assert psnr(spoilt, TRUTH, border=2) < 40
    # numbers of 8 bits must not wrap around
    assert psnr(np.uint8([[0]]), np.uint8([[255]])) == pytest.approx(0)


def test_ssim_equals_scipys_gaussian() -> None:
    """The window of 11 is sigma 1.5 cut at 3.5 sigma; five pixels at each edge hold no whole window."""

    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = NOISY, TRUTH
    va, vb = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2
    cov = blur(a * b) - blur(a) * blur(b)
    c1, c2 = 2.55**2, 7.65**2
    expected = np.mean(
        (2 * blur(a) * blur(b) + c1) * (2 * cov + c2) / ((blur(a) ** 2 + blur(b) ** 2 + c1) * (va + vb + c2))
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-12)
    assert ssim(b, b) == pytest.approx(1)
    assert ssim(a, b, border=4) == pytest.approx(ssim(a[4:-4, 4:-4], b[4:-4, 4:-4]))


@pytest.mark.parametrize(
    ("scale", "published"), [(2, (33.66, 0.9299)), (3, (30.39, 0.8682)), (4, (28.42, 0.8104))]
)
def test_bicubic_reaches_its_published_figures(scale: int, published: tuple[float, float]) -> None:
    """Set5; the literature's figures are of 8-bit results, so they agree to some hundredths."""
    path = SHARED / "set5" / "set5.zip"
    if not path.is_file():
        pytest.skip("shared data set set5 is not beside the project")
    found = []
    with zipfile.ZipFile(path) as archive:
        for i in range(1, 6):
            high, low = (
                np.asarray(Image.open(io.BytesIO(archive.read(f"x{scale}/img_00{i}_{kind}.png"))))
                for kind in ("HR", "LR")
            )
            pair = to_y(imresize(low, scale)), to_y(high)
            found.append((psnr(*pair, scale), ssim(*pair, scale)))
    mean = np.mean(found, axis=0)
    assert mean[0] == pytest.approx(published[0], abs=0.03)
    assert mean[1] == pytest.approx(published[1], abs=0.001)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="shapes"):
        psnr(TRUTH, TRUTH[1:])
    with pytest.raises(DataError, match="nothing left"):
        psnr(TRUTH, TRUTH, border=15)
    with pytest.raises(DataError, match="11 x 11"):
        ssim(TRUTH, TRUTH, border=10)
    with pytest.raises(DataError, match="11 x 11"):
        ssim(np.dstack([TRUTH] * 3), np.dstack([TRUTH] * 3))
    with pytest.raises(DataError, match="type int"):
        to_y(np.zeros((2, 2, 3), int))
    with pytest.raises(DataError, match="shape"):
        to_y(np.zeros((2, 2, 4)))
