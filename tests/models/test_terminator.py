"""Terminator: official outputs and counts, batches, standardised groups, the local feedback error."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.models.terminator import SlowFastBlock, Standardise, Terminator
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "hyperzzw.npz"
BLOCKS = [53_377, 57_824, 105_188, 253_580, 863_996]


def ruled_state(recorded, name: str) -> dict[str, torch.Tensor]:
    """Fill the official keys by a rule that needs no file: a scaled cosine over the position."""
    state = {}
    entries = zip(recorded["keys"].tolist(), recorded[f"{name}.shapes"].tolist(), strict=True)
    for number, (key, text) in enumerate(entries):
        shape = tuple(map(int, text.split()))
        size = int(np.prod(shape))
        wave = torch.from_numpy(np.cos(0.7 * np.arange(size) ** 1.1 + number)).float().reshape(shape)
        if "filters" in key and key.endswith("weight"):
            wave = 3 * wave
        elif key.endswith("weight"):
            wave = wave * (2 / np.prod(shape[1:])) ** 0.5
        else:
            wave = 0.1 * wave
        state[key] = wave
    return {**state, "blocks.0.fast_multi_branch.slow_net_g.train_length": torch.ones(1)}


def wave_input(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.sin(0.37 * np.arange(int(np.prod(shape))) ** 1.05)).float().reshape(shape)


def loaded(name: str, side: int, **kwargs) -> tuple[Terminator, torch.Tensor, torch.Tensor]:
    recorded = np.load(FIXTURE)
    model = Terminator(side=side, num_classes=10, **kwargs)
    model.load_official(ruled_state(recorded, name))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0
    return model, wave_input((4, 3, side, side)), torch.from_numpy(recorded[f"{name}.logits"])


@pytest.mark.parametrize(("name", "side"), [("cifar10", 32), ("small", 16)])
@torch.no_grad()
def test_parity_with_the_official_network(name, side):
    model, x, expected = loaded(name, side, statistics="batch")
    recorded = np.load(FIXTURE)
    assert (model.eval()(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    half = torch.from_numpy(recorded[f"{name}.half"])
    assert (model(x[:2]) - half).abs().max() < 1e-5 * expected.abs().max()
    assert float(model.feedback_error()) == pytest.approx(float(recorded[f"{name}.feedback"]), rel=1e-5)


@torch.no_grad()
def test_parity_in_training_mode_and_running_statistics_after_it():
    model, x, expected = loaded("small", 16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    assert (model.train()(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    # The running variance is unbiased: n / (n - 1) times that of the batch.
    assert (model.eval()(x) - expected).abs().max() < 2e-2 * expected.abs().max()
    assert torch.allclose(model(x[:1]), model(x)[:1], atol=1e-5)


@torch.no_grad()
def test_official_mode_depends_on_the_batch_but_not_on_its_order():
    model, x, _ = loaded("small", 16, statistics="batch")
    model.eval()
    together = model(x)
    assert torch.allclose(model(x.flip(0)), together.flip(0), atol=1e-5)
    assert not torch.allclose(model(x[:2]), together[:2], atol=1e-2)


def test_counts_block_by_block():
    with torch.device("meta"):
        model = create_model("terminator_cifar10")
    found = [sum(p.numel() for p in block.parameters()) for block in model.body[1:]]
    assert found == BLOCKS and sum(p.numel() for p in model.classifier.parameters()) == 2_890
    with torch.device("meta"):
        layer = Terminator(side=16).body[2].layer
        # The sheet's layer: 12 channels at 16 pixels, doubled, without extras, two products as in block 1.
        twice = SlowFastBlock(
            [12], 24, [], [0], 0.0, layers=2, side=16, omega0=1.0, statistics="running"
        ).layer
    assert layer.join.in_channels == 120
    assert sum(p.numel() for p in twice.parameters()) == 53_299


def test_groups_are_standardised_over_the_batch_and_over_the_image_in_turn():
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(8, 24, 6, 6) * torch.arange(1, 9)[:, None, None, None]
    groups = Standardise(24, "running")(x).unflatten(1, (12, 2))
    even, odd = groups[:, ::2], groups[:, 1::2]
    assert even.mean((0, 3, 4)).abs().max() < 1e-5 and (even.std((0, 3, 4)) - 1).abs().max() < 1e-2
    assert odd.mean((3, 4)).abs().max() < 1e-5 and (odd.std((3, 4)) - 1).abs().max() < 2e-2
    assert torch.allclose(even.flatten(1, 2)[:, 1], groups[:, 0, 1])


def test_feedback_error_reaches_the_slow_nets_alone():
    model = Terminator(side=8, num_classes=4)
    model.feedback_error().backward()
    touched = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(".global_kernel." in key for key in touched)
    assert {key.split(".")[1] for key in touched} == {"1", "2", "3", "4", "5"}


@torch.no_grad()
def test_other_sizes_and_pooled_images():
    model = create_model("terminator_cifar10", width=0.5).eval()
    assert model(torch.randn(1, 3, 20, 20)).shape == (1, 10)
    small = create_model("terminator_cifar10", stem_stride=2, width=0.5).eval()
    assert small.body[1].layer.global_kernel.size == (16, 16)
    assert small.forward_features(torch.randn(1, 3, 32, 32)).shape[2:] == (16, 16)
