"""IMDN: super-resolution that keeps a quarter of the channels at every step and refines the rest.

In each block a 3x3 convolution is followed by a split: the first quarter of the channels is kept, the other
three quarters go on to the next convolution. The kept pieces together are weighed by an attention that looks
at each channel's contrast (its standard deviation) besides its mean, since restored images live by texture,
and a 1x1 convolution brings them back. Cheap, for most convolutions see fewer channels than they would.

Shapes:
    `(N, 3, H, W)` with values from 0 to 1 -> stem 64 x 1 -> six blocks of 64 x 1 -> pixel shuffle ->
    `(N, 3, scale H, scale W)`. `imdn_as` starts with two strides of 2 and ends at the size it began with;
    `imdn_rte` starts with one and ends at twice the size. Any H and W from 1.

Differs:
    Where H or W is no multiple of 4, `imdn_as` crops as the official test script does, inside `forward`. A
    side too short for its crops (below about 64 pixels), and a graph captured with open height and width,
    go through the network as a whole and lose the rows that a stride of 4 adds. `imdn_rte` drops the rows
    that its stride adds. Contrast adds 1e-24 under its root: no value changes, and a flat map has a gradient.
    `imdn_plus_x4` follows two pictures: its activations and the way blocks are joined are our reading,
    which gives the published parameters and MACs exactly; the branches of its training form merge as drawn.

Reference: Hui et al., "Lightweight Image Super-Resolution with Information Multi-distillation Network",
arXiv 1909.11856, sections 3.1 to 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_chain import ConvChain, RepConv, merge_chains
from featherweight.blocks.layouts import rename
from featherweight.blocks.restorer import Restorer
from featherweight.registry import register_model

SLOPE = 0.05
"""Of every leaky ReLU for negative values."""

SHAVE = 32
"""Pixels by which the crops of `imdn_as` overlap the middle."""

FLAT = 1e-24
"""Keeps the root of a flat map's variance differentiable."""

Attention = Callable[[int], nn.Module]


