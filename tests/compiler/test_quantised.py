"""QDQ graphs run on integers: the answers of ONNX Runtime up to one step of quantisation."""

import json

import numpy as np
import onnxruntime
import pytest
from onnx_files import make_model, node, save

from featherweight.compiler import compile_onnx
from featherweight.compiler.driver import random_inputs


class Builder:
    """Builds QDQ graphs: every float tensor between two operators passes through bytes."""

    def __init__(self, activation=np.uint8, seed=0):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.constants = [], {}
        self.activation = activation

    def constant(self, value):
        name = f"k{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def through_bytes(self, x, scale=0.05, zero=117):
        zero = zero if self.activation == np.uint8 else zero - 128
        pair = [self.constant(np.float32(scale)), self.constant(self.activation(zero))]
        number = len(self.nodes)
        self.nodes.append(node("QuantizeLinear", [x, *pair], [f"q{number}"], f"q{number}"))
        self.nodes.append(node("DequantizeLinear", [f"q{number}", *pair], [f"d{number}"], f"d{number}"))
        self.scale = scale
        return f"d{number}"

    def op(self, kind, *inputs, **attrs):
        name = f"t{len(self.nodes)}"
        self.nodes.append(node(kind, list(inputs), [name], name, **attrs))
        return name

    def weight(self, *shape):
        number = len(self.nodes)
        values = self.rng.integers(-127, 128, shape).astype(np.int8)
        self.scales = scales = (self.rng.random(shape[0]) * 0.01 + 0.002).astype(np.float32)
        names = [self.constant(v) for v in (values, scales, np.zeros(shape[0], np.int8))]
        self.nodes.append(node("DequantizeLinear", names, [f"w{number}"], f"w{number}", axis=0))
        return f"w{number}"

    def bias(self, size):
        """A bias in whole steps of the sums, after the weights and the input that it belongs to."""
        steps = self.rng.integers(-500, 500, size).astype(np.int32)
        scale = (np.float32(self.scale) * self.scales).astype(np.float32)
        number = len(self.nodes)
        names = [self.constant(v) for v in (steps, scale, np.zeros(size, np.int32))]
        self.nodes.append(node("DequantizeLinear", names, [f"b{number}"], f"b{number}", axis=0))
        return f"b{number}"

    def conv(self, x, *shape, **attrs):
        return self.op("Conv", x, self.weight(*shape), self.bias(shape[0]), **attrs)

    def save(self, path, output, inputs, shape):
        self.nodes.append(node("Identity", [output], ["y"]))
        return save(make_model(self.nodes, inputs, {"y": shape}, self.constants), path)


def kernels(folder):
    return [layer["kernel"] for layer in json.loads((folder / "report.json").read_text())["layers"]]


def check(path, tmp_path, step, share=0.999, target="native"):
    """Compare with onnxruntime's own reading of the graph, operator by operator."""
    session = compile_onnx(path, tmp_path / "out", target)
    if session is None:
        pytest.skip(f"this machine has no {target}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = random_inputs(session)
    (got,), (expected,) = session.run(None, feeds), reference.run(None, feeds)
    steps = np.abs(got - expected) / step
    assert (steps < 1.01).mean() >= share
    assert (steps < 0.01).mean() > 0.95, "most values are the same to the bit"
    return kernels(tmp_path / "out")


@pytest.mark.parametrize(
    ("activation", "target"),
    [(np.uint8, "native"), (np.int8, "native"), (np.uint8, "x86-64-v3"), (np.int8, "generic-c")],
)
def test_convolutions_of_every_kind(activation, target, tmp_path):
    b = Builder(activation)
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.op("Relu", b.conv(x, 20, 3, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1])), 0.03, 0)
    x = b.through_bytes(b.conv(x, 20, 1, 3, 3, group=20, pads=[1, 1, 1, 1]), 0.04, 100)
    x = b.through_bytes(b.conv(x, 40, 20, 1, 1), 0.2, 120)
    x = b.through_bytes(b.conv(x, 40, 10, 3, 3, group=4, pads=[1, 1, 1, 1], strides=[2, 1]), 0.5, 120)
    path = b.save(tmp_path / "m.onnx", x, {"x": [2, 3, 21, 18]}, [2, 40, 6, 9])
    found = check(path, tmp_path, 0.5, target=target)
    assert sum("8-bit convolution" in name for name in found) == 3
    assert sum("8-bit depthwise" in name for name in found) == 1


