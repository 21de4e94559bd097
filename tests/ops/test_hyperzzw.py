"""HyperZ·Z·W: kernels against a naive coordinate network, the products, the context, the feedback error."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.hyperzzw import BATCH, ContextKernel, HyperKernel, HyperZZW2d, local_feedback_error
from featherweight.ops.replace import replace_convs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "hyperzzw.npz"


def vector(conv: nn.Module, values: np.ndarray) -> np.ndarray:
    weight = conv.weight.detach().numpy().reshape(conv.out_channels, -1)
    return weight @ values + conv.bias.detach().numpy()


@pytest.mark.parametrize("size", [(5,), (4, 6)])
def test_kernel_is_that_of_a_naive_network_at_every_place(size):
    torch.manual_seed(0)
    net = HyperKernel(size, 3, 8, 2)
    nn.init.normal_(net.field)
    kernel = net.effective_weight().detach().numpy()[0]
    field = net.field.detach().numpy()[0, 0]
    for place in np.ndindex(*size):
        at = np.array([-1 + 2 * i / (n - 1) for i, n in zip(place, size, strict=True)])
        h = np.sin(vector(net.filters[0], at))
        for gate, mixer in zip(net.filters[1:], net.mixers, strict=True):
            h = np.sin(vector(gate, at)) * vector(mixer, h) + field[place]
        assert np.allclose(vector(net.out, h), kernel[(slice(None), *place)], atol=1e-5)


def test_parity_of_the_global_kernel_with_the_official_one():
    recorded = np.load(FIXTURE)
    shapes = dict(zip(recorded["keys"].tolist(), recorded["small.shapes"].tolist(), strict=True))
    net = HyperKernel((16, 16), 12, 64, 2)
    head = "blocks.1.fast_multi_branch.slow_net_g.Kernel."
    names = {"filters.": "filters.", "linears.": "mixers.", "output_linear.": "out.", "bias_p": "field"}
    state = {}
    for number, (key, text) in enumerate(shapes.items()):
        if key.startswith(head):
            shape = tuple(map(int, text.split()))
            wave = torch.from_numpy(np.cos(0.7 * np.arange(math.prod(shape)) ** 1.1 + number)).float()
            weight = key.endswith("weight")
            scale = 3 if weight and "filters" in key else (2 / shape[1]) ** 0.5 if weight else 0.1
            ours = key.removeprefix(head).replace(".linear.", ".")
            for old, new in names.items():
                ours = new + ours.removeprefix(old) if ours.startswith(old) else ours
            state[ours] = scale * wave.reshape(shape)
    net.load_state_dict(state)
    expected = torch.from_numpy(recorded["small.kernel"])
    assert (net.effective_weight() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_smooth_kernels_keep_their_shape_on_a_finer_grid():
    torch.manual_seed(0)
    net = HyperKernel((9, 9), 1, 16, 1, omega0=0.05)
    nn.init.normal_(net.field)
    assert torch.allclose(net.at((17, 17))[..., ::2, ::2], net.effective_weight(), atol=1e-5)
    assert net(torch.zeros(2, 1, 17, 17)).shape == (1, 1, 17, 17)


@torch.no_grad()
def test_layer_is_a_local_and_a_global_product():
    torch.manual_seed(0)
    layer = HyperZZW2d(3, 5, 3, padding=1, size=(6, 6)).eval()
    nn.init.normal_(layer.local_kernel.context)
    x = torch.randn(2, 3, 6, 6)
    near = F.conv2d(x, layer.local_kernel(x), padding=1, groups=3)
    values = (near - near.mean((2, 3), True)) / (near.var((2, 3), False, True) + 1e-5).sqrt()
    kernel = layer.global_kernel.effective_weight()
    far = torch.einsum("ncij,ncjk->ncik", near * kernel, values)
    weight = layer.mix.weight[..., 0, 0]  # near and far of a channel side by side
    expected = torch.einsum("oc,ncij->noij", weight[:, ::2], near)
    expected += torch.einsum("oc,ncij->noij", weight[:, 1::2], far)
    assert torch.allclose(layer(x), expected + layer.mix.bias[:, None, None], atol=1e-5)


def test_context_is_the_batch_in_training_and_a_running_mean_afterwards():
    torch.manual_seed(0)
    net = ContextKernel((3, 3), 4)
    x = torch.randn(6, 4, 8, 8)
    in_training = net(x)
    expected = F.adaptive_avg_pool2d(x, 3).mean(0, True)
    assert torch.allclose(net.context, expected, atol=1e-6) and net.batches == 1
    net.eval()
    assert torch.allclose(net(torch.zeros(1, 4, 5, 5)), in_training, atol=1e-6)
    net.train()(2 * x)
    assert not torch.allclose(net.context, expected)
    batch = ContextKernel((3, 3), 4, statistics=BATCH).eval()
    assert not torch.allclose(batch(x), batch(x[:1])) and "context" not in batch.state_dict()


def test_gradient_of_the_context_is_cut_where_it_is_said_to_be():
    torch.manual_seed(0)
    net = ContextKernel((3, 3), 4)
    x = torch.randn(2, 4, 8, 8)
    net(x).sum().backward()
    cut = net.filters[0].weight.grad.clone()
    net.zero_grad()
    context = net.reduce(F.adaptive_avg_pool2d(x, 3).mean(0, True))
    net.eval().at((3, 3), context).sum().backward()
    whole = net.filters[0].weight.grad
    assert cut.abs().sum() > 0 and whole.norm() > 2 * cut.norm()


def test_feedback_error_is_the_sum_over_pairs():
    torch.manual_seed(0)
    a, b, c = torch.randn(1, 2, 4, 4), torch.randn(1, 4, 4, 4), torch.randn(1, 12, 4, 4)
    pairs = ((a, b, 2), (a, c, 6), (b, c, 3))
    expected = sum((torch.cat([low] * times, 1) - high).square().mean() for low, high, times in pairs)
    assert torch.allclose(local_feedback_error([a, b, c]), expected)
    assert local_feedback_error([a, a.repeat(1, 2, 1, 1), a.repeat(1, 6, 1, 1)]) == 0
    assert local_feedback_error([a, torch.randn(1, 3, 4, 4), torch.randn(1, 4, 5, 5)]) == 0


@torch.no_grad()
def test_host_takes_the_layer_where_maps_are_square():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    replace_convs(net, "hyperzzw", input_size=(3, 16, 16))
    assert type(net[0]) is HyperZZW2d and net[0].size == (8, 8) and type(net[2]) is nn.Conv2d
    assert net(torch.randn(2, 3, 24, 24)).shape == (2, 4, 12, 12)
    with pytest.raises(UsageError, match="as many rows as columns"):
        net(torch.randn(1, 3, 16, 20))
    with pytest.raises(UsageError, match="size"):
        HyperZZW2d(3, 4, 3, size=(8, 9))
    with pytest.raises(UsageError, match="omega0"):
        HyperKernel((4, 4), 1, 8, 1, omega0=0)
    with pytest.raises(UsageError, match="statistics"):
        ContextKernel((3, 3), 4, statistics="mean")
