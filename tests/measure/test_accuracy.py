"""Tests of the accuracy figures."""

import numpy as np
import pytest

from featherweight.errors import UsageError
from featherweight.measure.accuracy import accuracy, confusion, per_class, wilson_interval, worst_mistakes


def test_wilson_interval_at_the_edges():
    low, high = wilson_interval(0, 10)
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(UsageError):
        wilson_interval(1, 0)


def test_confusion_and_scores_with_an_absent_class():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert confusion(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    scores = per_class(labels, predicted, ["a", "b", "c"])
    assert [s.support for s in scores] == [2, 2, 0]
    assert scores[1].precision == pytest.approx(2 / 3) and scores[1].recall == 1
    assert scores[2].f1 == 0


def test_worst_mistakes_come_most_confident_first():
    logits = np.array([[5.0, 0.0], [1.0, 0.0], [0.0, 3.0], [9.0, 0.0]])
    labels = np.array([1, 1, 1, 1])
    assert accuracy(logits, labels) == 0.25
    assert worst_mistakes(logits, labels, 2) == [3, 0]
    assert worst_mistakes(logits, np.array([0, 0, 1, 0]), 2) == []
