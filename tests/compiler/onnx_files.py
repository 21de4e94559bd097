"""Small ONNX files for the compiler's tests."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def value(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def make_model(nodes, inputs, outputs, constants=None, opset=18):
    """Return a model; `inputs` and `outputs` map names to shapes, `constants` names to arrays."""
    graph = helper.make_graph(
        nodes,
        "net",
        [value(name, shape) for name, shape in inputs.items()],
        [value(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op, inputs, outputs, name="", **attrs):
    return helper.make_node(op, inputs, outputs, name or f"the_{op.lower()}", **attrs)


def tiny_convnet(batch="n", seed=0):
    """Return a convolution with a batch norm, ReLU, a residual, a global pool and a classifier."""
    rng = np.random.default_rng(seed)

    def noise(*shape):
        return (rng.standard_normal(shape) * 0.3).astype(np.float32)

    nodes = [
        node("Conv", ["image", "w1"], ["c1"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], "norm"),
        node("Relu", ["n1"], ["r1"], "relu"),
        node("Conv", ["r1", "w2"], ["c2"], "wide", pads=[1, 1, 1, 1], group=20),
        node("Sigmoid", ["c2"], ["s2"], "gate"),
        node("Mul", ["c2", "s2"], ["a2"], "silu"),
        node("Conv", ["a2", "w3", "b3"], ["c3"], "project"),
        node("Add", ["c3", "r1"], ["d3"], "residual"),
        node("Conv", ["d3", "w4"], ["c4"], "dense", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c4"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flatten"),
        node("Gemm", ["f", "w5", "b5"], ["logits"], "head", transB=1),
    ]
    constants = {
        "w1": noise(20, 3, 3, 3),
        "g": noise(20) + 1,
        "b": noise(20),
        "m": noise(20),
        "v": np.abs(noise(20)) + 0.5,
        "w2": noise(20, 1, 3, 3),
        "w3": noise(20, 20, 1, 1),
        "b3": noise(20),
        "w4": noise(24, 20, 3, 3),
        "w5": noise(7, 24),
        "b5": noise(7),
    }
    return make_model(nodes, {"image": [batch, 3, 17, 15]}, {"logits": [batch, 7]}, constants)


def save(model, path):
    onnx.save(model, str(path))
    return path
