"""MobileMamba: a scan and wavelets for what is far, a depthwise filter for what is near.

The network starts at stride 16 and has only three stages, so that every map is small and the scan, whose cost
is linear in the pixels, sees the whole image for little. Each block splits its channels in three: the first
part sees far (a selective scan over the map in both directions, plus a convolution of its Haar wavelet bands,
which doubles the reach of the kernel), the second sees near (a depthwise convolution), the third is passed
through. Cheap depthwise convolutions and feed-forward pairs surround that mixer.

Shapes:
    `(N, 3, 192, 192)` -> four strided convolutions -> c1 at 1/16, stage 1 -> c2 at 1/32, stage 2 -> c3 at
    1/64, stage 3 -> pooled -> logits `(N, 1000)`. Every size works; odd maps are padded for the wavelets and
    cropped back. B1, B2 and B4 are one network at 256, 384 and 512 pixels.

Differs:
    The fixed Haar filters are sums and differences, no parameters; the official ones are dropped on loading.
    The plain PyTorch merge of the official code adds the forward scan of every sample to each other one; here
    each sample stands alone, as in its GPU kernel. The published drop path of B1 to B4 is not the default:
    ask for `drop_path_rate=0.03`. The official code knows a second head for distillation that no published
    recipe uses: its weights are averaged into the one classifier. `fuse()` goes further than the official
    folding: it also merges the shortcuts of depthwise layers and the scales of both far branches. The extra
    `width` rounds to multiples of 8, at least 16.

Reference: He et al., "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network", arXiv 2411.15941,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath, drop_path_rates
from featherweight.blocks.fold import check_eval, fold_before
from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.models.mobilemamba import layout
from featherweight.models.mobilemamba.far import FarBranch, WaveletConv, linear_unit
from featherweight.registry import register_model

FAR, NEAR, KERNELS = (0.8, 0.7, 0.6), (0.2, 0.2, 0.3), (7, 5, 3)
"""Share of far and near channels, and side of the kernels in pixels, by stage."""


def split_channels(channels: int, far: float, near: float) -> tuple[int, int, int]:
    """Return how many channels see far, see near, and pass through.

    >>> split_channels(144, 0.8, 0.2), split_channels(448, 0.6, 0.3)
    ((112, 28, 4), (272, 134, 42))
    """
    wide = (int(far * channels) + 8) // 16 * 16
    narrow = min(int(near * channels), channels - wide)
    return wide, narrow, channels - wide - narrow


class Residual(nn.Module):
    """Add a unit's output to its input; `(N, C, H, W)` to the same shape."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Run the unit; once merged, its kernel holds the shortcut."""
        return self.unit(x) if self.merged else x + self.unit(x)

    def merge(self) -> None:
        """Put the shortcut into the centre of a depthwise kernel; other units keep it."""
        conv = getattr(self.unit, "conv", None)
        if not self.merged and conv is not None and conv.groups == conv.in_channels:
            conv.weight[:, 0, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] += 1
            self.merged = True


class Mixer(nn.Module):
    """Multi-receptive-field interaction: far, near and untouched channels, then one 1x1 convolution.

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        stage: 0, 1 or 2; sets the shares and the kernel.
    """

    def __init__(self, channels: int, stage: int) -> None:
        super().__init__()
        far, near, rest = split_channels(channels, FAR[stage], NEAR[stage])
        self.sizes = [size for size in (far, near, rest) if size]  # exported files dislike empty tensors
        self.global_op = FarBranch(far, KERNELS[stage])
        self.local_op: nn.Module | None = None
        if near:
            self.local_op = nn.Sequential(
                ConvNormAct(near, near, KERNELS[stage], groups=near),
                ConvNormAct(near, near, 1, groups=near, act=None),
            )
        self.proj = linear_unit(channels, channels, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Split, run each part, join."""
        parts = list(x.split(self.sizes, 1))
        parts[0] = self.global_op(parts[0])
        if self.local_op is not None:
            parts[1] = self.local_op(parts[1])
        return self.proj(F.relu(torch.cat(parts, 1)))


def _ffn(channels: int) -> Residual:
    return Residual(
        nn.Sequential(ConvNormAct(channels, 2 * channels, 1), linear_unit(2 * channels, channels, zero=True))
    )


class MobileMambaBlock(nn.Module):
    """Depthwise and feed-forward pair, mixer, another pair, and a second shortcut around them all.

    `(N, C, H, W)` to the same shape.

    Args:
        channels: channels of the map.
        stage: 0, 1 or 2.
        drop_path: probability of dropping everything but the outer shortcut during training.
    """

    def __init__(self, channels: int, stage: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dw0 = Residual(linear_unit(channels, channels, 3, zero=True))
        self.ffn0 = _ffn(channels)
        self.mixer = Residual(Mixer(channels, stage))
        self.dw1 = Residual(linear_unit(channels, channels, 3, zero=True))
        self.ffn1 = _ffn(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Run the five residual layers and add the input once more."""
        return x + self.drop_path(self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x))))))


