"""A drop-in for `torch.nn.Conv1d` whose kernel may be as long as the sequence, computed by Fourier
transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator, copy_parameter
from featherweight.blocks.long_conv import library, long_conv
from featherweight.errors import UsageError


class FFTConv1d(ConvOperator):
    """A 1-D convolution by Fourier transforms: `O(L log L)` whatever the length of the kernel.

    `(N, in_channels, L)` to `(N, out_channels, L')`. Depthwise layers (`groups = in_channels`) go through
    `long_conv`; denser ones multiply the channels' spectra. A captured graph holds a plain convolution.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps of the kernel.
        stride: step of the kernel; all results are computed, then every `stride`-th is kept.
        padding: numbers added on both sides, `"same"` or `"valid"`.
        dilation: distance between taps.
        groups: groups of channels that do not see each other.
        bias: add a learned value to each output channel.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        device: where the parameters lie.
        dtype: type of the parameters.
        causal: pad on the left alone, by the reach of the kernel, so that no result sees a later input;
            `padding` stays 0.
        partial: of a causal layer, use the taps at lags below this alone, the others count as zero: a layer
            trained on short rows so runs over longer ones. None uses all.
        method: how to compute, see `long_conv`; dense layers always use the library.

    Raises:
        UsageError: an argument is out of range.
    """

    DIMS = 1

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        causal: bool = False,
        partial: int | None = None,
        method: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        if causal and (padding != 0 or padding_mode != "zeros"):
            raise UsageError(
                f"Got causal=True with padding={padding!r}, padding_mode={padding_mode!r}; a causal layer "
                "pads by itself."
            )
        if partial is not None and not (causal and 1 <= partial <= self.kernel_size[0]):
            raise UsageError(
                f"Got partial={partial}, causal={causal}; expected a causal layer and 1 to "
                f"{self.kernel_size[0]} taps."
            )
        self.causal, self.partial, self.method = causal, partial, method
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size, **factory)
        )
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias as `torch.nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Stand in for a `Conv1d`; its weights carry over unchanged."""
        new = super().from_conv(conv, **kwargs)
        copy_parameter(new.weight, conv.weight)
        if conv.bias is not None:
            copy_parameter(new.bias, conv.bias)
        return new

    def kernel(self) -> Tensor:
        """Return the kernel in use, (out_channels, in_channels / groups, K)."""
        if self.partial is None:
            return self.weight
        return F.pad(self.weight[..., -self.partial :], (self.kernel_size[0] - self.partial, 0))

    def pads(self) -> tuple[tuple[int, int], ...]:
        """Return the numbers added before and after the row."""
        if self.causal:
            return ((self.dilation[0] * (self.kernel_size[0] - 1), 0),)
        return super().pads()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(N, in_channels, L)`.

        Raises:
            UsageError: the kernel does not fit into the padded row.
        """
        (size,) = self.output_size(x.shape[2:])
        weight = self.kernel()
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return F.conv1d(
                self.pad(x), weight.to(x.dtype), self.bias, self.stride, 0, self.dilation, self.groups
            )
        weight = _spread(weight, self.dilation[0])
        count = (size - 1) * self.stride[0] + 1
        y = (self._depthwise if self.groups == self.in_channels else self._dense)(x, weight, count)
        y = y[..., :: self.stride[0]]
        return y if self.bias is None else y + self.bias[:, None].to(y.dtype)

    def _depthwise(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
        ((left, _),) = self.pads()
        reach = weight.shape[-1] - 1
        if self.padding_mode == "zeros" and left <= reach and count <= x.shape[-1]:
            # Zeros outside the row need not be stored: tap j of the kernel has lag `left - j`.
            lags = weight[:, 0].flip(-1)
            taps, before = lags[:, reach - left :], weight[:, 0, left + 1 :]
        else:
            x, taps, before = self.pad(x), weight[:, 0, :1], weight[:, 0, 1:]
        x = x.repeat_interleave(self.out_channels // self.in_channels, 1)
        return long_conv(x, taps.to(x.dtype), before.to(x.dtype), method=self.method)[..., :count]

    def _dense(self, x: Tensor, weight: Tensor, count: int) -> Tensor:
        padded, groups = self.pad(x), self.groups
        exact = padded.to(torch.promote_types(x.dtype, torch.float32))
        size = library.fast_size(exact.shape[-1])  # results that wrap around lie behind the ones kept
        spectrum = torch.fft.rfft(exact, n=size).unflatten(1, (groups, -1))
        mixed = torch.fft.rfft(weight.to(exact.dtype), n=size).conj().unflatten(0, (groups, -1))
        product = torch.einsum("bgif,goif->bgof", spectrum, mixed).flatten(1, 2)
        return torch.fft.irfft(product, n=size)[..., :count].to(x.dtype)


def _spread(weight: Tensor, dilation: int) -> Tensor:
    """Put `dilation - 1` zeros between the taps."""
    if dilation == 1:
        return weight
    return F.pad(weight[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]
