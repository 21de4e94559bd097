"""The selective scan: chunked and kernel against the loop, gradients, extremes, closed forms, export."""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featherweight.blocks import selective_scan as module
from featherweight.blocks import selective_scan_segments
from featherweight.blocks.selective_scan import linear_scan, selective_scan
from featherweight.errors import MissingExtraError, UsageError
from featherweight.export.onnx import export_onnx, run_onnx

LENGTHS = (1, 2, 9, 36, 144, 1000)
NAMES = ("u", "delta", "a", "b", "c", "skip")


def inputs(length: int, batch: int = 2, channels: int = 5, state: int = 1, dtype=torch.float64) -> list:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    u, delta = normal(batch, length, channels), F.softplus(normal(batch, length, channels))
    a, skip = -normal(channels, state).exp(), normal(channels)
    return [u, delta, a, normal(batch, length, state), normal(batch, length, state), skip]


def naive(u, delta, a, b, c, skip):
    y = torch.zeros_like(u)
    h = torch.zeros(u.shape[0], *a.shape, dtype=u.dtype)
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * a) * h + (delta * u)[:, t, :, None] * b[:, t, None]
        y[:, t] = (h * c[:, t, None]).sum(-1) + skip * u[:, t]
    return y


@pytest.mark.parametrize("state", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_equals_the_naive_loop(length, state):
    tensors = inputs(length, state=state)
    expected = naive(*tensors)
    flipped = [x.flip(1) if x.ndim == 3 else x for x in tensors]
    for method in ("sequential", "chunked"):
        assert (selective_scan(*tensors, method=method) - expected).abs().max() < 1e-10
        back = selective_scan(*flipped, reverse=True, method=method).flip(1)
        assert (back - expected).abs().max() < 1e-10
        single = selective_scan(*(x.float() for x in tensors), method=method)
        assert (single - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [2, 9, 37])
def test_gradients_equal_those_of_the_loop(length, reverse):
    tensors = inputs(length, state=2)
    for x in tensors:
        x.requires_grad_()
    found, expected = (
        torch.autograd.grad(selective_scan(*tensors, reverse=reverse, method=m).square().sum(), tensors)
        for m in ("chunked", "sequential")
    )
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "state"), [(37, 1), (100, 3), (96, 2)])
def test_segments_hand_states_and_gradients_on(length, state, reverse, monkeypatch):
    monkeypatch.setattr(selective_scan_segments, "NUMBERS", 20 * 2 * 5 * state)  # about 20 tokens
    tensors = [x.requires_grad_() for x in inputs(length, state=state)]
    parts = selective_scan_segments._segments(tensors[0], tensors[2], reverse)
    assert len(parts) >= 2 and sorted(t for part in parts for t in range(length)[part]) == [*range(length)]
    outputs = [selective_scan(*tensors, reverse=reverse, method=m) for m in ("chunked", "sequential")]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-10
    found, expected = (torch.autograd.grad(output.square().sum(), tensors) for output in outputs)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [1, 3])
