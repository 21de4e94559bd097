"""Tests of the small blocks against naive arithmetic."""

import pytest
import torch
from torch import nn

from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.drop_path import DropPath
from featherweight.blocks.inverted_residual import InvertedResidual
from featherweight.blocks.layouts import fit_input_channels
from featherweight.blocks.squeeze_excite import SqueezeExcite


@pytest.mark.parametrize("divisor", [4, 8])
def test_make_divisible_never_loses_a_tenth(divisor):
    for channels in range(1, 300):
        rounded = make_divisible(channels * 0.35, divisor)
        assert rounded % divisor == 0 and rounded >= 0.9 * channels * 0.35


def test_make_divisible_agrees_with_timm():
    layers = pytest.importorskip("timm.layers", reason="the extra 'timm' is not installed")
    for channels in range(1, 2000):
        for divisor in (4, 8):
            assert make_divisible(channels * 0.7, divisor) == layers.make_divisible(channels * 0.7, divisor)


def test_conv_norm_act_parts():
    unit = ConvNormAct(3, 5, 3, 2, act=None, bias=True, norm=None)
    x = torch.rand(2, 3, 7, 7)
    torch.testing.assert_close(unit(x), unit.conv(x))
    assert unit(x).shape == (2, 5, 4, 4)
    assert ConvNormAct(3, 5, momentum=0.05).norm.momentum == 0.05


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_depthwise_1x1_convolution_only_scales(bias, dtype, monkeypatch):
    unit = ConvNormAct(6, 6, 1, groups=6, bias=bias).to(dtype)
    x = torch.randn(2, 6, 3, 4, dtype=dtype)
    unit.norm, unit.act = nn.Identity(), nn.Identity()
    weights = list(unit.conv.parameters())
    outputs = [unit.conv(x)]
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("the convolution ran"))
    outputs.append(unit(x))
    torch.testing.assert_close(outputs[1], outputs[0])
    expected, found = (torch.autograd.grad(output.sum(), weights) for output in outputs)
    torch.testing.assert_close(found, expected)


def test_a_captured_graph_keeps_the_depthwise_1x1_convolution():
    unit = ConvNormAct(6, 6, 1, groups=6).eval()
    exported = torch.export.export(unit, (torch.randn(2, 6, 3, 4),))
    assert any("conv2d" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU])
def test_an_activation_in_place_changes_neither_input_nor_gradients(act):
    unit, x = ConvNormAct(3, 5, 3, act=act), torch.randn(2, 3, 6, 6, requires_grad=True)
    plain = nn.Sequential(unit.conv, unit.norm, act())
    before = x.detach().clone()
    gradients = [torch.autograd.grad(net(x).square().sum(), [x, *unit.parameters()]) for net in (unit, plain)]
    assert torch.equal(x, before)
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 2)
    y = drop(x)
    kept = y[:, 0, 0] > 0
    assert abs(y.mean().item() - 1) < 0.05
    assert torch.equal(y, torch.where(kept[:, None, None], x / 0.75, 0 * x))
    assert drop.eval()(x) is x


def test_squeeze_excite_by_hand():
    torch.manual_seed(0)
    block = SqueezeExcite(6, 2, gate=nn.Sigmoid)
    x = torch.rand(3, 6, 4, 5)
    mean = x.mean((2, 3))
    middle = (mean @ block.reduce.weight[:, :, 0, 0].T + block.reduce.bias).clamp(min=0)
    gate = torch.sigmoid(middle @ block.expand.weight[:, :, 0, 0].T + block.expand.bias)
    torch.testing.assert_close(block(x), x * gate[:, :, None, None])


def test_inverted_residual_is_the_identity_without_its_projection():
    block = InvertedResidual(8, 8).eval()
    nn.init.zeros_(block.project.norm.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)
    assert not InvertedResidual(8, 8, stride=2).has_skip and not InvertedResidual(8, 12).has_skip
    linear = InvertedResidual(8, 12).eval()(x)
    assert linear.min() < 0  # no activation after the projection


def test_fit_input_channels_keeps_the_sum():
    weight = torch.rand(4, 3, 3, 3)
    for channels in (1, 2, 3, 5, 6):
        fitted = fit_input_channels({"w": weight}, "w", channels)["w"]
        assert fitted.shape == (4, channels, 3, 3)
    torch.testing.assert_close(fit_input_channels({"w": weight}, "w", 6)["w"].sum(1), weight.sum(1))
    torch.testing.assert_close(fit_input_channels({"w": weight}, "w", 1)["w"].sum(1), weight.sum(1))
