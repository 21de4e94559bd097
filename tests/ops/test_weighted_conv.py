"""Weighted convolution: a naive sum over taps, ones, gradients, the search, fusing and old states."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.replace import replace_convs
from featherweight.ops.weighted_conv import (
    PUBLISHED,
    WeightedConv1d,
    WeightedConv2d,
    WeightedConv3d,
    search_density,
)

KINDS = {1: (WeightedConv1d, nn.Conv1d), 2: (WeightedConv2d, nn.Conv2d), 3: (WeightedConv3d, nn.Conv3d)}


def naive_density(place: tuple[int, ...], taps: int, values: tuple[float, ...]) -> float:
    """The product over the axes of the value at the distance from the nearer border; 1 in the middle."""
    return math.prod(({**dict(enumerate(values)), taps // 2: 1.0})[min(i, taps - 1 - i)] for i in place)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("taps", [1, 3, 5])
@torch.no_grad()
def test_parity_with_a_naive_weighted_sum(dims, taps):
    torch.manual_seed(0)
    values = (0.3, 1.4, 0.8)[: taps // 2]
    layer = KINDS[dims][0](2, 3, taps, stride=2, padding=taps // 2, density=values)
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 2, *(6,) * dims)
    padded = F.pad(x, (taps // 2,) * 2 * dims)[0].numpy()
    expected = np.zeros((3, *(3,) * dims))
    weight, bias = layer.weight.numpy(), layer.bias.numpy()
    for out, into in itertools.product(range(3), range(2)):
        for place in itertools.product(*(range(3),) * dims):
            for tap in itertools.product(*(range(taps),) * dims):
                source = tuple(2 * p + t for p, t in zip(place, tap, strict=True))
                factor = naive_density(tap, taps, values)
                expected[(out, *place)] += factor * weight[(out, into, *tap)] * padded[(into, *source)]
    expected += bias.reshape(-1, *(1,) * dims)
    assert np.allclose(layer(x)[0].numpy(), expected, atol=1e-5)


def test_the_first_value_belongs_to_the_outermost_tap():
    layer = WeightedConv2d(1, 1, 5, density=(0.2, 0.8))
    assert torch.allclose(layer.phi[2], torch.tensor([0.2, 0.8, 1, 0.8, 0.2]))
    assert layer.phi[0, 0] == pytest.approx(0.04) and layer.phi[1, 0] == pytest.approx(0.16)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("extra", [{}, {"groups": 2, "stride": 2}, {"padding_mode": "reflect"}])
@torch.no_grad()
def test_ones_are_the_plain_convolution_exactly(dims, extra):
    ours, plain = KINDS[dims]
    for taps in (3, 5, 7):
        layer = ours(4, 6, taps, padding=taps // 2, density=(1.0,) * (taps // 2), **extra)
        other = plain(4, 6, taps, padding=taps // 2, **extra)
        other.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        x = torch.randn(2, 4, *(9,) * dims)
        assert torch.equal(layer(x), other(x))


def test_no_parameter_is_added_but_by_a_trainable_density():
    def size(layer):
        return sum(p.numel() for p in layer.parameters())

    assert size(WeightedConv2d(8, 16, 5)) == size(nn.Conv2d(8, 16, 5)) == 3_216
    assert size(WeightedConv2d(8, 16, 7, bias=False, trainable=True)) == 6_275


def test_gradient_of_the_weight_is_weighted():
    layer = WeightedConv2d(2, 3, 5)
    x = torch.randn(2, 2, 7, 7)
    effective = layer.compose_weight().detach().requires_grad_()
    F.conv2d(x, effective, layer.bias).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, layer.phi * effective.grad, rtol=1e-4, atol=1e-4)


def test_trainable_density_starts_plain_learns_and_fuses_away():
    torch.manual_seed(0)
    layer = WeightedConv2d(2, 3, 7, padding=3, trainable=True)
    assert layer.density(7).tolist() == [1, 1, 1]
    layer.double().set_density((0.4, 0.7, 1.2))
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["weight", "bias", "density_7"]
    values = [p.detach().requires_grad_() for p in layer.parameters()]
    run = lambda *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), x)  # noqa: E731
    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    plain = layer.eval().fuse()
    assert type(plain) is nn.Conv2d and torch.allclose(plain(x), layer(x))


def test_axes_of_different_length_take_a_density_each():
    layer = WeightedConv2d(2, 2, (3, 5), padding="same", density={3: (0.5,), 5: (0.2, 0.8)})
    expected = torch.tensor([0.5, 1, 0.5])[:, None] * torch.tensor([0.2, 0.8, 1, 0.8, 0.2])
    assert torch.allclose(layer.phi, expected)
    assert torch.allclose(WeightedConv2d(2, 2, (1, 7)).phi[0, :3], torch.tensor(PUBLISHED[7]))
    with pytest.raises(UsageError, match="taps: values"):
        WeightedConv2d(2, 2, (3, 5), density=(0.5,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size.*odd"),
        ({"kernel_size": 9}, "4 finite values"),
        ({"kernel_size": 3, "density": (0.5, 0.5)}, "1 finite values"),
        ({"kernel_size": 3, "density": (math.nan,)}, "finite"),
    ],
)
def test_what_cannot_be_weighted_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        WeightedConv2d(2, 2, **arguments)


@torch.no_grad()
def test_pretrained_layers_keep_their_function_and_come_back():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (1, 5), groups=8), nn.Conv2d(8, 4, 2)
    )
    x = torch.randn(2, 3, 12, 12)
    expected = net(x)
    replace_convs(net, "weighted_conv")
    assert [type(m).__name__ for m in net] == ["WeightedConv2d", "Conv2d", "WeightedConv2d", "Conv2d"]
    assert torch.allclose(net(x), expected, atol=1e-6)
    net[0].eval()
    assert torch.allclose(net[0].fuse()(x), net[0](x), atol=1e-7)
    with pytest.raises(UsageError, match="density of 0"):
        WeightedConv2d.from_conv(nn.Conv2d(2, 2, 3), density=(0.0,))


@torch.no_grad()
def test_states_keep_the_density_and_official_ones_load():
    layer = WeightedConv2d(2, 3, 5, density=(0.1, 1.3))
    twin = WeightedConv2d(2, 3, 5).eval()
    x = torch.randn(1, 2, 6, 6)
    twin(x)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer.eval()(x))
    values = torch.tensor([0.1, 1.3, 1, 1.3, 0.1])
    official = {
        "weight": layer.weight,
        "bias": layer.bias,
        "alfa": values,
        "Phi": torch.outer(values, values),
    }
    again = WeightedConv2d(2, 3, 5).eval()
    again.load_state_dict(official)
    assert torch.allclose(again(x), layer(x))
    learnt = WeightedConv2d(2, 3, 5, trainable=True)
    learnt.load_state_dict({"weight": layer.weight, "bias": layer.bias, "den": values[:2]})
    assert torch.allclose(learnt(x), layer(x))


def test_search_finds_the_best_value_and_never_loses_to_ones():
    peak = (0.31, 0.72)
    best, curve = search_density(
        lambda d: -sum((a - b) ** 2 for a, b in zip(d, peak, strict=True)),
        [(0.05, 1), (0.5, 1.5)],
        steps=9,
        rounds=2,
    )
    assert np.allclose(best, peak, atol=0.02) and curve[0][0] == (1.0, 1.0)
    assert len({density for density, _ in curve}) == len(curve)
    assert search_density(lambda d: float(d == (1.0,)), [(0.5, 1.5)])[0] == (1.0,)
