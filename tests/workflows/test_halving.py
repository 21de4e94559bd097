"""Successive halving against a scripted learner."""

import pytest

from featherweight.workflows.candidates import Candidate
from featherweight.workflows.halving import rounds_of, successive_halving

QUALITY = {0.25: 0.3, 0.5: 0.6, 0.75: 0.9, 1.0: 0.5}
CANDIDATES = [Candidate("simplenet_cifar_310k", width, 32) for width in QUALITY]


def learner(calls):
    def train(candidate, time_s, number):
        calls.append((candidate.width, time_s, number))
        return QUALITY[candidate.width], 1.0

    return train


def test_the_best_learner_wins_and_each_round_costs_the_same():
    calls = []
    winner, trials = successive_halving(CANDIDATES, 80.0, learner(calls))
    assert winner.width == 0.75
    assert [number for *_, number in calls] == [0, 0, 0, 0, 1, 1]
    assert sum(time_s for _, time_s, number in calls if number == 0) == pytest.approx(40.0)
    assert sum(time_s for _, time_s, number in calls if number == 1) == pytest.approx(40.0)
    assert {width for width, _, number in calls if number == 1} == {0.5, 0.75}
    assert len(trials) == 6


def test_one_candidate_is_not_tried():
    calls = []
    winner, trials = successive_halving(CANDIDATES[:1], 80.0, learner(calls))
    assert (winner, trials, calls) == (CANDIDATES[0], [], [])


def test_an_interrupted_search_runs_only_what_is_missing():
    stored = []
    _, first = successive_halving(CANDIDATES, 80.0, learner([]), on_trial=stored.append)
    calls = []
    winner, second = successive_halving(CANDIDATES, 80.0, learner(calls), done=stored[:4])
    assert [number for *_, number in calls] == [1, 1]
    assert winner.width == 0.75
    assert second == first


def test_a_tie_goes_to_the_earlier_candidate():
    winner, _ = successive_halving(CANDIDATES, 8.0, lambda *_: (0.5, 1.0))
    assert winner == CANDIDATES[0]


def test_each_round_prefers_the_more_capable_of_those_that_are_close():
    scores = {0.25: 0.50, 0.5: 0.51, 0.75: 0.90, 1.0: 0.92}

    def train(candidate, time_s, number):
        return scores[candidate.width], 1.0

    assert successive_halving(CANDIDATES, 8.0, train)[0].width == 1.0
    assert successive_halving(CANDIDATES, 8.0, train, tie=0.26)[0].width == 0.75
    assert successive_halving(CANDIDATES, 8.0, train, tie=0.24)[0].width == 1.0


def test_few_validation_images_cannot_tell_small_differences():
    scores = {0.25: 0.50, 0.5: 0.51, 0.75: 1 - 4 / 269, 1.0: 1 - 2 / 269}

    def train(candidate, time_s, number):
        return scores[candidate.width], 1.0

    assert successive_halving(CANDIDATES, 8.0, train, images=269)[0].width == 0.75
    assert successive_halving(CANDIDATES, 8.0, train, images=5_000)[0].width == 1.0


@pytest.mark.parametrize(("count", "rounds"), [(1, 0), (2, 1), (5, 3), (16, 4)])
def test_rounds(count, rounds):
    assert rounds_of(count) == rounds
