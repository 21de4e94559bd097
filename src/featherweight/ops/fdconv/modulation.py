"""What each image does to the kernel and to the map of a frequency dynamic convolution: three small networks.

All heads start at zero, where every factor is 1, so that a converted layer begins as the plain one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks import spectrum
from featherweight.blocks.conv_operator import ConvOperator
from featherweight.errors import UsageError

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda t: 2 * t.sigmoid(),
    "tanh": lambda t: 1 + t.tanh(),
}
"""Both are 1 at 0, so that heads of zeros change nothing."""

GRID = 64
"""Side of the grid on which the masks of the bands are drawn, in frequencies."""


@dataclass(frozen=True)
class Bands:
    """How the feature map is cut into frequency bands.

    Args:
        cutoffs: divisors of half the sampling rate, falling frequencies: 2 keeps the lower half.
        groups: maps of factors for each band; more than 64 stands for one for each channel.
        act: `"sigmoid"`, `"tanh"` or `"softmax"` (over the groups).
        weigh_lowest: weigh what is left below the last cut as well.
        kernel_size: side of the kernels that find the factors, in pixels.
    """

    cutoffs: tuple[int, ...] = (2, 4, 8)
    groups: int = 1
    act: str = "sigmoid"
    weigh_lowest: bool = False
    kernel_size: int = 3


class StarReLU(nn.Module):
    """`scale * relu(x) ** 2 + bias` with learned scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return self.scale * F.relu(x) ** 2 + self.bias


class GlobalModulation(nn.Module):
    """Factors for input channels, output filters, taps and groups of frequencies, from the mean of the map.

    Args:
        layer: the operator; gives channels and kernel.
        frequencies: groups of frequencies; 1 needs no head.
        hidden: channels of the squeeze.
        act: activation of the heads; `"softmax"` holds for the frequencies only and has no others.
        temperatures: divide the logits, of the frequencies and of the rest.
        frequencies_only: leave out the other heads.
    """

    def __init__(
        self,
        layer: ConvOperator,
        frequencies: int,
        hidden: int,
        act: str,
        temperatures: tuple[float, float],
        frequencies_only: bool,
    ) -> None:
        super().__init__()
        cin, cout, taps = layer.in_channels, layer.out_channels, math.prod(layer.kernel_size)
        self.act, self.frequencies = act, frequencies
        self.frequency_temperature, self.temperature = temperatures
        self.fc = nn.Conv2d(cin, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.relu = StarReLU()
        rest = not frequencies_only
        self.channel_fc = nn.Conv2d(hidden, cin, 1) if rest else None
        self.filter_fc = nn.Conv2d(hidden, cout, 1) if rest and not layer.groups == cin == cout else None
        self.spatial_fc = nn.Conv2d(hidden, taps, 1) if rest and taps > 1 else None
        self.kernel_fc = nn.Conv2d(hidden, frequencies, 1) if frequencies > 1 else None
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")
        for head in self.heads():
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def heads(self) -> list[nn.Conv2d]:
        """Return the heads that there are."""
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc, self.kernel_fc)
        return [head for head in heads if head is not None]

    @property
    def is_idle(self) -> bool:
        """The kernel itself is the same for every image."""
        return self.kernel_fc is None and self.spatial_fc is None

    def forward(self, mean: Tensor) -> tuple[Tensor | None, ...]:
        """`(N, Cin, 1, 1)` to channel `(N, Cin)`, filter `(N, Cout)`, tap `(N, k k)`, frequency `(N, n)`."""
        z = self.fc(mean)
        alone = self.training and len(z) == 1  # one value a channel has no variance
        norm = self.bn
        z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias) if alone else norm(z)
        z = self.relu(z)
        heads = (self.channel_fc, self.filter_fc, self.spatial_fc)
        rest = [None if h is None else ACTS[self.act](_logits(h, z, self.temperature)) for h in heads]
        if self.kernel_fc is None:
            return *rest, None
        logits = _logits(self.kernel_fc, z, self.frequency_temperature)
        if self.act == "softmax":
            return *rest, logits.softmax(1)
        return *rest, ACTS[self.act](logits) / self.frequencies


def _logits(head: nn.Conv2d, z: Tensor, temperature: float) -> Tensor:
    logits = head(z).reshape(-1, head.out_channels)
    return logits if temperature == 1 else logits / temperature


