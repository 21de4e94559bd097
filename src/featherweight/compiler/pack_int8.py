"""Order weights and fold scales for the 8-bit kernels `kernels/int8*.h`.

Inside a program every 8-bit tensor is unsigned: value = (q - zero) * scale, q and zero in 0..255. A signed
tensor of the graph is the same tensor with 128 added to q and zero (`unsigned_zero`). Weights are signed with
zero point 0; `signed_weights` brings others there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featherweight.errors import DataError

LANES = 16
Bytes = NDArray[np.int8]
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Table = NDArray[np.uint8]


def blocks_of(channels: int) -> int:
    """Return how many blocks of 16 hold the channels."""
    return -(-channels // LANES)


def unsigned_zero(zero: int, dtype: np.dtype) -> int:
    """Return the zero point of an activation tensor once it is stored unsigned.

    >>> unsigned_zero(-128, np.dtype("int8"))
    0
    """
    return int(zero) + (128 if dtype == np.int8 else 0)


def signed_weights(weight: np.ndarray, zero: ArrayLike) -> Bytes:
    """Return weights minus their zero points as int8.

    Args:
        weight: (O, ...) int8 or uint8.
        zero: zero point, one or one for each output.

    Raises:
        DataError: a difference does not fit 8 bits, as with an asymmetric weight quantiser.
    """
    zeros = np.broadcast_to(np.asarray(zero, np.int32).reshape(-1), weight.shape[:1])
    shifted = weight.astype(np.int32) - zeros.reshape((-1,) + (1,) * (weight.ndim - 1))
    if shifted.size and (shifted.min() < -128 or shifted.max() > 127):
        raise DataError(
            f"Weights minus their zero point span {shifted.min()} to {shifted.max()}; the integer kernels "
            "take -128 to 127. Quantise the weights symmetrically."
        )
    return shifted.astype(np.int8)


def conv_bias(weight: Bytes, bias: Ints | None, x_zero: int) -> Ints:
    """Return the bias (16 * blocks) with the input's zero point folded in: bias - x_zero * sum(weights).

    Args:
        weight: (O, I, kh, kw), signed.
        bias: (O,) in steps of x_scale * w_scale, or None.
        x_zero: the input's zero point, unsigned.

    Raises:
        DataError: a sum could leave 32 bits.
    """
    flat = weight.reshape(len(weight), -1).astype(np.int64)
    start = np.zeros(len(weight), np.int64) if bias is None else bias.astype(np.int64)
    total = start - x_zero * flat.sum(1)
    reach = np.abs(total) + 255 * np.abs(flat).sum(1)
    if reach.size and reach.max() >= 2**31:
        raise DataError(
            "An 8-bit convolution can overflow its 32-bit sums: too many weights for one output, or a "
            "bias far outside the range of its inputs. Leave this layer in float."
        )
    return _padded(total, np.int32)


def requantise(x_scale: float, w_scale: ArrayLike, y_scale: float | None, outputs: int) -> Floats:
    """Return the factor (16 * blocks) from int32 sums to output steps, rounded as onnxruntime rounds it.

    Args:
        x_scale: step of the input.
        w_scale: step of the weights, one or one for each output.
        y_scale: step of the output; None gives the factor to real values.
        outputs: output channels.
    """
    scale = np.broadcast_to(np.float32(x_scale) * np.asarray(w_scale, np.float32).reshape(-1), (outputs,))
    return _padded(scale if y_scale is None else scale / np.float32(y_scale), np.float32)


def conv_weights(weight: Bytes, groups: int = 1) -> tuple[Bytes, tuple[int, ...] | None]:
    """Pack a convolution's weights and say where the blocks' inputs begin.

    Args:
        weight: (O, I / groups, kh, kw), signed. A fully connected layer has kh = kw = 1.
        groups: groups of the convolution.

    Returns:
        ([block][kh][kw][k4][16][4], `fw_int8_conv.first` or None if every block starts at channel 0).
        depth4 is the shape's k4. A block that meets several groups holds zeros for the others' channels.
    """
    outputs, narrow, rows, columns = weight.shape
    blocks, wide = blocks_of(outputs), outputs // groups
    starts = [block * LANES // wide * narrow for block in range(blocks)]
    ends = [((min((b + 1) * LANES, outputs) - 1) // wide + 1) * narrow for b in range(blocks)]
    k4 = max(-(-(end - start) // 4) for start, end in zip(starts, ends, strict=True))
    packed = np.zeros((blocks, rows, columns, k4, LANES, 4), np.int8)
    for output in range(outputs):
        block, lane = divmod(output, LANES)
        inputs = output // wide * narrow - starts[block] + np.arange(narrow)
        packed[block, :, :, inputs // 4, lane, inputs % 4] = weight[output].reshape(narrow, rows, columns)
    return packed, None if groups == 1 else tuple(starts)


def shifts_of(stride: int) -> tuple[int, ...]:
    """Return the positions inside a quad of columns at which the outputs of a depthwise row start."""
    return tuple(sorted({output * stride % 4 for output in range(4)}))


def depthwise_weights(weight: Bytes, stride: int) -> Bytes:
    """Pack depthwise weights as [block][kh][slot][16][4], see `int8_depthwise.h`.

    Args:
        weight: (C, 1, kh, kw), signed.
        stride: stride of the columns.
    """
    channels, _, rows, columns = weight.shape
    slots = [(shift, part) for shift in shifts_of(stride) for part in range((shift + columns - 1) // 4 + 1)]
    packed = np.zeros((blocks_of(channels), rows, len(slots), LANES, 4), np.int8)
    by_block = np.zeros((blocks_of(channels) * LANES, rows, columns), np.int8)
    by_block[:channels] = weight[:, 0]
    by_block = by_block.reshape(-1, LANES, rows, columns)
    for slot, (shift, part) in enumerate(slots):
        for column in range(4):
            tap = 4 * part + column - shift
            if 0 <= tap < columns:
                packed[:, :, slot, :, column] = by_block[..., tap].transpose(0, 2, 1)
    return packed


def depthwise_scratch(
    channels: int, columns: int, kernel: tuple[int, int], stride: int, dilation: int = 1
) -> int:
    """Return the bytes that one thread needs to run `FW_DEFINE_INT8_DEPTHWISE`.

    Args:
        channels: channels of the layer.
        columns: output columns.
        kernel: (rows, columns).
        stride: stride of the columns.
        dilation: dilation of the rows.
    """
    quads = (columns - 1) // 4 * stride + (3 * stride + kernel[1] - 1) // 4 + 1
    return blocks_of(channels) * quads * 64 * ((kernel[0] - 1) * dilation + 1)


def unary_table(
    function: Callable[[np.ndarray], np.ndarray], x: tuple[float, int], y: tuple[float, int]
) -> Table:
    """Return the 256 outputs of a function of one 8-bit tensor.

    Args:
        function: of float32 values.
        x: (scale, zero) of the input, unsigned.
        y: (scale, zero) of the output, unsigned.

    >>> int(unary_table(lambda v: v, (0.5, 0), (1.0, 0))[7])  # 3.5 rounds to the even 4
    4
    """
    values = (np.arange(256, dtype=np.int32) - x[1]).astype(np.float32) * np.float32(x[0])
    return quantise(function(values), *y)


def quantise(values: np.ndarray, scale: float, zero: int) -> Table:
    """Return float32 values as unsigned steps: nearest, ties to even, saturated; NaN becomes the lowest."""
    steps = np.rint(np.asarray(values, np.float32) / np.float32(scale))
    return np.clip(np.nan_to_num(steps, nan=-np.inf) + zero, 0, 255).astype(np.uint8)


def _padded(values: np.ndarray, dtype: type) -> np.ndarray:
    """Return per-output values padded with zeros to whole blocks."""
    padded = np.zeros(blocks_of(len(values)) * LANES, dtype)
    padded[: len(values)] = values
    return padded
