"""Vector mathematics, pools, norms, layouts: compiled alone and held against numpy in float64."""

import shutil

import numpy as np
import pytest
from float_kernels import build, call, noise, to_pixel

__all__ = ["build"]
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def erf(x):
    import math

    return np.vectorize(math.erf, otypes=[float])(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# name: (reference, least and greatest argument, greatest error in ulp as vmath.h states it, call)
MATHS = {
    "exp": (np.exp, -87, 88.7, 2, "vf_exp(v)"),
    "expm1": (np.expm1, -30, 88, 4, "vf_expm1(v)"),
    "log": (np.log, 1e-37, 1e38, 2, "vf_log(v)"),
    "tanh": (np.tanh, -12, 12, 3, "vf_tanh(v)"),
    "sigmoid": (sigmoid, -80, 80, lambda x: 4 + np.abs(x), "vf_sigmoid(v)"),
    "erf": (erf, -5, 5, 5, "vf_erf(v)"),
}
ACTIVATIONS = {
    "silu": (lambda x: x * sigmoid(x), "vf_silu(v)"),
    "gelu": (lambda x: x / 2 * (1 + erf(x / np.sqrt(2))), "vf_gelu(v)"),
    "gelu_tanh": (
        lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "vf_gelu_tanh(v)",
    ),
    "softplus": (lambda x: np.logaddexp(0, x), "vf_softplus(v)"),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), "vf_mish(v)"),
    "elu": (lambda x: np.where(x > 0, x, 0.7 * np.expm1(x)), "vf_elu(v, 0.7f)"),
    "hard_swish": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), "vf_hard_swish(v)"),
    "leaky_relu": (lambda x: np.where(x > 0, x, 0.1 * x), "vf_leaky_relu(v, 0.1f)"),
    "relu6": (lambda x: np.clip(x, 0, 6), "vf_relu6(v)"),
    "softsign": (lambda x: x / (1 + np.abs(x)), "vf_softsign(v)"),
    "round": (np.round, "vf_round(v)"),
    "floor": (np.floor, "vf_floor(v)"),
    "ceil": (np.ceil, "vf_ceil(v)"),
    "sqrt": (lambda x: np.sqrt(np.abs(x)), "vf_sqrt(vf_abs(v))"),
    "map": (np.sin, "vf_map(sinf, v)"),
}


@pytest.fixture(scope="module")
def maths(build):
    calls = {name: entry[-1] for name, entry in {**MATHS, **ACTIVATIONS}.items()}
    return build(
        '#include "vmath.h"\n'
        + "".join(
            f"""void {name}_all(const float *x, float *y, int n);
void {name}_all(const float *x, float *y, int n) {{
    for (int i = 0; i < n; i += VL) {{ const vf v = vf_load(x + i); vf_store(y + i, {expression}); }}
}}
"""
            for name, expression in calls.items()
        )
    )


def apply(library, name, x):
    y = np.empty_like(x)
    call(getattr(library, f"{name}_all"), x, y, len(x))
    return y


@pytest.mark.parametrize("name", MATHS)
def test_mathematics(maths, name):
    """Within the stated ulp over the whole range, and right at its edges."""
    reference, low, high, most, _ = MATHS[name]
    if name == "log":
        x = np.geomspace(low, high, 1 << 18).astype(np.float32)
        x[: 1 << 16] = np.linspace(0.5, 2, 1 << 16)
    else:
        x = np.linspace(low, high, 1 << 18).astype(np.float32)
        x[: 1 << 16] = np.geomspace(1e-30, 1, 1 << 16)
    expected = reference(x.astype(float))
    ulp = np.abs(apply(maths, name, x) - expected) / np.spacing(np.abs(expected).astype(np.float32))
    excess = ulp - (most(x) if callable(most) else most)
    assert excess.max() <= 0, (name, ulp.max(), x[excess.argmax()])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(maths, name):
    x = np.concatenate([np.linspace(-30, 30, 1 << 14), [0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 100, -100] * 2])
    expected = ACTIVATIONS[name][0](x.astype(np.float32).astype(float))
    got = apply(maths, name, x.astype(np.float32))
    assert (np.abs(got - expected) <= 1e-6 * np.maximum(1, np.abs(x))).all()


