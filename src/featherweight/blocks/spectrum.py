"""The spectrum of a feature map, and what layers do with it, in a fast and in an exportable form.

A spectrum is a real tensor `(N, C, 2, H, W // 2 + 1)`, real part first: half of the frequencies, for those of
a real map mirror each other. Running eagerly it is a view of the complex tensor that the fast Fourier
transform gave, so nothing is copied. While a graph is captured (ONNX, `torch.export`, `torch.compile`) the
same functions multiply by constant cosine and sine matrices and use real numbers only, for most targets know
neither transforms nor complex numbers; height and width are then fixed.

Symbolic tracing (batch-norm folding, fine-tuning for int8) keeps the four public functions whole if they are
called by way of this module (`spectrum.multiply(...)`), so that the choice is made when the traced network
runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def _without_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep `function` in the precision of its inputs: the large values of a spectrum drown the small ones."""

    @functools.wraps(function)
    def run(x: Tensor, *rest: Tensor) -> Tensor:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return function(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    return run


@torch.fx.wrap
@_without_autocast
def to_spectrum(x: Tensor) -> Tensor:
    """Real 2-D Fourier transform, orthonormal, never below float32.

    `(N, C, H, W)` to `(N, C, 2, H, W // 2 + 1)`.

    >>> to_spectrum(torch.ones(1, 1, 2, 2))[0, 0, 0].tolist()
    [[2.0, 0.0], [0.0, 0.0]]
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not _capturing():
        return _as_pairs(torch.fft.rfft2(x, norm="ortho"))
    channels, height, width = _fixed(x.shape[1:])
    rows, columns, _, _ = _matrices(x, height, width)
    z = (x @ rows).reshape(-1, channels, height, 2, width // 2 + 1).transpose(2, 3)
    z = columns @ z.reshape(-1, channels, 2 * height, width // 2 + 1)
    return z.reshape(-1, channels, 2, height, width // 2 + 1)


@torch.fx.wrap
@_without_autocast
def to_image(z: Tensor, like: Tensor) -> Tensor:
    """Inverse of `to_spectrum`, with the height, width and data type of `like`."""
    if not _capturing():
        return torch.fft.irfft2(_as_complex(z), s=like.shape[-2:], norm="ortho").to(like.dtype)
    channels, height, width = _fixed(like.shape[1:])
    _, _, columns, rows = _matrices(z, height, width)
    z = columns @ z.reshape(-1, channels, 2 * height, width // 2 + 1)
    z = z.reshape(-1, channels, 2, height, width // 2 + 1).transpose(2, 3)
    return (z.reshape(-1, channels, height, 2 * (width // 2 + 1)) @ rows).to(like.dtype)


@torch.fx.wrap
def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of two spectra, frequency by frequency: a circular convolution of the maps."""
    if not _capturing():
        return _as_pairs(_as_complex(a) * _as_complex(b))
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(2), b.unbind(2)
    real = a_real * b_real - a_imaginary * b_imaginary
    return torch.stack((real, a_real * b_imaginary + a_imaginary * b_real), 2)


@torch.fx.wrap
@_without_autocast
def mix_channels(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Complex linear map inside each group of channels, the same at every frequency.

    Args:
        z: spectrum `(N, groups * b, 2, H, F)`.
        weight: `(2, groups, b, b)`: real or imaginary part, group, input, output.
        bias: `(2, groups, b)`.
    """
    # Indexing, unlike unpacking, lets an exporter compute the kernel once and for all.
    real, imaginary, bias = weight[0].to(z.dtype), weight[1].to(z.dtype), bias.to(z.dtype)
    # A count of multiply-adds runs on the meta device and knows the cost of a convolution.
    if not (_capturing() or z.is_meta):
        groups = _as_complex(z).unflatten(1, weight.shape[1:3]).flatten(3)  # (N, groups, b, H F)
        mixed = torch.complex(real, imaginary).mT @ groups + torch.complex(*bias)[..., None]
        return _as_pairs(mixed.flatten(1, 2).unflatten(2, z.shape[3:]))
    to_real, to_imaginary = torch.stack((real, -imaginary), 2), torch.stack((imaginary, real), 2)
    kernel = torch.stack((to_real, to_imaginary), 4).permute(0, 3, 4, 1, 2)  # (groups, out, 2, in, 2)
    kernel = kernel.flatten(0, 2).flatten(1)[..., None, None]  # (2 C, 2 b, 1, 1)
    channels, _, height, half = _fixed(z.shape[1:])
    z = z.reshape(-1, 2 * channels, height, half)
    z = F.conv2d(z, kernel, bias.permute(1, 2, 0).flatten(), groups=weight.shape[1])
    return z.reshape(-1, channels, 2, height, half)


def _capturing() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _as_pairs(spectrum: Tensor) -> Tensor:
    """View complex `(N, C, H, F)` as `(N, C, 2, H, F)`."""
    return torch.view_as_real(spectrum).permute(0, 1, 4, 2, 3)


def _as_complex(z: Tensor) -> Tensor:
    """View `(N, C, 2, H, F)` as complex `(N, C, H, F)`; copies only what did not come from `_as_pairs`."""
    return torch.view_as_complex(z.permute(0, 1, 3, 4, 2).contiguous())


def _fixed(sizes: torch.Size) -> list[int]:
    """Make constants of sizes, so that a traced graph does not compute them."""
    return [int(size) for size in sizes]


def _matrices(like: Tensor, height: int, width: int) -> list[Tensor]:
    return [matrix.to(like.device, like.dtype) for matrix in _fourier_matrices(height, width)]


@torch.compiler.assume_constant_result
def _fourier_matrices(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the transforms along rows and along columns, then their inverses along columns and rows."""
    half = width // 2 + 1
    row = 2 * np.pi * np.outer(np.arange(width), np.arange(half)) / width
    column = 2 * np.pi * np.outer(np.arange(height), np.arange(height)) / height
    row_cos, row_sin = np.cos(row) / width**0.5, np.sin(row) / width**0.5
    cos, sin = np.cos(column) / height**0.5, np.sin(column) / height**0.5
    # Frequencies whose mirror image is not kept count twice; 0 and, at even widths, the last have none.
    count = np.full(half, 2.0)
    count[0] = 1.0
    if width % 2 == 0:
        count[-1] = 1.0
    matrices = (
        np.concatenate((row_cos, -row_sin), 1),  # (W, 2 half)
        np.block([[cos, sin], [-sin, cos]]),  # (2 H, 2 H)
        np.block([[cos, -sin], [sin, cos]]),
        np.concatenate((row_cos * count, -row_sin * count), 1).T,  # (2 half, W)
    )
    return tuple(torch.from_numpy(np.ascontiguousarray(matrix)) for matrix in matrices)
