"""FlashFFTConv: parity with torch's own convolutions, partial and frequency-sparse kernels, the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.flashfftconv import FlashFFTConv1d, fft_conv


def rows(length=200, channels=3, taps=None):
    generator = torch.Generator().manual_seed(length)
    u = torch.randn(2, channels, length, generator=generator)
    return u, torch.randn(channels, taps or length, generator=generator)


def causal_by_torch(u, taps):
    return F.conv1d(F.pad(u, (taps.shape[1] - 1, 0)), taps.flip(-1)[:, None], groups=len(taps))


@pytest.mark.parametrize("taps", [1, 7, 200, 350])
def test_parity_with_a_causal_depthwise_convolution(taps):
    u, kernel = rows(taps=taps)
    expected = causal_by_torch(u.double(), kernel.double())
    for method in ("auto", "library"):
        assert (fft_conv(u, kernel, method=method) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_parity_with_a_circular_transform_where_it_is_not_causal():
    u, kernel = rows(taps=400)
    spectrum = torch.fft.rfft(u.double(), n=400) * torch.fft.rfft(kernel.double())
    expected = torch.fft.irfft(spectrum, n=400)[..., :200]
    assert (fft_conv(u, kernel, causal=False) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gates_multiply_input_and_output():
    u, kernel = rows()
    pre, post = torch.randn_like(u), torch.randn_like(u)
    expected = post * causal_by_torch(u * pre, kernel)
    found = fft_conv(u, kernel, pre_gate=pre, post_gate=post)
    assert (found - expected).abs().max() < 1e-4


def test_partial_kernels_use_the_first_taps_and_run_over_longer_rows():
    u, kernel = rows()
    assert torch.equal(fft_conv(u, kernel, partial=200), fft_conv(u, kernel))
    expected = causal_by_torch(u, kernel[:, :25])
    assert (fft_conv(u, kernel, partial=25) - expected).abs().max() < 1e-4
    longer = torch.cat([u, u, u], -1)
    assert (fft_conv(longer, kernel, partial=25)[..., :200] - expected).abs().max() < 1e-4
    with pytest.raises(UsageError, match="partial=0"):
        fft_conv(u, kernel, partial=0)


def test_sparse_kernels_keep_low_frequencies_alone():
    u, kernel = (t.double() for t in rows(length=256))
    assert (fft_conv(u, kernel, keep_bins=257) - fft_conv(u, kernel)).abs().max() < 1e-10
    for keep in (1, 40, 200):
        spectrum = torch.fft.rfft(kernel, n=512)
        spectrum[:, keep:] = 0
        expected = torch.fft.irfft(torch.fft.rfft(u, n=512) * spectrum, n=512)[..., :256]
        assert (fft_conv(u, kernel, keep_bins=keep) - expected).abs().max() < 1e-10
    for keep in (0, 258):
        with pytest.raises(UsageError, match="keep_bins"):
            fft_conv(u, kernel, keep_bins=keep)
    with pytest.raises(UsageError, match="at most as many taps"):
        fft_conv(u, F.pad(kernel, (0, 1)), keep_bins=5)


def test_a_kernel_with_negative_lags_has_twice_the_length_of_the_row():
    u, kernel = rows()
    with pytest.raises(UsageError, match="400 places"):
        fft_conv(u, kernel, causal=False)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("more", [{}, {"stride": 3}, {"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_layer_parity_with_a_pretrained_convolution(groups, more):
    conv = nn.Conv1d(8, 16, 33, padding=10, groups=groups, **more)
    layer = FlashFFTConv1d.from_conv(conv)
    x = torch.randn(2, 8, 90)
    pairs = []
    for module in (conv, layer):
        given = x.clone().requires_grad_()
        y = module(given)
        y.square().sum().backward()
        pairs.append([y, given.grad, module.weight.grad, module.bias.grad])
    for a, b in zip(*pairs, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_causal_layer_pads_on_the_left_alone_and_may_use_few_taps():
    layer = FlashFFTConv1d(4, 4, 50, groups=4, causal=True, partial=8)
    x = torch.randn(1, 4, 50, requires_grad=True)
    y = layer(x)
    expected = causal_by_torch(x, layer.weight[:, 0].flip(-1)[:, :8]) + layer.bias[:, None]
    assert y.shape == x.shape and (y - expected).abs().max() < 1e-5
    for bad in ({"causal": True, "padding": 3}, {"partial": 3}, {"causal": True, "partial": 51}):
        with pytest.raises(UsageError, match="causal"):
            FlashFFTConv1d(4, 4, 50, groups=4, **bad)