def test_special_values(maths):
    """Infinities, zeros, overflow, underflow; NaN stays."""
    x = np.array([np.inf, -np.inf, 0.0, 200.0, -200.0, np.nan, 1e-40, -1.0] * 2, np.float32)
    expected = {
        "exp": [np.inf, 0, 1, np.inf, 0, np.nan, 1, np.exp(-1)],
        "log": [np.inf, np.nan, -np.inf, np.log(200), np.nan, np.nan, np.log(1e-40), np.nan],
        "tanh": [1, -1, 0, 1, -1, np.nan, 1e-40, np.tanh(-1)],
        "sigmoid": [1, 0, 0.5, 1, 0, np.nan, 0.5, sigmoid(-1)],
        "erf": [1, -1, 0, 1, -1, np.nan, 1e-40, erf(np.array(-1.0))],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(apply(maths, name, x)[:8], values, rtol=1e-5, atol=1e-30, err_msg=name)
    for name in ("silu", "gelu", "relu6", "hard_swish", "leaky_relu", "elu", "mish", "softplus"):
        assert np.isnan(apply(maths, name, x)[5]), name


ROWS = """
#include "softmax.h"
#define NORM const float *x, const float *g, const float *b
#define SIZES int n, int c, int whole, int image, int xs, int ys
void softmax(const float *x, float *y, SIZES, int logarithm, int threads);
void softmax(const float *x, float *y, SIZES, int logarithm, int threads) {
    const fw_rows s = {n, c, whole, xs, ys, image};
    for (int t = 0; t < threads; t++) (logarithm ? fw_log_softmax : fw_softmax)(&s, x, y, t, threads);
}
void layer(NORM, float *y, SIZES, int threads);
void layer(NORM, float *y, SIZES, int threads) {
    const fw_rows s = {n, c, whole, xs, ys, image};
    for (int t = 0; t < threads; t++) fw_layer_norm(&s, x, g, b, 1e-5f, y, t, threads);
}
void group(NORM, float *w, float *y, SIZES, int groups, int threads);
void group(NORM, float *w, float *y, SIZES, int groups, int threads) {
    const fw_rows s = {n, c, whole, xs, ys, image};
    for (int t = 0; t < threads; t++) fw_group_norm(&s, groups, x, g, b, 1e-5f, w, y, t, threads);
}
"""


@pytest.fixture(scope="module")
def rows(build):
    return build(ROWS)


def padded(x, floats):
    """Return rows (n, c) with zeros up to `floats` each."""
    return np.pad(x, ((0, 0), (0, floats - x.shape[1]))).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 5, 16, 33])