class LocalModulation(nn.Module):
    """A factor for each entry of the kernel, from the channels next to it in the mean of the map.

    Args:
        layer: the operator.
        act: `"sigmoid"` or `"tanh"`.
    """

    def __init__(self, layer: ConvOperator, act: str) -> None:
        super().__init__()
        cin = layer.in_channels
        side = round(math.log2(cin) / 2 + 0.5) // 2 * 2 + 1
        self.act, self.groups, self.kernel_size = act, layer.groups, layer.kernel_size
        self.norm = nn.LayerNorm(cin)
        taps = math.prod(layer.kernel_size)
        self.conv = nn.Conv1d(1, layer.out_channels * taps, side, padding=side // 2, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, mean: Tensor) -> Tensor:
        """`(N, Cin, 1, 1)` to `(N, Cout, Cin / groups, kh, kw)`."""
        groups, (height, width) = self.groups, self.kernel_size
        filters, channels = self.conv.out_channels // (height * width), self.norm.normalized_shape[0]
        z = self.conv(self.norm(mean.reshape(-1, 1, channels)))  # (N, Cout kh kw, Cin)
        if groups > 1:
            z = z.reshape(-1, groups, filters // groups, height, width, groups, channels // groups)
            z = z.diagonal(dim1=1, dim2=5).permute(0, 5, 1, 2, 3, 4)  # a group's filters on its own channels
        z = z.reshape(-1, filters, height, width, channels // groups)
        return ACTS[self.act](z.permute(0, 1, 4, 2, 3))


class BandModulation(nn.Module):
    """Split a map into frequency bands and add them up again, each times a factor for each place.

    `(N, C, H, W)` to the same shape, unchanged as long as the heads are zero.

    Args:
        channels: of the map.
        bands: how to cut.
    """

    def __init__(self, channels: int, bands: Bands) -> None:
        super().__init__()
        self.config = bands
        self.groups = channels if bands.groups > 64 else bands.groups
        if channels % self.groups:
            raise UsageError(
                f"Got Bands(groups={bands.groups}) for {channels} channels; it must divide them."
            )
        side = bands.kernel_size
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, self.groups, side, padding=side // 2, groups=self.groups)
            for _ in range(len(bands.cutoffs) + bands.weigh_lowest)
        )
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape and the type."""
        channels, height, width = (int(size) for size in x.shape[1:])
        z = spectrum.to_spectrum(x)
        left = x.to(z.dtype)
        masks = _masks(self.config.cutoffs, height, width).to(z)  # (cuts, 1, 1, H, F)
        # Every cut in one transform, each with all channels.
        lows = z.reshape(-1, 1, *z.shape[1:]) * masks
        lows = lows.reshape(-1, len(masks) * channels, 2, height, width // 2 + 1)
        lows = spectrum.to_image(lows, left[:, :1].expand(-1, len(masks) * channels, -1, -1))
        y: Tensor | float = 0.0
        for low, head in zip(lows.split(channels, 1), self.heads, strict=False):
            y = y + self._weigh(head, x, left - low)
            left = low
        return (y + (self._weigh(self.heads[-1], x, left) if self.config.weigh_lowest else left)).to(x.dtype)

    def _weigh(self, head: nn.Module, x: Tensor, band: Tensor) -> Tensor:
        logits = head(x)  # (N, groups, H, W)
        act = self.config.act
        factor = logits.softmax(1) * self.groups if act == "softmax" else ACTS[act](logits)
        if self.groups == 1:
            return factor * band
        return (factor[:, :, None] * band.unflatten(1, (self.groups, -1))).flatten(1, 2)

    def head_macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of the heads on one map of `input_shape` = `(C, H, W)`."""
        return len(self.heads) * self.config.kernel_size**2 * math.prod(input_shape)


@functools.lru_cache(maxsize=64)
def _masks(cutoffs: tuple[int, ...], height: int, width: int) -> Tensor:
    """Return which frequencies lie below each cut, drawn on the grid and taken from there to this size."""
    rows, columns = np.abs(np.fft.fftfreq(GRID)), np.fft.rfftfreq(GRID)
    places = [
        np.minimum(np.arange(size, dtype=np.float32) * np.float32(grid / size), grid - 1).astype(int)
        for size, grid in ((height, GRID), (width // 2 + 1, GRID // 2 + 1))
    ]
    highest = np.maximum(rows[:, None], columns)[np.ix_(*places)].astype(np.float32)
    # In float32, as released: there a quarter is not below the cut 1/4 + 1e-8, but an eighth below its own.
    masks = np.stack([highest < np.float32(0.5 / cutoff + 1e-8) for cutoff in cutoffs])
    return torch.from_numpy(masks[:, None, None].astype(np.float32))
