"""InceptionNeXt: parity with numbers that the official file gave and with timm, the mixer, folding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import drawn, randomised, relative
from torch import nn

from featherweight.errors import CheckpointError, UsageError
from featherweight.models.inceptionnext import InceptionDepthwise, InceptionNeXt, MetaNeXtBlock
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "inceptionnext.npz"
RECORDED = ("inceptionnext_atto", "inceptionnext_tiny")
SIZES = ((64, 96), (75, 109))
CLASSES = 16


def official_state(name: str) -> dict[str, torch.Tensor]:
    """A random state dict with the keys and shapes of the official network."""
    shapes = json.loads(bytes(np.load(FIXTURE)[f"{name}.shapes"]))
    return {key: drawn(key, tuple(shape)) for key, shape in shapes.items()}


def wave(batch: int, height: int, width: int) -> torch.Tensor:
    numbers = np.sin(0.37 * np.arange(batch * 3 * height * width) ** 1.05)
    return torch.from_numpy(numbers).float().reshape(batch, 3, height, width)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_parity_with_the_official_file(name):
    recorded = np.load(FIXTURE)
    model = create_model(name, num_classes=CLASSES).eval()
    model.load_official({"state_dict": {f"module.{k}": v for k, v in official_state(name).items()}})
    expected = [torch.from_numpy(recorded[f"{name}.{height}x{width}"]) for height, width in SIZES]
    assert all(logits.std() > 0.1 for logits in expected)
    for size, logits in zip(SIZES, expected, strict=True):
        assert relative(model(wave(2, *size)), logits) < 1e-4
    model.fuse()
    for size, logits in zip(SIZES, expected, strict=True):
        assert relative(model(wave(2, *size)), logits) < 1e-4


@torch.no_grad()
def test_parity_in_training_mode():
    name = "inceptionnext_atto"
    model = create_model(name, num_classes=CLASSES).train()
    model.load_official(official_state(name))
    expected = torch.from_numpy(np.load(FIXTURE)[f"{name}.train"])
    assert relative(model(wave(4, *SIZES[0])), expected) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "atto",
        "tiny",
        pytest.param("small", marks=pytest.mark.slow),
        pytest.param("base", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_parity_with_timm(name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"inception_next_{name}", num_classes=CLASSES).eval()
    state = {key: drawn(key, tuple(value.shape)) for key, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = create_model(f"inceptionnext_{name}", num_classes=CLASSES).eval()
    ours.load_official(state)
    x = noise(2, 3, 64, 64)
    assert theirs(x).std() > 0.1
    assert relative(ours(x), theirs(x)) < 1e-5
    assert relative(ours.forward_features(x), theirs.forward_features(x)) < 1e-5


def test_mixer_against_a_naive_oracle():
    mixer = randomised(InceptionDepthwise(21, 1 / 8, 5))
    x = noise(2, 21, 6, 7)
    expected = x.clone()  # 21 = 15 untouched and three groups of 2
    kernels = mixer.square, mixer.along_rows, mixer.along_columns
    for channel, conv in zip((15, 17, 19), kernels, strict=True):
        height, width = conv.kernel_size
        padded = F.pad(x, (width // 2,) * 2 + (height // 2,) * 2)
        for i, row, column in np.ndindex(2, 6, 7):
            patch = padded[:, channel + i, row : row + height, column : column + width]
            expected[:, channel + i, row, column] = (patch * conv.weight[i, 0]).sum((1, 2)) + conv.bias[i]
    assert torch.allclose(mixer(x), expected, atol=1e-5)
    assert torch.equal(mixer(x)[:, :15], x[:, :15])


def test_a_point_spreads_to_a_square_a_row_and_a_column():
    mixer = InceptionDepthwise(8)
    for conv in (mixer.square, mixer.along_rows, mixer.along_columns):
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
    x = torch.zeros(1, 8, 15, 15)
    x[:, :, 7, 7] = 1
    spread = mixer(x)[0] != 0
    reach = [(int(channel.any(1).sum()), int(channel.any(0).sum())) for channel in spread]
    assert reach == [(1, 1)] * 5 + [(3, 3), (1, 11), (11, 1)]


@pytest.mark.parametrize(("channels", "ratio", "band"), [(96, 1 / 8, 11), (40, 1 / 4, 9), (20, 1 / 8, 11)])
def test_mixer_costs_what_the_paper_says(channels, ratio, band):
    group = int(channels * ratio)
    mixer = InceptionDepthwise(channels, ratio, band)
    assert sum(p.numel() for p in mixer.parameters()) == group * (9 + 2 * band) + 3 * group
    assert mixer.sizes == (channels - 3 * group, group, group, group)


def test_mixer_gradient():
    mixer = InceptionDepthwise(9, 1 / 4, 5).double()
    x = noise(2, 9, 4, 6).double().requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))


@torch.no_grad()
def test_a_block_without_gain_is_the_identity_and_merges_once():
    block = randomised(MetaNeXtBlock(16, 3))
    x = noise(2, 16, 9, 11)
    expected = block(x)
    assert relative(expected, x) > 0.1
    block.merge()
    block.merge()
    assert relative(block(x), expected) < 1e-5
    fresh = MetaNeXtBlock(16, 3)
    nn.init.zeros_(fresh.gain)
    assert torch.equal(fresh(x), x)


def small(**kwargs) -> InceptionNeXt:
    return InceptionNeXt((8, 16, 24), (1, 2, 1), **{"num_classes": 5, **kwargs})


@torch.no_grad()
def test_fuse_removes_every_batch_norm_and_keeps_the_answer():
    model = randomised(small(in_chans=1, ratio=1 / 4, band=7))
    x = noise(2, 1, 67, 50)
    expected, before = model(x), len(list(model.modules()))
    assert model.fuse() is model
    assert relative(model(x), expected) < 1e-4
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms and sum(isinstance(module, nn.Identity) for module in model.modules()) == 7
    assert len(list(model.modules())) == before
    assert relative(model.fuse()(x), expected) < 1e-4


def test_fuse_wants_eval_mode():
    with pytest.raises(UsageError, match="eval"):
        small().train().fuse()


@torch.no_grad()
def test_fuse_at_half_precision_stays_there():
    model = randomised(small()).to(torch.bfloat16).fuse()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()


def test_weights_of_another_variant_are_refused():
    with pytest.raises(CheckpointError, match="do not fit"):
        create_model("inceptionnext_atto", num_classes=CLASSES).load_official(
            official_state("inceptionnext_tiny")
        )


@torch.no_grad()
def test_weights_for_other_classes_and_channels_are_adapted():
    model = create_model("inceptionnext_atto", num_classes=5, in_chans=1).eval()
    state = official_state("inceptionnext_atto")
    model.load_official(state, adapt=True)
    assert torch.equal(model.body[0].conv.weight, state["stem.0.weight"].sum(1, keepdim=True))
    assert model(wave(1, 32, 96).reshape(3, 1, 32, 96)).shape == (3, 5)


@torch.no_grad()
def test_unpooled_head_gives_features_for_every_place():
    model = randomised(small(global_pool="", num_classes=0))
    x = noise(2, 3, 32, 48)
    places = model.forward_head(model.forward_features(x), pre_logits=True)
    assert places.shape == (2, 72, 2, 3)
    corner = model.forward_features(x)[:, :, :1, :1]
    assert torch.allclose(places[:, :, :1, :1], model.head(corner), atol=1e-5)


def test_gradient_checkpointing_and_drop_path_train():
    model = small(drop_path_rate=0.5).train()
    model.set_grad_checkpointing()
    model(noise(4, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