class PatchMerging(nn.Module):
    """Halve the resolution: `(N, C, H, W)` to `(N, out_channels, ceil(H / 2), ceil(W / 2))`."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv1 = ConvNormAct(channels, hidden, 1)
        self.conv2 = ConvNormAct(hidden, hidden, 3, 2, groups=hidden)
        self.se = SqueezeExcite(hidden, channels, gate=nn.Sigmoid)
        self.conv3 = linear_unit(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Widen, filter at stride 2, squeeze-excite, project."""
        return self.conv3(self.se(self.conv2(self.conv1(x))))


def _pair(channels: int) -> nn.Sequential:
    return nn.Sequential(Residual(linear_unit(channels, channels, 3)), _ffn(channels))


class MobileMamba(Classifier):
    """MobileMamba.

    Args:
        channels: of the three stages.
        depths: blocks of the three stages.
        width: multiplies the channels.
        stem_stride: stride of the first convolution, in pixels.
        stem_strides: strides of the other three.
        in_chans: channels of the image.
        drop_path_rate: stochastic depth of the deepest block.
        **kwargs: see `Classifier`.

    >>> MobileMamba((144, 272, 368), (1, 2, 2), width=0.25).num_features
    96
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        width: float = 1.0,
        stem_stride: int = 2,
        stem_strides: tuple[int, int, int] = (2, 2, 2),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        channels = [c if width == 1.0 else max(16, make_divisible(c * width)) for c in channels]
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        body: list[nn.Module] = []
        levels: list[tuple[int, int]] = []
        before, reduction = in_chans, 1
        for part, stride in zip((8, 4, 2, 1), (stem_stride, *stem_strides), strict=True):
            out = channels[0] // part
            body.append(ConvNormAct(before, out, 3, stride, act=nn.ReLU if part > 1 else None))
            before, reduction = out, reduction * stride
            levels.append((out, reduction))
        for stage, (out, depth) in enumerate(zip(channels, depths, strict=True)):
            if stage:
                body.append(nn.Sequential(_pair(before), PatchMerging(before, out), _pair(out)))
                before, reduction = out, reduction * 2
                levels.append((out, reduction))
            body += [MobileMambaBlock(out, stage, next(rates)) for _ in range(depth)]
            levels += [(out, reduction)] * depth
        head = nn.BatchNorm2d(before)
        super().__init__(nn.Sequential(*body), levels, before, head=head, in_chans=in_chans, **kwargs)
        self.depths = tuple(depths)
        if isinstance(self.classifier, nn.Linear):
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    @torch.no_grad()
    def fuse(self) -> MobileMamba:
        """Fold norms, scales and depthwise shortcuts into the convolutions, in place; return self.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for module in self.modules():
            if isinstance(module, ConvNormAct):
                module.fuse()
        for module in self.modules():
            if isinstance(module, Residual | WaveletConv | FarBranch):
                module.merge()
        if isinstance(self.head, nn.BatchNorm2d) and isinstance(self.classifier, nn.Linear):
            fold_before(self.head, self.classifier)
            self.head = nn.Identity()
        return self

    def load_official(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load weights as `Classifier.load_official` does, and unwrap official training checkpoints."""
        for wrapper in ("net_E", "net"):  # averaged weights first
            if isinstance(state.get(wrapper), Mapping):
                state = state[wrapper]
        super().load_official(state, adapt=adapt)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys, drop the fixed Haar filters, average a second head into the first."""
        return layout.from_official(state, self.depths)


T2, T4, S6, B = (144, 272, 368), (176, 368, 448), (192, 384, 448), (200, 376, 448)


@register_model
def mobilemamba_t2(**kwargs: Any) -> MobileMamba:
    """The smallest network, at 192 pixels."""
    return MobileMamba(T2, (1, 2, 2), **{"input_size": (3, 192, 192), **kwargs})


@register_model
def mobilemamba_t4(**kwargs: Any) -> MobileMamba:
    """The wider network at 192 pixels."""
    return MobileMamba(T4, (1, 2, 2), **{"input_size": (3, 192, 192), **kwargs})


@register_model
def mobilemamba_s6(**kwargs: Any) -> MobileMamba:
    """The small network, at 224 pixels."""
    return MobileMamba(S6, (1, 2, 2), **kwargs)


@register_model
def mobilemamba_b1(**kwargs: Any) -> MobileMamba:
    """The base network, at 256 pixels."""
    return MobileMamba(B, (2, 3, 2), **{"input_size": (3, 256, 256), **kwargs})


@register_model
def mobilemamba_b2(**kwargs: Any) -> MobileMamba:
    """The base network, at 384 pixels."""
    return MobileMamba(B, (2, 3, 2), **{"input_size": (3, 384, 384), **kwargs})


@register_model
def mobilemamba_b4(**kwargs: Any) -> MobileMamba:
    """The base network, at 512 pixels."""
    return MobileMamba(B, (2, 3, 2), **{"input_size": (3, 512, 512), **kwargs})
