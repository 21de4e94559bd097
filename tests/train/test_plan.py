"""Planning and evaluation."""

import math

import pytest
import torch
from tiny_training import digits, tiny_net

from featherweight.train.batches import Batches
from featherweight.train.plan import evaluate, make_plan, score
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
