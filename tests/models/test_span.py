"""SPAN and DSCLoRA: parity with numbers that the official code gave, chains, low-rank updates, affinities."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from restoration import FIXTURES, given_weights, parity_error
from torch import nn

from featherweight.blocks.conv_chain import ConvChain
from featherweight.errors import CheckpointError, UsageError
from featherweight.measure.count import count
from featherweight.models.span import SPAN, AttentionBlock, rep_conv
from featherweight.models.span.adapt import (
    ConvLoRA,
    Supervised,
    adapt,
    affinities,
    affinity_loss,
    merge_adapters,
)
from featherweight.registry import create_model


@pytest.mark.parametrize(
    ("name", "fused"), [("dscf_x4", False), ("span_s_x4", False), ("span_s_x4", True), ("span_x2", True)]
)
def test_parity_with_the_official_code(name, fused):
    assert parity_error("span", name, fused) < 1e-5


@torch.no_grad()
def test_parity_of_the_low_rank_convolution():
    recorded = {k.removeprefix("lora."): v for k, v in np.load(FIXTURES / "span.npz").items() if "lora" in k}
    tensors = {key: torch.from_numpy(value) for key, value in recorded.items()}
    conv = nn.Conv2d(16, 24, 3, padding=1)
    conv.weight.copy_(tensors["weight"])
    conv.bias.copy_(tensors["bias"])
    adapted = ConvLoRA(conv, rank=2, alpha=4)
    adapted.down.copy_(tensors["lora_A"])
    adapted.up.copy_(tensors["lora_B"])
    assert torch.allclose(adapted(tensors["in"]), tensors["out"], atol=1e-5)
    assert sum(p.numel() for p in adapted.parameters()) == 4_200


@pytest.mark.parametrize("sizes", [(1, 3, 1), (3,), (1,), (3, 1), (1, 3)])
@torch.no_grad()
def test_a_chain_equals_its_convolutions_on_the_padded_input(sizes):
    chain = ConvChain([4, 6, 5, 3][: len(sizes) + 1], sizes)
    x = torch.randn(2, 4, 5, 6)
    side = max(sizes) // 2
    assert torch.allclose(chain(x), nn.Sequential.forward(chain, F.pad(x, [side] * 4)), atol=1e-5)


def test_sizes_of_the_parts():
    assert sum(p.numel() for p in rep_conv(8, 12).parameters()) == 4_032
    block = AttentionBlock(26)
    x = torch.rand(1, 26, 4, 4)
    merged = SPAN(2, channels=26, depth=1).fuse().blocks[0]
    assert sum(p.numel() for p in merged.parameters()) == 18_330
    for conv in block.convs:  # odd: the answer's sign does not matter to the gate times the sum
        for parameter in conv.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(block(x), torch.zeros_like(x))


@torch.no_grad()
def test_given_weights_load_into_both_names():
    path = given_weights("DSCF_x4.pth")
    model = create_model("dscf_x4", checkpoint_path=path).eval()
    ramp = torch.linspace(0.1, 0.9, 24).expand(1, 3, 20, 24)
    expected = torch.linspace(0.1, 0.9, 96).expand(1, 3, 80, 96)
    assert (model(ramp) - expected)[..., 8:-8, 8:-8].abs().max() < 0.03
    before = create_model("span_tiny_x4").eval()
    before.load_official(str(path))
    assert torch.equal(before(ramp), model(ramp))
    with pytest.raises(CheckpointError, match="other shape"):
        create_model("span_x4").load_official(path)


@torch.no_grad()
def test_merging_and_unmerging_the_update():
    conv = nn.Conv2d(5, 7, 3, padding=1).train()
    x, frozen = torch.randn(1, 5, 6, 6), conv.weight.detach().clone()
    expected = conv(x)
    adapted = ConvLoRA(conv, rank=2)
    assert torch.equal(adapted(x), expected)
    adapted.up.normal_()
    changed = adapted(x)
    assert not torch.allclose(changed, expected)
    delta = adapted.update()
    assert torch.linalg.matrix_rank(delta.reshape(7 * 3, 5 * 3)) <= 2 * 3
    for _ in range(2):
        assert adapted.eval() is adapted and torch.allclose(adapted(x), changed, atol=1e-5)
    state = copy.deepcopy(adapted.state_dict())
    assert bool(state["merged"])
    for _ in range(2):
        assert torch.allclose(adapted.train().weight, frozen, atol=1e-6)
    other = ConvLoRA(nn.Conv2d(5, 7, 3, padding=1), rank=2)
    other.load_state_dict(state)
    assert torch.allclose(other.train().weight, frozen, atol=1e-6)
    plain = adapted.merge()
    assert type(plain) is nn.Conv2d and torch.allclose(plain(x), changed, atol=1e-5)
    assert torch.equal(ConvLoRA(conv, rank=0).train()(x), conv(x))
    with pytest.raises(UsageError, match="groups"):
        ConvLoRA(nn.Conv2d(4, 4, 3, groups=2), rank=1)


def test_only_the_updates_train_and_the_cost_stays():
    model = SPAN(2, channels=8).train()
    x = torch.rand(2, 3, 10, 12)
    cost = count(copy.deepcopy(model).fuse(), (3, 16, 16))
    expected = model(x).detach()
    adapt(model)
    assert torch.allclose(model(x), expected, atol=1e-3)
    layers = [module for module in model.modules() if isinstance(module, ConvLoRA)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(layers) == 6 * 3 + 2
    assert {id(p) for p in trained} == {id(p) for layer in layers for p in (layer.down, layer.up)}
    optimizer = torch.optim.Adam(trained, 1e-2)
    frozen = model.stem.weight.detach().clone()
    for _ in range(3):
        loss = (model(x) - 0.5).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.eval()(x).detach()
    assert not torch.allclose(found, expected, atol=1e-3) and torch.equal(model.stem.weight, frozen)
    merge_adapters(model)
    assert torch.allclose(model(x), found, atol=1e-4) and count(model, (3, 16, 16)) == cost
    assert all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(SPAN(2, channels=8).fuse().state_dict())


def test_ranks_name_layers():
    model = adapt(SPAN(2, channels=8), {"blocks.5": 1})
    assert sum(isinstance(module, ConvLoRA) for module in model.modules()) == 3
    with pytest.raises(UsageError, match="no convolution"):
        adapt(SPAN(2, channels=8), {"head": 2})


def test_affinities_know_directions_only():
    features = torch.randn(2, 6, 5, 4)
    turned = torch.linalg.qr(torch.randn(6, 6)).Q
    same = torch.einsum("ij,njhw->nihw", turned, features) * torch.rand(2, 1, 5, 4).add(0.5)
    assert affinity_loss([features], [same]) < 1e-6
    assert affinity_loss([features], [torch.randn(2, 9, 5, 4)]) > 0.1
    naive = torch.cosine_similarity(features[1, :, 2, 3], features[1, :, 4, 0], dim=0)
    assert torch.allclose(affinities(features)[1, 2 * 4 + 3, 4 * 4], naive, atol=1e-6)
    assert affinities(torch.rand(1, 3, 100, 40)).shape == (1, 32 * 32, 32 * 32)
    with pytest.raises(UsageError, match="maps"):
        affinity_loss([features], [])


def test_a_teacher_of_other_width_is_compared_layer_by_layer():
    student, teacher = Supervised(SPAN(2, channels=8)), Supervised(SPAN(2, channels=12).eval())
    x = torch.rand(1, 3, 9, 8)
    image, maps = student(x)
    with torch.no_grad():
        _, theirs = teacher.both(x)
    assert image.shape == (1, 3, 18, 16) and len(maps) == len(theirs) == 7
    assert torch.equal(image, student.model(x)) and torch.equal(student.eval()(x), student.model(x))
    affinity_loss(maps, theirs).backward()
    assert student.model.stem.chains[0][0].weight.grad.abs().sum() > 0
