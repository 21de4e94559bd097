"""Weighted convolution: each tap is multiplied by a fixed density of its distance from the centre.

    taps along an axis:    d₁   d₂  …  d_r   1   d_r  …   d₂   d₁       alpha, outermost value first

    weight (Cout, Cin, k, k)  ×  Phi = alpha ⊗ alpha (k, k)   ─►  ordinary convolution

A plain convolution treats all places of its window alike. The density makes near ones count more than far
ones (or less), at the start and in every step of the optimiser, with the same number of parameters. Phi goes
into the weight before the convolution, so inference costs nothing more; `fuse()` leaves a plain layer.

Shapes:
    As `torch.nn.Conv1d`, `Conv2d` and `Conv3d`, for kernels with an odd number of taps on each axis.

Differs:
    Written from the paper's formulae alone. Padding, bias and the order of arguments are those of
    `torch.nn.Conv2d`; the official layer pads by 1 whatever its kernel. Axes of different length take a
    density each, axes of equal length share theirs. One-dimensional layers start from the values published
    for two dimensions, as none are published for one. Trainable densities start at ones, for any kernel.
    `from_conv` divides the weight by Phi, which keeps the layer's function. States in the official keys
    (`alfa`, `Phi`, `den`) load. The search is the authors' (try, compare, move), made a golden section of one
    value after the other.

References: Cammarasana, Patane, "Optimal Weighted Convolution for Classification and Denosing", arXiv
2505.24558; "Optimal Density Functions for Weighted Convolution in Learning Models", arXiv 2505.24527.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator, copy_parameter
from featherweight.blocks.effective_weight import EffectiveWeight, plain_conv
from featherweight.errors import UsageError

Density = Sequence[float] | Mapping[int, Sequence[float]] | None

PUBLISHED = {3: (0.7,), 5: (0.2, 0.8), 7: (0.25, 0.15, 0.55)}
PUBLISHED_3D = {3: (0.8,), 5: (0.1, 0.7)}
"""Values that the authors start from, by taps along an axis, outermost first."""

RANGES = {3: ((0.5, 1.5),), 5: ((0.05, 1.0), (0.5, 1.5)), 7: ((0.05, 0.5), (0.15, 1.0), (0.25, 1.5))}
"""Where the authors search, by taps along an axis, outermost first."""

GOLDEN = (math.sqrt(5) - 1) / 2


def alpha(density: Tensor) -> Tensor:
    """Return the density along one axis: the r values, 1 in the centre, the values in reverse.

    >>> alpha(torch.tensor([0.2, 0.8])).tolist()
    [0.20000000298023224, 0.800000011920929, 1.0, 0.800000011920929, 0.20000000298023224]
    """
    return torch.cat((density, density.new_ones(1), density.flip(0)))


class _WeightedConv(EffectiveWeight, ConvOperator):
    """What the layers share; `DIMS` says over how many axes they slide."""

    VALUES: ClassVar[Mapping[int, Sequence[float]]] = PUBLISHED

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
        density: Density = None,
        trainable: bool = False,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        )
        like = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size, **like)
        )
        self.bias = nn.Parameter(torch.empty(out_channels, **like)) if bias else None
        self.trainable = trainable
        for taps, values in self._densities(density).items():
            value = torch.tensor(values, **{"dtype": torch.get_default_dtype(), **_given(like)})
            if trainable:
                self.register_parameter(f"density_{taps}", nn.Parameter(value))
            else:
                self.register_buffer(f"density_{taps}", value)
        if not trainable:
            # Repeated over the input channels of a filter: a product with a longer row runs at full speed.
            rows = self.compose_phi().flatten().repeat(in_channels // groups)
            self.register_buffer("_rows", rows, persistent=False)
        self.reset_parameters()

    def _densities(self, density: Density) -> dict[int, tuple[float, ...]]:
        """Return the values for each number of taps above 1, checked."""
        lengths = sorted(set(self.kernel_size) - {1})
        if any(taps % 2 == 0 for taps in lengths):
            raise UsageError(
                f"Got kernel_size={self.kernel_size}; expected odd numbers, for a tap in the centre."
            )
        if density is None and self.trainable:
            density = {taps: (1.0,) * (taps // 2) for taps in lengths}
        if density is None:
            density = self.VALUES
        elif not isinstance(density, Mapping):
            if len(lengths) > 1:
                raise UsageError(
                    f"Got one density={density!r} for axes of {lengths} taps; expected {{taps: values}}."
                )
            density = {taps: density for taps in lengths}
        found = {}
        for taps in lengths:
            values = tuple(float(value) for value in density.get(taps, ()))
            if len(values) != taps // 2 or not all(map(math.isfinite, values)):
                raise UsageError(
                    f"Got density={values} for {taps} taps; expected {taps // 2} finite values, outermost "
                    f"first. Published: {dict(self.VALUES)}."
                )
            found[taps] = values
        return found

    def reset_parameters(self) -> None:
        """Draw the weight by Kaiming's normal rule for the outputs and ReLU; the bias is zero."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def phi(self) -> Tensor:
        """What multiplies each filter, `kernel_size`."""
        return self.compose_phi() if self.trainable else self._repeated()[0]

    def density(self, taps: int) -> Tensor:
        """Return the values along an axis of `taps` taps, `(taps // 2,)`, outermost first."""
        return getattr(self, f"density_{taps}")

    @torch.no_grad()
    def set_density(self, density: Density) -> None:
        """Replace the values, of a trainable density as well.

        Raises:
            UsageError: there are too many or too few.
        """
        for taps, values in self._densities(density).items():
            self.density(taps).copy_(torch.tensor(values))
        self._refresh()

    def compose_phi(self) -> Tensor:
        """Compute what multiplies the weight, `kernel_size`: the product of the densities along the axes."""
        factors = []
        for axis, taps in enumerate(self.kernel_size):
            along = self.weight.new_ones(1) if taps == 1 else alpha(self.density(taps))
            factors.append(along.view([-1 if i == axis else 1 for i in range(self.DIMS)]))
        return functools.reduce(torch.mul, factors)

    def compose_weight(self) -> Tensor:
        """Compute the weight of the plain convolution."""
        return self.weight * (self.compose_phi() if self.trainable else self._repeated())

    def _repeated(self) -> Tensor:
        return self._rows.view(self.weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the weighted taps; shapes as the ordinary layer's."""
        return self.convolve(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return the plain convolution that computes the same; it is no larger."""
        plain = plain_conv(self, self.weight)
        plain.weight.copy_(self.compose_weight())
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.train(self.training)

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether densities are published for every axis, one of them with more than one tap."""
        return any(taps > 1 for taps in conv.kernel_size) and all(
            taps == 1 or taps in cls.VALUES for taps in conv.kernel_size
        )

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Build the layer that computes what `conv` does, with the weight divided by the density.

        Raises:
            UsageError: the kernel has an even number of taps, or a value of the density is 0.
        """
        new = super().from_conv(conv, **kwargs)
        phi = new.compose_phi().detach()
        if not phi.is_meta and bool((phi == 0).any()):
            raise UsageError("Got a density of 0; no weight keeps what the convolution does there.")
        copy_parameter(new.weight, (conv.weight / phi).requires_grad_(conv.weight.requires_grad))
        if conv.bias is not None:
            copy_parameter(new.bias, conv.bias)
        return new

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self.trainable:
            self._repeated().copy_(self.compose_phi())

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(f"{prefix}Phi", None)
        taps = max(self.kernel_size)
        for key in ("alfa", "den"):
            if f"{prefix}{key}" in state_dict:
                state_dict[f"{prefix}density_{taps}"] = state_dict.pop(f"{prefix}{key}")[: taps // 2]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._refresh()

    def extra_repr(self) -> str:
        """Describe the layer as a convolution does, with its density."""
        lengths = sorted(set(self.kernel_size) - {1})
        shown = {t: self.density(t).tolist() for t in lengths if not self.weight.is_meta}
        return f"{super().extra_repr()}, density={shown}"


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if value is not None}


class WeightedConv1d(_WeightedConv):
    """`torch.nn.Conv1d` whose taps are multiplied by a density; `(N, in_channels, L)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv1d`; taps are odd.
        density: values, outermost first; None takes the published ones (trainable: ones).
        trainable: learn the density too, r more parameters; `fuse()` takes them away again.

    Raises:
        UsageError: an axis has an even number of taps, or the values do not fit it.

    >>> WeightedConv1d(2, 4, 5, padding=2)(torch.zeros(1, 2, 9)).shape
    torch.Size([1, 4, 9])
    """

    DIMS = 1


class WeightedConv2d(_WeightedConv):
    """`torch.nn.Conv2d` whose taps are multiplied by a density; `(N, in_channels, H, W)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv2d`; taps are odd on both axes.
        density: values, outermost first; for axes of different length a mapping of taps to values; None
            takes the published ones (trainable: ones).
        trainable: learn the density too, r more parameters; `fuse()` takes them away again.

    Raises:
        UsageError: an axis has an even number of taps, or the values do not fit it.

    >>> layer = WeightedConv2d(8, 16, 3, density=(0.5,))
    >>> layer.phi.tolist()
    [[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]
    """

    DIMS = 2


class WeightedConv3d(_WeightedConv):
    """`torch.nn.Conv3d` whose taps are multiplied by a density; `(N, in_channels, D, H, W)`.

    Args:
        in_channels: to `dtype` as in `torch.nn.Conv3d`; taps are odd on all axes.
        density: values, outermost first; for axes of different length a mapping of taps to values; None
            takes the published ones (trainable: ones).
        trainable: learn the density too, r more parameters; `fuse()` takes them away again.

    Raises:
        UsageError: an axis has an even number of taps, or the values do not fit it.

    >>> WeightedConv3d(2, 2, 3, padding=1)(torch.zeros(1, 2, 4, 4, 4)).shape
    torch.Size([1, 2, 4, 4, 4])
    """

    DIMS = 3
    VALUES = PUBLISHED_3D


def search_density(
    score: Callable[[tuple[float, ...]], float],
    ranges: Sequence[tuple[float, float]],
    steps: int = 4,
    rounds: int = 1,
) -> tuple[tuple[float, ...], list[tuple[tuple[float, ...], float]]]:
    """Search the density with the highest score, one value after the other, innermost first.

    Ones, the plain convolution, are tried first, so the answer never scores lower than they do.

    Args:
        score: of a density, higher is better: the validation metric of a short training with a fixed seed.
        ranges: lowest and highest value of each density, outermost first; see `RANGES`.
        steps: narrowings of each golden section; each costs one score, and two more to begin with.
        rounds: passes over all values.

    Returns:
        The best density, and every density tried with its score, in order.

    >>> search_density(lambda d: -abs(d[0] - 0.9), [(0.5, 1.5)], steps=12)[0]
    (0.9,)
    """
    curve: list[tuple[tuple[float, ...], float]] = []

    def tried(density: tuple[float, ...]) -> float:
        known = dict(curve)
        if density not in known:
            curve.append((density, score(density)))
        return dict(curve)[density]

    best = (1.0,) * len(ranges)
    tried(best)
    for _ in range(rounds):
        for place in reversed(range(len(ranges))):
            low, high = ranges[place]
            for _ in range(steps + 1):
                left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
                scores = [tried((*best[:place], round(v, 3), *best[place + 1 :])) for v in (left, right)]
                low, high = (low, right) if scores[0] >= scores[1] else (left, high)
            best = max(curve, key=lambda entry: entry[1])[0]
    return best, curve


OPERATORS = {nn.Conv1d: WeightedConv1d, nn.Conv2d: WeightedConv2d, nn.Conv3d: WeightedConv3d}
