"""Plan a fused block: a whole ConvFirst or MBConv block in one kernel, tile by tile.

One tile of the output needs its input pixels and a halo around them, and a workspace that must stay near the
processor: the convolved tile, the accumulators of the output, and a chunk of the widened channels, of which
there are never more at once. ConvFirst reads its halo again for each tile; MBConv, whose convolution works on
widened values, must also compute it again.

The paper writes such kernels for an abstract "tensor machine" that is not known to us; the formulas are ours.

Reference: Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.
"""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.errors import UsageError

TILE_SIDES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class FusedBlock:
    """A block to run as one kernel.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        height: rows of the output, in pixels.
        width: columns of the output, in pixels.
        kernel_size: side of the grouped kernel, in pixels.
        stride: stride of the grouped convolution, in pixels.
        group_width: channels of each group.
        expansion: widening of the block.
        conv_first: the convolution comes before the widening (ConvFirst) or after it (MBConv).
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    group_width: int = 8
    expansion: int = 4
    conv_first: bool = True

    @property
    def middle(self) -> int:
        """Widened channels."""
        return self.in_channels * self.expansion


@dataclass(frozen=True)
class Tile:
    """Output pixels of one pass, and how many widened channels exist at once."""

    height: int
    width: int
    chunk: int


@dataclass(frozen=True)
class TileOp:
    """One step of a tile: values moved to or from memory, and multiply-adds."""

    name: str
    macs: int = 0
    values: int = 0


def halo_factor(block: FusedBlock, tile: Tile) -> float:
    """Return how many input pixels a tile needs for each one that is its own.

    >>> halo_factor(FusedBlock(64, 64, 64, 64), Tile(8, 8, 64))
    1.5625
    """
    return _halo_pixels(block, tile) / (tile.height * tile.width * block.stride**2)


def workspace_values(block: FusedBlock, tile: Tile) -> int:
    """Return the values that must stay near the processor while a tile is computed.

    ConvFirst: the convolved tile, the widened chunk and the accumulators, `P * (C_in + chunk + C_out)` for P
    pixels. MBConv: the chunk with its halo before the convolution, without it after, and the accumulators.
    """
    pixels = tile.height * tile.width
    if block.conv_first:
        return pixels * (block.in_channels + tile.chunk + block.out_channels)
    return _halo_pixels(block, tile) * tile.chunk + pixels * (tile.chunk + block.out_channels)


def tile_ops(block: FusedBlock, tile: Tile) -> list[TileOp]:
    """Return the steps of one tile inside the map; its weights come from the cache.

    >>> sum(op.macs for op in tile_ops(FusedBlock(64, 64, 64, 64), Tile(64, 64, 64)))
    153092096
    """
    pixels, halo = tile.height * tile.width, _halo_pixels(block, tile)
    convolved = block.in_channels if block.conv_first else block.middle
    widened = pixels if block.conv_first else halo
    convolve = TileOp("convolve", pixels * convolved * block.kernel_size**2 * block.group_width)
    widen = TileOp("widen", widened * block.in_channels * block.middle)
    return [
        TileOp("load", values=halo * block.in_channels),
        *((convolve, widen) if block.conv_first else (widen, convolve)),
        TileOp("project", pixels * block.middle * block.out_channels),
        TileOp("store", values=pixels * block.out_channels),
    ]


def plan_tile(block: FusedBlock, limit_bytes: int, value_bytes: int = 4) -> Tile:
    """Pick the tile with the least work, then the least traffic, whose workspace fits.

    Args:
        block: the block.
        limit_bytes: bytes that the workspace may take, such as half of a level of the cache.
        value_bytes: bytes of one value.

    Raises:
        UsageError: not even one pixel with the smallest chunk fits.
    """
    fitting = [tile for tile in _tiles(block) if value_bytes * workspace_values(block, tile) <= limit_bytes]
    if not fitting:
        least = value_bytes * workspace_values(block, Tile(1, 1, block.group_width))
        raise UsageError(f"No tile fits into {limit_bytes} bytes. The smallest needs {least}.")
    return min(fitting, key=lambda tile: (*_cost(block, tile), -tile.chunk))


def _tiles(block: FusedBlock) -> list[Tile]:
    heights = [side for side in TILE_SIDES if side < block.height] + [block.height]
    widths = [side for side in TILE_SIDES if side < block.width] + [block.width]
    # Groups never cross chunks, and halving keeps chunks equal.
    chunks = [block.middle]
    while chunks[-1] % (2 * block.group_width) == 0:
        chunks.append(chunks[-1] // 2)
    return [Tile(height, width, chunk) for height in heights for width in widths for chunk in chunks]


def _cost(block: FusedBlock, tile: Tile) -> tuple[int, int]:
    """Return MACs and values moved for the whole map; tiles that overhang it count in full."""
    ops = tile_ops(block, tile)
    tiles = -(-block.height // tile.height) * -(-block.width // tile.width)
    return tiles * sum(op.macs for op in ops), tiles * sum(op.values for op in ops)


def _halo_pixels(block: FusedBlock, tile: Tile) -> int:
    reach = block.kernel_size - block.stride
    return (tile.height * block.stride + reach) * (tile.width * block.stride + reach)
