"""Small graphs, each aimed at one way that layers share memory or are fused, against onnxruntime."""

import json

import numpy as np
import onnxruntime
import pytest
from onnx_files import make_model, node, save

from featherweight.compiler import compile_onnx
from featherweight.compiler.driver import random_inputs
from featherweight.compiler.passes import blocks

RNG = np.random.default_rng(0)


def noise(*shape):
    return (RNG.standard_normal(shape) * 0.4).astype(np.float32)


def conv(x, y, weight, name="", **attrs):
    size = weight.shape[2]
    attrs = {"pads": [size // 2, weight.shape[3] // 2] * 2, **attrs}
    return node("Conv", [x, f"w_{y}"], [y], name or y, **attrs), {f"w_{y}": weight}


def graph(*layers, inputs, outputs, **constants):
    nodes = []
    for layer in layers:
        if isinstance(layer, tuple):
            nodes.append(layer[0])
            constants |= layer[1]
        else:
            nodes.append(layer)
    for index, item in enumerate(nodes):
        item.name = f"{item.op_type} {index}"
    return make_model(nodes, inputs, outputs, constants, opset=20)


def residual_that_is_the_input():
    """y = conv(x) + x with a computed x: the sum must not overwrite what the layer still reads."""
    return graph(
        conv("x", "a", noise(40, 40, 1, 1)),
        conv("a", "b", noise(40, 40, 1, 1)),
        node("Add", ["b", "a"], ["c"]),
        conv("c", "d", noise(40, 1, 3, 3), group=40),
        node("Add", ["d", "c"], ["e"]),
        node("Relu", ["e"], ["y"]),
        inputs={"x": [1, 40, 9, 11]},
        outputs={"y": [1, 40, 9, 11]},
    )


def parts_of_odd_width():
    """Concatenations of 5, 7 and 20 channels, one inside the other, read by every kind of layer."""
    return graph(
        conv("x", "a", noise(5, 3, 3, 3)),
        conv("a", "b", noise(7, 5, 1, 1)),
        node("Concat", ["a", "b"], ["ab"], axis=1),
        conv("ab", "c", noise(20, 12, 3, 3)),
        node("Sigmoid", ["c"], ["s"]),
        node("Concat", ["ab", "s"], ["abs"], axis=1),
        conv("abs", "d", noise(32, 1, 5, 5), group=32),
        conv("abs", "e", noise(32, 32, 3, 3), strides=[2, 2]),
        node("GlobalAveragePool", ["d"], ["g"]),
        node("Mul", ["e", "g"], ["y"]),
        inputs={"x": [2, 3, 13, 10]},
        outputs={"y": [2, 32, 7, 5]},
    )


def halves_that_are_shuffled():
    """Split, work on one half, join and shuffle: the unit of a ShuffleNet."""
    return graph(
        conv("x", "a", noise(18, 6, 1, 1)),
        node("Split", ["a", "sizes"], ["l", "r"], axis=1),
        conv("r", "r1", noise(9, 9, 1, 1)),
        conv("r1", "r2", noise(9, 1, 3, 3), group=9),
        node("Concat", ["l", "r2"], ["j"], axis=1),
        node("Reshape", ["j", "wide"], ["j5"]),
        node("Transpose", ["j5"], ["j5t"], perm=[0, 2, 1, 3, 4]),
        node("Reshape", ["j5t", "narrow"], ["k"]),
        node("Slice", ["k", "first", "last", "axis"], ["y"]),
        inputs={"x": [1, 6, 8, 7]},
        outputs={"y": [1, 9, 8, 7]},
        sizes=np.array([9, 9]),
        wide=np.array([1, 2, 9, 8, 7]),
        narrow=np.array([1, 18, 8, 7]),
        first=np.array([9]),
        last=np.array([18]),
        axis=np.array([1]),
    )


def norms_of_groups():
    """A group norm as exporters write it, an instance norm, a layer norm and softmax over channels."""
    return graph(
        conv("x", "a", noise(24, 6, 3, 3)),
        node("Reshape", ["a", "rows"], ["r"]),
        node("InstanceNormalization", ["r", "ones", "zeros"], ["n"]),
        node("Reshape", ["n", "back"], ["m"]),
        node("Mul", ["m", "scale"], ["ms"]),
        node("InstanceNormalization", ["ms", "gamma", "beta"], ["i"]),
        node("Softmax", ["i"], ["s"], axis=1),
        node("Transpose", ["s"], ["t"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["t", "gamma", "beta"], ["y"], axis=-1),
        inputs={"x": [2, 6, 7, 9]},
        outputs={"y": [2, 7, 9, 24]},
        rows=np.array([0, 4, -1]),
        back=np.array([2, 24, 7, 9]),
        ones=np.ones(4, np.float32),
        zeros=np.zeros(4, np.float32),
        scale=noise(24, 1, 1),
        gamma=noise(24),
        beta=noise(24),
    )


def gates_and_maps():
    """A squeeze-excite, a spatial gate, a map resized to nearest and one linearly."""
    return graph(
        conv("x", "a", noise(20, 5, 1, 1)),
        node("GlobalAveragePool", ["a"], ["p"]),
        conv("p", "p1", noise(6, 20, 1, 1)),
        node("Relu", ["p1"], ["p2"]),
        conv("p2", "p3", noise(20, 6, 1, 1)),
        node("HardSigmoid", ["p3"], ["gate"]),
        node("Mul", ["a", "gate"], ["b"]),
        conv("b", "c", noise(1, 20, 3, 3)),
        node("Sigmoid", ["c"], ["mask"]),
        node("Mul", ["b", "mask"], ["d"]),
        node("MaxPool", ["d"], ["e"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Resize", ["e", "", "scales"], ["f"], mode="nearest"),
        node("Resize", ["e", "", "scales"], ["g"], mode="linear"),
        node("Add", ["f", "g"], ["h"]),
        node("Mul", ["h", "d"], ["y"]),
        inputs={"x": [1, 5, 8, 12]},
        outputs={"y": [1, 20, 8, 12]},
        scales=np.float32([1, 1, 2, 2]),
    )


def attention_and_series():
    """Products of computed matrices, a one-dimensional convolution, a dilated and a grouped one."""
    return graph(
        node("Conv", ["x", "w1"], ["a"], "series", pads=[2, 2], dilations=[2]),
        node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["t", "a"], ["q"]),
        node("Softmax", ["q"], ["s"], axis=-1),
        node("MatMul", ["s", "t"], ["v"]),
        node("MatMul", ["v", "w2"], ["l"]),
        node("Add", ["l", "bias"], ["lb"]),
        node("Gelu", ["lb"], ["g"]),
        node("Add", ["g", "v"], ["y"]),
        inputs={"x": [2, 6, 30]},
        outputs={"y": [2, 30, 18]},
        w1=noise(18, 6, 3),
        w2=noise(18, 18),
        bias=noise(18),
    )


def inverted_residuals():
    """Blocks with and without a residual and an expanding layer, stride 1 and 2."""
    clip = {"low": np.float32(0), "high": np.float32(6)}
    layers = [
        conv("x", "s", noise(16, 3, 3, 3)),
        conv("s", "d0", noise(16, 1, 3, 3), group=16),
        conv("d0", "p0", noise(12, 16, 1, 1)),
    ]
    for index, (stride, inputs) in enumerate([(1, "p0"), (2, "r0")]):
        layers += [
            conv(inputs, f"e{index}", noise(36, 12, 1, 1)),
            node("Clip", [f"e{index}", "low", "high"], [f"ec{index}"]),
            conv(f"ec{index}", f"m{index}", noise(36, 1, 5, 5), group=36, strides=[stride, stride]),
            node("Clip", [f"m{index}", "low", "high"], [f"mc{index}"]),
            conv(f"mc{index}", f"q{index}", noise(12, 36, 1, 1)),
        ]
        if stride == 1:
            layers.append(node("Add", [f"q{index}", inputs], [f"r{index}"]))
    layers.append(node("Relu", ["q1"], ["y"]))
    return graph(*layers, inputs={"x": [2, 3, 18, 15]}, outputs={"y": [2, 12, 9, 8]}, **clip)


def stems_and_gates():
    """Blocks that begin with a wide convolution, and blocks whose last layer is not theirs."""
    return graph(
        conv("x", "s", noise(20, 3, 3, 3), strides=[2, 2]),
        node("Relu", ["s"], ["sr"]),
        conv("sr", "d", noise(20, 1, 5, 5), group=20),
        node("GlobalAveragePool", ["d"], ["g"]),
        node("Mul", ["d", "g"], ["m"]),
        conv("m", "e", noise(36, 20, 3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
        node("Sigmoid", ["e"], ["es"]),
        conv("es", "f", noise(36, 1, 3, 3), group=36, strides=[2, 2]),
        conv("m", "h", noise(9, 20, 1, 1), strides=[2, 2]),
        conv("h", "i", noise(9, 1, 3, 3), group=9),
        node("Concat", ["f", "i"], ["y"], axis=1),
        inputs={"x": [2, 3, 18, 15]},
        outputs={"y": [2, 45, 5, 4]},
    )


GRAPHS = {
    maker.__name__: maker
    for maker in (
        residual_that_is_the_input,
        parts_of_odd_width,
        halves_that_are_shuffled,
        norms_of_groups,
        gates_and_maps,
        attention_and_series,
        inverted_residuals,
    )
}


def check(maker, tmp_path, target="native", threads=1, tolerance=2e-5):
    path = save(maker(), tmp_path / "net.onnx")
    session = compile_onnx(path, tmp_path / "out", target, threads)
    if session is None:
        pytest.skip(f"this machine has no {target}")
    reference = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for seed in range(2):
        feeds = random_inputs(session, seed)
        for got, expected in zip(session.run(None, feeds), reference.run(None, feeds), strict=True):
            assert np.abs(got - expected).max() < tolerance * np.abs(expected).max()
    layers = json.loads((tmp_path / "out/report.json").read_text())["layers"]
    session.close()
    return [layer["kernel"] for layer in layers]


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_onnxruntime(name, tmp_path):
    check(GRAPHS[name], tmp_path, threads=2)


@pytest.mark.parametrize("name", GRAPHS)
def test_portable_c99_equals_onnxruntime(name, tmp_path):
    check(GRAPHS[name], tmp_path, "generic-c")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_vectors_of_eight_equal_onnxruntime(name, tmp_path):
    check(GRAPHS[name], tmp_path, "x86-64-v3")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("make", [inverted_residuals, stems_and_gates])
def test_fused_blocks_equal_onnxruntime(make, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "MAP_BYTES", 0)
    found = check(make, tmp_path, threads=threads)
    assert sum(name.startswith("block of") for name in found) == 3


def test_concatenations_and_shuffles_cost_one_copy_at_most(tmp_path):
    found = check(halves_that_are_shuffled, tmp_path)
    assert len([name for name in found if name in ("loops", "layout")]) <= 4
    assert "loops" not in check(parts_of_odd_width, tmp_path)


def sparse_layers():
    """An inverted residual with mostly zero 1x1 weights, alone and in blocks that share columns."""

    def pruned(outputs, inputs, rows=1):
        keep = RNG.random((outputs // rows, inputs)).repeat(rows, 0) < 0.15
        return noise(outputs, inputs, 1, 1) * keep[:, :, None, None]

    clip = {"low": np.float32(0), "high": np.float32(6)}
    return graph(
        conv("x", "s", noise(20, 3, 3, 3)),
        conv("s", "e", pruned(48, 20)),
        node("Clip", ["e", "low", "high"], ["ec"]),
        conv("ec", "m", noise(48, 1, 3, 3), group=48),
        node("Mul", ["m", "slope"], ["ms"]),
        node("Sigmoid", ["ms"], ["mg"]),
        node("Mul", ["ms", "mg"], ["mc"]),
        conv("mc", "q", pruned(20, 48, rows=4)),
        node("Add", ["q", "s"], ["r"]),
        conv("r", "e2", pruned(30, 20)),
        node("Relu", ["e2"], ["er"]),
        conv("er", "m2", noise(30, 1, 5, 5), group=30, strides=[2, 2]),
        node("Relu", ["m2"], ["y"]),
        inputs={"x": [2, 3, 15, 14]},
        outputs={"y": [2, 30, 8, 7]},
        slope=noise(48, 1, 1),
        **clip,
    )


def sparse_region():
    """All that a planar region holds: gate, sums, pool, maps that the caller sees, a dense layer."""

    def pruned(outputs, inputs, share=0.15):
        keep = RNG.random((outputs, inputs)) < share
        return noise(outputs, inputs, 1, 1) * keep[:, :, None, None]

    return graph(
        conv("x", "s", noise(24, 3, 3, 3), strides=[2, 2]),
        node("Relu", ["s"], ["sr"]),
        conv("sr", "a", pruned(40, 24)),
        node("Relu", ["a"], ["seen"]),
        node("GlobalAveragePool", ["seen"], ["pool"]),
        conv("pool", "g", noise(40, 40, 1, 1)),
        node("Sigmoid", ["g"], ["gate"]),
        node("Mul", ["seen", "gate"], ["gated"]),
        conv("gated", "b", noise(24, 40, 1, 1)),
        node("Add", ["b", "sr"], ["sum"]),
        conv("sum", "c", pruned(24, 24)),
        node("Add", ["c", "plane"], ["d"]),
        conv("d", "e", pruned(64, 24)),
        node("Concat", ["e", "d"], ["wide"], axis=1),
        conv("wide", "f", noise(20, 88, 3, 3)),
        node("ReduceMean", ["d", "axes"], ["mean"], keepdims=1),
        inputs={"x": [2, 3, 29, 30]},
        outputs={"seen": [2, 40, 15, 15], "f": [2, 20, 15, 15], "mean": [2, 24, 1, 1]},
        plane=noise(1, 1, 15, 15),
        axes=np.array([2, 3]),
    )


def large_sparse_block():
    """A sparse layer whose map would not stay in a cache."""
    keep = RNG.random((96, 16)) < 0.1
    return graph(
        conv("x", "s", noise(16, 3, 3, 3), strides=[2, 2]),
        conv("s", "e", noise(96, 16, 1, 1) * keep[:, :, None, None]),
        node("Clip", ["e", "low", "high"], ["er"]),
        conv("er", "m", noise(96, 1, 3, 3), group=96, strides=[2, 2]),
        node("Relu", ["m"], ["y"]),
        inputs={"x": [1, 3, 122, 122]},
        outputs={"y": [1, 96, 31, 31]},
        low=np.float32(0),
        high=np.float32(6),
    )


@pytest.mark.parametrize("target", ["native", "generic-c"])
def test_sparse_layers_equal_onnxruntime(target, tmp_path):
    found = check(sparse_layers, tmp_path, target, threads=2)
    assert sum(name.startswith("sparse 1x1") for name in found) == 3
    assert sum(name.startswith("planar depthwise") for name in found) == 2


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "generic-c"])
def test_sparse_regions_equal_onnxruntime(target, tmp_path):
    found = check(sparse_region, tmp_path, target, threads=2)
    assert sum(name.startswith("sparse 1x1") for name in found) >= 2
    found = check(large_sparse_block, tmp_path, target, threads=2)
    assert any("with planar depthwise" in name for name in found)


def dense_3x3():
    """Layers of odd sizes and widths, with a residual, a slope a channel, parts of a map, and paddings."""
    return graph(
        conv("x", "a", noise(40, 20, 3, 3)),
        node("PRelu", ["a", "slope"], ["ar"]),
        conv("ar", "b", noise(40, 40, 3, 3)),
        node("Add", ["b", "a"], ["s"]),
        node("Split", ["s", "sizes"], ["left", "right"], axis=1),
        conv("left", "c", noise(48, 16, 3, 3)),
        node("Relu", ["c"], ["cr"]),
        conv("cr", "d", noise(33, 48, 3, 3), pads=[0, 2, 1, 0]),
        conv("right", "e", noise(24, 24, 3, 3)),
        node("Concat", ["e", "cr"], ["wide"], axis=1),
        conv("wide", "f", noise(16, 72, 3, 3)),
        inputs={"x": [2, 20, 18, 23]},
        outputs={"d": [2, 33, 17, 23], "f": [2, 16, 18, 23]},
        slope=noise(40, 1, 1),
        sizes=np.array([16, 24]),
    )


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "generic-c"])
def test_winograd_equals_onnxruntime(target, tmp_path):
    for threads in (1, 3) if target == "native" else (1,):
        found = check(dense_3x3, tmp_path, target, threads, tolerance=1e-4)
        assert sum(name.startswith("winograd") for name in found) >= 4
