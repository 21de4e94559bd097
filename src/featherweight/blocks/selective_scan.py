"""The selective scan of Mamba: a linear recurrence over a sequence whose rates depend on the input.

Each channel keeps `N` numbers. A token decays them, adds itself, and reads them out:
`h_t = exp(delta_t a) h_(t-1) + delta_t b_t u_t` and `y_t = c_t . h_t + skip u_t`. The cost is linear in the
length, but a loop over tokens spends its time on starting small operations. The chunked form cuts the
sequence into about `sqrt(L)` chunks, advances all of them together, then carries the states from chunk to
chunk: two loops of `sqrt(L)` steps instead of one of `L`. It only multiplies decays, which lie between 0 and
1, so nothing overflows, and a decay that underflows is a state forgotten, as it should be. Captured graphs
hold it as plain operations; running on a CPU it goes segment by segment, see `selective_scan_segments.py`.

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752,
section 3 and algorithm 2.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.blocks import selective_scan_segments
from featherweight.errors import MissingExtraError, UsageError

METHODS = ("auto", "chunked", "sequential", "triton")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    *,
    reverse: bool = False,
    method: str = "auto",
) -> Tensor:
    """Run the selective scan along dimension 1; gradients flow to every tensor.

    The arithmetic is float32 at least; the output has the type of `u`.

    Args:
        u: the sequence, `(B, L, D)`.
        delta: step sizes, positive, `(B, L, D)`.
        a: rates, negative, `(D, N)`.
        b: how much each token writes, `(B, L, N)`, shared by the channels.
        c: how much each token reads, `(B, L, N)`.
        skip: weight of the token itself in its output, `(D,)`.
        reverse: start at the last token.
        method: `"sequential"` (a loop over tokens, the reference), `"chunked"`, `"triton"` (a GPU kernel), or
            `"auto"`: the kernel for tensors on a GPU where triton is installed, else chunked.

    Raises:
        UsageError: the method is unknown, or the shapes disagree.
        MissingExtraError: the kernel was asked for and triton is not installed.

    >>> one = torch.ones(1, 3, 1)
    >>> selective_scan(one, one * math.log(2), -one[0, :1], one, one).flatten() / math.log(2)
    tensor([1.0000, 1.5000, 1.7500])
    """
    _check_shapes(u, delta, a, b, c)
    if method not in METHODS:
        raise UsageError(f"No scan method '{method}'. Expected one of {', '.join(METHODS)}.")
    if method == "auto":
        method = "triton" if u.is_cuda and _has_triton() else "chunked"
    dtype = torch.promote_types(u.dtype, torch.float32)
    given = [tensor.to(dtype) for tensor in (u, delta, a, b, c)]
    skip = None if skip is None else skip.to(dtype)
    if method == "chunked" and u.is_cpu and not _capturing():
        return selective_scan_segments.scan(*given, skip, reverse).to(u.dtype)
    y = _implementation(method)(*given, reverse)
    return (y if skip is None else torch.addcmul(y, given[0], skip)).to(u.dtype)


def linear_scan(decay: Tensor, drive: Tensor, reverse: bool = False) -> Tensor:
    """Compute `h_t = decay_t h_(t-1) + drive_t` along dimension 1 for all t, from `h = 0`, in chunks.

    `(B, L, D)` twice to `(B, L, D)`. Safe for decays between -1 and 1; differentiable any number of times.
    """
    # Exporters see plain operations: the autograd function only matters where gradients are wanted.
    if torch.is_grad_enabled() and (decay.requires_grad or drive.requires_grad):
        return _LinearScan.apply(decay, drive, reverse)
    return _scan_in_chunks(decay, drive, reverse)


class _LinearScan(torch.autograd.Function):
    """The gradient of a linear recurrence is the same recurrence backwards in time."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, decay: Tensor, drive: Tensor, reverse: bool
    ) -> Tensor:
        states = _scan_in_chunks(decay, drive, reverse)
        ctx.save_for_backward(decay, states)
        ctx.reverse = reverse
        return states

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, states = ctx.saved_tensors
        back = 1 if ctx.reverse else -1
        grad_drive = linear_scan(_shift(decay, back), grad, not ctx.reverse)
        return grad_drive * _shift(states, -back), grad_drive, None


