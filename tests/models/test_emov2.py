"""EMOv2: parity with numbers of the official code, attention against loops, fusing, foreign files."""

import json
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.errors import CheckpointError, UsageError
from featherweight.models.emov2 import (
    ATTENTIONS,
    EMOv2,
    LayerScale,
    SpanningAttention,
    merge_windows,
    split_windows,
)
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "emov2.npz"
BUILDS = {
    "emov2_1m": {},
    "emov2_2m": {},
    "emov2_5m": {},
    "emov2_5m_512": {},
    "emo_1m": {"attention": "remote", "kernels": (3, 3, 5, 5)},
    "emov2_20m": {},
    "emov2_50m": {},
}
LARGE = ("emov2_20m", "emov2_50m")


def ruled_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Draw a state dict by a rule that needs no file: the name of each key is the seed of its values."""
    state = {}
    for key, shape in shapes.items():
        values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        if key.endswith("running_var"):
            values = 0.5 + np.abs(values)
        elif key.endswith("gamma"):
            values = 1 + 0.3 * values
        elif len(shape) > 1:
            values = values * (1.5 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("weight"):
            values = 1 + 0.3 * values
        else:
            values = 0.1 * values
        state[key] = torch.from_numpy(values).float()
    return state


def ruled_images() -> torch.Tensor:
    """Two images whose late maps, 10 x 13 and 5 x 7, are no multiples of a window."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 160, 200))).float()


def official_state(build: str) -> dict[str, torch.Tensor]:
    return ruled_state(json.loads(np.load(FIXTURE)[f"{build}.shapes"].tobytes()))


def loaded(build: str) -> EMOv2:
    name = build.replace("emo_", "emov2_")
    model = create_model(name, num_classes=100, **BUILDS[build])
    model.load_official(official_state(build))
    return model


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    assert expected.std() > 0.1, "the numbers say nothing"
    assert np.abs(found.detach().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=pytest.mark.slow) if b in LARGE else b for b in BUILDS]
)
@torch.no_grad()
def test_parity_with_the_official_code(build):
    assert_close(loaded(build).eval()(ruled_images()), np.load(FIXTURE)[f"{build}.eval"])


@torch.no_grad()
def test_parity_in_training_mode_and_of_feature_maps():
    model, recorded = loaded("emov2_1m"), np.load(FIXTURE)
    maps = model.eval().feature_extractor()(ruled_images())
    assert_close(torch.cat([m.mean((2, 3)) for m in maps], 1), recorded["emov2_1m.features"])
    assert_close(model.train()(ruled_images()), recorded["emov2_1m.train"])


def test_training_checkpoints_unwrap_the_plain_weights_first():
    state = official_state("emov2_1m")
    averaged = {key: torch.zeros_like(value) for key, value in state.items()}
    model = create_model("emov2_1m", num_classes=100)
    model.load_official({"net": state, "net_E": averaged, "epoch": 299})
    assert torch.equal(model.classifier.weight, state["head.weight"])
    model.load_official({"net_E": {f"module.{key}": value for key, value in averaged.items()}})
    assert not model.classifier.weight.any()
    with pytest.raises(CheckpointError, match="do not fit EMOv2"):
        model.load_official({key: value for key, value in state.items() if "qk" not in key})


