"""Stochastic depth: drop a residual branch for some samples of the batch during training."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Set the whole branch to zero with probability `rate`, sample by sample, and scale the rest up.

    The identity in evaluation. Reference: "Deep Networks with Stochastic Depth", arXiv 1603.09382, section 3.

    Args:
        rate: probability of dropping the branch, from 0 to below 1.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """`(N, ...)` to the same shape."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep

    def extra_repr(self) -> str:
        """Show the rate when the module is printed."""
        return f"rate={self.rate:g}"


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """Return one rate for each block, growing linearly from 0 to `rate` at the deepest.

    >>> drop_path_rates(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [rate * index / max(1, blocks - 1) for index in range(blocks)]
