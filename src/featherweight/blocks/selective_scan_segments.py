"""The selective scan on a CPU: segments that stay in the cache, each scanned in chunks, in place.

Reading and writing whole sequences of states costs more than the arithmetic. So the sequence is cut into
segments whose states fit into the cache, and the state is carried from one to the next. Inside a segment of
`2 s^2` tokens, `2 s` chunks of `s` tokens advance together, twice: a first sweep finds how each chunk ends,
the second writes every state over what its token wrote. The backward pass computes the states of a segment
again, so training keeps the inputs and one state per segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NUMBERS = 2**17
"""States of one segment: half a MiB, of which a core's second cache holds a few."""


def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    """Run the selective scan; shapes as in `featherweight.blocks.selective_scan.selective_scan`."""
    return _Scan.apply(reverse, u, delta, a, b, c)


class _Scan(torch.autograd.Function):
    """Forward and backward pass, segment by segment."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, reverse: bool, *tensors: Tensor) -> Tensor:
        u, delta, a, b, c = tensors
        y, state = torch.empty_like(u), u.new_zeros(u.shape[0], a.numel())
        entering = []
        for part in _segments(u, a, reverse):
            entering.append(state)
            _, states, state = _states(u[:, part], delta[:, part], a, b[:, part], state, reverse)
            if states.shape[2] == 1:
                torch.mul(states[:, :, 0], c[:, part], out=y[:, part])
            else:
                torch.sum(states * c[:, part].unsqueeze(3), 2, out=y[:, part])
        ctx.save_for_backward(*tensors, *entering)
        ctx.reverse = reverse
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, *entering = ctx.saved_tensors
        grads = [torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(a)]
        grads += [torch.empty_like(b), torch.empty_like(c)]
        flow = torch.zeros_like(entering[0])  # gradient of the state that leaves the segment
        parts = zip(_segments(u, a, ctx.reverse), entering, strict=True)
        for part, state in reversed(list(parts)):
            inputs = (u[:, part], delta[:, part], a, b[:, part], c[:, part])
            *found, flow = _segment_grads(inputs, grad[:, part], state, flow, ctx.reverse)
            for target, value in zip(grads, found, strict=True):
                if target is grads[2]:
                    target += value
                else:
                    target[:, part] = value
        return None, *grads


def _segments(u: Tensor, a: Tensor, reverse: bool) -> list[slice]:
    """Cut the sequence, in the order of the scan, into whole chunks but for the end."""
    length = u.shape[1]
    even = length / max(1, round(length * u.shape[0] * a.numel() / NUMBERS))
    size = _chunk_size(even)
    step = size * math.ceil(even / size)
    return [slice(start, start + step) for start in range(0, length, step)][:: -1 if reverse else 1]


def _chunk_size(tokens: float) -> int:
    return max(1, math.isqrt(int(tokens) // 2))


def _states(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return decays and states of a segment, both `(B, S, N, D)`, and the state `(B, N D)` after it."""
    decay = (delta.unsqueeze(2) * a.t()).exp_()
    drive = (delta * u).unsqueeze(2) * b.unsqueeze(3)
    states, state = _advance(decay.flatten(2), drive.flatten(2), state, reverse)
    return decay, states.unflatten(2, decay.shape[2:]), state


def _advance(decay: Tensor, drive: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Turn what each token writes, `(B, S, W)`, into states, in place; return them and the last one."""
    length = drive.shape[1]
    size = _chunk_size(length)
    missing = -length % size
    if missing:
        # Tokens that keep everything and write nothing.
        decay, drive = F.pad(decay, (0, 0, 0, missing), value=1.0), F.pad(drive, (0, 0, 0, missing))
    order = slice(None, None, -1 if reverse else 1)
    decay, chunked = (x.unflatten(1, (-1, size)) for x in (decay, drive))
    keeps, writes = decay.unbind(2)[order], chunked.unbind(2)[order]  # each (B, chunks, W)
    end = writes[0]
    for keep, write in zip(keeps[1:], writes[1:], strict=True):
        end = torch.addcmul(write, keep, end)
    kept = decay.prod(2)
    entering = []
    for keep, last in zip(kept.unbind(1)[order], end.unbind(1)[order], strict=True):
        entering.append(state)
        state = torch.addcmul(last, keep, state)
    previous = torch.stack(entering[order], 1)
    for keep, write in zip(keeps, writes, strict=True):
        previous = write.addcmul_(keep, previous)
    return drive[:, :length], state


def _segment_grads(
    inputs: Sequence[Tensor], grad: Tensor, state: Tensor, flow: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of the five inputs, and of the state `(B, N D)` that entered the segment."""
    u, delta, a, b, c = inputs
    decay, states, _ = _states(u, delta, a, b, state, reverse)
    ends = torch.ones_like(decay[:, :1])
    # A state's gradient is its share of the output plus what the next state kept of it.
    later = torch.cat((ends, decay[:, :-1]) if reverse else (decay[:, 1:], ends), 1)
    inflow, _ = _advance(later.flatten(2), (grad.unsqueeze(2) * c.unsqueeze(3)).flatten(2), flow, not reverse)
    inflow = inflow.unflatten(2, decay.shape[2:])  # (B, S, N, D)
    start = state.unflatten(1, decay.shape[2:]).unsqueeze(1)
    earlier = torch.cat((states[:, 1:], start) if reverse else (start, states[:, :-1]), 1)
    passed = inflow * decay
    exponent = passed * earlier
    written = (inflow * b.unsqueeze(3)).sum(2)  # (B, S, D)
    return (
        written * delta,
        torch.addcmul((exponent * a.t()).sum(2), written, u),
        (exponent * delta.unsqueeze(2)).sum((0, 1)).t(),
        (inflow * (delta * u).unsqueeze(2)).sum(3),
        (states * grad.unsqueeze(2)).sum(3),
        passed[:, -1 if reverse else 0].flatten(1),
    )
