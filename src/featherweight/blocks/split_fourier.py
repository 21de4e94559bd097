"""Inverse real 2-D Fourier transform of half a spectrum, also as small matrix products for graphs.

A traced graph (for ONNX) knows no transforms, and one matrix for a whole axis of a large layer would outweigh
the layer. So an axis of P Q values is transformed in two steps, by matrices of Q x Q and
P x P with rotations in between (Cooley and Tukey), which need P + Q products a value.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def inverse_real(z: Tensor, rows: int, columns: int) -> Tensor:
    """Half a spectrum to the real matrices that it belongs to; what no real matrix can have is ignored.

    `(N, rows, columns // 2 + 1, 2)`, real and imaginary parts last, to `(N, rows, columns)`.

    >>> inverse_real(torch.tensor([[[[6.0, 0.0], [2.0, 0.0]]]]), 1, 2).tolist()
    [[[4.0, 2.0]]]
    """
    if not torch.jit.is_tracing():
        return torch.fft.irfft2(torch.view_as_complex(z.contiguous()), s=(rows, columns))
    half = columns // 2 + 1
    real, imaginary = (z[..., part].transpose(-1, -2) for part in (0, 1))  # each (N, half, rows)
    turned = _inverse_last(real, imaginary, (half, rows))
    real, imaginary = (part.transpose(-1, -2) for part in turned)  # each (N, rows, half)
    # The first column, and the last of an even number, are their own mirror images and so real.
    inner = slice(1, (columns + 1) // 2)
    last = slice((columns + 1) // 2, columns // 2 + 1)
    mirrored = real[..., inner].flip(-1), imaginary[..., inner].flip(-1)
    none = torch.zeros_like(imaginary[..., :1])
    real = torch.cat((real, mirrored[0]), -1)
    imaginary = torch.cat(
        (none, imaginary[..., inner], torch.zeros_like(imaginary[..., last]), -mirrored[1]), -1
    )
    return _inverse_last(real, imaginary, (rows, columns), with_imaginary=False)[0] / (rows * columns)


def _inverse_last(
    real: Tensor, imaginary: Tensor, shape: tuple[int, int], with_imaginary: bool = True
) -> tuple[Tensor, Tensor]:
    """Transform the last axis of `(N, *shape)`, without the division by its length."""
    count, size = shape
    inner, twist, outer = ([m.to(real) for m in pair] for pair in _rotations(size))
    p, q = outer[0].shape[0], inner[0].shape[0]
    # Frequency k1 + P k2 stands at (k2, k1), place Q n1 + n2 comes to stand at (n2, n1).
    pair = tuple(part.reshape(-1, count, q, p) for part in (real, imaginary))
    pair = _multiply(inner, pair, torch.matmul)
    pair = _multiply(twist, pair, torch.mul)
    (cos, sin), (a, b) = outer, pair
    found = a @ cos - b @ sin, (a @ sin + b @ cos) if with_imaginary else a
    return tuple(part.transpose(-1, -2).reshape(-1, count, size) for part in found)


def _multiply(left: list[Tensor], right: tuple[Tensor, Tensor], product: object) -> tuple[Tensor, Tensor]:
    """Complex product of real and imaginary parts."""
    (a, b), (c, d) = left, right
    return product(a, c) - product(b, d), product(a, d) + product(b, c)


def _rotations(size: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return cosine and sine of the inner transform (Q, Q), the rotation (Q, P), the outer one (P, P)."""
    p = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    q = size // p
    angles = (
        np.outer(np.arange(q), np.arange(q)) / q,
        np.outer(np.arange(q), np.arange(p)) / size,
        np.outer(np.arange(p), np.arange(p)) / p,
    )
    turns = [2 * np.pi * (angle % 1.0) for angle in angles]
    return tuple((torch.from_numpy(np.cos(turn)), torch.from_numpy(np.sin(turn))) for turn in turns)
