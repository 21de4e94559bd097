"""UniRepLKNet: parity with numbers that the official file gave, merging of kernels and norms, key layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import drawn, randomised, relative
from torch import nn

from featherweight.blocks.dilated_reparam import DILATED, DilatedReparamBlock
from featherweight.errors import CheckpointError, UsageError
from featherweight.models.unireplknet import GlobalResponseNorm, UniRepLKBlock, UniRepLKNet
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "unireplknet.npz"
RECORDED = ("unireplknet_a", "unireplknet_t")
CLASSES = 16


def official_state(name: str, form: str = "training") -> dict[str, torch.Tensor]:
    """A random state dict with the keys and shapes of the official network."""
    shapes = json.loads(bytes(np.load(FIXTURE)[f"{name}.{form}.shapes"]))
    return {key: drawn(key, tuple(shape)) for key, shape in shapes.items()}


def wave(batch: int = 2) -> torch.Tensor:
    numbers = np.sin(0.37 * np.arange(batch * 3 * 64 * 96) ** 1.05)
    return torch.from_numpy(numbers).float().reshape(batch, 3, 64, 96)


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_parity_with_the_official_file(name):
    recorded = np.load(FIXTURE)
    model = create_model(name, num_classes=CLASSES).eval()
    model.load_official({"model": {f"module.{k}": v for k, v in official_state(name).items()}})
    expected = torch.from_numpy(recorded[f"{name}.eval"])
    assert expected.std() > 0.1
    assert relative(model(wave()), expected) < 1e-4
    assert relative(model.fuse()(wave()), expected) < 1e-4


@torch.no_grad()
def test_parity_in_training_mode():
    model = create_model("unireplknet_a", num_classes=CLASSES).train()
    model.load_official(official_state("unireplknet_a"))
    expected = torch.from_numpy(np.load(FIXTURE)["unireplknet_a.train"])
    assert relative(model(wave(4)), expected) < 1e-4


@torch.no_grad()
def test_parity_of_a_checkpoint_of_the_deploy_form():
    model = create_model("unireplknet_a", num_classes=CLASSES).eval()
    model.load_official(official_state("unireplknet_a", "deploy"))
    expected = torch.from_numpy(np.load(FIXTURE)["unireplknet_a.deploy"])
    assert relative(model(wave()), expected) < 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    twin = create_model("unireplknet_a", num_classes=CLASSES).eval()
    twin.load_official(model.state_dict())
    assert torch.equal(twin(wave()), model(wave()))
    with pytest.raises(CheckpointError, match="do not fit"):
        model.load_official(official_state("unireplknet_a"))


@pytest.mark.parametrize("side", DILATED)
@torch.no_grad()
def test_merged_kernel_equals_the_branches(side):
    block = randomised(DilatedReparamBlock(6, side))
    x = torch.randn(2, 6, 23, 18, generator=torch.Generator().manual_seed(1))
    merged = block.fuse()
    assert merged.kernel_size == (side, side) and relative(merged(x), block(x)) < 1e-5
    # The oracle dilates by a transposed convolution with a single one.
    total = torch.zeros(6, 1, side, side)
    for conv, norm in block.branches:
        dense = F.conv_transpose2d(conv.weight, torch.ones(1, 1, 1, 1), stride=conv.dilation[0])
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        total += F.pad(dense, [(side - dense.shape[-1]) // 2] * 4) * scale[:, None, None, None]
    assert torch.allclose(merged.weight, total, atol=1e-5)


@pytest.mark.parametrize("side", DILATED)
def test_no_small_kernel_reaches_beyond_the_large_one(side):
    assert all(dilation * (kernel - 1) + 1 <= side for kernel, dilation in DILATED[side])


@pytest.mark.parametrize("kernel", [3, 5, 13])
@torch.no_grad()
def test_merged_block_equals_the_block(kernel):
    block = randomised(UniRepLKBlock(8, kernel))
    x = torch.randn(2, 8, 15, 17, generator=torch.Generator().manual_seed(1))
    expected = block(x)
    before = len(list(block.modules()))
    block.merge()
    assert relative(block(x), expected) < 1e-5 and len(list(block.modules())) <= before
    block.merge()
    assert relative(block(x), expected) < 1e-5


def test_response_norm_against_a_naive_oracle_and_its_gradient():
    layer = GlobalResponseNorm(3).double()
    nn.init.uniform_(layer.scale)
    nn.init.uniform_(layer.shift)
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    strength = np.sqrt((x.numpy() ** 2).sum((2, 3)))
    share = strength / (strength.mean(1, keepdims=True) + 1e-6)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (layer.scale, layer.shift))
    expected = (scale * share[:, :, None, None] + 1) * x.numpy() + shift
    assert np.allclose(layer(x).detach().numpy(), expected)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))


def small(**kwargs) -> UniRepLKNet:
    return UniRepLKNet(8, ((3,), (7,), (13, 3), (9,)), num_classes=5, **kwargs)


@torch.no_grad()
def test_fuse_removes_layers_and_keeps_the_answer_for_any_map():
    model = randomised(small(in_chans=1))
    x = torch.randn(2, 1, 128, 101, generator=torch.Generator().manual_seed(1))
    expected, before = model(x), len(list(model.modules()))
    assert model.fuse() is model
    assert relative(model(x), expected) < 1e-4
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms and len(list(model.modules())) < before - 30


def test_fuse_wants_eval_mode_and_kernels_a_known_size():
    with pytest.raises(UsageError, match="eval"):
        small().train().fuse()
    with pytest.raises(UsageError, match="No dilated kernels for a side of 19"):
        UniRepLKNet(8, ((3,), (19,)))


@torch.no_grad()
def test_fuse_at_half_precision_stays_there():
    model = randomised(small()).to(torch.bfloat16).fuse()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


def test_gradient_checkpointing_and_drop_path_train():
    model = small(drop_path_rate=0.5).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
