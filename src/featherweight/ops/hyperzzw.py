"""HyperZ·Z·W: a small network of coordinates makes kernels, which meet the activations Z twice.

    coordinates ─► slow net ─► W (1, C, H, W), as large as the map
                               │             h₀ = sin(L₀c), hᵢ = sin(Lᵢc) · Vᵢhᵢ₋₁ + p
    Z ─► · ────────────────────┘       Z·W: weights that depend on the context
         └──► @ Z                      (Z·W) Z: every row of a map meets every column

    Z ─► mean ─► slow net ─► W (C, 1, k, k) ─► depthwise convolution of Z      the local form

The kernel costs a few thousand weights whatever its size, no place is out of reach, and there is neither a
residual nor attention. `HyperZZW2d` stands in for a convolution: the local form slides over the input, the
global one joins all places of what it gives, and a 1x1 convolution mixes both.

Shapes:
    `HyperZZW2d` as `torch.nn.Conv2d`, for square outputs. It is built for one output `size`; at another one
    the kernels are made on a grid of that size.

Differs:
    The layer is ours: the official code has the two forms only inside the branches of its network (see
    `models.terminator`, which is that network). Local kernels depend on the mean over the batch officially,
    in eval mode as well; here eval mode uses a running mean, so that an answer depends on its own image, and
    kernels are made once. `statistics="batch"` is the official behaviour. omega0 is unknown; 1 gives the
    fastest frequencies that a map of 32 pixels can show. The factor of the last layer is applied when it is
    drawn, not at the first call, which officially happens again after loading. The cut in the gradient of the
    local kernels (S-renormalisation) is made in training mode only.

References: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv
2401.17948; the coordinate network is MAGNet of Romero et al., arXiv 2110.08059.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator
from featherweight.blocks.effective_weight import EffectiveWeight
from featherweight.errors import UsageError

RUNNING, BATCH = "running", "batch"
MOMENTUM = 0.1
"""Share of a new batch in the running context."""

RENORM_KEPT, RENORM_NORMED = 1.0, 0.1
"""S-renormalisation: factors of the value (without gradient) and of the normalised value."""

POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d}
RESIZE = {1: "linear", 2: "bilinear"}


def grid(size: Sequence[int], like: Tensor) -> Tensor:
    """Return the coordinates of a map from -1 to 1, `(1, len(size), *size)`.

    >>> grid((3,), torch.zeros(1)).tolist()
    [[[-1.0, 0.0, 1.0]]]
    """
    axes = [torch.linspace(-1, 1, steps, device=like.device, dtype=like.dtype) for steps in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def numbers(size: Sequence[int]) -> tuple[int, ...]:
    """Return a size as plain numbers, where a tracer gives tensors: kernels are made for one size."""
    return tuple(int(n) for n in size)


def fit(field: Tensor, size: Sequence[int]) -> Tensor:
    """Resample a learned map `(1, 1, *its size)` to another size, corner on corner."""
    size = numbers(size)
    if tuple(field.shape[2:]) == size:
        return field
    return F.interpolate(field, size, mode=RESIZE[len(size)], align_corners=True)


class HyperKernel(EffectiveWeight):
    """A network of coordinates that gives a kernel `(1, out_channels, *size)`.

    Args:
        size: of the kernel on each axis, one or two of them.
        out_channels: channels of the kernel.
        hidden: channels inside.
        layers: products of a filter with a mixed layer.
        omega0: scale of the frequencies, in turns over half the grid.

    Raises:
        UsageError: omega0 is not positive.

    >>> HyperKernel((8, 8), 3, 16, 2)(torch.zeros(1, 3, 12, 12)).shape
    torch.Size([1, 3, 12, 12])
    """

    def __init__(
        self, size: Sequence[int], out_channels: int, hidden: int, layers: int, omega0: float = 1.0
    ) -> None:
        super().__init__()
        if omega0 <= 0:
            raise UsageError(f"Got omega0={omega0}; expected a positive scale of the frequencies.")
        self.size, dims = tuple(size), len(size)
        conv = POINTWISE[dims]
        self.filters = nn.ModuleList(conv(dims, hidden, 1) for _ in range(layers + 1))
        self.mixers = nn.ModuleList(conv(hidden, hidden, 1) for _ in range(layers))
        self.out = conv(hidden, out_channels, 1)
        self.field = nn.Parameter(torch.zeros(1, 1, *size))
        if not self.field.is_meta:
            self._draw(omega0)

    @torch.no_grad()
    def _draw(self, omega0: float) -> None:
        for index, layer in enumerate(self.filters):
            shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
            gamma = torch.distributions.Gamma(6.0 / (index + 1), 1.0).sample(shape)
            layer.weight.mul_(2 * math.pi * omega0 * gamma)
            nn.init.zeros_(layer.bias)
        for layer in (*self.mixers, self.out):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.constant_(layer.bias, 0.0 if layer is self.out else 1.0)
        self.out.weight.div_(math.sqrt(math.prod(self.size)))

    def sources(self) -> list[Tensor]:
        """Return everything that the kernel is made of."""
        return [*self.parameters(), *self.buffers()]

    def compose_weight(self) -> Tensor:
        """Make the kernel at its own size."""
        return self.at(self.size)

    def at(self, size: Sequence[int], context: Tensor | None = None) -> Tensor:
        """Make the kernel on a grid of another size, `(1, out_channels, *size)`."""
        places, field = grid(size, self.field), fit(self.field, size)
        h = self.filters[0](places).sin()  # (1, hidden, *size)
        for index, mixer in enumerate(self.mixers):
            h = self.filters[index + 1](places).sin() * mixer(h) + field
            if context is not None:
                h = self.modulate(h, index, context)
        return self.out(h)

    def modulate(self, h: Tensor, index: int, context: Tensor) -> Tensor:
        """Change the hidden map after layer `index` by what a map holds; the local form does."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Give the kernel for a map: its own size where `x` has it, else made for the size of `x`."""
        size = numbers(x.shape[2:])
        return self.effective_weight() if size == self.size else self.at(size)

    def macs(self, input_shape: Sequence[int]) -> int:
        """Return 0: the kernel is made once, not for each image."""
        return 0


