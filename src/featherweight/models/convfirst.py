"""ConvFirst: convolve first, then widen and project, so that a whole block can run as one kernel.

Depthwise and 1x1 layers do little arithmetic for each byte they move, so a network of few MACs can be slow.
The answer is to run a residual block in one pass over tiles that stay in the cache. That is cheap when the
k x k convolution comes first: it works on C channels, not on the 4C of the middle, its halo is made of input
pixels, which are read again and never computed again, and the widened tensor is consumed pixel by pixel.
Groups of eight channels give that convolution eight times the arithmetic of a depthwise one on a layer that
costs little anyway. MBConv, which widens first, is here to compare with. `forward_strips` runs either block
over strips of rows, a few of which make the workspace instead of the whole widened map.

Shapes:
    `(N, 3, 224, 224)` -> stem 32 x 1/2 -> 32 x 1/2 -> 64 x 1/4 -> 128 x 1/8 -> 256 x 1/16 -> 1024 x 1/16 ->
    logits `(N, 1000)` for tiny; 48, 96, 192, 384 and 1536 channels for small. Any size works;
    `stem_stride=1` doubles every resolution, for images of 32 to 64 pixels.

Differs:
    The blocks are those the author published beside his training kernels. The paper's networks are not known
    to us: stem, widths, depths and head of ConvFirstNet are ours, and no published accuracy belongs to them.
    Stochastic depth (`drop_path_rate`), `width` and `stem_stride` are additions. `fuse()` folds batch norms;
    the shift of the first one goes through the widening, so that the k x k convolution needs no bias.

Reference: Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, exact, put_weights
from featherweight.blocks.inverted_residual import InvertedResidual
from featherweight.errors import UsageError
from featherweight.registry import register_model

STEM = 32
STAGES = {
    "tiny": ((32, 2), (64, 3), (128, 6), (256, 2)),
    "small": ((48, 3), (96, 4), (192, 9), (384, 3)),
}
"""Channels and blocks of each stage: our choice, not the paper's."""

HEAD_RATIO = 4
"""Channels of the last 1x1 convolution for each channel of the last stage."""

Branch = Callable[[Tensor, tuple[int, int]], Tensor]
"""Runs a block's branch on some rows, of which so many are missing above and below: outside the image."""


class ConvFirst(nn.Module):
    """Grouped k x k convolution, 1x1 widening, SiLU, 1x1 projection, plus the input where shapes agree.

    `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`.

    Args:
        in_channels: channels of the input, a multiple of `group_width`.
        out_channels: channels of the output.
        kernel_size: side of the grouped kernel, in pixels.
        stride: stride of the grouped convolution, in pixels.
        group_width: channels of each group; 1 makes the convolution depthwise.
        expansion: the middle has `in_channels * expansion` channels.
        drop_path: probability of dropping the branch during training.

    Raises:
        UsageError: the channels do not divide into groups.

    >>> sum(p.numel() for p in ConvFirst(64, 64).parameters())
    38144
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check_groups(in_channels, group_width)
        groups, middle = in_channels // group_width, in_channels * expansion
        self.has_skip = stride == 1 and in_channels == out_channels
        # No activation here: the widening takes the convolution's norm over exactly.
        self.spatial = ConvNormAct(in_channels, in_channels, kernel_size, stride, groups, act=None)
        self.expand = ConvNormAct(in_channels, middle, 1, act=nn.SiLU)
        self.project = ConvNormAct(middle, out_channels, 1, act=None)
        self.drop_path = DropPath(drop_path) if self.has_skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the branch and add the input where the shapes agree."""
        y = self.project(self.expand(self.spatial(x)))
        return x + self.drop_path(y) if self.has_skip else y

    def forward_strips(self, x: Tensor, rows: int) -> Tensor:
        """Give the same, `rows` rows of the output at a time; see `run_in_strips`."""

        def branch(strip: Tensor, missing: tuple[int, int]) -> Tensor:
            return self.project(self.expand(_convolve_rows(self.spatial, strip, missing)))

        return run_in_strips(x, rows, self.spatial.conv, branch, self.has_skip)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norms, in place; once."""
        self.spatial.fuse()
        shift = self.spatial.conv.bias
        if shift is not None:
            conv = self.expand.conv
            moved = exact(conv.weight).flatten(1) @ exact(shift)
            put_weights(conv, conv.weight, moved if conv.bias is None else moved + exact(conv.bias))
            self.spatial.conv.bias = None
        self.expand.fuse()
        self.project.fuse()


class MBConv(InvertedResidual):
    """1x1 widening, grouped k x k convolution in the middle, 1x1 projection: the block to compare with.

    SiLU after the first two, no squeeze-excite; shapes and arguments as `ConvFirst`.

    Raises:
        UsageError: the channels in the middle do not divide into groups.

    >>> sum(p.numel() for p in MBConv(64, 64).parameters())
    52352
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        group_width: int = 8,
        expansion: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        _check_groups(in_channels * expansion, group_width)
        super().__init__(
            in_channels,
            out_channels,
            stride,
            expansion,
            kernel_size,
            nn.SiLU,
            drop_path,
            group_width=group_width,
        )

    def forward_strips(self, x: Tensor, rows: int) -> Tensor:
        """Give the same, `rows` rows of the output at a time; the halo is widened again for each strip."""

        def branch(strip: Tensor, missing: tuple[int, int]) -> Tensor:
            # Rows outside the image are added after the widening: its shift must not act on them.
            return self.project(_convolve_rows(self.depthwise, self.expand(strip), missing))

        return run_in_strips(x, rows, self.depthwise.conv, branch, self.has_skip)

    def fuse(self) -> None:
        """Fold the batch norms, in place; once."""
        for unit in self.children():
            if isinstance(unit, ConvNormAct):  # an expansion of 1 leaves the widening out
                unit.fuse()


