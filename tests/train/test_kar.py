"""Kar: steps by hand, the bound of a step, refusals."""

import pytest
import torch

from featherweight.errors import UsageError
from featherweight.train.kar import Kar


def test_three_steps_by_hand():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Kar([weight], lr=0.1, betas=(0.5, 0.95))
    # Means before each step: (0, 0); (0.5, 0.05); (0.25 - 1.5 = -1.25, 0.0475 - 0.15 < 0).
    for gradient, expected in ((1.0, -0.1), (-3.0, -0.2), (0.5, -0.1)):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        assert weight.item() == pytest.approx(expected)


def test_a_step_is_at_most_three_rates_and_a_rate_with_one_sign():
    torch.manual_seed(0)
    for betas in ((), (0.95,), (0.5, 0.95)):
        weight = torch.nn.Parameter(torch.zeros(50))
        optimizer = Kar([weight], lr=0.1, betas=betas)
        for _ in range(5):
            before = weight.detach().clone()
            weight.grad = torch.randn(50)
            optimizer.step()
            assert (weight - before).abs().max() <= 0.1 * (1 + len(betas)) + 1e-6


def test_settings_out_of_range_are_refused():
    weight = [torch.nn.Parameter(torch.zeros(1))]
    for wrong in ({"lr": 0.0}, {"betas": (1.0,)}):
        with pytest.raises(UsageError, match="expected lr above 0"):
            Kar(weight, **wrong)
