"""SPAN and DSCLoRA: super-resolution with an attention without parameters, refined by low-rank updates.

SPAN's block runs three 3x3 convolutions; the last answer, squashed to between -0.5 and 0.5, multiplies itself
plus the block's input, so that attention costs no weight and no pooling. Each 3x3 is a wider chain in
training and one kernel afterwards. DSCLoRA takes such a network when it has trained, freezes it, adds a
low-rank update to its convolutions, trains only that under the eyes of a larger SPAN, and merges: the same
cost, better answers. The updates and the losses live in `adapt`.

Shapes:
    `(N, 3, H, W)` with values from 0 to 1 -> 52 x 1 (26 in the tiny ones) -> six blocks -> 1x1 over the
    stem's map, the first block's, the refined last one's and its inner one -> pixel shuffle -> `(N, 3, scale
    H, scale W)`. Any H and W from 1.

Differs:
    A training step convolves with the merged kernel, which equals the chain at the borders too, for the
    padding comes first. Other than three channels subtract 0.42, the mean over colours. `dscf_x4` begins in
    the merged form, the only one published; merged weights given to a training form merge it first. Ranks
    and scales are the ones left in the official file; the weights of the losses and the teacher are
    unpublished, so that ours are choices.

References: Wan et al., "Swift Parameter-free Attention Network for Efficient Super-Resolution", arXiv
2311.12770, section 3; Chai et al., "Distillation-Supervised Convolutional Low-Rank Adaptation for Efficient
Image Super-Resolution", arXiv 2504.11271, section 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_chain import ConvChain, RepConv, merge_chains
from featherweight.blocks.layouts import rename
from featherweight.blocks.restorer import RGB_MEAN, Restorer
from featherweight.registry import register_model

GAIN = 2
"""Widening inside a training chain."""

GREY_LEVELS = 255.0
"""The stem sees pixels on this scale; the upsampler answers on the scale from 0 to 1."""

DEPTH = 6


def rep_conv(in_channels: int, out_channels: int) -> RepConv:
    """Build the training form of a 3x3 convolution: 1x1, 3x3, 1x1 of twice the width, and a 1x1 beside."""
    wide = (in_channels, GAIN * in_channels, GAIN * out_channels, out_channels)
    return RepConv([ConvChain(wide, (1, 3, 1)), ConvChain((in_channels, out_channels), (1,))])


class AttentionBlock(nn.Module):
    """Three convolutions whose answer gates itself and the input (SPAB; SConvLB once adapted).

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(rep_conv(channels, channels) for _ in range(3))

    def begin(self, x: Tensor) -> Tensor:
        """Give the inner map: the first convolution, activated."""
        return F.silu(self.convs[0](x))

    def end(self, inner: Tensor, x: Tensor) -> Tensor:
        """Go on from the inner map of `x`."""
        y = self.convs[2](F.silu(self.convs[1](inner)))
        return (y + x) * (y.sigmoid() - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Restore detail."""
        return self.end(self.begin(x), x)


class SPAN(Restorer):
    """The network, in its training form until `fuse()`.

    Args:
        scale: sides of the output over sides of the input.
        channels: channels of every map.
        depth: number of blocks.
        in_chans: channels of the image.
        img_range: range of pixels that the stem sees; a smaller one learns faster from a random start.
        **kwargs: see `Restorer`.

    >>> SPAN(scale=2, channels=8)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    def __init__(
        self,
        scale: int = 4,
        channels: int = 52,
        depth: int = DEPTH,
        in_chans: int = 3,
        img_range: float = GREY_LEVELS,
        **kwargs: Any,
    ) -> None:
        blocks = [AttentionBlock(channels) for _ in range(depth)]
        stem = rep_conv(in_chans, channels)
        super().__init__(stem, blocks, channels, scale=scale, in_chans=in_chans, **kwargs)
        self.img_range = img_range
        self.last = rep_conv(channels, channels)
        self.gather = nn.Conv2d(4 * channels, channels, 1)
        mean = RGB_MEAN if in_chans == 3 else (sum(RGB_MEAN) / len(RGB_MEAN),) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.feature_info.append({**self.feature_info[-1], "module": f"blocks.{depth - 1}.convs.0"})

    def prepare(self, x: Tensor) -> Tensor:
        """Subtract the mean colour and widen the range, to grey levels unless told otherwise."""
        return (x - self.mean) * self.img_range

    def iterate_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the stem's map, every block's and, last, the inner map of the last block."""
        x = self.stem(self.prepare(x))
        yield x
        for block in self.blocks[:-1]:
            x = self.run(block, x)
            yield x
        inner = self.run(self.blocks[-1].begin, x)
        yield self.run(self.blocks[-1].end, inner, x)
        yield inner

    def join(self, maps: Iterator[Tensor]) -> Tensor:
        """Join the stem's map, the first block's, the last one's and its inner one."""
        shallow, first = next(maps), next(maps)
        *deep, inner = deque(maps, maxlen=2)
        refined = self.last(deep[0] if deep else first)
        return self.gather(torch.cat((shallow, refined, first, inner), 1))

    def fuse(self) -> Self:
        """Merge every chain into one 3x3 convolution, in place."""
        merge_chains(self)
        return self

    def match_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the merged form where the weights have it."""
        if "stem.weight" in state:
            self.fuse()
        return dict(state)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys; kernels that its evaluation merged go where their chains are there."""
        trained = "conv_1.sk.weight" in state
        kept = {key: value for key, value in state.items() if not (trained and ".eval_conv." in key)}
        return rename(kept, _official_rules(len(self.blocks)))


def _official_rules(depth: int) -> list[tuple[str, str]]:
    places = [(r"conv_1\.", "stem."), (r"conv_2\.", "last.")]
    for block in range(depth):
        for conv in range(3):
            places.append((rf"block_{block + 1}\.c{conv + 1}_r\.", f"blocks.{block}.convs.{conv}."))
    rules = [(r"conv_cat\.", "gather.")]
    for old, new in places:
        rules += [
            (rf"{old}eval_conv\.", new),
            (rf"{old}sk\.", f"{new}chains.1.0."),
            (rf"{old}conv\.", f"{new}chains.0."),
        ]
    return rules


@register_model
def span_x2(channels: int = 52, **kwargs: Any) -> SPAN:
    """SPAN for twice the size."""
    return SPAN(2, channels, **kwargs)


@register_model
def span_x4(channels: int = 52, **kwargs: Any) -> SPAN:
    """SPAN for four times the size."""
    return SPAN(4, channels, **kwargs)


@register_model
def span_s_x2(channels: int = 48, **kwargs: Any) -> SPAN:
    """The smaller SPAN for twice the size."""
    return SPAN(2, channels, **kwargs)


@register_model
def span_s_x3(channels: int = 48, **kwargs: Any) -> SPAN:
    """The smaller SPAN for three times the size."""
    return SPAN(3, channels, **kwargs)


@register_model
def span_s_x4(channels: int = 48, **kwargs: Any) -> SPAN:
    """The smaller SPAN for four times the size."""
    return SPAN(4, channels, **kwargs)


@register_model
def span_tiny_x4(channels: int = 26, **kwargs: Any) -> SPAN:
    """The SPAN that DSCLoRA adapts."""
    return SPAN(4, channels, **kwargs)


@register_model
def dscf_x4(channels: int = 26, **kwargs: Any) -> SPAN:
    """The adapted SPAN of the challenge, merged."""
    return SPAN(4, channels, **kwargs).fuse()
