"""The averaged weights against the recurrence by hand."""

import pytest
import torch
from tiny_training import tiny_net
from torch import nn

from featherweight.train.ema import Ema


def test_average_follows_the_formula():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema, by_hand = Ema(model, 0.9, every=2), 1.0
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.fill_(step * 10.0)
        ema.update(step, force=step == 7)
        if step % 2 == 0 or step == 7:
            keep = min(0.9, (1 + step) / (10 + step)) ** (2 if step % 2 == 0 else 1)
            by_hand = keep * by_hand + (1 - keep) * step * 10.0
    assert ema.shadow["weight"].item() == pytest.approx(by_hand, rel=1e-6)
    with ema.applied():
        assert model.weight.item() == pytest.approx(by_hand, rel=1e-6)
    assert model.weight.item() == 70.0


def test_average_includes_statistics_and_copies_counters():
    model = tiny_net()
    ema = Ema(model, 0.5)
    model(torch.randn(4, 1, 8, 8))
    ema.update(1)
    assert ema.shadow["1.num_batches_tracked"] == 1
    keep = 2 / 11
    expected = (1 - keep) * model[1].running_mean
    torch.testing.assert_close(ema.shadow["1.running_mean"], expected)
