"""What the parity tests share: weights drawn by rules that need no file, and the comparison of answers."""

import zlib

import numpy as np
import torch
from torch import nn

from featherweight.registry import create_model


def ruled_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Fill a state dict by a rule that needs no file: a cosine over the position, scaled by the fan-in."""
    state = {}
    for number, (key, shape) in enumerate(shapes.items()):
        size = int(np.prod(shape))
        wave = torch.from_numpy(np.cos(0.7 * np.arange(size) ** 1.1 + number)).float().reshape(shape)
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif len(shape) > 1:
            wave = wave * (2 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.1 * wave
        state[key] = wave
    return state


def drawn(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of one official parameter: uniform noise seeded by its name, of a size its role needs."""
    noise = np.random.default_rng(zlib.crc32(key.encode())).random(shape, np.float32) * 2 - 1
    leaf = key.rpartition(".")[2]
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        noise = 1 + 0.4 * noise
    elif leaf == "gamma" and len(shape) == 1:
        noise = 0.5 + 0.3 * noise
    elif leaf == "weight":
        noise = noise * (4 / np.prod(shape[1:])) ** 0.5
    else:
        noise = 0.3 * noise
    return torch.from_numpy(np.asarray(noise, np.float32))


def randomised(model: nn.Module) -> nn.Module:
    """Away from the start, where gains of 1e-6 hide every error of a branch."""
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            low, high = (0.5, 1.5) if value.ndim == 1 else (-0.2, 0.2)
            value.copy_(torch.empty(value.shape).uniform_(low, high, generator=generator))
    return model.eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm random statistics and scales, so that a swapped pair of norms shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            module.weight.data.copy_(0.8 + 0.8 * torch.rand(shape, generator=generator))
            module.bias.data.copy_(0.1 * torch.randn(shape, generator=generator))
        elif isinstance(module, nn.Linear):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator) * 0.05)
    return model.eval()


@torch.no_grad()
def assert_parity(name: str, official: nn.Module, side: int = 64, **kwargs) -> None:
    """Load the official weights into ours and compare features and logits, relative to the largest logit."""
    randomise(official)
    ours = create_model(name, **kwargs).eval()
    ours.load_official(official.state_dict())
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = official(x)
    assert expected.std() > 1e-3, "the logits say nothing"
    error = (ours(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{name}: relative error {error:.1e}"
