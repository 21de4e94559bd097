"""SimpleNet: parity with numbers that the official file gave, layers, strides and old key layouts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from parity import ruled_state
from torch import nn

from featherweight.errors import UsageError
from featherweight.models.simplenet import MODES, NETS, parse_layers
from featherweight.registry import create_model, list_models

FIXTURE = Path(__file__).parents[1] / "fixtures" / "simplenet.npz"
RECORDED = (
    "simplenet_small_m1_05",
    "simplenet_small_m2_05",
    "simplenet_cifar_310k",
    "simplenet_cifar_385k",
    "simplenet_cifar_5m",
    "simplenet_cifar_5m_extra_pool",
)


def official_shapes(text: str, scale: float, classes: int, indices: list[int]) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the official network: `features.N` for each convolution and its norm."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    convs = [(kind, round(base * scale)) for kind, base in parse_layers(text) if kind != "p"]
    for (kind, out), index in zip(convs, indices, strict=True):
        side = int(kind[1])
        shapes[f"features.{index}.weight"] = (out, channels, side, side)
        shapes[f"features.{index}.bias"] = (out,)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"features.{index + 1}.{leaf}"] = (out,)
        channels = out
    return {**shapes, "classifier.weight": (classes, channels), "classifier.bias": (classes,)}


@pytest.mark.parametrize("name", RECORDED)
def test_parity_with_the_official_file(name):
    recorded = np.load(FIXTURE)
    net = name.removeprefix("simplenet_")
    small = net.startswith("small")
    text, scale = (NETS["5m"], 0.5) if small else (NETS[net], 1.0)
    classes = int(recorded[f"{name}.logits"].shape[1])
    indices = recorded[f"{name}.indices"].tolist()
    model = create_model(name, num_classes=classes).eval()
    model.load_official(ruled_state(official_shapes(text, scale, classes, indices)))
    side = int(recorded[f"{name}.side"])
    wave = np.sin(0.37 * np.arange(2 * 3 * side * side) ** 1.05)
    with torch.no_grad():
        logits = model(torch.from_numpy(wave).float().reshape(2, 3, side, side)).numpy()
    expected = recorded[f"{name}.logits"]
    assert expected.std() > 1e-3
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_old_files_number_their_layers_otherwise():
    indices = [0, 3, 6, 9, 14, 17, 20, 25, 28, 33, 38, 41, 46]
    shapes = official_shapes(NETS["cifar_5m_extra_pool"], 1.0, 10, indices)
    state = {f"module.{key}": torch.zeros(shape) for key, shape in shapes.items()}
    model = create_model("simplenet_cifar_5m_extra_pool")
    model.load_official({"state_dict": state, "recorder": "x"})
    assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize("name", [n for n in list_models("simplenet_*")])
def test_thirteen_convolutions_and_one_linear(name):
    with torch.device("meta"):
        model = create_model(name)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(nn.Conv2d) == 13 and kinds.count(nn.Linear) == 1


def test_modes_share_parameters_and_keep_resolution_longer():
    sides = {}
    for mode in filter(None, MODES):
        model = create_model("simplenet_small_m1_05", mode=mode).eval()
        sides[mode] = [m.shape[-1] for m in model.feature_extractor()(torch.zeros(1, 3, 64, 64))]
        assert sides[mode][-1] == 2
    counts = {
        sum(p.numel() for p in create_model(f"simplenet_small_{m}_05").parameters()) for m in ("m1", "m2")
    }
    assert len(counts) == 1
    with pytest.raises(UsageError, match="No stride mode"):
        create_model("simplenet_small_m1_05", mode="m9")


def test_width_and_stem_stride_make_a_small_cifar_net():
    model = create_model("simplenet_cifar_310k", width=0.5, stem_stride=2).eval()
    assert model.num_features == 32 and model.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (1, 1)
