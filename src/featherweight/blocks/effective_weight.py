"""Layers whose weight is computed from other parameters: once in eval mode, at each training step.

The weight kept between calls is dropped when the mode changes, when the layer is moved or loads a state, and
recomputed when a parameter was replaced or written to. Writing through `.data`, which PyTorch does not note,
goes unseen until the layer has been in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from featherweight.blocks.conv_operator import CONVS, ConvOperator


class EffectiveWeight(nn.Module):
    """Base of a layer with `compose_weight()`; `effective_weight()` is what its forward pass uses."""

    _kept: tuple[Tensor, tuple[Any, ...]] | None = None

    def compose_weight(self) -> Tensor:
        """Compute the weight from the parameters, with gradient."""
        raise NotImplementedError

    def sources(self) -> list[Tensor]:
        """Return the tensors that the weight is computed from: those of the layer itself."""
        own = (*self._parameters.values(), *self._buffers.values())
        return [source for source in own if source is not None]

    def effective_weight(self) -> Tensor:
        """Give the weight: computed where gradients or a captured graph need it, else the kept one."""
        sources = self.sources()
        if self.training or _needs_graph(sources):
            return self.compose_weight()
        key = tuple((source, source._version, source.data_ptr()) for source in sources)
        if self._kept is None or not _same(self._kept[1], key):
            # A normal tensor of the parameters' own precision, whatever mode the caller is in.
            with torch.inference_mode(False), torch.no_grad(), _plain_precision(sources[0]):
                weight = self.compose_weight()
            if not isinstance(weight, Tensor):  # a symbol of `fx`
                return weight
            self._kept = (weight, key)
        return self._kept[0]

    def train(self, mode: bool = True) -> Self:
        """Set training or eval mode and, where it changes, forget the kept weight."""
        if mode != self.training:  # an exporter sets eval mode again before it traces
            self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept weight out of copies and pickles."""
        return {**self.__dict__, "_kept": None}


def plain_conv(operator: ConvOperator, like: Tensor) -> nn.Module:
    """Build the ordinary convolution with an operator's arguments, on the device and in the dtype of `like`.

    >>> plain_conv(ConvOperator(3, 8, 3, stride=2, bias=False), torch.zeros(1))
    Conv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), bias=False)
    """
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return CONVS[operator.DIMS - 1](
        **{name: getattr(operator, name) for name in (*names, "padding_mode")},
        bias=operator.has_bias,
        device=like.device,
        dtype=like.dtype,
    )


def _needs_graph(sources: list[Tensor]) -> bool:
    """Tell whether the parameters must appear in a graph: of autograd, `torch.export`, `torch.compile`, `fx`.

    Tracing for ONNX is left out on purpose: there the finished weight belongs into the file.
    """
    if torch.compiler.is_compiling() or any(not _is_plain(source) for source in sources):
        return True
    return torch.is_grad_enabled() and any(source.requires_grad for source in sources)


def _is_plain(source: Tensor) -> bool:
    return type(source) in (nn.Parameter, Tensor) and not source.is_inference() and not source.is_meta


def _same(old: tuple[Any, ...], new: tuple[Any, ...]) -> bool:
    return len(old) == len(new) and all(
        a is b and rest_a == rest_b for (a, *rest_a), (b, *rest_b) in zip(old, new, strict=True)
    )


def _plain_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)
