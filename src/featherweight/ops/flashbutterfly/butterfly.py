"""A Fourier transform whose small butterfly matrices are parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import UsageError


class ButterflyFFT(nn.Module):
    """A Fourier transform by butterfly factors of size 16 whose small matrices are parameters (section 3.3).

    `(..., L)` real or complex to `(..., N)` complex, `N` the power of two at or above `size`.

    Args:
        mode: `"replace"` starts from the exact matrices; `"additive"` adds learnt ones, drawn at 0.01, to
            them.
        channels: 1 shares the matrices, else one set for each channel (the dimension before the last).
        dropout: share of matrix entries that are dropped while training.

    Raises:
        UsageError: the mode is unknown.

    >>> x = torch.randn(2, 64)
    >>> torch.allclose(ButterflyFFT()(x, 64), torch.fft.fft(x), atol=1e-4)
    True
    """

    SIDES = (2, 4, 8, 16)

    def __init__(self, mode: str = "replace", channels: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if mode not in ("replace", "additive"):
            raise UsageError(f"Got mode={mode!r}; expected 'replace' or 'additive'.")
        self.mode, self.dropout = mode, dropout
        for side in self.SIDES:
            exact = torch.view_as_real(_dft(side)).repeat(channels, 1, 1, 1)
            start = exact if mode == "replace" else 0.01 * torch.randn_like(exact)
            self.register_parameter(f"mat_{side}", nn.Parameter(start))

    def matrix(self, side: int) -> Tensor:
        """Return the matrix of a side, (channels, side, side) complex."""
        learnt = getattr(self, f"mat_{side}")
        if self.mode == "additive":
            learnt = learnt + torch.view_as_real(_dft(side).to(learnt.device))
        return torch.view_as_complex(F.dropout(learnt, self.dropout, self.training))

    def forward(self, x: Tensor, size: int) -> Tensor:
        """Transform the last dimension, padded with zeros to the power of two at or above `size`.

        Raises:
            UsageError: `size` is below the length of `x` or below 2.
        """
        if size < max(2, x.shape[-1]):
            raise UsageError(f"Got size={size} for rows of {x.shape[-1]}; expected at least as many, and 2.")
        length = 1 << (size - 1).bit_length()
        return self._transform(F.pad(x.to(torch.complex64), (0, length - x.shape[-1]))[..., None, :])[
            ..., 0, :
        ]

    def _transform(self, x: Tensor) -> Tensor:
        """Transform rows (..., channels, parts, N): the matrices differ by channel, not by part."""
        length = x.shape[-1]
        if length <= self.SIDES[-1]:
            return torch.einsum("hab,...hpb->...hpa", self.matrix(length), x)
        side, rest = self.SIDES[-1], length // self.SIDES[-1]
        y = torch.einsum("hab,...hpbn->...hpan", self.matrix(side), x.unflatten(-1, (side, rest)))
        turns = torch.outer(torch.arange(side), torch.arange(rest)).to(x.device) / length
        y = y * torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
        inner = self._transform(y.flatten(-3, -2)).unflatten(-2, (-1, side))
        return inner.transpose(-1, -2).flatten(-2)


def _dft(side: int) -> Tensor:
    turns = torch.outer(torch.arange(side), torch.arange(side)).double() / side
    return torch.polar(torch.ones_like(turns), -2 * math.pi * turns).to(torch.complex64)
