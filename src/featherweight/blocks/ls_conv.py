"""LS convolution: weights of a small kernel are read off a large window, only the small window is summed.

A static 7x7 depthwise convolution, in a bottleneck of half the channels, sees a large window cheaply; what it
sees predicts, for every position, one 3x3 kernel per eight channels. The official sum over those nine
neighbours is a Triton kernel. This one is nine products in plain PyTorch: it runs on every device, exports to
ONNX without custom operators and takes any batch.

Reference: Wang et al., "LSNet: See Large, Focus Small", arXiv 2503.23135, section 3.2.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct

SHARE = 8
"""Channels that use one predicted kernel; they lie `channels / 8` apart, not side by side."""

TAPS = 9


def aggregate(x: Tensor, kernels: Tensor) -> Tensor:
    """Sum each 3x3 neighbourhood of `x` with its own predicted kernel (small-kernel aggregation).

    `out[n, c, i, j]` is the sum over taps `k = 3 row + col` of
    `kernels[n, c mod G, k, i, j] * x[n, c, i + row - 1, j + col - 1]`, with zeros outside. The order of taps,
    the zero padding and the interleaving of channels are the published ones.

    Args:
        x: `(N, C, H, W)`.
        kernels: `(N, G, 9, H, W)`, where G divides C.

    >>> x = torch.arange(8.0).reshape(1, 2, 2, 2)
    >>> centre = torch.zeros(1, 1, 9, 2, 2)
    >>> centre[:, :, 4] = 1
    >>> torch.equal(aggregate(x, centre), x)
    True
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, kernels.dtype), torch.float32)
    if not x.dtype == kernels.dtype == wide:  # half precision would lose the sum
        return aggregate(x.to(wide), kernels.to(wide)).to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad):
        return _Aggregate.apply(x, kernels)
    return _sum_taps(_pad(x), kernels)


def _pad(x: Tensor) -> Tensor:
    """One ring of zeros and one row more: room for the last shift."""
    return F.pad(x, (1, 1, 1, 2)).contiguous()  # (N, C, H + 3, W + 2)


def _shifts(padded: Tensor, groups: int) -> list[Tensor]:
    """Return nine views of the padded map, `(N, C / G, G, H * (W + 2))`.

    Rows lie end to end, so that a shift in two dimensions is one contiguous slice. Its last two columns are
    rubbish; the kernels are zero there.
    """
    height, pitch = int(padded.shape[2]) - 3, int(padded.shape[3])
    rows = padded.flatten(2).unflatten(1, (-1, groups))
    starts = [row * pitch + col for row in range(3) for col in range(3)]
    return [rows[..., start : start + height * pitch] for start in starts]


def _taps(kernels: Tensor) -> tuple[Tensor, ...]:
    return F.pad(kernels, (0, 2)).flatten(3).unsqueeze(1).unbind(3)  # nine of (N, 1, G, H * (W + 2))


def _sum_taps(padded: Tensor, kernels: Tensor) -> Tensor:
    shifts, taps = _shifts(padded, kernels.shape[1]), _taps(kernels)
    total = shifts[0] * taps[0]
    for shift, tap in zip(shifts[1:], taps[1:], strict=True):
        total = torch.addcmul(total, shift, tap)
    pitch = int(padded.shape[3])
    return total.flatten(1, 2).unflatten(2, (-1, pitch))[..., : pitch - 2]  # (N, C, H, W)


def _add_shares(x: Tensor) -> Tensor:
    """Sum over dimension 1.

    In a graph for a compiler term by term: where the groups lie side by side, inductor (PyTorch 2.12) sums a
    vector of them at once and stores it whole, behind the end of the buffer if there are fewer.
    """
    if torch.compiler.is_compiling():
        return functools.reduce(torch.add, x.unbind(1))
    return x.sum(1)


class _Aggregate(torch.autograd.Function):
    """`aggregate` with a backward pass of nine products too, nearly twice as fast as the recorded one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        return _sum_taps(_pad(x), kernels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        groups, pitch = kernels.shape[1], x.shape[3] + 2
        rows = F.pad(grad, (0, 2)).flatten(2).unflatten(1, (-1, groups))  # (N, C / G, G, H * (W + 2))
        spread = _pad(torch.zeros_like(x))
        for target, tap in zip(_shifts(spread, groups), _taps(kernels), strict=True):
            target.addcmul_(rows, tap)
        summed = torch.stack([_add_shares(rows * shift) for shift in _shifts(_pad(x), groups)], 2)
        return spread[:, :, 1:-2, 1:-1], summed.unflatten(3, (-1, pitch))[..., : pitch - 2]


class LSConv(nn.Module):
    """LS convolution: a large window predicts small kernels, which then sum the input, plus the input.

    `(N, channels, H, W)` to the same shape.

    Args:
        channels: of input and output, a multiple of 8.
        window: side of the window that the kernels are predicted from, in pixels.
        hidden: channels that look through the window; half of `channels` as published by default.
    """

    def __init__(self, channels: int, window: int = 7, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or channels // 2
        self.groups = channels // SHARE
        self.perceive = nn.Sequential(
            ConvNormAct(channels, hidden, 1),
            ConvNormAct(hidden, hidden, window, groups=hidden, act=None),
            ConvNormAct(hidden, hidden, 1),
            nn.Conv2d(hidden, TAPS * self.groups, 1),
            nn.GroupNorm(self.groups, TAPS * self.groups),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Predict the kernels, sum with them, normalise, add the input."""
        kernels = self.perceive(x).unflatten(1, (self.groups, TAPS))  # (N, channels / 8, 9, H, W)
        return self.norm(aggregate(x, kernels)) + x
