"""Losses between a restored image and the true one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError, close_matches

PIXEL_LOSSES = ("l1", "l2", "charbonnier")
CHARBONNIER_EPS = 1e-3


def check_pixel_loss(name: str) -> None:
    """Refuse an unknown loss.

    Raises:
        UsageError: The loss is unknown.
    """
    if name not in PIXEL_LOSSES:
        known = ", ".join(PIXEL_LOSSES)
        raise UsageError(f"No loss '{name}'.{close_matches(name, PIXEL_LOSSES)} Expected one of {known}.")


def pixel_loss(restored: Tensor, truth: Tensor, name: str = "l1") -> Tensor:
    """Return the mean over all values of the absolute, squared or Charbonnier distance.

    Charbonnier is `sqrt(d^2 + eps^2)` with eps 1e-3, a smooth absolute value (Lai et al. 2017, section 3.3).
    """
    gap = restored.float() - truth.float()
    if name == "l2":
        return gap.square().mean()
    return gap.abs().mean() if name == "l1" else (gap.square() + CHARBONNIER_EPS**2).sqrt().mean()


def frequency_loss(restored: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute distance of the two-dimensional spectra, real and imaginary parts apart.

    The transform is not normalised, as usual in this field, where the loss is weighed by about 0.05 (Cho et
    al. 2021, "Rethinking Coarse-to-Fine Approach in Single Image Deblurring", section 3.4).
    """
    # The whole spectrum of a real image is mirrored in its half.
    gap = torch.fft.rfft2(restored.float() - truth.float())
    return torch.view_as_real(gap).abs().mean()
