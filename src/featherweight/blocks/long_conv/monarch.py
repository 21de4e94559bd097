"""The discrete Fourier transform as products with small matrices (Monarch decomposition), in plain torch.

A transform of length `N = N1 N2 ...` views the row as an `N1 x (N / N1)` array, multiplies its columns by the
`N1`-point matrix, multiplies by twiddles, and treats each row of length `N / N1` likewise. The spectrum comes
out permuted; the kernel's spectrum is permuted once instead, and the inverse undoes the order. This is the
form that matrix units run, and the reference of the Triton kernels: right, not fast, on a CPU.

Reference: Fu et al., "FlashFFTConv", arXiv 2311.05908, sections 3.1 (decomposition) and 3.3 (sparse
    convolutions).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.errors import UsageError


def dft_matrix(size: int, dtype: torch.dtype = torch.complex64) -> Tensor:
    """Return the matrix (size, size) of exp(-2 pi i a b / size), computed in double."""
    index = torch.arange(size, dtype=torch.float64)
    return _unit(torch.outer(index, index) / size).to(dtype)


def transform(x: Tensor, factors: Sequence[int], blocks: Tensor | None = None) -> Tensor:
    """Transform complex rows (..., N), `N` the product of the factors; the result is in Monarch order.

    Args:
        x: rows.
        factors: sizes of the matrices, outermost first.
        blocks: which rows of the last matrix to compute, each `N / N_last` frequencies; None computes all.

    Raises:
        UsageError: the factors do not multiply to the length.

    >>> x = torch.randn(2, 64, dtype=torch.complex128)
    >>> torch.allclose(transform(x, (4, 16)), torch.fft.fft(x)[..., permutation((4, 16))])
    True
    """
    _check(x.shape[-1], factors)
    first, *others = factors
    matrix = dft_matrix(first, x.dtype).to(x.device)
    if not others:
        return x @ (matrix if blocks is None else matrix[:, blocks])
    y = matrix @ x.unflatten(-1, (first, -1))
    return transform(y * _twiddles(y), others, blocks).flatten(-2)


def inverse(spectrum: Tensor, factors: Sequence[int], blocks: Tensor | None = None) -> Tensor:
    """Undo `transform`, the division by `N` included; blocks that were not computed count as zero."""
    first, *others = factors
    matrix = dft_matrix(first, spectrum.dtype).to(spectrum.device).conj() / first
    if not others:
        return spectrum @ (matrix if blocks is None else matrix[blocks])
    y = inverse(spectrum.unflatten(-1, (first, -1)), others, blocks)
    return (matrix @ (y * _twiddles(y).conj())).flatten(-2)


def permutation(factors: Sequence[int], blocks: Tensor | None = None) -> Tensor:
    """Return the frequencies in the order in which `transform` gives them.

    >>> permutation((2, 4)).tolist()
    [0, 2, 4, 6, 1, 3, 5, 7]
    """
    first, *others = factors
    if not others:
        return torch.arange(first) if blocks is None else blocks
    return (torch.arange(first)[:, None] + first * permutation(others, blocks)).flatten()


def blocks_below(kept: int, factors: Sequence[int]) -> Tensor:
    """Return the rows of the last matrix that hold a frequency below `kept` or a mirror image of one.

    >>> blocks_below(100, (32, 8)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    >>> blocks_below(64, (32, 8)).tolist()
    [0, 1, 6, 7]
    """
    size, last = math.prod(factors), factors[-1]
    lowest = torch.arange(last) * (size // last)
    highest = lowest + size // last - 1
    return torch.nonzero((lowest < kept) | (highest > size - kept)).flatten()


def convolve(u: Tensor, taps: Tensor, factors: Sequence[int], kept: int | None = None) -> Tensor:
    """Convolve rows with taps circularly modulo `N`, the product of the factors, by matrix products.

    Args:
        u: real rows (B, H, L), L at most N.
        taps: real, (H, K), K at most N.
        factors: sizes of the matrices, outermost first.
        kept: frequencies below it and their mirror images stay, the others count as zero and most of them are
            never computed; None keeps all.

    Returns:
        (B, H, L): the first L of the N results; linear where `N >= L + K - 1`.
    """
    size = math.prod(factors)
    kind = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    blocks = None if kept is None else blocks_below(kept, factors).to(u.device)
    order = permutation(factors, blocks).to(u.device)
    spectrum = torch.fft.fft(taps.to(kind), n=size)[..., order]
    if kept is not None:
        spectrum = spectrum * (torch.minimum(order, size - order) < kept)
    padded = F.pad(u.to(kind), (0, size - u.shape[-1]))
    result = inverse(transform(padded, factors, blocks) * spectrum, factors, blocks)
    return result.real[..., : u.shape[-1]].to(u.dtype)


def count_macs(factors: Sequence[int], kept: int | None = None) -> int:
    """Return the real multiply-adds of `convolve` for one row, the taps' spectrum given.

    >>> count_macs((32, 32)), count_macs((32, 32), kept=256)
    (528384, 395264)
    """
    size = math.prod(factors)
    share = 1.0 if kept is None else len(blocks_below(kept, factors)) / factors[-1]
    stages = [4 * size * factor for factor in factors]
    return round(2 * (sum(stages[:-1]) + stages[-1] * share) + 4 * size * share)


def _twiddles(like: Tensor) -> Tensor:
    """Return exp(-2 pi i a m / (rows columns)) for the two last dimensions of `like`."""
    rows, columns = like.shape[-2:]
    a, m = torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64)
    return _unit(torch.outer(a, m) / (rows * columns)).to(like)


def _unit(turns: Tensor) -> Tensor:
    """Return exp(-2 pi i turns) in double; whole turns leave first, for accuracy."""
    angle = -2 * math.pi * torch.remainder(turns, 1)
    return torch.polar(torch.ones_like(angle), angle)


def _check(length: int, factors: Sequence[int]) -> None:
    if math.prod(factors) != length:
        raise UsageError(
            f"Factors {tuple(factors)} multiply to {math.prod(factors)}, the rows have {length} numbers."
        )
