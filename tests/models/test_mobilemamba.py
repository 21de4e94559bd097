"""MobileMamba: parity with numbers that the official code gave, wavelets, the scan's symmetry, merging."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import relative
from torch import nn

from featherweight.errors import CheckpointError
from featherweight.models.mobilemamba import MobileMambaBlock, split_channels
from featherweight.models.mobilemamba.far import Scan2d, WaveletConv, haar, inverse_haar
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mobilemamba.npz"
RECORDED = ("mobilemamba_t2", "mobilemamba_b1")
OFFICIAL_COUNTS = {
    "mobilemamba_t2": 8_836_890,
    "mobilemamba_t4": 14_176_090,
    "mobilemamba_s6": 15_036_632,
    "mobilemamba_b1": 17_122_849,
}
"""Parameters of the official class, its fixed Haar filters included."""


def ruled_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Fill a state dict by a rule that needs no file: a cosine over the position, scaled by kind and fan-in.

    The shortcuts double the activations many times, so the norms that end a branch are kept small.
    """
    state = {}
    for number, (key, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        wave = torch.from_numpy(np.cos(0.7 * np.arange(size) ** 1.1 + number)).float().reshape(shape)
        ends = any(part in key for part in ("pw2.bn", "dw0.m.bn", "dw1.m.bn", "proj.1.bn"))
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif key.endswith("bn.weight"):
            wave = (0.3 if ends else 0.8) * (1 + 0.3 * wave)
        elif key.endswith("A_logs"):
            wave = 0.5 * wave - 1
        elif key.endswith(("Ds", "scale.weight", "scale.0.weight", "norm.weight")) or ".bn" in key:
            wave = (1 if "weight" in key or "Ds" in key else 0.1) * (0.5 + 0.3 * wave)
        elif len(shape) > 1:
            wave = wave * (2 / np.prod(shape[1:])) ** 0.5
        else:
            wave = 0.1 * wave
        state[key] = wave
    return state


def wave_images(batch: int, side: int) -> torch.Tensor:
    wave = np.sin(0.37 * np.arange(batch * 3 * side * side) ** 1.05)
    return torch.from_numpy(wave).float().reshape(batch, 3, side, side)


def recorded_state(name: str) -> dict[str, torch.Tensor]:
    rows = [row.split(" ") for row in np.load(FIXTURE)[f"{name}.keys"].tolist()]
    return ruled_state({key: tuple(map(int, shape)) for key, *shape in rows})


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_parity_with_the_official_code(name):
    expected = torch.from_numpy(np.load(FIXTURE)[f"{name}.logits"])
    model = create_model(name, num_classes=10).eval()
    model.load_official(recorded_state(name))
    assert expected.std() > 1e-3
    assert relative(model(wave_images(2, 64)), expected) < 1e-4
    fused = model.fuse()
    assert relative(fused(wave_images(2, 64)), expected) < 1e-4


@torch.no_grad()
def test_parity_in_training_mode():
    expected = torch.from_numpy(np.load(FIXTURE)["mobilemamba_t2.train_logits"])
    model = create_model("mobilemamba_t2", num_classes=10).train()
    model.load_official(recorded_state("mobilemamba_t2"))
    assert relative(model(wave_images(4, 128)), expected) < 1e-4


@pytest.mark.parametrize("name", OFFICIAL_COUNTS)
def test_parity_of_the_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    filters = sum(2 * 4 * m.conv.in_channels for m in model.modules() if isinstance(m, WaveletConv))
    assert sum(p.numel() for p in model.parameters()) + filters == OFFICIAL_COUNTS[name]


def test_official_checkpoints_in_all_wrappings():
    state = recorded_state("mobilemamba_t2")
    rows = np.load(FIXTURE)["mobilemamba_t2.filters"].tolist()
    filters = {row.split(" ")[0]: torch.zeros(1) for row in rows}
    reference = create_model("mobilemamba_t2", num_classes=10)
    reference.load_official(state)
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    for wrapped in (
        {f"module.{key}": value for key, value in (state | filters).items()},
        {"net": state, "net_E": None, "optimizer": {}},
        {"net": zeros, "net_E": state | filters},
        {"state_dict_ema": state, "state_dict": zeros},
        reference.state_dict(),
    ):
        model = create_model("mobilemamba_t2", num_classes=10)
        model.load_official(wrapped)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    with pytest.raises(CheckpointError):
        create_model("mobilemamba_t4", num_classes=10).load_official(state)


@torch.no_grad()
def test_two_heads_become_their_mean():
    generator = torch.Generator().manual_seed(0)
    state = recorded_state("mobilemamba_t2")
    second = {
        key.replace("head.", "head_dist."): value + 0.1 * torch.rand(value.shape, generator=generator)
        for key, value in state.items()
        if key.startswith("head.")
    }
    swapped = state | {key.replace("head_dist.", "head."): value for key, value in second.items()}
    outputs = []
    for weights in (state, swapped, state | second):
        model = create_model("mobilemamba_t2", num_classes=10).eval()
        model.load_official(weights)
        outputs.append(model(wave_images(2, 64)))
    assert relative(outputs[2], (outputs[0] + outputs[1]) / 2) < 1e-5


@torch.no_grad()
def test_fusing_changes_layers_and_not_answers():
    torch.manual_seed(0)
    model = create_model("mobilemamba_t2", num_classes=10, width=0.5)
    model.load_official({key: _noise(key, value) for key, value in model.state_dict().items()})
    model.eval()
    x = torch.randn(2, 3, 96, 96)
    expected, before = model(x), len(list(model.parameters()))
    assert model.fuse() is model
    assert relative(model(x), expected) < 1e-4
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert len(list(model.parameters())) < 0.75 * before
    twice = model.fuse()(x)
    assert relative(twice, expected) < 1e-4


def _noise(key: str, value: torch.Tensor) -> torch.Tensor:
    """Move every weight away from its trivial start, by little, for the shortcuts multiply."""
    if not value.is_floating_point():
        return value
    moved = value + 0.1 * torch.randn_like(value) / max(1, value[0].numel()) ** 0.5
    return 0.5 + torch.rand_like(value) if key.endswith("norm.running_var") else moved


def test_haar_bands_equal_a_naive_oracle_and_come_back():
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
    bands = haar(x)
    for channel, band, i, j in ((0, 0, 0, 0), (1, 1, 2, 3), (2, 2, 1, 0), (0, 3, 2, 2)):
        corner = x[0, channel, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
        assert torch.isclose(bands[0, 4 * channel + band, i, j], (signs[band] * corner).sum())
    assert torch.allclose(inverse_haar(bands), x)
    assert torch.isclose(bands.square().sum(), x.square().sum())


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 3)])
@torch.no_grad()
def test_wavelets_of_odd_maps_are_cropped_back(size):
    layer = WaveletConv(3, 5)
    layer.scale.fill_(1)
    layer.conv.weight.zero_()[:, 0, 2, 2] = 1
    x = torch.randn(2, 3, *size)
    assert torch.allclose(layer(x), x, atol=1e-6)


