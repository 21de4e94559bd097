"""Cutting a network into kernels: what joins, what is stored, what moves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.measure.count import count
from featherweight.measure.kernels import list_kernels
from featherweight.registry import create_model


class Residual(nn.Module):
    """Convolution, norm, activation, convolution, plus the input; a pooled linear layer."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace)
        self.second = nn.Conv2d(8, 4, 1, bias=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.second(self.act(self.norm(self.first(x))))
        return self.last(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_norm_activation_and_sum_join_the_convolution(inplace):
    model = Residual(inplace)
    kernels = list_kernels(model, (4, 6, 6), batch=2, value_bytes=2)
    found = [(k.name, k.macs, k.read_bytes, k.written_bytes, k.weight_bytes) for k in kernels]
    pixels = 2 * 36
    assert found == [
        ("first", pixels * 288, 2 * pixels * 4, 2 * pixels * 8, 2 * 288),
        ("second", pixels * 32, 2 * pixels * (8 + 4), 2 * pixels * 4, 2 * 32),
        ("Residual", 0, 2 * pixels * 4, 2 * 8, 0),
        ("last", 2 * 12, 2 * 8, 2 * 6, 2 * 15),
    ]
    assert model.training and not model.first._forward_hooks


def test_a_whole_network_in_one_kernel_moves_input_output_and_weights():
    (kernel,) = list_kernels(Residual(), (4, 6, 6), fused=(Residual,))
    assert (kernel.read_bytes, kernel.written_bytes) == (4 * 36 * 4, 4 * 3)
    assert kernel.weight_bytes == 4 * (288 + 32 + 15)
    assert kernel.macs == count(Residual(), (4, 6, 6)).macs


class Forked(nn.Module):
    """A result that two others want is stored, so nothing can join it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        y = self.conv(x)
        return y * y.mean((2, 3), keepdim=True)


def test_what_two_want_is_stored():
    kernels = list_kernels(Forked(), (2, 5, 5), value_bytes=1)
    assert [(k.read_bytes, k.written_bytes) for k in kernels] == [(50, 50), (50, 2), (52, 50)]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return F.softmax(q @ k.transpose(1, 2), -1) @ v


def test_products_of_activations_count_and_views_move_what_they_show():
    kernels = list_kernels(Attention(), (8, 2, 2), value_bytes=1)
    products = [kernel for kernel in kernels if kernel.macs == 4 * 4 * 8]
    assert [kernel.read_bytes for kernel in products] == [32 + 32, 16 + 32]
    assert sum(kernel.macs for kernel in kernels) == 4 * 8 * 24 + 2 * 128


@pytest.mark.parametrize(
    "name", ["mobilenetv2_035", "shufflenetv2_050", "ghostnet_050", "osnet_x0_25", "simplenet_cifar_310k"]
)
def test_no_mac_is_lost(name):
    with torch.device("meta"):
        model = create_model(name)
    kernels = list_kernels(model, (3, 64, 64))
    assert sum(k.macs for k in kernels) == count(model, (3, 64, 64)).macs
    assert all(k.read_bytes and k.written_bytes for k in kernels)


def test_weights_are_those_of_a_folded_network():
    model = create_model("mobilenetv2_035")
    held = sum(p.numel() for key, p in model.named_parameters() if "norm" not in key)
    kernels = list_kernels(model, (3, 64, 64), value_bytes=1)
    assert sum(k.weight_bytes for k in kernels) == held
    # 52 convolutions and one linear layer; the pooling stands alone.
    assert [bool(k.macs) for k in kernels] == [True] * 52 + [False, True]
