"""Hypercomplex layers: naive sums, the Hamilton product, official outputs, nearest sums, the kept weight."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.phnn import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHLinear,
    hamilton_algebra,
    kronecker_sum,
    nearest_kronecker_sum,
)
from featherweight.ops.replace import replace_convs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "phnn.npz"
BUILT = {
    "conv1d": lambda: PHConv1d(8, 4, 3, stride=2, padding=1, dilation=2, n=4),
    "conv2d": lambda: PHConv2d(6, 9, 3, stride=2, padding=1, n=3),
    "conv3d": lambda: PHConv3d(4, 6, 3, stride=1, padding=2, dilation=2, n=2),
    "linear": lambda: PHLinear(16, 12, n=4),
    "linear_capital": lambda: PHLinear(9, 6, n=3),
}


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_weight_is_the_sum_of_kronecker_products(n, kernel):
    torch.manual_seed(0)
    algebra, filters = torch.randn(n, n, n), torch.randn(n, 2, 3, *kernel)
    found = kronecker_sum(algebra, filters)
    for place in itertools.product(*(range(k) for k in kernel)):
        expected = sum(torch.kron(algebra[i], filters[(i, ..., *place)]) for i in range(n))
        assert torch.allclose(found[(..., *place)], expected, atol=1e-6)


def as_matrices(quaternions):
    """`(4, ...)` to complex `(..., 2, 2)` matrices, whose product is the product of the quaternions."""
    a, b, c, d = quaternions
    rows = (torch.complex(a, b), torch.complex(c, d), torch.complex(-c, d), torch.complex(a, -b))
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


def test_four_components_with_the_hamilton_algebra_multiply_quaternions():
    torch.manual_seed(0)
    layer = PHConv2d(8, 12, 3, bias=False, n=4).double()
    layer.algebra.data.copy_(hamilton_algebra())
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    numbers = as_matrices(x[0].unflatten(0, (4, 2)))  # (2, 5, 6, 2, 2)
    weights = as_matrices(layer.filters.detach())  # (3, 2, 3, 3, 2, 2)
    expected = torch.zeros(3, 3, 4, 2, 2, dtype=torch.complex128)
    for out, into, row, column, i, j in np.ndindex(3, 2, 3, 4, 3, 3):
        expected[out, row, column] += weights[out, into, i, j] @ numbers[into, row + i, column + j]
    found = as_matrices(layer(x).detach()[0].unflatten(0, (4, 3)))
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", BUILT)
@torch.no_grad()
def test_parity_with_the_official_layer(name):
    recorded = np.load(FIXTURE)
    head = f"layer.{name}."
    layer = BUILT[name]()
    state = {
        k.removeprefix(head + "state."): torch.from_numpy(recorded[k])
        for k in recorded
        if k.startswith(head + "state.")
    }
    layer.load_state_dict(state)
    expected = torch.from_numpy(recorded[head + "y"])
    found = layer(torch.from_numpy(recorded[head + "x"]))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert sum(p.numel() for p in layer.parameters()) == sum(value.numel() for value in state.values())


def test_counts_of_the_sheet():
    assert sum(p.numel() for p in PHConv2d(6, 9, 3, n=3).parameters()) == 198
    assert sum(p.numel() for p in PHLinear(16, 12, n=4).parameters()) == 124


def test_official_conv_bias_is_dropped_and_ours_works():
    layer = PHConv2d(4, 4, 3, n=2)
    assert not torch.equal(layer(torch.zeros(1, 4, 5, 5)), torch.zeros(1, 4, 3, 3))
    official = {"A": torch.ones(2, 2, 2), "F": torch.ones(2, 2, 2, 3, 3), "bias": torch.ones(4)}
    layer.load_state_dict(official)
    assert not layer.bias.any() and set(official) == {"A", "F", "bias"}
    linear = PHLinear(4, 4, n=2)
    linear.load_state_dict({"A": torch.ones(2, 2, 2), "S": torch.ones(2, 2, 2), "bias": torch.ones(4)})
    assert linear.bias.sum() == 4


@pytest.mark.parametrize("name", BUILT)
@torch.no_grad()
def test_fused_layer_computes_the_same_and_leads_back(name):
    torch.manual_seed(0)
    layer = BUILT[name]().eval()
    x = torch.from_numpy(np.load(FIXTURE)[f"layer.{name}.x"])
    plain = layer.fuse()
    assert type(plain) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    assert torch.allclose(plain(x), layer(x), atol=1e-6)
    again = type(layer).from_conv(plain, n=layer.n)
    assert torch.allclose(again(x), plain(x), atol=1e-5)


def test_one_component_is_the_ordinary_layer():
    conv = nn.Conv2d(5, 7, 3, stride=2, padding=1)
    x = torch.randn(2, 5, 9, 9)
    assert torch.allclose(PHConv2d.from_conv(conv, n=1)(x), conv(x), atol=1e-5)


def test_nearest_sum_leaves_the_tail_of_the_singular_values():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 3)
    left = weight - kronecker_sum(*nearest_kronecker_sum(weight, 2))
    rearranged = torch.stack(
        [weight[2 * a : 2 * a + 2, 3 * b : 3 * b + 3].flatten() for a in (0, 1) for b in (0, 1)]
    )
    tail = np.linalg.svd(rearranged.numpy(), compute_uv=False)[2:]
    assert float(left.square().sum()) == pytest.approx(float((tail**2).sum()), rel=1e-4)
    # A weight with fewer entries in a block than terms: the sum is exact and the other terms are empty.
    tiny = torch.randn(4, 4)
    assert torch.allclose(kronecker_sum(*nearest_kronecker_sum(tiny, 4)), tiny, atol=1e-6)


def test_algebra_of_the_quaternions_is_learnt_from_examples():
    torch.manual_seed(0)
    target = hamilton_algebra()
    algebra = nn.Parameter(nn.init.xavier_uniform_(torch.empty(4, 4, 4)))
    optimizer = torch.optim.Adam([algebra], lr=3e-2)
    for _ in range(300):
        filters, x = torch.randn(4, 2, 2, 3, 3), torch.randn(2, 8, 4, 4)
        gap = F.conv2d(x, kronecker_sum(algebra, filters) - kronecker_sum(target, filters))
        optimizer.zero_grad()
        gap.square().mean().backward()
        optimizer.step()
    assert (algebra - target).abs().max() < 1e-3


@torch.no_grad()
def test_kept_weight_follows_the_parameters():
    layer = PHConv2d(4, 4, 3, n=2).eval()
    x = torch.randn(1, 4, 6, 6)
    layer(x)
    kept = layer.effective_weight()
    assert layer.effective_weight() is kept
    layer.filters.mul_(2)
    doubled = layer.effective_weight()
    assert torch.allclose(doubled, 2 * kept)
    layer.filters = nn.Parameter(layer.filters / 2)
    assert torch.allclose(layer.effective_weight(), kept)
    layer.load_state_dict({k: torch.zeros_like(v) for k, v in layer.state_dict().items()})
    assert not layer(x).any()
    assert layer.double()(x.double()).dtype == torch.float64


def test_kept_weight_stays_out_of_gradients_and_of_other_modes():
    layer = PHConv2d(4, 4, 3, n=2).eval()
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
    layer(x).sum().backward()
    assert layer.algebra.grad.abs().sum() > 0
    layer.requires_grad_(False)
    found = layer(x)  # the weight kept now takes part in a graph
    found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.eval()(x)
        assert layer.effective_weight().dtype == torch.float32


def test_swapping_keeps_what_does_not_divide():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 4)
    )
    replace_convs(net, "phnn")
    assert [type(m).__name__ for m in net[:3]] == ["Conv2d", "PHConv2d", "Conv2d"]
    replace_convs(net, "phnn", where=["2", "4"], linear=True, n=2)
    assert type(net[2]) is PHConv2d and type(net[4]) is PHLinear
    with pytest.raises(UsageError, match=r"'0'.*n=2.*3 input"):
        replace_convs(net, "phnn", where="0", n=2)
