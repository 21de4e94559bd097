"""FDConv: parity with numbers that the official layer gave, identity, groups of frequencies, bands."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.measure.cost import operator_costs
from featherweight.ops.fdconv import Bands, FDConv2d, FDLinear
from featherweight.ops.fdconv.modulation import BandModulation
from featherweight.ops.replace import replace_convs

FIXTURE = Path(__file__).parents[1] / "fixtures" / "fdconv.npz"
FORMS = {
    "plain3": ((32, 48, 3), {"padding": 1, "stride": 2, "kernel_num": 4}),
    "point": ((32, 64, 1), {"kernel_num": 8, "bias": False}),
    "tanh": ((24, 24, 3), {"padding": 1, "global_act": "tanh", "local_act": "tanh"}),
    "softmax": (
        (20, 20, 3),
        {
            "padding": 1,
            "kernel_num": 5,
            "global_act": "softmax",
            "frequencies_only": True,
            "local_act": None,
        },
    ),
    "copies": (
        (20, 20, 3),
        {"padding": 2, "dilation": 2, "param_ratio": 2, "temperature": 2.0, "kernel_temperature": 3.0},
    ),
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def ruled(shape: tuple[int, ...], number: int, name: str) -> torch.Tensor:
    """The rule that filled the official layer: noise seeded by the position of the key."""
    noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
    if name.endswith("running_var"):
        return 1 + 0.5 * noise
    return (0.05 if name.endswith("dft_weight") else 0.3) * noise


def randomise(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter))
    return layer


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_parity_with_the_official_layer(form):
    stored = np.load(FIXTURE)
    state = {"group": torch.from_numpy(stored[f"{form}.group"]).short()}
    for number, entry in enumerate(bytes(stored[f"{form}.keys"]).decode().split("\n")):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        state[key] = torch.tensor(0) if key.endswith("tracked") else ruled(shape, number, key)
    sizes, kwargs = FORMS[form]
    layer = FDConv2d(*sizes, **kwargs).eval()
    layer.load_state_dict(state)
    x = torch.from_numpy(np.random.RandomState(99).uniform(-1, 1, (2, sizes[0], 9, 7))).float()
    assert relative(layer(x), torch.from_numpy(stored[f"{form}.y"])) < 1e-5


@pytest.mark.parametrize(
    "sizes", [(64, 64, 3, 1, 1), (64, 32, 3, 2, 1), (32, 64, 1), (17, 33, 3), (12, 24, (3, 5), 1, 2, 1, 4)]
)
@torch.no_grad()
def test_a_converted_layer_is_the_plain_one(sizes):
    conv = nn.Conv2d(*sizes)
    x = torch.randn(2, sizes[0], 14, 13)
    for kwargs in ({}, {"kernel_num": 64, "param_ratio": 2}, {"kernel_num": 1}, {"kernel_num": None}):
        layer = FDConv2d.from_conv(conv, **kwargs).eval()
        assert relative(layer(x), conv(x)) < 1e-5
    twin = FDConv2d(*sizes).eval()
    twin.load_state_dict(conv.state_dict())
    assert relative(twin(x), conv(x)) < 1e-5


def test_sizes_of_a_layer():
    layer = FDConv2d(64, 64, 3, padding=1, kernel_num=64)
    assert layer.dft_weight.shape == (1, 192, 97, 2) and layer.local.conv.weight.shape == (576, 1, 5)
    count = sum(p.numel() for p in layer.parameters())
    heads = 64 * 16 + 32 + 2 + (64 + 64 + 9 + 64) * 17
    assert count == 192 * 97 * 2 + heads + 2 * 64 + 576 * 5 + 3 * (64 * 9 + 1) + 64


@pytest.mark.parametrize(("sizes", "n"), [((32, 48, 3), 4), ((17, 21, 3), 5), ((40, 40, 1), 64)])
@torch.no_grad()
def test_groups_are_disjoint_kernels_from_low_to_high(sizes, n):
    layer = FDConv2d(*sizes, kernel_num=n)
    counts = torch.bincount(layer.group.flatten().long(), minlength=n)
    assert len(counts) == n and counts.max() - counts.min() <= 1
    rows, columns = torch.fft.fftfreq(layer.rows), torch.fft.rfftfreq(layer.columns)
    distance = (rows[:, None] ** 2 + columns**2).sqrt()
    means = torch.tensor([distance[layer.group == g].mean() for g in range(n)])
    assert (means.diff() > 0).all()
    kernels = layer.kernel(torch.eye(n)).flatten(1)
    cosines = F.cosine_similarity(kernels[:, None], kernels, dim=-1) - torch.eye(n)
    # A group may hold one frequency and its own mirror image apart, so a pair can share some energy.
    assert cosines.abs().median() < 1e-5
    assert relative(kernels.sum(0), layer.kernel(torch.full((1, n), 1.0))[0].flatten()) < 1e-5


@torch.no_grad()
def test_fewer_frequencies_keep_the_scale_of_the_lowest():
    conv = nn.Conv2d(16, 16, 3)
    layer = FDConv2d.from_conv(conv, param_reduction=0.5)
    assert layer.dft_weight.shape == (1, 48 * 25 // 2, 2)
    z = torch.fft.rfft2(conv.weight.permute(0, 2, 1, 3).reshape(48, 48))
    mask = torch.zeros(48 * 25)
    mask[layer.kept] = 1
    low = torch.fft.irfft2(z * mask.view(48, 25), s=(48, 48)).view(16, 3, 16, 3).permute(0, 2, 1, 3)
    found = layer.kernel(torch.full((1, 4), 0.25))[0]
    assert relative(found, low) < 1e-5


@torch.no_grad()
def test_both_ways_to_scale_agree():
    layer = randomise(FDConv2d(24, 40, 3, padding=1)).eval()
    x = torch.randn(2, 24, 33, 33)  # large: the kernel is scaled
    mean = x.mean((2, 3), keepdim=True)
    channel, filters, taps, frequencies = layer.modulation(mean)
    weight = layer.kernel(frequencies) * taps.view(-1, 1, 1, 3, 3) * layer.local(mean)
    z = layer.bands(x) * channel[:, :, None, None]
    y = torch.cat([F.conv2d(z[i : i + 1], weight[i], padding=1) for i in range(2)])
    expected = y * filters[:, :, None, None] + layer.bias[:, None, None]
    assert relative(layer(x), expected) < 1e-5
    small = torch.randn(2, 24, 3, 3)  # the maps are scaled
    assert relative(layer(small)[:1], layer(small[:1])) < 1e-5


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 1, "kernel_num": 1, "local_act": None},
        {"kernel_size": 3, "kernel_num": 1, "frequencies_only": True, "local_act": None},
        {"kernel_size": 3, "kernel_num": 1},
        {"kernel_size": 3, "groups": 4, "padding": 1},
        {"kernel_size": 3, "groups": 24, "param_ratio": 2},
    ],
)
@torch.no_grad()
def test_samples_do_not_mix(kwargs):
    layer = randomise(FDConv2d(24, 24, **kwargs)).eval()
    for side in (3, 40):
        x = torch.randn(3, 24, side, side)
        together = layer(x)
        assert relative(torch.cat([layer(x[i : i + 1]) for i in range(3)]), together) < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (5, 8), (64, 33), (70, 130)])
@torch.no_grad()
def test_bands_add_up(size):
    x = torch.randn(2, 6, *size)
    assert relative(BandModulation(6, Bands((2, 3, 16)))(x), x) < 1e-5
    halved = BandModulation(6, Bands((2,)))
    halved.heads[0].bias.fill_(-100.0)
    spectrum = torch.fft.fft2(halved(x))
    rows, columns = torch.fft.fftfreq(size[0]).abs(), torch.fft.fftfreq(size[1]).abs()
    high = torch.maximum(rows[:, None], columns) > 0.25 + 2 / min(64, *size)
    if high.any():
        assert spectrum[..., high].abs().max() < 1e-3 * spectrum.abs().max()


def test_training_on_one_image_and_on_tokens():
    layer = FDConv2d(16, 16, 3, padding=1).train()
    before = layer.modulation.bn.running_mean.clone()
    layer(torch.randn(1, 16, 8, 8)).sum().backward()
    assert torch.equal(layer.modulation.bn.running_mean, before)
    layer(torch.randn(2, 16, 8, 8))
    assert not torch.equal(layer.modulation.bn.running_mean, before)
    linear = nn.Linear(20, 24)
    tokens = FDLinear.from_conv(linear).eval()
    for shape in ((3, 20), (3, 7, 20), (2, 5, 4, 20)):
        x = torch.randn(shape)
        assert relative(tokens(x), linear(x)) < 1e-5


@torch.no_grad()
def test_hosts_keep_their_answers():
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(2, 3, 64, 64)
    hosts = [
        (torchvision.models.resnet18(num_classes=5), {}, 16),
        (
            torchvision.models.convnext_tiny(num_classes=5),
            {"where": "features.1.[01].block.[35]", "linear": True},
            4,
        ),
        (torchvision.models.swin_t(num_classes=5), {"where": "features.1.*.mlp.[03]", "linear": True}, 4),
    ]
    for model, kwargs, layers in hosts:
        model.eval()
        expected = model(x)
        replace_convs(model, "fdconv", kernel_num=8, **kwargs)
        assert sum(isinstance(m, FDConv2d) for m in model.modules()) == layers
        assert relative(model(x), expected) < 1e-4


def test_costs_name_the_transforms():
    layer = nn.Sequential(FDConv2d(32, 32, 3, padding=1))
    (cost,) = operator_costs(layer, (32, 16, 16))
    assert cost.operator == "FDConv2d" and cost.params == sum(p.numel() for p in layer.parameters())
    maps, kernel = 4 * 32 * round(1.25 * 256 * 8), round(1.25 * 96**2 * np.log2(96**2))
    assert cost.transform_macs == maps + kernel


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"kernel_num": 0}, "kernel_num"),
        ({"param_reduction": 0.0}, "param_reduction"),
        ({"global_act": "softmax"}, "global_act"),
        ({"local_act": "relu"}, "local_act"),
        ({"bands": Bands(groups=3)}, "groups=3"),
    ],
)
def test_options_are_checked(kwargs, word):
    with pytest.raises(UsageError, match=word):
        FDConv2d(16, 16, 3, **kwargs)


@torch.no_grad()
def test_the_order_of_equal_distances_is_saved():
    layer = randomise(FDConv2d(20, 20, 3)).eval()
    layer.group.copy_(layer.group.flip(0))
    twin = FDConv2d(20, 20, 3).eval()
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(1, 20, 6, 6)
    assert torch.equal(twin(x), layer(x))
