"""Distillation against the formula written out."""

import pytest
import torch
from torch import nn

from featherweight.train.batches import normalise
from featherweight.train.distill import ResizedTeacher, distillation_loss


def test_distillation_loss_by_hand():
    student, teacher, heat = torch.randn(4, 3).double(), torch.randn(4, 3).double(), 3.0
    p, q = (teacher / heat).softmax(1), (student / heat).softmax(1)
    expected = (p * (p / q).log()).sum() / 4 * heat**2
    assert distillation_loss(student, teacher, heat).item() == pytest.approx(expected.item(), rel=1e-5)
    assert distillation_loss(student, student, heat).item() == pytest.approx(0, abs=1e-6)


def test_resized_teacher_sees_its_own_normalisation():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3))

    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    student = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    teacher = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    ResizedTeacher(Spy(), (8, 8), *student, *teacher)(normalise(pixels, *student))
    torch.testing.assert_close(seen[0], normalise(pixels, *teacher))
    ResizedTeacher(Spy(), (16, 16), *student, *teacher)(normalise(pixels, *student))
    assert seen[1].shape == (2, 3, 16, 16)
