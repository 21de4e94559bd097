"""Knowledge distillation: a teacher's soft answers as a second target (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, averaged over the batch (N, K).

    The factor keeps the gradient's size independent of the temperature (section 2 of the paper).
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


class ResizedTeacher(nn.Module):
    """A teacher that sees the student's batch at its own size and with its own normalisation.

    Args:
        teacher: Network from (N, C, H, W) to logits (N, K), same classes in the same order.
        size: Height and width in pixels that the teacher expects.
        student_mean: Mean that the batch was normalised with, on the 0 to 1 scale.
        student_std: Deviation that the batch was normalised with.
        mean: The teacher's own mean.
        std: The teacher's own deviation.
    """

    def __init__(
        self,
        teacher: nn.Module,
        size: tuple[int, int],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.teacher, self.size = teacher, tuple(size)
        own, theirs = torch.tensor(student_std), torch.tensor(std)
        self.register_buffer("scale", (own / theirs).view(1, -1, 1, 1))
        shift = (torch.tensor(student_mean) - torch.tensor(mean)) / theirs
        self.register_buffer("shift", shift.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Renormalise, resize and ask the teacher."""
        x = x * self.scale + self.shift
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        return self.teacher(x)
