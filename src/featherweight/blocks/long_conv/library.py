"""Long convolutions by the library's real transforms, and as a direct sum: the reference of the other
forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(u: Tensor, taps: Tensor, before: Tensor) -> Tensor:
    """Convolve rows (B, H, L) with taps (H, K) at lags 0, 1, ... and (H, K') at lags -1, -2, ... by
    torch.fft.

    Half-precision inputs are transformed in float32; double stays double.
    """
    length = u.shape[-1]
    size = fast_size(span(length, taps.shape[-1], before.shape[-1]))
    exact = u.double() if u.dtype == torch.float64 else u.float()
    circular = join_circular(taps.to(exact.dtype), before.to(exact.dtype), size)
    product = torch.fft.rfft(exact, n=size) * torch.fft.rfft(circular)
    return torch.fft.irfft(product, n=size)[..., :length].to(u.dtype)


def convolve_directly(u: Tensor, taps: Tensor, before: Tensor) -> Tensor:
    """Convolve as `convolve` does, by a depthwise `conv1d`: a form that every exporter knows."""
    kernel = torch.cat([before.flip(-1), taps], -1).flip(-1)
    padded = F.pad(u, (taps.shape[-1] - 1, before.shape[-1]))
    return F.conv1d(padded, kernel[:, None].to(u.dtype), groups=u.shape[1])


def span(length: int, after: int, before: int) -> int:
    """Return how many places hold results, and taps at lags -before .. after - 1, without overlap."""
    return max(length + after - 1, length + before, after + before)


def split_circular(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Split a circular kernel (..., 2 L) into taps at lags 0 .. L-1 and at lags -1 .. -(L-1).

    Place `2 L - d` of a circular kernel is lag -d; place L reaches no output of a row of L numbers.
    """
    length = kernel.shape[-1] // 2
    return kernel[..., :length], kernel[..., length + 1 :].flip(-1)


def join_circular(taps: Tensor, before: Tensor, size: int) -> Tensor:
    """Lay taps (..., K) at lags 0, 1, ... and (..., K') at lags -1, -2, ... on a circle (..., size)."""
    kernel = F.pad(taps, (0, size - taps.shape[-1]))
    if before.shape[-1]:
        kernel = kernel + F.pad(before.flip(-1), (size - before.shape[-1], 0))
    return kernel


def fast_size(needed: int) -> int:
    """Return the least even number with no factor above 5 that is at least `needed`.

    >>> fast_size(2047), fast_size(1001)
    (2048, 1024)
    """
    best = 2
    while best < needed:
        best *= 2
    for fives in (1, 5, 25, 125, 625):
        for threes in (1, 3, 9, 27, 81, 243):
            size = 2 * fives * threes
            while size < needed:
                size *= 2
            best = min(best, size)
    return best
