"""FDConv-ResNets: the released backbones' sizes, and the answers of the plain ResNet whose weights load."""

import pytest
import torch

from featherweight.cards import get_card
from featherweight.models.fdconv_resnet import FDConvResNet
from featherweight.ops.fdconv import FDConv2d
from featherweight.registry import create_model

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("name", "params", "added", "layers"),
    [("resnet18", 11_745_712, 569_200, 16), ("resnet50", 27_155_152, 3_647_120, 48)],
)
def test_backbones_are_as_large_as_the_released_ones(name, params, added, layers):
    with torch.device("meta"):
        model = create_model(f"fdconv_{name}", num_classes=0)
        plain = torchvision.models.get_model(name)
    plain.fc = torch.nn.Identity()
    found = sum(p.numel() for p in model.parameters())
    assert found == params and found - sum(p.numel() for p in plain.parameters()) == added
    assert sum(isinstance(m, FDConv2d) for m in model.modules()) == layers
    assert get_card("fdconv").variants[f"fdconv_{name}"].counted["params"] > params


@torch.no_grad()
def test_parity_with_the_plain_network_whose_weights_it_loads():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model = create_model("fdconv_resnet18", num_classes=5).eval()
    model.load_official(plain.state_dict())
    expected = plain(x)
    assert float((model(x) - expected).abs().max() / expected.abs().max()) < 1e-4


@torch.no_grad()
def test_the_released_keys_load():
    model = FDConvResNet((1, 1, 1, 1), 4, width=0.5, num_classes=3)
    for p in model.parameters():
        p.normal_(0, 0.1)
    ours = model.state_dict()
    state = {}
    for key, value in ours.items():
        head, _, rest = key.partition(".")
        if head != "body" or key.endswith("group"):
            continue
        position, _, rest = rest.partition(".")
        for old, new in (
            ("modulation.", "KSM_Global."),
            ("local.", "KSM_Local."),
            ("bands.heads.", "FBM.freq_weight_conv_list."),
            ("shortcut.conv.", "downsample.0."),
            ("shortcut.norm.", "downsample.1."),
        ):
            rest = rest.replace(old, new)
        for number in "123":
            rest = rest.replace(f"conv{number}.conv.", f"conv{number}.").replace(
                f"conv{number}.norm.", f"bn{number}."
            )
        stem = {"conv.weight": "conv1.weight"}.get(rest, rest.replace("norm.", "bn1."))
        state[stem if position == "0" else f"layer{int(position) - 1}.0.{rest}"] = value
    twin = FDConvResNet((1, 1, 1, 1), 4, width=0.5, num_classes=3)
    twin.load_official({"state_dict": state})
    for key, value in ours.items():
        if not key.startswith("classifier."):
            assert torch.equal(twin.state_dict()[key], value), key
