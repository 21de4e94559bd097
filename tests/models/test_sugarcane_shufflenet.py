"""ShuffleNetV2 and the sugarcane network: parity, freezing rule, shuffle."""

from itertools import islice

import parity
import pytest
import torch
import torchvision
from torch import nn

from featherweight.errors import UsageError
from featherweight.models.sugarcane_shufflenet import ShuffleUnit, freeze_fraction, shuffle_halves
from featherweight.registry import create_model

BUILDERS = {"050": "x0_5", "100": "x1_0", "150": "x1_5", "200": "x2_0"}


class AuthorsNetwork(nn.Module):
    """Keys and head of the authors' notebook around torchvision's network."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = torchvision.models.shufflenet_v2_x1_0()
        self.base_model.fc = nn.Sequential(
            nn.Dropout(0.2),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.BatchNorm1d(1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 17),
        )

    def forward(self, x):
        return self.base_model(x)


@pytest.mark.parametrize(("suffix", "builder"), BUILDERS.items())
def test_parity_with_torchvision(suffix, builder):
    official = getattr(torchvision.models, f"shufflenet_v2_{builder}")()
    parity.assert_parity(f"shufflenetv2_{suffix}", official)


def test_parity_with_the_authors_layout():
    parity.assert_parity("sugarcane_shufflenet", AuthorsNetwork())


def test_imagenet_body_loads_under_the_fresh_head():
    official = parity.randomise(torchvision.models.shufflenet_v2_x1_0())
    ours = create_model("sugarcane_shufflenet", num_classes=5)
    head = ours.head[2].weight.clone()
    ours.load_official(official.state_dict(), adapt=True)
    assert torch.equal(ours.head[2].weight, head)
    assert torch.equal(ours.body[0].conv.weight, official.conv1[0].weight)


@pytest.mark.parametrize(("fraction", "tensors"), [(0.0, 0), (0.05, 8), (0.323, 54), (1.0, 168)])
def test_freezing_counts_tensors_of_the_plain_network(fraction, tensors):
    model = create_model("sugarcane_shufflenet")
    assert freeze_fraction(model, fraction) == tensors
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert len(frozen) == tensors
    if fraction == 0.05:
        assert sum(p.numel() for p in frozen) == 2410
        official = torchvision.models.shufflenet_v2_x1_0().parameters()
        assert [p.shape for p in frozen] == [p.shape for p in islice(official, 8)]


def test_freezing_refuses_more_than_all():
    with pytest.raises(UsageError, match=r"1\.5"):
        freeze_fraction(create_model("shufflenetv2_050"), 1.5)


def test_frozen_tensors_do_not_move():
    model = create_model("sugarcane_shufflenet", num_classes=3).train()
    freeze_fraction(model, 0.323)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert not any(moved[:54]) and all(moved[54:])


def test_first_half_passes_at_even_outputs():
    x = torch.randn(2, 8, 5, 5)
    y = ShuffleUnit(8, 8, 1).eval()(x)
    assert torch.equal(y[:, 0::2], x[:, :4])


def test_shuffle_twice_is_not_the_identity_but_its_inverse_is():
    x = torch.arange(12.0).view(1, 12, 1, 1)
    assert not torch.equal(shuffle_halves(shuffle_halves(x)), x)
    back = shuffle_halves(x).unflatten(1, (6, 2)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(back, x)


def test_head_needs_pooled_features():
    with pytest.raises(UsageError, match="pooled"):
        create_model("sugarcane_shufflenet", global_pool="")
