"""ConvFirst: parity with the author's blocks and published figures, folding, strips, plan of fused blocks."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.measure.count import count
from featherweight.measure.fusion import (
    FusedBlock,
    Tile,
    halo_factor,
    plan_tile,
    tile_ops,
    workspace_values,
)
from featherweight.measure.kernels import list_kernels
from featherweight.measure.roofline import Roofline, Waterline
from featherweight.models.convfirst import STAGES, ConvFirst, ConvFirstNet, MBConv
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "convfirst.npz"
BLOCKS = {"ConvFirst": ConvFirst, "MBConv": MBConv}
CASES = {
    f"{kind}_{shape}": (kind, *arguments)
    for kind in BLOCKS
    for shape, arguments in {
        "same": (16, 16, 3, 1, 8, 4),
        "strided": (16, 24, 3, 2, 8, 4),
        "depthwise": (12, 12, 5, 1, 1, 6),
    }.items()
}
"""Block, channels in and out, kernel, stride, group width, expansion; as the fixture was recorded."""


def waves(*shape: int) -> torch.Tensor:
    size = int(np.prod(shape))
    return torch.from_numpy(np.sin(0.37 * np.arange(size) ** 1.05)).float().reshape(shape)


def fill(module: nn.Module) -> nn.Module:
    """Fill a block by a rule over the order of its tensors, which is the author's order as well."""
    tensors = [(key, t) for key, t in module.state_dict().items() if t.is_floating_point()]
    for number, (key, tensor) in enumerate(tensors):
        wave = torch.from_numpy(np.cos(0.7 * np.arange(tensor.numel()) ** 1.1 + number)).float()
        wave = wave.reshape(tensor.shape)
        if key.endswith("running_var"):
            wave = 1 + 0.5 * wave
        elif tensor.ndim > 1:
            wave = wave * (2 / np.prod(tensor.shape[1:])) ** 0.5
        elif key.endswith("weight"):
            wave = 1 + 0.3 * wave
        else:
            wave = 0.4 * wave
        tensor.copy_(wave)
    return module


def relative(found: torch.Tensor, expected: torch.Tensor | np.ndarray) -> float:
    found, expected = found.detach().numpy(), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_parity_with_the_authors_blocks(name):
    kind, channels, *rest = CASES[name]
    block = fill(BLOCKS[kind](channels, *rest))
    for mode in ("eval", "train"):
        expected = np.load(FIXTURE)[f"{name}.{mode}"]
        assert expected.std() > 0.1
        assert relative(block.train(mode == "train")(waves(2, channels, 9, 7)), expected) < 1e-4


@pytest.mark.parametrize(
    ("block", "channels", "group_width", "side", "params", "macs"),
    [
        (ConvFirst, 64, 8, 64, 38_144, 153_092_096),
        (ConvFirst, 64, 1, 64, 34_112, 136_577_024),
        (ConvFirst, 128, 8, 28, 141_824, 109_985_792),
        (MBConv, 64, 8, 64, 52_352, 209_715_200),
        (MBConv, 64, 1, 64, 36_224, 143_654_912),
        (MBConv, 128, 8, 28, 170_240, 131_661_824),
    ],
)
def test_parity_of_published_counts(block, channels, group_width, side, params, macs):
    found = count(block(channels, channels, group_width=group_width), (channels, side, side))
    assert (found.params, found.macs) == (params, macs)


@pytest.mark.parametrize(("block", "params"), [(ConvFirst, 15_040), (MBConv, 22_144)])
def test_parity_of_published_counts_at_stride_two(block, params):
    assert sum(p.numel() for p in block(32, 64, stride=2).parameters()) == params


@pytest.mark.parametrize(
    ("block", "separate", "fused", "values_a_pixel"), [(ConvFirst, 44, 273, 13), (MBConv, 42, 364, 19)]
)
def test_parity_of_the_published_intensities(block, separate, fused, values_a_pixel):
    network = block(64, 64)
    layers = Waterline(tuple(list_kernels(network, (64, 64, 64), value_bytes=2)), Roofline(100e12, 1e12))
    whole = list_kernels(network, (64, 64, 64), value_bytes=2, fused=(block,))
    assert layers.intensity == pytest.approx(separate, rel=0.02)
    assert [kernel.intensity for kernel in whole] == [pytest.approx(fused, rel=0.02)]
    activations = sum(kernel.read_bytes + kernel.written_bytes for kernel in layers.kernels)
    assert activations == values_a_pixel * 64 * 64 * 64 * 2
    assert layers.macs == whole[0].macs == count(network, (64, 64, 64)).macs
    assert layers.efficiency < Waterline(tuple(whole), layers.roofline).efficiency == 1


def test_parity_of_the_published_fusion_figures():
    block = FusedBlock(64, 64, 64, 64)
    assert 4 * workspace_values(block, Tile(8, 8, 64)) == 3 * 16 * 1024
    assert halo_factor(block, Tile(16, 16, 64)) == pytest.approx(1.27, abs=0.005)
    assert halo_factor(block, Tile(8, 8, 64)) == pytest.approx(1.56, abs=0.005)
    for channels, share in ((64, 0.14), (128, 0.07)):
        macs = {op.name: op.macs for op in tile_ops(FusedBlock(channels, channels, 64, 64), Tile(8, 8, 64))}
        assert macs["convolve"] / (macs["widen"] + macs["project"]) == pytest.approx(share, abs=0.005)
    first, last = (count(kind(64, 64), (64, 64, 64)).macs for kind in (ConvFirst, MBConv))
    assert 1 - first / last == pytest.approx(0.27, abs=0.005)


