"""Classification losses for hard and soft targets, and the mixing of batches that makes soft ones."""

from __future__ import annotations

import torch
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


def as_probabilities(targets: Tensor, num_classes: int) -> Tensor:
    """Return soft targets (N, K) of class indices (N,); probabilities pass through."""
    return F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha) with the generator's own stream."""
    pair = torch._standard_gamma(torch.tensor([alpha, alpha], dtype=torch.float64), generator=generator)
    return float(pair[0] / pair.sum().clamp_min(1e-300))


def mix_batch(
    images: Tensor,
    targets: Tensor,
    num_classes: int,
    generator: torch.Generator,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mix each image (N, C, H, W) with another of its batch by mixup or cutmix; targets become soft.

    With both alphas above 0 one of the two is drawn for the whole batch. The cut box keeps the image's
    aspect, and the targets follow its area after clipping at the border (Yun et al. 2019, section 3.1).
    """
    soft = as_probabilities(targets, num_classes)
    use_cutmix = cutmix > 0 and (mixup <= 0 or torch.rand((), generator=generator).item() < 0.5)
    keep = _beta(cutmix if use_cutmix else mixup, generator)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    if use_cutmix:
        height, width = images.shape[-2:]
        side = (1 - keep) ** 0.5
        cy, cx = (torch.rand(2, generator=generator) * torch.tensor([height, width])).int().tolist()
        half_h, half_w = int(height * side / 2), int(width * side / 2)
        top, bottom = max(0, cy - half_h), min(height, cy + half_h)
        left, right = max(0, cx - half_w), min(width, cx + half_w)
        mixed = images.clone(memory_format=torch.preserve_format)
        mixed[..., top:bottom, left:right] = images[partner][..., top:bottom, left:right]
        keep = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed = torch.lerp(images[partner], images, keep)
    return mixed, torch.lerp(soft[partner], soft, keep)
