"""TVConv: parity with the official layer, deployment at both strides, sizes, kernels kept in eval mode."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.replace import replace_convs
from featherweight.ops.tvconv import PlaceConv2d, TVConv2d, fuse_tvconvs, sum_over_taps

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tvconv.npz"
FORMS = {
    "one": {"channels": 6, "size": (7, 5)},
    "two": {"channels": 5, "size": (6, 4), "stride": 2, "maps": 3, "hidden": 8, "layers": 2},
    "five": {"channels": 4, "size": (5, 5), "kernel_size": 5, "bias_maps": True},
}


def build(channels=8, size=(6, 5), kernel_size=3, **kwargs) -> TVConv2d:
    """A layer whose kernels differ from place to place."""
    kwargs = {"padding": kernel_size // 2, "bias": False, **kwargs}
    layer = TVConv2d(channels, channels, kernel_size, groups=channels, size=size, **kwargs)
    with torch.no_grad():
        layer.affinity.normal_()
    return layer.eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def ruled(shape: tuple[int, ...], number: int, name: str) -> torch.Tensor:
    """The rule that filled the official networks: noise seeded by the position of the key."""
    noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
    if name.endswith("running_var"):
        return 1 + 0.5 * noise
    if name.endswith("posi_map"):
        return 1 + 0.5 * noise
    if len(shape) == 4:
        return noise * (3 / np.prod(shape[1:])) ** 0.5
    if len(shape) == 2:
        return noise * (3 / shape[1]) ** 0.5
    return 1 + 0.3 * noise if name.endswith("weight") else 0.1 * noise


def official_state(stored, name: str) -> dict[str, torch.Tensor]:
    constants = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w", "num_batches_tracked")
    state = {}
    for number, entry in enumerate(bytes(stored[f"{name}.keys"]).decode().split("\n")):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        constant = key.split(".")[-1] in constants
        state[key] = torch.tensor(0) if constant else ruled(shape, number, key)
    return state


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_parity_with_the_official_layer(form):
    stored, kwargs = np.load(FIXTURE), FORMS[form]
    layer = build(**kwargs)
    layer.load_state_dict(official_state(stored, form))
    stride = kwargs.get("stride", 1)
    shape = (2, kwargs["channels"], *(stride * side for side in kwargs["size"]))
    x = torch.from_numpy(np.random.RandomState(99).uniform(-1, 1, shape)).float()
    expected = torch.from_numpy(stored[f"{form}.y"])
    assert relative(layer(x), expected) < 1e-5
    assert relative(layer.fuse()(x), expected) < 1e-5


@pytest.mark.parametrize(("kwargs", "params"), [({}, 23_040), ({"hidden": 64, "layers": 3}, 228_672)])
def test_sizes_of_a_layer(kwargs, params):
    layer = build(8, (12, 12), **kwargs)
    assert sum(p.numel() for p in layer.parameters()) == params
    assert sum(p.numel() for p in layer.fuse().parameters()) == 8 * 9 * 144


@pytest.mark.parametrize(
    ("kwargs", "side"),
    [
        ({}, (4, 5)),
        ({"stride": 2}, (8, 10)),
        ({"stride": 2}, (7, 9)),
        ({"stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)}, (8, 11)),
        ({"kernel_size": 4, "padding": "same"}, (4, 5)),
        ({"padding_mode": "reflect", "bias": True}, (4, 5)),
        ({"bias_maps": True, "bias": True}, (4, 5)),
    ],
)
@torch.no_grad()
def test_naive_loop_and_deployment(kwargs, side):
    size = (4, 5)
    layer = build(3, size, **kwargs)
    if layer.bias is not None:
        layer.bias.normal_()
    x = torch.randn(2, 3, *side)
    weight, bias = layer._weight_and_bias()
    padded = layer.pad(x)
    expected = torch.zeros(2, 3, *size)
    (sy, sx), (dy, dx), (kh, kw) = layer.stride, layer.dilation, layer.kernel_size
    for row, column in np.ndindex(size):
        rows = slice(row * sy, row * sy + dy * (kh - 1) + 1, dy)
        columns = slice(column * sx, column * sx + dx * (kw - 1) + 1, dx)
        patch = padded[:, :, rows, columns].flatten(2)
        expected[:, :, row, column] = (patch * weight[..., row, column]).sum(-1)
    expected += 0 if bias is None else bias
    assert relative(layer(x), expected) < 1e-5
    fused = layer.fuse()
    assert isinstance(fused, PlaceConv2d) and relative(fused(x), expected) < 1e-5


@torch.no_grad()
def test_equal_kernels_make_a_depthwise_convolution():
    layer = PlaceConv2d(4, kernel_size=3, stride=2, padding=1, size=(5, 6), bias=False)
    kernel = torch.randn(4, 9)
    layer.weight.copy_(kernel[:, :, None, None].expand_as(layer.weight))
    x = torch.randn(2, 4, 10, 12)
    expected = F.conv2d(x, kernel.view(4, 1, 3, 3), stride=2, padding=1, groups=4)
    assert relative(layer(x), expected) < 1e-6
    layer.weight.normal_()
    shifted = layer(x.roll(2, 3))
    assert not torch.allclose(shifted[..., 2:-1], layer(x).roll(1, 3)[..., 2:-1], atol=1e-2)


@torch.no_grad()
def test_other_sizes_are_refused_or_interpolated():
    layer = build(4, (6, 6))
    with pytest.raises(UsageError, match=r"\(6, 6\).*resize=True"):
        layer(torch.randn(1, 4, 8, 8))
    layer = build(4, (6, 6), resize=True, bias_maps=True)
    x = torch.randn(1, 4, 9, 13)
    weight, bias = layer._weight_and_bias()
    wide = F.interpolate(weight, size=(9, 13), mode="bilinear")
    other = build(4, (9, 13))
    expected = sum_over_taps(other, x, wide, F.interpolate(bias[None], size=(9, 13), mode="bilinear")[0])
    assert relative(layer(x), expected) < 1e-5
    assert layer(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)


def test_kernels_are_generated_once_in_eval_mode_and_anew_in_training():
    layer, calls = build(4, (6, 6)), []
    layer.generator.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and len(calls) == 1
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    assert len(calls) == 2
    with torch.no_grad():
        after = layer.eval()(x)
        assert len(calls) == 3 and not torch.allclose(after, first)
        layer.affinity.add_(1.0)  # changed behind its back
        assert not torch.allclose(layer(x), after)


@torch.no_grad()
def test_networks_and_shared_layers():
    shared = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), shared, nn.ReLU(), shared)
    replace_convs(model, "tvconv", input_size=(3, 8, 8), hidden=8)
    assert isinstance(model[1], TVConv2d) and model[1] is model[3] and type(model[0]) is nn.Conv2d
    assert torch.equal(model[1].bias, shared.bias)
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    assert fuse_tvconvs(model) is model and model[1] is model[3]
    assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"groups": 2}, "groups=2"),
        ({"size": None}, "size"),
        ({"size": (0, 4)}, "size"),
        ({"hidden": 0}, "hidden=0"),
        ({"out_channels": 8}, "depthwise"),
    ],
)
def test_options_are_checked(kwargs, word):
    base = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "size": (4, 4)}
    with pytest.raises(UsageError, match=word):
        TVConv2d(**{**base, **kwargs})
