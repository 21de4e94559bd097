"""CFSR: parity with numbers that the official code gave, its filters in training, merging, key layouts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from restoration import FIXTURES, given_weights, parity_error
from scipy import ndimage

from featherweight.errors import UsageError
from featherweight.export.onnx import export_onnx, run_onnx
from featherweight.models.cfsr import CFSR, MASKS, EdgeConv, EdgeFeedForward
from featherweight.registry import create_model


@pytest.mark.parametrize("name", ["cfsr_x2", "cfsr_x3", "cfsr_x4"])
@pytest.mark.parametrize("fused", [False, True])
def test_parity_with_the_official_code(name, fused):
    assert parity_error("cfsr", name, fused) < 1e-5


@torch.no_grad()
def test_parity_of_the_training_form():
    recorded = {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / "cfsr.npz").items()}
    small = CFSR(2, channels=6, depths=(1,))
    renamed = small.from_official(
        {k.replace("feed.", "layers.0.blocks.0.mlp."): v for k, v in recorded.items() if "feed." in k}
    )
    renamed = small.match_form(renamed)
    part = EdgeFeedForward(6)
    start = "blocks.0.feed."
    kept = {k.removeprefix(start): v for k, v in renamed.items() if k.startswith(start)}
    part.load_state_dict({k: v for k, v in kept.items() if k not in ("in", "out")})
    assert torch.allclose(part(recorded["feed.in"]), recorded["feed.out"], atol=1e-6)


@torch.no_grad()
def test_the_official_slips_are_a_choice():
    fixed = torch.tensor(MASKS["paper"], dtype=torch.float64)
    noise = torch.randn(9, 9, dtype=torch.float64)
    rows, columns = (-ndimage.sobel(noise.numpy(), axis, mode="constant") for axis in (1, 0))
    laplace = ndimage.laplace(noise.numpy(), mode="constant")
    found = F.conv2d(noise[None, None], fixed[:, None], padding=1)[0].numpy()
    assert np.allclose(found, np.stack((rows, columns, laplace)))
    assert MASKS["official"] != MASKS["paper"] and EdgeConv(2, "official").masks[0, 0, 1] == 1
    with pytest.raises(UsageError, match="masks"):
        EdgeConv(2, "sobel")


@torch.no_grad()
def test_merging_equals_four_convolutions():
    edge = EdgeConv(5)
    for parameter in edge.parameters():
        parameter.uniform_(-1, 1)
    x = torch.randn(2, 5, 6, 7)
    expected = F.conv2d(x, edge.conv.weight, edge.conv.bias, padding=1, groups=5)
    for strength, shift, mask in zip(edge.strength, edge.shift, edge.masks, strict=True):
        expected += F.conv2d(x, strength.view(-1, 1, 1, 1) * mask, shift, padding=1, groups=5)
    assert torch.allclose(edge(x), expected, atol=1e-5)
    assert torch.allclose(edge.merge()(x), expected, atol=1e-5)


def test_every_filter_learns():
    torch.manual_seed(0)
    model = CFSR(2, channels=8, depths=(1, 1)).train()
    model(torch.rand(1, 3, 8, 8)).square().sum().backward()
    edges = [module for module in model.modules() if isinstance(module, EdgeConv)]
    assert len(edges) == 2 and all((edge.strength.grad != 0).any(1).all() for edge in edges)
    assert sum(p.numel() for p in CFSR(2, masks=None).parameters()) == 291_324


@torch.no_grad()
def test_given_weights_keep_their_answers_through_fusing():
    model = create_model("cfsr_x2").eval()
    model.load_official(given_weights("CFSR_x2.pth"))
    x = torch.rand(1, 3, 15, 18)
    expected = model(x)
    layers = len(list(model.modules()))
    state = model.fuse().state_dict()
    assert len(list(model.modules())) < layers
    assert torch.allclose(model(x), expected, atol=1e-5)
    twin = create_model("cfsr_x2").eval()
    twin.load_official(state)
    assert torch.allclose(twin(x), expected, atol=1e-5)


@torch.no_grad()
def test_a_fresh_network_is_its_upsampler_and_other_channels_have_no_mean():
    model = create_model("cfsr_x2").eval()
    x = torch.rand(1, 3, 8, 8)
    stem = deep = model.stem(x - model.mean)
    for end in (model.blocks[6], model.blocks[13]):
        deep = end(deep)
    deep = model.last(model.norm(deep)) + stem
    assert torch.allclose(model(x), model.upsampler(deep) + model.mean, atol=1e-4)
    assert create_model("cfsr_x2", in_chans=1).mean.tolist() == [[[0.0]]]


@torch.no_grad()
def test_the_onnx_file_holds_the_blocks(tmp_path):
    torch.manual_seed(0)
    model = CFSR(2, channels=8, depths=(1, 1)).eval()
    for key, parameter in model.named_parameters():
        if "scale" in key:  # 1e-6 at the start would hide the branches
            parameter.uniform_(0.5, 1)
    x = torch.rand(2, 3, 11, 14)
    without = CFSR.forward_head(model, model.last(model.norm(model.stem(x - model.mean))))
    assert (model(x) - without).abs().max() > 0.1
    report = export_onnx(model.fuse(), tmp_path / "m.onnx", (3, 16, 20), dynamic_size=True)
    assert report.max_relative_error < 1e-5
    assert np.abs(run_onnx(tmp_path / "m.onnx", x.numpy()) - model(x).numpy()).max() < 1e-5
