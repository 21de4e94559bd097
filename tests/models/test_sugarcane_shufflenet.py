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
    """Keys, freezing and head of the authors' notebook around torchvision's network."""

    def __init__(self, freeze_ratio: float = 0.0) -> None:
        super().__init__()
        self.base_model = torchvision.models.shufflenet_v2_x1_0()
        tensors = list(self.base_model.parameters())
        for tensor in tensors[: int(len(tensors) * freeze_ratio)]:
            tensor.requires_grad = False
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


def trainable(model: nn.Module) -> list[torch.Size]:
    return [p.shape for p in model.parameters() if p.requires_grad]


# 0.0500 and 0.3230 are the authors' two choices; their search went up to 0.8.
@pytest.mark.parametrize(
    ("fraction", "frozen", "weights"),
    [(0.0, 0, 2_322_677), (0.050015936690328916, 8, 2_320_267), (0.3230, 54, None), (0.8, 136, None)],
)
def test_parity_of_what_is_trained(fraction, frozen, weights):
    ours = create_model("sugarcane_shufflenet")
    assert freeze_fraction(ours, fraction) == frozen
    # The head follows the body in both, so equal shapes in equal order are the same tensors.
    expected = trainable(AuthorsNetwork(fraction))
    assert trainable(ours) == expected and len(expected) == 174 - frozen
    counted = sum(shape.numel() for shape in trainable(ours))
    assert counted == sum(shape.numel() for shape in expected)
    assert weights in (None, counted)


def test_parity_of_the_published_head():
    """Dropout, linear, ReLU, batch norm, dropout, linear; the ReLU before the norm."""
    model = create_model("sugarcane_shufflenet")
    kinds = [nn.Flatten, nn.Dropout, nn.Linear, nn.ReLU, nn.BatchNorm1d]
    assert [type(module) for module in model.head] == kinds
    assert (model.head[1].p, model.drop_rate) == (0.2451, 0.2633)
    head = [*model.head.parameters(), *model.classifier.parameters()]
    assert [tuple(p.shape) for p in head] == [(1024, 1024), (1024,), (1024,), (1024,), (17, 1024), (17,)]
    plain = torchvision.models.shufflenet_v2_x1_0()
    assert len(list(plain.parameters())) == 170 and len(list(model.parameters())) == 174


def test_dropouts_of_the_head_follow_the_arguments():
    model = create_model("sugarcane_shufflenet", head_drop_rate=0.4312, drop_rate=0.2138)
    assert (model.head[1].p, model.drop_rate) == (0.4312, 0.2138)


def test_frozen_norms_still_follow_the_data():
    model = create_model("sugarcane_shufflenet", num_classes=3).train()
    freeze_fraction(model, 0.05)
    before = model.body[0].norm.running_mean.clone()
    model(torch.randn(4, 3, 32, 32))
    assert not model.body[0].norm.weight.requires_grad
    assert not torch.equal(model.body[0].norm.running_mean, before)


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
