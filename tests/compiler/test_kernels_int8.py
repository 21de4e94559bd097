"""The 8-bit convolutions: every result equal to integer arithmetic in numpy, bit for bit, on every path."""

import numpy as np
import pytest
from int8_library import BUILDS, SLACK, Conv, Depthwise, Out, build_library, call, needs_compiler

from featherweight.compiler import pack_int8
from featherweight.errors import DataError

pytestmark = needs_compiler
TABLE = np.random.default_rng(7).integers(0, 256, 256, dtype=np.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return a function: build name -> ctypes library with every kernel."""
    folder = tmp_path_factory.mktemp("int8_kernels")
    return lambda name: build_library(folder, name)


def pixels(rng, images, rows, columns, channels, stride=None):
    """Random u8 activations (N, H, W, Cs) with noise in the padded lanes, and slack behind them."""
    wide = stride or -(-channels // 16) * 16
    flat = rng.integers(0, 256, images * rows * columns * wide + SLACK, dtype=np.uint8)
    return flat, flat[:-SLACK].reshape(images, rows, columns, wide)


def steps(sums, scale, zero, lo=0, hi=255):
    """The requantisation of the conventions: float32 product, nearest even, saturate."""
    t = np.rint(sums.astype(np.float32) * np.asarray(scale, np.float32)).astype(np.int64)
    return np.clip(t + zero, lo, hi).astype(np.uint8)


def convolve(x, weight, stride, dilation, groups):
    """Exact sums (N, OH, OW, O) of int64 inputs (N, H, W, C) that hold their borders."""
    outputs, narrow, kh, kw = weight.shape
    oh = (x.shape[1] - (kh - 1) * dilation - 1) // stride + 1
    ow = (x.shape[2] - (kw - 1) * dilation - 1) // stride + 1
    sums = np.zeros((len(x), oh, ow, outputs), np.int64)
    wide = outputs // groups
    for g in range(groups):
        for ty in range(kh):
            for tx in range(kw):
                y0, x0 = ty * dilation, tx * dilation
                part = x[:, y0 : y0 + oh * stride : stride, x0 : x0 + ow * stride : stride]
                taps = weight[g * wide : (g + 1) * wide, :, ty, tx].astype(np.int64)
                part = part[:, :oh, :ow, g * narrow : (g + 1) * narrow]
                sums[..., g * wide : (g + 1) * wide] += part @ taps.T
    return sums


def finish(out, sums, scale, setting, residual):
    """What OUT makes of the sums (N, OH, OW, O)."""
    q = steps(sums, scale, setting.q_zero if out == "add" else setting.zero, 0, 255)
    if out == "real":
        t = sums.astype(np.float32) * scale
        return np.clip(t, np.float32(setting.real_lo), np.float32(setting.real_hi))
    if out == "add":
        a = (q.astype(np.int32) - setting.q_zero).astype(np.float32) * np.float32(setting.ratio)
        b = (residual.astype(np.int32) - setting.r_zero).astype(np.float32) * np.float32(setting.r_ratio)
        t = np.rint(a + b).astype(np.int64)
        return np.clip(t + setting.zero, setting.lo, setting.hi).astype(np.uint8)
    if out == "relu":
        return steps(sums, scale, 0)
    if out == "shift":
        return q
    q = np.clip(q, setting.lo, setting.hi)
    return TABLE[q] if out == "table" else q


def out_setting(rng, outputs, shape, wide):
    """Random output parameters for dense outputs (N, OH, OW) in pixels of `wide` elements."""
    column, row = wide, wide * shape[2]
    return Out(
        (outputs - 1) % 16 + 1, row * shape[1], row, column, row * shape[1], row, column,
        int(rng.integers(0, 256)), 3, 250, int(rng.integers(0, 256)), int(rng.integers(0, 256)),
        0.37, 0.61, -2.5, 3.0, TABLE.ctypes.data,
    )  # fmt: skip


def check_output(lib, name, shape, arrays, want, out, wide, residual, scratch=()):
    """Run a convolution over a sentinel and compare; nothing else may change."""
    flat = np.full(want[..., 0].size * wide + SLACK, 77, np.float32 if out == "real" else np.uint8)
    call(lib, name, shape, *arrays, residual, flat, *scratch)
    got = flat[:-SLACK].reshape(*want.shape[:3], wide)
    np.testing.assert_array_equal(got[..., : want.shape[3]], want)
    assert (got[..., want.shape[3] :] == 77).all()
    assert (flat[-SLACK:] == 77).all()


CASES = [
    # channels, outputs, rows, columns, kernel, stride, dilation, groups, tile, out
    (16, 96, 1, 49, 1, 1, 1, 1, (14, 2), "quantise"),
    (24, 40, 7, 9, 1, 1, 1, 1, (7, 2), "quantise"),
    (20, 37, 1, 15, 1, 1, 1, 1, (7, 2), "table"),
    (33, 24, 5, 8, 1, 1, 1, 1, (7, 2), "add"),
    (100, 21, 3, 7, 1, 1, 1, 1, (7, 2), "real"),
    (30, 64, 3, 8, 1, 1, 1, 1, (7, 2), "shift"),
    (40, 48, 3, 8, 1, 1, 1, 1, (7, 2), "relu"),
    (3, 32, 15, 17, 3, 2, 1, 1, (5, 1), "quantise"),
    (17, 50, 9, 11, 3, 1, 1, 1, (3, 3), "quantise"),
    (8, 16, 13, 12, 3, 1, 2, 1, (5, 1), "quantise"),
    (64, 32, 6, 8, 3, 1, 1, 2, (5, 1), "quantise"),
    (24, 24, 6, 8, 3, 1, 1, 6, (5, 1), "quantise"),
    (130, 100, 1, 1, 1, 1, 1, 1, (1, 4), "quantise"),
    (12, 5, 4, 6, 1, 2, 1, 1, (1, 1), "quantise"),
    # 16 columns and 48 channels or more: on the matrix unit where there is one
    (64, 96, 1, 49, 1, 1, 1, 1, (7, 2), "quantise"),
    (24, 40, 7, 33, 1, 1, 1, 1, (7, 2), "add"),
    (100, 16, 2, 16, 1, 1, 1, 1, (7, 2), "table"),
    (65, 33, 3, 50, 1, 1, 1, 1, (7, 2), "real"),
    (48, 40, 5, 36, 3, 2, 1, 1, (7, 2), "relu"),
    (128, 70, 2, 20, 1, 1, 1, 1, (14, 2), "quantise"),
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_convolution_is_exact(library, build, case):
    channels, outputs, rows, columns, kernel, stride, dilation, groups, (mr, nr), out = case
    rng = np.random.default_rng(CASES.index(case))
    flat, x = pixels(rng, 2, rows, columns, channels)
    weight = rng.integers(-128, 128, (outputs, channels // groups, kernel, kernel)).astype(np.int8)
    bias = rng.integers(-3000, 3000, outputs).astype(np.int32)
    x_zero = int(rng.integers(0, 256))
    sums = convolve(x.astype(np.int64) - x_zero, weight, stride, dilation, groups) + bias
    scale = (rng.uniform(0.5, 2, outputs) * 50 / np.abs(sums).max()).astype(np.float32)
    packed, first = pack_int8.conv_weights(weight, groups)
    wide = outputs + 3
    setting = out_setting(rng, outputs, sums.shape, wide)
    blocks, cs = packed.shape[0], x.shape[3]
    starts = None if first is None else np.array(first, np.int32)
    shape = Conv(
        2, sums.shape[1], sums.shape[2], kernel, kernel, packed.shape[3], blocks, int(rng.integers(2)),
        rows * columns * cs, stride * columns * cs, stride * cs, dilation * columns * cs, dilation * cs,
        None if starts is None else starts.ctypes.data, setting,
    )  # fmt: skip
    residual = rng.integers(0, 256, sums[..., 0].size * wide + SLACK, dtype=np.uint8)
    want = finish(out, sums, scale, setting, residual[:-SLACK].reshape(*sums.shape[:3], wide)[..., :outputs])
    sums_start, factors = (
        pack_int8.conv_bias(weight, bias, x_zero),
        pack_int8.requantise(1, scale, None, outputs),
    )
    arrays = (flat, packed, sums_start, factors)
    name = f"conv_{mr}_{nr}_{blocks % nr or nr}_{out}"
    check_output(library(build), name, shape, arrays, want, out, wide, residual)


def test_halves_round_to_even_and_ends_saturate(library):
    weight = np.ones((1, 1, 1, 1), np.int8)
    flat = np.arange(256 + SLACK, dtype=np.int64).astype(np.uint8)
    x = np.zeros((256, 4), np.uint8)
    x[:, 0] = flat[:256]
    x = np.concatenate([x.reshape(-1), np.zeros(SLACK, np.uint8)])
    packed, _ = pack_int8.conv_weights(weight)
    bias = pack_int8.conv_bias(weight, np.array([-128], np.int32), 0)
    scale = pack_int8.requantise(1, 0.5, None, 1)
    out = Out(1, 0, 0, 1, 0, 0, 0, 101, 0, 255)
    shape = Conv(1, 1, 256, 1, 1, 1, 1, 0, 0, 0, 4, 0, 0, None, out)
    want = np.clip(np.rint((np.arange(256) - 128) * 0.5) + 101, 0, 255).astype(np.uint8)
    assert want[1] == 101 - 64 and want[3] == 101 - 62  # -63.5 and -62.5 go to the even neighbours
    check_output(library("native"), "conv_5_1_1_quantise", shape, (x, packed, bias, scale),
                 want.reshape(1, 1, 256, 1), "quantise", 1, None)  # fmt: skip


DEPTHWISE = [
    # channels, rows, columns, kernel (kh, kw, stride), padding, row stride, dilation, out
    (32, 9, 9, (3, 3, 1), 1, 1, 1, "quantise"),
    (24, 14, 15, (3, 3, 2), 1, 2, 1, "quantise"),
    (19, 8, 11, (3, 3, 2), 1, 2, 1, "table"),
    (40, 7, 6, (3, 3, 2), 1, 2, 1, "add"),
    (21, 7, 9, (3, 3, 2), 0, 2, 1, "real"),
    (32, 7, 9, (3, 3, 2), 1, 2, 1, "relu"),
    (16, 7, 7, (5, 5, 1), 2, 1, 1, "quantise"),
    (48, 12, 13, (5, 5, 2), 2, 2, 1, "quantise"),
    (16, 10, 12, (7, 7, 1), 3, 1, 1, "quantise"),
    (16, 3, 12, (1, 5, 1), 2, 1, 1, "quantise"),
    (16, 9, 3, (3, 1, 1), 1, 1, 2, "quantise"),
    (16, 9, 22, (2, 4, 4), 1, 3, 1, "quantise"),
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", DEPTHWISE, ids=lambda case: "-".join(map(str, case)))
def test_depthwise_is_exact(library, build, case):
    channels, rows, columns, (kh, kw, stride), pad, stride_rows, dilation, out = case
    rng = np.random.default_rng(DEPTHWISE.index(case))
    flat, x = pixels(rng, 2, rows, columns, channels)
    weight = rng.integers(-128, 128, (channels, 1, kh, kw)).astype(np.int8)
    bias = rng.integers(-500, 500, channels).astype(np.int32)
    x_zero = int(rng.integers(0, 256))
    border = np.pad(x[..., :channels].astype(np.int64) - x_zero, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    spread = np.zeros((channels, 1, (kh - 1) * dilation + 1, kw), np.int8)
    spread[:, :, ::dilation] = weight
    dense = convolve(border, spread, 1, 1, channels)
    sums = dense[:, ::stride_rows, ::stride] + bias
    scale = (rng.uniform(0.5, 2, channels) * 50 / np.abs(sums).max()).astype(np.float32)
    wide = channels + 5
    setting = out_setting(rng, channels, sums.shape, wide)
    cs = x.shape[3]
    shape = Depthwise(
        2, sums.shape[1], sums.shape[2], rows, columns, stride_rows, dilation, pad, pad, cs // 16, x_zero,
        rows * columns * cs, columns * cs, cs, setting,
    )  # fmt: skip
    residual = rng.integers(0, 256, sums[..., 0].size * wide + SLACK, dtype=np.uint8)
    want = finish(out, sums, scale, setting, residual[:-SLACK].reshape(*sums.shape[:3], wide)[..., :channels])
    arrays = (
        flat,
        pack_int8.depthwise_weights(weight, stride),
        pack_int8.conv_bias(weight, bias, x_zero),
        pack_int8.requantise(1, scale, None, channels),
    )
    size = pack_int8.depthwise_scratch(channels, sums.shape[2], (kh, kw), stride, dilation)
    scratch = np.full(size + SLACK, 9, np.uint8)
    name = f"depthwise_{kh}_{kw}_{stride}_{out}"
    check_output(library(build), name, shape, arrays, want, out, wide, residual, (scratch,))
    assert (scratch[size:] == 9).all()


def test_asymmetric_weights_are_refused_and_shifted_ones_taken():
    shifted = pack_int8.signed_weights(np.array([[0, 128, 255]], np.uint8), 128)
    np.testing.assert_array_equal(shifted, [[-128, 0, 127]])
    with pytest.raises(DataError, match="symmetrically"):
        pack_int8.signed_weights(np.array([[0, 255]], np.uint8), 100)


def test_sums_that_leave_32_bits_are_refused():
    with pytest.raises(DataError, match="overflow"):
        pack_int8.conv_bias(np.full((1, 70_000, 1, 1), 127, np.int8), None, 255)
