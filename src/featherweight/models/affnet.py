"""AFFNet: mix tokens by multiplying the spectrum of the whole map with a mask computed from that spectrum.

A product of spectra is a circular convolution, so the mask acts as a depthwise kernel as large as the map,
made anew for every image: global and adaptive. It is cheap because the fast Fourier transform of N pixels
costs O(N log N) where attention costs O(N^2), because only half of a real map's spectrum is needed, and
because the mask comes from two small complex maps inside 8 groups of channels. Around the mixers stand the
inverted residuals of MobileNetV2.

Shapes:
    `affnet`: `(N, 3, 256, 256)` -> 16 x 1/2 -> 32 x 1/2 -> 64 x 1/4 -> 128 x 1/8 -> 256 x 1/16 -> 320 x 1/32
    -> 960 x 1/32 -> logits `(N, 1000)`. No weight depends on the size of the image: any side works, odd ones
    too.

Differs:
    Guessed, for the training configurations are not readable: the activation (`act`, SiLU; the paper draws
    ReLU in the mixer) and the norm of the blocks (`norm`, one group over channels and pixels; `PixelNorm` is
    the other candidate). Neither changes the parameters. A captured graph transforms by constant matrices,
    with the same outputs, see `blocks/spectrum.py`. Stochastic depth (`drop_path_rate`) is open, where the
    official code has 0. The base and large networks, never published, are left out.

Reference: Huang et al., "Adaptive Frequency Filters As Efficient Global Token Mixers", arXiv 2307.14008,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks import spectrum
from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.inverted_residual import InvertedResidual
from featherweight.blocks.layouts import rename
from featherweight.registry import register_model

GROUPS = 8
"""Groups of channels inside which a mixer computes its mask."""

STEM, HEAD = 16, 960
"""Channels of the first convolution, and the most that the last one may have."""

BLOCKS = (2, 4, 3)
"""Mixing blocks in the three stages at 1/8, 1/16 and 1/32."""


class FrequencyFilter(nn.Module):
    """The token mixer, `(N, C, H, W)` to the same shape: multiply the spectrum by a mask made from it.

    Args:
        channels: channels of the map, a multiple of 8.
        act: class of the activation between the two complex maps, on real and imaginary part alone.
        threshold: what the mask's parts are shrunk by towards 0.

    >>> FrequencyFilter(16)(torch.zeros(1, 16, 5, 7)).shape
    torch.Size([1, 16, 5, 7])
    """

    def __init__(self, channels: int, act: type[nn.Module] = nn.SiLU, threshold: float = 0.01) -> None:
        super().__init__()
        b = channels // GROUPS
        self.threshold = threshold
        self.w1 = nn.Parameter(0.02 * torch.randn(2, GROUPS, b, b))
        self.b1 = nn.Parameter(0.02 * torch.randn(2, GROUPS, b))
        self.w2 = nn.Parameter(0.02 * torch.randn(2, GROUPS, b, b))
        self.b2 = nn.Parameter(0.02 * torch.randn(2, GROUPS, b))
        self.act = act()

    def mask(self, z: Tensor) -> Tensor:
        """Compute the mask of a spectrum `(N, C, 2, H, F)`."""
        hidden = self.act(spectrum.mix_channels(z, self.w1, self.b1))
        return F.softshrink(spectrum.mix_channels(hidden, self.w2, self.b2), self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Filter `x` and add it."""
        z = spectrum.to_spectrum(x)  # (N, C, 2, H, W // 2 + 1)
        return x + spectrum.to_image(spectrum.multiply(self.mask(z), z), x)


class MapNorm(nn.GroupNorm):
    """Layer norm over channels and pixels of `(N, C, H, W)`, scaled by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)


class PixelNorm(nn.Module):
    """Layer norm over the channels of every pixel of `(N, C, H, W)`, its epsilon added to the deviation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift."""
        centred = x - x.mean(1, keepdim=True)
        deviation = centred.square().mean(1, keepdim=True).sqrt() + 1e-5
        return centred / deviation * self.weight[:, None, None] + self.bias[:, None, None]


class AFFBlock(nn.Module):
    """Mix channels, then tokens, under one shortcut; `(N, channels, H, W)` to the same shape.

    Args:
        channels: channels of the map, a multiple of 8.
        act: class of the activations.
        norm: class of the two norms.
        drop_path: probability of dropping the branch during training.
    """

    def __init__(
        self, channels: int, act: type[nn.Module], norm: type[nn.Module], drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels)
        self.channel_mixer = InvertedResidual(channels, channels, expansion=2, act=act)
        self.norm2 = norm(channels)
        self.token_mixer = FrequencyFilter(channels, act)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Run the branch and add the input."""
        return x + self.drop_path(self.token_mixer(self.norm2(self.channel_mixer(self.norm1(x)))))


