"""EfficientFormer: pooling on maps first, one flatten, then attention on tokens.

Measured on a phone, attention is not what makes vision transformers slow: reshapes between maps and tokens,
layer norms that cannot fold, and large patch kernels are. So the layout of the data changes once, near the
end: up to there every block mixes its neighbours with a 3x3 mean (no weights) and its channels with two 1x1
convolutions whose batch norms fold away; from there on tokens stay tokens. The published widths and depths
come from a supernet slimmed by measured latency (`train/slimming.py`).

Shapes:
    `(N, 3, 224, 224)` -> L1: 48 x 1/4 -> 96 x 1/8 -> 224 x 1/16 -> 448 x 1/32 -> tokens `(N, 49, 448)` ->
    norm, given back as the map `(N, 448, 7, 7)` -> mean -> two classifiers -> logits `(N, 1000)`, their mean.

Differs:
    In training the mean of both classifiers comes back too, unless `distilled_training` is set: then the pair
    (label, teacher), as the official code gives. For a grid other than 7x7 the table of attention biases by
    distance is interpolated (bicubic, distance 0 stays 0); the official dense backbone stretches the whole
    matrix of token pairs instead, which blends rows of the grid. Feature maps are raw, before the last norm.
    `width` rounds to multiples of 8 and scales the number of attention heads (8) too.

Reference: Li et al., "EfficientFormer: Vision Transformers at MobileNet Speed", arXiv 2206.01191, section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, scale_output
from featherweight.blocks.layouts import rename
from featherweight.registry import register_model

VARIANTS = {
    "l1": ((48, 96, 224, 448), (3, 2, 6, 4), 1),
    "l3": ((64, 128, 320, 512), (4, 4, 12, 6), 4),
    "l7": ((96, 192, 384, 768), (6, 6, 18, 8), 8),
}
"""Widths and depths of the four stages, and how many blocks at the very end work on tokens."""

HEADS, KEY, VALUE, GRID = 8, 32, 128, 7
"""Attention heads, width of keys and of values in each, and the grid that the bias table was made for."""


class LayerScale(nn.Module):
    """Multiply each channel of maps `(N, C, H, W)`, or else of tokens `(N, L, C)`, by a learned factor."""

    def __init__(self, channels: int, init: float, maps: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), init))
        self.maps = maps

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `x`."""
        return x * (self.gamma[:, None, None] if self.maps else self.gamma)


