"""UniRepLKNet: few very large depthwise kernels, each trained together with dilated small ones.

A 13x13 depthwise kernel sees far at the cost of one layer, where a stack of 3x3 kernels needs depth. Trained
alone it learns small patterns badly, so parallel small kernels with growing dilation help it during training.
A dilated kernel is a large kernel with holes: afterwards all branches add up to one 13x13 convolution. Depth
and channel mixing come from what is cheap: squeeze-excite and two pointwise layers.

Shapes:
    `(N, 3, 224, 224)` -> C x 1/4 -> 2C x 1/8 -> 4C x 1/16 -> 8C x 1/32 -> pooled 8C -> logits `(N, 1000)`,
    with C from 40 (A) to 256 (XL). Any height and width, any number of input channels.

Differs:
    The two linear layers of a block are 1x1 convolutions here, so that no transposition enters an exported
    file. `fuse()` also works on a network at any precision, in double arithmetic. `features_only` gives the
    plain maps: the channel norms that detectors put on them belong to the detector. The extra `width` rounds
    C to a multiple of 8. `stem_stride=1` halves every reduction. The released class has no dropout before
    the classifier; `drop_rate` adds it.

Reference: Zhang, Ding et al., "Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal
Representations", arXiv 2410.08049, sections 3 and 4 (first "UniRepLKNet", arXiv 2311.15599).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import make_divisible
from featherweight.blocks.dilated_reparam import DilatedReparamBlock, depthwise
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, exact, fold_after, folded, put_weights
from featherweight.blocks.layouts import clean_state, rename
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.registry import register_model

KERNELS = {
    "afp": ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    "n": ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    "t": ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3),
    "sblx": ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (13,) * 3),
}
"""Kernel of each block, by stage: the deeper networks add small kernels, not more large ones."""


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each pixel."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return x.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Scale each channel by its strength relative to all channels, `(N, C, H, W)` to the same shape.

    Reference: "ConvNeXt V2", arXiv 2301.00808, section 3.2.

    Args:
        channels: channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift: nn.Parameter | None = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Compare the channels' norms over the whole map."""
        strength = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
        relative = strength / (strength.mean(1, keepdim=True) + 1e-6)
        x = x * (1 + self.scale[:, None, None] * relative)
        return x if self.shift is None else x + self.shift[:, None, None]


class UniRepLKBlock(nn.Module):
    """Depthwise convolution, squeeze-excite, widen, compare channels, project; plus the input.

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the input.
        kernel_size: side of the depthwise kernel, in pixels.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(self, channels: int, kernel_size: int, drop_path: float = 0.0) -> None:
        super().__init__()
        layer = depthwise if kernel_size in (3, 5) else DilatedReparamBlock
        self.depthwise: nn.Module = layer(channels, kernel_size)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.squeeze = SqueezeExcite(channels, channels // 4, gate=nn.Sigmoid)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.response = GlobalResponseNorm(4 * channels)
        self.project = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.project_norm: nn.Module = nn.BatchNorm2d(channels)
        self.gain: nn.Parameter | None = nn.Parameter(torch.full((channels,), 1e-6))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the input."""
        y = self.squeeze(self.norm(self.depthwise(x)))
        y = self.response(self.act(self.expand(y)))  # (N, 4C, H, W)
        y = self.project_norm(self.project(y))
        if self.gain is not None:
            y = self.gain[:, None, None] * y
        return x + self.drop_path(y)

    @torch.no_grad()
    def merge(self) -> None:
        """Turn the block into its deploy form, in place; once."""
        if self.gain is None:
            return
        if isinstance(self.depthwise, DilatedReparamBlock):
            self.depthwise = self.depthwise.fuse()
        fold_after(self.depthwise, self.norm)
        # The norm over channels is not linear, so only its shift can move on, through the projection.
        moved = exact(self.project.weight).flatten(1) @ exact(self.response.shift)
        bias = 0.0 if self.project.bias is None else exact(self.project.bias)
        put_weights(self.project, self.project.weight, moved + bias)
        weight, bias = folded(self.project, self.project_norm)
        gain = exact(self.gain)
        put_weights(self.project, gain[:, None, None, None] * weight, gain * bias)
        self.norm, self.project_norm = nn.Identity(), nn.Identity()
        self.gain, self.response.shift = None, None