class AFFStage(nn.Module):
    """A chain of blocks whose result is joined with its input; `(N, channels, H, W)` to the same shape.

    Args:
        channels: channels of the map, a multiple of 8.
        rates: probability of dropping the branch of each block.
        act: class of the activations.
        norm: class of the blocks' norms.
    """

    def __init__(
        self, channels: int, rates: list[float], act: type[nn.Module], norm: type[nn.Module]
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AFFBlock(channels, act, norm, rate) for rate in rates))
        self.norm = norm(channels)
        self.project = ConvNormAct(channels, channels, 1, act=None)
        self.join = ConvNormAct(2 * channels, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks and join."""
        y = self.project(self.norm(self.blocks(x)))
        return self.join(torch.cat((x, y), 1))


class AFFNet(Classifier):
    """The classifier of the paper.

    Args:
        channels: channels at 1/2, 1/4, 1/8, 1/16 and 1/32 before `width`.
        expansion: of the inverted residuals between the mixing stages.
        width: multiplies every channel count.
        stem_stride: stride of the first convolution, in pixels; 1 suits small images.
        act: class of the activations.
        norm: class of the norms inside the mixing stages, `MapNorm` or `PixelNorm`.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest mixing block.
        **kwargs: see `Classifier`.

    >>> AFFNet((32, 48, 64, 104, 144), expansion=2, num_classes=10).num_features
    576
    """

    def __init__(
        self,
        channels: tuple[int, int, int, int, int],
        expansion: int = 4,
        width: float = 1.0,
        stem_stride: int = 2,
        act: type[nn.Module] = nn.SiLU,
        norm: type[nn.Module] = MapNorm,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        stem, first, second, *mixed = (make_divisible(c * width) for c in (STEM, *channels))
        body: list[nn.Module] = [ConvNormAct(in_chans, stem, 3, stem_stride, act=act)]
        levels = [(stem, stem_stride)]

        def add(module: nn.Module, out: int, stride: int = 1) -> None:
            body.append(module)
            levels.append((out, levels[-1][1] * stride))

        def add_residual(out: int, stride: int) -> None:
            add(InvertedResidual(levels[-1][0], out, stride, expansion, act=act), out, stride)

        for out, stride in ((first, 1), (second, 2), (second, 1), (second, 1)):
            add_residual(out, stride)
        rates = drop_path_rates(drop_path_rate, sum(BLOCKS))
        for out, blocks in zip(mixed, BLOCKS, strict=True):
            add_residual(out, 2)
            add(AFFStage(out, [rates.pop(0) for _ in range(blocks)], act, norm), out)
        last = min(4 * mixed[-1], HEAD)
        add(ConvNormAct(mixed[-1], last, 1, act=act), last)
        kwargs = {"input_size": (3, 256, 256), **kwargs}
        super().__init__(nn.Sequential(*body), levels, last, in_chans=in_chans, **kwargs)
        self.apply(_init_weights)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the official repository to ours; no tensor changes."""
        for rules in OFFICIAL_RULES:
            state = rename(state, rules)
        return dict(state)


OFFICIAL_RULES = (
    [
        (r"conv_1\.", "body.0."),
        (r"layer_1\.0\.", "body.1."),
        *((rf"layer_2\.{i}\.", f"body.{2 + i}.") for i in range(3)),
        *((rf"layer_{i}\.0\.", f"body.{2 * i - 1}.") for i in (3, 4, 5)),
        *(
            (rf"layer_{i}\.1\.global_rep\.{blocks}\.", f"body.{2 * i}.norm.")
            for i, blocks in zip((3, 4, 5), BLOCKS, strict=True)
        ),
        *((rf"layer_{i}\.1\.", f"body.{2 * i}.") for i in (3, 4, 5)),
        (r"conv_1x1_exp\.", "body.11."),
        (r"classifier\.fc\.", "classifier."),
    ],
    [(r"(.*)\.global_rep\.", r"\1.blocks.")],
    [(r"(.*)\.filter\.", r"\1.token_mixer."), (r"(.*)\.mlp\.", r"\1.channel_mixer.")],
    [
        (r"(.*?)\.block\.exp_1x1\.block\.", r"\1.expand."),
        (r"(.*?)\.block\.conv_3x3\.block\.", r"\1.depthwise."),
        (r"(.*?)\.block\.red_1x1\.block\.", r"\1.project."),
        (r"(.*?)\.conv_proj\.block\.", r"\1.project."),
        (r"(.*?)\.fusion\.block\.", r"\1.join."),
        (r"(.*?)\.block\.", r"\1."),
    ],
)
"""Four passes: the place in the network, the blocks of a stage, their parts, the layers of a part."""


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


@register_model
def affnet_et(**kwargs: Any) -> AFFNet:
    """AFFNet-ET, extremely tiny."""
    return AFFNet((32, 48, 64, 104, 144), expansion=2, **kwargs)


@register_model
def affnet_t(**kwargs: Any) -> AFFNet:
    """AFFNet-T, tiny."""
    return AFFNet((32, 48, 96, 160, 192), **kwargs)


@register_model
def affnet(**kwargs: Any) -> AFFNet:
    """The full network."""
    return AFFNet((32, 64, 128, 256, 320), **kwargs)
