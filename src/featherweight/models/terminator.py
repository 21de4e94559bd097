"""Terminator: an image classifier of HyperZ·Z·W layers, without residual, attention or a norm that learns.

A slow net of coordinates gives each block a kernel as large as the map; it meets the activations twice, the
second time in a matrix product of rows with columns (`featherweight.ops.hyperzzw`). Around this global branch
stand four depthwise ones whose kernels depend on the context, gated units and interactions of channels. All
ten branches, and outputs of earlier blocks, are joined by a 1x1 convolution and standardised.

Shapes:
    `(N, 3, 32, 32)` -> five blocks that keep the size: 12 -> 36 -> 72 -> 144 -> 288 channels -> pooled ->
    logits. Maps must be square.

Differs:
    Eval mode uses running statistics of the batch standardisations and running contexts of the local kernels,
    so that an answer depends on its own image; `statistics="batch"` gives the official behaviour, whose
    answers change with the batch. The scalars between the blocks and the factors of the S-renormalisation,
    officially never trained nor saved, are the constants 0, 1 and 0.1. omega0 is unknown: a setting, 1 by
    default. Other sizes than the one it was built for (48 pixels stop the official code) get kernels on a
    finer or coarser grid and resampled maps; the cost of the matrix products grows with the cube of the side.
    `width` scales the channels in multiples of 12, `stem_stride` averages the image first. Official states
    hold no running statistics: show the network some batches in training mode, or use `"batch"`.

Reference: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv
2401.17948; the published configuration for CIFAR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.errors import UsageError
from featherweight.ops.hyperzzw import (
    RUNNING,
    ContextKernel,
    HyperKernel,
    fit,
    local_feedback_error,
)
from featherweight.registry import register_model

GROUPS = 12
"""Groups of channels behind each block, standardised over the batch and over the image in turn."""

MULTIPLES = (1, 3, 6, 12, 24)
"""Output channels of each block, in units of `GROUPS`."""

FEEDS = ((), (), (0,), (1,), (2, 1))
"""Earlier blocks whose outputs each block gets besides the last one's."""

LAYERS = (3, 2, 2, 2, 2)
"""Products in the slow net of each block's global kernel."""

DROPS = (0.0, 0.05, 0.05, 0.05, 0.05)
LOCAL_SIDES = (3, 9, 5, 7)
BRANCHES = 10


def pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Build a 1x1 convolution, drawn by Kaiming's normal rule, its bias zero."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.kaiming_normal_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class LocalBranch(nn.Module):
    """Depthwise convolution with given kernels, 1x1 convolution, batch standardisation, GELU, one bias.

    Args:
        channels: of the map.
        statistics: `"running"` or `"batch"`: the standardisation in eval mode.
    """

    def __init__(self, channels: int, statistics: str) -> None:
        super().__init__()
        self.mix = pointwise(channels, channels)
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=statistics == RUNNING)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, kernels: Tensor) -> Tensor:
        """`(N, C, H, W)` and kernels `(C, 1, k, k)` to `(N, C, H, W)`."""
        y = F.conv2d(x, kernels, padding=kernels.shape[-1] // 2, groups=x.shape[1])
        return F.gelu(self.norm(self.mix(y))) + self.bias


class RecursiveGate(nn.Module):
    """Gated linear unit whose gate looks at its value: `Y(GELU(IS(K x * Q V x)) + P)`; keeps the shape.

    Args:
        channels: of the map.
        side: of the learned map P, in pixels.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.key, self.value, self.query, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.field = nn.Parameter(torch.zeros(1, 1, side, side))
        for conv in (self.key, self.value, self.query, self.out):
            nn.init.kaiming_uniform_(conv.weight, nonlinearity="linear")
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, S, S)` to the same."""
        gated = F.gelu(F.instance_norm(self.key(x) * self.query(self.value(x))))
        return self.out(gated + fit(self.field, x.shape[2:]))


def channel_score(x: Tensor, slow_net: HyperKernel) -> Tensor:
    """Give the pooled channels times their kernel times themselves, `(N, C, 1, 1)`."""
    y = x.mean((2, 3))[:, None]  # (N, 1, C)
    return (y * (y * slow_net(y))).transpose(1, 2)[..., None]


class FastLayer(nn.Module):
    """The ten branches of a block, joined: `(N, C, S, S)` to `(N, out_channels, S, S)`.

    Args:
        channels: of the input.
        out_channels: of the output.
        extras: outputs of earlier blocks that come as further inputs.
        layers: products in the slow net of the global kernel.
        side: of the map, in pixels.
        omega0: scale of the kernels' frequencies.
        statistics: `"running"` or `"batch"`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        extras: int,
        layers: int,
        side: int,
        omega0: float,
        statistics: str,
    ) -> None:
        super().__init__()
        c, size = channels, (side, side)
        self.global_kernel = HyperKernel(size, c, 64, layers, omega0)
        self.local_kernels = nn.ModuleList(
            ContextKernel((k, k), c, 32, 2, omega0, statistics) for k in LOCAL_SIDES
        )
        self.local_branches = nn.ModuleList(LocalBranch(c, statistics) for _ in LOCAL_SIDES)
        self.mix = pointwise(c, c)
        self.gate, self.gate_slow = RecursiveGate(c, side), RecursiveGate(c, side)
        self.channel_kernel = HyperKernel((c,), 1, 32, 2, omega0)
        self.joint_channel_kernel = HyperKernel((c,), 1, 16, 2, omega0)
        self.joint_space_kernel = HyperKernel(size, 1, 64, 2, omega0)
        self.join = pointwise(c * (BRANCHES + extras), out_channels)

    def forward(self, x: Tensor, extras: Sequence[Tensor] = ()) -> Tensor:
        """Run the branches and join them with the extras."""
        kernel = self.global_kernel(x)  # (1, C, S, S)
        weights = x * kernel
        fast = F.instance_norm(self.gate_slow(weights) + self.gate(x))
        mixed = F.instance_norm(self.mix(x))
        scored = F.instance_norm(x * channel_score(x, self.channel_kernel).sigmoid())
        out, out_mixed, out_scored = weights @ fast, weights @ mixed, weights @ scored  # rows by columns
        near = [
            branch(source, kernels(context))
            for branch, kernels, source, context in zip(
                self.local_branches,
                self.local_kernels,
                (scored, x, x, mixed),
                (x, scored, mixed, x),
                strict=True,
            )
        ]
        extras = [tile(extra, x.shape[1]) for extra in extras]
        joined = (
            *(out, near[1], *extras[:1], fast, out_mixed, near[0], out.sigmoid() * out, near[2]),
            *(out_scored, near[3], *extras[1:], x * self.joint_score(out).sigmoid()),
        )
        return self.join(torch.cat(joined, 1))

    def joint_score(self, y: Tensor) -> Tensor:
        """Score every channel and place of the global branch, `(N, C, S, S)`."""
        places = y.mean(1, keepdim=True)  # (N, 1, S, S)
        score = places * (places * self.joint_space_kernel(places))
        return score * channel_score(y, self.joint_channel_kernel)


def tile(x: Tensor, channels: int) -> Tensor:
    """Repeat a map along its channels, cut at `channels`."""
    return x.repeat(1, -(-channels // x.shape[1]), 1, 1)[:, :channels]


class Standardise(nn.Module):
    """Standardise 12 groups of channels in turn over the batch and over each image; keeps the shape.

    Args:
        channels: a multiple of 12.
        statistics: `"running"` or `"batch"`.
    """

    def __init__(self, channels: int, statistics: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels // 2, affine=False, track_running_stats=statistics == RUNNING)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        groups = x.unflatten(1, (GROUPS // 2, 2, -1))  # (N, 6, 2, C / 12, H, W)
        over_batch = self.norm(groups[:, :, 0].flatten(1, 2))
        over_image = F.instance_norm(groups[:, :, 1].flatten(1, 2))
        both = [part.unflatten(1, (GROUPS // 2, -1)) for part in (over_batch, over_image)]
        return torch.stack(both, 2).flatten(1, 3)


class SlowFastBlock(nn.Module):
    """One block; input and output carry the earlier outputs that are still needed behind the current one.

    Args:
        channels: of the current map and of the carried ones, in order.
        out_channels: of the new map.
        extras: which carried maps the branches get.
        keep: which of (new map, carried maps) go on, in order.
        drop: dropout of whole channels behind the block.
        **settings: of `FastLayer`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        extras: Sequence[int],
        keep: Sequence[int],
        drop: float,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.channels, self.extras, self.keep = tuple(channels), tuple(extras), tuple(keep)
        self.layer = FastLayer(channels[0], out_channels, len(extras), **settings)
        self.norm = Standardise(out_channels, settings["statistics"])
        self.bias = nn.Parameter(torch.zeros(1))
        self.drop = nn.Dropout2d(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, sum(channels), S, S)` to `(N, channels of what is kept, S, S)`."""
        current, *carried = x.split(self.channels, 1)
        y = self.layer(current, [carried[i - 1] for i in self.extras])
        y = self.drop(F.gelu(self.norm(y)) + self.bias)
        seen = (y, current, *carried)
        return torch.cat([seen[i] for i in self.keep], 1)


class Terminator(Classifier):
    """The classifier; five blocks that keep the size of the map.

    Args:
        width: multiplies the channels, in multiples of 12.
        side: rows and columns of the images it is built for, in pixels.
        omega0: scale of the kernels' frequencies.
        statistics: of eval mode, `"running"` or, as officially, of the `"batch"`.
        stem_stride: side of the squares of pixels that are averaged first.
        depth: blocks, the first ones of the five.
        in_chans: channels of the image.
        drop_path_rate: has no effect; there is no residual.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: omega0 is not positive, the statistics are unknown, or depth is not 1 to 5.

    >>> sum(p.numel() for p in Terminator(num_classes=10).parameters())
    1336855
    """

    def __init__(
        self,
        width: float = 1.0,
        side: int = 32,
        omega0: float = 1.0,
        statistics: str = RUNNING,
        stem_stride: int = 1,
        depth: int = len(MULTIPLES),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not 1 <= depth <= len(MULTIPLES):
            raise UsageError(f"Got depth={depth}; expected 1 to {len(MULTIPLES)} blocks.")
        settings = {"side": -(-side // stem_stride), "omega0": omega0, "statistics": statistics}
        outputs, all_feeds = _output_channels(width)[:depth], FEEDS[:depth]
        pool = nn.AvgPool2d(stem_stride, ceil_mode=True) if stem_stride > 1 else nn.Identity()
        body: list[nn.Module] = [pool]
        carried: list[int] = []  # blocks whose outputs come along behind the last one's
        for index, (out, feeds) in enumerate(zip(outputs, all_feeds, strict=True)):
            inputs = [index - 1, *carried]
            later = {block for feed in all_feeds[index + 1 :] for block in feed if block < index}
            carried = sorted(later, reverse=True)
            body.append(
                SlowFastBlock(
                    [outputs[i] if i >= 0 else in_chans for i in inputs],
                    out,
                    [inputs.index(block) for block in feeds],
                    [[index, *inputs].index(block) for block in (index, *carried)],
                    DROPS[index],
                    layers=LAYERS[index],
                    **settings,
                )
            )
        levels = [(channels, stem_stride) for channels in (in_chans, *outputs)]
        defaults = {"input_size": (3, side, side), "interpolation": "bilinear", **kwargs}
        super().__init__(nn.Sequential(*body), levels, outputs[-1], in_chans=in_chans, **defaults)
        self.default_cfg["first_conv"] = "body.1.layer.mix"

    def feedback_error(self) -> Tensor:
        """Return the local feedback error of the five global kernels, a loss to add in training."""
        blocks = [block for block in self.body if isinstance(block, SlowFastBlock)]
        return local_feedback_error([block.layer.global_kernel.effective_weight() for block in blocks])

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys to ours; running statistics, which they lack, stay as they are."""
        renamed = {key: value for key, value in state.items() if not key.endswith("train_length")}
        for pattern, replacement in _OFFICIAL_RULES:
            renamed = {re.sub(pattern, replacement, key): value for key, value in renamed.items()}
        return {**dict(self.named_buffers()), **renamed}


def _output_channels(width: float) -> list[int]:
    """Scale the channels so that each block's still divide by those of the one before."""
    multiples: list[int] = []
    for multiple in MULTIPLES:
        before = multiples[-1] if multiples else 1
        multiples.append(before * max(1, round(multiple * width / before)))
    return [GROUPS * multiple for multiple in multiples]


_OFFICIAL_RULES = [
    (r"^out_layer\.", "classifier."),
    (r"^blocks\.(\d)\.", lambda match: f"body.{int(match[1]) + 1}."),
    (r"\.fast_multi_branch\.", ".layer."),
    (r"\.slow_net_g\.Kernel\.", ".global_kernel."),
    *((rf"\.slow_net_l{n}\.Kernel\.", f".local_kernels.{n - 1}.") for n in range(1, 5)),
    *((rf"\.local_interact_conv_{n}\.channel_mixer\.", f".local_branches.{n - 1}.mix.") for n in range(1, 5)),
    *((rf"\.bias{n}$", f".local_branches.{n - 1}.bias") for n in range(1, 5)),
    (r"\.channel_mixer_hci\.slow_net_gc\.Kernel\.", ".channel_kernel."),
    (r"\.hyper_interact\.slow_net_gc\.Kernel\.", ".joint_channel_kernel."),
    (r"\.hyper_interact\.slow_net_gs\.Kernel\.", ".joint_space_kernel."),
    (r"\.channel_mixer_mlp\.", ".mix."),
    (r"\.bottleneck_layer\.", ".join."),
    (r"\.Fast_Kernel_rgu\.", ".gate."),
    (r"\.Fast_Kernel_rgu_2\.", ".gate_slow."),
    *(
        (rf"\.fast_linear_{old}\.", f".{new}.")
        for old, new in zip("kvqy", ("key", "value", "query", "out"), strict=True)
    ),
    (r"\.(filters\.\d)\.linear\.", r".\1."),
    (r"\.linears\.", ".mixers."),
    (r"\.output_linear\.", ".out."),
    (r"\.bias_pk?$", ".field"),
    (r"\.fast_reduce\.", ".reduce."),
    (r"\.fast_fc1\.", ".fc."),
    (r"\.fast_linears_x\.", ".gates."),
]


@register_model
def terminator_cifar10(width: float = 1.0, **kwargs: Any) -> Terminator:
    """Terminator for 32-pixel images; 10 classes on its card."""
    return Terminator(width, **kwargs)


@register_model
def terminator_cifar100(width: float = 1.0, **kwargs: Any) -> Terminator:
    """Terminator for 32-pixel images; 100 classes on its card."""
    return Terminator(width, **kwargs)