def test_the_block_of_an_efficient_network_stays_in_bytes(tmp_path):
    b = Builder()
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.conv(x, 32, 16, 1, 1), 0.1, 128)
    s = b.through_bytes(b.op("Sigmoid", x), 1 / 256, 0)
    x = b.through_bytes(b.op("Mul", x, s), 0.08, 10)
    g = b.through_bytes(b.op("GlobalAveragePool", x), 0.02, 8)
    g = b.through_bytes(b.op("Relu", b.conv(g, 8, 32, 1, 1)), 0.02, 0)
    g = b.through_bytes(b.op("HardSigmoid", b.through_bytes(b.conv(g, 32, 8, 1, 1), 0.05, 128)), 1 / 255, 0)
    x = b.through_bytes(b.op("Mul", x, g), 0.06, 10)
    p = b.through_bytes(b.conv(x, 16, 32, 1, 1), 0.2, 128)
    q = b.through_bytes(b.conv(p, 16, 1, 3, 3, group=16, pads=[1, 1, 1, 1]), 0.2, 120)
    x = b.through_bytes(b.op("Add", p, q), 0.3, 125)
    x = b.through_bytes(b.op("Concat", x, p, axis=1), 0.3, 125)
    path = b.save(tmp_path / "m.onnx", x, {"x": [1, 16, 12, 13]}, [1, 32, 12, 13])
    found = check(path, tmp_path, 0.3, share=0.99)
    # Only the image's way in and the result's way out leave the bytes.
    assert [name for name in found if "8-bit" not in name and name not in ("layout", "vector loop")] == []
    assert "8-bit sum" not in found, "the sum belongs to the convolution before it"


def test_a_classifier_gives_floats(tmp_path):
    b = Builder()
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.op("Flatten", b.through_bytes(b.op("GlobalAveragePool", x), 0.03, 128)), 0.03, 128)
    logits = b.op("Gemm", x, b.weight(10, 24), b.bias(10), transB=1)
    path = b.save(tmp_path / "m.onnx", logits, {"x": [2, 24, 5, 5]}, [2, 10])
    assert "8-bit product" in " ".join(check(path, tmp_path, 0.01))


def test_products_of_rows_of_any_rank(tmp_path):
    """A product over the last of four axes is no convolution over channels."""
    b = Builder()
    x = b.through_bytes("x", 0.03, 128)
    x = b.through_bytes(b.op("Transpose", x, perm=[0, 2, 3, 1]), 0.03, 128)
    weight = b.weight(20, 24)
    b.constants[b.nodes[-1].input[0]] = b.constants[b.nodes[-1].input[0]].T.copy()
    b.nodes[-1].attribute[0].i = 1
    x = b.through_bytes(b.op("MatMul", x, weight), 0.2, 128)
    path = b.save(tmp_path / "m.onnx", x, {"x": [2, 24, 5, 3]}, [2, 5, 3, 20])
    assert "8-bit product" in " ".join(check(path, tmp_path, 0.2))


def test_weights_that_no_kernel_takes_become_floats(tmp_path):
    """Asymmetric weights stay a float convolution, not an error."""
    b = Builder()
    x = b.through_bytes("x", 0.03, 128)
    weight = b.weight(8, 3, 3, 3)
    for name in b.nodes[-1].input[2:]:
        b.constants[name] = np.full(8, 5, np.int8)
    path = b.save(tmp_path / "m.onnx", b.op("Conv", x, weight), {"x": [1, 3, 9, 9]}, [1, 8, 7, 7])
    assert any(name.startswith("convolution") for name in check(path, tmp_path, 0.01))


def test_scales_that_are_computed_run_in_floats(tmp_path):
    model = make_model(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"x": [2, 3, 4, 5], "s": []},
        {"y": [2, 3, 4, 5]},
        {"z": np.uint8(100)},
    )
    session = compile_onnx(save(model, tmp_path / "m.onnx"), tmp_path / "out")
    x = np.linspace(-3, 3, 120, dtype=np.float32).reshape(2, 3, 4, 5)
    (y,) = session.run(None, {"x": x, "s": np.float32(0.05)})
    assert np.abs(y - x).max() <= 0.0251