def test_the_form_of_captured_graphs_equals_the_loop(state, reverse, monkeypatch):
    tensors = [x.requires_grad_() for x in inputs(37, state=state)]
    outputs = [selective_scan(*tensors, reverse=reverse, method="sequential")]
    monkeypatch.setattr(module, "_capturing", lambda: True)
    outputs.append(selective_scan(*tensors, reverse=reverse, method="chunked"))
    assert (outputs[1] - outputs[0]).abs().max() < 1e-10
    expected, found = (torch.autograd.grad(output.square().sum(), tensors) for output in outputs)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp(min=1), name


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    tensors = [x.requires_grad_() for x in inputs(7, 1, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, reverse=reverse), tensors)
    pair = [torch.rand(1, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda *x: linear_scan(*x, reverse), pair)


def test_extreme_steps_neither_overflow_nor_lose_the_present():
    u, delta, a, b, c, skip = inputs(400, dtype=torch.float32)
    for scale in (1e-6, 50.0, 1e4):
        tensors = [u, delta * scale, a, b, c, skip]
        for x in tensors:
            x.grad = None
            x.detach_().requires_grad_()
        y = selective_scan(*tensors)
        y.square().mean().backward()
        assert y.isfinite().all() and all(x.grad.isfinite().all() for x in tensors)
        expected = naive(*(x.detach().double() for x in tensors))
        assert (y.detach() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_constant_rates_give_an_exponential_sum():
    one = torch.ones(1, 50, 1, dtype=torch.float64)
    delta, rate = 0.3, 0.7
    found = selective_scan(one, one * delta, -one[0, :1] * rate, one, one).flatten()
    q = math.exp(-delta * rate)
    assert torch.allclose(found, delta * (1 - q ** torch.arange(1, 51, dtype=torch.float64)) / (1 - q))


def test_outputs_do_not_see_the_future_nor_other_samples():
    tensors = inputs(36, batch=3)
    whole = selective_scan(*tensors)
    changed = [x.clone() for x in tensors]
    changed[0][:, 20:] += 1
    assert torch.equal(selective_scan(*changed)[:, :20], whole[:, :20])
    assert not torch.equal(selective_scan(*changed, reverse=True)[:, :20], whole[:, :20])
    alone = [x[1:2] if x.ndim == 3 else x for x in tensors]
    assert torch.allclose(selective_scan(*alone), whole[1:2], atol=1e-12)


def test_low_precision_keeps_its_type():
    tensors = inputs(36, dtype=torch.bfloat16)
    found = selective_scan(*tensors)
    assert found.dtype == torch.bfloat16
    expected = naive(*(x.double() for x in tensors))
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_errors_say_what_is_wrong(monkeypatch):
    tensors = inputs(4)
    with pytest.raises(UsageError, match="No scan method 'fast'"):
        selective_scan(*tensors, method="fast")
    with pytest.raises(UsageError, match="b is "):
        selective_scan(*tensors[:3], tensors[3][:, :2], *tensors[4:])
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    with pytest.raises(MissingExtraError, match="triton"):
        selective_scan(*tensors, method="triton")


class Scanner(nn.Module):
    """An image's rows as tokens, scanned both ways: `(N, 6, 5, 7)` to `(N, 6)`."""

    def forward(self, x):
        u = x.flatten(2).transpose(1, 2)
        delta, b = F.softplus(u), u[..., :2]
        a = -torch.ones(6, 2)
        return (selective_scan(u, delta, a, b, b) + selective_scan(u, delta, a, b, b, reverse=True)).mean(1)


@pytest.mark.parametrize("exporter", ["traced", pytest.param("graph", marks=pytest.mark.slow)])
def test_onnx_export_has_a_dynamic_batch(tmp_path, exporter):
    path = tmp_path / "scan.onnx"
    export_onnx(Scanner(), path, (6, 5, 7), exporter=exporter)
    for batch in (1, 4):
        x = torch.randn(batch, 6, 5, 7, generator=torch.Generator().manual_seed(batch))
        assert torch.allclose(torch.from_numpy(run_onnx(path, x.numpy())), Scanner()(x), atol=1e-5)


KERNEL_CHECK = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_selective_scan import inputs, selective_scan
CASES = (1, 3, 1, False), (9, 70, 1, True), (12, 5, 3, False), (7, 4, 2, True)
for length, channels, state, reverse in CASES:
    tensors = [x.requires_grad_() for x in inputs(length, 2, channels, state, torch.float32)]
    outs = [selective_scan(*tensors, reverse=reverse, method=m) for m in ("triton", "sequential")]
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in outs]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1])):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1), (length, channels, state, reverse)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter():
    """In a process of its own: triton decides on import whether it interprets."""
    folder = __file__.rpartition("/")[0]
    run = subprocess.run(
        [sys.executable, "-c", KERNEL_CHECK.format(folder=folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="there is no GPU with triton",
)
def test_triton_kernels_on_the_gpu():
    tensors = [x.cuda().requires_grad_() for x in inputs(1000, 2, 300, 1, torch.float32)]
    outs = [selective_scan(*tensors, reverse=True, method=m) for m in ("triton", "chunked")]
    grads = [torch.autograd.grad(y.square().sum(), tensors) for y in outs]
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.slow
def test_chunked_is_ten_times_faster_than_the_loop():
    from time import perf_counter

    tensors = inputs(3136, 1, 96, 1, torch.float32)
    times = {"chunked": [], "sequential": []}
    with torch.no_grad():
        for _ in range(5):
            for method, record in times.items():
                began = perf_counter()
                selective_scan(*tensors, method=method)
                record.append(perf_counter() - began)
    assert min(times["sequential"]) > 10 * min(times["chunked"])
