"""DSCLoRA: low-rank updates of a frozen network's convolutions, taught by a larger one, then merged.

Three steps: `adapt` freezes a trained SPAN and puts low-rank convolutions in the place of its own;
`Supervised` gives the maps that `affinity_loss` compares with the teacher's; `merge_adapters` makes plain
convolutions of them again, so that running the network costs what it cost before.

Reference: Chai et al., "Distillation-Supervised Convolutional Low-Rank Adaptation for Efficient Image
Super-Resolution", arXiv 2504.11271, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.restorer import Restorer
from featherweight.errors import UsageError

RANKS = {"last": 8, "upsampler.0": 8, "blocks": 2}
"""Rank of the updates by the beginning of the layer's name, as left in the official file."""

ALPHA_OVER_RANK = 2.0
"""Strength of an update, alpha / rank, likewise."""

AFFINITY_SIDE = 32
"""Longest side of a map, in positions, whose affinities are compared: their number grows as its 4th power."""


class ConvLoRA(nn.Conv2d):
    """A convolution whose frozen weight gets an update of low rank.

    The update is `alpha / rank` times the product of `up`, `(out k, rank k)`, and `down`, `(rank k, in k)`,
    read row by row as `(out, in, k, k)`; `up` starts at 0, so that nothing changes at first. In training mode
    the update is computed at every call, in evaluation mode it lies in the weight; switching twice adds it
    once. Weights saved in one mode belong to it: `merged` is part of the state.

    Args:
        conv: the trained convolution, without groups; its tensors are taken over.
        rank: rank of the update; 0 leaves the convolution frozen.
        alpha: strength of the update; None takes twice the rank.
        train_bias: leave the bias trainable.

    Raises:
        UsageError: the convolution has groups, or the rank is negative.
    """

    def __init__(
        self, conv: nn.Conv2d, rank: int, alpha: float | None = None, train_bias: bool = False
    ) -> None:
        if conv.groups != 1 or rank < 0 or conv.kernel_size[0] != conv.kernel_size[1]:
            raise UsageError(
                f"Cannot adapt a convolution of {conv.groups} groups and kernel {conv.kernel_size} by rank "
                f"{rank}. Expected one group, a square kernel and a rank from 0."
            )
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.weight.requires_grad = False
        if self.bias is not None:
            self.bias.requires_grad = train_bias
        side = self.kernel_size[0]
        like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.scaling = 0.0 if rank == 0 else ALPHA_OVER_RANK if alpha is None else alpha / rank
        self.down = nn.Parameter(torch.empty(rank * side, self.in_channels * side, **like))
        self.up = nn.Parameter(torch.zeros(self.out_channels * side, rank * side, **like))
        if rank:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.register_buffer("merged", torch.zeros((), dtype=torch.bool, device=conv.weight.device))
        self.train(conv.training)

    def update(self) -> Tensor:
        """Return what is added to the weight."""
        return (self.up @ self.down).view_as(self.weight) * self.scaling

    @torch.no_grad()
    def train(self, mode: bool = True) -> Self:
        """Take the update out of the weight in training mode, put it in otherwise."""
        super().train(mode)
        # The first call comes from the constructor of the base class, before there is an update.
        if "merged" in self._buffers and bool(self.merged) == mode:
            self.weight += -self.update() if mode else self.update()
            self.merged.fill_(not mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the updated weight."""
        weight = self.weight + self.update() if self.training else self.weight
        return self._conv_forward(x, weight, self.bias)

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """Return a plain convolution with the updated weight."""
        self.train(False)
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device="meta",
        )
        plain.weight, plain.bias = nn.Parameter(self.weight.detach()), self.bias
        return plain.requires_grad_(True)


def adapt(model: Restorer, ranks: Mapping[str, int] = RANKS, train_bias: bool = False) -> Restorer:
    """Freeze a trained network, in place, and give its convolutions low-rank updates.

    Args:
        model: the network; merged first, for the updates are to plain convolutions.
        ranks: rank by the beginning of the layers' names; layers without one stay frozen.
        train_bias: leave the biases of adapted layers trainable.

    Raises:
        UsageError: no convolution has one of the names.
    """
    model.fuse().requires_grad_(False)
    found = False
    for name, layer in list(model.named_modules()):
        rank = next((rank for start, rank in ranks.items() if f"{name}.".startswith(f"{start}.")), None)
        if rank is not None and type(layer) is nn.Conv2d:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ConvLoRA(layer, rank, train_bias=train_bias))
            found = True
    if not found:
        raise UsageError(f"{type(model).__name__} has no convolution below {', '.join(ranks)} to adapt.")
    return model


def merge_adapters(model: nn.Module) -> nn.Module:
    """Put plain convolutions in the place of the adapted ones, in place; everything can train again."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ConvLoRA):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.merge())
    return model.requires_grad_(True)


class Supervised(nn.Module):
    """A network that gives, in training mode, its image and the maps that a teacher is compared on.

    `(N, C, H, W)` to the image, or to (image, maps): every block's and the one before the pixel shuffle.

    Args:
        model: the network, without a stride.
        always: give the maps in evaluation mode too, as a teacher does.
    """

    def __init__(self, model: Restorer, always: bool = False) -> None:
        super().__init__()
        self.model, self.always = model, always

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Restore a batch of images."""
        return self.both(x) if self.training or self.always else self.model(x)

    def both(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the image and the maps in either mode."""
        maps = list(self.model.iterate_maps(x))
        unshuffled = self.model.upsampler[0](self.model.join(iter(maps)))
        image = self.model.finish(self.model.upsampler[1](unshuffled))
        return image, [*maps[1 : 1 + len(self.model.blocks)], unshuffled]


def affinities(features: Tensor) -> Tensor:
    """Return the cosine between every two positions of maps `(N, C, H, W)`, as `(N, H W, H W)`.

    Maps longer than 32 positions are averaged down first.
    """
    height, width = (min(AFFINITY_SIDE, side) for side in features.shape[-2:])
    if (height, width) != tuple(features.shape[-2:]):
        features = F.adaptive_avg_pool2d(features, (height, width))
    unit = F.normalize(features.float().flatten(2), dim=1)  # (N, C, H W)
    return unit.transpose(1, 2) @ unit


def affinity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean distance of both networks' affinities, over all layers; channels may differ.

    Raises:
        UsageError: the networks have different numbers of layers.
    """
    if len(student) != len(teacher):
        raise UsageError(
            f"The student gives {len(student)} maps, the teacher {len(teacher)}. Expected equal."
        )
    pairs = zip(student, teacher, strict=True)
    return torch.stack(
        [(affinities(ours) - affinities(theirs)).abs().mean() for ours, theirs in pairs]
    ).mean()
