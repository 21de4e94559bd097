"""Convolutions as long as the sequence itself: one function, several ways to compute it.

`y_t = sum_d k_d u_(t-d)` with a kernel per channel costs `O(L log L)` by Fourier transforms. The ways agree
to rounding: the library's transforms (`library.py`, the reference), the project's C kernels on a CPU
(`native.py`), Triton kernels on a GPU (`triton_kernels.py`), products with small matrices (`monarch.py`, for
checking), and a direct sum, which is what exporters get.

References: Fu et al., "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv 2302.06646;
Fu et al., "FlashFFTConv", arXiv 2311.05908.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.blocks.long_conv import library, native
from featherweight.blocks.long_conv.library import join_circular, span, split_circular
from featherweight.errors import MissingExtraError, UsageError

__all__ = ["METHODS", "join_circular", "long_conv", "split_circular"]

METHODS = ("auto", "library", "native", "triton", "direct")
_TRIALS = 3


def long_conv(
    u: Tensor,
    taps: Tensor,
    before: Tensor | None = None,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Convolve each channel with a long kernel: `post_gate * (taps * (pre_gate * u))`, linear, never
    circular.

    Gradients flow to every tensor. Half precision is computed in float32; the result has the type of `u`.

    Args:
        u: rows, (B, H, L).
        taps: the kernel at lags 0, 1, ..., (H, K): alone it makes the convolution causal. K may exceed L.
        before: the kernel at lags -1, -2, ..., (H, K').
        pre_gate: factor of the input, (B, H, L).
        post_gate: factor of the output, (B, H, L).
        method: one of `METHODS`. `"auto"` takes Triton on a GPU, the faster of library and C kernels on a CPU
            (timed once for each kind of call), and the direct sum while a graph is exported.

    Returns:
        (B, H, L).

    Raises:
        UsageError: shapes disagree, or the method is unknown or cannot take these tensors.
        MissingExtraError: `"native"` without a C compiler, `"triton"` without triton.

    >>> impulse = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    >>> long_conv(impulse, torch.tensor([[3.0, 1.0]]), method="library").round(decimals=4).tolist()
    [[[3.0, 1.0, 0.0, 6.0]]]
    """
    before = taps.new_empty(taps.shape[0], 0) if before is None else before
    _check(u, taps, before, pre_gate, post_gate)
    if method not in METHODS:
        raise UsageError(
            f"No method '{method}' for a long convolution. Expected one of {', '.join(METHODS)}."
        )
    if method == "auto":
        method = _choose(u, taps, before, pre_gate, post_gate)
    if method in ("native", "triton"):
        return _fused(method)(u, taps, before, pre_gate, post_gate)
    plain = library.convolve if method == "library" else library.convolve_directly
    y = plain(u if pre_gate is None else u * pre_gate, taps, before)
    return y if post_gate is None else y * post_gate


def _fused(method: str) -> Callable[..., Tensor]:
    if method == "native":
        native.load_library()
        return _in_float32(native.convolve)
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError("The Triton kernels need the package triton. Install it: pip install triton")
    from featherweight.blocks.long_conv import triton_kernels

    return triton_kernels.convolve


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(u: Tensor, *tensors: Tensor | None) -> Tensor:
        if u.device.type != "cpu" or u.dtype == torch.float64:
            raise UsageError(
                f"The C kernels take float32 or half precision on the CPU, not {u.dtype} on {u.device.type}. "
                'Use method="library".'
            )
        return function(u.float(), *(None if t is None else t.float() for t in tensors)).to(u.dtype)

    return run


def _choose(u: Tensor, taps: Tensor, before: Tensor, *gates: Tensor | None) -> str:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "direct"
    compiling = torch.compiler.is_compiling()
    reach = span(u.shape[2], taps.shape[1], before.shape[1])
    if u.is_cuda and not compiling and importlib.util.find_spec("triton"):
        from featherweight.blocks.long_conv import triton_kernels

        return "triton" if triton_kernels.fits(u.shape[2], reach) else "library"
    usable = u.device.type == "cpu" and u.dtype != torch.float64 and u.numel() > 0
    if compiling or not usable or not native.is_available():
        return "library"
    wants = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (u, taps, before, *gates)
    )
    rows = u.shape[0] * u.shape[1]
    gated = tuple(gate is not None for gate in gates)
    return _faster(
        native.size_for(reach),
        u.shape[2],
        u.shape[1],
        rows.bit_length(),
        gated,
        wants,
        torch.get_num_threads(),
    )


@functools.lru_cache(maxsize=256)
def _faster(
    size: int, length: int, channels: int, rows: int, gated: tuple[bool, bool], backward: bool, threads: int
) -> str:
    """Time library and C kernels in turns on one call of this kind; the key stands for all calls like it."""
    batch = max(1, 2 ** (rows - 1) // channels)
    reach = 2 * size - length
    with torch.enable_grad() if backward else torch.no_grad():
        u = torch.randn(batch, channels, length, requires_grad=backward)
        taps = torch.randn(channels, max(1, min(reach, length)), requires_grad=backward)
        gates = [torch.rand_like(u) if gate else None for gate in gated]
        seconds: dict[str, list[float]] = {"library": [], "native": []}
        for trial in range(_TRIALS + 1):
            for method, times in seconds.items():
                start = time.perf_counter()
                y = long_conv(u, taps, pre_gate=gates[0], post_gate=gates[1], method=method)
                if backward:
                    y.sum().backward()
                if trial:  # the first call builds tables
                    times.append(time.perf_counter() - start)
    return min(seconds, key=lambda method: min(seconds[method]))


def _check(u: Tensor, taps: Tensor, before: Tensor, *gates: Tensor | None) -> None:
    if u.dim() != 3 or taps.dim() != 2 or before.dim() != 2:
        raise UsageError(
            f"A long convolution takes rows (B, H, L) and taps (H, K); got {tuple(u.shape)}, "
            f"{tuple(taps.shape)} and {tuple(before.shape)}."
        )
    if not len(taps) == len(before) == u.shape[1] or taps.shape[1] == 0:
        raise UsageError(
            f"{u.shape[1]} channels need as many kernels of at least one tap; got taps {tuple(taps.shape)} "
            f"and {tuple(before.shape)}."
        )
    for gate in gates:
        if gate is not None and gate.shape != u.shape:
            raise UsageError(f"A gate has the shape of its rows, {tuple(u.shape)}; got {tuple(gate.shape)}.")