def run_in_strips(x: Tensor, rows: int, conv: nn.Conv2d, branch: Branch, add_input: bool) -> Tensor:
    """Run a block in eval mode over strips of rows: the arithmetic of one fused kernel in plain PyTorch.

    Args:
        x: `(N, C, H, W)`.
        rows: height of a strip of the output, in pixels.
        conv: the block's k x k convolution, which decides the halo.
        branch: the block's branch.
        add_input: add the input to the branch.

    Raises:
        UsageError: a strip has no rows.
    """
    if rows < 1:
        raise UsageError(f"Strips of {rows} rows. Expected 1 or more.")
    side, step, padding, height = conv.kernel_size[0], conv.stride[0], conv.padding[0], x.shape[2]
    out_height = (height + 2 * padding - side) // step + 1
    strips = []
    for first in range(0, out_height, rows):
        last = min(first + rows, out_height)
        top, bottom = first * step - padding, (last - 1) * step - padding + side
        strip = x[:, :, max(top, 0) : min(bottom, height)]  # (N, C, rows * step + halo, W)
        y = branch(strip, (max(-top, 0), max(bottom - height, 0)))
        strips.append(x[:, :, first:last] + y if add_input else y)
    return torch.cat(strips, 2)


def _convolve_rows(unit: ConvNormAct, x: Tensor, missing: tuple[int, int]) -> Tensor:
    """Run a unit on some rows of its input, with zeros for the missing ones above and below."""
    conv = unit.conv
    side = conv.padding[1]
    x = F.pad(x, (side, side, *missing))
    return unit.act(unit.norm(F.conv2d(x, conv.weight, conv.bias, conv.stride, groups=conv.groups)))


def _check_groups(channels: int, group_width: int) -> None:
    if group_width < 1 or channels % group_width:
        raise UsageError(f"{channels} channels do not divide into groups of {group_width}.")


class ConvFirstNet(Classifier):
    """Our network of ConvFirst blocks; the paper's is not known.

    Args:
        stages: channels and blocks of each stage; all but the first begin at stride 2.
        width: multiplies every channel count.
        block: `ConvFirst` or `MBConv`.
        group_width: channels of each group of the k x k convolutions.
        expansion: widening of the blocks.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> ConvFirstNet(((32, 1), (64, 1)), num_classes=10).num_features
    256
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int]] = STAGES["tiny"],
        width: float = 1.0,
        block: type[ConvFirst] | type[MBConv] = ConvFirst,
        group_width: int = 8,
        expansion: int = 4,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        divisor = math.lcm(8, group_width)
        rates = iter(drop_path_rates(drop_path_rate, sum(depth for _, depth in stages)))
        channels, reduction = make_divisible(STEM * width, divisor), stem_stride
        body: list[nn.Module] = [ConvNormAct(in_chans, channels, 3, stem_stride, act=nn.SiLU)]
        levels = [(channels, reduction)]
        for stage, (base, depth) in enumerate(stages):
            out = make_divisible(base * width, divisor)
            for index in range(depth):
                stride = 2 if stage and not index else 1
                body.append(block(channels, out, 3, stride, group_width, expansion, next(rates)))
                channels, reduction = out, reduction * stride
                levels.append((channels, reduction))
        last = HEAD_RATIO * channels
        body.append(ConvNormAct(channels, last, 1, act=nn.SiLU))
        super().__init__(
            nn.Sequential(*body), [*levels, (last, reduction)], last, in_chans=in_chans, **kwargs
        )

    def fuse(self) -> ConvFirstNet:
        """Fold every batch norm, in place; return the network.

        Raises:
            UsageError: the network is in training mode, whose batch statistics cannot be folded.
        """
        check_eval(self)
        for module in self.body:
            module.fuse()
        return self


@register_model
def convfirstnet_tiny(**kwargs: Any) -> ConvFirstNet:
    """Ours, tiny: 13 blocks of 32 to 256 channels."""
    return ConvFirstNet(**{"stages": STAGES["tiny"], **kwargs})


@register_model
def convfirstnet_small(**kwargs: Any) -> ConvFirstNet:
    """Ours, small: 19 blocks of 48 to 384 channels."""
    return ConvFirstNet(**{"stages": STAGES["small"], **kwargs})
