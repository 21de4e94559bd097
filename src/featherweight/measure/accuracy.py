"""Accuracy with its uncertainty, and where a classifier goes wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featherweight.errors import UsageError


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class, all in 0..1, and its number of images."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy of `correct` out of `n` (Wilson's score interval).

    Unlike the textbook's plus-minus it stays inside 0..1 and is not empty at 0 or n correct answers.

    Raises:
        UsageError: `n` is not positive or `correct` lies outside 0..n.

    >>> [round(x, 4) for x in wilson_interval(90, 100)]
    [0.8256, 0.9448]
    """
    if n <= 0 or not 0 <= correct <= n:
        raise UsageError(f"Got {correct} correct of {n}; expected 0 <= correct <= n and n > 0.")
    p = correct / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if correct == 0 else low), (1.0 if correct == n else high)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows of `logits` `(N, classes)` whose largest entry is at the label."""
    return float((logits.argmax(1) == labels).mean())


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count `(classes, classes)` pairs: row is the true class, column the predicted one."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (labels, predicted), 1)
    return table


def per_class(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[ClassScore]:
    """Score every class by name; a figure whose divisor is zero (never predicted, never present) is 0."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(names)), zero_division=0)
    rows = zip(names, *scores, strict=True)
    return [ClassScore(name, float(p), float(r), float(f), int(n)) for name, p, r, f, n in rows]


def worst_mistakes(logits: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Return indices of the wrong answers, most confidently wrong first, at most `count`."""
    shifted = logits - logits.max(1, keepdims=True)
    chance = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    order = np.argsort(chance[wrong, labels[wrong]] - chance[wrong].max(1), kind="stable")
    return wrong[order][:count].tolist()
