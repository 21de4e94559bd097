"""Tests of the quantisers, from the checks of the whitepaper's fact sheet."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.shrink.quantizers import (
    affine_params,
    dequantize,
    fake_affine,
    fake_symmetric,
    quantize,
    sqnr_db,
    symmetric_step,
)


def test_worked_values():
    assert affine_params(2.1, 3.5) == (3.5 / 255, 0)
    step, zero = affine_params(-1, 1)
    assert (step, zero) == (2 / 255, 128)
    q = quantize(np.array([1.0, -1.0]), step, zero, 0, 255)
    assert q.tolist() == [255, 0]
    np.testing.assert_allclose(dequantize(q, step, zero), [0.99608, -1.00392], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 0.7), (0.2, 5.0), (-4.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact_and_rounding_is_bounded_idempotent_and_monotone(low, high, bits):
    step, zero = affine_params(low, high, bits)
    assert fake_affine(np.zeros(1), low, high, bits)[0] == 0
    inside = np.linspace((0 - zero) * step, (2**bits - 1 - zero) * step, 1001)
    rounded = fake_affine(inside, low, high, bits)
    assert np.abs(rounded - inside).max() <= step / 2 * (1 + 1e-9)
    np.testing.assert_array_equal(fake_affine(rounded, low, high, bits), rounded)
    assert (np.diff(rounded) >= 0).all()


def test_per_channel_beats_per_layer_and_a_bit_is_worth_6_db():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 8, 3, 3)) * rng.uniform(0.2, 2, (16, 1, 1, 1))
    scores = {bits: sqnr_db(weight, fake_symmetric(weight, bits, axis=0)) for bits in (4, 5, 6, 7, 8)}
    for bits, score in scores.items():
        assert score > sqnr_db(weight, fake_symmetric(weight, bits)) + 1
    assert all(5 < scores[b + 1] - scores[b] < 7.5 for b in (4, 5, 6, 7))


def test_dead_filter_and_narrow_range():
    weight = np.stack([np.zeros(9), np.linspace(-3, 3, 9)])
    step = symmetric_step(weight, axis=0)
    assert np.isfinite(fake_symmetric(weight, axis=0)).all()
    q = quantize(weight, step, 0, -127, 127)
    assert (q[0] == 0).all() and (q[1].min(), q[1].max()) == (-127, 127)
    assert sqnr_db(weight, weight) == float("inf")


@pytest.mark.parametrize("groups", [1, 4])
def test_integer_convolution_of_onnxruntime_equals_the_float_simulation(groups):
    rng = np.random.default_rng(groups)
    x = rng.uniform(-1, 3, (2, 4, 9, 9)).astype(np.float32)
    weight = rng.standard_normal((8, 4 // groups, 3, 3)).astype(np.float32)
    step_x, zero_x = affine_params(x.min(), x.max())
    step_w = symmetric_step(weight, axis=0)
    qx, qw = quantize(x, step_x, zero_x, 0, 255), quantize(weight, step_w, 0, -127, 127)
    bias = rng.integers(-500, 500, 8)
    y = _convolve(dequantize(qx, step_x, zero_x), dequantize(qw, step_w), groups)
    y += (bias * step_x * step_w.ravel()).reshape(1, -1, 1, 1)
    step_y, zero_y = affine_params(y.min(), y.max())
    expected = quantize(y, step_y, zero_y, 0, 255)
    constants = {
        "sx": np.float32(step_x), "zx": np.uint8(zero_x), "w": qw.astype(np.int8),
        "sw": step_w.ravel().astype(np.float32), "zw": np.zeros(8, np.int8), "sy": np.float32(step_y),
        "zy": np.uint8(zero_y), "b": bias.astype(np.int32),
    }  # fmt: skip
    node = helper.make_node("QLinearConv", ["x", *constants], ["y"], pads=[1] * 4, group=groups)
    values = [
        helper.make_tensor_value_info(n, TensorProto.UINT8, [2, c, 9, 9]) for n, c in (("x", 4), ("y", 8))
    ]
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": qx.astype(np.uint8)})[0].astype(int)
    assert np.abs(found - expected).max() <= 1


def _convolve(x, weight, groups):
    """Convolve 3x3 with padding 1, by the definition."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    parts = zip(np.split(patches, groups, 1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", p, w) for p, w in parts], 1)
