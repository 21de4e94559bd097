"""The loss against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from featherweight.train.losses import classification_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_torchs(smoothing):
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    soft = torch.rand(6, 5).softmax(1)
    for targets in (labels, soft):
        expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        torch.testing.assert_close(classification_loss(logits, targets, smoothing), expected)
