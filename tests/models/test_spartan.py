"""SpaRTAN: parity with the official class, naive oracles of both mixers, and what `fuse` removes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import CheckpointError, UsageError
from featherweight.models.spartan import (
    BranchScale,
    ChannelMixer,
    PairRotation,
    SpaRTAN,
    SpartanBlock,
    SpatialMixer,
)
from featherweight.registry import create_model
from featherweight.shrink.fold import fold_batchnorm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "spartan.npz"
REDUCED = {"depths": (1, 1, 2, 1), "channels": (16, 32, 64, 128), "num_classes": 10}


def official_state(name: str) -> dict[str, torch.Tensor]:
    """Fill the official keys (recorded with their shapes) by a rule: a cosine over the position."""
    state = {}
    for number, line in enumerate(str(np.load(FIXTURE)[f"{name}.keys"]).splitlines()):
        key, _, sides = line.partition(" ")
        shape = tuple(map(int, sides.split()))
        wave = np.cos(0.7 * np.arange(int(np.prod(shape))) ** 1.1 + number)
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif "scale_" in key:
            wave = 0.3 + 0.2 * wave
        elif key.endswith((".weight", "complex")) and len(shape) > 1:
            wave = wave if key.endswith("complex") else wave * (2 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.3 * wave
        state[key] = torch.from_numpy(wave).float().reshape(shape)
    return state


def build(name: str, **kwargs) -> SpaRTAN:
    return (SpaRTAN(**REDUCED, **kwargs) if name == "reduced" else create_model(name, **kwargs)).eval()


def waves(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(0.37 * np.arange(int(np.prod(shape))) ** 1.05)).float().reshape(shape)


@torch.no_grad()
def lively(module: nn.Module) -> nn.Module:
    """Make every parameter and statistic matter: new blocks are nearly the identity."""
    generator = torch.Generator().manual_seed(3)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(noise.abs() + 0.5 if "running_var" in key else 0.3 * noise)
    return module.eval()


@pytest.mark.parametrize("name", ["reduced", "spartan_t"])
@torch.no_grad()
def test_parity_with_the_official_class(name):
    recorded = np.load(FIXTURE)
    model = build(name)
    model.load_official(official_state(name))
    x = waves(*recorded[f"{name}.input"])
    for mode in ("train", "eval"):  # one pass in training mode moves the statistics, as it did there
        logits = getattr(model, mode)()(x).numpy()
        expected = recorded[f"{name}.{mode}"]
        assert expected.std() > 1e-2
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_parity_of_the_parameter_count():
    assert sum(p.numel() for p in build("reduced").parameters()) == 312_426
    official = sum(v.numel() for k, v in official_state("spartan_t").items() if "running" not in k)
    assert official == sum(p.numel() for p in create_model("spartan_t").parameters()) == 3_820_296


def test_wrapped_checkpoints_load_and_foreign_ones_are_refused():
    state = official_state("reduced")
    model = build("reduced")
    wrapped = {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 300}
    model.load_official(wrapped)
    block = model.body[2]
    assert torch.equal(block.scale2.weight, state["layers.0.scale_2"])
    assert torch.equal(block.channel.rotate.weight, state["layers.0.cmixer.complex"][0, 0, 0])
    assert torch.equal(model.body[3].conv.weight, state["layers.1.conv.weight"])
    for broken in ({"layers.x.y": torch.zeros(1)}, {k: v for k, v in state.items() if "scale_1" not in k}):
        with pytest.raises(CheckpointError, match="SpaRTAN"):
            build("reduced").load_official(broken)


def test_rotation_is_the_product_of_complex_numbers():
    rotate, x = PairRotation(6), torch.randn(2, 6, 3, 5)
    pairs = x.permute(0, 2, 3, 1).unflatten(-1, (3, 2)).contiguous()
    product = torch.view_as_complex(pairs) * torch.view_as_complex(rotate.weight)
    expected = torch.view_as_real(product).flatten(-2).permute(0, 3, 1, 2)
    torch.testing.assert_close(rotate(x), expected, rtol=1e-6, atol=1e-6)
    rotate.weight.data = torch.tensor([1.0, 0.0]).repeat(3, 1)
    assert torch.equal(rotate(x), x)


@torch.no_grad()
def test_channel_mixer_against_a_naive_one():
    mixer = lively(ChannelMixer(8, 2, depthwise=False))
    x = torch.randn(2, 8, 4, 5)
    theta, amplitude, found = F.gelu(mixer.theta(x)), mixer.amplitude(x), torch.empty(2, 16, 4, 5)
    for n, i, j in np.ndindex(2, 4, 5):
        a, t, top = amplitude[n, :, i, j], theta[n, :, i, j], int(x[n, :, i, j].argmax())
        found[n, :, i, j] = a * t + a[top] * t[top]
    expected = mixer.project(mixer.gate(mixer.filter(mixer.rotate(found))))
    torch.testing.assert_close(mixer(x), expected)


def test_gradients_in_double_precision():
    torch.manual_seed(0)
    for module in (ChannelMixer(8, 2, depthwise=True), SpatialMixer(8, depthwise=True)):
        x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lively(module).double(), x)


@torch.no_grad()
def test_strengthening_of_minus_one_leaves_only_the_mean():
    mixer, seen = lively(SpatialMixer(16, depthwise=True)), []
    mixer.gamma.fill_(-1)
    mixer.near.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 16, 6, 7)
    mixer(x)
    mean = mixer.squeeze(x).mean((2, 3), keepdim=True)
    torch.testing.assert_close(seen[0], mean.expand_as(seen[0]))


@torch.no_grad()
def test_far_branch_sees_nine_by_nine_pixels_and_the_near_one_three():
    mixer = lively(SpatialMixer(8, depthwise=True))
    x = torch.randn(1, 4, 31, 31)
    moved = x.clone()
    moved[:, :, 15, 15] += 5
    for branch, side in ((mixer.near, 3), (mixer.far, 9)):
        places = (branch(x) != branch(moved)).any(1)[0].nonzero()
        assert (places.max(0).values - places.min(0).values + 1).tolist() == [side, side]


@torch.no_grad()
def test_mixers_do_not_see_the_scale_and_the_offset_of_an_image():
    block = lively(SpartanBlock(16, 2, early=False))
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(block.norm1(3 * x + 2), block.norm1(x), rtol=1e-4, atol=1e-4)


def test_early_stages_mix_space_densely_and_channels_depthwise():
    model = build("reduced")
    first, last = (model.body[index] for index in (2, -1))
    assert first.spatial.near.conv.groups == first.spatial.far[1].groups == 1
    assert first.channel.filter.conv.groups == 64
    assert last.spatial.near.conv.groups == last.spatial.far[1].groups == 64
    assert last.channel.filter.conv.groups == 128


@torch.no_grad()
def test_fuse_keeps_the_answers_and_removes_layers():
    model = build("reduced")
    model.load_official(official_state("reduced"))
    x = waves(2, 3, 64, 64)
    expected = model(x)
    folded = fold_batchnorm(model)
    for lighter in (folded, model.fuse().fuse()):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in lighter.modules())
        assert (lighter(x) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not any(isinstance(m, BranchScale) for m in model.modules())
    rotations = [block.channel.rotate for block in model.body if isinstance(block, SpartanBlock)]
    assert [isinstance(r, PairRotation) for r in rotations] == [True, True, False, False, False]


@torch.no_grad()
def test_non_square_odd_and_small_images():
    model = build("reduced")
    assert model.forward_features(torch.randn(1, 3, 29, 75)).shape == (1, 128, 1, 2)
    assert build("reduced", stem_stride=1)(torch.randn(1, 3, 15, 15)).shape == (1, 10)


@pytest.mark.slow
@torch.no_grad()
def test_compiles_as_one_graph():
    model = build("reduced")
    x = waves(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_wrong_lists_are_refused():
    for wrong in ({"depths": (1, 1)}, {"channels": (12, 32, 64, 128)}):
        with pytest.raises(UsageError, match="multiples of 8"):
            SpaRTAN(**wrong)
