"""EMOv2: one mobile block for all depths, whose widening is a convolution early and spanning attention late.

The improved inverted residual mobile block (i2RMB) widens, filters depthwise and projects under a single
shortcut. In the first two stages a 1x1 convolution widens; in the last two the values of an attention do, so
that mixing over the map costs only queries and keys on top. Spanning attention attends inside neighbouring
windows and inside dilated ones, which reach over the whole map, and adds the two; both share queries, keys
and values, so that the second costs no parameter.

Shapes:
    `(N, 3, 224, 224)` -> stem C1/2 x 1/2 -> C1 x 1/4 -> C2 x 1/8 -> C3 x 1/16 -> C4 x 1/32 -> pooled C4 ->
    logits `(N, 1000)`; C1 to C4 are 48, 72, 160, 288 in the 5M network. Any side works: maps under attention
    are padded to whole windows.

Differs:
    A map of a single window is attended once and doubled, for its two partitions are equal. Layer scales are
    vectors, so that weight decay passes them by. The official dictionary with the logits twice (labels,
    teacher) is one tensor. The published drop path is no default: `drop_path_rate` 0.04036 (1M), 0.05 (2M,
    5M), 0.1 (20M), 0.2 (50M). `attention="remote"` with `kernels=(3, 3, 5, 5)` is the older EMO. `width`
    rounds to multiples of 8, under attention of the head.

Reference: Zhang et al., "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 3; Zhang et al.,
"Rethinking Mobile Block for Efficient Attention-based Models", arXiv 2301.01146.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, fold_before, scale_output
from featherweight.blocks.layouts import rename
from featherweight.errors import UsageError
from featherweight.registry import register_model

SMALL = {"expansions": (2, 2.5, 3, 3.5), "head_dim": 20}

NETS: dict[str, dict[str, Any]] = {
    "1m": {"depths": (2, 2, 8, 3), "channels": (32, 48, 80, 180), **SMALL},
    "2m": {"depths": (3, 3, 9, 3), "channels": (32, 48, 120, 200), **SMALL},
    "5m": {"depths": (3, 3, 9, 3), "channels": (48, 72, 160, 288)},
    "20m": {"depths": (3, 3, 13, 3), "channels": (64, 128, 320, 448)},
    "50m": {"depths": (5, 8, 20, 7), "channels": (64, 128, 384, 512)},
}
"""Blocks, channels, expansions and channels of a head, where they are not the defaults of `EMOv2`."""

ATTENTIONS = {"hybrid": (False, True), "near": (False,), "remote": (True,), "none": ()}
"""Partitions of each kind of attention: neighbouring windows (False), dilated windows (True)."""

PARTS = (
    (r"norm\.norm\.", "norm."),
    (r"eops\.0\.net\.", "expand."),
    (r"eops\.0\.qk\.conv\.", "expand.qk."),
    (r"eops\.0\.v\.", "expand.value."),
    (r"conv_local\.", "local."),
    (r"proj\.conv\.", "project."),
    (r"ls\.", "scale."),
    ("", ""),
)
"""Beginnings of the official keys inside a block, as patterns, and ours."""

EPS = 1e-6
BatchNorm: Any = functools.partial(nn.BatchNorm2d, eps=EPS)
SiLU: Any = functools.partial(nn.SiLU, inplace=True)


class LayerNorm2d(nn.LayerNorm):
    """Normalise each pixel over its channels, `(N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape; the result lies channels-last in memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """Multiply each of `channels` channels by a learnt factor, `value` at the start."""

    def __init__(self, channels: int, value: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        return x * self.gamma.view(-1, 1, 1)


def split_windows(x: Tensor, heads: int, window: int, remote: bool) -> Tensor:
    """Cut `(N, C, H, W)` into windows: `(N * windows, heads, window * window, C / heads)`.

    Args:
        x: a map whose sides are multiples of `window`.
        heads: parts of the channels.
        window: side of a window, in pixels.
        remote: take every `H / window`-th row and column instead of neighbouring ones.
    """
    rows, cols = int(x.shape[2]) // window, int(x.shape[3]) // window
    grid = (window, rows, window, cols) if remote else (rows, window, cols, window)
    order = (0, 4, 6, 1, 3, 5, 2) if remote else (0, 3, 5, 1, 4, 6, 2)
    x = x.reshape(x.shape[0], heads, x.shape[1] // heads, *grid)
    return x.permute(order).reshape(-1, heads, window * window, x.shape[2])


def merge_windows(x: Tensor, size: tuple[int, int], window: int, remote: bool) -> Tensor:
    """Put windows back into a map of `size` (height, width): the inverse of `split_windows`."""
    rows, cols = size[0] // window, size[1] // window
    order = (0, 3, 6, 4, 1, 5, 2) if remote else (0, 3, 6, 1, 4, 2, 5)
    x = x.reshape(-1, rows, cols, x.shape[1], window, window, x.shape[3])
    return x.permute(order).reshape(-1, x.shape[3] * x.shape[6], *size)


class SpanningAttention(nn.Module):
    """Attention inside neighbouring and inside dilated windows, added; its values widen the map.

    `(N, in_channels, H, W)` to `(N, out_channels, H, W)`. Padded pixels take part, with the biases as their
    queries, keys and values, as in the official code.

    Args:
        in_channels: channels of the input, a multiple of `head_dim`.
        out_channels: channels of the output, a multiple of the number of heads.
        head_dim: channels of queries and keys in each head.
        window: side of a window, in pixels.
        partitions: kinds of windows to add up, see `ATTENTIONS`.

    Raises:
        UsageError: the channels do not split into heads.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        head_dim: int = 32,
        window: int = 7,
        partitions: tuple[bool, ...] = ATTENTIONS["hybrid"],
    ) -> None:
        super().__init__()
        self.heads = in_channels // head_dim
        if in_channels % head_dim or out_channels % self.heads:
            found = f"{in_channels} to {out_channels} channels do not split into heads of {head_dim}"
            raise UsageError(f"{found}. Expected multiples of the head, and of the number of heads.")
        self.window = window
        self.partitions = partitions
        self.qk = nn.Conv2d(in_channels, 2 * in_channels, 1)
        self.value = _widen(in_channels, out_channels, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """Pad to whole windows, attend in each partition, add, crop."""
        height, width = (int(side) for side in x.shape[2:])
        down, right = -height % self.window, -width % self.window
        if down or right:
            x = F.pad(x, (0, right, 0, down))
        query, key = self.qk(x).chunk(2, 1)  # (N, in_channels, Hp, Wp) each
        value = self.value(x)  # (N, out_channels, Hp, Wp)
        if (height + down, width + right) == (self.window, self.window):
            y = self.attend(query, key, value, remote=False) * len(self.partitions)
        else:
            y = sum(self.attend(query, key, value, remote) for remote in self.partitions)
        return y[:, :, :height, :width] if down or right else y

    def attend(self, query: Tensor, key: Tensor, value: Tensor, remote: bool) -> Tensor:
        """Attend in one partition: the shape of `value`."""
        size = (int(value.shape[2]), int(value.shape[3]))
        q, k, v = (split_windows(t, self.heads, self.window, remote) for t in (query, key, value))
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        return merge_windows(weights @ v, size, self.window, remote)


class MobileBlock(nn.Module):
    """The i2RMB: normalise, widen, add a depthwise filter, project, scale, shortcut.

    `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`. Equal channels at
    stride 1 get both shortcuts.

    Args:
        norm: normalises the input.
        expand: widens to `hidden` channels.
        in_channels: channels of the input.
        hidden: channels in the middle.
        out_channels: channels of the output.
        kernel_size: side of the depthwise kernel, in pixels.
        stride: 1 or 2; a block of stride 2 has no shortcut.
        layer_scale: factor on the branch at the start of training.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self,
        norm: nn.Module,
        expand: nn.Module,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel_size: int = 5,
        stride: int = 1,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.skip = stride == 1 and in_channels == out_channels
        self.norm = norm
        self.expand = expand
        depthwise = {"groups": hidden, "act": SiLU, "norm": BatchNorm}
        self.local = ConvNormAct(hidden, hidden, kernel_size, stride, **depthwise)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.scale: nn.Module = LayerScale(out_channels, layer_scale)
        self.drop_path = DropPath(drop_path if self.skip else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block."""
        y = self.expand(self.norm(x))  # (N, hidden, H, W)
        local = self.local(y)  # (N, hidden, H / stride, W / stride)
        if not self.skip:
            return self.scale(self.project(local))
        return x + self.drop_path(self.scale(self.project(y + local)))

    def fold(self) -> None:
        """Fold the batch norm at the start and the layer scale into the 1x1 convolutions beside them."""
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_before(self.norm, self.expand.conv)
            self.norm = nn.Identity()
        if isinstance(self.scale, LayerScale):
            scale_output(self.project, self.scale.gamma)
            self.scale = nn.Identity()


class EMOv2(Classifier):
    """EMOv2, and with `attention="remote"` its predecessor EMO.

    Args:
        depths: blocks of each stage; the first of a stage halves the map.
        channels: channels of each stage; under attention multiples of `head_dim`.
        expansions: widening of each stage's blocks; twice that in the first block.
        head_dim: channels of queries and keys in each head.
        width: multiplies every channel count.
        attention: a key of `ATTENTIONS`; `"none"` widens by convolution everywhere.
        first_attending: the stage, from 0, with which attention, layer norm and GELU begin.
        window: side of the windows, in pixels; the networks for 256 and 512 pixels take 8.
        kernels: side of each stage's depthwise kernels, in pixels.
        layer_scale: factor on every branch at the start of training.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: the attention is unknown, or the channels under it do not split into heads.

    >>> EMOv2(depths=(1, 2), channels=(16, 32), first_attending=1, num_classes=10).num_features
    32
    """

    def __init__(
        self,
        depths: Sequence[int],
        channels: Sequence[int],
        expansions: Sequence[float] = (2, 3, 4, 4),
        head_dim: int = 32,
        width: float = 1.0,
        attention: str = "hybrid",
        first_attending: int = 2,
        window: int = 7,
        kernels: Sequence[int] = (5, 5, 5, 5),
        layer_scale: float = 1e-6,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if attention not in ATTENTIONS:
            raise UsageError(f"No attention '{attention}'. Expected one of {', '.join(ATTENTIONS)}.")
        partitions = ATTENTIONS[attention]
        before, reduction = _scale(channels[0], width, 8) // 2, stem_stride
        body: list[nn.Module] = [_stem(in_chans, before, stem_stride)]
        levels = [(before, reduction)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        for stage, depth in enumerate(depths):
            late = stage >= first_attending
            after = _scale(channels[stage], width, head_dim if late else 8)
            reduction *= 2
            for index in range(depth):
                hidden = int(before * expansions[stage] * (1 if index else 2))
                expand = _widen(before, hidden, act=nn.GELU if late else SiLU)
                if late and index and partitions:
                    expand = SpanningAttention(before, hidden, head_dim, window, partitions)
                norm = LayerNorm2d(before, EPS) if late else BatchNorm(before)
                shape = (hidden, after, kernels[stage], 1 if index else 2)
                body.append(MobileBlock(norm, expand, before, *shape, layer_scale, next(rates)))
                levels.append((after, reduction))
                before = after
        body.append(LayerNorm2d(before, EPS))
        super().__init__(nn.Sequential(*body), levels, before, in_chans=in_chans, **kwargs)
        self.depths = tuple(depths)
        self.default_cfg["first_conv"] = "body.0.0.conv"
        self.apply(_init_weights)

    def fuse(self) -> EMOv2:
        """Fold batch norms and layer scales into convolutions, in place; return the network.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in list(self.modules()):
            if isinstance(module, ConvNormAct):
                module.fuse()
            elif isinstance(module, MobileBlock):
                module.fold()
        return self

    def load_official(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load weights, see `Classifier`; `net`, which the official code evaluates, goes before `net_E`."""
        super().load_official(state.get("net") or state.get("net_E") or state, adapt=adapt)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the official repository to ours and flatten the layer scales."""
        final = f"body.{len(self.body) - 1}."
        rules = [(r"stage0\.", "body.0."), (r"norm\.norm\.", final), (r"head\.", "classifier.")]
        position = 0
        for stage, depth in enumerate(self.depths, 1):
            for index in range(depth):
                position += 1
                rules += [(rf"stage{stage}\.{index}\.{old}", f"body.{position}.{new}") for old, new in PARTS]
        named = rename(state, rules)
        return {key: value.flatten() if key.endswith("gamma") else value for key, value in named.items()}


def _widen(channels: int, hidden: int, act: type[nn.Module]) -> nn.Module:
    return ConvNormAct(channels, hidden, 1, bias=True, norm=None, act=act)


def _stem(in_chans: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(in_chans, channels, 3, stride, act=SiLU, bias=True, norm=BatchNorm),
        ConvNormAct(channels, channels, 3, groups=channels, act=SiLU, norm=BatchNorm),
        ConvNormAct(channels, channels, 1, act=None, norm=None),
    )


def _scale(channels: int, width: float, divisor: int) -> int:
    return channels if width == 1.0 else make_divisible(channels * width, divisor)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@register_model
def emov2_1m(**kwargs: Any) -> EMOv2:
    """EMOv2 with 1.5 million parameters."""
    return EMOv2(**NETS["1m"], **kwargs)


@register_model
def emov2_2m(**kwargs: Any) -> EMOv2:
    """EMOv2 with 2.4 million parameters."""
    return EMOv2(**NETS["2m"], **kwargs)


@register_model
def emov2_5m(**kwargs: Any) -> EMOv2:
    """EMOv2 with 5.1 million parameters."""
    return EMOv2(**NETS["5m"], **kwargs)


@register_model
def emov2_5m_512(**kwargs: Any) -> EMOv2:
    """The 5M network for 512 pixels: windows of 8, the same parameters."""
    return EMOv2(**{**NETS["5m"], "window": 8, "input_size": (3, 512, 512), **kwargs})


@register_model
def emov2_20m(**kwargs: Any) -> EMOv2:
    """EMOv2 with 20.2 million parameters."""
    return EMOv2(**NETS["20m"], **kwargs)


@register_model
def emov2_50m(**kwargs: Any) -> EMOv2:
    """EMOv2 with 49.8 million parameters."""
    return EMOv2(**NETS["50m"], **kwargs)