class Stem(nn.Module):
    """Two strided 3x3 convolutions with channel norms: `(N, in_chans, H, W)` to `(N, C, H / 4, W / 4)`.

    Args:
        in_chans: channels of the image.
        channels: channels of the output.
        stride: of the first convolution, in pixels.
    """

    def __init__(self, in_chans: int, channels: int, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, channels // 2, 3, stride, 1)
        self.norm = ChannelNorm(channels // 2)
        self.act = nn.GELU()
        self.second = Downsample(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shrink the image to the first resolution."""
        return self.second(self.act(self.norm(self.conv(x))))


class Downsample(nn.Module):
    """Halve the resolution: `(N, C, H, W)` to `(N, out_channels, ceil(H / 2), ceil(W / 2))`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.norm = ChannelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with stride 2, normalise."""
        return self.norm(self.conv(x))


class UniRepLKNet(Classifier):
    """UniRepLKNet from the channels of its first stage and the kernels of its blocks.

    Args:
        channels: channels of the first stage; each later stage doubles them.
        kernels: side of each block's depthwise kernel, stage by stage: 3 or 5, or a key of `DILATED`.
        width: multiplies every channel count.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        in_chans: channels of the image, spectrogram or other map.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: a kernel is of an unknown size.

    >>> UniRepLKNet(16, ((3,), (13,), (7, 3), (13,)), num_classes=10).num_features
    128
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[Sequence[int]],
        width: float = 1.0,
        stem_stride: int = 2,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        channels, reduction = make_divisible(channels * width, 8), 2 * stem_stride
        rates = iter(drop_path_rates(drop_path_rate, sum(map(len, kernels))))
        body: list[nn.Module] = []
        levels: list[tuple[int, int]] = []
        for stage, sides in enumerate(kernels):
            if stage:
                body.append(Downsample(channels, 2 * channels))
                channels, reduction = 2 * channels, 2 * reduction
            else:
                body.append(Stem(in_chans, channels, stem_stride))
            body.extend(UniRepLKBlock(channels, side, next(rates)) for side in sides)
            levels.extend([(channels, reduction)] * (1 + len(sides)))
        super().__init__(
            nn.Sequential(*body),
            levels,
            channels,
            head=nn.Sequential(ChannelNorm(channels)),
            in_chans=in_chans,
            **kwargs,
        )
        self.apply(_init_weights)

    def fuse(self) -> UniRepLKNet:
        """Merge branches, batch norms, gains and shifts into the convolutions, in place.

        Raises:
            UsageError: the network is in training mode, whose batch statistics cannot be merged.
        """
        check_eval(self)
        self._merge()
        return self

    def load_official(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load weights as `Classifier` does; those of a deploy form turn this network into it first."""
        if any(re.search(r"\.(project|pwconv2\.0)\.bias$", key) for key in clean_state(state)):
            self._merge()
        super().load_official(state, adapt=adapt)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys, of the training form or the deploy form, to ours."""
        own = self.state_dict()
        state = rename(state, _official_rules(self))
        # Linear layers are 1x1 convolutions here, and the norm's vectors have no empty dimensions.
        turned = re.compile(r".*\.(expand|project|response)\.(weight|scale|shift)$")
        return {
            key: value.reshape(own[key].shape) if turned.match(key) and key in own else value
            for key, value in state.items()
        }

    def _merge(self) -> None:
        for module in self.body:
            if isinstance(module, UniRepLKBlock):
                module.merge()


def _official_rules(model: UniRepLKNet) -> list[tuple[str, str]]:
    rules = [(r"norm\.", "head.0."), (r"head\.", "classifier.")]
    stage, block = -1, 0
    for index, module in enumerate(model.body):
        new = f"body.{index}."
        if not isinstance(module, UniRepLKBlock):
            stage, block = stage + 1, 0
            names = ("conv", "norm", "", "second.conv", "second.norm")
            rules += [(rf"downsample_layers\.{stage}\.{i}\.", f"{new}{n}.") for i, n in enumerate(names)]
        else:
            old = rf"stages\.{stage}\.{block}\."
            rules += [(old + pattern, new + name) for pattern, name in _block_rules(module)]
            block += 1
    return rules


def _block_rules(block: UniRepLKBlock) -> list[tuple[str, str]]:
    rules = [
        (r"norm\.", "norm."),
        (r"se\.down\.", "squeeze.reduce."),
        (r"se\.up\.", "squeeze.expand."),
        (r"pwconv1\.1\.", "expand."),
        (r"act\.1\.gamma", "response.scale"),
        (r"act\.1\.beta", "response.shift"),
        (r"pwconv2\.0\.", "project."),
        (r"pwconv2\.2\.", "project_norm."),
        (r"gamma", "gain"),
    ]
    if isinstance(block.depthwise, DilatedReparamBlock):
        names = [("lk_origin", "origin_bn")]
        for conv, _ in block.depthwise.branches[1:]:
            pair = f"k{conv.kernel_size[0]}_{conv.dilation[0]}"
            names.append((f"dil_conv_{pair}", f"dil_bn_{pair}"))
        for index, pair in enumerate(names):
            rules += [(rf"dwconv\.{n}\.", f"depthwise.branches.{index}.{i}.") for i, n in enumerate(pair)]
    return [*rules, (r"dwconv\.(lk_origin\.)?", "depthwise.")]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register_model
def unireplknet_a(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A, atto: 40 channels first, 12 blocks."""
    return UniRepLKNet(40, **{"kernels": KERNELS["afp"], **kwargs})


@register_model
def unireplknet_f(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F, femto: 48 channels first, 12 blocks."""
    return UniRepLKNet(48, **{"kernels": KERNELS["afp"], **kwargs})


@register_model
def unireplknet_p(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P, pico: 64 channels first, 12 blocks."""
    return UniRepLKNet(64, **{"kernels": KERNELS["afp"], **kwargs})


@register_model
def unireplknet_n(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N, nano: 80 channels first, 14 blocks."""
    return UniRepLKNet(80, **{"kernels": KERNELS["n"], **kwargs})


@register_model
def unireplknet_t(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T, tiny: 80 channels first, 27 blocks."""
    return UniRepLKNet(80, **{"kernels": KERNELS["t"], **kwargs})


@register_model
def unireplknet_s(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S, small: 96 channels first, 36 blocks."""
    return UniRepLKNet(96, **{"kernels": KERNELS["sblx"], **kwargs})


@register_model
def unireplknet_s_384(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S at 384 pixels, pre-trained on ImageNet-22k."""
    return unireplknet_s(**{"input_size": (3, 384, 384), **kwargs})


@register_model
def unireplknet_b(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B, base: 128 channels first, 36 blocks, 384 pixels."""
    return UniRepLKNet(128, **{"kernels": KERNELS["sblx"], "input_size": (3, 384, 384), **kwargs})


@register_model
def unireplknet_l(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L, large: 192 channels first, 36 blocks, 384 pixels."""
    return UniRepLKNet(192, **{"kernels": KERNELS["sblx"], "input_size": (3, 384, 384), **kwargs})


@register_model
def unireplknet_xl(**kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL, extra large: 256 channels first, 36 blocks, 384 pixels."""
    return UniRepLKNet(256, **{"kernels": KERNELS["sblx"], "input_size": (3, 384, 384), **kwargs})
