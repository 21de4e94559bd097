"""Long convolutions: parity with the official model, squash, smooth, causality, learnt transforms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.errors import UsageError
from featherweight.ops.flashbutterfly import (
    ButterflyFFT,
    LongConv1d,
    LongConvMixer,
    LongConvNet,
    smooth,
    squash,
)
from featherweight.ops.flashbutterfly.kernel import initial_kernel

FIXTURE = Path(__file__).parents[1] / "fixtures" / "flashbutterfly.npz"


def ruled(layout: list[str]) -> dict[str, torch.Tensor]:
    """Fill `name:shape` entries with noise seeded by their position; kernels small, the rest by fan-in."""
    state = {}
    for number, entry in enumerate(layout):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x"))
        noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
        if key.endswith("kernel"):
            noise = 0.02 * noise
        elif key.startswith("norms") and key.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif len(shape) > 1 and not key.endswith("D"):
            noise = noise * (6 / shape[1]) ** 0.5
        state[key] = noise
    return state


@pytest.mark.parametrize("method", ["library", "auto"])
@pytest.mark.parametrize("form", ["post", "pre"])
@torch.no_grad()
def test_parity_with_the_official_model(form, method):
    fixture = np.load(FIXTURE)
    layout = bytes(fixture[f"{form}.layout"]).decode().split("\n")
    net = LongConvNet(3, channels=12, layers=3, prenorm=form == "pre", method=method).eval()
    net.load_official(ruled(layout))
    x = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (3, 1024, 3))).float()
    expected = torch.from_numpy(fixture[f"{form}.output"])
    assert expected.std() > 0.1
    assert (net(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("channels", "params"), [(256, 7_877_130), (512, 18_899_978)])
def test_size_of_the_published_models(channels, params):
    with torch.device("meta"):
        net = LongConvNet(3, channels=channels)
    assert sum(p.numel() for p in net.parameters()) == params


def test_kernels_learn_at_their_own_rate_and_never_decay():
    net = LongConvNet(3, length=8, channels=4, layers=2)
    kernels, others = net.parameter_groups(0.01, 0.05, 0.001)
    assert kernels["weight_decay"] == 0 and kernels["lr"] == 0.001 and len(kernels["params"]) == 2
    assert others["weight_decay"] == 0.05 and others["lr"] == 0.01
    count = len(kernels["params"]) + len(others["params"])
    assert count == len(list(net.parameters()))


def test_squash_is_the_proximal_step_of_the_l1_penalty():
    kernel = torch.tensor([-0.5, -0.1, 0.0, 0.2, 0.7], dtype=torch.double)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.double)
    for value, found in zip(kernel, squash(kernel, 0.15), strict=True):
        best = grid[(0.5 * (grid - value) ** 2 + 0.15 * grid.abs()).argmin()]
        assert abs(best - found) < 2e-5
    assert torch.equal(squash(kernel, 0.0), kernel)


def test_smooth_keeps_a_constant_and_cuts_high_frequencies():
    assert torch.allclose(smooth(torch.ones(2, 20), 3)[:, 3:-3], torch.ones(2, 14))
    rough = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    before, after = (torch.fft.rfft(k).abs()[:, 64:].mean() for k in (rough, smooth(rough, 3)))
    assert after < 0.3 * before


def test_too_much_squashing_is_refused_as_no_tap_would_ever_learn():
    for build in (
        lambda amount: LongConv1d(4, 4, 64, groups=4, squash=amount),
        lambda amount: LongConvMixer(4, 64, squash=amount),
    ):
        with pytest.raises(UsageError, match="squash"):
            build(0.1)
        layer = build(0.001)
        kernel = layer.weight if isinstance(layer, LongConv1d) else layer.kernel
        layer(torch.randn(2, 4, 64)).sum().backward()
        assert 0.4 < (kernel.grad != 0).float().mean() < 0.9


def test_init_decays_over_the_lags_faster_in_later_channels():
    kernel = initial_kernel((400, 8, 128), "decay")
    spread = kernel.std(0)
    assert abs(spread[0, 0] - 0.02) < 0.004
    assert spread[0, 64:].mean() < spread[0, :64].mean()
    assert spread[7, 64:].mean() / spread[7, :64].mean() < spread[0, 64:].mean() / spread[0, :64].mean()
    layer = LongConv1d(8, 8, 128, groups=8, init="decay")
    assert layer.weight[:, 0, -16:].std() > layer.weight[:, 0, :16].std(), "lag 0 is the last tap"
    with pytest.raises(UsageError, match="init"):
        initial_kernel((1, 1, 1), "zeros")


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_mixer_never_sees_the_future(causal):
    mixer = LongConvMixer(3, 32, causal=causal, squash=0.0, dropout=0.0)
    nn.init.normal_(mixer.kernel)
    u = torch.randn(1, 3, 32, requires_grad=True)
    mixer(u)[..., 10].sum().backward()
    past, future = u.grad[..., :11].abs().max(), u.grad[..., 11:].abs().max()
    assert past > 0.01 and (future < 1e-6 if causal else future > 0.01)


@torch.no_grad()
def test_shorter_rows_use_the_nearer_lags():
    mixer = LongConvMixer(2, 64, squash=0.0).eval()
    u = torch.randn(2, 2, 40)
    padded = mixer(torch.nn.functional.pad(u, (0, 24)))[..., :40]
    assert (mixer(u) - padded).abs().max() < 1e-5
    with pytest.raises(UsageError, match="at most 64"):
        mixer(torch.randn(1, 2, 65))


@pytest.mark.parametrize("size", [2, 8, 16, 32, 64, 256, 512, 4096])
@pytest.mark.parametrize("mode", ["replace", "additive"])
@torch.no_grad()
def test_butterfly_starts_as_the_fourier_transform(size, mode):
    transform = ButterflyFFT(mode)
    if mode == "additive":
        for matrix in transform.parameters():
            matrix.zero_()
    x = torch.randn(2, 3, size, dtype=torch.complex64)
    expected = torch.fft.fft(x)
    assert (transform(x, size) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_butterfly_has_its_own_matrices_for_each_channel():
    assert sum(p.numel() for p in ButterflyFFT().parameters()) == 680
    transform = ButterflyFFT(channels=3)
    transform.mat_16[1].mul_(2.0)
    x = torch.randn(2, 3, 16)
    expected = torch.fft.fft(x) * torch.tensor([1, 2, 1])[:, None]
    assert torch.allclose(transform(x, 16), expected, atol=1e-4)


def test_learnt_transforms_get_gradients_and_agree_at_the_start():
    torch.manual_seed(0)
    exact = LongConvMixer(4, 32, squash=0.0, dropout=0.0)
    learnt = LongConvMixer(4, 32, squash=0.0, dropout=0.0, butterfly="replace")
    learnt.load_state_dict(exact.state_dict(), strict=False)
    u = torch.randn(2, 4, 32)
    assert (exact(u) - learnt(u)).abs().max() < 1e-5
    learnt(u).square().sum().backward()
    for name in ("mat_4", "mat_16"):  # 64 = 16 x 4
        assert getattr(learnt.transform_input, name).grad.abs().max() > 0
        assert getattr(learnt.transform_kernel, name).grad.abs().max() > 0


def test_layer_equals_the_convolution_it_stands_in_for():
    conv = nn.Conv1d(6, 6, 31, padding=15, groups=6)
    layer = LongConv1d.from_conv(conv)
    x = torch.randn(2, 6, 50)
    assert layer.squash == 0 and (layer(x) - conv(x)).abs().max() < 1e-5
    assert 0.2 < LongConv1d(4, 4, 256, groups=4, squash=0.001).sparsity() < 0.6
