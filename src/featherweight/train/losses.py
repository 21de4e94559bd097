"""The classification loss for hard and soft targets."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def classification_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of `logits` (N, K) against class indices (N,) or probabilities (N, K).

    With smoothing `s` each target becomes `(1 - s) * target + s / K` (Szegedy et al. 2016, section 7).
    """
    log_probs = F.log_softmax(logits.float(), dim=1)
    if targets.ndim == 1:
        hit = log_probs.gather(1, targets[:, None]).squeeze(1)
    else:
        hit = (log_probs * targets).sum(1)
    if smoothing == 0:
        return -hit.mean()
    return -((1 - smoothing) * hit + smoothing * log_probs.mean(1)).mean()
