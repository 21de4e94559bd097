"""What the parity tests share: an official network with random weights and statistics, and the comparison."""

import torch
from torch import nn

from featherweight.registry import create_model


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
