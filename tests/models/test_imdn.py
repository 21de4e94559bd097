"""IMDN: parity with numbers that the official code gave, cropping of any size, distillation, contrast."""

import numpy as np
import pytest
import torch
from restoration import given_weights, official_layout, parity_error, ruled_state
from torch import nn

from featherweight.errors import CheckpointError, UsageError
from featherweight.models.imdn import IMDN, ContrastAttention, DistillBlock, IMDNAnySize, crop_size
from featherweight.registry import create_model

CASES = ["imdn_x2", "imdn_x3", "imdn_x4", "imdn_as", "imdn_as.cropped", "imdn_rtc", "imdn_rte"]


@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_official_code(case):
    assert parity_error("imdn", case, fused=False) < 1e-5


@pytest.mark.parametrize(
    ("name", "file"),
    [("imdn_x2", "IMDN_x2"), ("imdn_x4", "IMDN_x4"), ("imdn_as", "IMDN_AS"), ("imdn_rtc", "model_RTC")],
)
@torch.no_grad()
def test_given_weights_load_strictly_and_restore(name, file):
    path = given_weights(f"{file}.pth")
    model = create_model(name, checkpoint_path=path).eval()
    ramp = torch.linspace(0.1, 0.9, 40).expand(1, 3, 32, 40)
    expected = torch.linspace(0.1, 0.9, 40 * model.scale).expand(1, 3, 32 * model.scale, -1)
    inner = (..., slice(8, -8), slice(8, -8))
    assert (model(ramp) - expected)[inner].abs().max() < 0.03
    state = torch.load(path, map_location="cpu", weights_only=True)
    state.pop(next(iter(state)))
    with pytest.raises(CheckpointError, match="missing"):
        create_model(name).load_official(state)


def test_the_layout_of_another_scale_is_refused():
    state = ruled_state(official_layout("imdn", "imdn_x2"))
    with pytest.raises(CheckpointError, match="other shape"):
        create_model("imdn_x4").load_official(state)
    with pytest.raises(CheckpointError, match="unknown"):
        create_model("imdn_rtc").load_official(state)


def test_wrapped_averages_go_before_plain_weights(tmp_path):
    plain = ruled_state(official_layout("imdn", "imdn_rtc"))
    average = {f"module.{key}": value / 2 for key, value in plain.items()}
    torch.save({"params": plain, "params_ema": average}, tmp_path / "net.pth")
    model = create_model("imdn_rtc")
    model.load_official(tmp_path / "net.pth")
    assert torch.equal(model.stem.weight, plain["model.0.weight"] / 2)


@torch.no_grad()
def test_crops_of_any_size_are_put_together_without_gap_or_overlap():
    class Same(IMDNAnySize):
        def forward_features(self, x):
            return x

        def forward_head(self, x, pre_logits=False):
            return x

    model = Same(channels=8, depth=1)
    for height, width in ((67, 74), (65, 64), (101, 63), (129, 258)):
        x = torch.rand(2, 3, height, width)
        assert torch.equal(model(x), x)
        crops = crop_size(height), crop_size(width)
        if all(crops):
            assert torch.equal(model.forward_crops(x, *crops), x) and not any(c % 4 for c in crops)


@torch.no_grad()
def test_cropping_changes_little_away_from_the_seams():
    model = create_model("imdn_as").eval()
    model.load_official(given_weights("IMDN_AS.pth"))
    ramp = torch.linspace(0.2, 0.8, 102).expand(1, 3, 90, 102)
    restored = model(ramp)
    assert restored.shape == ramp.shape and (restored - ramp)[..., 8:-8, 8:-8].abs().max() < 0.05
    assert model.enlarge(ramp[..., :21, :33], 3.3).shape == (1, 3, 69, 109)


@pytest.mark.parametrize("name", ["imdn_as", "imdn_rte", "imdn_x3"])
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 18)])
@torch.no_grad()
def test_sizes_down_to_a_pixel(name, size):
    model = create_model(name).eval()
    found = model(torch.rand(1, 3, *size))
    assert found.shape == (1, 3, size[0] * model.scale, size[1] * model.scale) and found.isfinite().all()


def test_contrast_attention_equals_loops_and_has_a_gradient_on_flat_maps():
    attention = ContrastAttention(8, 4).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.double)
    expected = torch.empty_like(x)
    (w1, b1), (w2, b2) = (
        (layer.weight.detach().numpy()[:, :, 0, 0], layer.bias.detach().numpy())
        for layer in (attention.reduce, attention.expand)
    )
    for n in range(2):
        seen = np.array([plane.std() + plane.mean() for plane in x[n].numpy()])
        gate = 1 / (1 + np.exp(-(w2 @ np.maximum(w1 @ seen + b1, 0) + b2)))
        expected[n] = x[n] * torch.from_numpy(gate)[:, None, None]
    assert torch.allclose(attention(x).detach(), expected, atol=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(attention, (x,))
    flat = torch.full((1, 8, 4, 4), 0.3, dtype=torch.double, requires_grad=True)
    attention(flat).sum().backward()
    assert flat.grad.isfinite().all()


@torch.no_grad()
def test_the_first_channels_are_kept_and_the_last_piece_is_not_activated():
    block = DistillBlock(8, (8, 8, 8, 2), 2, nn.LeakyReLU(0.05))
    for layer in block.refine:
        layer.weight.zero_()
        layer.bias.copy_(-torch.arange(1.0, len(layer.bias) + 1))
    nn.init.eye_(block.merge.weight[:, :, 0, 0])
    block.merge.bias.zero_()
    found = block(torch.zeros(1, 8, 3, 3))[0, :, 1, 1]
    assert torch.allclose(found, torch.tensor([-0.05, -0.1] * 3 + [-1.0, -2.0]))


@torch.no_grad()
def test_imdn_plus_fuses_to_the_published_size():
    model = create_model("imdn_plus_x4", depth=2).eval()
    x = torch.rand(1, 3, 9, 8)
    expected = model(x)
    layers = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    fused = model.fuse()
    assert torch.allclose(fused(x), expected, atol=1e-5)
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) < layers / 2
    twin = create_model("imdn_plus_x4", depth=2).eval()
    twin.load_official(fused.state_dict())
    assert torch.equal(twin(x), fused(x))


@pytest.mark.parametrize(
    "argument", [{"num_classes": 10}, {"drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"global_pool": "max"}]
)
def test_arguments_without_a_meaning_are_refused(argument):
    with pytest.raises(UsageError, match="restores images"):
        create_model("imdn_rtc", **argument)
    with pytest.raises(UsageError, match="no classifier"):
        IMDN(2, channels=8, depth=1).reset_classifier(5)
