"""Translation variant convolution: a depthwise kernel for every place, the same for all images.

Where inputs are aligned (face crops, fixed cameras, scans), the same thing is always at the same place, so
the kernel may depend on the place and need not depend on the image. Kernels learned for each place alone
would see few gradients; so a small network generates them all from a few learned maps. It depends on no
image: in eval mode it runs once, and `fuse()` drops it for good.

    affinity maps (p, h, w) ─► [conv 3x3 ─ layer norm ─ ReLU] x (1 + r) ─► conv 3x3 ─► W (C, taps, h, w)
                                                                                         │ one kernel a place
    x (N, C, H, W) ─────────────────────► taps of every place ───────────────────────────* ─► sum ─► y

Shapes:
    `(N, C, H, W)` to `(N, C, h, w)`, as a depthwise `torch.nn.Conv2d`; `size=(h, w)` is the OUTPUT size that
    the layer is built for.

Differs:
    The released deployment steps by one padded row where it should by two, so that stride 2 goes wrong; here
    all forms are sums over shifted views and agree. Kernels of any size, dilation, padding and padding mode
    are additions. Other input sizes are refused, or, with `resize=True`, served by interpolating the kernels
    between places (bilinear), which is our extension. `bias=True` adds one value to each channel, as a
    convolution does; the released option, a bias for every place from a second generator, is
    `bias_maps=True`. Pretrained kernels do not carry over (the generator has no exact inverse), a bias does.

Reference: Chen et al., "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual
Processing", CVPR 2022, arXiv 2203.10489, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv_operator import ConvOperator, copy_parameter, per_axis
from featherweight.blocks.effective_weight import EffectiveWeight
from featherweight.errors import UsageError

OFFICIAL_NAMES = (
    ("posi_map", "affinity"),
    ("weight_layers.", "generator."),
    ("bias_layers.", "bias_generator."),
)
OFFICIAL_CONSTANTS = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w")


class PlaceConv2d(ConvOperator):
    """A depthwise convolution with a given kernel for every place: what is left of TVConv after training.

    Args:
        channels: of input and output.
        size: `(h, w)` of the output.
        resize: serve other sizes with interpolated kernels instead of refusing them.
        device: where the kernels live.
        dtype: of the kernels.
        **kwargs: kernel_size, stride, padding, dilation, padding_mode and bias; see `ConvOperator`.
    """

    NEEDS_SIZE: ClassVar[bool] = True

    def __init__(
        self,
        channels: int,
        *,
        size: int | Sequence[int],
        resize: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(channels, channels, groups=channels, **kwargs)
        self.size = per_axis(size, 2, "size", 1)
        self.resize = resize
        shape = (channels, math.prod(self.kernel_size), *self.size)
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        each = torch.zeros(channels, 1, 1, device=device, dtype=dtype)
        self.bias = nn.Parameter(each) if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, h, w)`."""
        return sum_over_taps(self, x, self.weight, self.bias)


def sum_over_taps(layer: ConvOperator, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply every tap by its map and add up: nine shifted views need no unfolded copy of the input.

    Args:
        layer: gives stride, padding, dilation, the built `size` and whether to `resize`.
        x: `(N, C, H, W)`.
        weight: `(C, taps, h, w)`.
        bias: `(C, h, w)` or `(C, 1, 1)`, None for none.

    Raises:
        UsageError: the input has another size than the layer was built for.
    """
    height, width = layer.output_size([int(side) for side in x.shape[2:]])
    if (height, width) != layer.size:
        if not layer.resize:
            raise UsageError(
                f"An input of {tuple(x.shape[2:])} pixels gives an output of {(height, width)}; this layer "
                f"has kernels for {layer.size}. Resize the input or build the layer with resize=True."
            )
        weight = _resize(weight, (height, width))
        if bias is not None and bias.shape[1:] != (1, 1):
            bias = _resize(bias[:, None], (height, width))[:, 0]
    x = layer.pad(x)
    (down, right), (gap_y, gap_x) = layer.stride, layer.dilation
    y: Tensor | None = None
    for tap in range(weight.shape[1]):
        top, left = tap // layer.kernel_size[1] * gap_y, tap % layer.kernel_size[1] * gap_x
        rows = slice(top, top + (height - 1) * down + 1, down)
        columns = slice(left, left + (width - 1) * right + 1, right)
        part = x[:, :, rows, columns] * weight[:, tap].to(x.dtype)
        y = part if y is None else y + part
    return y if bias is None else y + bias.to(y.dtype)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate `(C, taps, h, w)` to another size."""
    wide = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).to(maps.dtype)


