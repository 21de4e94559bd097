"""CFSR: super-resolution with a gated 9x9 depthwise convolution in the place of self-attention.

A block mixes positions by a depthwise 9x9 convolution whose answer gates the values, and channels by a
feed-forward part with a depthwise 3x3 convolution in its middle. In training Sobel and Laplace filters with
learned strength run beside that 3x3, so that the network starts with edges in view; all of them merge into
one depthwise kernel. Cheap, for both spatial convolutions are depthwise and the rest is 1x1.

Shapes:
    `(N, 3, H, W)` with values from 0 to 1 -> 48 x 1 -> two stages of six blocks, 48 x 1 -> pixel shuffle ->
    `(N, 3, scale H, scale W)`. Any H and W from 1.

Differs:
    The released class merges its branches before it has trained; here they stay until `fuse()`. Training
    convolves once with the merged kernel, which the sum of the branches equals. `masks="official"` gives the
    filters as coded there, of which two have one tap misplaced; the default are the true ones. The released
    weights are merged: loaded into the training form they set the strengths of the filters to 0. With other
    than three channels no mean is subtracted, as officially.

Reference: Wu et al., "Transforming Image Super-Resolution: A ConvFormer-based Efficient Approach", arXiv
2401.05633, section III.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.restorer import RGB_MEAN, Restorer
from featherweight.errors import UsageError
from featherweight.registry import register_model

EPS = 1e-6
"""Of the layer norms."""

LAYER_SCALE = 1e-6
"""Start of the factors on both branches of a block."""

BRANCH_STD = 1e-3
"""Spread of the filters' strengths and biases at the start."""

MASKS = {
    "paper": (
        ((1, 0, -1), (2, 0, -2), (1, 0, -1)),
        ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
        ((0, 1, 0), (1, -4, 1), (0, 1, 0)),
    ),
    "official": (
        ((0, 1, -1), (2, 0, -2), (1, 0, -1)),
        ((1, 2, 1), (0, 0, 0), (-1, -2, -1)),
        ((1, 0, 0), (1, -4, 1), (0, 1, 0)),
    ),
}
"""Sobel along rows, Sobel along columns, Laplace."""

OFFICIAL_FILTERS = ("sobel_x", "sobel_y", "laplacian")

OUTER = (("conv_first.", "stem."), ("conv_after_body.", "last."), ("upsample.0.", "upsampler.0."))
"""Official names outside the stages -> ours."""

INNER = (
    ("layer_scale_", "scale"),
    ("attn.a.2.lkb_reparam.", "mixer.gate.2."),
    ("attn.a.", "mixer.gate."),
    ("attn.v.", "mixer.value."),
    ("attn.proj.", "mixer.project."),
    ("attn.", "mixer."),
    ("mlp.fc1.", "feed.widen."),
    ("mlp.pos.", "feed.edge."),
    ("mlp.fc2.", "feed.narrow."),
    ("mlp.", "feed."),
)
"""Official names within a block -> ours."""

