"""PHC-ResNets, PHC-VGGs and the sound-event network: official outputs and counts, any n, fusing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.models.phc_resnet import PHCResNet
from featherweight.models.phc_resnet.sed import PHCSedNet
from featherweight.ops.phnn import PHConv2d, PHLinear
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "phnn.npz"
QUICK = ("phcresnet20_n4", "phcresnet18large_n3", "phcvgg16_bn_n4")
SLOW = ("phcresnet18_n4", "phcresnet50_n2", "phcresnet20large_n3", "phcvgg11_bn_n1")


def ruled_state(recorded, name: str) -> dict[str, torch.Tensor]:
    """Fill the official keys by a rule that needs no file: a scaled cosine over the position."""
    state = {}
    entries = zip(recorded[f"{name}.keys"].tolist(), recorded[f"{name}.shapes"].tolist(), strict=True)
    for number, (key, text) in enumerate(entries):
        shape = tuple(map(int, text.split()))
        size = int(np.prod(shape))
        wave = torch.from_numpy(np.cos(0.7 * np.arange(size) ** 1.1 + number)).float().reshape(shape)
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif key.endswith((".F", ".S", ".s")):
            wave = wave * (2 / np.prod(shape[2:])) ** 0.5 / shape[0] ** 0.5
        elif key.endswith((".A", ".a")):
            wave = wave * 1.4 / shape[0] ** 0.5
        elif len(shape) > 1:
            wave = wave * (2 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.1 * wave
        state[key] = wave
    return state


def wave_input(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.sin(0.37 * np.arange(int(np.prod(shape))) ** 1.05)).float().reshape(shape)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@torch.no_grad()
def test_parity_with_the_official_network(name):
    recorded = np.load(FIXTURE)
    model = create_model(name).eval()
    model.load_official({f"module.{key}": value for key, value in ruled_state(recorded, name).items()})
    x, expected = wave_input((2, 3, 32, 32)), torch.from_numpy(recorded[f"{name}.logits"])
    assert expected.std() > 1e-2
    assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    kinds = [type(m) for m in model.fuse().modules()]
    assert not {PHConv2d, PHLinear, nn.BatchNorm2d} & set(kinds)
    assert (model(x) - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_parity_with_the_official_sound_event_network():
    recorded = np.load(FIXTURE)
    model = PHCSedNet(4).eval()
    model.load_state_dict(model.from_official(ruled_state(recorded, "sed")), strict=False)
    x, expected = wave_input((1, 4, 256, 32)), torch.from_numpy(recorded["sed.y"])
    assert (model(x) - expected).abs().max() < 1e-5
    model.fuse()
    assert type(model.cnn[0].conv) is nn.Conv2d and (model(x) - expected).abs().max() < 1e-5


SED = {
    (2, 4): 7_780_362,
    (4, 4): 7_392_938,
    (2, 8): 7_781_514,
    (4, 8): 7_393_514,
    (8, 8): 7_201_194,
    (2, 16): 7_783_818,
    (4, 16): 7_394_666,
    (8, 16): 7_201_770,
    (16, 16): 7_118_762,
}
FULL = {2: 6_469_666, 4: 5_427_050}


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_counts_of_the_sound_event_networks():
    with torch.device("meta"):
        assert {key: params(PHCSedNet(*key)) for key in SED} == SED
        assert {n: params(PHCSedNet(n, full=True)) for n in FULL} == FULL
        assert params(PHCSedNet(2).cnn) == 778_208


def test_zero_channels_in_front_complete_the_image():
    torch.manual_seed(0)
    model = create_model("phcresnet20_n4").eval()
    x = torch.randn(1, 3, 16, 16)
    four = create_model("phcresnet20_n4", in_chans=4).eval()
    four.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), four(torch.cat((torch.zeros(1, 1, 16, 16), x), 1)), atol=1e-6)


@pytest.mark.parametrize("n", [3, 5])
def test_any_number_of_components(n):
    model = PHCResNet(n, depths=(1, 1), widths=(16, 32), num_classes=4)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 4)
    assert all(p.shape[0] == n for key, p in model.named_parameters() if "algebra" in key)
