"""The 8-bit kernels against onnxruntime's QDQ graphs: convolution, sum, gate, pool, table."""

import numpy as np
import pytest
from int8_library import SIZE, SLACK, Binary, Conv, Depthwise, Out, build_library, call, needs_compiler
from onnx import TensorProto, helper, numpy_helper

from featherweight.compiler import pack_int8

ort = pytest.importorskip("onnxruntime")
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    """The kernels for this machine."""
    return build_library(tmp_path_factory.mktemp("int8_ort"), "native")


class Graph:
    """A QDQ graph under construction."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def constant(self, value):
        self.count += 1
        self.constants.append(numpy_helper.from_array(value, f"k{self.count}"))
        return f"k{self.count}"

    def node(self, op, *inputs, **attributes):
        self.count += 1
        self.nodes.append(helper.make_node(op, list(inputs), [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def quantised(self, op, name, scale, zero, **attributes):
        """QuantizeLinear or DequantizeLinear with constant parameters (`zero` an array of its dtype)."""
        scales = self.constant(np.asarray(scale, np.float32))
        return self.node(op, name, scales, self.constant(zero), **attributes)

    def run(self, inputs, output, optimised):
        """Run with u8 inputs {name: array}; the output is a u8 tensor."""
        values = [helper.make_tensor_value_info(n, TensorProto.UINT8, a.shape) for n, a in inputs.items()]
        result = helper.make_empty_tensor_value_info(output)
        graph = helper.make_graph(self.nodes, "qdq", values, [result], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        options = ort.SessionOptions()
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, inputs)[0]


def u8(value):
    return np.uint8(value)


def agree(got, want, exact):
    """At most one step apart on at most 0.1 % of the values; none where both compute in integers."""
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= (0 if exact else 1)
    assert (difference > 0).mean() <= 1e-3


@pytest.mark.parametrize("optimised", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("groups", [1, 48], ids=["dense", "depthwise"])
def test_convolution(lib, groups, optimised):
    rng = np.random.default_rng(groups)
    channels, size = 48, 15
    x = rng.integers(0, 256, (1, size, size, channels), dtype=np.uint8)
    weight = rng.integers(-127, 128, (channels, channels // groups, 3, 3)).astype(np.int8)
    bias = rng.integers(-4000, 4000, channels).astype(np.int32)
    w_scale = rng.uniform(0.001, 0.01, channels).astype(np.float32)
    x_scale, x_zero, y_zero = np.float32(0.023), 117, 96
    y_scale = np.float32(0.05 if groups == 1 else 0.01)
    graph = Graph()
    real = graph.quantised("DequantizeLinear", "x", x_scale, u8(x_zero))
    zeros = np.zeros(channels, np.int8)
    kernel = graph.quantised("DequantizeLinear", graph.constant(weight), w_scale, zeros, axis=0)
    offset = graph.quantised(
        "DequantizeLinear", graph.constant(bias), x_scale * w_scale, zeros.astype(np.int32), axis=0
    )
    y = graph.node("Conv", real, kernel, offset, group=groups, pads=[1, 1, 1, 1])
    y = graph.quantised("QuantizeLinear", y, y_scale, u8(y_zero))
    want = graph.run({"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2))}, y, optimised).transpose(0, 2, 3, 1)
    got = np.zeros(size * size * channels, np.uint8)
    image, row = size * size * channels, size * channels
    out = Out(16, image, row, channels, 0, 0, 0, y_zero, 0, 255)
    sums = pack_int8.conv_bias(weight, bias, x_zero)
    scale = pack_int8.requantise(x_scale, w_scale, y_scale, channels)
    if groups == 1:
        wide = size + 2
        border = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=x_zero).reshape(-1)
        border = np.concatenate([border, np.zeros(SLACK, np.uint8)])
        shape = Conv(
            1, size, size, 3, 3, 12, 3, 0, 0, wide * channels, channels, wide * channels, channels, None, out
        )
        arrays = (border, pack_int8.conv_weights(weight)[0], sums, scale, None, got)
        call(lib, "conv_3_3_3_quantise", shape, *arrays)
    else:
        flat = np.concatenate([x.reshape(-1), np.zeros(SLACK, np.uint8)])
        shape = Depthwise(1, size, size, size, size, 1, 1, 1, 1, 3, x_zero, image, row, channels, out)
        scratch = np.zeros(pack_int8.depthwise_scratch(channels, size, (3, 3), 1), np.uint8)
        arrays = (flat, pack_int8.depthwise_weights(weight, 1), sums, scale, None, got, scratch)
        call(lib, "depthwise_3_3_1_quantise", shape, *arrays)
    assert ((want > 0) & (want < 255)).mean() > 0.3
    agree(got.reshape(want.shape), want, exact=optimised)


@pytest.mark.parametrize("optimised", [True, False], ids=["integers", "floats"])
def test_sum_product_and_mean(lib, optimised):
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 256, (2, 1, 64, 14, 14), dtype=np.uint8)
    gate = rng.integers(0, 256, (1, 64, 1, 1), dtype=np.uint8)
    (sa, za), (sb, zb), (sy, zy) = (np.float32(0.031), 120), (np.float32(0.017), 3), (np.float32(0.043), 100)
    binary = Binary(za, zb, zy, 0, 255, sa / sy, sb / sy)
    got = np.zeros(a.size, np.uint8)
    for op, other in (("Add", b), ("Mul", gate), ("GlobalAveragePool", None)):
        graph = Graph()
        real = graph.quantised("DequantizeLinear", "a", sa, u8(za))
        inputs = {"a": a}
        if other is not None:
            second = graph.quantised("DequantizeLinear", "b", sb, u8(zb))
            inputs["b"] = other
            y = graph.node(op, real, second)
        else:
            y = graph.node(op, real)
        want = graph.run(inputs, graph.quantised("QuantizeLinear", y, sy, u8(zy)), optimised)
        got[:] = 0
        if op == "Add":
            call(lib, "add", binary, a, b, got, SIZE(a.size))
        elif op == "Mul":
            product = Binary(za, zb, zy, 0, 255, np.float32(sa * sb) / sy, 0)
            pixels = np.ascontiguousarray(a.reshape(64, 196).T)
            call(lib, "gate", product, pixels, gate, got, 196, 64)
            want = want.reshape(64, 196).T
        else:
            pixels = np.ascontiguousarray(a.reshape(64, 196).T)
            ratio = np.array([sa / (np.float32(196) * sy)], np.float32)
            call(lib, "global_pool", pixels, got, 196, SIZE(64), 4, za, ratio, zy)
        agree(got[: want.size].reshape(want.shape), want, exact=False)


def test_tables_reproduce_a_chain_of_quantised_functions(lib):
    x = np.arange(256, dtype=np.uint8)
    (sx, zx), (ss, zs), (sy, zy) = (np.float32(0.05), 130), (np.float32(1 / 255), 0), (np.float32(0.026), 11)
    graph = Graph()
    real = graph.quantised("DequantizeLinear", "x", sx, u8(zx))
    sigmoid = graph.quantised("QuantizeLinear", graph.node("Sigmoid", real), ss, u8(zs))
    product = graph.node("Mul", real, graph.quantised("DequantizeLinear", sigmoid, ss, u8(zs)))
    want = graph.run({"x": x}, graph.quantised("QuantizeLinear", product, sy, u8(zy)), optimised=False)

    def silu(v):
        steps = pack_int8.quantise(1 / (1 + np.exp(-v.astype(np.float64))), ss, zs)
        return v * ((steps.astype(np.int32) - zs).astype(np.float32) * ss)

    table = pack_int8.unary_table(silu, (sx, zx), (sy, zy))
    got = np.zeros(256, np.uint8)
    call(lib, "table", x, got, SIZE(256), table)
    assert np.abs(got.astype(int) - want).max() <= 1 and (got != want).sum() <= 1
