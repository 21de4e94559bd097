"""Uniform quantisers: a float becomes an integer times a step.

Affine: `x' = (q - zero) * step`, where float 0 is exact whatever the range, so that zero padding stays exact.
Symmetric: `zero = 0`; weights use the narrow range (int8: -127..127), so a product never meets -128 * -128.
Rounding is half to even, as in NumPy, PyTorch and onnxruntime.

Reference: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342,
section 2. The paper's formula for simulated quantisation loses a sign; this is the corrected one.
"""

from __future__ import annotations

import numpy as np

# A filter that died in training is all zero; its step must still divide.
TINY_STEP = 1e-12


def affine_params(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Return step and zero point of the unsigned affine quantiser of the range `low`..`high`.

    The range is first widened to hold 0.

    >>> affine_params(2.1, 3.5) == (3.5 / 255, 0)
    True
    >>> affine_params(-1, 1) == (2 / 255, 128)
    True
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits
    step = max((high - low) / (levels - 1), TINY_STEP)
    return step, int(np.clip(np.rint(-low / step), 0, levels - 1))


def symmetric_step(weight: np.ndarray, bits: int = 8, axis: int | None = None) -> np.ndarray:
    """Return the step of the symmetric narrow-range quantiser of `weight`.

    Args:
        weight: the values, any shape.
        bits: width of the integer.
        axis: the axis of output channels for one step each, broadcastable to `weight`; None for a single
        step.
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    peak = np.abs(weight).max(axis=others, keepdims=True)
    return np.maximum(peak / (2 ** (bits - 1) - 1), TINY_STEP)


def quantize(x: np.ndarray, step: float | np.ndarray, zero: int, low: int, high: int) -> np.ndarray:
    """Map floats to integers `low`..`high`, as int32."""
    return np.clip(np.rint(x / step) + zero, low, high).astype(np.int32)


def dequantize(q: np.ndarray, step: float | np.ndarray, zero: int = 0) -> np.ndarray:
    """Map integers back to floats."""
    return (q.astype(np.float64) - zero) * step


def fake_affine(x: np.ndarray, low: float, high: float, bits: int = 8) -> np.ndarray:
    """Quantise and dequantise `x` with the affine quantiser of the range `low`..`high`."""
    step, zero = affine_params(low, high, bits)
    return dequantize(quantize(x, step, zero, 0, 2**bits - 1), step, zero)


def fake_symmetric(weight: np.ndarray, bits: int = 8, axis: int | None = None) -> np.ndarray:
    """Quantise and dequantise `weight` with its symmetric quantiser, per channel if `axis` is set."""
    step, top = symmetric_step(weight, bits, axis), 2 ** (bits - 1) - 1
    return dequantize(quantize(weight, step, 0, -top, top), step)


def sqnr_db(x: np.ndarray, quantized: np.ndarray) -> float:
    """Return the signal to quantisation noise ratio in decibels; infinite where nothing was lost."""
    noise = float(np.square(x - quantized).sum())
    return float("inf") if noise == 0 else 10 * float(np.log10(np.square(x).sum() / noise))
