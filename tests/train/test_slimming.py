"""Slimming: the supernet's weights, and the greedy loop against a sequence worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import nn

from featherweight.errors import BudgetError, UsageError
from featherweight.train.slimming import (
    EMBED,
    IDENTITY,
    Design,
    LatencyTable,
    MetaPath,
    Piece,
    Step,
    Supernet,
    actions,
    first_design,
    importance,
    possible_pieces,
    refresh_norms,
    slim,
)

SCORES = [
    [{"pool": 1.0, IDENTITY: 0.0}],
    [{"pool": 2.0, "token": 0.5, IDENTITY: 0.0}, {"pool": 0.1, "token": 1.5, IDENTITY: 0.2}],
]
"""A toy of three blocks: one in the first stage, two in the second."""

LATE = {"token"}


def linear_table(widths=(32, 64)) -> LatencyTable:
    """Blocks cost their width, tokens three times that, embeddings a tenth; milliseconds times a hundred."""
    cost = {EMBED: 0.001, "pool": 0.01, "token": 0.03}
    kinds = (("pool",), ("pool", "token"))
    return LatencyTable({p: cost[p.kind] * p.width for p in possible_pieces(widths, kinds)}, 0.05)


def test_first_design_switches_to_late_kinds_where_the_scores_are_best():
    design = first_design((32, 64), SCORES, LATE)
    assert design == Design((32, 64), (("pool",), ("pool", "token")))
    assert first_design((32, 64), SCORES).paths == (("pool",), ("pool", "token"))
    only_late = [[{"token": 3.0, IDENTITY: 0.0}], [{"pool": 1.0, IDENTITY: 0.0}]]
    with pytest.raises(UsageError, match="late ones"):
        first_design((16, 16), only_late, LATE)


def test_latency_adds_up_and_missing_pieces_are_named():
    design = first_design((32, 64), SCORES, LATE)
    assert linear_table().latency_ms(design) == pytest.approx(0.05 + 0.032 + 0.32 + 0.064 + 0.64 + 1.92)
    with pytest.raises(UsageError, match="lacks 3 pieces"):
        linear_table().latency_ms(design.with_width(0, 24))


def test_actions_are_the_three_of_the_paper():
    start = first_design((32, 64), SCORES, LATE)
    found = dict(actions(start, SCORES, LATE))
    # Importances: e^1 = 2.72; e^2 + e^0.5 = 9.04; e^-0.1 + e^1.3 = 4.57.
    assert found == {
        "drop block 0 of stage 0": start.with_kind(0, 0, IDENTITY),
        "token to identity at block 1 of stage 1": start.with_kind(1, 1, IDENTITY),
        "narrow stage 0 to 16": start.with_width(0, 16),
    }
    assert importance(SCORES[1][1]) == pytest.approx(math.exp(-0.1) + math.exp(1.3))
    better = [SCORES[0], [SCORES[1][0], {**SCORES[1][1], "pool": 0.3}]]
    assert "token to pool at block 1 of stage 1" in dict(actions(start, better, LATE))


def test_greedy_sequence_by_hand():
    """Losses: 1 point for a narrower stage 0, 2 for its block, 8 for the tokens, 3 for each 16 of stage 1."""

    def accuracy(design: Design) -> float:
        lost = 0.01 * (32 - design.widths[0]) / 16 + 0.03 * (64 - design.widths[1]) / 16
        lost += 0.02 * (design.paths[0][0] == IDENTITY) + 0.08 * (design.paths[1][1] != "token")
        return 0.9 - lost - 0.5 * (design.paths[1][0] == IDENTITY)

    start, table = first_design((32, 64), SCORES, LATE), linear_table()
    steps = slim(start, SCORES, table, accuracy, 0.9, late=LATE)
    # Points per ms: 0.08 / 1.92 = 0.042 for the tokens, 0.01 / 0.176 = 0.057, 0.02 / 0.32 = 0.063.
    assert [step.action for step in steps] == [
        "start",
        "token to identity at block 1 of stage 1",
        "narrow stage 0 to 16",
        "drop block 0 of stage 0",
    ]
    assert steps[-1].latency_ms == pytest.approx(0.05 + 0.016 + 0.064 + 0.64)
    assert steps[-1].drop == pytest.approx(0.02) and steps[1].saved_ms == pytest.approx(1.92)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_meets_the_budget_and_never_takes_a_dominated_action(seed):
    generator = torch.Generator().manual_seed(seed)

    def noise() -> float:
        return torch.rand((), generator=generator).item()

    kinds, widths = (("pool",), ("pool", "token")), (64, 96)
    scores = [
        [{kind: 2 * noise() for kind in (*names, IDENTITY)} for _ in range(3 + stage)]
        for stage, names in enumerate(kinds)
    ]
    table = LatencyTable({p: 0.01 * p.width + noise() for p in possible_pieces(widths, kinds)})
    memory: dict[Design, float] = {}

    def accuracy(design: Design) -> float:
        return memory.setdefault(design, noise())

    start = first_design(widths, scores, LATE)
    budget = 0.4 * table.latency_ms(start)
    steps = slim(start, scores, table, accuracy, budget, late=LATE)
    assert steps[-1].latency_ms <= budget
    for before, after in itertools.pairwise(steps):
        assert before.latency_ms > budget and after.latency_ms < before.latency_ms
        assert all(width % 16 == 0 and width >= 16 for width in after.design.widths)
        flat = [kind for stage in after.design.paths for kind in stage if kind != IDENTITY]
        assert flat == sorted(flat), "a block of the late kind stands before another"
        for _, other in actions(before.design, scores, LATE):
            gain = table.latency_ms(other) < after.latency_ms, accuracy(other) > after.accuracy
            assert not all(gain), "the step taken is dominated by another one"


def test_gains_in_accuracy_prefer_the_larger_saving():
    design = Design((16,), (("pool",),))
    small = Step("a", design, 1.0, 0.9, saved_ms=1.0, drop=-0.1)
    large = Step("b", design, 1.0, 0.9, saved_ms=2.0, drop=-0.1)
    assert large.cost() < small.cost()


def test_a_budget_out_of_reach_is_an_error():
    start = first_design((32, 64), SCORES, LATE)
    with pytest.raises(BudgetError, match="over the budget"):
        slim(start, SCORES, linear_table(), lambda design: 0.5, 0.01, late=LATE)


def test_weights_add_up_to_one_and_cold_ones_are_one_hot():
    path = MetaPath({"a": nn.Identity(), "b": nn.Identity()})
    assert path.train().weights(0.7).sum().item() == pytest.approx(1.0)
    assert len({tuple(path.weights(1.0).tolist()) for _ in range(3)}) == 3
    path.alpha.data = torch.tensor([0.1, 0.3, 0.2])
    assert path.eval().weights(1e-4).tolist() == [0.0, 1.0, 0.0]
    assert path.scores() == pytest.approx({"a": 0.1, "b": 0.3, IDENTITY: 0.2})


def tiny_supernet() -> Supernet:
    torch.manual_seed(0)

    def conv(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())

    stages = [[{"pool": conv(4)}], [{"pool": conv(8), "token": conv(8)} for _ in range(2)]]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    embeds = [nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)]
    return Supernet(embeds, stages, head, (4, 8), temperature=(2.0, 0.5), anneal_steps=2)


def test_every_score_gets_a_gradient_and_the_temperature_falls():
    net = tiny_supernet().train()
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters() if p.ndim == 1)
    assert net.seen.item() == 1 and net.magnitude1.sum() > 0
    assert net.eval()(torch.zeros(1, 1, 8, 8)).shape == (1, 3) and net.seen.item() == 1


@torch.no_grad()
def test_adopting_a_design_runs_it_alone_and_can_be_undone():
    net = tiny_supernet().train()
    x = torch.randn(2, 1, 8, 8)
    net(x)
    before = net.eval()(x)
    net.adopt(Design((4, 4), (("pool",), (IDENTITY, "token"))))
    y = net.stages[0][0].candidates["pool"](net.embeds[0](x))
    keep = torch.zeros(8).index_fill_(0, net.magnitude1.topk(4).indices, 1.0)[:, None, None]
    y = keep * net.stages[1][1].candidates["token"](keep * net.embeds[1](y))
    torch.testing.assert_close(net(x), net.head(y))
    net.adopt(None)
    torch.testing.assert_close(net(x), before)


def test_refreshed_norms_hold_the_statistics_of_the_images():
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5)).eval()
    x = 3 + 2 * torch.randn(4, 2, 16, 16)
    refresh_norms(net, [x[:2], x[2:]])
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))
    assert net[0].momentum == 0.1 and not any(module.training for module in net.modules())


def test_possible_pieces_cover_every_step():
    pieces = possible_pieces((32, 40), (("pool",), ("token",)), width_step=8, min_width=16)
    assert Piece(EMBED, 1, 24, 16) in pieces and Piece("token", 1, 16, 16) in pieces
    assert len(pieces) == len(set(pieces)) == 3 + 3 + 3 * 4 + 4
