"""LSNet: weights of a small kernel are read off a large window, then only the small window is summed.

Self-attention and plain convolution look at one and the same region to choose weights and to add values up.
LS convolution separates the two: a static 7x7 depthwise convolution in a bottleneck of half the channels sees
a large window cheaply and predicts, for every position, one 3x3 kernel per eight channels; only those nine
neighbours are summed. Odd blocks mix this way (with attention in the last stage, where the map is tiny), even
blocks with a re-parameterisable 3x3 depthwise convolution and squeeze-excite.

Shapes:
    `(N, 3, 224, 224)` -> c1/4 x 1/2 -> c1/2 x 1/4 -> c1 x 1/8 -> c2 x 1/16 -> c3 x 1/32 -> c4 x 1/64 ->
    pooled c4 -> logits `(N, 1000)`. Any height and width will do: sides are rounded up at each stride.

Differs:
    The aggregation is written in plain PyTorch, nine shifted products, instead of a Triton kernel, so it runs
    on every device and exports to ONNX; half-precision inputs are summed in float32. The official classifier
    accepts one input size only; here the table of position biases is resized (bicubic, as the official
    detection code resizes a table when it loads one) to the last map's size at every call, so it can not go
    stale either. The two heads of the distilled networks are averaged in training too, until
    `set_distilled_training(True)` asks for both. Stochastic depth (`drop_path_rate`, 0 officially), on
    attention and feed-forward, is an addition, as are `width` and `stem_stride`. A new classifier starts as
    PyTorch's linear layers do.

Reference: Wang et al., "LSNet: See Large, Focus Small", CVPR 2025, arXiv 2503.23135, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import NORMS, check_eval, fold_before, folded, put_weights
from featherweight.blocks.ls_conv import LSConv
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.registry import register_model

TINY = (64, 128, 256, 384), (0, 2, 8, 10)
SMALL = (96, 192, 320, 448), (1, 2, 8, 10)
BASE = (128, 256, 384, 512), (4, 6, 8, 10)
"""Channels and number of blocks of the four stages."""

HEADS, KEY_WIDTH, TABLE_SIDE = 4, 16, 4
"""Attention of the last stage; its map is 4 x 4 for an image of 224 pixels."""

OFFICIAL = (
    dict(c="conv", bn="norm", conv="square", conv1="point", dw="local", attention_biases="table")
    | dict(lkp="perceive", cv1="0", cv2="1", cv3="2", cv4="3", se="squeeze", fc1="reduce", fc2="expand")
    | dict(ffn="feed_forward", pw1="widen", pw2="project")
)
"""Official name -> ours, for each dotted part of a key inside a block."""


class RepDepthwise(nn.Module):
    """A 3x3 and a 1x1 depthwise convolution and the input, summed; one convolution after `merge`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = ConvNormAct(channels, channels, 3, groups=channels, act=None)
        self.point = ConvNormAct(channels, channels, 1, groups=channels, act=None)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        return self.square(x) + self.point(x) + x

    def merge(self) -> nn.Conv2d:
        """Return the 3x3 depthwise convolution that does the same in eval mode."""
        weight, bias = folded(self.square.conv, self.square.norm)
        centre, shift = folded(self.point.conv, self.point.norm)
        weight[:, :, 1, 1] += centre[:, :, 0, 0] + 1
        put_weights(self.square.conv, weight, bias + shift)
        return self.square.conv


class Attention(nn.Module):
    """Attention among all positions, biased by their distance along rows and columns, plus the input.

    `(N, channels, H, W)` to the same shape. Only the queries see their neighbours (3x3 depthwise).

    Args:
        channels: of input and output, a multiple of 4.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(self, channels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.widths = (HEADS * KEY_WIDTH, HEADS * KEY_WIDTH, channels)
        self.qkv = ConvNormAct(channels, sum(self.widths), 1, act=None)
        self.local = ConvNormAct(self.widths[0], self.widths[0], 3, groups=self.widths[0], act=None)
        self.project = ConvNormAct(channels, channels, 1, act=None)
        self.table = nn.Parameter(torch.zeros(HEADS, TABLE_SIDE, TABLE_SIDE))
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.project.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, project, add the input."""
        height, width = (int(side) for side in x.shape[2:])
        q, k, v = self.qkv(x).split(self.widths, 1)
        q, k, v = (part.flatten(2).unflatten(1, (HEADS, -1)) for part in (self.local(q), k, v))
        logits = q.transpose(2, 3) @ k * KEY_WIDTH**-0.5 + self.bias(height, width)  # (N, 4, H W, H W)
        y = v @ logits.softmax(-1).transpose(2, 3)  # (N, 4, channels / 4, H W)
        y = y.flatten(1, 2).unflatten(2, (height, width))
        return x + self.drop_path(self.project(y.relu()))

    def bias(self, height: int, width: int) -> Tensor:
        """Return the bias of every pair of positions of a map, `(4, H W, H W)`."""
        table = self.table
        if table.shape[1:] != (height, width):
            table = F.interpolate(table[None], (height, width), mode="bicubic")[0]
        rows, cols = (torch.arange(side, device=table.device) for side in (height, width))
        down, right = (rows[:, None] - rows).abs(), (cols[:, None] - cols).abs()
        index = down[:, None, :, None] * width + right[None, :, None, :]  # (H, W, H, W)
        return table.flatten(1)[:, index.flatten(2).flatten(0, 1)]