@torch.no_grad()
def test_pretrained_weights_adapt_to_grey_images_and_other_classes():
    state = official_state("emov2_1m")
    model = create_model("emov2_1m", num_classes=3, in_chans=1)
    model.load_official(state, adapt=True)
    expected = state["stage0.0.conv.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.body[0][0].conv.weight, expected)


def looped_attention(module: SpanningAttention, x: torch.Tensor) -> torch.Tensor:
    """Every pixel on its own: pixels of its near and of its dilated window, head by head."""
    w, heads = module.window, module.heads
    height, width = x.shape[2:]
    x = nn.functional.pad(x, (0, -width % w, 0, -height % w))
    query, key = module.qk(x).chunk(2, 1)
    value = module.value(x)
    d, e = query.shape[1] // heads, value.shape[1] // heads
    out = torch.zeros_like(value)
    same = {
        False: lambda i, j, side: i // w == j // w,
        True: lambda i, j, side: i % (side // w) == j % (side // w),
    }
    rows, cols = x.shape[2:]
    for remote, i, j, h in product(module.partitions, range(rows), range(cols), range(heads)):
        ks = [k for k in range(rows) if same[remote](i, k, rows)]
        ls = [k for k in range(cols) if same[remote](j, k, cols)]
        keys = key[0, h * d : (h + 1) * d][:, ks][:, :, ls].flatten(1)
        values = value[0, h * e : (h + 1) * e][:, ks][:, :, ls].flatten(1)
        weights = (query[0, h * d : (h + 1) * d, i, j] @ keys * d**-0.5).softmax(0)
        out[0, h * e : (h + 1) * e, i, j] += values @ weights
    return out[:, :, :height, :width]


@pytest.mark.parametrize("kind", ["hybrid", "near", "remote"])
@pytest.mark.parametrize("size", [(6, 9), (4, 5), (3, 3), (2, 3)])
@torch.no_grad()
def test_attention_equals_loops(kind, size):
    torch.manual_seed(0)
    module = SpanningAttention(8, 20, head_dim=4, window=3, partitions=ATTENTIONS[kind])
    x = torch.randn(1, 8, *size)
    torch.testing.assert_close(module(x), looped_attention(module, x))


def test_attention_has_right_gradients():
    torch.manual_seed(0)
    module = SpanningAttention(4, 6, head_dim=2, window=2).double()
    x = torch.randn(1, 4, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("remote", [False, True])
def test_partitions_are_inverted_exactly(remote):
    x = torch.arange(2 * 6 * 8 * 12.0).reshape(2, 6, 8, 12)
    windows = split_windows(x, 3, 4, remote)
    assert windows.shape == (2 * 2 * 3, 3, 16, 2)
    assert torch.equal(merge_windows(windows, (8, 12), 4, remote), x)
    # The first window's rows: neighbours, or as far apart as there are windows.
    assert windows[0, 0, ::4, 0].tolist() == x[0, 0, :: 2 if remote else 1, 0][:4].tolist()


@torch.no_grad()
def test_only_remote_windows_reach_over_the_map():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 8)
    moved = x.clone()
    moved[:, :, 0, 0] += 1
    reach = {}
    for kind in ("near", "remote", "hybrid"):
        module = SpanningAttention(8, 8, head_dim=8, window=4, partitions=ATTENTIONS[kind])
        reach[kind] = {tuple(p) for p in (module(x) != module(moved)).any(1)[0].nonzero().tolist()}
    assert reach["near"] == set(product(range(4), repeat=2))
    assert reach["remote"] == set(product(range(0, 8, 2), repeat=2))
    assert reach["hybrid"] == reach["near"] | reach["remote"]


def test_kinds_of_attention_cost_the_same_parameters():
    sizes = {
        kind: sum(p.numel() for p in create_model("emov2_1m", attention=kind).parameters())
        for kind in ATTENTIONS
    }
    assert sizes["near"] == sizes["remote"] == sizes["hybrid"] > sizes["none"]
    with pytest.raises(UsageError, match="No attention 'far'"):
        create_model("emov2_1m", attention="far")


@torch.no_grad()
def test_fused_equals_unfused_with_fewer_layers():
    model = loaded("emov2_1m").eval()
    x = ruled_images()[:, :, :96, :96]
    expected, layers = model(x), count_layers(model)
    assert model.fuse() is model
    assert_close(model(x), expected.numpy())
    assert count_layers(model) < layers - 30
    assert not any(isinstance(m, nn.BatchNorm2d | LayerScale) for m in model.modules())
    with pytest.raises(UsageError, match="eval mode"):
        create_model("emov2_1m").train().fuse()


def count_layers(model: nn.Module) -> int:
    return sum(not list(m.children()) and not isinstance(m, nn.Identity) for m in model.modules())


@torch.no_grad()
def test_onnx_parity_with_weights_that_matter(tmp_path):
    """Fresh layer scales of 1e-6 hide the blocks from the conformance suite; these weights do not."""
    onnx = pytest.importorskip("featherweight.export.onnx")
    model = loaded("emov2_1m").eval()
    report = onnx.export_onnx(model, tmp_path / "m.onnx", (3, 160, 200), images=ruled_images().numpy())
    assert report.exporter == "traced" and report.max_relative_error < 1e-5
    model = model.to(memory_format=torch.channels_last)
    found = model(ruled_images().to(memory_format=torch.channels_last))
    assert_close(found, np.load(FIXTURE)["emov2_1m.eval"])


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_loss_falls(kind):
    torch.manual_seed(0)
    model = EMOv2((1, 2), (16, 32), first_attending=1, window=4, attention=kind, num_classes=4)
    x, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        losses.append(nn.functional.cross_entropy(model(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_equals_eager():
    torch.manual_seed(0)
    model = EMOv2((1, 2), (16, 32), first_attending=1, window=4, layer_scale=1.0, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
