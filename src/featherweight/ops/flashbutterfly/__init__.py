"""Long convolutions: kernels as long as the sequence that are plain parameters, kept smooth and small.

A state-space layer computes its long kernel from few numbers; here the kernel is learnt tap by tap. Such
kernels overfit, so two steps stand between the parameter and its use: *smooth* averages neighbouring taps,
*squash* takes `lambda` off every magnitude and leaves zeros. The convolution runs in `O(L log L)`; its
transform is a product of butterfly factors, whose small Fourier matrices may themselves be learnt.

    kernel ─► smooth ─► squash ─► dropout ─┐
    u (B, H, L) ───────────────────────────*──► + skip · u ─► y

Reference: Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra, Re, "Simple Hardware-Efficient Long Convolutions
for Sequence Modeling", arXiv 2302.06646, sections 3.2 (squash, smooth) and 3.3 (FlashButterfly, learnt
matrices).

Shapes:
    `LongConv1d`: (N, C_in, L) -> (N, C_out, L'), as `torch.nn.Conv1d`. `LongConvMixer`: (B, H, L) -> (B, H,
    L). `LongConvNet`: (B, L, features) -> (B, classes). `ButterflyFFT`: (..., L) -> (..., N) complex.

Differs:
    Officially `lambda` is 0.1 by default, which zeroes every tap of a kernel drawn at 0.002 for ever; here
    0.001, and a `lambda` above twice the initial deviation is refused. Causal and bidirectional kernels are
    told apart by name. Transforms of 16 numbers and fewer work. The learnt transform takes and gives complex
    numbers as the official one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from featherweight.blocks.fft_conv1d import FFTConv1d
from featherweight.errors import UsageError
from featherweight.ops.flashbutterfly.butterfly import ButterflyFFT
from featherweight.ops.flashbutterfly.kernel import check_squash, initial_kernel, regularize, smooth, squash
from featherweight.ops.flashbutterfly.network import LongConvMixer, LongConvNet

__all__ = ["ButterflyFFT", "LongConv1d", "LongConvMixer", "LongConvNet", "smooth", "squash"]


class LongConv1d(FFTConv1d):
    """A `torch.nn.Conv1d` for kernels as long as the sequence: smoothed and squashed before use.

    `(N, in_channels, L)` to `(N, out_channels, L')`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps of the kernel.
        stride: step of the kernel.
        padding: numbers added on both sides, `"same"` or `"valid"`.
        dilation: distance between taps.
        groups: groups of channels that do not see each other; `in_channels` for the published, depthwise
            layer.
        bias: add a learned value to each output channel.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        device: where the parameters lie.
        dtype: type of the parameters.
        squash: what is taken off every tap's magnitude; the published recipes use 0.001 to 0.004.
        smooth: taps on either side that are averaged; the official window of 7 is 3.
        kernel_dropout: share of taps that are dropped while training, after squashing.
        init: `"random"` or `"decay"`, see `initial_kernel`.
        causal: see `FFTConv1d`.
        partial: see `FFTConv1d`.
        method: see `FFTConv1d`.

    Raises:
        UsageError: an argument is out of range, or `squash` would silence the kernel for ever.

    >>> layer = LongConv1d(4, 8, 32, groups=4, causal=True)
    >>> layer(torch.zeros(1, 4, 32)).shape
    torch.Size([1, 8, 32])
    """

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
        squash: float = 0.001,
        smooth: int = 0,
        kernel_dropout: float = 0.0,
        init: str = "random",
        causal: bool = False,
        partial: int | None = None,
        method: str = "auto",
    ) -> None:
        check_squash(squash, init)
        if smooth < 0 or not 0 <= kernel_dropout < 1:
            raise UsageError(
                f"Got smooth={smooth}, kernel_dropout={kernel_dropout}; expected at least 0, and 0 up to 1."
            )
        self.init = init
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, causal=causal, partial=partial, method=method,
        )  # fmt: skip
        self.squash, self.smooth, self.kernel_dropout = squash, smooth, kernel_dropout

    def reset_parameters(self) -> None:
        """Draw the kernel as `init` says; the bias starts at zero."""
        channels, inside, taps = self.weight.shape
        with torch.no_grad():
            drawn = initial_kernel((channels * inside, taps), self.init, device=self.weight.device)
            # A convolution's weight lies with its last tap at lag 0.
            self.weight.copy_(drawn.flip(-1).view_as(self.weight))
            if self.bias is not None:
                self.bias.zero_()

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Stand in for a `Conv1d`; its weights carry over, unsquashed unless asked for."""
        return super().from_conv(conv, **{"squash": 0.0, **kwargs})

    def kernel(self) -> Tensor:
        """Return the kernel in use, (out_channels, in_channels / groups, K)."""
        return regularize(super().kernel(), self.squash, self.smooth, self.kernel_dropout, self.training)

    def sparsity(self) -> float:
        """Return the share of taps that squashing has set to zero."""
        with torch.no_grad():
            return float((squash(smooth(self.weight, self.smooth), self.squash) == 0).float().mean())


OPERATORS = {nn.Conv1d: LongConv1d}
