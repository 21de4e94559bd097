"""What a fit report shows, as plain data: the HTML report, the model card and the tables all read this.

Accuracies, precisions and recalls are fractions in [0, 1]; every other quantity carries its unit in its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from featherweight.errors import FeatherweightError


@dataclass(frozen=True)
class CandidatePoint:
    """One network at one width and input size that the search looked at.

    `accuracy` is on the validation split, None where the candidate was never trained. `verdict` says why
    it was dropped or kept. `dropped` marks one that left the search before its end; `epochs` is how long it
    was trained.
    """

    name: str
    width: float
    input: int
    macs: int
    params: int
    size_bytes: int
    latency_ms: float
    accuracy: float | None = None
    verdict: str = ""
    chosen: bool = False
    dropped: bool = False
    epochs: float | None = None

    @property
    def label(self) -> str:
        """Short name with what was varied.

        >>> CandidatePoint("simplenet", 0.5, 32, 1, 1, 1, 0.1).label
        'simplenet ×0.5 @32'
        """
        return f"{self.name} ×{self.width:g} @{self.input}"


def sort_candidates(candidates: Sequence[CandidatePoint]) -> list[CandidatePoint]:
    """Put the chosen candidate first, then those that stayed, then by accuracy and latency."""

    def rank(point: CandidatePoint) -> tuple[bool, bool, bool, float, float]:
        untrained = point.accuracy is None
        return not point.chosen, untrained, point.dropped, -(point.accuracy or 0.0), point.latency_ms

    return sorted(candidates, key=rank)


@dataclass(frozen=True)
class VariantResult:
    """What was measured of one exported file, `float32` or `int8`.

    `latency_ms` holds one `{p50, p95, threads}` for each number of threads (batch 1). `per_class` holds one
    `{name, precision, recall, support}` for each class; a ratio with nothing under it is 0 or None. `engine`
    holds `{latency_ms, onnxruntime_latency_ms, ...}` of the compiled file, timed in turns on one thread.
    """

    test_accuracy: float
    test_accuracy_interval: tuple[float, float]
    latency_ms: Sequence[Mapping[str, float]]
    size_bytes: int
    macs: int
    params: int
    peak_memory_bytes: int | None = None
    per_class: Sequence[Mapping[str, Any]] = ()
    engine: Mapping[str, Any] | None = None

    @property
    def single_thread_ms(self) -> Mapping[str, float] | None:
        """The entry with the fewest threads, None where nothing was timed."""
        return min(self.latency_ms, key=lambda point: point["threads"], default=None)


@dataclass(frozen=True)
class Mistake:
    """A test image that the final model gets wrong, and how sure it was (confidence in [0, 1])."""

    image: Image.Image
    true: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class CamExample:
    """A test image beside its Grad-CAM overlay."""

    image: Image.Image
    overlay: Image.Image
    true: str
    predicted: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that the report of one `featherweight fit` run shows.

    `budget` may hold `max_latency_ms`, `max_size_bytes`, `max_macs`, `max_drop` (points), `time_s`; missing
    or None means no limit. `history` rows hold `epoch`, `train_loss`, `val_accuracy`, `lr`. `confusion`
    counts test images of `deployed` by (true, predicted). `steps_s` maps a step's name to its wall time in
    seconds. `preprocess` is the specification embedded in the exported model.

    Raises:
        FeatherweightError: the confusion matrix does not match the classes, or an accuracy is not a fraction.
    """

    title: str
    command: str
    classes: Sequence[str]
    variants: Mapping[str, VariantResult]
    dataset: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, float | None] = field(default_factory=dict)
    candidates: Sequence[CandidatePoint] = ()
    history: Sequence[Mapping[str, float | None]] = ()
    confusion: np.ndarray | None = None
    mistakes: Sequence[Mistake] = ()
    gradcams: Sequence[CamExample] = ()
    steps_s: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    created: str = ""
    version: str = ""
    deployed: str = ""

    def __post_init__(self) -> None:
        """Check what would otherwise give a wrong picture without any error; pick the deployed variant."""
        if self.confusion is not None and self.confusion.shape != (len(self.classes),) * 2:
            raise FeatherweightError(
                f"Confusion matrix of shape {self.confusion.shape}, expected one row and column for "
                f"each of the {len(self.classes)} classes. Count it over the same list of classes."
            )
        shown = [v.test_accuracy for v in self.variants.values()]
        shown += [c.accuracy for c in self.candidates if c.accuracy is not None]
        if any(not 0 <= accuracy <= 1 for accuracy in shown):
            raise FeatherweightError(
                f"Accuracies {shown}, expected fractions in [0, 1]. Divide percentages by 100."
            )
        if not self.deployed and self.variants:
            names = list(self.variants)
            object.__setattr__(self, "deployed", "int8" if "int8" in names else names[-1])
        if self.variants and self.deployed not in self.variants:
            raise FeatherweightError(
                f"No variant '{self.deployed}', expected one of {', '.join(self.variants)}."
            )

    @property
    def chosen(self) -> CandidatePoint | None:
        """The candidate that was trained to the end, if the search is part of this run."""
        return next((point for point in self.candidates if point.chosen), None)

    @property
    def final(self) -> VariantResult | None:
        """What was measured of the deployed variant."""
        return self.variants.get(self.deployed)
