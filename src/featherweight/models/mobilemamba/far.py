"""The far branch of MobileMamba: a selective scan over the map plus a filter of its Haar wavelet bands."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.fold import scale_output
from featherweight.blocks.selective_scan import selective_scan

DIRECTIONS, STATE = 2, 1
"""Each map is scanned forwards and backwards; a channel keeps one number."""


def haar(x: Tensor) -> Tensor:
    """Split each channel into its four Haar bands: mean, row, column and diagonal difference.

    `(N, C, H, W)` with even sides to `(N, 4C, H / 2, W / 2)`, a channel's bands side by side; energy is kept.
    """
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.stack(_butterfly(a, b, c, d), 2).flatten(1, 2)


def inverse_haar(x: Tensor) -> Tensor:
    """Undo `haar`: `(N, 4C, H, W)` to `(N, C, 2H, 2W)`."""
    mean, row, column, diagonal = (x[:, band::4] for band in range(4))
    # The transform is its own inverse: what it makes of the bands are the four corners.
    return F.pixel_shuffle(torch.stack(_butterfly(mean, row, column, diagonal), 2).flatten(1, 2), 2)


def _butterfly(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    top, bottom, left, right = a + b, c + d, a - b, c - d
    return (top + bottom) / 2, (top - bottom) / 2, (left + right) / 2, (left - right) / 2


def linear_unit(in_channels: int, out_channels: int, kernel_size: int = 1, zero: bool = False) -> ConvNormAct:
    """Convolve (depthwise where the kernel is larger than a pixel) and normalise, from zero if asked."""
    groups = in_channels if kernel_size > 1 else 1
    unit = ConvNormAct(in_channels, out_channels, kernel_size, groups=groups, act=None)
    nn.init.constant_(unit.norm.weight, 0.0 if zero else 1.0)
    return unit


class WaveletConv(nn.Module):
    """Filter each Haar band of each channel on its own; `(N, C, H, W)` to the same shape."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        c = 4 * channels
        self.conv = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c, bias=False)
        self.scale: nn.Parameter | None = nn.Parameter(torch.full((1, c, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform, filter, transform back."""
        height, width = x.shape[2:]
        y = self.conv(haar(F.pad(x, (0, width % 2, 0, height % 2))))  # (N, 4C, ceil(H / 2), ceil(W / 2))
        y = y if self.scale is None else y * self.scale
        return inverse_haar(y)[..., :height, :width]

    def merge(self) -> None:
        """Put the scale into the kernel."""
        if self.scale is not None:
            scale_output(self.conv, self.scale.flatten())
            self.scale = None


class Scan2d(nn.Module):
    """A gated selective scan over all pixels of a map, row by row, forwards and backwards (SS2D).

    `(N, C, H, W)` to the same shape; the middle has `2C` channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner, rank = 2 * channels, math.ceil(channels / 16)
        self.sizes = [rank, STATE, STATE]
        self.in_proj = linear_unit(channels, 2 * inner)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj = nn.Parameter(torch.empty(DIRECTIONS, sum(self.sizes), inner))
        self.dt_proj = nn.Parameter(0.1 * torch.rand(DIRECTIONS, inner, rank))
        self.dt_bias = nn.Parameter(0.1 * torch.rand(DIRECTIONS, inner))
        self.a_log = nn.Parameter(torch.zeros(DIRECTIONS, inner, STATE))
        self.skip = nn.Parameter(torch.ones(DIRECTIONS, inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = linear_unit(inner, channels)
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Project, filter, scan both ways, normalise, gate, project back."""
        x, gate = self.in_proj(x).chunk(2, 1)  # (N, 2C, H, W) each
        x = F.silu(self.conv(x))
        # Channels last: a step of the scan reads them side by side, and the norm needs them so.
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()  # (N, HW, 2C)
        y = self.norm(self._scan(tokens, 0) + self._scan(tokens, 1))
        y = y.transpose(1, 2).reshape(x.shape)
        return self.out_proj(y * F.silu(gate))

    def _scan(self, tokens: Tensor, direction: int) -> Tensor:
        flat = tokens.flatten(0, 1)
        step, write, read = F.linear(flat, self.x_proj[direction]).split(self.sizes, 1)
        step = F.linear(step, self.dt_proj[direction], self.dt_bias[direction])
        write, read = (v.reshape(-1, tokens.shape[1], STATE) for v in (write, read))
        exact = torch.promote_types(step.dtype, torch.float32)
        delta = F.softplus(step.to(exact)).reshape(tokens.shape)
        rate, skip = -self.a_log[direction].to(exact).exp(), self.skip[direction]
        return selective_scan(tokens, delta, rate, write, read, skip, reverse=direction == 1)


class FarBranch(nn.Module):
    """The scan of a map plus the filter of its wavelet bands; `(N, C, H, W)` to the same shape."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.scan = Scan2d(channels)
        self.scale: nn.Parameter | None = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.wavelet = WaveletConv(channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Add both views."""
        y = self.scan(x)
        return (y if self.scale is None else y * self.scale) + self.wavelet(x)

    def merge(self) -> None:
        """Put the scale into the last projection of the scan, whose norm is folded already."""
        if self.scale is not None:
            scale_output(self.scan.out_proj.conv, self.scale.flatten())
            self.scale = None