def _shift(x: Tensor, steps: int) -> Tensor:
    """Move a sequence by one step, later (+1) or earlier (-1), filling with zeros."""
    return F.pad(x[:, :-1], (0, 0, 1, 0)) if steps > 0 else F.pad(x[:, 1:], (0, 0, 0, 1))


def _scan_in_chunks(decay: Tensor, drive: Tensor, reverse: bool) -> Tensor:
    length, channels = (int(n) for n in drive.shape[1:])  # tracing would put the arithmetic into the graph
    size = max(1, math.isqrt(length - 1) + 1)
    chunks = (length + size - 1) // size
    missing = chunks * size - length
    if missing:
        # Tokens of nothing at the end: harmless after the last token, and before it when going backwards.
        decay, drive = F.pad(decay, (0, 0, 0, missing)), F.pad(drive, (0, 0, 0, missing))
    order = slice(None, None, -1 if reverse else 1)
    decays = decay.reshape(-1, chunks, size, channels).unbind(2)[order]  # each (B, chunks, D)
    drives = drive.reshape(-1, chunks, size, channels).unbind(2)[order]
    states, kept = [drives[0]], [decays[0]]
    for step_decay, step_drive in zip(decays[1:], drives[1:], strict=True):
        states.append(torch.addcmul(step_drive, step_decay, states[-1]))
        kept.append(kept[-1] * step_decay)
    carry = _carry(kept[-1].unbind(1)[order], states[-1].unbind(1)[order])
    entering = torch.stack(carry[order], 1)  # (B, chunks, D): the state before each chunk
    whole = [torch.addcmul(state, keep, entering) for state, keep in zip(states, kept, strict=True)]
    return torch.stack(whole[order], 2).reshape(-1, chunks * size, channels)[:, :length]


def _carry(kept: tuple[Tensor, ...], ends: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the state that enters each chunk, from what each keeps of it and what each ends with."""
    entering = [torch.zeros_like(ends[0])]
    for keep, end in zip(kept[:-1], ends[:-1], strict=True):
        entering.append(torch.addcmul(end, keep, entering[-1]))
    return entering


def _decay_and_drive(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Give what each token keeps and what it writes, both `(B, L, N, D)`."""
    decay = (delta.unsqueeze(2) * a.t()).exp()
    return decay, (delta * u).unsqueeze(2) * b.unsqueeze(3)


def _chunked(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
    decay, drive = _decay_and_drive(u, delta, a, b)
    states = linear_scan(decay.flatten(2), drive.flatten(2), reverse)
    if a.shape[1] == 1:
        return states * c
    return (states.unflatten(2, (a.shape[1], -1)) * c.unsqueeze(3)).sum(2)


def _sequential(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
    decay, drive = _decay_and_drive(u, delta, a, b)
    state = torch.zeros_like(drive[:, 0])
    outputs = []
    times = range(u.shape[1])
    for t in reversed(times) if reverse else times:
        state = decay[:, t] * state + drive[:, t]
        outputs.append((state * c[:, t].unsqueeze(2)).sum(1))
    return torch.stack(outputs[::-1] if reverse else outputs, 1)


def _triton(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool) -> Tensor:
    if not _has_triton():
        raise MissingExtraError(
            "The scan kernel needs triton, which comes with PyTorch for NVIDIA GPUs on Linux. "
            "Install that, or use method='chunked'."
        )
    from featherweight.blocks.selective_scan_triton import scan

    return scan(u, delta, a, b, c, reverse)


def _implementation(method: str) -> Callable[..., Tensor]:
    return {"chunked": _chunked, "sequential": _sequential, "triton": _triton}[method]


def _capturing() -> bool:
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_shapes(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    batch, length, channels = u.shape
    state = a.shape[-1]
    expected = {"delta": (delta, u.shape), "a": (a, (channels, state))}
    expected |= {name: (tensor, (batch, length, state)) for name, tensor in (("b", b), ("c", c))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise UsageError(
                f"{name} is {tuple(tensor.shape)}, expected {tuple(shape)} for u {tuple(u.shape)}."
            )
