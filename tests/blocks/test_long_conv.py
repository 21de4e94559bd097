"""Long convolutions: every way to compute them against a direct sum in double, with gates and gradients."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from featherweight.blocks import long_conv as package
from featherweight.blocks.long_conv import library, long_conv, monarch, native, split_circular
from featherweight.errors import UsageError

SIZES = [(2, 3, 64, 64, 0), (1, 2, 5, 3, 0), (2, 2, 300, 300, 299), (1, 1, 1, 1, 0), (2, 3, 700, 1500, 0)]
SIZES += [(1, 2, 33, 5, 40), (2, 3, 1000, 1000, 7), (1, 2, 1500, 40, 0), (1, 2, 1280, 1279, 1)]
"""Batch, channels, length, taps at lags from 0 and at negative lags: transforms of many factors, and of one
leaf."""

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="no C compiler is installed")


def inputs(batch, channels, length, after, before, gates=(True, True)):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, channels, length), (channels, after), (channels, before)]
    shapes += [(batch, channels, length) if gate else None for gate in gates]
    return [None if s is None else torch.randn(s, generator=generator, dtype=torch.double) for s in shapes]


def direct_sum(u, taps, before, pre=None, post=None):
    """The definition, by one matrix product a channel."""
    length = u.shape[-1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    matrix = u.new_zeros(u.shape[1], length, length)
    for values, index in ((taps, lag), (before, -lag - 1)):
        inside = (index >= 0) & (index < values.shape[1])
        matrix[:, inside] += values[:, index[inside]]
    y = torch.einsum("hts,bhs->bht", matrix, u if pre is None else u * pre)
    return y if post is None else y * post


def answers(function, tensors, grad, dtype=torch.double):
    """The result and the gradient of every tensor."""
    given = [None if t is None else t.to(dtype).detach().requires_grad_() for t in tensors]
    y = function(*given)
    y.backward(grad.to(dtype))
    found = [y, *(t.grad for t in given if t is not None and t.numel())]
    return [t.detach().double() for t in found]


def by(method):
    return lambda u, taps, before, pre, post: long_conv(
        u, taps, before, pre_gate=pre, post_gate=post, method=method
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("method", "dtype", "tolerance"),
    [
        ("library", torch.double, 1e-10),
        ("direct", torch.double, 1e-10),
        pytest.param("native", torch.float, 2e-6, marks=needs_compiler),
    ],
)
def test_every_way_equals_the_direct_sum(size, method, dtype, tolerance):
    for gates in itertools.product((False, True), repeat=2):
        tensors = inputs(*size, gates=gates)
        grad = torch.randn(tensors[0].shape, dtype=torch.double)
        expected = answers(direct_sum, tensors, grad)
        for a, b in zip(answers(by(method), tensors, grad, dtype), expected, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3), (size, gates)


@needs_compiler
@pytest.mark.parametrize("length", [5_000, 40_000, 262_144])
def test_native_kernels_stay_exact_on_long_rows(length):
    tensors = inputs(1, 1, length, length, 0, gates=(False, False))
    grad = torch.randn(tensors[0].shape, dtype=torch.double)
    expected = answers(by("library"), tensors, grad)
    for a, b in zip(answers(by("native"), tensors, grad, torch.float), expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@needs_compiler
def test_stored_spectra_and_several_threads_give_the_same():
    u, taps, before, *_ = (None if t is None else t.float() for t in inputs(3, 7, 8192, 100, 20))
    size = native.size_for(native.span(8192, 100, 20))
    known = native.spectra(size, taps, before)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.convolve(u, taps, before)
        torch.set_num_threads(3)
        assert torch.equal(native.convolve(u, taps, before), alone)
        assert torch.equal(native.convolve(u, taps, before, known=known), alone)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_native_transforms_waste_at_most_a_third():
    for needed in range(8 * native.load_library()[1] ** 2, 20_000, 37):
        size = native.size_for(needed)
        assert needed <= 2 * size < needed * 4 / 3 + 2


def test_gradients_are_exact_in_double():
    tensors = [t.requires_grad_() for t in inputs(1, 2, 32, 20, 5)]
    assert torch.autograd.gradcheck(by("library"), tensors)
    assert torch.autograd.gradgradcheck(by("library"), tensors, fast_mode=True)


def test_half_precision_is_computed_in_float():
    u, taps, *_ = (t.bfloat16() for t in inputs(2, 2, 200, 200, 0))
    expected = long_conv(u.double(), taps.double(), method="library")
    for method in ("library", "auto"):
        y = long_conv(u, taps, method=method)
        assert y.dtype == torch.bfloat16 and (y.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_a_circular_kernel_splits_into_lags_of_both_signs():
    u, kernel = torch.randn(2, 3, 40).double(), torch.randn(3, 80).double()
    circular = torch.fft.ifft(torch.fft.fft(u, n=80) * torch.fft.fft(kernel)).real[..., :40]
    assert torch.allclose(long_conv(u, *split_circular(kernel), method="library"), circular)


@needs_compiler
def test_auto_takes_the_faster_way_once_for_each_kind_of_call(monkeypatch):
    calls = []
    slow = {"native": 0.0, "library": 0.0}
    real = package.long_conv

    def watched(*args, method="auto", **kwargs):
        calls.append(method)
        clock[0] += slow[method]
        return real(*args, method=method, **kwargs)

    clock = [0.0]
    monkeypatch.setattr(package, "long_conv", watched)
    monkeypatch.setattr(package.time, "perf_counter", lambda: clock[0])
    u, taps = torch.randn(1, 2, 90), torch.randn(2, 90)
    for winner, loser in (("native", "library"), ("library", "native")):
        package._faster.cache_clear()
        slow[winner], slow[loser] = 1.0, 2.0
        assert package._choose(u, taps, taps[:, :0], None, None) == winner
        count = len(calls)
        assert package._choose(u, taps, taps[:, :0], None, None) == winner and len(calls) == count
    package._faster.cache_clear()


def test_graphs_hold_what_exporters_know():
    class Net(torch.nn.Module):
        def forward(self, u, taps):
            return long_conv(u, taps)

    u, taps = torch.randn(1, 2, 50), torch.randn(2, 50)
    program = torch.export.export(Net(), (u, taps))
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("conv1d" in target for target in targets) and not any("fft" in target for target in targets)
    assert torch.allclose(program.module()(u, taps), long_conv(u, taps), atol=1e-4)
    compiled = torch.compile(Net(), backend="eager", fullgraph=True)
    assert torch.allclose(compiled(u, taps), long_conv(u, taps), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "fast"}, "method"),
        ({"u": torch.zeros(2, 8)}, "rows"),
        ({"taps": torch.zeros(3, 8)}, "channels"),
        ({"taps": torch.zeros(2, 0)}, "at least one tap"),
        ({"pre_gate": torch.zeros(1, 2, 7)}, "gate"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"u": torch.zeros(1, 2, 8), "taps": torch.zeros(2, 8)}
    with pytest.raises(UsageError, match=message):
        long_conv(**{**good, **change})


@needs_compiler
def test_native_kernels_refuse_double():
    with pytest.raises(UsageError, match="float32"):
        long_conv(torch.zeros(1, 1, 4).double(), torch.zeros(1, 4).double(), method="native")


@pytest.mark.parametrize(
    "factors", [(16,), (16, 16), (32, 16), (16, 16, 16), (32, 16, 16), (8, 4, 2, 4)], ids=str
)
def test_monarch_form_is_the_fourier_transform_in_its_documented_order(factors):
    x = torch.randn(3, math.prod(factors), dtype=torch.complex128)
    found = monarch.transform(x, factors)
    expected = torch.fft.fft(x)[..., monarch.permutation(factors)]
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
    assert (monarch.inverse(found, factors) - x).abs().max() < 1e-12


@pytest.mark.parametrize("factors", [(16, 32), (8, 8, 8)], ids=str)
def test_monarch_convolution_equals_the_library(factors):
    u, taps = torch.randn(2, 3, 256).double(), torch.randn(3, 256).double()
    expected = long_conv(u, taps, method="library")
    assert (monarch.convolve(u, taps, factors) - expected).abs().max() < 1e-10


def test_sparse_monarch_convolution_skips_what_no_kept_frequency_needs():
    factors, kept = (32, 32), 256
    u, taps = torch.randn(2, 3, 1024).double(), torch.randn(3, 1024).double()
    y = monarch.convolve(u, taps, factors, kept)
    energy = torch.fft.rfft(y).abs()
    assert energy[..., kept:].max() < 1e-9 * energy.max() and energy[..., : kept - 1].min() > 0
    spectrum = torch.fft.rfft(u) * torch.fft.rfft(taps)
    spectrum[..., kept:] = 0
    assert (y - torch.fft.irfft(spectrum)).abs().max() < 1e-10
    blocks = monarch.blocks_below(kept, factors)
    assert len(blocks) == 16 and len(monarch.permutation(factors, blocks)) == 512
    stage = 4 * 1024 * 32
    assert monarch.count_macs(factors) - monarch.count_macs(factors, kept) == 2 * stage // 2 + 4 * 512
    assert torch.equal(monarch.convolve(u, taps, factors, 513), monarch.convolve(u, taps, factors))


def test_monarch_factors_must_multiply_to_the_length():
    with pytest.raises(UsageError, match="multiply to 128"):
        monarch.transform(torch.zeros(1, 64, dtype=torch.complex64), (8, 16))


def test_library_sizes_have_small_factors_and_suffice():
    for needed in range(1, 3000, 7):
        size = library.fast_size(needed)
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1 and size % 2 == 0 and needed <= size <= max(2, 1.25 * needed + 2)


TRITON_CHECK = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_long_conv import answers, by, direct_sum, inputs
for size in [(3, 2, 256, 256, 0), (2, 2, 100, 300, 0), (2, 2, 300, 300, 299), (1, 2, 1000, 1000, 7)]:
    for gates in ((False, False), (True, True)):
        tensors = inputs(*size, gates=gates)
        grad = torch.randn(tensors[0].shape, dtype=torch.double)
        pairs = zip(answers(by("triton"), tensors, grad, torch.float), answers(direct_sum, tensors, grad))
        for a, b in pairs:
            assert (a - b).abs().max() < 2e-6 * b.abs().max(), (size, gates)
"""


def run_interpreted(code):
    """In a process of its own: triton decides on import whether it interprets."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    run = run_interpreted(TRITON_CHECK.format(folder=__file__.rpartition("/")[0]))
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_triton_kernels_on_the_gpu():
    tensors = [t.cuda() for t in inputs(4, 8, 1000, 1000, 7)]
    grad = torch.randn_like(tensors[0])
    pairs = zip(
        answers(by("triton"), tensors, grad, torch.float), answers(by("library"), tensors, grad), strict=True
    )
    for a, b in pairs:
        assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_triton_kernels_say_where_they_end():
    pytest.importorskip("triton", reason="triton is not installed")
    u = torch.zeros(1, 1, 5000)
    with pytest.raises(UsageError, match="4,096"):
        long_conv(u, F.pad(u[0], (0, 1)), method="triton")
