"""The host of the operators is torchvision's network, weight for weight."""

import pytest
import torch

from featherweight.blocks.resnet import ResNet

torchvision = pytest.importorskip("torchvision")


@pytest.mark.parametrize(
    ("name", "depths", "expansion"), [("resnet18", (2, 2, 2, 2), 1), ("resnet50", (3, 4, 6, 3), 4)]
)
@torch.no_grad()
def test_parity_with_torchvision(name, depths, expansion):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours = ResNet(depths, expansion, num_classes=7).eval()
    ours.load_official(theirs.state_dict())
    x = torch.randn(2, 3, 65, 64)
    expected = theirs(x)
    assert float((ours(x) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_small_images_and_odd_widths():
    model = ResNet((1, 1, 1, 1), widths=(60, 120, 240, 516), large_images=False, num_classes=3)
    assert [info["num_chs"] for info in model.feature_info] == [60, 120, 240, 516]
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8]
    assert (
        sum(p.numel() for p in ResNet((2,) * 4, large_images=False, num_classes=10).parameters())
        == 11_173_962
    )
