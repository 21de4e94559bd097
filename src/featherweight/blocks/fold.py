"""Put norms in eval mode, and factors of channels, into the convolution or linear layer beside them.

A batch norm in eval mode is one scale and one shift per channel. The layer before it can carry both,
`W' = s W`, `b' = s b + t`; so can the layer after it, `W' = W s`, `b' = b + W t`, if it adds no padding that
the shift would have to reach. Everything is computed in double and rounded once, to the layer's precision.

Reference: Krishnamoorthi, arXiv 1806.08342, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.errors import UsageError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def check_eval(model: nn.Module) -> None:
    """Refuse to fold a network in training mode, whose norms follow the batch.

    Raises:
        UsageError: the network is in training mode.
    """
    if model.training:
        raise UsageError("fuse() needs the statistics of eval mode. Call model.eval() first.")


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in double, without gradient; on the CPU where its own device has no double."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a batch norm multiplies by and adds in eval mode, `(C,)` each, in double.

    >>> scale, shift = scale_and_shift(nn.BatchNorm2d(2, eps=0.0))
    >>> scale.tolist(), shift.tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    scale = torch.rsqrt(exact(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + exact(norm.bias)


def folded(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias, in double, of a layer that does what `layer` and the norm after it do.

    A norm that was folded before, an identity by now, changes nothing.
    """
    weight = exact(layer.weight)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else exact(layer.bias)
    if not isinstance(norm, NORMS):
        return weight.clone(), bias
    scale, shift = scale_and_shift(norm)
    return weight * _outputs(scale, layer), bias * scale + shift


@torch.no_grad()
def put_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Overwrite a layer's weight and bias, in place, at its precision; a layer without a bias gets one."""
    layer.weight.copy_(weight)
    if bias is None:
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_empty(len(layer.weight)))
    layer.bias.copy_(bias)


def scale_output(layer: nn.Module, scale: Tensor, shift: Tensor | None = None) -> None:
    """Multiply each output channel by `scale` and add `shift`, `(out_channels,)` each, in place."""
    scale = exact(scale)
    bias = None if layer.bias is None else exact(layer.bias) * scale
    if shift is not None:
        bias = exact(shift) if bias is None else bias + exact(shift)
    put_weights(layer, exact(layer.weight) * _outputs(scale, layer), bias)


def fold_after(layer: nn.Module, norm: nn.Module) -> None:
    """Put the norm after a layer into that layer, in place."""
    put_weights(layer, *folded(layer, norm))


def fold_before(norm: nn.Module, layer: nn.Module) -> None:
    """Put the norm before a layer into that layer, in place: a linear one, or one group without padding."""
    scale, shift = scale_and_shift(norm)
    weight = exact(layer.weight)
    bias = weight.reshape(*weight.shape[:2], -1).sum(2) @ shift
    if layer.bias is not None:
        bias = bias + exact(layer.bias)
    put_weights(layer, weight * scale.reshape(1, -1, *[1] * (weight.ndim - 2)), bias)


def _outputs(scale: Tensor, layer: nn.Module) -> Tensor:
    return scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
