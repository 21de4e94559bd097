"""MobileNetV2: parity with torchvision and timm, and what is special about it."""

import parity
import pytest
import torch
import torchvision

from featherweight.models.mobilenetv2 import MobileNetV2
from featherweight.registry import create_model

WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "130": 1.3, "140": 1.4}


@pytest.mark.parametrize(("suffix", "width"), WIDTHS.items())
def test_parity_with_torchvision(suffix, width):
    official = torchvision.models.mobilenet_v2(width_mult=width)
    parity.assert_parity(f"mobilenetv2_{suffix}", official)


@pytest.mark.parametrize("suffix", ["035", "050", "075", "100", "140"])
def test_parity_with_timm(suffix):
    timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    parity.assert_parity(f"mobilenetv2_{suffix}", timm.create_model(f"mobilenetv2_{suffix}"))


def test_last_convolution_never_goes_below_1280():
    assert [MobileNetV2(w, num_classes=0).num_features for w in (0.25, 1.0, 1.4)] == [1280, 1280, 1792]


def test_skip_block_is_the_identity_without_its_projection():
    block = create_model("mobilenetv2_035").eval().body[3]
    block.project.norm.weight.data.zero_()
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(block(x), x)


def test_small_images_keep_their_resolution():
    model = create_model("mobilenetv2_035", stem_stride=1, strides=(1, 1, 2, 2, 1, 2, 1)).eval()
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:] == (4, 4)
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8]
