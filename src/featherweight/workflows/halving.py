"""Successive halving: train all for a little, keep the better half, give it twice the time, and so on.

K. Jamieson and A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016.
Every round costs the same: half the candidates, twice the time for each. A trial is a short training of its
own with a whole learning-rate schedule, so its accuracy tells what the network reaches in that time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featherweight.workflows.candidates import Candidate

log = logging.getLogger("featherweight")


@dataclass(frozen=True)
class Trial:
    """One short training: the candidate's label, the round, the time given in seconds and what it reached."""

    label: str
    round: int
    time_s: float
    val_accuracy: float
    epochs: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def rounds_of(count: int) -> int:
    """Return how many rounds it takes to come from `count` candidates down to one.

    >>> [rounds_of(count) for count in (1, 2, 3, 4, 6, 8)]
    [0, 1, 2, 2, 3, 3]
    """
    return math.ceil(math.log2(count)) if count > 1 else 0


def successive_halving(
    candidates: Sequence[Candidate],
    time_s: float,
    train: Callable[[Candidate, float, int], tuple[float, float]],
    done: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
    tie: float = 0.0,
    images: int = 0,
) -> tuple[Candidate, list[Trial]]:
    """Find the candidate that learns best in the given time.

    Args:
        candidates: what to compare, at least one, the most capable first.
        time_s: training time in seconds for all trials together.
        train: trains one candidate for so many seconds in the given round and returns
            (validation accuracy, epochs).
        done: trials of an interrupted search; they are not run again.
        on_trial: called after each new trial, to store it.
        tie: part of the best error by which an earlier candidate's may be larger for it to be preferred even
            so: short trials flatter those that learn quickly over those that end higher.
        images: validation images; of few, the standard error of a difference widens the tie. 0 leaves it.

    Returns:
        The winner, and every trial in order.
    """
    known = {(trial.label, trial.round): trial for trial in done}
    alive, trials = list(candidates), []
    rounds = rounds_of(len(alive))
    for number in range(rounds):
        share_s = time_s / rounds / len(alive)
        scores: dict[str, float] = {}
        for candidate in alive:
            trial = known.get((candidate.label, number))
            if trial is None:
                accuracy, epochs = train(candidate, share_s, number)
                trial = Trial(candidate.label, number, round(share_s, 3), accuracy, epochs)
                if on_trial is not None:
                    on_trial(trial)
                log.info("Round %d: %s reaches %.1f %%", number + 1, candidate.label, 100 * accuracy)
            trials.append(trial)
            scores[candidate.label] = trial.val_accuracy
        best = max(scores.values())
        least = best - max(tie * (1 - best), _standard_error(best, images))
        # Sorting is stable, so equals stay in the order of the candidates.
        alive.sort(key=lambda candidate: -min(scores[candidate.label], least))
        alive = sorted(alive[: math.ceil(len(alive) / 2)], key=list(candidates).index)
    return alive[0], trials


def _standard_error(accuracy: float, images: int) -> float:
    """Return the error of the difference of two accuracies near `accuracy`; never zero, even at 100 %."""
    if not images:
        return 0.0
    share = (accuracy * images + 1) / (images + 2)
    return math.sqrt(2 * share * (1 - share) / images)
