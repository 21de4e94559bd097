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
        entering, room = [], None
        for part in _pieces((y, u, delta, b, c), a, reverse):
            entering.append(state)
            if part[0].ndim == 3:
                state = _scan_end(part, a, skip, state, reverse)
                continue
            room = room or _Room(part[0], a, reverse)
            state = room.scan(part, a, skip, state)
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


def _segments(u: Tensor, a: Tensor, reverse: bool) -> list[slice]:
    """Cut the sequence, in the order of the scan, into whole chunks but for the end."""
    step, _ = _plan(u, a)
    starts = range(0, u.shape[1], step)
    return [slice(start, start + step) for start in starts][:: -1 if reverse else 1]


def _plan(u: Tensor, a: Tensor) -> tuple[int, int]:
    """Return the tokens of a segment and those of each of its chunks."""
    length = u.shape[1]
    even = length / max(1, round(length * u.shape[0] * a.numel() / NUMBERS))
    size = _chunk_size(even)
    return size * math.ceil(even / size), size


def _chunk_size(tokens: float) -> int:
    return max(1, math.isqrt(int(tokens) // 2))


def _pieces(tensors: Sequence[Tensor], a: Tensor, reverse: bool) -> list[tuple[Tensor, ...]]:
    """Cut sequences `(B, L, K)` into segments in chunks, `(B, chunks, size, K)`, in the order of the scan.

    An end that is shorter than a segment stays `(B, S, K)`.
    """
    step, size = _plan(tensors[0], a)
    length = tensors[0].shape[1]
    whole = length // step * step
    columns = []
    for x in tensors:
        parts = x[:, :whole].view(len(x), -1, size, x.shape[2]).split(step // size, 1) if whole else ()
        columns.append((*parts, x[:, whole:]) if whole < length else parts)
    return list(zip(*columns, strict=True))[:: -1 if reverse else 1]


class _Room:
    """Memory for decays and states of a segment, used again by the next: fresh memory costs too much.

    It lies step by step, so that one step of all chunks is one run of numbers.

    Args:
        like: a segment, `(B, chunks, size, D)`.
        a: rates, `(D, N)`.
        reverse: begin at the end.
    """

    def __init__(self, like: Tensor, a: Tensor, reverse: bool) -> None:
        batch, chunks, size, _ = like.shape
        shape = size, batch, chunks, *a.shape[::-1]
        self.decay, self.states = (like.new_empty(shape).permute(1, 2, 0, 3, 4) for _ in range(2))
        self.chunks = _Chunks(self.decay.flatten(3), self.states.flatten(3), reverse)

    def scan(self, part: Sequence[Tensor], a: Tensor, skip: Tensor | None, state: Tensor) -> Tensor:
        """Fill the first tensor of `part` from the others; return the state after it, `(B, N D)`."""
        y, u, delta, b, c = part
        torch.mul(delta.unsqueeze(3), a.t(), out=self.decay).exp_()
        if a.shape[1] == 1:
            torch.mul(delta, u, out=self.states[:, :, :, 0]).mul_(b)
            state = self.chunks.advance(state)
            torch.mul(self.states[:, :, :, 0], c, out=y)
        else:
            torch.mul((delta * u).unsqueeze(3), b.unsqueeze(4), out=self.states)
            state = self.chunks.advance(state)
            torch.sum(self.states.mul_(c.unsqueeze(4)), 3, out=y)
        if skip is not None:
            y.addcmul_(u, skip)
        return state


def _scan_end(part: Sequence[Tensor], a: Tensor, skip: Tensor | None, state: Tensor, reverse: bool) -> Tensor:
    """Do what `_Room.scan` does with any number of tokens: more, of length 0, keep all and write nothing."""
    length = part[0].shape[1]
    size = _chunk_size(length)
    padded = [F.pad(x, (0, 0, 0, -length % size)).view(len(x), -1, size, x.shape[2]) for x in part]
    state = _Room(padded[0], a, reverse).scan(padded, a, skip, state)
    part[0].copy_(padded[0].flatten(1, 2)[:, :length])
    return state


class _Chunks:
    """Chunks of tokens that advance together; every view of them is made once.

    Args:
        decay: what each token keeps, `(B, chunks, size, W)`.
        drive: what each token writes; states take its place.
        reverse: begin at the end.
    """

    def __init__(self, decay: Tensor, drive: Tensor, reverse: bool) -> None:
        order = slice(None, None, -1 if reverse else 1)
        batch, chunks, _, width = drive.shape
        self.decay = decay
        self.keeps, self.writes = (x.unbind(2)[order] for x in (decay, drive))  # each (B, chunks, W)
        self.end, self.kept = (drive.new_empty(batch, chunks, width) for _ in range(2))
        entering = drive.new_empty(batch, chunks + 1, width)  # the state before each chunk, and the last
        self.ends, self.kepts, self.places = (x.unbind(1)[order] for x in (self.end, self.kept, entering))
        self.entering = entering[:, 1:] if reverse else entering[:, :-1]

    def advance(self, state: Tensor) -> Tensor:
        """Turn what each token writes into states, in place; return the last one, `(B, W)`."""
        end = self.end.copy_(self.writes[0])
        for keep, write in zip(self.keeps[1:], self.writes[1:], strict=True):
            torch.addcmul(write, keep, end, out=end)
        torch.prod(self.decay, 2, out=self.kept)
        self.places[0].copy_(state)
        steps = zip(self.ends, self.kepts, self.places[:-1], self.places[1:], strict=True)
        for last, keep, before, after in steps:
            torch.addcmul(last, keep, before, out=after)
        previous = self.entering
        for keep, write in zip(self.keeps, self.writes, strict=True):
            previous = write.addcmul_(keep, previous)
        return self.places[-1].clone()


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
    _Chunks(decay.unflatten(1, (-1, size)), drive.unflatten(1, (-1, size)), reverse).advance(state)
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
