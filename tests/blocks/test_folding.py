"""Folding norms and factors into the layers beside them, against running both."""

import pytest
import torch
from torch import nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.fold import (
    check_eval,
    fold_after,
    fold_before,
    folded,
    put_weights,
    scale_and_shift,
    scale_output,
)
from featherweight.errors import UsageError


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d, **kwargs) -> nn.Module:
    generator = torch.Generator().manual_seed(channels)
    made = kind(channels, **kwargs)
    for value in made.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5, generator=generator)
    return made.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@pytest.mark.parametrize(
    ("layer", "kind", "shape"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d, (2, 6, 7, 9)),
        (nn.Conv2d(6, 8, (1, 5), dilation=2), nn.BatchNorm2d, (2, 6, 7, 19)),
        (nn.Conv1d(6, 8, 3), nn.BatchNorm1d, (2, 6, 9)),
        (nn.Conv3d(6, 8, 2, bias=False), nn.BatchNorm3d, (2, 6, 3, 4, 5)),
        (nn.Linear(6, 8, bias=False), nn.BatchNorm1d, (5, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_norm_after_a_layer_folds_exactly(layer, kind, shape):
    layer, after = layer.double(), norm(8, kind).double()
    x = noise(*shape)
    expected = after(layer(x))
    weight, bias = folded(layer, after)
    assert weight.shape == layer.weight.shape and bias.dtype == torch.double
    fold_after(layer, after)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_before_a_layer_folds_exactly(bias):
    before, conv = norm(6).double(), nn.Conv2d(6, 4, 2, stride=2, bias=bias).double()
    x = noise(2, 6, 8, 5)
    expected = conv(before(x))
    fold_before(before, conv)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    flat, linear = norm(6, nn.BatchNorm1d).double(), nn.Linear(6, 3, bias=bias).double()
    expected = linear(flat(x[:, :, 0, 0]))
    fold_before(flat, linear)
    torch.testing.assert_close(linear(x[:, :, 0, 0]), expected, rtol=1e-12, atol=1e-12)


def test_a_norm_without_scale_and_shift():
    plain = norm(4, affine=False).double()
    scale, shift = scale_and_shift(plain)
    x = noise(2, 4, 3, 3)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], plain(x))


def test_factors_leave_a_missing_bias_out_and_a_shift_makes_one():
    conv = nn.Conv2d(3, 4, 1, bias=False)
    kept = conv.weight
    scale_output(conv, torch.full((4,), 2.0))
    assert conv.bias is None and conv.weight is kept
    scale_output(conv, torch.full((4,), 0.5), torch.arange(4.0))
    assert conv.bias.tolist() == [0, 1, 2, 3] and conv.bias.requires_grad
    scale_output(conv, torch.full((4,), 3.0), torch.ones(4))
    assert conv.bias.tolist() == [1, 4, 7, 10]


def test_weights_keep_the_precision_of_the_layer():
    conv = nn.Conv2d(3, 4, 1, bias=False).to(torch.bfloat16)
    put_weights(conv, torch.full((4, 3, 1, 1), 1 / 3, dtype=torch.double), torch.ones(4, dtype=torch.double))
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert conv.weight.eq(torch.tensor(1 / 3).to(torch.bfloat16)).all()


@torch.no_grad()
def test_a_unit_folds_once():
    unit = ConvNormAct(3, 8, 3, stride=2).eval()
    unit.norm = norm(8)
    x = noise(2, 3, 9, 9).float()
    expected = unit(x)
    unit.fuse()
    unit.fuse()
    assert isinstance(unit.norm, nn.Identity)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)


def test_training_mode_is_refused():
    check_eval(nn.Identity().eval())
    with pytest.raises(UsageError, match="eval"):
        check_eval(nn.Identity())
