"""FlashFFTConv: a convolution as long as the sequence, by Fourier transforms that never leave the fast
memory.

The FFT of a library goes to memory between transform, product and inverse, and pads each row with zeros. Here
all of it happens on one row while it lies in cache (C kernels) or in registers (Triton kernels, where every
stage is a product of small matrices), gates included, and the backward pass transforms again in place of
storing spectra. Two shortenings of the paper come along: *partial* convolutions keep the first taps alone, so
a short kernel runs over any length, and *frequency-sparse* ones drop high frequencies of the kernel, whose
blocks of the transform then need not be computed.

    u ──× pre──► transform ──×──► inverse ──× post──► y
                             │
         taps ─► transform ──┘   (once for each update of the weights)

Reference: Fu, Kumbong, Nguyen, Re, "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor
Cores", arXiv 2311.05908.

Shapes:
    u (B, H, L), taps (H, K) -> y (B, H, L); as a layer (N, C_in, L) -> (N, C_out, L').

Differs:
    Any L, K and H (officially powers of two, and multiples of 16). Real rows are not packed as even and odd
    samples: real rows and taps modulo `X^M = i` give the linear convolution as a real part, with no zeros
    stored. Triton kernels stop at order 2 (4,096 numbers a row), longer rows take the library. A kernel
    longer than the row is a longer causal kernel, not negative lags: those are given as `before`, or by
    `split_circular`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.blocks.fft_conv1d import FFTConv1d
from featherweight.blocks.long_conv import join_circular, long_conv, split_circular
from featherweight.errors import UsageError


def fft_conv(
    u: Tensor,
    taps: Tensor,
    *,
    causal: bool = True,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    partial: int | None = None,
    keep_bins: int | None = None,
    method: str = "auto",
) -> Tensor:
    """Convolve each channel with its own long kernel: `post_gate * (taps * (pre_gate * u))`.

    Args:
        u: rows, (B, H, L).
        taps: (H, K). Causal: lags 0 .. K-1. Else a circular kernel with K = 2 L: place `2 L - d` is lag -d.
        causal: whether a result sees only earlier inputs and its own.
        pre_gate: factor of the input, (B, H, L).
        post_gate: factor of the output, (B, H, L).
        partial: use the first `partial` taps alone (causal only); None uses all.
        keep_bins: keep this many of the L + 1 frequencies of the kernel's real transform of size 2 L, the
            lowest ones; a kernel cut so has negative lags too. None keeps all.
        method: see `featherweight.blocks.long_conv.long_conv`.

    Returns:
        (B, H, L).

    Raises:
        UsageError: shapes disagree, or an option is out of range.

    >>> u, taps = torch.ones(1, 1, 4), torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    >>> fft_conv(u, taps, partial=2, method="library").round(decimals=4).tolist()
    [[[1.0, 2.0, 2.0, 2.0]]]
    """
    length = u.shape[-1]
    if partial is not None:
        if not causal or partial < 1:
            raise UsageError(
                f"Got partial={partial}, causal={causal}; expected a causal kernel and at least 1."
            )
        taps = taps[:, :partial]
    before = None
    if not causal:
        if taps.shape[-1] != 2 * length:
            raise UsageError(
                f"A kernel with negative lags has 2 L = {2 * length} places; got {taps.shape[-1]}."
            )
        taps, before = split_circular(taps)
    if keep_bins is not None:
        taps, before = split_circular(_low_pass(taps, before, length, keep_bins))
    return long_conv(u, taps, before, pre_gate=pre_gate, post_gate=post_gate, method=method)


def _low_pass(taps: Tensor, before: Tensor | None, length: int, keep: int) -> Tensor:
    """Return the circular kernel (H, 2 L) whose real transform keeps its `keep` lowest frequencies."""
    if not 1 <= keep <= length + 1:
        raise UsageError(f"Got keep_bins={keep}; expected 1 to {length + 1} for rows of {length} numbers.")
    if taps.shape[-1] > length:
        raise UsageError(
            f"Got keep_bins with {taps.shape[-1]} taps for rows of {length}; expected at most as many taps."
        )
    exact = taps.to(torch.promote_types(taps.dtype, torch.float32))
    before = exact[:, :0] if before is None else before.to(exact.dtype)
    spectrum = torch.fft.rfft(join_circular(exact, before, 2 * length))
    kept = torch.arange(length + 1, device=taps.device) < keep
    return torch.fft.irfft(spectrum * kept, n=2 * length).to(taps.dtype)


class FlashFFTConv1d(FFTConv1d):
    """A `torch.nn.Conv1d` by Fourier transforms in fast memory; arguments as of `FFTConv1d`.

    `(N, in_channels, L)` to `(N, out_channels, L')`.

    >>> layer = FlashFFTConv1d(8, 8, 64, groups=8, causal=True, partial=16)
    >>> layer(torch.zeros(2, 8, 64)).shape
    torch.Size([2, 8, 64])
    """


OPERATORS = {nn.Conv1d: FlashFFTConv1d}
