"""Long convolutions as Triton kernels: a row per step, every stage a product of small matrices, nothing in
between stored.

A row of L numbers is twisted by exp(i pi n / 2M) and lies in registers as a complex N1 x N2 tile, M = N1 N2
(real rows and taps live modulo `X^M = i`, see `native.py`). Forward: product with the N1-point matrix,
twiddles, product with the N2-point matrix; then the spectrum of the taps, in the order of the transform; then
the same backwards, untwist, gate, store. The backward pass transforms the input again in place of keeping its
spectrum, and adds up the spectrum of the taps' gradient over the batch. One program holds a channel and walks
over its samples.

Reference: Fu et al., "FlashFFTConv", arXiv 2311.05908, sections 3.1 and 3.2, algorithm 1; order 2 only, so a
row has at most 4,096 numbers.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from featherweight.blocks.long_conv.library import join_circular, span
from featherweight.errors import UsageError

SIDES = {256: (16, 16), 512: (16, 32), 1024: (32, 32), 2048: (32, 64), 4096: (64, 64)}
"""Size of a transform -> its two factors; a side of a product has at least 16 numbers."""


@triton.jit
def _multiply(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _product(ar, ai, br, bi, precision: tl.constexpr):
    r = tl.dot(ar, br, input_precision=precision) - tl.dot(ai, bi, input_precision=precision)
    i = tl.dot(ar, bi, input_precision=precision) + tl.dot(ai, br, input_precision=precision)
    return r, i


@triton.jit
def _transform(r, i, f1r, f1i, f2r, f2i, tr, ti, precision: tl.constexpr):
    r, i = _product(f1r, f1i, r, i, precision)
    r, i = _multiply(r, i, tr, ti)
    return _product(r, i, f2r, f2i, precision)


@triton.jit
def _inverse(r, i, f1r, f1i, f2r, f2i, tr, ti, precision: tl.constexpr):
    r, i = _product(r, i, f2r, -f2i, precision)
    r, i = _multiply(r, i, tr, -ti)
    return _product(f1r, -f1i, r, i, precision)


@triton.jit
def _tables(tables, n1: tl.constexpr, n2: tl.constexpr):
    """The two matrices, the twiddles and the twist, as they lie one after the other."""
    a, b = tl.arange(0, n1), tl.arange(0, n2)
    s1, s2, t = a[:, None] * n1 + a[None, :], b[:, None] * n2 + b[None, :], a[:, None] * n2 + b[None, :]
    f1r, f1i = tl.load(tables + s1), tl.load(tables + n1 * n1 + s1)
    tables += 2 * n1 * n1
    f2r, f2i = tl.load(tables + s2), tl.load(tables + n2 * n2 + s2)
    tables += 2 * n2 * n2
    tr, ti = tl.load(tables + t), tl.load(tables + n1 * n2 + t)
    tables += 2 * n1 * n2
    return f1r, f1i, f2r, f2i, tr, ti, tl.load(tables + t), tl.load(tables + n1 * n2 + t), t


@triton.jit
def _forward(
    u, pre, post, taps, y, tables, batch, channels, length,
    has_pre: tl.constexpr, has_post: tl.constexpr,
    n1: tl.constexpr, n2: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    f1r, f1i, f2r, f2i, tr, ti, c, s, at = _tables(tables, n1, n2)
    kr = tl.load(taps + channel * 2 * n1 * n2 + at)
    ki = tl.load(taps + (channel * 2 + 1) * n1 * n2 + at)
    for sample in range(tl.program_id(1), batch, tl.num_programs(1)):
        row = (sample * channels + channel) * length + at
        x = tl.load(u + row, at < length, 0.0).to(tl.float32)
        if has_pre:
            x *= tl.load(pre + row, at < length, 0.0).to(tl.float32)
        r, i = _transform(x * c, x * s, f1r, f1i, f2r, f2i, tr, ti, precision)
        r, i = _multiply(r, i, kr, ki)
        r, i = _inverse(r, i, f1r, f1i, f2r, f2i, tr, ti, precision)
        out = (r * c + i * s) / (n1 * n2)
        if has_post:
            out *= tl.load(post + row, at < length, 0.0).to(tl.float32)
        tl.store(y + row, out, at < length)


@triton.jit
def _backward(
    grad, u, pre, post, taps, grad_u, grad_pre, grad_post, grad_taps, tables, batch, channels, length,
    has_pre: tl.constexpr, has_post: tl.constexpr,
    n1: tl.constexpr, n2: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    f1r, f1i, f2r, f2i, tr, ti, c, s, at = _tables(tables, n1, n2)
    kr = tl.load(taps + channel * 2 * n1 * n2 + at)
    ki = tl.load(taps + (channel * 2 + 1) * n1 * n2 + at)
    sum_r, sum_i = tl.zeros((n1, n2), tl.float32), tl.zeros((n1, n2), tl.float32)
    for sample in range(tl.program_id(1), batch, tl.num_programs(1)):
        row = (sample * channels + channel) * length + at
        known = at < length
        x = tl.load(u + row, known, 0.0).to(tl.float32)
        v = x
        if has_pre:
            v *= tl.load(pre + row, known, 0.0).to(tl.float32)
        d = tl.load(grad + row, known, 0.0).to(tl.float32)
        g = d
        if has_post:
            g *= tl.load(post + row, known, 0.0).to(tl.float32)
        vr, vi = _transform(v * c, v * s, f1r, f1i, f2r, f2i, tr, ti, precision)
        gr, gi = _transform(g * c, g * s, f1r, f1i, f2r, f2i, tr, ti, precision)
        sum_r += gr * vr + gi * vi
        sum_i += gi * vr - gr * vi
        if has_post:
            vr, vi = _multiply(vr, vi, kr, ki)
            vr, vi = _inverse(vr, vi, f1r, f1i, f2r, f2i, tr, ti, precision)
            tl.store(grad_post + row, d * (vr * c + vi * s) / (n1 * n2), known)
        gr, gi = _multiply(gr, gi, kr, -ki)
        gr, gi = _inverse(gr, gi, f1r, f1i, f2r, f2i, tr, ti, precision)
        out = (gr * c + gi * s) / (n1 * n2)
        if has_pre:
            tl.store(grad_pre + row, x * out, known)
            out *= tl.load(pre + row, known, 0.0).to(tl.float32)
        tl.store(grad_u + row, out, known)
    share = (tl.program_id(1) * channels + channel) * 2 * n1 * n2 + at
    tl.store(grad_taps + share, sum_r / (n1 * n2), True)
    tl.store(grad_taps + share + n1 * n2, sum_i / (n1 * n2), True)


def convolve(
    u: Tensor, taps: Tensor, before: Tensor, pre: Tensor | None = None, post: Tensor | None = None
) -> Tensor:
    """Convolve rows (B, H, L); arguments as in `featherweight.blocks.long_conv.native.convolve`.

    Raises:
        UsageError: the rows and taps need a transform of more than 4,096 complex numbers.
    """
    length = u.shape[-1]
    reach = span(length, taps.shape[1], before.shape[1])
    size = next((size for size in SIDES if 2 * size >= reach and size >= length), None)
    if size is None:
        raise UsageError(
            f"The Triton kernels hold rows of up to 4,096 numbers; {length} numbers and {taps.shape[1]} taps "
            'need more. Use method="library".'
        )
    return _Convolve.apply(u, _spectrum(taps, before, size), pre, post)


def fits(length: int, reach: int) -> bool:
    """Say whether rows of this length, whose results reach over `reach` places, fit into one program."""
    return length <= max(SIDES) and reach <= 2 * max(SIDES)


def _spectrum(taps: Tensor, before: Tensor, size: int) -> Tensor:
    """Return the spectra (H, 2, M) of the taps modulo `X^M = i`, in the order of the kernels;
    differentiable."""
    line = join_circular(taps.float(), -before.float(), 2 * size)  # X^2M = -1
    turn = torch.polar(
        torch.ones(size, device=taps.device),
        torch.arange(size, device=taps.device, dtype=torch.float64).mul(math.pi / 2 / size).float(),
    )
    n1, n2 = SIDES[size]
    spectrum = torch.fft.fft(torch.complex(line[:, :size], line[:, size:]) * turn)
    # Frequency a + n1 b of the transform lies at (a, b).
    ordered = spectrum.unflatten(-1, (n2, n1)).transpose(1, 2).flatten(1)
    return torch.stack([ordered.real, ordered.imag], 1).contiguous()


@functools.lru_cache(maxsize=16)
def _constants(size: int, device: torch.device) -> Tensor:
    n1, n2 = SIDES[size]
    angles = [-2 * np.pi / n * np.outer(np.arange(n), np.arange(n)) for n in (n1, n2)]
    angles.append(-2 * np.pi / size * np.outer(np.arange(n1), np.arange(n2)))
    angles.append(np.pi / 2 / size * np.arange(size))
    parts = [part(angle).ravel() for angle in angles for part in (np.cos, np.sin)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(device)


class _Convolve(torch.autograd.Function):
    """Both kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, u, spectrum, pre, post):  # type: ignore[no-untyped-def]
        u = u.contiguous()
        pre, post = (None if gate is None else gate.contiguous() for gate in (pre, post))
        ctx.save_for_backward(u, spectrum, pre, post)
        y = torch.empty_like(u)
        batch, channels, length = u.shape
        _forward[(channels, _splits(batch, channels))](
            u, pre, post, spectrum, y, _constants(spectrum.shape[-1], u.device), batch, channels, length,
            pre is not None, post is not None, **_shape(u, spectrum),
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        u, spectrum, pre, post = ctx.saved_tensors
        grad_u, grad_pre, grad_post = (None if t is None else torch.empty_like(t) for t in (u, pre, post))
        batch, channels, length = u.shape
        splits = _splits(batch, channels)
        shares = spectrum.new_empty(splits, *spectrum.shape)
        _backward[(channels, splits)](
            grad.contiguous(), u, pre, post, spectrum, grad_u, grad_pre, grad_post, shares,
            _constants(spectrum.shape[-1], u.device), batch, channels, length,
            pre is not None, post is not None, **_shape(u, spectrum),
        )  # fmt: skip
        return grad_u, shares.sum(0), grad_pre, grad_post


def _shape(u: Tensor, spectrum: Tensor) -> dict[str, int | str]:
    n1, n2 = SIDES[spectrum.shape[-1]]
    # Half-precision rows carry no more digits than one pass of the matrix unit keeps.
    return {"n1": n1, "n2": n2, "precision": "tf32" if u.dtype in (torch.half, torch.bfloat16) else "tf32x3"}


def _splits(batch: int, channels: int) -> int:
    """Programs for each channel, so that few channels still fill a GPU."""
    return max(1, min(batch, 512 // channels))