def conv(in_channels: int, out_channels: int, side: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Build a convolution padded by half its kernel."""
    return nn.Conv2d(in_channels, out_channels, side, stride, side // 2, bias=bias)


def drawn_branches(in_channels: int, out_channels: int) -> RepConv:
    """Build the training form of a 3x3 of IMDN+: alone, and behind 1x1 of two and four times the width."""
    wide = (ConvChain((in_channels, factor * in_channels, out_channels), (1, 3)) for factor in (2, 4))
    return RepConv([ConvChain((in_channels, out_channels), (3,)), *wide])


class ContrastAttention(nn.Module):
    """Gate each channel by its mean plus its standard deviation over the map (section 3.2).

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        reduction: channels over channels in the middle of the gate.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        reduced = max(1, channels // reduction)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        mean = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        variance = (x - mean).square().mean((2, 3), keepdim=True)
        gate = self.expand(F.relu(self.reduce((variance + FLAT).sqrt() + mean)))
        return x * gate.sigmoid()


class DistillBlock(nn.Module):
    """Convolve, keep the first channels, pass the others on; join what was kept and add the input.

    `(N, channels, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        outs: channels after each convolution, of which `kept` stay.
        kept: channels kept of each convolution.
        act: the activation after every convolution.
        act_last: activate the last convolution too.
        attention: builds the attention on the kept channels; None for none.
        layer: builds a convolution from channels before and after.
        bias: give the last 1x1 convolution a bias.
    """

    def __init__(
        self,
        channels: int,
        outs: Sequence[int],
        kept: int,
        act: nn.Module,
        *,
        act_last: bool = False,
        attention: Attention | None = None,
        layer: Callable[[int, int], nn.Module] = conv,
        bias: bool = True,
    ) -> None:
        super().__init__()
        ins = [channels, *(out - kept for out in outs[:-1])]
        self.refine = nn.ModuleList(map(layer, ins, outs))
        self.acts = nn.ModuleList([act] * (len(outs) - 1) + [act if act_last else nn.Identity()])
        self.kept = kept
        self.attention = attention(kept * len(outs)) if attention else nn.Identity()
        self.merge = conv(kept * len(outs), channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Distil `x`."""
        pieces, rest = [], x
        for layer, act in zip(self.refine, self.acts, strict=True):
            y = act(layer(rest))
            pieces.append(y[:, : self.kept])
            rest = y[:, self.kept :]
        return self.merge(self.attention(torch.cat(pieces, 1))) + x


class IMDN(Restorer):
    """The network of the paper; with `stride` 4 and `scale` 1 the one for sizes that stay.

    Args:
        scale: sides of the output over sides of the input.
        channels: channels of every map, a multiple of 4.
        depth: number of blocks.
        stride: 1, or 4 for a stem of two strides.
        attention: builds the attention of a block from its channels; None for none.
        in_chans: channels of the image.
        **kwargs: see `Restorer`.

    >>> IMDN(scale=2)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 64,
        depth: int = 6,
        stride: int = 1,
        attention: Attention | None = ContrastAttention,
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        act, kept = nn.LeakyReLU(SLOPE), channels // 4
        stem: nn.Module = conv(in_chans, channels)
        if stride == 4:
            stem = nn.Sequential(conv(in_chans, channels, stride=2), act, conv(channels, channels, stride=2))
        outs = (channels, channels, channels, kept)
        blocks = [DistillBlock(channels, outs, kept, act, attention=attention) for _ in range(depth)]
        super().__init__(stem, blocks, channels, scale=scale, stride=stride, in_chans=in_chans, **kwargs)
        self.gather = nn.Sequential(conv(depth * channels, channels, 1), act)
        self.last = conv(channels, channels)

    def join(self, maps: Iterator[Tensor]) -> Tensor:
        """Gather every block's map and add the stem's."""
        shallow, *deep = maps
        return self.last(self.gather(torch.cat(deep, 1))) + shallow

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys."""
        return rename(state, official_rules(len(self.blocks)))


class IMDNAnySize(IMDN):
    """IMDN at a quarter of the resolution, for an image that already has its final size.

    Args:
        **kwargs: see `IMDN`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"scale": 1, "stride": 4, **kwargs})

    def forward(self, x: Tensor) -> Tensor:
        """Restore images of any size; those that are no multiple of 4 in four crops."""
        sizes = x.shape[-2:]
        if all(type(size) is int for size in sizes) and any(size % self.stride for size in sizes):
            crops = [crop_size(size, self.stride) for size in sizes]
            if all(crops):
                return self.forward_crops(x, *crops)
        return super().forward(x)

    def forward_crops(self, x: Tensor, height: int, width: int) -> Tensor:
        """Restore the four corners, `height` x `width` pixels each, and put their quadrants together."""
        down, right = x.shape[-2] - height, x.shape[-1] - width
        corners = [x[..., r : r + height, c : c + width] for r in (0, down) for c in (0, right)]
        restored = super().forward(torch.cat(corners)).chunk(4)
        places = quadrants(*x.shape[-2:], down, right)
        quarter = [
            corner[..., rows, columns] for corner, (rows, columns) in zip(restored, places, strict=True)
        ]
        top, bottom = torch.cat(quarter[:2], -1), torch.cat(quarter[2:], -1)
        return torch.cat((top, bottom), -2)

    def enlarge(self, x: Tensor, scale: float) -> Tensor:
        """Enlarge images by any factor: bicubic first, then the network at the final size."""
        size = [max(1, round(side * scale)) for side in x.shape[-2:]]
        return self(F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1))


def crop_size(size: int, multiple: int = 4) -> int:
    """Return the side of a corner crop, in pixels; 0 where the image is too small for one.

    >>> crop_size(101), crop_size(30)
    (80, 0)
    """
    side = size // 2 + SHAVE
    side -= side % multiple
    return side if size - size // 2 <= side <= size else 0


def quadrants(height: int, width: int, down: int, right: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of each quadrant within its own corner crop."""
    middle, centre = height // 2, width // 2
    rows, columns = (slice(middle), slice(middle - down, None)), (slice(centre), slice(centre - right, None))
    return [(row, column) for row in rows for column in columns]


class IMDNChain(Restorer):
    """The tiny networks: only the last block's map is used.

    Args:
        stem: see `Restorer`.
        blocks: see `Restorer`.
        last: convolution of the last block's map, to which the stem's is added.
        **kwargs: see `Restorer`.
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], last: nn.Conv2d, **kwargs: Any) -> None:
        super().__init__(stem, blocks, last.out_channels, **kwargs)
        self.last = last

    def join(self, maps: Iterator[Tensor]) -> Tensor:
        """Refine the last map and add the first."""
        shallow = deep = next(maps)
        for found in maps:
            deep = found
        return self.last(deep) + shallow

    def fuse(self) -> Self:
        """Merge the branches of the training form into single convolutions."""
        merge_chains(self)
        return self

    def match_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the merged form where the weights have it."""
        if "blocks.0.refine.0.weight" in state:
            self.fuse()
        return dict(state)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys of RTC, a plain sequence, and of RTE."""
        return rename(state, official_rules(len(self.blocks)))


