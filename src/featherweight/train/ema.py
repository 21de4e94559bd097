"""Exponential moving average of a network's weights and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averaged copy of every floating-point parameter and buffer of `model`.

    After step `t` (counted from 1) the average decays by `min(decay, (1 + t) / (10 + t))` for each step
    since the last update: early on the average follows fast, so short runs are not dragged by their
    random start. Integer buffers are copied. All tensors are updated by one fused call every few steps.
    """

    def __init__(self, model: nn.Module, decay: float, every: int = 1) -> None:
        self.decay, self.every, self.last_step = decay, every, 0
        self.source = dict(model.state_dict())
        self.shadow = {name: t.detach().clone() for name, t in self.source.items()}
        self._floats = [name for name, t in self.source.items() if t.is_floating_point()]
        self._others = [name for name, t in self.source.items() if not t.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int, *, force: bool = False) -> None:
        """Fold the present weights in when `step` (1-based) is due, or when forced."""
        gap = step - self.last_step
        if gap <= 0 or (gap < self.every and not force):
            return
        keep = min(self.decay, (1 + step) / (10 + step)) ** gap
        shadow = [self.shadow[name] for name in self._floats]
        torch._foreach_lerp_(shadow, [self.source[name] for name in self._floats], 1 - keep)
        for name in self._others:
            self.shadow[name].copy_(self.source[name])
        self.last_step = step

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's tensors with the averaged ones, in place."""
        for name, shadow in self.shadow.items():
            kept = self.source[name].clone()
            self.source[name].copy_(shadow)
            shadow.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights for the duration of a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def load(self, tensors: Mapping[str, Tensor], last_step: int) -> None:
        """Restore the average from `shadow`'s tensors and the step of its last update."""
        for name, shadow in self.shadow.items():
            shadow.copy_(tensors[name])
        self.last_step = last_step
