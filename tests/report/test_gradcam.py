import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featherweight.errors import UsageError
from featherweight.report.gradcam import grad_cam, overlay


class Pooled(nn.Module):
    """Convolution, batch norm, ReLU, global average pooling, linear head."""

    def __init__(self, channels=6, classes=3):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(channels, classes)

    def forward_features(self, x):
        return self.features(x)

    def forward_head(self, x):
        return self.head(x.mean(dim=(2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Pooled()


@pytest.mark.parametrize("class_index", [2, [0, 2], None])
def test_linear_head_has_the_closed_form(net, class_index):
    x = torch.randn(2, 3, 12, 10)
    found = grad_cam(net, x, class_index=class_index)
    net.eval()
    with torch.no_grad():
        maps = net.forward_features(x)
        index = net(x).argmax(1) if class_index is None else torch.tensor(class_index).expand(2)
        # the gradient of a pooled linear head is the class's weights over the number of pixels
        heat = torch.einsum("nc,nchw->nhw", net.head.weight[index], maps).relu().numpy()
    expected = heat / np.maximum(heat.max(axis=(1, 2), keepdims=True), 1e-12)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_named_module_equals_the_default_and_nothing_is_left_behind(net):
    x = torch.randn(2, 3, 8, 8)
    net.train()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    default, named = grad_cam(net, x), grad_cam(net, x.numpy(), target_module=net.features)
    np.testing.assert_allclose(default, named, atol=1e-6)
    assert net.training and not net.features._forward_hooks
    assert all(parameter.grad is None for parameter in net.parameters())


def test_most_heat_lies_in_the_coloured_blob():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = 0.2 * torch.rand(64, 3, 16, 16, generator=generator)
    labels = torch.arange(64) % 3
    masks = torch.zeros(64, 16, 16, dtype=torch.bool)
    for index, label in enumerate(labels):
        top, left = torch.randint(0, 11, (2,), generator=generator).tolist()
        masks[index, top : top + 5, left : left + 5] = True
        x[index, label, top : top + 5, left : left + 5] += 0.8
    net = Pooled(channels=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    heat = grad_cam(net, x, class_index=labels.tolist())
    inside = (heat * masks.numpy()).sum(axis=(1, 2)) / heat.sum(axis=(1, 2))
    assert (inside > 0.5).all()


def test_bad_requests_say_what_to_do(net):
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(UsageError, match="0 to 2"):
        grad_cam(net, x, class_index=3)
    with pytest.raises(UsageError, match="before the pooling"):
        grad_cam(net, x, target_module=net.head)
    with pytest.raises(UsageError, match="target_module"):
        grad_cam(nn.Sequential(nn.Conv2d(3, 2, 1)), x)
    with pytest.raises(UsageError, match="did not run"):
        grad_cam(net, x, target_module=nn.Conv2d(3, 3, 1))


def test_overlay_keeps_cold_pixels_and_size():
    image = Image.new("RGB", (200, 150), (10, 200, 30))
    cam = np.zeros((15, 20), np.float32)
    cam[:5, :5] = 1
    shown = np.asarray(overlay(image, cam))
    assert shown.shape == (150, 200, 3)
    assert (shown[-1, -1] == (10, 200, 30)).all()
    assert (shown[0, 0] != (10, 200, 30)).any()
