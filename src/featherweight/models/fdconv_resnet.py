"""FDConv-ResNet: residual networks whose blocks convolve with kernels assembled in the Fourier domain.

Every 1x1 and 3x3 convolution of the blocks is a frequency dynamic convolution with 64 groups of frequencies
(see `ops/fdconv`); the 7x7 stem and the shortcuts stay plain. That adds 3.6 M parameters to a ResNet-50,
where mixing four whole kernels would add 65 M or more.

Shapes:
    `(N, 3, 224, 224)` -> 64 x 1/2 -> 64 x 1/4 (pooled) -> c x 1/4 -> 2c x 1/8 -> 4c x 1/16 -> 8c x 1/32 ->
    pooled -> logits `(N, 1000)`, with c = 64 for basic blocks and 256 for bottlenecks. Any size will do.

Differs:
    A classifier, where the released backbone feeds a detector. Weights of a plain ResNet (torchvision, timm)
    load as they are, and the answers stay the same until the network is trained on. `width`, `stem_stride`
    and stochastic depth are additions. See `ops/fdconv` for the operator's own differences.

Reference: Chen et al., "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv
2503.18783, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featherweight.blocks.resnet import ResNet
from featherweight.ops.fdconv import FDConv2d
from featherweight.ops.replace import replace_convs
from featherweight.registry import register_model

FREQUENCY_GROUPS = 64


class FDConvResNet(ResNet):
    """A ResNet with frequency dynamic convolutions in its blocks.

    Args:
        *args: see `ResNet`.
        kernel_num: groups of frequencies of each kernel.
        **kwargs: see `ResNet`.

    >>> sum(isinstance(m, FDConv2d) for m in FDConvResNet((2, 2, 2, 2)).modules())
    16
    """

    def __init__(self, *args: Any, kernel_num: int = FREQUENCY_GROUPS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        replace_convs(self.body, FDConv2d, kernel_num=kernel_num)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the released backbone or of a plain ResNet; plain kernels are converted."""
        state = super().from_official(state)
        for name, module in self.named_modules():
            if isinstance(module, FDConv2d):
                module.adapt_state(state, f"{name}.")
        own = self.state_dict()
        if not any(key.startswith("classifier.") for key in state):  # the released file is a backbone
            state |= {key: value for key, value in own.items() if key.startswith("classifier.")}
        return state


@register_model
def fdconv_resnet18(**kwargs: Any) -> FDConvResNet:
    """FDConv in the basic blocks of a ResNet-18."""
    return FDConvResNet((2, 2, 2, 2), **kwargs)


@register_model
def fdconv_resnet34(**kwargs: Any) -> FDConvResNet:
    """FDConv in the basic blocks of a ResNet-34."""
    return FDConvResNet((3, 4, 6, 3), **kwargs)


@register_model
def fdconv_resnet50(**kwargs: Any) -> FDConvResNet:
    """FDConv in the bottlenecks of a ResNet-50: the backbone of the published detectors."""
    return FDConvResNet((3, 4, 6, 3), 4, **kwargs)


@register_model
def fdconv_resnet101(**kwargs: Any) -> FDConvResNet:
    """FDConv in the bottlenecks of a ResNet-101."""
    return FDConvResNet((3, 4, 23, 3), 4, **kwargs)
