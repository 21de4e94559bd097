"""OSNet: parity with numbers that the official files gave, the scales of a block, places of instance norm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import ruled_state
from torch import nn

from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.errors import CheckpointError, UsageError
from featherweight.models.osnet import INSIDE, OUTSIDE, PLAIN, OmniScaleBlock, OSNet
from featherweight.registry import create_model, list_models
from featherweight.shrink.fold import fold_batchnorm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "osnet.npz"
RECORDED = ("osnet_x0_25", "osnet_x1_0", "osnet_ibn_x1_0", "osnet_ain_x0_25", "osnet_ain_x1_0")
ALL = list_models("osnet_*")


def official_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the official network with ten identities, as its state dict listed them."""
    recorded = np.load(FIXTURE)
    return {key: tuple(shape) for key, shape in json.loads(str(recorded[f"{name}.layout"])).items()}


def ruled_images(batch: int = 3) -> torch.Tensor:
    wave = np.sin(0.37 * np.arange(batch * 3 * 64 * 32) ** 1.05)
    return torch.from_numpy(wave).float().reshape(batch, 3, 64, 32)


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", RECORDED)
@torch.no_grad()
def test_parity_with_the_official_files(name):
    recorded = np.load(FIXTURE)
    model = create_model(name, num_classes=10).eval()
    model.load_official(ruled_state(official_shapes(name)))
    embedding = model.forward_head(model.forward_features(ruled_images()), pre_logits=True)
    assert recorded[f"{name}.embedding"].std() > 1e-2 and embedding.min() >= 0
    assert relative(embedding, recorded[f"{name}.embedding"]) < 1e-4
    torch.testing.assert_close(model(ruled_images()), model.classifier(embedding))
    logits = model.train()(ruled_images())
    assert recorded[f"{name}.logits"].std() > 1e-2
    assert relative(logits, recorded[f"{name}.logits"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "ids", "params"),
    [
        ("osnet_x1_0", 1000, 2_682_508),
        ("osnet_x1_0", 751, 2_554_771),
        ("osnet_x0_25", 751, 587_127),
    ],
)
def test_parity_of_the_parameter_count_with_a_classifier(name, ids, params):
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model(name, num_classes=ids).parameters()) == params


@pytest.mark.parametrize("name", RECORDED)
def test_checkpoint_of_other_identities_gives_the_embedding(name):
    state = {f"module.{key}": value for key, value in ruled_state(official_shapes(name)).items()}
    state["module.classifier.weight"], state["module.classifier.bias"] = (
        torch.zeros(751, 512),
        torch.zeros(751),
    )
    checkpoint = {"state_dict": state, "epoch": 250, "rank1": 0.9}
    model = create_model(name).eval()
    model.load_official(checkpoint)
    with torch.no_grad():
        assert relative(model(ruled_images()), np.load(FIXTURE)[f"{name}.embedding"]) < 1e-4
    model = create_model(name, num_classes=10)
    model.load_official(checkpoint, adapt=True)
    with pytest.raises(CheckpointError, match="other shape"):
        model.load_official(checkpoint)


def test_weights_of_another_family_are_refused():
    with pytest.raises(CheckpointError, match="do not fit OSNet"):
        create_model("osnet_x1_0").load_official(ruled_state(official_shapes("osnet_ibn_x1_0")))
    with pytest.raises(CheckpointError, match="do not belong to OSNet"):
        create_model("osnet_x1_0").load_official({"features.0.weight": torch.zeros(3)})


def randomised_block(place: str = PLAIN, in_channels: int = 16, out_channels: int = 32) -> OmniScaleBlock:
    torch.manual_seed(0)
    block = OmniScaleBlock(in_channels, out_channels, place=place).eval()
    for name, value in block.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.uniform_(0.5, 1.5) if name.endswith("var") else value.normal_(0, 0.5)
    return block


@pytest.mark.parametrize("place", [PLAIN, INSIDE, OUTSIDE])
@torch.no_grad()
def test_block_is_the_formula(place):
    block = randomised_block(place)
    x = torch.randn(2, 16, 12, 9)
    u = block.squeeze(x)
    v = 0
    for stream in block.streams:
        z = stream(u)
        hidden = F.relu(z.mean((2, 3)) @ block.gate.reduce.weight[:, :, 0, 0].T + block.gate.reduce.bias)
        logits = hidden @ block.gate.expand.weight[:, :, 0, 0].T + block.gate.expand.bias
        v = v + z * (1 / (1 + torch.exp(-logits)))[:, :, None, None]
    y = block.expand(v) + block.shortcut(x)
    if place == OUTSIDE:
        mean, var = y.mean((2, 3), keepdim=True), y.var((2, 3), keepdim=True, correction=0)
        y = (y - mean) / (var + 1e-5).sqrt() * block.norm.weight[:, None, None] + block.norm.bias[
            :, None, None
        ]
    torch.testing.assert_close(block(x), y.clamp(min=0))
    assert isinstance(block.expand.norm, nn.InstanceNorm2d) == (place == INSIDE)


