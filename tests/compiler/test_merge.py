"""Parallel convolutions that become one, and filters that share a channel, against onnxruntime."""

from functools import partial

import numpy as np
import pytest
from onnx_files import node
from test_layers import check, conv, graph, noise

IMAGE = {"x": [2, 24, 9, 11]}


def mixer():
    """x + gamma * (conv3(x) + conv1(x) + norm(x) - norm(x)), one norm for both: FastViT's mixer."""
    return graph(
        node("Mul", ["x", "factor"], ["n0"]),
        node("Add", ["n0", "term"], ["n"]),
        conv("x", "a", noise(24, 1, 3, 3), group=24),
        conv("x", "b", noise(24, 1, 1, 1), group=24),
        node("Add", ["n", "b"], ["s1"]),
        node("Add", ["s1", "a"], ["s2"]),
        node("Sub", ["s2", "n"], ["s3"]),
        node("Mul", ["s3", "gamma"], ["s4"]),
        node("Add", ["x", "s4"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 9, 11]},
        factor=noise(24, 1, 1),
        term=noise(24, 1, 1),
        gamma=noise(24, 1, 1),
    )


def dense_branches():
    """A dilated 3x3, a 1x1 and the input itself: RepVGG's block."""
    return graph(
        conv("x", "a", noise(24, 24, 3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
        conv("x", "b", noise(24, 24, 1, 1)),
        node("Add", ["a", "b"], ["s"]),
        node("Add", ["s", "x"], ["t"]),
        node("Relu", ["t"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 9, 11]},
    )


def strided_branches():
    """Stride 2, kernels of 5x5, 1x3 and 1x1, and a constant below a difference."""
    return graph(
        conv("x", "a", noise(24, 4, 5, 5), group=6, strides=[2, 2]),
        conv("x", "b", noise(24, 4, 1, 3), group=6, strides=[2, 2]),
        conv("x", "c", noise(24, 4, 1, 1), group=6, strides=[2, 2]),
        node("Sub", ["a", "b"], ["s"]),
        node("Div", ["c", "two"], ["d"]),
        node("Sub", ["s", "d"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 5, 6]},
        two=np.float32(2.0),
    )


@pytest.mark.parametrize("make", [mixer, dense_branches, strided_branches])
def test_branches_of_one_tensor_become_one_layer(make, tmp_path):
    work = [kernel for kernel in check(make, tmp_path) if kernel != "layout"]
    assert len(work) == 1 and work[0].startswith(("convolution", "depthwise"))


def different_tensors():
    return graph(
        conv("x", "a", noise(24, 1, 3, 3), group=24),
        conv("a", "b", noise(24, 1, 1, 1), group=24),
        node("Add", ["a", "b"], ["c"]),
        conv("c", "d", noise(24, 24, 3, 3)),
        conv("x", "e", noise(24, 24, 1, 1)),
        node("Add", ["d", "e"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 9, 11]},
    )


def unlike_windows():
    """Grouped beside dense, taps that miss each other, and a branch that something else reads."""
    return graph(
        conv("x", "a", noise(24, 1, 3, 3), group=24),
        conv("x", "b", noise(24, 24, 1, 1)),
        node("Add", ["a", "b"], ["c"]),
        conv("c", "d", noise(24, 1, 3, 3), group=24, dilations=[2, 2], pads=[2, 2, 2, 2]),
        conv("c", "e", noise(24, 1, 3, 3), group=24),
        node("Add", ["d", "e"], ["f"]),
        conv("f", "g", noise(24, 1, 3, 3), group=24),
        node("Add", ["g", "f"], ["h"]),
        node("Mul", ["h", "g"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 9, 11]},
    )


def long_chain():
    """Many operators that could each be read in two ways."""
    layers = [node("Add", [f"t{i}", "half"], [f"t{i + 1}"]) for i in range(200)]
    return graph(
        conv("x", "t0", noise(24, 1, 3, 3), group=24),
        *layers,
        conv("x", "b", noise(24, 1, 1, 1), group=24),
        node("Add", ["t200", "b"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24, 9, 11]},
        half=np.float32(0.5),
    )


@pytest.mark.parametrize("make", [different_tensors, unlike_windows, long_chain])
def test_what_is_not_one_convolution_stays_correct(make, tmp_path):
    check(make, tmp_path)


def several_filters(times, kernel, stride):
    return graph(
        conv("x", "a", noise(24, 24, 1, 1)),
        conv("a", "b", noise(24 * times, 1, kernel, kernel), group=24, strides=[stride, stride]),
        node("Relu", ["b"], ["y"]),
        inputs=IMAGE,
        outputs={"y": [2, 24 * times, (9 - 1) // stride + 1, (11 - 1) // stride + 1]},
    )


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "generic-c"])
@pytest.mark.parametrize(("times", "kernel", "stride"), [(2, 7, 2), (3, 3, 1)])
def test_several_filters_a_channel(times, kernel, stride, target, tmp_path):
    maker = partial(several_filters, times, kernel, stride)
    for threads in (1, 3):
        assert any(name.startswith("depthwise") for name in check(maker, tmp_path, target, threads))