def test_softmax(rows, channels):
    """Tight rows in place and padded rows; large values do not overflow."""
    x = noise(7, channels) * 50
    expected = np.exp(x.astype(float) - x.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    y = x.copy()
    call(rows.softmax, y, y, 7, channels, 0, 7, channels, channels, 0, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-7)
    call(rows.softmax, x, y, 7, channels, 0, 7, channels, channels, 1, 1)
    np.testing.assert_allclose(
        y, x - np.logaddexp.reduce(x.astype(float), axis=1)[:, None], rtol=1e-5, atol=1e-4
    )
    floats = -(-channels // rows.lanes()) * rows.lanes()
    wide = np.full((7, floats), np.nan, np.float32)
    call(rows.softmax, padded(x, floats), wide, 7, channels, 1, 7, floats, floats, 0, 3)
    np.testing.assert_allclose(wide, padded(expected, floats), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 24, 35])
def test_layer_norm(rows, channels):
    """A mean far from zero costs no accuracy; the padding becomes zero."""
    lanes = rows.lanes()
    floats = -(-channels // lanes) * lanes
    x, gamma, beta = noise(6, channels) + 300, noise(1, channels), noise(2, channels)[:1]
    y = np.full((6, floats), np.nan, np.float32)
    scale, shift = padded(gamma, floats), padded(beta, floats)
    call(rows.layer, padded(x, floats), scale, shift, y, 6, channels, 1, 6, floats, floats, 2)
    exact = x.astype(float)
    expected = (exact - exact.mean(1, keepdims=True)) / np.sqrt(
        exact.var(1, keepdims=True) + 1e-5
    ) * gamma + beta
    np.testing.assert_allclose(y, padded(expected, floats), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_group_norm(rows, groups):
    lanes, channels = rows.lanes(), 12
    floats = -(-channels // lanes) * lanes
    x, gamma, beta = noise(2, 150, channels) * 3 + 5, noise(1, channels), noise(2, channels)[:1]
    exact = x.astype(float).reshape(2, 150, groups, -1)
    normal = (exact - exact.mean((1, 3), keepdims=True)) / np.sqrt(exact.var((1, 3), keepdims=True) + 1e-5)
    expected = normal.reshape(300, channels) * gamma + beta
    y = padded(x.reshape(300, channels), floats)
    work = np.empty(2 * 2 * floats, np.float32)
    scale, shift = padded(gamma, floats), padded(beta, floats)
    call(rows.group, y, scale, shift, work, y, 300, channels, 1, 150, floats, floats, groups, 2)
    np.testing.assert_allclose(y[:, :channels], expected, rtol=1e-4, atol=1e-4)


POOL = """
#include "pool.h"
void pool(const int *f, const float *x, float *y, int kind, int threads);
void pool(const int *f, const float *x, float *y, int kind, int threads) {
    const int v = (f[14] + VL - 1) / VL, cs = v * VL;
    const fw_pool s = {f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7], f[8], f[9], f[10], f[11], f[12], v,
                       f[13], f[15], f[16], f[3] * f[4] * cs, f[4] * cs, cs, f[1] * f[2] * cs, f[2] * cs, cs};
    for (int t = 0; t < threads; t++) {
        if (kind == 0) fw_max_pool(&s, x, y, t, threads);
        if (kind == 1) fw_average_pool(&s, x, y, t, threads);
        if (kind > 1) fw_global_pool(&s, kind == 3, x, y, t, threads);
    }
}
"""


@pytest.fixture(scope="module")
def pools(build):
    return build(POOL)


def pool_directly(x, taps, stride, dilation, pad, size, maximum, include, bottom):
    """Return the pool in float64, window by window."""
    y = np.zeros((*x.shape[:2], *size))
    height, width = x.shape[2:]
    for r in range(size[0]):
        for c in range(size[1]):
            at = [
                (r * stride + t * dilation - pad, c * stride + u * dilation - pad)
                for t in range(taps)
                for u in range(taps)
            ]
            inside = [(a, b) for a, b in at if 0 <= a < height and 0 <= b < width]
            values = np.stack([x[:, :, a, b] for a, b in inside]).astype(float)
            counted = [1 for a, b in at if a < height + bottom and b < width + bottom] if include else inside
            y[:, :, r, c] = values.max(0) if maximum else values.sum(0) / len(counted)
    return y


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    ("channels", "taps", "stride", "dilation", "pad", "size", "include", "bottom"),
    [
        (24, 3, 2, 1, 1, (4, 5), 0, 1),
        (70, 3, 1, 2, 2, (7, 9), 0, 2),
        (5, 2, 2, 1, 0, (4, 5), 1, 0),
        (8, 3, 2, 1, 1, (4, 5), 1, 1),
    ],
)
def test_pools(pools, kind, channels, taps, stride, dilation, pad, size, include, bottom):
    """Borders, dilation, a window that hangs over the end (ceil mode), both ways to count."""
    x, lanes = noise(2, channels, 7, 9), pools.lanes()
    y = np.full((2, *size, -(-channels // lanes) * lanes), np.nan, np.float32)
    fields = [2, *size, 7, 9, taps, taps, stride, stride, dilation, dilation, pad, pad, include, channels]
    fields += [7 + bottom * include, 9 + bottom * include]
    call(pools.pool, np.array(fields, np.int32), np.nan_to_num(to_pixel(x, lanes)), y, kind, 3)
    expected = pool_directly(x, taps, stride, dilation, pad, size, kind == 0, include, bottom)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2)[:, :channels], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("channels", [7, 100])
def test_global_pool(pools, kind, channels):
    x, lanes = noise(2, channels, 6, 11) - 3, pools.lanes()
    y = np.full((2, -(-channels // lanes) * lanes), np.nan, np.float32)
    fields = np.array([2, 1, 1, 6, 11, *[1] * 6, 0, 0, 0, channels, 0, 0], np.int32)
    call(pools.pool, fields, np.nan_to_num(to_pixel(x, lanes)), y, kind, 2)
    expected = x.max((2, 3)) if kind == 3 else x.astype(float).mean((2, 3))
    np.testing.assert_allclose(y[:, :channels], expected, rtol=1e-5)


LAYOUT = """
#include "layout.h"
void move(const long *f, const float *x, float *y, int kind, int threads);
void move(const long *f, const float *x, float *y, int kind, int threads) {
    const fw_layout s = {(int)f[0], (int)f[1], (int)f[2], (int)f[3], (int)f[4], (int)f[5], (int)f[6],
                         (int)f[7], (int)f[8], f[9], f[10], f[11], f[12], f[13], 0};
    for (int t = 0; t < threads; t++)
        (kind == 0 ? fw_to_pixel : kind == 1 ? fw_from_pixel : fw_pad)(&s, x, y, t, threads);
}
"""


@pytest.mark.parametrize("channels", [1, 3, 4, 20, 33])
def test_layouts(build, channels):
    """Plain to pixel with a border, back again, and a border added to a pixel tensor."""
    library = build(LAYOUT)
    lanes = library.lanes()
    stored = channels if channels < 4 else -(-channels // lanes) * lanes
    x = noise(2, channels, 5, 19)
    expected = np.pad(x, ((0, 0), (0, stored - channels), (1, 2), (3, 0))).transpose(0, 2, 3, 1)
    y = np.full(expected.shape, np.nan, np.float32)
    strides = [8 * 22 * stored, 22 * stored, stored]
    call(library.move, np.array([2, channels, 5, 19, stored, 1, 3, 2, 0, *strides, 0, 0]), x, y, 0, 2)
    np.testing.assert_array_equal(y, expected)
    inner = np.ascontiguousarray(y[:, 1:6, 3:])
    tight = [5 * 19 * stored, 19 * stored, stored]
    back = np.full(x.shape, np.nan, np.float32)
    call(library.move, np.array([2, channels, 5, 19, stored, 0, 0, 0, 0, *tight, 0, 0]), inner, back, 1, 3)
    np.testing.assert_array_equal(back, x)
    again = np.full(expected.shape, np.nan, np.float32)
    call(
        library.move,
        np.array([2, channels, 5, 19, stored, 1, 3, 2, 0, *strides, *tight[:2]]),
        inner,
        again,
        2,
        2,
    )
    np.testing.assert_array_equal(again, expected)