def test_planned_tile_fits_and_a_larger_one_would_cost_less():
    for conv_first in (True, False):
        block = FusedBlock(64, 96, 56, 28, stride=2, conv_first=conv_first)
        tiles = [plan_tile(block, limit) for limit in (32 << 10, 256 << 10, 1 << 30)]
        sizes = [4 * workspace_values(block, tile) for tile in tiles]
        assert sizes[0] <= 32 << 10 < sizes[1] <= 256 << 10 < sizes[2]
        assert tiles[2].height == 56 and tiles[2].width == 28
        traffic = [halo_factor(block, tile) for tile in tiles]
        assert traffic[0] > traffic[1] > traffic[2]
    with pytest.raises(UsageError, match="No tile fits into 100 bytes"):
        plan_tile(FusedBlock(64, 64, 8, 8), 100)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("depthwise")])
@torch.no_grad()
def test_block_is_the_formula(name):
    kind, channels, *rest = CASES[name]
    block = fill(BLOCKS[kind](channels, *rest)).double().eval()
    x = waves(1, channels, 5, 6).double()

    def unit(part, y):
        norm = part.norm
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    def pointwise(part, y):
        return unit(part, torch.einsum("oi,nihw->nohw", part.conv.weight[:, :, 0, 0], y))

    def grouped(part, y):
        groups = zip(y.split(8, 1), part.conv.weight.split(8), strict=True)
        return unit(part, torch.cat([F.conv2d(a, w, stride=rest[2], padding=1) for a, w in groups], 1))

    if kind == "ConvFirst":
        y = F.silu(pointwise(block.expand, grouped(block.spatial, x)))
    else:
        y = F.silu(grouped(block.depthwise, F.silu(pointwise(block.expand, x))))
    y = pointwise(block.project, y) + (x if block.has_skip else 0)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("kind", BLOCKS)
def test_gradients_in_double_precision(kind):
    block = fill(BLOCKS[kind](8, 8, expansion=2)).double().eval()
    x = waves(1, 8, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(block, x)


SIZES = [(7, 3), (14, 14), (17, 1), (56, 8)]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("side", "rows"), SIZES)
@torch.no_grad()
def test_strips_equal_the_whole(kind, side, rows):
    variants = itertools.product((1, 2), (16, 24), (1, 8), (False, True))
    for stride, out_channels, group_width, is_fused in variants:
        block = fill(BLOCKS[kind](16, out_channels, 3, stride, group_width)).eval()
        if is_fused:
            block.fuse()
        for batch in (1, 5) if side < 20 else (1,):
            x = waves(batch, 16, side, side + 2)
            assert relative(block.forward_strips(x, rows), block(x)) < 1e-5


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_strips_hold_only_some_rows_of_the_widened_map(kind):
    block = fill(BLOCKS[kind](16, 16)).eval()
    heights = []
    block.expand.register_forward_hook(lambda module, args, out: heights.append(out.shape[2]))
    block.forward_strips(waves(1, 16, 20, 20), 4)
    halo = 0 if kind == "ConvFirst" else 2
    assert max(heights) == 4 + halo and len(heights) == 5
    with pytest.raises(UsageError, match="Strips of 0 rows"):
        block.forward_strips(waves(1, 16, 8, 8), 0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_folded_block_keeps_its_answers(name):
    kind, channels, *rest = CASES[name]
    block = fill(BLOCKS[kind](channels, *rest)).eval()
    x = waves(2, channels, 9, 7)
    expected = block(x)
    block.fuse()
    block.fuse()
    assert relative(block(x), expected) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    if kind == "ConvFirst":
        assert block.spatial.conv.bias is None


@torch.no_grad()
def test_fused_network_has_fewer_layers_and_the_same_answers():
    model = fill(ConvFirstNet(((16, 2), (24, 2)), num_classes=5)).eval()
    x = waves(2, 3, 32, 32)
    expected, layers = model(x), len([m for m in model.modules() if not list(m.children())])
    with pytest.raises(UsageError, match="eval"):
        model.train().fuse()
    assert model.eval().fuse() is model
    assert relative(model(x), expected) < 1e-4
    left = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in left)
    assert len(left) < layers


@pytest.mark.parametrize("size", STAGES)
def test_counts_follow_from_the_formula(size):
    channels, params, macs, side = 32, 27 * 32 + 64, 27 * 32 * 112**2, 112
    for stage, (out, depth) in enumerate(STAGES[size]):
        for index in range(depth):
            side = side // 2 if stage and not index else side
            weights = 72 * channels + 4 * channels * (channels + out)
            params += weights + 2 * (channels + 4 * channels + out)
            macs += weights * side**2
            channels = out
    last = 4 * channels
    params += channels * last + 2 * last + 1000 * last + 1000
    macs += channels * last * side**2 + 1000 * last
    with torch.device("meta"):
        model = create_model(f"convfirstnet_{size}")
    found = count(model, (3, 224, 224))
    assert (found.params, found.macs) == (params, macs)


def test_network_of_the_other_block_and_wrong_groups():
    network = ConvFirstNet(((16, 1), (24, 1)), block=MBConv, num_classes=3, stem_stride=1)
    assert network(waves(2, 3, 16, 16)).shape == (2, 3)
    assert network.feature_info[-1]["reduction"] == 2
    assert ConvFirstNet(((16, 1),), group_width=12).num_features == 96
    with pytest.raises(UsageError, match="12 channels do not divide into groups of 8"):
        ConvFirst(12, 12)