class PoolBlock(nn.Module):
    """Add the 3x3 mean minus the input, then a convolutional MLP: `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input; the MLP is four times as wide.
        drop_path: probability of dropping a branch during training.
        scale: first value of both branches' factors.
    """

    def __init__(self, channels: int, drop_path: float = 0.0, scale: float = 1e-5) -> None:
        super().__init__()
        # Padding must not count in the mean: at a border it would pull the result towards zero.
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.scale1 = LayerScale(channels, scale)
        self.expand = ConvNormAct(channels, 4 * channels, 1, act=nn.GELU, bias=True)
        self.project = ConvNormAct(4 * channels, channels, 1, act=None, bias=True)
        self.scale2: nn.Module = LayerScale(channels, scale)
        self.drop_path = DropPath(drop_path)
        _small_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours, then channels."""
        x = x + self.drop_path(self.scale1(self.pool(x) - x))
        return x + self.drop_path(self.scale2(self.project(self.expand(x))))  # (N, C, H, W)

    def fuse(self) -> None:
        """Fold both batch norms and the MLP's factor into the convolutions; the mean's factor stays."""
        self.expand.fuse()
        self.project.fuse()
        self.scale2 = _absorb(self.project.conv, self.scale2)


class Attention(nn.Module):
    """Self-attention with a bias learned for each distance, `(N, L, channels)` to the same shape.

    Each of the `heads` has 32 channels for keys and 128 for values, whatever `channels` is.
    """

    def __init__(self, channels: int, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, heads * (2 * KEY + VALUE))
        self.project = nn.Linear(heads * VALUE, channels)
        self.biases = nn.Parameter(torch.zeros(heads, GRID * GRID))

    def forward(self, x: Tensor, grid: tuple[int, int], distances: Tensor) -> Tensor:
        """Let every token of the `grid` look at every other; `distances` comes from `grid_distances`."""
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).split((KEY, KEY, VALUE), -1)
        logits = (q * KEY**-0.5) @ k.transpose(-2, -1) + self.grid_biases(grid)[:, distances]
        return self.project((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))  # (N, L, C)

    def grid_biases(self, grid: tuple[int, int]) -> Tensor:
        """Give the bias of each head for each distance on a grid, `(heads, height * width)`."""
        if grid == (GRID, GRID):
            return self.biases
        table = self.biases.reshape(1, -1, GRID, GRID)
        return F.interpolate(table, grid, mode="bicubic", align_corners=True)[0].flatten(1)


class TokenBlock(nn.Module):
    """Attention, then an MLP, each behind a layer norm: a block on tokens, `(N, L, C)` to the same.

    Args:
        channels: channels of a token; the MLP is four times as wide.
        heads: attention heads.
        drop_path: probability of dropping a branch during training.
        scale: first value of both branches' factors.
    """

    def __init__(self, channels: int, heads: int, drop_path: float = 0.0, scale: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels, heads)
        self.scale1: nn.Module = LayerScale(channels, scale, maps=False)
        self.norm2 = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.scale2: nn.Module = LayerScale(channels, scale, maps=False)
        self.drop_path = DropPath(drop_path)
        _small_weights(self)

    def forward(self, x: Tensor, grid: tuple[int, int], distances: Tensor) -> Tensor:
        """Mix tokens, then channels."""
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x), grid, distances)))
        return x + self.drop_path(self.scale2(self.project(F.gelu(self.expand(self.norm2(x))))))

    def fuse(self) -> None:
        """Fold both factors into the linear layers before them."""
        self.scale1 = _absorb(self.attention.project, self.scale1)
        self.scale2 = _absorb(self.project, self.scale2)


class TokenStage(nn.Module):
    """The only change of layout: a map to tokens, all the blocks on tokens, and back to a map."""

    def __init__(self, blocks: Sequence[TokenBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        grid = int(x.shape[2]), int(x.shape[3])
        distances = grid_distances(grid, x.device)
        tokens = x.flatten(2).transpose(1, 2)  # (N, H * W, C)
        for block in self.blocks:
            tokens = block(tokens, grid, distances)
        # The way back is a view: tokens in memory are a map in channels_last order.
        return tokens.transpose(1, 2).unflatten(2, grid)


class MapNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of a map, `(N, C, H, W)` to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TwoHeads(nn.Module):
    """A classifier for the labels and one for a teacher's answers; their mean is the answer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.label = nn.Linear(channels, num_classes)
        self.teacher = nn.Linear(channels, num_classes)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Give the mean of both logits; both of them in training with `apart`."""
        label, teacher = self.label(x), self.teacher(x)
        return (label, teacher) if self.apart and self.training else (label + teacher) / 2

    def merge(self) -> nn.Linear:
        """Return the one linear layer that gives the mean."""
        merged = copy.deepcopy(self.label)
        with torch.no_grad():
            for own, other in zip(merged.parameters(), self.teacher.parameters(), strict=True):
                own.lerp_(other, 0.5)
        return merged


class EfficientFormer(Classifier):
    """The network, for any number of stages.

    Args:
        widths: channels of each stage, each at half the resolution of the one before.
        depths: blocks of each stage.
        tokens: how many blocks at the end of the last stage work on tokens.
        width: multiplies every channel count and the attention heads.
        stem_stride: stride of the first of the stem's two convolutions, in pixels; 1 suits small images.
        heads: attention heads of every block on tokens.
        distillation: two classifiers, one of them for a teacher's answers.
        scale: first value of the factors on the residual branches; 1 suits a short training.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> EfficientFormer((16, 32), (1, 2), 1, num_classes=10).feature_info[-1]["reduction"]
    8
    """

    distilled_training = False

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        tokens: int,
        width: float = 1.0,
        stem_stride: int = 2,
        heads: int = HEADS,
        distillation: bool = True,
        scale: float = 1e-5,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        channels = [c if width == 1 else make_divisible(c * width) for c in widths]
        heads, reduction = max(1, round(heads * width)), 2 * stem_stride
        self.depths, self.tokens, self.distillation = tuple(depths), tokens, distillation
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        body: list[nn.Module] = [
            ConvNormAct(in_chans, channels[0] // 2, 3, stem_stride, bias=True),
            ConvNormAct(channels[0] // 2, channels[0], 3, 2, bias=True),
        ]
        levels = [(channels[0] // 2, stem_stride), (channels[0], reduction)]
        for stage, (c, depth) in enumerate(zip(channels, depths, strict=True)):
            if stage > 0:
                body.append(ConvNormAct(channels[stage - 1], c, 3, 2, act=None, bias=True))
                reduction *= 2
            late = tokens if stage == len(depths) - 1 else 0
            body += [PoolBlock(c, next(rates), scale) for _ in range(depth - late)]
            if late:
                body.append(TokenStage([TokenBlock(c, heads, next(rates), scale) for _ in range(late)]))
            levels += [(c, reduction)] * (len(body) - len(levels))
        body.append(MapNorm(channels[-1]))
        super().__init__(nn.Sequential(*body), levels, channels[-1], in_chans=in_chans, **kwargs)
        self.default_cfg["crop_pct"] = 0.9

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both classifiers by new ones with `num_classes` outputs; 0 removes them."""
        super().reset_classifier(num_classes, global_pool)
        two = self.distillation and num_classes > 0
        self.default_cfg["classifier"] = "classifier.label" if two else "classifier"
        if two:
            like = self.classifier.weight
            self.classifier = TwoHeads(self.head_hidden_size, num_classes).to(like.device, like.dtype)
            self.classifier.apart = self.distilled_training
        _small_weights(self.classifier)

    def get_classifier(self) -> nn.Module:
        """Return the last layer; the one for the labels where there are two."""
        return self.classifier.label if isinstance(self.classifier, TwoHeads) else self.classifier

    def set_distilled_training(self, enable: bool = True) -> None:
        """Give both logits apart in training: the first for the labels, the second for the teacher."""
        self.distilled_training = enable
        if isinstance(self.classifier, TwoHeads):
            self.classifier.apart = enable

    def fuse(self) -> EfficientFormer:
        """Fold batch norms and factors into their neighbours and merge the classifiers, in place.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in list(self.body.modules()):
            if isinstance(module, PoolBlock | TokenBlock | ConvNormAct):
                module.fuse()
        if isinstance(self.classifier, TwoHeads):
            self.classifier = self.classifier.merge()
            self.distillation, self.default_cfg["classifier"] = False, "classifier"
        return self

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the official repository or of timm; one classifier takes the mean of two."""
        state = {key: value for key, value in state.items() if not key.endswith("attention_bias_idxs")}
        ours = rename(state, _official_rules(self))
        if not isinstance(self.classifier, TwoHeads):
            for leaf in ("weight", "bias"):
                pair = [ours.pop(f"classifier.{head}.{leaf}", None) for head in ("label", "teacher")]
                if found := [value for value in pair if value is not None]:
                    ours[f"classifier.{leaf}"] = sum(found) / len(found)
        return ours


