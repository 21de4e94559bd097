"""The 8-bit kernels between convolutions: every result equal to numpy's, bit for bit, on every path."""

import numpy as np
import pytest
from int8_library import BUILDS, SIZE, Binary, Window, build_library, call, needs_compiler

from featherweight.compiler import pack_int8

pytestmark = needs_compiler
LENGTHS = (1, 15, 16, 63, 64, 65, 200, 1000)


@pytest.fixture(scope="module", params=BUILDS)
def lib(request, tmp_path_factory):
    """The kernels of one build."""
    return build_library(tmp_path_factory.mktemp("int8_elementwise"), request.param)


def real(value):
    """A float32 argument by address."""
    return np.array([value], np.float32)


def run(lib, name, *arguments, size, dtype=np.uint8, threads=3):
    """Call a kernel whose argument `...` is the output; the four elements behind it must stay."""
    y = np.full(size + 4, 77, dtype)
    call(lib, name, *[y if a is ... else a for a in arguments], threads=threads)
    assert (y[size:] == 77).all()
    return y[:size]


@pytest.mark.parametrize("n", LENGTHS)
def test_unary(lib, n):
    rng = np.random.default_rng(n)
    x, table = rng.integers(0, 256, (2, max(n, 256)), dtype=np.uint8)
    x = x[:n].copy()
    flipped = run(lib, "flip", x, ..., SIZE(n), size=n).view(np.int8)
    np.testing.assert_array_equal(flipped, x.astype(int) - 128)
    np.testing.assert_array_equal(run(lib, "table", x, ..., SIZE(n), table, size=n), table[x])
    got = run(lib, "dequantise", x, ..., SIZE(n), real(0.3), 131, size=n, dtype=np.float32)
    np.testing.assert_array_equal(got, (x.astype(np.float32) - 131) * np.float32(0.3))


@pytest.mark.parametrize("n", LENGTHS)
def test_quantise(lib, n):
    x = np.random.default_rng(n).normal(0, 40, n).astype(np.float32)
    x[::3] = np.round(x[::3]) + 0.5
    x[:4] = np.array([np.nan, np.inf, -np.inf, 1e30], np.float32)[:n]
    for scale, zero in ((1.0, 17), (0.37, 0), (3.0, 255)):
        got = run(lib, "quantise", x, ..., SIZE(n), real(scale), zero, size=n)
        np.testing.assert_array_equal(got, pack_int8.quantise(x, scale, zero))


@pytest.mark.parametrize("n", LENGTHS)
def test_sum_and_product(lib, n):
    rng = np.random.default_rng(n)
    a, b = rng.integers(0, 256, (2, n), dtype=np.uint8)
    setting = Binary(131, 7, 60, 5, 249, 0.41, 0.77)
    va, vb = a.astype(np.int32) - 131, b.astype(np.int32) - 7
    t = np.rint(va.astype(np.float32) * np.float32(0.41) + vb.astype(np.float32) * np.float32(0.77))
    got = run(lib, "add", setting, a, b, ..., SIZE(n), size=n)
    np.testing.assert_array_equal(got, np.clip(t + 60, 5, 249))
    setting = Binary(131, 7, 60, 5, 249, 0.003, 0)
    t = np.rint((va * vb).astype(np.float32) * np.float32(0.003))
    got = run(lib, "multiply", setting, a, b, ..., SIZE(n), size=n)
    np.testing.assert_array_equal(got, np.clip(t + 60, 5, 249))


def test_sum_is_not_a_fused_multiply_add(lib):
    # a * ratio + b * ratio differs between one rounding and two for these: found by search over all pairs.
    a, b = (v.reshape(-1).astype(np.uint8) for v in np.mgrid[0:256, 0:256])
    ratio = np.float32(0.1)
    t = np.rint((a.astype(np.float32) * ratio) + (b.astype(np.float32) * ratio))
    setting = Binary(0, 0, 0, 0, 255, ratio, ratio)
    np.testing.assert_array_equal(run(lib, "add", setting, a, b, ..., SIZE(a.size), size=a.size), t)


@pytest.mark.parametrize(("pixels", "column"), [(1, 16), (49, 48), (10, 21)])
def test_gate_and_global_pool(lib, pixels, column):
    rng = np.random.default_rng(pixels)
    a = rng.integers(0, 256, (pixels, column), dtype=np.uint8)
    gate = rng.integers(0, 256, column, dtype=np.uint8)
    product = (a.astype(np.int32) - 9) * (gate.astype(np.int32) - 3)
    t = np.rint(product.astype(np.float32) * np.float32(0.004))
    got = run(lib, "gate", Binary(9, 3, 12, 0, 255, 0.004, 0), a, gate, ..., pixels, column, size=a.size)
    np.testing.assert_array_equal(got.reshape(a.shape), np.clip(t + 12, 0, 255))
    blocks = column // 16
    sums = a.astype(np.int32)[:, : 16 * blocks].sum(0) - pixels * 50
    ratio = np.float32(1.7) / np.float32(pixels)
    sizes = (pixels, SIZE(column), blocks, 50, ratio.reshape(1), 99)
    got = run(lib, "global_pool", a, ..., *sizes, size=16 * blocks)
    np.testing.assert_array_equal(got, np.clip(np.rint(sums.astype(np.float32) * ratio) + 99, 0, 255))


