"""PHC and PHM layers: the weight is a sum of Kronecker products of a small learnt algebra with small filters.

    algebra (n, n, n)            filters (n, Cout/n, Cin/n, k, k)         weight (Cout, Cin, k, k)
    ┌ a₁₁ a₁₂ ┐                  ┌ · · · ┐                                ┌ a₁₁F  a₁₂F ┐
    └ a₂₁ a₂₂ ┘ of term i   ⊗    └ · · · ┘ of term i,   summed over i  →  └ a₂₁F  a₂₂F ┘ + …  →  convolution

The algebra says how the n components of input and output mix, as the Hamilton product does for quaternions
(n = 4), but it is learnt and n is free: 3 for RGB, 2 for stereo, 8 or 16 for arrays of microphones. A layer
holds n³ + Cout·Cin·k²/n weights instead of Cout·Cin·k². The multiply-adds stay those of the convolution.

Shapes:
    As `torch.nn.Conv1d`, `Conv2d`, `Conv3d` and `Linear`. Both `out_channels` and `in_channels / groups` must
    be multiples of n. The weight's channel `a · Cout/n + c` is component a, filter c.

Differs:
    The official convolutions hold a bias and never add it; here it works. `load_state_dict` takes the
    official keys (`A`, `F`; of a linear layer `a`, `s` or `A`, `S`) and then sets a convolution's bias to
    zero, so that outputs stay the official ones. `groups`, `padding_mode` and dilation in 2-D are additions,
    as are `from_conv`, which starts from the nearest sum of Kronecker products to a given weight, and the
    weight kept in eval mode. Forming the weight in training (Cout · Cin · k² · n products) is not counted.

References: Grassucci, Zhang, Comminiello, "PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex
Convolutions", arXiv 2110.04176; Van Loan, Pitsianis, "Approximation with Kronecker Products"
(1993) for the nearest sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator, copy_parameter
from featherweight.blocks.effective_weight import EffectiveWeight, plain_conv
from featherweight.errors import UsageError

OFFICIAL_KEYS = {"A": "algebra", "a": "algebra", "F": "filters", "S": "filters", "s": "filters"}


def kronecker_sum(algebra: Tensor, filters: Tensor) -> Tensor:
    """Return `sum_i algebra[i] ⊗ filters[i]`, the product taken over the two channel axes only.

    `(n, n, n)` and `(n, p, q, *kernel)` to `(n p, n q, *kernel)`.

    >>> kronecker_sum(torch.eye(2)[None], torch.ones(1, 1, 1)).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    _, rows, columns = algebra.shape
    _, p, q, *kernel = filters.shape
    weight = torch.einsum("iab,icdk->acbdk", algebra, filters.flatten(3) if kernel else filters[..., None])
    return weight.reshape(rows * p, columns * q, *kernel)


