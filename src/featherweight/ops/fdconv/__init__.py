"""Frequency dynamic convolution: one kernel kept as its spectrum, whose bands each image weighs anew.

Dynamic convolution mixes several kernels for each image, and they end up alike. Here there is one kernel's
worth of parameters: the 2-D Fourier spectrum of the whole weight matrix, cut into n disjoint groups from low
to high frequency. The groups are kernels that can not be alike, for they share no frequency. Each image
weighs the groups, every entry of the kernel, and the frequency bands of its feature map.

    x ─┬─ bands: x = high + mid + low ─► sum_j A_j(x) band_j ──────────────► grouped convolution ─► y
       │                                                                           ▲
       └─ mean over places ─┬─ squeeze ─► pi (n) ─► spectrum x pi ─ inverse FFT ─► W x filter x channel x tap
                            └─ along the channels ─► one factor for each entry of W ─┘

Shapes:
    `(N, Cin, H, W)` to `(N, Cout, H', W')`, as `torch.nn.Conv2d`. The spectrum is that of the matrix of
    `Cout kh` rows and `Cin / groups kw` columns. `FDLinear` maps `(N, *, Cin)` to `(N, *, Cout)`: it is the
    1x1 form with the places between as one map.

Differs:
    All heads start at zero, so that a converted layer is the plain one until it is trained. The released code
    draws them about 1e-6 and misses the head of the output filters, for it tests another attribute: that
    changes a pretrained layer by 1 to 5 %. `param_reduction` keeps the scale of the
    kernel (the released code forgets it). Kernels of any size, groups, odd widths, one group of frequencies,
    groups that do not divide the frequencies, and training on one image work, where the released code fails:
    a grouped layer takes the blocks on the diagonal of the local factors, a batch of one uses the running
    statistics. The layer itself is never silently a plain one: which layers to replace is up to
    `replace_convs`, which takes those that the released networks take (1x1 and 3x3 kernels, more than 16
    channels, not the shortcuts). Spectra are computed in float32 at least and the answer has the type of the
    input. Weights of the released layer and of a plain convolution load as they are.

Reference: Chen et al., "Frequency Dynamic Convolution for Dense Image Prediction", CVPR 2025, arXiv
2503.18783, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator, copy_parameter
from featherweight.blocks.split_fourier import inverse_real
from featherweight.errors import UsageError
from featherweight.ops.fdconv.modulation import ACTS, BandModulation, Bands, GlobalModulation, LocalModulation

OFFICIAL_NAMES = (
    ("KSM_Global.", "modulation."),
    ("KSM_Local.", "local."),
    ("FBM.freq_weight_conv_list.", "bands.heads."),
)

ADDED = ("modulation", "local", "bands")
"""Parts that a plain layer does not have."""


class FDConv2d(ConvOperator):
    """Frequency dynamic convolution; see the module for what it computes and `ConvOperator` for the shape.

    Args:
        kernel_num: groups of frequencies (n); None takes half of `out_channels` and the temperature
            `sqrt(n)`. The published detectors use 64.
        param_ratio: copies of the spectrum that add up, each with its own weights of the groups.
        param_reduction: share of the frequencies that is kept, the lowest ones.
        reduction: channels of the squeeze for each input channel; never below 16 channels.
        temperature: divides the logits of channels, filters and taps; None takes that of the frequencies.
        kernel_temperature: divides the logits of the frequencies.
        global_act: `"sigmoid"`, `"tanh"`, or `"softmax"` with `frequencies_only`.
        local_act: `"sigmoid"`, `"tanh"`, or None for no factors of single entries.
        frequencies_only: weigh the groups of frequencies but not channels, filters and taps.
        bands: how to cut the feature map; None leaves it whole, `"auto"` cuts for 3x3 kernels only.

    Raises:
        UsageError: an argument is out of range.

    >>> FDConv2d(64, 64, 3, padding=1, kernel_num=64).dft_weight.shape
    torch.Size([1, 192, 97, 2])
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
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_num: int | None = 4,
        param_ratio: int = 1,
        param_reduction: float = 1.0,
        reduction: float = 0.0625,
        temperature: float | None = None,
        kernel_temperature: float = 1.0,
        global_act: str = "sigmoid",
        local_act: str | None = "sigmoid",
        frequencies_only: bool = False,
        bands: Bands | str | None = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        _check_acts(global_act, local_act, frequencies_only)
        if kernel_num is None:
            kernel_num = max(1, out_channels // 2)
            kernel_temperature = math.sqrt(kernel_num * param_ratio)
        if not 1 <= kernel_num < 2**15 or param_ratio < 1 or not 0 < param_reduction <= 1:
            raise UsageError(
                f"Got kernel_num={kernel_num}, param_ratio={param_ratio}, param_reduction={param_reduction}; "
                "expected 1 to 32767, at least 1, and a share above 0 up to 1."
            )
        self.kernel_num, self.param_ratio, self.param_reduction = kernel_num, param_ratio, param_reduction
        self.rows = out_channels * self.kernel_size[0]
        self.columns = in_channels // groups * self.kernel_size[1]
        self.scale = max(1, min(in_channels, out_channels) // 2)
        if bands == "auto":
            bands = Bands() if self.kernel_size == (3, 3) else None
        self.modulation = GlobalModulation(
            self,
            kernel_num * param_ratio,
            max(int(in_channels * reduction), 16),
            global_act,
            (kernel_temperature, kernel_temperature if temperature is None else temperature),
            frequencies_only,
        )
        self.local = None if local_act is None else LocalModulation(self, local_act)
        self.bands = None if bands is None else BandModulation(in_channels, bands)
        self._place_frequencies()
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        like = nn.Conv2d(in_channels, out_channels, self.kernel_size, groups=groups, bias=bias)
        self.dft_weight = nn.Parameter(self.to_spectrum(like.weight.detach()))
        if bias:
            copy_parameter(self.bias, like.bias)
        self.to(device=device, dtype=dtype)

    def _place_frequencies(self) -> None:
        """Sort the frequencies by their distance from 0 and cut them into groups of equal number.

        Equal distances fall into the order of `torch.sort`, as in the released code. That order differs
        between machines, so the result is saved with the weights.
        """
        rows, columns = torch.fft.fftfreq(self.rows), torch.fft.rfftfreq(self.columns)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        order = torch.sort(torch.norm(grid, dim=-1).flatten()).indices
        kept = max(1, int(len(order) * self.param_reduction))
        group = torch.zeros(len(order), dtype=torch.int16)
        group[order[:kept]] = (torch.arange(kept) * self.kernel_num // kept).to(torch.int16)
        self.register_buffer("group", group.view(grid.shape[:2]))
        self.register_buffer("kept", order[:kept] if kept < len(order) else None)

    def to_spectrum(self, weight: Tensor) -> Tensor:
        """Turn a weight `(Cout, Cin / groups, kh, kw)` or `(Cout, Cin)` into values for `dft_weight`."""
        weight = weight.reshape(self.out_channels, -1, *self.kernel_size)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        z = torch.view_as_real(torch.fft.rfft2(wide.permute(0, 2, 1, 3).reshape(self.rows, self.columns)))
        if self.kept is not None:
            z = z.flatten(0, 1)[self.kept]
        copies = [z / (self.scale * self.param_ratio)] * self.param_ratio
        return torch.stack(copies).to(weight.dtype)

    def kernel(self, frequencies: Tensor | None) -> Tensor:
        """Assemble the kernels `(N, Cout, Cin / groups, kh, kw)` for weights of the groups `(N, n)`.

        None, where there is only one group, gives the kernel as it is kept.
        """
        z = self.dft_weight.to(torch.promote_types(self.dft_weight.dtype, torch.float32))
        if self.kept is not None:
            whole = z.new_zeros(len(z), self.group.numel(), 2)
            z = whole.index_copy(1, self.kept, z).unflatten(1, self.group.shape)
        if frequencies is None:
            z = z * self.scale
        else:
            weights = frequencies.to(z.dtype).reshape(-1, self.param_ratio, self.kernel_num)
            weights = weights * (self.scale * self.kernel_num * self.param_ratio)
            each = weights.index_select(2, self.group.long().flatten())
            z = (z * each.reshape(-1, self.param_ratio, *self.group.shape, 1)).sum(1)
        w = inverse_real(z, self.rows, self.columns)
        height, width = self.kernel_size
        return w.reshape(-1, self.out_channels, height, self.columns // width, width).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, Cin, H, W)` to `(N, Cout, H', W')`."""
        mean = x.mean((2, 3), keepdim=True)
        channel, filters, taps, frequencies = self.modulation(mean)
        weight = self.kernel(frequencies)
        if taps is not None:
            weight = weight * taps.to(weight.dtype).reshape(-1, 1, 1, *self.kernel_size)
        if self.local is not None:
            weight = weight * self.local(mean).to(weight.dtype)
        weight = weight.to(x.dtype)
        if self.bands is not None:
            x = self.bands(x)
        # Where the kernel is the smaller one it is scaled, else the maps on both of its sides.
        maps = (self.in_channels + self.out_channels) * math.prod(x.shape[2:])
        small = not self._is_shared and math.prod(weight.shape[1:]) < maps
        if channel is not None and not (small and self.groups == 1):
            x, channel = x * channel.to(x.dtype).reshape(-1, self.in_channels, 1, 1), None
        if channel is not None:
            weight = weight * channel.to(weight.dtype).reshape(-1, 1, self.in_channels, 1, 1)
        if filters is not None and small:
            weight, filters = weight * filters.to(weight.dtype).reshape(-1, self.out_channels, 1, 1, 1), None
        y = self._convolve_each(x, weight)
        if filters is not None:
            y = y * filters.to(y.dtype).reshape(-1, self.out_channels, 1, 1)
        return y if self.bias is None else y + self.bias.to(y.dtype).reshape(-1, 1, 1)

    @property
    def _is_shared(self) -> bool:
        """All samples have one kernel: only input and output channels are scaled."""
        return self.modulation.is_idle and self.local is None

    def _convolve_each(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve each sample with its own kernel."""
        if self._is_shared:
            return self.convolve(x, weight[0], None)
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            y = self.convolve(
                x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, len(x) * self.groups
            )
            return y.reshape(len(x), -1, *y.shape[2:])
        # As many groups as samples would fix the number of samples in a graph.
        size = self.output_size([int(side) for side in x.shape[2:]])
        patches = F.unfold(self.pad(x), self.kernel_size, self.dilation, 0, self.stride)
        groups, taps = self.groups, self.columns * self.kernel_size[0]
        kernels = weight.reshape(-1, groups, self.out_channels // groups, taps)
        y = kernels @ patches.reshape(-1, groups, taps, math.prod(size))
        return y.reshape(-1, self.out_channels, *size)

    def macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of the convolution and of the networks that modulate it, without transforms."""
        hidden = self.modulation.fc.out_channels
        heads = self.modulation.fc.in_channels + sum(head.out_channels for head in self.modulation.heads())
        total = super().macs(input_shape) + hidden * heads
        if self.local is not None:
            total += self.local.conv.weight.numel() * self.in_channels
        if self.bands is not None:
            total += self.bands.head_macs(input_shape)
        return total

    def transform_macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of the Fourier transforms: of the kernel, and of the map once and for each band."""
        total = _transform(self.rows * self.columns)
        if self.bands is not None:
            times = 1 + len(self.bands.config.cutoffs)
            total += times * input_shape[0] * _transform(math.prod(input_shape[1:]))
        return total

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether the released networks replace the layer: 1x1 or 3x3, over 16 channels, no shortcut."""
        if any(part in ("downsample", "shortcut") for part in name.split(".")):
            return False
        wide = min(conv.in_channels, conv.out_channels) > 16 and conv.groups == 1
        return wide and conv.kernel_size in ((1, 1), (3, 3))

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Take over a plain convolution; the new layer gives the same until it is trained."""
        new = super().from_conv(conv, **kwargs)
        with torch.no_grad():
            new.dft_weight.copy_(new.to_spectrum(conv.weight))
        new.dft_weight.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            copy_parameter(new.bias, conv.bias)
        return new

    def adapt_state(self, state: dict[str, Any], prefix: str = "") -> None:
        """Bring the entries below `prefix` to our layout, in place: of the released layer, or of a plain one.

        Args:
            state: names -> tensors.
            prefix: the layer's own name with a dot behind it.
        """
        for old, new in OFFICIAL_NAMES:
            for key in [key for key in state if key.startswith(prefix + old)]:
                state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)
        plain = state.pop(f"{prefix}weight", None)
        if plain is not None and f"{prefix}dft_weight" not in state:
            state[f"{prefix}dft_weight"] = self.to_spectrum(plain.to(self.group.device))
            # A plain layer says nothing about the networks that modulate it: they stay as they are.
            state.update({prefix + k: v for k, v in self.state_dict().items() if k.split(".")[0] in ADDED})
        for name, buffer in self._buffers.items():
            if buffer is not None and f"{prefix}dft_weight" in state:
                state.setdefault(prefix + name, buffer)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.adapt_state(state, prefix)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)


class FDLinear(FDConv2d):
    """The same for a linear layer: a 1x1 convolution whose map are the places between batch and features.

    `(N, *, in_features)` to `(N, *, out_features)`; the mean is taken over `*`.

    Args:
        in_features: of the input.
        out_features: of the output.
        bias: add a learned value to each output feature.
        **kwargs: see `FDConv2d`.

    >>> FDLinear(32, 64)(torch.zeros(2, 7, 7, 32)).shape
    torch.Size([2, 7, 7, 64])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, 1, bias=bias, **kwargs)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """`(N, *, in_features)` to `(N, *, out_features)`."""
        places = x.reshape(len(x), -1, self.in_features).transpose(-1, -2)[..., None]
        return super().forward(places)[..., 0].transpose(-1, -2).reshape(*x.shape[:-1], self.out_features)

    def macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of one sample of `input_shape` = `(*, in_features)`."""
        return super().macs((self.in_features, math.prod(input_shape[:-1]), 1))

    def transform_macs(self, input_shape: Sequence[int]) -> int:
        """Return the MACs of the kernel's Fourier transform."""
        return super().transform_macs((self.in_features, math.prod(input_shape[:-1]), 1))

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether the layer may stand in a feed-forward block: over 16 features on both sides."""
        return min(conv.in_features, conv.out_features) > 16

    @classmethod
    def arguments(cls, conv: nn.Module) -> dict[str, Any]:
        """Return the constructor's arguments that describe a `torch.nn.Linear`."""
        if type(conv) is not nn.Linear:
            raise UsageError(f"{cls.__name__} replaces Linear; got {type(conv).__name__}.")
        return {
            "in_features": conv.in_features,
            "out_features": conv.out_features,
            "bias": conv.bias is not None,
            "device": conv.weight.device,
            "dtype": conv.weight.dtype,
        }


OPERATORS = {nn.Conv2d: FDConv2d, nn.Linear: FDLinear}


def _transform(points: int) -> int:
    return round(1.25 * points * math.log2(max(points, 2)))


def _check_acts(global_act: str, local_act: str | None, frequencies_only: bool) -> None:
    if global_act not in (*ACTS, "softmax") or (global_act == "softmax" and not frequencies_only):
        raise UsageError(
            f"Got global_act={global_act!r}; expected 'sigmoid', 'tanh', or 'softmax' with frequencies_only."
        )
    if local_act is not None and local_act not in ACTS:
        raise UsageError(f"Got local_act={local_act!r}; expected 'sigmoid', 'tanh' or None.")
