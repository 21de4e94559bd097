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


def scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, reverse: bool = False
) -> Tensor:
    """Run the selective scan; shapes as in `featherweight.blocks.selective_scan.selective_scan`."""
    return _Scan.apply(reverse, u, delta, a, b, c, skip)


class _Scan(torch.autograd.Function):
    """Forward and backward pass, segment by segment."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, reverse: bool, *tensors: Tensor | None) -> Tensor:
        u, delta, a, b, c, skip = tensors
        y, state = torch.empty_like(u), u.new_zeros(u.shape[0], a.numel())
        entering, room = [], _Room(u, a)
        for part in _segments(u, a, reverse):
            entering.append(state)
            inputs = u[:, part], delta[:, part], a, b[:, part], c[:, part], skip
            state = _write_outputs(y[:, part], inputs, state, reverse, room)
        ctx.save_for_backward(*tensors, *entering)
        ctx.reverse = reverse
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c, skip, *entering = ctx.saved_tensors
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
        if skip is None:
            return None, *grads, None
        grads[0].addcmul_(grad, skip)
        return None, *grads, (grad * u).sum((0, 1))


class _Room:
    """Memory for the decays and states of a segment, used again by the next: fresh memory costs too much.

    It lies step by step, so that one step of all chunks is one run of numbers.
    """

    def __init__(self, u: Tensor, a: Tensor) -> None:
        self.like = u
        self.width = a.shape[::-1]
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def tensors(self, chunks: int, size: int) -> tuple[Tensor, Tensor]:
        """Return two tensors `(B, chunks, size, N, D)`."""
        if (chunks, size) not in self.kept:
            shape = size, self.like.shape[0], chunks, *self.width
            self.kept = {
                (chunks, size): tuple(self.like.new_empty(shape).permute(1, 2, 0, 3, 4) for _ in range(2))
            }
        return self.kept[chunks, size]


def _segments(u: Tensor, a: Tensor, reverse: bool) -> list[slice]:
    """Cut the sequence, in the order of the scan, into whole chunks but for the end."""
    length = u.shape[1]
    even = length / max(1, round(length * u.shape[0] * a.numel() / NUMBERS))
    size = _chunk_size(even)
    step = size * math.ceil(even / size)
    return [slice(start, start + step) for start in range(0, length, step)][:: -1 if reverse else 1]


def _chunk_size(tokens: float) -> int:
    return max(1, math.isqrt(int(tokens) // 2))


def _write_outputs(y: Tensor, inputs: Sequence[Tensor], state: Tensor, reverse: bool, room: _Room) -> Tensor:
    """Scan one segment into `y`, `(B, S, D)`; return the state `(B, N D)` after it."""
    length = y.shape[1]
    size = _chunk_size(length)
    missing = -length % size
    if missing:
        # Steps of length 0 at the end: they keep everything and write nothing.
        padded = (inputs[i] if i in (2, 5) else F.pad(inputs[i], (0, 0, 0, missing)) for i in range(6))
        whole = y.new_empty(y.shape[0], length + missing, y.shape[2])
        state = _write_outputs(whole, tuple(padded), state, reverse, room)
        y.copy_(whole[:, :length])
        return state
    u, delta, a, b, c, skip = inputs
    y, u, delta, b, c = (x.view(len(x), -1, size, x.shape[2]) for x in (y, u, delta, b, c))
    decay, states = room.tensors(length // size, size)
    torch.mul(delta.unsqueeze(3), a.t(), out=decay).exp_()
    if states.shape[3] == 1:
        torch.mul(delta, u, out=states[:, :, :, 0]).mul_(b)
    else:
        torch.mul((delta * u).unsqueeze(3), b.unsqueeze(4), out=states)
    state = _advance(decay.flatten(3), states.flatten(3), state, reverse)
    if states.shape[3] > 1:
        torch.sum(states.mul_(c.unsqueeze(4)), 3, out=y)
    else:
        torch.mul(states[:, :, :, 0], c, out=y)
    if skip is not None:
        y.addcmul_(u, skip)
    return state


def _advance(decay: Tensor, drive: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Turn what each token writes, `(B, chunks, size, W)`, into states, in place; return the last one."""
    order = slice(None, None, -1 if reverse else 1)
    keeps, writes = decay.unbind(2)[order], drive.unbind(2)[order]  # each (B, chunks, W)
    end = writes[0].clone()
    for keep, write in zip(keeps[1:], writes[1:], strict=True):
        torch.addcmul(write, keep, end, out=end)
    kept = decay.prod(2)
    batch, chunks, width = end.shape
    entering = end.new_empty(batch, chunks + 1, width)  # the state before each chunk, and after the last
    places = entering.unbind(1)[order]
    places[0].copy_(state)
    for index, (keep, last) in enumerate(zip(kept.unbind(1)[order], end.unbind(1)[order], strict=True)):
        torch.addcmul(last, keep, places[index], out=places[index + 1])
    previous = entering[:, 1:] if reverse else entering[:, :-1]
    for keep, write in zip(keeps, writes, strict=True):
        previous = write.addcmul_(keep, previous)
    return places[-1].clone()


def _states(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return decays and states of a segment, both `(B, S, N, D)`."""
    decay = (delta.unsqueeze(2) * a.t()).exp_()
    drive = (delta * u).unsqueeze(2) * b.unsqueeze(3)
    states = _advance_tokens(decay.flatten(2), drive.flatten(2), state, reverse)
    return decay, states.unflatten(2, decay.shape[2:])


def _advance_tokens(decay: Tensor, drive: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Turn what each token writes, `(B, S, W)`, into states; the memory of `drive` is used."""
    length = drive.shape[1]
    size = _chunk_size(length)
    missing = -length % size
    if missing:
        # Tokens that keep everything and write nothing.
        decay, drive = F.pad(decay, (0, 0, 0, missing), value=1.0), F.pad(drive, (0, 0, 0, missing))
    _advance(decay.unflatten(1, (-1, size)), drive.unflatten(1, (-1, size)), state, reverse)
    return drive[:, :length]


def _segment_grads(
    inputs: Sequence[Tensor], grad: Tensor, state: Tensor, flow: Tensor, reverse: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of the five inputs, and of the state `(B, N D)` that entered the segment."""
    u, delta, a, b, c = inputs
    decay, states = _states(u, delta, a, b, state, reverse)
    ends = torch.ones_like(decay[:, :1])
    # A state's gradient is its share of the output plus what the next state kept of it.
    later = torch.cat((ends, decay[:, :-1]) if reverse else (decay[:, 1:], ends), 1)
    inflow = (grad.unsqueeze(2) * c.unsqueeze(3)).flatten(2)
    inflow = _advance_tokens(later.flatten(2), inflow, flow, not reverse)
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
