"""The measured training speed of this machine."""

import torch
from torch import nn

from featherweight.train.speed import training_images_per_s, training_macs_per_s


def test_speed_is_that_of_a_processor_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    speed = training_macs_per_s()
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e7 < speed < 1e15


def test_a_network_is_timed_but_not_changed():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    before = [p.clone() for p in net.parameters()]
    assert training_images_per_s(net, (1, 8, 8)) > 1
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_more_work_takes_longer():
    small, large = (
        nn.Sequential(nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)) for c in (4, 192)
    )
    assert training_images_per_s(large, (3, 32, 32)) < training_images_per_s(small, (3, 32, 32))