@torch.no_grad()
def test_turning_the_map_swaps_the_directions():
    torch.manual_seed(0)
    layer = Scan2d(16).double().eval()
    layer.conv.weight.zero_()[:, 0, 1, 1] = 1
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    expected = layer(x).flip(2, 3)
    for parameter in (layer.x_proj, layer.dt_proj, layer.dt_bias, layer.a_log, layer.skip):
        parameter.copy_(parameter.flip(0))
    assert torch.allclose(layer(x.flip(2, 3)), expected, atol=1e-12)
    assert not torch.allclose(layer(x), expected.flip(2, 3), atol=1e-6)


def test_gradcheck_of_the_scan_over_a_map():
    torch.manual_seed(0)
    layer = Scan2d(2).double().eval()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@torch.no_grad()
def test_an_untrained_block_doubles_its_input():
    x = torch.randn(1, 48, 4, 4)
    assert torch.equal(MobileMambaBlock(48, 0).eval()(x), 2 * x)


def test_channel_splits_are_the_official_ones():
    shares = ((0.8, 0.2), (0.7, 0.2), (0.6, 0.3))
    measured = {
        (144, 272, 368): ((112, 28, 4), (192, 54, 26), (224, 110, 34)),
        (176, 368, 448): ((144, 32, 0), (256, 73, 39), (272, 134, 42)),
        (192, 384, 448): ((160, 32, 0), (272, 76, 36), (272, 134, 42)),
        (200, 376, 448): ((160, 40, 0), (256, 75, 45), (272, 134, 42)),
    }
    for widths, splits in measured.items():
        found = [split_channels(c, *share) for c, share in zip(widths, shares, strict=True)]
        assert tuple(found) == splits


def test_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = create_model("mobilemamba_t2", num_classes=4, width=0.25).train()
    x, grads = torch.randn(4, 3, 64, 64), []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(*grads) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_takes_the_whole_network():
    model = create_model("mobilemamba_t2", num_classes=4, width=0.25).eval()
    x = torch.randn(2, 3, 64, 64)
    assert relative(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)) < 1e-4
