"""Kar: an optimiser that adds up the signs of the gradient and of its running means.

Each step moves every value by `lr` times -3, -1, 1 or 3 (with two means); then the means take in the
gradient. It is what Terminator was published with; there is no weight decay.

Reference: Zhang, "HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv
2401.17948.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import UsageError


class Kar(torch.optim.Optimizer):
    """Sign descent with running means.

    Args:
        params: what to optimise.
        lr: length of one sign's step.
        betas: share of the old in each running mean: two for Kar3, one for Kar2.

    Raises:
        UsageError: the rate is not positive, or a share lies outside 0 to 1.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> weight.grad = torch.ones(1)
    >>> Kar([weight], lr=0.5).step()
    >>> weight.item()
    -0.5
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.001215, betas: Sequence[float] = (0.5, 0.95)
    ) -> None:
        if lr <= 0 or not all(0 <= beta < 1 for beta in betas):
            raise UsageError(
                f"Got lr={lr}, betas={tuple(betas)}; expected lr above 0 and betas from 0 to below 1."
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a closure is evaluated first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group["lr"], group["betas"])
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, lr: float, betas: Sequence[float]) -> None:
        state = self.state[parameter]
        direction = gradient.sign()
        for index, beta in enumerate(betas):
            mean = state.setdefault(f"mean_{index}", torch.zeros_like(parameter))
            direction += mean.sign()  # of the gradients before this one
            mean.lerp_(gradient, 1 - beta)
        parameter.sub_(direction, alpha=lr)
