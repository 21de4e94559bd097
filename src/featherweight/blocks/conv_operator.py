"""Base of the operators that stand in for a convolution: its arguments, its padding, its output size.

An operator takes the arguments of `torch.nn.ConvNd` in their order, then its own as keywords, and gives an
output of the same shape. What it computes in between is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import UsageError

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RUN = (F.conv1d, F.conv2d, F.conv3d)


def per_axis(value: int | Sequence[int], dims: int, name: str, least: int) -> tuple[int, ...]:
    """Repeat a number over the axes, or check that there is one for each.

    Raises:
        UsageError: there are too few or too many, one is no integer or below `least`.

    >>> per_axis(3, 2, "kernel_size", 1)
    (3, 3)
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(values) != dims or not all(isinstance(v, int) and v >= least for v in values):
        raise UsageError(f"Got {name}={value!r}; expected an integer of at least {least}, or {dims} of them.")
    return values


class ConvOperator(nn.Module):
    """What every operator shares with a convolution; it holds no parameters.

    `(N, in_channels, *size)` to `(N, out_channels, *output_size(size))`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: extent of the kernel on each axis, in pixels.
        stride: step of the kernel on each axis, in pixels.
        padding: pixels added on both sides of each axis, `"same"` or `"valid"`.
        dilation: distance between the taps of the kernel, in pixels.
        groups: groups of channels that do not see each other.
        bias: add a learned value to each output channel (the subclass holds it).
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.

    Raises:
        UsageError: an argument is out of range, as `torch.nn.ConvNd` would say.
    """

    DIMS: ClassVar[int] = 2
    NEEDS_SIZE: ClassVar[bool] = False
    """The operator is built for one output size and takes it as `size=(h, w)`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise UsageError(
                f"Got in_channels={in_channels}, out_channels={out_channels}, groups={groups}; "
                "expected positive channels that groups divides."
            )
        if padding_mode not in PADDING_MODES:
            raise UsageError(
                f"Got padding_mode={padding_mode!r}; expected one of {', '.join(PADDING_MODES)}."
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = per_axis(kernel_size, self.DIMS, "kernel_size", 1)
        self.stride = per_axis(stride, self.DIMS, "stride", 1)
        self.dilation = per_axis(dilation, self.DIMS, "dilation", 1)
        self.padding = self._check_padding(padding)
        self.padding_mode = padding_mode
        self.has_bias = bool(bias)

    def _check_padding(self, padding: str | int | Sequence[int]) -> str | tuple[int, ...]:
        if not isinstance(padding, str):
            return per_axis(padding, self.DIMS, "padding", 0)
        if padding not in ("same", "valid"):
            raise UsageError(f"Got padding={padding!r}; expected 'same', 'valid' or pixels.")
        if padding == "same" and set(self.stride) != {1}:
            raise UsageError(f"Got padding='same' with stride={self.stride}; 'same' needs stride 1.")
        return padding

    def pads(self) -> tuple[tuple[int, int], ...]:
        """Return the pixels added before and after each axis."""
        if self.padding == "valid":
            return ((0, 0),) * self.DIMS
        if self.padding == "same":
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((span // 2, span - span // 2) for span in spans)
        return tuple((p, p) for p in self.padding)

    def pad(self, x: Tensor) -> Tensor:
        """Pad `(N, C, *size)` as the convolution would."""
        flat = [p for pair in reversed(self.pads()) for p in pair]
        if not any(flat):
            return x
        return F.pad(x, flat) if self.padding_mode == "zeros" else F.pad(x, flat, self.padding_mode)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None = None) -> Tensor:
        """Convolve with a given weight `(out_channels, in_channels / groups, *kernel_size)`."""
        run, groups = RUN[self.DIMS - 1], groups or self.groups
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = self.pad(x), 0
        return run(x, weight, bias, self.stride, padding, self.dilation, groups)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the extent of the output for an input of extent `size`.

        Raises:
            UsageError: the kernel does not fit into the padded input.
        """
        axes = zip(size, self.pads(), self.kernel_size, self.stride, self.dilation, strict=True)
        found = tuple((s + sum(p) - d * (k - 1) - 1) // step + 1 for s, p, k, step, d in axes)
        if min(found) < 1:
            raise UsageError(
                f"An input of {tuple(size)} pixels is smaller than the kernel {self.kernel_size}; "
                "expected a larger input or more padding."
            )
        return found

    def macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of one sample of `input_shape` = `(C, *size)`: of a plain convolution here."""
        kernel = self.in_channels // self.groups
        for k in self.kernel_size:
            kernel *= k
        places = self.out_channels
        for s in self.output_size(input_shape[1:]):
            places *= s
        return places * kernel

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether the published networks replace such a layer of that dotted name; any but 1x1 here."""
        return any(k > 1 for k in conv.kernel_size)

    @classmethod
    def arguments(cls, conv: nn.Module) -> dict[str, Any]:
        """Return the constructor's arguments that describe `conv`, with its device and dtype.

        Raises:
            UsageError: `conv` is not a plain convolution of the same number of axes.
        """
        expected = CONVS[cls.DIMS - 1]
        if type(conv) is not expected:
            raise UsageError(
                f"{cls.__name__} replaces {expected.__name__}; got {type(conv).__name__}, which may compute "
                "something else."
            )
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        return {
            **{name: getattr(conv, name) for name in names},
            "bias": conv.bias is not None,
            "padding_mode": conv.padding_mode,
            "device": conv.weight.device,
            "dtype": conv.weight.dtype,
        }

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Build the operator that stands in for `conv`; pretrained weights carry over in a subclass."""
        return cls(**{**cls.arguments(conv), **kwargs})

    def extra_repr(self) -> str:
        """Describe the layer as a convolution does."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        plain = {"padding": (0,) * self.DIMS, "dilation": (1,) * self.DIMS, "groups": 1}
        plain |= {"padding_mode": "zeros", "has_bias": True}
        others = {name: getattr(self, name) for name in plain}
        return text + "".join(f", {n}={v}" for n, v in others.items() if v != plain[n])


def copy_parameter(target: nn.Parameter, source: Tensor) -> None:
    """Give a parameter the values of another tensor, and its wish for a gradient."""
    with torch.no_grad():
        target.copy_(source)
    target.requires_grad_(source.requires_grad)
