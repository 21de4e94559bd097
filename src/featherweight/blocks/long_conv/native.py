"""Long convolutions in C: one row at a time, transform, product and inverse in cache-sized blocks.

Plain transforms of a library read and write the whole tensor between transform, product and inverse, and pad
each row to twice its length. Here a row goes through all of it while it lies in the cache, as a complex
sequence of half the padded length (a real row and real taps live modulo `X^M = i`, whose real part holds the
first M results), and spectra stay in the order in which the transform leaves them. In training only the
inputs are kept; the backward pass transforms them again.

The file `long_conv.c` is compiled on first use by the compiler's build step, and cached.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featherweight.blocks.long_conv.library import span
from featherweight.errors import FeatherweightError

_SOURCES = Path(__file__).parent
_PARALLEL = 1 << 16
"""Numbers to transform below which starting threads costs more than it brings."""


class _Plan(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_long),
        ("levels", ctypes.c_long),
        ("radix", ctypes.c_void_p),
        ("tw", ctypes.c_void_p),
        ("leaf", ctypes.c_void_p),
        ("twist", ctypes.c_void_p),
    )


class _Taps(ctypes.Structure):
    _fields_ = (
        ("after", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("length", ctypes.c_long),
        ("length_before", ctypes.c_long),
        ("spectra", ctypes.c_void_p),
    )


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("u", "pre", "post", "after", "before"))


@functools.cache
def load_library() -> tuple[ctypes.CDLL, int]:
    """Build and load the C kernels; return them with the floats of a vector.

    Raises:
        MissingExtraError: no C compiler is installed.
        FeatherweightError: the compiler failed.
    """
    from featherweight.compiler.build import build_library, target_named, vector_floats

    target = target_named("native")
    lanes = vector_floats(target)
    header = hashlib.sha256((_SOURCES / "transform.h").read_bytes()).hexdigest()[:16]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "liblong_conv.so"
        extra = [
            f"-DVL={lanes}",
            f"-DHEADER_{header}",
        ]  # the cache's key covers sources and flags, not headers
        build_library([_SOURCES / "long_conv.c"], path, target, extra=extra)
        return ctypes.CDLL(str(path)), lanes


@functools.cache
def is_available() -> bool:
    """Say whether the kernels can be built and loaded here."""
    try:
        load_library()
    except (FeatherweightError, OSError):
        return False
    return True


def size_for(needed: int) -> int:
    """Return the smallest size M of a transform with `2 M >= needed`."""
    leaf = load_library()[1] ** 2
    sizes = []
    for odd in (1, 3, 5):
        size = leaf * odd
        while 2 * size < needed:
            size *= 2
        sizes.append(size)
    return min(sizes)


@dataclass(frozen=True)
class Plan:
    """Tables of one transform size, and the structure that points to them."""

    size: int
    address: Any
    tables: tuple[Any, ...]


@functools.lru_cache(maxsize=32)
def plan_for(size: int) -> Plan:
    """Return the plan of a size that `size_for` gave; tables are computed in double."""
    lanes = load_library()[1]
    radices = _radices(size // lanes**2)
    tables, rest = [], size
    for radix in radices:
        tables.append(_twiddles(rest, radix))
        rest //= radix
    angle = -2 * np.pi / lanes**2 * np.outer(np.arange(lanes), np.arange(lanes))
    leaf = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    angle = np.pi / (2 * size) * np.arange(size)
    twist = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    radix = np.array(radices or [0], np.dtype(ctypes.c_long))
    pointers = np.array([table.ctypes.data for table in tables] or [0], np.uintp)
    kept = (radix, pointers, leaf, twist)
    plan = _Plan(size, len(radices), *(array.ctypes.data for array in kept))
    return Plan(size, ctypes.byref(plan), (*kept, *tables, plan))


def _radices(count: int) -> list[int]:
    """Factor the number of leaves into 5, 3, 2 or 4, and 8s, in the order of the passes."""
    odd = [radix for radix in (5, 3) if count % radix == 0]
    power = (count // (odd[0] if odd else 1)).bit_length() - 1
    small = {0: [], 1: [2], 2: [4]}[power] if power < 3 else {0: [], 1: [4, 4], 2: [4]}[power % 3]
    used = sum(radix.bit_length() - 1 for radix in small)
    return [*odd, *small, *[8] * ((power - used) // 3)]


def _twiddles(size: int, radix: int) -> np.ndarray:
    """Return planes of cosines and sines of w^(p j); of radix 8 only p = 1, 2, 4, the kernel multiplies the
    rest."""
    column = np.arange(size // radix)
    angles = [-2 * np.pi / size * (column * p) for p in ((1, 2, 4) if radix == 8 else range(1, radix))]
    return np.stack([part(angle) for angle in angles for part in (np.cos, np.sin)]).astype(np.float32)


def spectra(size: int, taps: Tensor, before: Tensor) -> Tensor:
    """Return the spectra of taps (H, K) and (H, K') for `convolve`, of shape (H, 2 M), to be used again."""
    plan, channels = plan_for(size), len(taps)
    out = torch.empty(channels, 2 * size)
    held = _hold(taps, before, None)
    _for_channels(
        channels, channels * size, 4 * size, lambda lib: lib.fw_spectra, (plan.address, held), (out,)
    )
    return out


def convolve(
    u: Tensor,
    taps: Tensor,
    before: Tensor,
    pre: Tensor | None = None,
    post: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Return `post * (taps * (pre * u))`, all float32 on the CPU; gradients flow to all but `known`.

    Args:
        u: rows, (B, H, L).
        taps: at lags 0, 1, ..., (H, K).
        before: at lags -1, -2, ..., (H, K'); K' may be 0.
        pre: gate of the input, (B, H, L).
        post: gate of the output, (B, H, L).
        known: `spectra` of the taps, where they are known already.
    """
    return _Convolve.apply(u, taps, before, pre, post, known)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, taps, before, pre, post, known):  # type: ignore[no-untyped-def]
        u, taps, before = (tensor.contiguous() for tensor in (u, taps, before))
        pre, post = (None if gate is None else gate.contiguous() for gate in (pre, post))
        ctx.save_for_backward(u, taps, before, pre, post, known)
        y = torch.empty_like(u)
        batch, channels, length = u.shape
        ctx.size = size_for(span(length, taps.shape[1], before.shape[1]))
        _for_channels(
            channels,
            u.numel(),
            6 * ctx.size,
            lambda library: library.fw_forward,
            (
                plan_for(ctx.size).address,
                u,
                pre,
                post,
                _hold(taps, before, known),
                y,
                batch,
                channels,
                length,
            ),
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        u, taps, before, pre, post, known = ctx.saved_tensors
        grad = grad.contiguous()
        found = [
            None if tensor is None else torch.empty_like(tensor) for tensor in (u, pre, post, taps, before)
        ]
        batch, channels, length = u.shape
        _for_channels(
            channels,
            2 * u.numel(),
            8 * ctx.size,
            lambda library: library.fw_backward,
            (
                plan_for(ctx.size).address, grad, u, pre, post, _hold(taps, before, known),
                ctypes.byref(_Gradients(*map(_address, found))), batch, channels, length,
            ),
        )  # fmt: skip
        grad_u, grad_pre, grad_post, grad_taps, grad_before = found
        return grad_u, grad_taps, grad_before, grad_pre, grad_post, None


def _hold(taps: Tensor, before: Tensor, known: Tensor | None) -> Any:
    held = _Taps(_address(taps), _address(before), taps.shape[1], before.shape[1], _address(known))
    held.tensors = (taps, before, known)  # the structure holds addresses only
    return ctypes.byref(held)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _for_channels(
    channels: int,
    work: int,
    scratch: int,
    function: Callable[[ctypes.CDLL], Any],
    arguments: tuple[Any, ...],
    results: tuple[Tensor, ...] = (),
) -> None:
    """Call a kernel for ranges of channels, on as many threads as torch uses where the work is worth it."""
    call = function(load_library()[0])

    def convert(value: Any) -> Any:
        if value is None or isinstance(value, Tensor):
            return ctypes.c_void_p(_address(value))
        return ctypes.c_long(value) if isinstance(value, int) else value

    head, tail = [convert(value) for value in arguments], [convert(value) for value in results]

    def run(start: int, stop: int) -> None:
        room = torch.empty(scratch)
        call(*head, ctypes.c_long(start), ctypes.c_long(stop), *tail, ctypes.c_void_p(room.data_ptr()))

    threads = min(torch.get_num_threads(), channels) if work >= _PARALLEL else 1
    if threads == 1:
        run(0, channels)
        return
    edges = [channels * part // threads for part in range(threads + 1)]
    list(_workers(threads).map(run, edges, edges[1:]))


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="long_conv")