class TVConv2d(EffectiveWeight, ConvOperator):
    """Translation variant convolution; see the module.

    It is depthwise only: `groups`, `in_channels` and `out_channels` are equal.

    Args:
        size: `(h, w)` of the output that the layer is built for.
        maps: affinity maps (p).
        hidden: channels of the generator (q).
        layers: inner layers of the generator (r), besides the first and the last.
        bias_maps: generate a bias for every place as well.
        resize: serve other sizes with interpolated kernels instead of refusing them.

    Raises:
        UsageError: the layer is not depthwise, the size is missing, or an argument is out of range.

    >>> layer = TVConv2d(8, 8, 3, padding=1, groups=8, bias=False, size=(12, 12))
    >>> sum(p.numel() for p in layer.parameters())
    23040
    """

    NEEDS_SIZE: ClassVar[bool] = True

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
        size: int | Sequence[int] | None = None,
        maps: int = 4,
        hidden: int = 16,
        layers: int = 1,
        bias_maps: bool = False,
        resize: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        )
        if not groups == in_channels == out_channels:
            raise UsageError(
                f"Got in_channels={in_channels}, out_channels={out_channels}, groups={groups}; TVConv is "
                "depthwise, so all three must be equal."
            )
        if size is None:
            raise UsageError("Got no size; TVConv needs the size=(h, w) of its output.")
        if min(maps, hidden) < 1 or layers < 0:
            raise UsageError(
                f"Got maps={maps}, hidden={hidden}, layers={layers}; expected at least 1, 1 and 0."
            )
        self.size = per_axis(size, 2, "size", 1)
        self.resize = resize
        self.affinity = nn.Parameter(torch.ones(1, maps, *self.size))
        taps = math.prod(self.kernel_size)
        self.generator = _generator(maps, hidden, layers, in_channels * taps, self.size)
        self.bias_generator = None
        if bias_maps:
            self.bias_generator = _generator(maps, hidden, layers, in_channels, self.size)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.to(device=device, dtype=dtype)

    def compose_weight(self) -> Tensor:
        """Generate `(C, taps, h, w)`, with the biases as one more tap where places have their own."""
        weight = self.generator(self.affinity).unflatten(1, (self.in_channels, -1))[0]
        if self.bias_generator is None:
            return weight
        return torch.cat((weight, self.bias_generator(self.affinity)[0, :, None]), 1)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.effective_weight(), None
        if self.bias_generator is not None:
            weight, bias = weight[:, :-1], weight[:, -1]
        if self.bias is not None:
            each = self.bias[:, None, None]
            bias = each if bias is None else bias + each
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, h, w)`."""
        return sum_over_taps(self, x, *self._weight_and_bias())

    @torch.no_grad()
    def fuse(self) -> PlaceConv2d:
        """Return the layer without its generator: kernels as parameters, the same answers."""
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "size", "resize")
        weight, bias = self._weight_and_bias()
        kwargs = {name: getattr(self, name) for name in names}
        kwargs |= {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        new = PlaceConv2d(self.in_channels, **kwargs)
        new.weight.copy_(weight)
        if bias is not None:
            new.bias = nn.Parameter(bias.clone())  # of each channel, or of each place as well
        return new.train(self.training)

    def generation_macs(self) -> int:
        """Return the MACs of generating the kernels once: at every training step, never at inference."""
        generators = [g for g in (self.generator, self.bias_generator) if g is not None]
        convs = [m for g in generators for m in g.modules() if isinstance(m, nn.Conv2d)]
        return math.prod(self.size) * sum(conv.weight.numel() for conv in convs)

    @classmethod
    def suits(cls, conv: nn.Module, name: str = "") -> bool:
        """Tell whether the layer is depthwise with a kernel larger than 1x1."""
        return conv.groups == conv.in_channels == conv.out_channels > 1 and max(conv.kernel_size) > 1

    @classmethod
    def from_conv(cls, conv: nn.Module, **kwargs: Any) -> Self:
        """Stand in for a depthwise convolution; its bias carries over, its kernel is generated anew."""
        new = super().from_conv(conv, **kwargs)
        if conv.bias is not None:
            copy_parameter(new.bias, conv.bias)
        return new

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Accept the names of the released layer."""
        for key in [key for key in state if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name in OFFICIAL_CONSTANTS:
                del state[key]
            for old, new in OFFICIAL_NAMES:
                if name.startswith(old):
                    state[prefix + new + name.removeprefix(old)] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)


OPERATORS = {nn.Conv2d: TVConv2d}


def fuse_tvconvs(model: nn.Module) -> nn.Module:
    """Drop the generators of all TVConv layers of `model`, in place, and return it."""
    fused: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, TVConv2d):
                parent._modules[name] = fused.setdefault(child, fused.get(child) or child.fuse())
    return model


def _generator(maps: int, hidden: int, layers: int, out: int, size: Sequence[int]) -> nn.Sequential:
    """Build the network from the affinity maps to `out` values for every place."""
    blocks = [
        nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
            nn.LayerNorm([hidden, *size]),
            nn.ReLU(inplace=True),
        )
        for channels in (maps, *[hidden] * layers)
    ]
    return nn.Sequential(*blocks, nn.Conv2d(hidden, out, 3, padding=1, bias=False))
