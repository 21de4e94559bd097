"""The layer and the sequence classifier of the long convolutions' paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.long_conv import join_circular, long_conv, split_circular
from featherweight.errors import UsageError
from featherweight.ops.flashbutterfly.butterfly import ButterflyFFT
from featherweight.ops.flashbutterfly.kernel import check_squash, initial_kernel, regularize


class LongConvMixer(nn.Module):
    """The layer of the paper: several long convolutions of each channel, then a gated linear layer over
    channels.

    `(B, H, L)` to `(B, H, L)`: `y = glu(W dropout(gelu(k * u + skip u)))`.

    Args:
        channels: H.
        length: longest row L; shorter ones use the kernel's nearer lags.
        heads: convolutions of each channel.
        causal: kernel of L lags; else of 2 L places, negative lags in the second half.
        squash: what is taken off every tap's magnitude.
        smooth: taps on either side that are averaged.
        kernel_dropout: share of taps dropped while training.
        dropout: share of activations dropped while training.
        init: `"random"` or `"decay"`.
        butterfly: `"replace"` or `"additive"` learns the transforms of kernel and input; None uses exact
            ones.
        method: see `featherweight.blocks.long_conv.long_conv`; without effect on learnt transforms.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        heads: int = 2,
        causal: bool = False,
        squash: float = 0.001,
        smooth: int = 0,
        kernel_dropout: float = 0.0,
        dropout: float = 0.1,
        init: str = "random",
        butterfly: str | None = None,
        method: str = "auto",
    ) -> None:
        super().__init__()
        check_squash(squash, init)
        self.length, self.heads, self.causal, self.method = length, heads, causal, method
        self.squash, self.smooth, self.kernel_dropout = squash, smooth, kernel_dropout
        self.kernel = nn.Parameter(initial_kernel((heads, channels, length if causal else 2 * length), init))
        self.skip = nn.Parameter(torch.randn(heads, channels))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(heads * channels, 2 * channels)
        learnt = butterfly is not None
        self.transform_input = ButterflyFFT(butterfly) if learnt else None
        self.transform_kernel = ButterflyFFT(butterfly) if learnt else None

    def taps(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the kernel in use for rows of `length`: lags from 0 up, and from -1 down, (heads, H,
        ...)."""
        kernel = regularize(self.kernel, self.squash, self.smooth, self.kernel_dropout, self.training)
        if self.causal:
            return kernel[..., :length], kernel[..., :0]
        after, before = split_circular(kernel)
        return after[..., :length], before[..., : length - 1]

    def forward(self, u: Tensor) -> Tensor:
        """Mix rows (B, H, L).

        Raises:
            UsageError: the rows are longer than the layer was built for.
        """
        channels, length = u.shape[1:]
        if length > self.length:
            raise UsageError(f"Rows of {length} numbers; this layer was built for at most {self.length}.")
        taps, before = self.taps(length)
        if self.transform_input is not None:
            y = self._convolve_learnt(u, taps, before)
        else:
            rows = u.repeat(1, self.heads, 1)
            y = long_conv(rows, taps.flatten(0, 1), before.flatten(0, 1), method=self.method)
            y = y.unflatten(1, (self.heads, channels))
        y = y + u[:, None] * self.skip[..., None]
        y = self.dropout(F.gelu(y.flatten(1, 2)))
        return F.glu(self.output(y.transpose(1, 2)), -1).transpose(1, 2)

    def _convolve_learnt(self, u: Tensor, taps: Tensor, before: Tensor) -> Tensor:
        """Transform by the learnt matrices, multiply, invert exactly: (B, heads, H, L)."""
        size = 1 << (2 * u.shape[-1] - 1).bit_length()
        kernel = join_circular(taps, before, size)
        product = self.transform_input(u, size)[:, None] * self.transform_kernel(kernel, size)
        return torch.fft.ifft(product).real[..., : u.shape[-1]]


class LongConvNet(nn.Module):
    """The sequence classifier of the paper: mixers with residuals and layer norms, mean over time.

    `(B, L, features)` to `(B, classes)`. The published CIFAR-10 model reads 1,024 pixels of 3 colours through
    6 layers of 512 channels and 2 heads.

    Args:
        features: numbers at each step.
        classes: size of the answer.
        length: longest sequence L.
        channels: H.
        layers: number of mixers.
        prenorm: norm before the mixer in place of after the residual.
        dropout: share of activations, and of whole channels, dropped while training.
        **mixer: further arguments of `LongConvMixer`.

    >>> LongConvNet(3, 10, length=16, channels=8, layers=1)(torch.zeros(2, 16, 3)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        features: int,
        classes: int = 10,
        length: int = 1024,
        channels: int = 512,
        layers: int = 6,
        prenorm: bool = False,
        dropout: float = 0.1,
        **mixer: Any,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.encoder = nn.Linear(features, channels)
        self.mixers = nn.ModuleList(
            LongConvMixer(channels, length, dropout=dropout, **mixer) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.dropout = nn.Dropout1d(dropout)
        self.decoder = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify sequences (B, L, features)."""
        x = self.encoder(x)
        for mixer, norm in zip(self.mixers, self.norms, strict=True):
            z = norm(x) if self.prenorm else x
            x = x + self.dropout(mixer(z.transpose(1, 2))).transpose(1, 2)
            x = x if self.prenorm else norm(x)
        return self.decoder(x.mean(1))

    def parameter_groups(self, lr: float, weight_decay: float, kernel_lr: float) -> Iterator[dict[str, Any]]:
        """Yield the two groups of the published recipes: kernels learn at their own rate and never decay."""
        kernels = [mixer.kernel for mixer in self.mixers]
        known = {id(kernel) for kernel in kernels}
        yield {"params": kernels, "lr": kernel_lr, "weight_decay": 0.0}
        others = [parameter for parameter in self.parameters() if id(parameter) not in known]
        yield {"params": others, "lr": lr, "weight_decay": weight_decay}

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Load a state dict of the official stand-alone model, strictly.

        Raises:
            RuntimeError: keys or shapes differ.
        """
        names = {"conv_layers": "mixers", "D": "skip", "output_linear": "output"}
        self.load_state_dict(
            {
                ".".join(names.get(part, part) for part in key.split(".")).replace(
                    "output.0", "output"
                ): value
                for key, value in state.items()
            }
        )
