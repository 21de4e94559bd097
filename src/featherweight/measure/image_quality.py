"""How near a restored image is to the true one: PSNR and SSIM on the luma channel, by the field's protocol.

Super-resolution papers convert both images to luma (ITU-R BT.601 with studio swing, as MATLAB's
`rgb2ycbcr`), do not round it, cut as many pixels from each border as the scale says, and take the peak as
255. SSIM: Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE
TIP 2004, with its 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, over whole windows only.
"""

from __future__ import annotations

import math

import numpy as np

from featherweight.errors import DataError

PEAK = 255.0
_LUMA = np.array([65.481, 128.553, 24.966])
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def to_y(pixels: np.ndarray, rounded: bool = False) -> np.ndarray:
    """Return the luma of an image as float64, between 16 (black) and 235 (white).

    Args:
        pixels: (..., H, W, 3), or grey as (H, W) or (H, W, 1); uint8, uint16, or floats within [0, 1].
        rounded: round to whole grey levels, as `rgb2ycbcr` gives for 8-bit images.

    Raises:
        DataError: another number of channels or type of number.

    >>> to_y(np.array([[[255, 255, 255], [0, 0, 0]]], np.uint8)).round(6).tolist()
    [[235.0, 16.0]]
    """
    if pixels.dtype.kind not in "uf":
        raise DataError(f"Pixels are of type {pixels.dtype}. Expected uint8, uint16 or floats within [0, 1].")
    top = float(np.iinfo(pixels.dtype).max) if pixels.dtype.kind == "u" else 1.0
    if pixels.ndim == 2 or pixels.shape[-1] == 1:
        luma = pixels.reshape(pixels.shape[:2]).astype(np.float64) * (_LUMA.sum() / top)
    elif pixels.shape[-1] == 3:
        luma = pixels.astype(np.float64) @ (_LUMA / top)
    else:
        raise DataError(f"Pixels are of shape {pixels.shape}. Expected (H, W) or (H, W, 3).")
    luma += 16
    return np.floor(luma + 0.5) if rounded else luma


def psnr(restored: np.ndarray, truth: np.ndarray, border: int = 0, peak: float = PEAK) -> float:
    """Return the peak signal-to-noise ratio in dB; equal images give infinity.

    Args:
        restored: one channel (H, W) or any number (H, W, C).
        truth: of the same shape.
        border: pixels left out at each edge.
        peak: the largest value that a pixel can have.

    Raises:
        DataError: the shapes differ, or nothing is left within the border.
    """
    a, b = _inner(restored, truth, border)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def ssim(restored: np.ndarray, truth: np.ndarray, border: int = 0, peak: float = PEAK) -> float:
    """Return the mean structural similarity of two single-channel images (H, W), 1 for equal ones.

    Raises:
        DataError: the shapes differ, have channels, or hold no whole 11 x 11 window within the border.
    """
    a, b = _inner(restored, truth, border)
    if a.ndim != 2 or min(a.shape) < _WINDOW:
        raise DataError(
            f"SSIM needs one channel of at least 11 x 11 pixels within the border; seen {a.shape}."
        )
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    shared = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return float(np.mean(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))))


def _inner(restored: np.ndarray, truth: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if restored.shape != truth.shape:
        raise DataError(f"Cannot compare images of shapes {restored.shape} and {truth.shape}. Expected one.")
    if min(truth.shape[:2]) <= 2 * border:
        raise DataError(f"An image of {truth.shape} has nothing left within a border of {border} pixels.")
    cut = slice(border, -border or None)
    return restored[cut, cut].astype(np.float64), truth[cut, cut].astype(np.float64)


def _blur(image: np.ndarray) -> np.ndarray:
    """Filter (H, W) with the Gaussian window, keeping only whole windows."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window /= window.sum()
    for axis in (0, 1):
        length = image.shape[axis] - _WINDOW + 1
        parts = (np.take(image, range(k, k + length), axis) * window[k] for k in range(_WINDOW))
        image = np.sum(list(parts), axis=0)
    return image
