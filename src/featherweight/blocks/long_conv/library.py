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
    length, after = u.shape[-1], taps.shape[-1]
    size = fast_size(max(length + after - 1, length + before.shape[-1], after + before.shape[-1]))
    exact = u.double() if u.dtype == torch.float64 else u.float()
    circular = F.pad(taps.to(exact.dtype), (0, size - after))
    if before.shape[-1]:
        circular = circular + F.pad(before.to(exact.dtype).flip(-1), (size - before.shape[-1], 0))
    product = torch.fft.rfft(exact, n=size) * torch.fft.rfft(circular, n=size)
    return torch.fft.irfft(product, n=size)[..., :length].to(u.dtype)


def convolve_directly(u: Tensor, taps: Tensor, before: Tensor) -> Tensor:
    """Convolve as `convolve` does, by a depthwise `conv1d`: a form that every exporter knows."""
    kernel = torch.cat([before.flip(-1), taps], -1).flip(-1)
    padded = F.pad(u, (taps.shape[-1] - 1, before.shape[-1]))
    return F.conv1d(padded, kernel[:, None].to(u.dtype), groups=u.shape[1])


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
