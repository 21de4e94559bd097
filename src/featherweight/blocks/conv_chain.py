"""Convolutions in a row and in parallel without activations: many weights in training, one kernel to run.

The merged kernel is also what training runs: it is linear in each of the weights, so that gradients are the
same, and merging costs nothing beside convolving a map.

References: Ding et al., "RepVGG", arXiv 2101.03697; Wan et al., "Swift Parameter-free Attention Network",
arXiv 2311.12770, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvChain(nn.Sequential):
    """Convolutions in a row, at most one of them wider than 1x1; the input is padded before the first.

    `(N, channels[0], H, W)` to `(N, channels[-1], H, W)`.

    Args:
        channels: channels before the first convolution and after each.
        kernel_sizes: side of each kernel, in pixels, odd.
    """

    def __init__(self, channels: Sequence[int], kernel_sizes: Sequence[int]) -> None:
        pairs = zip(channels[:-1], channels[1:], kernel_sizes, strict=True)
        super().__init__(*(nn.Conv2d(before, after, side) for before, after, side in pairs))
        self.side = max(kernel_sizes)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one convolution that does the same."""
        first, *others = self
        weight, bias = first.weight, first.bias
        for conv in others:
            w = conv.weight
            # The padding comes first, so a bias reaches the border too and passes through every tap.
            bias = w.sum((2, 3)) @ bias + conv.bias
            if conv.kernel_size == (1, 1):
                weight = torch.einsum("om,mihw->oihw", w[:, :, 0, 0], weight)
            else:
                weight = torch.einsum("omhw,mi->oihw", w, weight[:, :, 0, 0])
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Convolve once with the merged kernel."""
        weight, bias = self.merged()
        return F.conv2d(x, weight, bias, padding=self.side // 2)


class RepConv(nn.Module):
    """The sum of several chains; `merge()` gives the one convolution.

    Args:
        chains: chains of equal channels at both ends.
    """

    def __init__(self, chains: Iterable[ConvChain]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)
        self.side = max(chain.side for chain in self.chains)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the one convolution that does the same."""
        weights, biases = zip(*(chain.merged() for chain in self.chains), strict=True)
        borders = [(self.side - chain.side) // 2 for chain in self.chains]
        padded = [F.pad(weight, [border] * 4) for weight, border in zip(weights, borders, strict=True)]
        return sum(padded[1:], padded[0]), sum(biases[1:], biases[0])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve once with the merged kernel."""
        weight, bias = self.merged()
        return F.conv2d(x, weight, bias, padding=self.side // 2)

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """Return the convolution as a layer of its own; the products are made in double precision."""
        like = next(self.parameters())
        dtype, device = like.dtype, like.device
        weight, bias = self.double().merged()
        self.to(dtype)
        out_channels, in_channels = weight.shape[:2]
        conv = nn.Conv2d(
            in_channels, out_channels, self.side, padding=self.side // 2, device=device, dtype=dtype
        )
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        return conv


def merge_chains(model: nn.Module) -> None:
    """Put one convolution in the place of every `RepConv` below `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RepConv):
                setattr(parent, name, child.merge().train(child.training))