@torch.no_grad()
def test_stream_sees_three_to_nine_pixels_and_one_gate_serves_all():
    block = randomised_block()
    x = torch.randn(1, 8, 21, 21).relu() + 0.1
    moved = x.clone()
    moved[:, :, 10, 10] += 5.0
    for depth, stream in enumerate(block.streams, 1):
        for module in stream.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                module.weight.abs_()  # positive weights keep the ReLUs open
        reach = (stream(x) != stream(moved)).any(1)[0].nonzero()
        assert (reach.max(0).values - reach.min(0).values + 1).tolist() == [2 * depth + 1] * 2
    assert sum(isinstance(module, SqueezeExcite) for module in block.modules()) == 1
    opened = block.gate(torch.ones(2, 8, 4, 4))
    assert opened.min() > 0 and opened.max() < 1


@pytest.mark.parametrize("place", [PLAIN, INSIDE, OUTSIDE])
def test_gradients_of_a_block(place):
    block = randomised_block(place, 4, 8).double()
    x = torch.randn(1, 4, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))


@torch.no_grad()
def test_gain_of_the_image_passes_the_instance_stem_only():
    x = torch.rand(1, 3, 64, 32)
    gaps = []
    for name in ("osnet_ain_x0_25", "osnet_x0_25"):
        stem = create_model(name).eval().body[0]
        gaps.append(float((stem(3 * x) - stem(x)).abs().max()))
    assert gaps[0] < 1e-3 < 0.5 < gaps[1]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_interface_with_a_classifier(name):
    model = create_model(name, width=0.5, num_classes=7, in_chans=1, drop_path_rate=0.1).eval()
    x = torch.randn(2, 1, 77, 45)
    assert model(x).shape == (2, 7) and isinstance(model.get_classifier(), nn.Linear)
    maps = model.feature_extractor()(torch.randn(2, 1, 64, 32))
    assert [m.shape[2] for m in maps] == [32, 16, 8, 4]
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    model.reset_classifier(0)
    assert model(x).shape == (2, 512)
    fine = create_model(name, width=0.5, stem_stride=1, num_classes=3)
    assert [info["reduction"] for info in fine.feature_info] == [1, 2, 4, 8]
    assert model(torch.randn(1, 1, 13, 29)).shape == (1, 512)
    assert create_model(name, global_pool="", width=0.5).eval()(torch.randn(1, 3, 64, 32)).shape[2:] == (4, 2)


@pytest.mark.parametrize(
    ("name", "kept"), [("osnet_x0_25", 0), ("osnet_ibn_x1_0", 3), ("osnet_ain_x0_25", 5)]
)
@torch.no_grad()
def test_every_batch_norm_folds_and_instance_norms_stay(name, kept):
    model = create_model(name).eval()
    model.load_official(ruled_state(official_shapes(name)))
    folded = fold_batchnorm(model)
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(nn.BatchNorm2d) == 0 and kinds.count(nn.InstanceNorm2d) == kept
    torch.testing.assert_close(folded(ruled_images()), model(ruled_images()), rtol=1e-3, atol=1e-5)


def test_checkpointing_keeps_the_gradients():
    torch.manual_seed(0)
    model = create_model("osnet_ain_x0_25", num_classes=4).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(ruled_images()).square().sum().backward()
        gradients.append(model.body[5].streams[3][0][0].weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_single_scale_and_wrong_arguments():
    single = OSNet(0.25, streams=(1,), num_classes=2)
    assert [len(block.streams) for block in single.body if isinstance(block, OmniScaleBlock)] == [1] * 6
    with pytest.raises(UsageError, match="Expected seven"):
        OSNet(places=("plain",) * 6)
    with pytest.raises(UsageError, match="Streams of"):
        OSNet(streams=())


@pytest.mark.slow
@torch.no_grad()
def test_compiled_network_agrees():
    model = create_model("osnet_x0_25").eval()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ruled_images()), model(ruled_images()))
