"""Tests of the counters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.errors import DataError
from featherweight.export.onnx import export_onnx
from featherweight.measure.count import Count, count, count_onnx
from featherweight.registry import create_model


class Functional(nn.Module):
    """A convolution and a linear layer without modules, plus an attention product that must not count."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(6, 2, 3, 3))
        self.matrix = nn.Parameter(torch.zeros(5, 6))

    def forward(self, x):
        x = F.conv2d(x, self.kernel, stride=2, padding=1, groups=2)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens
        return F.linear(tokens, self.matrix).mean(1)


def test_functional_calls_count():
    assert count(Functional(), (4, 8, 8)) == Count(6 * 2 * 9 + 30, 16 * 6 * 2 * 9 + 16 * 30)


def test_transposed_and_grouped():
    assert count(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 5)).macs == 4 * 25 * 3 * 4


def test_published_counts():
    timm = pytest.importorskip("timm")
    assert count(timm.create_model("mobilenetv2_100"), (3, 224, 224)) == Count(3_504_872, 300_774_272)


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() <= 0 else x


def test_value_dependent_network_falls_back_to_the_cpu_and_is_left_alone():
    net = LooksAtValues().train()
    assert count(net, (4,)) == Count(10, 8)
    assert net.training and net.layer.weight.device.type == "cpu"


def test_an_onnx_file_counts_like_its_network(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    axes = {"x": {0: "n"}, "y": {0: "n"}}
    torch.onnx.export(net.eval(), (torch.zeros(2, 3, 16, 16),), path, dynamo=False, opset_version=18,
                      input_names=["x"], output_names=["y"], dynamic_axes=axes)  # fmt: skip
    found = count_onnx(path)
    assert found.macs == count(net, (3, 16, 16)).macs
    # Folding trades the batch norm's 16 parameters for a bias of 8.
    assert found.params == count(net, (3, 16, 16)).params - 8
    assert found.size_bytes == path.stat().st_size


def test_arithmetic_on_shapes_hides_no_layer(tmp_path):
    """The channel shuffle divides a size, which shape inference does not follow."""
    net = create_model("shufflenetv2_050").eval()
    path = tmp_path / "m.onnx"
    export_onnx(net, path, (3, 64, 64))
    assert count_onnx(path).macs == count(net, (3, 64, 64)).macs


def test_a_free_size_is_an_error(tmp_path):
    path = tmp_path / "m.onnx"
    axes = {"x": {0: "n", 2: "h"}}
    torch.onnx.export(nn.Conv2d(3, 8, 3), (torch.zeros(2, 3, 16, 16),), path, dynamo=False, opset_version=18,
                      input_names=["x"], output_names=["y"], dynamic_axes=axes)  # fmt: skip
    with pytest.raises(DataError, match="cannot be run"):
        count_onnx(path)


def test_no_onnx_file(tmp_path):
    with pytest.raises(DataError, match="Cannot read"):
        count_onnx(tmp_path / "none.onnx")
