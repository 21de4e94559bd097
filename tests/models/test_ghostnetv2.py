"""GhostNet and GhostNetV2: parity with timm, and the invariants of their modules."""

import parity
import pytest
import torch

from featherweight.models.ghostnetv2 import DFCAttention, GatedGhostModule, GhostModule
from featherweight.registry import create_model

VARIANTS = (
    "ghostnetv2_100",
    "ghostnetv2_130",
    "ghostnetv2_160",
    "ghostnet_050",
    "ghostnet_100",
    "ghostnet_130",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_parity_with_timm(name):
    timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    parity.assert_parity(name, timm.create_model(name, drop_rate=0.0), side=48)


def test_odd_sides_agree_with_timm():
    timm = pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    parity.assert_parity("ghostnetv2_100", timm.create_model("ghostnetv2_100"), side=75)


def test_open_gates_leave_the_plain_ghost_module():
    module = GatedGhostModule(6, 10).eval()
    last = module.attention.strips[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 20.0)
    x = torch.randn(2, 6, 7, 9)
    torch.testing.assert_close(module(x), module.ghost(x))


def test_odd_channels_and_gate_range():
    assert GhostModule(4, 7).eval()(torch.randn(1, 4, 5, 5)).shape == (1, 7, 5, 5)
    gate = DFCAttention(4, 7).eval()(torch.randn(1, 4, 6, 6))
    assert gate.shape == (1, 7, 3, 3) and gate.min() > 0 and gate.max() < 1


@torch.no_grad()
def test_gate_sees_ten_by_ten_pixels_and_the_plain_module_three():
    torch.manual_seed(0)
    module = GatedGhostModule(2, 4).eval()
    x = torch.randn(1, 2, 40, 40)
    moved = x.clone()
    moved[:, :, 20, 20] += 5.0
    reach = lambda f: (f(x) != f(moved)).any(1)[0].nonzero()  # noqa: E731
    span = lambda r: (r.max(0).values - r.min(0).values + 1).tolist()  # noqa: E731
    assert span(reach(module.attention)) == [5, 5]
    assert span(reach(module)) == [10, 10]
    assert max(span(reach(module.ghost))) <= 3


def test_gates_cost_974400_parameters():
    sizes = [sum(p.numel() for p in create_model(n).parameters()) for n in ("ghostnetv2_100", "ghostnet_100")]
    assert sizes[0] - sizes[1] == 974_400