def grid_distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Give the row-major index of the distance between each two tokens of a grid, `(L, L)`.

    >>> grid_distances((1, 3), torch.device("cpu")).tolist()
    [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    """
    y, x = (torch.arange(side, device=device) for side in grid)
    dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    return (dy[:, None, :, None] * grid[1] + dx[None, :, None, :]).flatten(2).flatten(0, 1)


def _small_weights(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def _absorb(layer: nn.Module, scale: nn.Module) -> nn.Module:
    """Put a factor, if there still is one, into the layer before it; return what is left of it."""
    if isinstance(scale, LayerScale):
        scale_output(layer, scale.gamma)
    return nn.Identity()


def _official_rules(model: EfficientFormer) -> list[tuple[str, str]]:
    rules = [
        (r"(patch_embed\.0|stem\.conv1)\.", "body.0.conv."),
        (r"(patch_embed\.1|stem\.norm1)\.", "body.0.norm."),
        (r"(patch_embed\.3|stem\.conv2)\.", "body.1.conv."),
        (r"(patch_embed\.4|stem\.norm2)\.", "body.1.norm."),
        (r"norm\.", f"body.{len(model.body) - 1}."),
        (r"head\.", "classifier.label."),
        (r"(dist_head|head_dist)\.", "classifier.teacher."),
    ]
    position = 2
    for stage, depth in enumerate(model.depths):
        if stage > 0:
            old, new = rf"(network\.{2 * stage - 1}|stages\.{stage}\.downsample)\.", f"body.{position}."
            rules += [(rf"{old}(proj|conv)\.", f"{new}conv."), (rf"{old}norm\.", f"{new}norm.")]
            position += 1
        pools = depth - model.tokens if stage == len(model.depths) - 1 else depth
        for block in range(depth):
            # The flatten counts as a block there, before the first one on tokens.
            index = block + (block >= pools)
            old = rf"(?:network\.{2 * stage}|stages\.{stage}\.blocks)\.{index}\."
            new = f"body.{position}.blocks.{block - pools}." if block >= pools else f"body.{position}."
            rules += _block_rules(old, new, ".conv" if block < pools else "")
            position += block < pools
    return rules


def _block_rules(old: str, new: str, conv: str) -> list[tuple[str, str]]:
    pairs = [
        (r"(?:layer_scale_|ls)([12])(?:\.gamma)?$", r"scale\1.gamma"),
        (r"mlp\.fc1\.", f"expand{conv}."),
        (r"mlp\.fc2\.", f"project{conv}."),
        (r"mlp\.norm1\.", "expand.norm."),
        (r"mlp\.norm2\.", "project.norm."),
        (r"norm([12])\.", r"norm\1."),
        (r"token_mixer\.qkv\.", "attention.qkv."),
        (r"token_mixer\.proj\.", "attention.project."),
        (r"token_mixer\.attention_biases$", "attention.biases"),
    ]
    return [(old + name, new + part) for name, part in pairs]


@register_model
def efficientformer_l1(width: float = 1.0, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L1: one block on tokens."""
    return EfficientFormer(*VARIANTS["l1"], width, **kwargs)


@register_model
def efficientformer_l3(width: float = 1.0, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L3: four blocks on tokens."""
    return EfficientFormer(*VARIANTS["l3"], width, **kwargs)


@register_model
def efficientformer_l7(width: float = 1.0, **kwargs: Any) -> EfficientFormer:
    """EfficientFormer-L7: the whole last stage on tokens."""
    return EfficientFormer(*VARIANTS["l7"], width, **kwargs)