@torch.no_grad()
def nearest_kronecker_sum(weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the algebra and filters whose `kronecker_sum` is closest to `weight` (least squares).

    Exact for n = 1 and for every weight that is such a sum; by the singular values of the weight rearranged
    to `n² x (rest)`.

    Args:
        weight: `(out, in, *kernel)`.
        n: terms, and side of the algebra.
    """
    out, inside, *kernel = weight.shape
    blocks = weight.double().reshape(n, out // n, n, inside // n, -1).permute(0, 2, 1, 3, 4)
    left, values, right = torch.linalg.svd(blocks.reshape(n * n, -1), full_matrices=False)
    terms = min(n, len(values))
    algebra, filters = weight.new_zeros(n, n * n), weight.new_zeros(n, weight.numel() // (n * n))
    algebra[:terms] = (left[:, :terms] * values[:terms].sqrt()).T.to(weight)
    filters[:terms] = (right[:terms] * values[:terms, None].sqrt()).to(weight)
    return algebra.reshape(n, n, n), filters.reshape(n, out // n, inside // n, *kernel)


def hamilton_algebra() -> Tensor:
    """Return the `(4, 4, 4)` algebra of the quaternions: the terms multiply 1, i, j and k from the left.

    >>> hamilton_algebra().abs().sum((1, 2)).tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    # Row r, column c: which of (1, i, j, k) stands in the block matrix of the Hamilton product, and its sign.
    signs_and_units = ((1, -2, -3, -4), (2, 1, -4, 3), (3, 4, 1, -2), (4, -3, 2, 1))
    algebra = torch.zeros(4, 4, 4)
    for row, entries in enumerate(signs_and_units):
        for column, entry in enumerate(entries):
            algebra[abs(entry) - 1, row, column] = math.copysign(1, entry)
    return algebra


class _Hypercomplex(EffectiveWeight):
    """What the layers share: the two factors, their initialisation, the official keys."""

    def _make(self, n: int, out: int, inside: int, kernel: tuple[int, ...], bias: bool, **like: Any) -> None:
        if n < 1 or out % n or inside % n:
            raise UsageError(
                f"Got n={n} with {inside} input channels (of a group) and {out} output channels; expected "
                "n of at least 1 that divides both."
            )
        self.n, self._inside = n, inside
        self.algebra = nn.Parameter(torch.empty(n, n, n, **like))
        self.filters = nn.Parameter(torch.empty(n, out // n, inside // n, *kernel, **like))
        self.bias = nn.Parameter(torch.empty(out, **like)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors by Xavier's uniform rule and the bias from ±1 / sqrt(input channels)."""
        nn.init.xavier_uniform_(self.algebra)
        nn.init.xavier_uniform_(self.filters)
        if self.bias is not None:
            bound = 1 / math.sqrt(self._inside)
            nn.init.uniform_(self.bias, -bound, bound)

    def compose_weight(self) -> Tensor:
        """Compute the weight of the ordinary layer, `(out, in / groups, *kernel)`."""
        return kronecker_sum(self.algebra, self.filters)

    def _approach(self, layer: nn.Module) -> None:
        """Take the nearest weights to those of an ordinary layer, and its bias."""
        if layer.weight.is_meta:
            return
        for target, source in zip(
            (self.algebra, self.filters), nearest_kronecker_sum(layer.weight, self.n), strict=True
        ):
            copy_parameter(target, source.requires_grad_(layer.weight.requires_grad))
        if self.bias is not None:
            copy_parameter(self.bias, layer.bias)

    @torch.no_grad()
    def _write_to(self, plain: nn.Module) -> nn.Module:
        """Give an ordinary layer of the same shape what this one computes with."""
        plain.weight.copy_(self.compose_weight())
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The filters of a 2-D layer have five axes, which no memory format for images takes.
        return super()._apply(lambda t: fn(t.flatten(2)).view(t.shape) if t.ndim > 3 else fn(t), recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        for key in own:
            del state_dict[key]
        state_dict.update(rename_official(own))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def rename_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official keys of layers to ours; a convolution's bias, which is never added, becomes zero.

    Keys of other layers, and ours, stay as they are.

    >>> sorted(rename_official({"conv.A": torch.ones(1, 1, 1), "conv.F": torch.ones(1, 2, 2, 3, 3)}))
    ['conv.algebra', 'conv.filters']
    """
    named = {}
    for key, value in state.items():
        layer, dot, leaf = key.rpartition(".")
        known = {name for name in OFFICIAL_KEYS if f"{layer}{dot}{name}" in state}
        if leaf == "bias" and "F" in known:
            value = torch.zeros_like(value)
        named[f"{layer}{dot}{OFFICIAL_KEYS.get(leaf, leaf)}" if len(known) == 2 else key] = value
    return named


class _PHConv(_Hypercomplex, ConvOperator):
    """What the convolutions share; `DIMS` says over how many axes they slide."""

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
        n: int = 4,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        )
        inside = in_channels // groups
        self._make(n, out_channels, inside, self.kernel_size, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the composed weight; shapes as the ordinary layer's."""
        return self.convolve(x, self.effective_weight(), self.bias)

    def fuse(self) -> nn.Module:
        """Return the ordinary convolution that computes the same; it is as large as any other."""
        return self._write_to(plain_conv(self, self.filters))

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether both channel counts divide by 4, the default n; 1x1 layers are replaced as well."""
        return conv.out_channels % 4 == 0 and conv.in_channels // conv.groups % 4 == 0

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Build the layer nearest to an ordinary convolution: exact for n = 1, else a start for training.

        Raises:
            UsageError: n does not divide the channels.
        """
        new = super().from_conv(conv, **kwargs)
        new._approach(conv)
        return new

    def extra_repr(self) -> str:
        """Describe the layer as a convolution does."""
        return f"{super().extra_repr()}, n={self.n}"


class PHConv1d(_PHConv):
    """`torch.nn.Conv1d` with 1/n of the weights; `(N, in_channels, L)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv1d`.
        n: terms of the sum and components of the algebra; divides both channel counts (of a group).

    Raises:
        UsageError: n does not divide the channels.

    >>> PHConv1d(8, 4, 5, padding=2, n=2)(torch.zeros(1, 8, 9)).shape
    torch.Size([1, 4, 9])
    """

    DIMS = 1


class PHConv2d(_PHConv):
    """`torch.nn.Conv2d` with 1/n of the weights; `(N, in_channels, H, W)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv2d`.
        n: terms of the sum and components of the algebra; divides both channel counts (of a group).

    Raises:
        UsageError: n does not divide the channels.

    >>> layer = PHConv2d(6, 9, 3, n=3)
    >>> sum(p.numel() for p in layer.parameters())
    198
    """

    DIMS = 2


class PHConv3d(_PHConv):
    """`torch.nn.Conv3d` with 1/n of the weights; `(N, in_channels, D, H, W)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv3d`.
        n: terms of the sum and components of the algebra; divides both channel counts (of a group).

    Raises:
        UsageError: n does not divide the channels.

    >>> PHConv3d(2, 2, 3, n=2)(torch.zeros(1, 2, 4, 4, 4)).shape
    torch.Size([1, 2, 2, 2, 2])
    """

    DIMS = 3


class PHLinear(_Hypercomplex):
    """`torch.nn.Linear` with 1/n of the weights (the PHM layer); `(..., in_features)`.

    Args:
        in_features: size of the last axis.
        out_features: size of the answer's last axis.
        bias: add a bias.
        device: of the parameters.
        dtype: of the parameters.
        n: terms of the sum and components of the algebra; divides both sizes.

    Raises:
        UsageError: n does not divide the sizes.

    >>> sum(p.numel() for p in PHLinear(16, 12, n=4).parameters())
    124
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        n: int = 4,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._make(n, out_features, in_features, (), bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.effective_weight(), self.bias)

    def fuse(self) -> nn.Linear:
        """Return the ordinary layer that computes the same; it is as large as any other."""
        like = {"device": self.filters.device, "dtype": self.filters.dtype}
        return self._write_to(nn.Linear(self.in_features, self.out_features, self.bias is not None, **like))

    @classmethod
    def suits(cls, layer: nn.Linear, name: str = "") -> bool:
        """Tell whether both sizes of an ordinary layer divide by 4, the default n."""
        return layer.out_features % 4 == 0 and layer.in_features % 4 == 0

    @classmethod
    def from_conv(cls, layer: nn.Linear, n: int = 4) -> Self:
        """Build the layer nearest to an ordinary linear one, as `PHConv2d.from_conv` does.

        Raises:
            UsageError: the sizes do not divide by n.
        """
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, n=n, **like)
        new._approach(layer)
        return new

    def extra_repr(self) -> str:
        """Show what the constructor was given."""
        return f"{self.in_features}, {self.out_features}, n={self.n}"


OPERATORS = {nn.Conv1d: PHConv1d, nn.Conv2d: PHConv2d, nn.Conv3d: PHConv3d, nn.Linear: PHLinear}