class FeedForward(nn.Module):
    """Two 1x1 convolutions with twice the channels between them, plus the input."""

    def __init__(self, channels: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.widen = ConvNormAct(channels, 2 * channels, 1)
        self.project = ConvNormAct(2 * channels, channels, 1, act=None)
        self.drop_path = DropPath(drop_path)
        nn.init.zeros_(self.project.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        return x + self.drop_path(self.project(self.widen(x)))


class Block(nn.Module):
    """Mix positions, gate channels (even blocks only), then the feed-forward pair; nothing changes the shape.

    Args:
        channels: of input and output.
        stage: of the network, from 0; odd blocks of stage 3 attend.
        index: of the block in its stage, from 0.
        drop_path: probability of dropping a residual branch during training.
    """

    def __init__(self, channels: int, stage: int, index: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer: nn.Module
        self.squeeze: nn.Module = nn.Identity()
        if index % 2 == 0:
            self.mixer = RepDepthwise(channels)
            self.squeeze = SqueezeExcite(channels, make_divisible(channels / 4), gate=nn.Sigmoid)
        else:
            self.mixer = Attention(channels, drop_path) if stage == 3 else LSConv(channels)
        self.feed_forward = FeedForward(channels, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, H, W)` to the same shape."""
        return self.feed_forward(self.squeeze(self.mixer(x)))


class LSNet(Classifier):
    """LSNet with one head.

    Args:
        channels: of the four stages, at width 1.
        depths: blocks of the four stages.
        width: multiplies every channel count but the width of the attention's keys.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> LSNet((16, 24, 32, 40), (0, 2, 2, 2), num_classes=10).num_features
    40
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        width: float = 1.0,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        widths = [make_divisible(base * width) for base in channels]
        first, reduction = widths[0], stem_stride
        body: list[nn.Module] = [
            ConvNormAct(in_chans, first // 4, 3, stem_stride),
            ConvNormAct(first // 4, first // 2, 3, 2),
            ConvNormAct(first // 2, first, 3, 2, act=None),
        ]
        levels = [(first // 4, reduction), (first // 2, 2 * reduction), (first, 4 * reduction)]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        before, reduction = first, 4 * reduction
        for stage, (out, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                body += [
                    ConvNormAct(before, before, 3, 2, before, None),
                    ConvNormAct(before, out, 1, act=None),
                ]
                reduction *= 2
                levels += [(before, reduction), (out, reduction)]
            body += [Block(out, stage, index, next(rates)) for index in range(depth)]
            levels += [(out, reduction)] * depth
            before = out
        # Pooled features are (N, C, 1, 1) before the head, hence a two-dimensional norm.
        super().__init__(
            nn.Sequential(*body), levels, before, head=nn.BatchNorm2d(before), in_chans=in_chans, **kwargs
        )
        self.depths = tuple(depths)
        self.default_cfg["crop_pct"] = 0.9

    def fuse(self) -> Self:
        """Fold, in place, every norm that follows a convolution or precedes the classifier.

        Norms after the aggregation and of the predicted kernels stay: no layer before can carry them.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in self.body:
            if isinstance(module, Block) and isinstance(module.mixer, RepDepthwise):
                module.mixer = module.mixer.merge()
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.fuse()
        self.head = _fold_head(self.head, self.classifier)
        return self

    def load_official(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load weights as `Classifier` does, but the plain ones where averaged ones lie beside them.

        The authors keep an average and publish the accuracy of the plain weights.
        """
        plain = state.get("model")
        super().load_official(plain if isinstance(plain, Mapping) else state, adapt=adapt)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys; the index buffers go, tables get their two dimensions back."""
        starts = [3 + sum(self.depths[:stage]) + 2 * max(0, stage - 1) for stage in range(4)]
        renamed = {}
        for key, value in state.items():
            if key.endswith("attention_bias_idxs"):
                continue
            if key.endswith("attention_biases"):
                value = value.unflatten(1, (TABLE_SIDE, TABLE_SIDE))
            renamed[_own_key(key, starts)] = value
        return renamed


DIST_KEYS = ("classifier_dist.weight", "classifier_dist.bias")


class DistilledLSNet(LSNet):
    """LSNet with a second head for a teacher's answers; arguments as for `LSNet`.

    It gives the mean of both heads, except in training after `set_distilled_training(True)`: then both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_dist: nn.Module = nn.BatchNorm2d(self.num_features)
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give the logits of both heads, labels' first, in training mode."""
        self.distilled_training = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both last layers by new ones with `num_classes` outputs; 0 removes them."""
        super().reset_classifier(num_classes, global_pool)
        classifier = self.classifier
        super().reset_classifier(num_classes)
        self.classifier_dist = classifier

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pool the last feature map and classify it twice; `pre_logits` stops before the first classifier."""
        logits = super().forward_head(x, pre_logits)
        if pre_logits or isinstance(self.classifier_dist, nn.Identity):
            return logits
        pooled = F.adaptive_avg_pool2d(x, 1) if self.global_pool == "avg" else x.amax((2, 3), keepdim=True)
        pooled = F.dropout(self.head_dist(pooled).flatten(1), self.drop_rate, self.training)
        second = self.classifier_dist(pooled)
        if self.training and self.distilled_training:
            return logits, second
        return (logits + second) / 2

    def fuse(self) -> Self:
        """Fold as `LSNet` does and average the two heads into one layer."""
        super().fuse()
        self.head_dist = _fold_head(self.head_dist, self.classifier_dist)
        if isinstance(self.classifier_dist, nn.Linear):
            first, second = self.classifier, self.classifier_dist
            put_weights(first, (first.weight + second.weight) / 2, (first.bias + second.bias) / 2)
            self.classifier_dist = nn.Identity()
        return self

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys; a second classifier of another size stays fresh like the first."""
        own = self.state_dict()
        renamed = super().from_official(state)
        return {
            key: own[key] if key in DIST_KEYS and own[key].shape != value.shape else value
            for key, value in renamed.items()
            if key in own or key not in DIST_KEYS
        }


def _own_key(key: str, starts: Sequence[int]) -> str:
    """Rename one official key; `starts` are the positions in the body of the four stages."""
    part, *rest = (
        key.replace(".m.", ".").replace("proj.1.", "project.").replace("lkp.norm", "lkp.4").split(".")
    )
    if part in ("head", "head_dist"):
        return ".".join((part if rest[0] == "bn" else part.replace("head", "classifier"), *rest[1:]))
    index, *rest = rest
    stage = int(part.removeprefix("blocks")) - 1 if part != "patch_embed" else None
    position = int(index) // 2 if stage is None else starts[stage] + int(index)
    return ".".join(("body", str(position), *(OFFICIAL.get(name, name) for name in rest)))


def _fold_head(norm: nn.Module, layer: nn.Module) -> nn.Module:
    """Put a norm into the classifier after it, if there is one; return what is left of the norm."""
    if not isinstance(norm, NORMS) or not isinstance(layer, nn.Linear):
        return norm
    fold_before(norm, layer)
    return nn.Identity()


@register_model
def lsnet_t(**kwargs: Any) -> LSNet:
    """LSNet-T."""
    return LSNet(*TINY, **kwargs)


@register_model
def lsnet_t_distill(**kwargs: Any) -> DistilledLSNet:
    """LSNet-T with a second head."""
    return DistilledLSNet(*TINY, **kwargs)


@register_model
def lsnet_s(**kwargs: Any) -> LSNet:
    """LSNet-S."""
    return LSNet(*SMALL, **kwargs)


@register_model
def lsnet_s_distill(**kwargs: Any) -> DistilledLSNet:
    """LSNet-S with a second head."""
    return DistilledLSNet(*SMALL, **kwargs)


@register_model
def lsnet_b(**kwargs: Any) -> LSNet:
    """LSNet-B."""
    return LSNet(*BASE, **kwargs)


@register_model
def lsnet_b_distill(**kwargs: Any) -> DistilledLSNet:
    """LSNet-B with a second head."""
    return DistilledLSNet(*BASE, **kwargs)