def official_rules(depth: int) -> list[tuple[str, str]]:
    """Return the rules from the official names to ours."""
    rules = [(r"fea_conv\.", "stem."), (r"c\.0\.", "gather.0."), (r"LR_conv\.", "last.")]
    rules += [
        (r"model\.0\.", "stem."),
        (rf"model\.1\.sub\.{depth}\.", "last."),
        (r"model\.2\.", "upsampler.0."),
    ]
    for index in range(depth):
        for old in (rf"IMDB{index + 1}\.", rf"block{index + 1}\.", rf"model\.1\.sub\.{index}\."):
            rules += _block_rules(old, f"blocks.{index}.", convs=6 if old.startswith("block") else 4)
    return rules


def _block_rules(old: str, new: str, convs: int) -> list[tuple[str, str]]:
    """The last numbered convolution of a block is the 1x1 that merges."""
    rules = [(rf"{old}c{index + 1}\.", f"{new}refine.{index}.") for index in range(convs)]
    return [
        *rules,
        (rf"{old}c{convs + 1}\.", f"{new}merge."),
        (rf"{old}cca\.conv_du\.0\.", f"{new}attention.reduce."),
        (rf"{old}cca\.conv_du\.2\.", f"{new}attention.expand."),
    ]


@register_model
def imdn_x2(channels: int = 64, depth: int = 6, **kwargs: Any) -> IMDN:
    """IMDN for twice the size."""
    return IMDN(2, channels, depth, **kwargs)


@register_model
def imdn_x3(channels: int = 64, depth: int = 6, **kwargs: Any) -> IMDN:
    """IMDN for three times the size."""
    return IMDN(3, channels, depth, **kwargs)


@register_model
def imdn_x4(channels: int = 64, depth: int = 6, **kwargs: Any) -> IMDN:
    """IMDN for four times the size."""
    return IMDN(4, channels, depth, **kwargs)


@register_model
def imdn_as(channels: int = 64, depth: int = 6, **kwargs: Any) -> IMDNAnySize:
    """IMDN for images that keep their size, any size."""
    return IMDNAnySize(channels=channels, depth=depth, **kwargs)


@register_model
def imdn_rtc(channels: int = 12, depth: int = 5, in_chans: int = 3, **kwargs: Any) -> IMDNChain:
    """The smallest IMDN, for twice the size, without attention."""
    act, kept = nn.LeakyReLU(SLOPE), channels // 4
    blocks = [DistillBlock(channels, (channels,) * 3 + (kept,), kept, act) for _ in range(depth)]
    stem, last = conv(in_chans, channels), conv(channels, channels, 1)
    return IMDNChain(stem, blocks, last, in_chans=in_chans, **{"scale": 2, **kwargs})


@register_model
def imdn_rte(channels: int = 20, depth: int = 6, in_chans: int = 3, **kwargs: Any) -> IMDNChain:
    """The IMDN for twice the size whose blocks work at half the resolution."""
    act, kept, plain = nn.ReLU(), channels // 4, partial(conv, bias=False)
    outs = (channels,) * 3 + (channels - kept, channels - 2 * kept, channels - 3 * kept)
    blocks = [
        DistillBlock(channels, outs, kept, act, act_last=True, layer=plain, bias=False) for _ in range(depth)
    ]
    stem = nn.Sequential(conv(in_chans, channels), act, plain(channels, channels, stride=2))
    last = plain(channels, channels, 1)
    return IMDNChain(stem, blocks, last, in_chans=in_chans, **{"scale": 2, "stride": 2, **kwargs})


@register_model
def imdn_plus_x4(channels: int = 36, depth: int = 8, in_chans: int = 3, **kwargs: Any) -> IMDNChain:
    """IMDN+: every convolution narrower than the one before; `fuse()` merges its branches."""
    act, kept = nn.LeakyReLU(SLOPE), channels // 6
    outs = [channels - kept * index for index in range(6)]
    blocks = [DistillBlock(channels, outs, kept, act, layer=drawn_branches) for _ in range(depth)]
    stem, last = conv(in_chans, channels), conv(channels, channels)
    return IMDNChain(stem, blocks, last, in_chans=in_chans, **{"scale": 4, **kwargs})
