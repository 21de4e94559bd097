"""The selective scan as Triton kernels, forward and backward; imported only where they are asked for.

One program walks the whole sequence for one sample and a block of channels, with the states in registers:
each token is read once, its output written once, and neither the decays nor the states touch memory. Going
backwards in time is an index, not a copy. The backward pass computes the states again and then walks the
other way. Arithmetic is float32 whatever the type of the tensors.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Channels of one program."""


@triton.jit
def _forward(
    u, delta, a, b, c, y, states, length, channels,
    size_n: tl.constexpr, pad_n: tl.constexpr, pad_d: tl.constexpr,
    reverse: tl.constexpr, store: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * pad_d + tl.arange(0, pad_d)
    n = tl.arange(0, pad_n)
    in_d, in_n = d < channels, n < size_n
    both = in_n[:, None] & in_d[None, :]
    rate = tl.load(a + d[None, :] * size_n + n[:, None], both, 0.0).to(tl.float32)
    state = tl.zeros((pad_n, pad_d), tl.float32)
    for step in range(length):
        t = length - 1 - step if reverse else step
        row = sample * length + t
        token = tl.load(u + row * channels + d, in_d, 0.0).to(tl.float32)
        size = tl.load(delta + row * channels + d, in_d, 0.0).to(tl.float32)
        write = tl.load(b + row * size_n + n, in_n, 0.0).to(tl.float32)
        read = tl.load(c + row * size_n + n, in_n, 0.0).to(tl.float32)
        state = tl.exp(size[None, :] * rate) * state + (size * token)[None, :] * write[:, None]
        tl.store(y + row * channels + d, tl.sum(state * read[:, None], 0), in_d)
        if store:
            tl.store(states + (row * size_n + n[:, None]) * channels + d[None, :], state, both)


@triton.jit
def _backward(
    u, delta, a, b, c, states, grad, grad_u, grad_delta, grad_a, grad_b, grad_c, length, channels, blocks,
    size_n: tl.constexpr, pad_n: tl.constexpr, pad_d: tl.constexpr, reverse: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d = block * pad_d + tl.arange(0, pad_d)
    n = tl.arange(0, pad_n)
    in_d, in_n = d < channels, n < size_n
    both = in_n[:, None] & in_d[None, :]
    rate = tl.load(a + d[None, :] * size_n + n[:, None], both, 0.0).to(tl.float32)
    sum_a = tl.zeros((pad_n, pad_d), tl.float32)
    flow = tl.zeros((pad_n, pad_d), tl.float32)  # what the next token keeps, times its gradient
    for step in range(length):
        t = step if reverse else length - 1 - step
        before = t + 1 if reverse else t - 1
        row = sample * length + t
        token = tl.load(u + row * channels + d, in_d, 0.0).to(tl.float32)
        size = tl.load(delta + row * channels + d, in_d, 0.0).to(tl.float32)
        out = tl.load(grad + row * channels + d, in_d, 0.0).to(tl.float32)
        write = tl.load(b + row * size_n + n, in_n, 0.0).to(tl.float32)
        read = tl.load(c + row * size_n + n, in_n, 0.0).to(tl.float32)
        state = tl.load(states + (row * size_n + n[:, None]) * channels + d[None, :], both, 0.0)
        earlier = (sample * length + before) * size_n + n[:, None]
        exists = both & (before >= 0) & (before < length)
        previous = tl.load(states + earlier * channels + d[None, :], exists, 0.0)
        keep = tl.exp(size[None, :] * rate)
        flow += read[:, None] * out[None, :]
        through_decay = flow * keep * previous
        through_write = tl.sum(flow * write[:, None], 0)
        by_size = tl.sum(through_decay * rate, 0) + through_write * token
        tl.store(grad_u + row * channels + d, through_write * size, in_d)
        tl.store(grad_delta + row * channels + d, by_size, in_d)
        partial = (row * blocks + block) * size_n + n
        tl.store(grad_b + partial, tl.sum(flow * (size * token)[None, :], 1), in_n)
        tl.store(grad_c + partial, tl.sum(state * out[None, :], 1), in_n)
        sum_a += through_decay * size[None, :]
        flow = flow * keep
    tl.store(grad_a + (sample * channels + d[None, :]) * size_n + n[:, None], sum_a, both)


class _Scan(torch.autograd.Function):
    """Both kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, reverse: bool, *tensors: Tensor) -> Tensor:
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        ctx.reverse = reverse
        ctx.save_for_backward(*tensors)
        return _run_forward(tensors, reverse, store=False)[0]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, a, b, c = ctx.saved_tensors
        (batch, length, channels), state = u.shape, a.shape[1]
        blocks = triton.cdiv(channels, BLOCK)
        _, states = _run_forward((u, delta, a, b, c), ctx.reverse, store=True)
        new = functools.partial(torch.empty, device=u.device, dtype=torch.float32)
        grad_u, grad_delta = new(u.shape), new(u.shape)
        grad_a = new((batch, channels, state))
        grad_b, grad_c = (new((batch, length, blocks, state)) for _ in range(2))
        _backward[(batch, blocks)](
            u, delta, a, b, c, states, grad.contiguous(), grad_u, grad_delta, grad_a, grad_b, grad_c,
            length, channels, blocks, state, triton.next_power_of_2(state), BLOCK, ctx.reverse,
        )  # fmt: skip
        # Each block of channels wrote its own share, so that sums do not depend on the order of programs.
        grads = (grad_u, grad_delta, grad_a.sum(0), grad_b.sum(2), grad_c.sum(2))
        return (None, *(g.to(t.dtype) for g, t in zip(grads, (u, delta, a, b, c), strict=True)))


def _run_forward(tensors: tuple[Tensor, ...], reverse: bool, store: bool) -> tuple[Tensor, Tensor]:
    u, a = tensors[0], tensors[2]
    (batch, length, channels), state = u.shape, a.shape[1]
    y = torch.empty(u.shape, device=u.device, dtype=torch.float32)
    states = y.new_empty((batch, length, state, channels) if store else (1,))
    _forward[(batch, triton.cdiv(channels, BLOCK))](
        *tensors, y, states, length, channels, state, triton.next_power_of_2(state), BLOCK, reverse, store
    )
    return y.to(u.dtype), states


def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    """Run the selective scan on a GPU; shapes as in `featherweight.blocks.selective_scan.selective_scan`."""
    return _Scan.apply(reverse, u, delta, a, b, c)