STAGE_KEY = re.compile(r"layers\.(\d+)\.(?:blocks\.(\d+)\.|conv\.)")
FILTER_KEY = re.compile(r"(scale_|mask_)?(sobel_[xy]|laplacian)(_bias)?$")
"""Official names of a stage's parts, and ends of those of the filters in training."""


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of every position of `(N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EdgeConv(nn.Module):
    """A depthwise 3x3 convolution with Sobel and Laplace filters beside it, run as their sum.

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        masks: `"paper"` for the true filters, `"official"` for those of the released code.

    Raises:
        UsageError: the masks are unknown.
    """

    def __init__(self, channels: int, masks: str = "paper") -> None:
        super().__init__()
        if masks not in MASKS:
            raise UsageError(f"No masks '{masks}'. Expected one of {', '.join(MASKS)}.")
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.strength = nn.Parameter(torch.randn(3, channels) * BRANCH_STD)
        self.shift = nn.Parameter(torch.randn(3, channels) * BRANCH_STD)
        self.register_buffer("masks", torch.tensor(MASKS[masks], dtype=torch.float32))

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the sum."""
        filters = torch.einsum("fc,fhw->chw", self.strength, self.masks)
        return self.conv.weight + filters[:, None], self.conv.bias + self.shift.sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the sum."""
        weight, bias = self.merged()
        return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """Return the sum as a plain depthwise convolution."""
        weight, bias = self.merged()
        self.conv.weight.copy_(weight)
        self.conv.bias.copy_(bias)
        return self.conv


class Mixer(nn.Module):
    """Gate each position by what lies around it, `kernel_size` pixels wide (section III-B).

    `(N, C, H, W)` to the same shape.
    """

    def __init__(self, channels: int, kernel_size: int = 9) -> None:
        super().__init__()
        self.norm = MapNorm(channels, EPS)
        around = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), around)
        self.value = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions."""
        x = self.norm(x)
        return self.project(self.gate(x) * self.value(x))


class EdgeFeedForward(nn.Module):
    """Widen, add what the depthwise convolution sees, narrow (section III-C).

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        ratio: channels in the middle over `channels`.
        masks: filters of `EdgeConv`; None for a plain depthwise convolution.
    """

    def __init__(self, channels: int, ratio: int = 2, masks: str | None = "paper") -> None:
        super().__init__()
        hidden = ratio * channels
        self.norm = MapNorm(channels, EPS)
        self.widen = nn.Conv2d(channels, hidden, 1)
        self.edge: nn.Module = (
            EdgeConv(hidden, masks) if masks else nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        )
        self.narrow = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels."""
        x = F.gelu(self.widen(self.norm(x)))
        return self.narrow(x + F.gelu(self.edge(x)))


class Block(nn.Module):
    """Mixer and feed-forward, each scaled per channel and added to its input.

    `(N, C, H, W)` to the same shape.
    """

    def __init__(self, channels: int, kernel_size: int, ratio: int, masks: str | None) -> None:
        super().__init__()
        self.mixer = Mixer(channels, kernel_size)
        self.feed = EdgeFeedForward(channels, ratio, masks)
        self.scale1 = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        self.scale2 = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        x = x + self.scale1 * self.mixer(x)
        return x + self.scale2 * self.feed(x)


class StageEnd(nn.Module):
    """A 1x1 convolution plus its input: the end of a stage."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        return self.conv(x) + x


class CFSR(Restorer):
    """The network, in its training form until `fuse()`.

    Args:
        scale: sides of the output over sides of the input.
        channels: channels of every map.
        depths: blocks of each stage.
        kernel_size: side of the mixers' depthwise kernel, in pixels, odd.
        ratio: channels in the middle of a feed-forward part over `channels`.
        masks: filters beside the 3x3 convolutions: `"paper"`, `"official"` or None for none.
        in_chans: channels of the image.
        **kwargs: see `Restorer`.

    >>> CFSR(scale=2, channels=8, depths=(1, 1))(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 48,
        depths: tuple[int, ...] = (6, 6),
        kernel_size: int = 9,
        ratio: int = 2,
        masks: str | None = "paper",
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        blocks: list[nn.Module] = []
        for depth in depths:
            blocks += [Block(channels, kernel_size, ratio, masks) for _ in range(depth)]
            blocks.append(StageEnd(channels))
        stem = nn.Conv2d(in_chans, channels, 3, padding=1)
        super().__init__(stem, blocks, channels, scale=scale, in_chans=in_chans, **kwargs)
        self.depths = tuple(depths)
        self.norm = MapNorm(channels, EPS)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)

    def prepare(self, x: Tensor) -> Tensor:
        """Subtract the mean colour."""
        return x - self.mean

    def finish(self, x: Tensor) -> Tensor:
        """Add the mean colour."""
        return x + self.mean

    def join(self, maps: Iterator[Tensor]) -> Tensor:
        """Normalise and refine the last map, add the first."""
        shallow = next(maps)
        (deep,) = deque(maps, maxlen=1)
        return self.last(self.norm(deep)) + shallow

    def fuse(self) -> Self:
        """Merge the filters into the 3x3 convolutions beside them, in place."""
        for block in self.blocks:
            if isinstance(block, Block) and isinstance(block.feed.edge, EdgeConv):
                block.feed.edge = block.feed.edge.merge()
        return self

    def match_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give merged weights filters of no strength where this network still has filters."""
        own, matched = self.state_dict(), {}
        for key, value in state.items():
            head, _, tail = key.rpartition(".")
            if key in own or f"{head}.conv.{tail}" not in own:
                matched[key] = value
                continue
            matched[f"{head}.conv.{tail}"] = value
            if f"{head}.strength" not in state:
                matched[f"{head}.masks"] = own[f"{head}.masks"]
                for name in ("strength", "shift"):
                    matched[f"{head}.{name}"] = torch.zeros_like(own[f"{head}.{name}"])
        return matched

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys; filters, which lie apart there, are stacked."""
        starts = [sum(depth + 1 for depth in self.depths[:stage]) for stage in range(len(self.depths))]
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            filtered = FILTER_KEY.search(key)
            if filtered is None:
                shaped = value.view(-1, 1, 1) if "layer_scale" in key else value
                renamed[_own_key(key, starts, self.depths)] = shaped
            elif filtered[0] == "scale_sobel_x":
                head = _own_key(key[: filtered.start()] + "pos.", starts, self.depths)
                parts = _filters(state, key[: filtered.start()])
                renamed |= {f"{head}{part}": value for part, value in parts.items()}
        return renamed


def _filters(state: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    """Stack the official filters of one block: strengths, biases and the taps, equal in all channels."""
    return {
        "strength": torch.stack([state[f"{head}scale_{name}"].flatten() for name in OFFICIAL_FILTERS]),
        "shift": torch.stack([state[f"{head}{name}_bias"] for name in OFFICIAL_FILTERS]),
        "masks": torch.stack([state[f"{head}mask_{name}"][0, 0] for name in OFFICIAL_FILTERS]),
    }


def _own_key(key: str, starts: list[int], depths: tuple[int, ...]) -> str:
    """Rename one official key; `starts` are the positions of the stages' first blocks."""
    for old, new in OUTER:
        if key.startswith(old):
            return new + key.removeprefix(old)
    stage = STAGE_KEY.match(key)
    if stage is None:
        return key
    start, rest = starts[int(stage[1])], key[stage.end() :]
    if stage[2] is None:
        return f"blocks.{start + depths[int(stage[1])]}.conv.{rest}"
    for old, new in INNER:
        rest = rest.replace(old, new)
    return f"blocks.{start + int(stage[2])}.{rest}"


@register_model
def cfsr_x2(channels: int = 48, depths: tuple[int, ...] = (6, 6), **kwargs: Any) -> CFSR:
    """CFSR for twice the size."""
    return CFSR(2, channels, depths, **kwargs)


@register_model
def cfsr_x3(channels: int = 48, depths: tuple[int, ...] = (6, 6), **kwargs: Any) -> CFSR:
    """CFSR for three times the size."""
    return CFSR(3, channels, depths, **kwargs)


@register_model
def cfsr_x4(channels: int = 48, depths: tuple[int, ...] = (6, 6), **kwargs: Any) -> CFSR:
    """CFSR for four times the size."""
    return CFSR(4, channels, depths, **kwargs)
