"""ConvFirst and MBConv blocks as one Triton kernel each, for inference; imported only where asked for.

A program computes a tile of output pixels with all channels. ConvFirst: the grouped convolution of the tile
stays in registers, widened values exist for one chunk of channels at a time, and are projected at once. The
map is read once (its halo again from the cache) and the answer written once; nothing widened reaches memory.
MBConv must widen the halo too: each chunk, halo included, is put into a scratch row of the program's own that
stays in the cache, because neighbours are needed; widened values outside the image count as 0.

Arithmetic is float32, products are of the tensors' own type. Weights are those after `fuse()`: no norms.

Reference: Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from featherweight.errors import UsageError

TILE = 8
"""Side of the square tile of output pixels of one program."""

CHUNK = 64
"""Widened channels that exist at once."""

SMALLEST = 16
"""Sides of a matrix product on a GPU are at least this."""


@triton.jit
def _silu(t):
    return t / (1.0 + tl.exp(-t))


@triton.jit
def _conv_first(
    x, spatial, expand, expand_bias, project, project_bias, y,
    height, width, out_height, out_width, channels, middle, out_channels, stride, tiles_x, tiles,
    side: tl.constexpr, group: tl.constexpr, tile: tl.constexpr, pad_c: tl.constexpr, pad_o: tl.constexpr,
    chunk: tl.constexpr, add_input: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    number = tl.program_id(0) % tiles
    pixel = tl.arange(0, tile * tile)
    row = number // tiles_x * tile + pixel // tile
    column = number % tiles_x * tile + pixel % tile
    inside = (row < out_height) & (column < out_width)
    c, o, q = tl.arange(0, pad_c), tl.arange(0, pad_o), tl.arange(0, chunk)
    in_c, in_o = c < channels, o < out_channels
    source = x + image * height * width * channels
    found = tl.zeros((tile * tile, pad_c), tl.float32)
    for tap in range(side * side):
        top = row * stride + tap // side - side // 2
        left = column * stride + tap % side - side // 2
        exists = inside & (top >= 0) & (top < height) & (left >= 0) & (left < width)
        place = (top * width + left) * channels
        for member in range(group):
            weight = tl.load(spatial + (tap * group + member) * channels + c, in_c, 0.0).to(tl.float32)
            value = tl.load(
                source + place[:, None] + (c // group * group + member)[None, :],
                exists[:, None] & in_c[None, :],
                0.0,
            )
            found += value.to(tl.float32) * weight[None, :]
    narrow = found.to(x.dtype.element_ty)
    total = tl.zeros((tile * tile, pad_o), tl.float32)
    total += tl.load(project_bias + o, in_o, 0.0).to(tl.float32)[None, :]
    for start in range(0, middle, chunk):
        in_q = start + q < middle
        matrix = tl.load(
            expand + c[:, None] * middle + (start + q)[None, :], in_c[:, None] & in_q[None, :], 0.0
        )
        wide = tl.dot(narrow, matrix, input_precision="ieee")
        wide = _silu(wide + tl.load(expand_bias + start + q, in_q, 0.0).to(tl.float32)[None, :])
        matrix = tl.load(
            project + (start + q)[:, None] * out_channels + o[None, :], in_q[:, None] & in_o[None, :], 0.0
        )
        total += tl.dot(wide.to(matrix.dtype), matrix, input_precision="ieee")
    where = ((image * out_height + row) * out_width + column) * out_channels
    kept = inside[:, None] & in_o[None, :]
    if add_input:
        total += tl.load(x + where[:, None] + o[None, :], kept, 0.0).to(tl.float32)
    tl.store(y + where[:, None] + o[None, :], total.to(y.dtype.element_ty), kept)


@triton.jit
def _mbconv(
    x, expand, expand_bias, spatial, spatial_bias, project, project_bias, y, scratch,
    height, width, out_height, out_width, channels, middle, out_channels, stride, tiles_x, tiles, halo,
    side: tl.constexpr, group: tl.constexpr, tile: tl.constexpr, pad_h: tl.constexpr, pad_c: tl.constexpr,
    pad_o: tl.constexpr, chunk: tl.constexpr, add_input: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    number = tl.program_id(0) % tiles
    pixel, near = tl.arange(0, tile * tile), tl.arange(0, pad_h)
    row = number // tiles_x * tile + pixel // tile
    column = number % tiles_x * tile + pixel % tile
    inside = (row < out_height) & (column < out_width)
    top = number // tiles_x * tile * stride - side // 2 + near // halo
    left = number % tiles_x * tile * stride - side // 2 + near % halo
    exists = (near < halo * halo) & (top >= 0) & (top < height) & (left >= 0) & (left < width)
    c, o, q = tl.arange(0, pad_c), tl.arange(0, pad_o), tl.arange(0, chunk)
    in_c, in_o = c < channels, o < out_channels
    source = x + image * height * width * channels
    values = tl.load(
        source + ((top * width + left) * channels)[:, None] + c[None, :], exists[:, None] & in_c[None, :], 0.0
    )
    own = scratch + tl.program_id(0).to(tl.int64) * pad_h * chunk
    first = pixel // tile * stride * halo + pixel % tile * stride
    total = tl.zeros((tile * tile, pad_o), tl.float32)
    total += tl.load(project_bias + o, in_o, 0.0).to(tl.float32)[None, :]
    for start in range(0, middle, chunk):
        in_q = start + q < middle
        matrix = tl.load(
            expand + c[:, None] * middle + (start + q)[None, :], in_c[:, None] & in_q[None, :], 0.0
        )
        wide = tl.dot(values, matrix, input_precision="ieee")
        wide = _silu(wide + tl.load(expand_bias + start + q, in_q, 0.0).to(tl.float32)[None, :])
        wide = tl.where(exists[:, None], wide, 0.0)
        tl.store(own + near[:, None] * chunk + q[None, :], wide)
        tl.debug_barrier()
        found = tl.zeros((tile * tile, chunk), tl.float32)
        found += tl.load(spatial_bias + start + q, in_q, 0.0).to(tl.float32)[None, :]
        for tap in range(side * side):
            place = (first + tap // side * halo + tap % side) * chunk
            for member in range(group):
                weight = tl.load(spatial + (tap * group + member) * middle + start + q, in_q, 0.0)
                value = tl.load(own + place[:, None] + (q // group * group + member)[None, :])
                found += value * weight.to(tl.float32)[None, :]
        tl.debug_barrier()
        matrix = tl.load(
            project + (start + q)[:, None] * out_channels + o[None, :], in_q[:, None] & in_o[None, :], 0.0
        )
        total += tl.dot(_silu(found).to(matrix.dtype), matrix, input_precision="ieee")
    where = ((image * out_height + row) * out_width + column) * out_channels
    kept = inside[:, None] & in_o[None, :]
    if add_input:
        total += tl.load(x + where[:, None] + o[None, :], kept, 0.0).to(tl.float32)
    tl.store(y + where[:, None] + o[None, :], total.to(y.dtype.element_ty), kept)


def _padded(size: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(size))


def _by_tap(conv: nn.Conv2d) -> Tensor:
    """Turn a grouped kernel `(C, g, k, k)` into `(k * k, g, C)`."""
    return conv.weight.flatten(2).permute(2, 1, 0).contiguous()


def _matrix(conv: nn.Conv2d) -> Tensor:
    """Turn a 1x1 kernel `(O, I, 1, 1)` into `(I, O)`."""
    return conv.weight.flatten(1).t().contiguous()


def _bias(conv: nn.Conv2d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias


def _check(block: nn.Module, units: tuple[nn.Module, ...], spatial: nn.Conv2d) -> None:
    if any(not isinstance(unit.norm, nn.Identity) for unit in units):
        raise UsageError(f"{type(block).__name__} still holds batch norms; call eval() and fuse() first.")
    side, padding = spatial.kernel_size, spatial.padding
    if side[0] != side[1] or side[0] % 2 == 0 or padding != (side[0] // 2,) * 2 or spatial.dilation != (1, 1):
        raise UsageError(f"Got the convolution {spatial}; expected an odd square kernel padded by half.")
    group = spatial.in_channels // spatial.groups
    if spatial.in_channels != spatial.out_channels or CHUNK % group:
        raise UsageError(f"Got groups of {group} channels; expected a divisor of {CHUNK} and equal channels.")


@torch.no_grad()
def run_conv_first(block: nn.Module, x: Tensor) -> Tensor:
    """Run a fused `ConvFirst` block in eval mode as one kernel.

    Args:
        block: with `spatial`, `expand`, `project` and `has_skip`, its norms folded.
        x: `(N, C, H, W)` on a GPU (or anywhere under the interpreter).

    Raises:
        UsageError: norms are not folded, or the convolution has another form.
    """
    units = (block.spatial, block.expand, block.project)
    spatial, expand, project = (unit.conv for unit in units)
    _check(block, units, spatial)
    if spatial.bias is not None:
        raise UsageError("The grouped convolution has a bias; fuse() moves it into the widening.")
    x, y, sizes, tiles = _prepare(x, spatial, project.out_channels)
    _conv_first[(len(x) * tiles[1],)](
        x, _by_tap(spatial), _matrix(expand), _bias(expand), _matrix(project), _bias(project), y,
        *sizes, x.shape[3], expand.out_channels, project.out_channels, spatial.stride[0], *tiles,
        spatial.kernel_size[0], x.shape[3] // spatial.groups, TILE,
        _padded(x.shape[3]), _padded(project.out_channels), CHUNK, block.has_skip,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@torch.no_grad()
def run_mbconv(block: nn.Module, x: Tensor) -> Tensor:
    """Run a fused `MBConv` block in eval mode as one kernel.

    Args:
        block: with `expand`, `depthwise`, `project` and `has_skip`, its norms folded.
        x: `(N, C, H, W)` on a GPU (or anywhere under the interpreter).

    Raises:
        UsageError: norms are not folded, or the convolution has another form.
    """
    if isinstance(block.expand, nn.Identity):
        raise UsageError("This block does not widen; expected an expansion above 1.")
    units = (block.expand, block.depthwise, block.project)
    expand, spatial, project = (unit.conv for unit in units)
    _check(block, units, spatial)
    x, y, sizes, tiles = _prepare(x, spatial, project.out_channels)
    stride, side = spatial.stride[0], spatial.kernel_size[0]
    halo = (TILE - 1) * stride + side
    programs, pad_h = len(x) * tiles[1], triton.next_power_of_2(halo * halo)
    scratch = torch.empty((programs, pad_h, CHUNK), device=x.device, dtype=torch.float32)
    _mbconv[(programs,)](
        x, _matrix(expand), _bias(expand), _by_tap(spatial), _bias(spatial),
        _matrix(project), _bias(project), y, scratch,
        *sizes, x.shape[3], expand.out_channels, project.out_channels, stride, *tiles, halo,
        side, spatial.in_channels // spatial.groups, TILE, pad_h,
        _padded(x.shape[3]), _padded(project.out_channels), CHUNK, block.has_skip,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def _prepare(
    x: Tensor, spatial: nn.Conv2d, out: int
) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, int]]:
    """Lay the map out with channels last; return it, the empty answer, four sides, tiles a row and in all."""
    x = x.permute(0, 2, 3, 1).contiguous()
    height, width = x.shape[1:3]
    step = spatial.stride[0]
    out_height, out_width = -(-height // step), -(-width // step)
    y = torch.empty((len(x), out_height, out_width, out), device=x.device, dtype=x.dtype)
    across = triton.cdiv(out_width, TILE)
    return x, y, (height, width, out_height, out_width), (across, across * triton.cdiv(out_height, TILE))
