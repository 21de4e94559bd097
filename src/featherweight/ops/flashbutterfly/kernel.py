"""The kernel of a long convolution between parameter and use: drawn, smoothed, squashed, dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featherweight.errors import UsageError

INIT_STD = {"random": 0.002, "decay": 0.02}
"""Standard deviation of the first taps; "decay" shrinks later lags, faster in later channels."""


def squash(kernel: Tensor, amount: float) -> Tensor:
    """Move every tap towards zero by `amount` and stop there (equation 3): the proximal step of an L1
    penalty.

    >>> squash(torch.tensor([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    return F.softshrink(kernel, amount) if amount else kernel


def smooth(kernel: Tensor, reach: int) -> Tensor:
    """Replace every tap (..., K) by the mean of the `2 reach + 1` around it, zeros beyond the ends (equation
    4).

    >>> smooth(torch.tensor([[3.0, 0.0, 0.0, 6.0]]), 1).tolist()
    [[1.0, 1.0, 2.0, 2.0]]
    """
    if not reach:
        return kernel
    rows = kernel.flatten(0, -2)[:, None]
    return F.avg_pool1d(rows, 2 * reach + 1, stride=1, padding=reach).view_as(kernel)


def initial_kernel(shape: Sequence[int], init: str, **factory: Any) -> Tensor:
    """Draw a kernel (..., H, K): normal numbers, at 0.002, or at 0.02 with a decay over the lags (appendix
    C).

    Raises:
        UsageError: `init` is neither `"random"` nor `"decay"`.
    """
    if init not in INIT_STD:
        raise UsageError(f"Got init={init!r}; expected one of {', '.join(INIT_STD)}.")
    kernel = INIT_STD[init] * torch.randn(*shape, **factory)
    if init == "decay":
        channels, length = shape[-2:]
        rate = max(channels // 2, 1) ** (torch.arange(channels, **factory) / channels)
        kernel = kernel * torch.exp(-torch.arange(length, **factory) / length * rate[:, None])
    return kernel


def regularize(kernel: Tensor, amount: float, reach: int, dropout: float, training: bool) -> Tensor:
    """Smooth, squash, then drop taps at random while training; the order is the official one."""
    return F.dropout(squash(smooth(kernel, reach), amount), dropout, training)


def check_squash(amount: float, init: str) -> None:
    """Refuse to squash a kernel so hard that it stays silent for ever.

    Raises:
        UsageError: `amount` is negative or above twice the deviation of the first taps.
    """
    if init in INIT_STD and not 0 <= amount <= 2 * INIT_STD[init]:
        raise UsageError(
            f"Got squash={amount}; expected 0 to {2 * INIT_STD[init]}, twice the deviation of init={init!r}: "
            "beyond it nearly every tap is zero and none gets a gradient."
        )