class ContextKernel(HyperKernel):
    """Depthwise kernels `(channels, 1, *size)` that depend on what a map holds on average.

    Args:
        size: of the kernels, in pixels on each axis.
        channels: of the map, and number of kernels.
        hidden: channels inside.
        layers: products of a filter with a mixed layer.
        omega0: scale of the frequencies.
        statistics: context in eval mode: `"running"` mean of training, or of the `"batch"`.

    Raises:
        UsageError: the statistics are unknown.
    """

    def __init__(
        self,
        size: Sequence[int],
        channels: int,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 1.0,
        statistics: str = RUNNING,
    ) -> None:
        super().__init__(size, channels, hidden, layers, omega0)
        if statistics not in (RUNNING, BATCH):
            raise UsageError(f"Got statistics={statistics!r}; expected '{RUNNING}' or '{BATCH}'.")
        self.statistics = statistics
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.fc = nn.Conv2d(hidden, hidden, 1)
        self.gates = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(layers))
        if statistics == RUNNING:
            self.register_buffer("context", torch.zeros(1, channels, *size))
            self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        if not self.field.is_meta:
            for gate in self.gates:
                nn.init.kaiming_uniform_(gate.weight, nonlinearity="linear")
                nn.init.ones_(gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Give the kernels for a batch `(N, channels, H, W)`."""
        if self.statistics == RUNNING and not self.training:
            return self.effective_weight().transpose(0, 1)
        context = F.adaptive_avg_pool2d(x, self.size).mean(0, keepdim=True)  # (1, channels, *size)
        if self.statistics == RUNNING:
            self._remember(context.detach())
        return self.at(self.size, self.reduce(context)).transpose(0, 1)

    def compose_weight(self) -> Tensor:
        """Make the kernels of the running context, `(1, channels, *size)`."""
        return self.at(self.size, self.reduce(self.context))

    @torch.no_grad()
    def _remember(self, context: Tensor) -> None:
        self.batches += 1
        share = (1.0 / self.batches).clamp_min(MOMENTUM).to(context.dtype)
        self.context.lerp_(context, share)

    def modulate(self, h: Tensor, index: int, context: Tensor) -> Tensor:
        """Renormalise the hidden map and multiply it by the context."""
        kept = h.detach() if self.training else h
        h = RENORM_KEPT * kept + RENORM_NORMED * F.normalize(h.flatten(2), dim=2).view_as(h)
        return h * self.gates[index](F.gelu(self.fc(context)))


def local_feedback_error(kernels: Sequence[Tensor]) -> Tensor:
    """Return how far each global kernel is from those before it, repeated along the channels.

    The sum over all pairs of the mean squared difference: the loss that ties the slow nets together. Pairs of
    different size, or whose channels do not divide, count nothing.

    Args:
        kernels: `(1, C, H, W)` each, from the first layer to the last.

    >>> shallow = torch.rand(1, 2, 4, 4)
    >>> local_feedback_error([shallow, shallow.repeat(1, 3, 1, 1)]).item()
    0.0
    """
    pairs = [
        (shallow.repeat(1, deep.shape[1] // shallow.shape[1], *(1,) * (deep.ndim - 2)), deep)
        for shallow, deep in itertools.combinations(kernels, 2)
        if shallow.shape[2:] == deep.shape[2:] and deep.shape[1] % shallow.shape[1] == 0
    ]
    return sum((F.mse_loss(a, b) for a, b in pairs), kernels[0].new_zeros(()))


class HyperZZW2d(ConvOperator):
    """A local and a global HyperZ·Z·W in the place of a convolution; `(N, in_channels, H, W)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv2d`.
        size: rows and columns of the output, equal.
        hidden: channels of the slow net of the global kernel.
        layers: products in the slow net of the global kernel.
        omega0: scale of the kernels' frequencies.
        statistics: context of the local kernels in eval mode, `"running"` or `"batch"`.

    Raises:
        UsageError: the output is not square, or an argument is out of range.

    >>> HyperZZW2d(4, 8, 3, stride=2, padding=1, size=(6, 6))(torch.zeros(1, 4, 12, 12)).shape
    torch.Size([1, 8, 6, 6])
    """

    NEEDS_SIZE = True

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
        device: Any = None,
        dtype: Any = None,
        *,
        size: Sequence[int],
        hidden: int = 64,
        layers: int = 2,
        omega0: float = 1.0,
        statistics: str = RUNNING,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        )
        _check_square(size)
        self.size = tuple(size)
        self.local_kernel = ContextKernel(self.kernel_size, in_channels, omega0=omega0, statistics=statistics)
        self.global_kernel = HyperKernel(size, in_channels, hidden, layers, omega0)
        self.mix = nn.Conv2d(2 * in_channels, out_channels, 1, groups=groups, bias=bias)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Slide the local kernels, join all places by the global one, mix."""
        near = self.convolve(x, self.local_kernel(x), None, groups=self.in_channels)  # (N, Cin, S, S)
        _check_square(numbers(near.shape[2:]))
        far = (near * self.global_kernel(near)) @ F.instance_norm(near)  # rows by columns
        both = torch.stack((near, far), 2).flatten(1, 2)  # a group's channels side by side
        return self.mix(both)

    def macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of the depthwise convolution and of the mixing, without products of activations."""
        places = math.prod(self.output_size(input_shape[1:]))
        depthwise = self.in_channels * math.prod(self.kernel_size)
        return places * (depthwise + 2 * self.in_channels * self.out_channels // self.groups)


def _check_square(size: Sequence[int]) -> None:
    if len(size) != 2 or size[0] != size[1]:
        raise UsageError(
            f"Got an output of size={tuple(size)}; expected as many rows as columns, for the matrix product."
        )


OPERATORS = {nn.Conv2d: HyperZZW2d}
