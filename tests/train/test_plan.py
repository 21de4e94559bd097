"""Planning and evaluation."""

import math

import pytest
import torch
from tiny_training import digits, tiny_net

from featherweight.train.batches import Batches
from featherweight.train.loop import fit_model
from featherweight.train.plan import Plan, evaluate, make_plan, score
from featherweight.train.recipe import Recipe


def test_evaluate_restores_the_mode_and_needs_no_full_batch():
    model, (_, val) = tiny_net().train(), digits()
    assert evaluate(model, val, 64).shape == (200, 10) and model.training
    assert abs(evaluate(model, val, 64) - evaluate(model, val, 7)).max() < 1e-5
    accuracy, loss = score(evaluate(model, val), val.labels)
    assert 0 <= accuracy < 0.5 and loss == pytest.approx(math.log(10), rel=0.2)


def test_planning_leaves_the_model_untouched_and_caps_the_epochs():
    import time

    (train, val), model = digits(), tiny_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe(epochs=2.5, time_budget_s=1000, batch_size=32, bf16=False)
    batches = Batches(train, recipe, None, 10)
    plan = make_plan(model, batches, val, recipe, None, bf16=False, began=time.perf_counter())
    assert plan.total_steps == 25 and plan.steps_per_epoch == 10 and plan.eval_every >= 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_corrected_plan_fits_the_time_and_makes_no_jump():
    plan = Plan(
        total_steps=1000, steps_per_epoch=10, bf16=False, eval_every=1, threads=1, world=1, began_s=2.0
    )
    assert plan.is_due(20, 4.0, 100.0)
    assert not plan.is_due(1, 1.0, 100.0)
    slower = plan.corrected(100, 52.0, 100.0)
    # 0.5 s a step so far; 98 % of 100 s leave 46 s.
    assert slower.total_steps == 192
    assert slower.position(100) / slower.total_steps == pytest.approx(0.1)
    assert slower.position(192) == pytest.approx(192)
    assert not slower.is_due(100, 52.0, 100.0)
    assert slower.is_due(110, 66.0, 100.0)


def test_a_first_estimate_far_too_short_is_made_up_for(tmp_path, monkeypatch):
    monkeypatch.setattr("featherweight.train.loop.make_plan", lambda *_, **__: Plan(2, 4, False, 1000, 1, 1))
    recipe = Recipe(time_budget_s=2.0, batch_size=16, bf16=False)
    result = fit_model(tiny_net(), *digits(), recipe, None, tmp_path)
    assert result.steps > 4