@pytest.mark.parametrize("average", [0, 1, 2])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 1), (2, 2, 0), (5, 1, 2)])
def test_pool(lib, average, kernel, stride, pad):
    rng = np.random.default_rng(kernel)
    x = rng.integers(0, 256, (2, 9, 8, 32), dtype=np.uint8)
    oh, ow = (9 + 2 * pad - kernel) // stride + 1, (8 + 2 * pad - kernel) // stride + 1
    want = np.zeros((2, oh, ow, 32), np.uint8)
    for row in range(oh):
        for column in range(ow):
            top, left = row * stride - pad, column * stride - pad
            part = x[:, max(top, 0) : top + kernel, max(left, 0) : left + kernel].astype(np.int32)
            if average:
                taps = kernel**2 if average == 2 else part[0, ..., 0].size
                scaled = (part - 100).sum((1, 2)).astype(np.float32) * (np.float32(1.3) / np.float32(taps))
                want[:, row, column] = np.clip(np.rint(scaled) + 77, 0, 255)
            else:
                want[:, row, column] = part.max((1, 2))
    setting = Window(
        2, oh, ow, 9, 8, 2, kernel, kernel, stride, stride, pad, pad, average, 100, 77, 1.3,
        9 * 8 * 32, 8 * 32, 32, oh * ow * 32, ow * 32, 32,
    )  # fmt: skip
    np.testing.assert_array_equal(run(lib, "pool", setting, x, ..., size=want.size).reshape(want.shape), want)


def test_copies(lib):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 256, (35, 48), dtype=np.uint8)
    table = rng.integers(0, 256, 256, dtype=np.uint8)
    got = run(lib, "pad", x, ..., 5, 7, 48, 1, 2, 3, 0, 128, size=9 * 9 * 48).reshape(9, 9, 48)
    want = np.pad(x.reshape(5, 7, 48), ((1, 3), (2, 0), (0, 0)), constant_values=128)
    np.testing.assert_array_equal(got, want)
    for with_table in (None, table):
        y = np.full((35, 100), 77, np.uint8)
        call(lib, "copy", x, SIZE(48), y[:, 7:], SIZE(100), 35, 41, with_table)
        want = np.full((35, 100), 77, np.uint8)
        want[:, 7:48] = x[:, :41] if with_table is None else table[x[:, :41]]
        np.testing.assert_array_equal(y, want)
    got = run(lib, "planar", x, SIZE(48), ..., 35, 41, size=35 * 41)
    np.testing.assert_array_equal(got.reshape(41, 35), x[:, :41].T)


@pytest.mark.parametrize("channels", [8, 48, 65, 116, 128, 200])
def test_gather(lib, channels):
    rng = np.random.default_rng(channels)
    x = rng.integers(0, 256, (17, channels), dtype=np.uint8)
    index = rng.permutation(channels).astype(np.int16)
    got = run(lib, "gather", x, SIZE(channels), ..., SIZE(channels), 17, channels, index, size=x.size)
    np.testing.assert_array_equal(got.reshape(x.shape), x[:, index])


@pytest.mark.parametrize("planes", [1, 3, 4])
def test_image(lib, planes):
    x = np.random.default_rng(4).normal(0, 60, (planes, 9, 37)).astype(np.float32)
    sizes = (planes, 9, 37, 4, 1, 2, 0, 1, real(0.9), 114)
    got = run(lib, "image", x, ..., *sizes, size=10 * 40 * 4).reshape(10, 40, 4)
    want = np.full((10, 40, 4), 114, np.uint8)
    want[1:, 2:39, :planes] = pack_int8.quantise(x, 0.9, 114).transpose(1, 2, 0)
    np.testing.assert_array_equal(got, want)


def test_tables_hold_the_function_of_every_step():
    table = pack_int8.unary_table(lambda v: v / (1 + np.exp(-v)), (0.05, 128), (0.02, 14))
    x = (np.arange(256) - 128) * 0.05
    want = np.clip(np.rint(x / (1 + np.exp(-x)) / 0.02) + 14, 0, 255)
    assert (np.abs(table - want) <= 1).all() and (table == want).mean() > 0.98
