"""Tests of batch norm folding."""

import pytest
import torch
from torch import nn

from featherweight.shrink.fold import fold_batchnorm


def settle(net, shape):
    """Give batch norms statistics and parameters that are not the neutral ones."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    for _ in range(3):
        net(torch.randn(4, *shape) * 2 + 1)
    return net.eval()


class NamedPairs(nn.Module):
    """Pairs by name, one layer shared by two calls, and a norm that has no layer before it."""

    def __init__(self, dynamic=False):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(3, 6, 3, bias=False)
        self.twice, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc, self.bn3 = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.dynamic = dynamic

    def forward(self, x):
        if self.dynamic and x.isnan().any():
            return x
        x = self.bn1(self.conv1(self.bn0(x)))
        x = self.bn2(self.twice(self.twice(x)))
        return self.bn3(self.fc(self.body(x).mean((2, 3))))


@pytest.mark.parametrize(("dynamic", "left"), [(False, 2), (True, 4)])
def test_folding_changes_nothing_and_leaves_what_it_must(dynamic, left):
    net = settle(NamedPairs(dynamic), (3, 8, 8))
    folded = fold_batchnorm(net)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == left
    assert type(folded) is NamedPairs and isinstance(net.bn1, nn.BatchNorm2d)


def test_a_real_network_folds_completely():
    torchvision = pytest.importorskip("torchvision")
    net = settle(torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), (3, 32, 32))
    folded, x = fold_batchnorm(net), torch.randn(2, 3, 32, 32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)
