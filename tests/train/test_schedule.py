"""Learning rates, image sizes and optimiser groups against values by hand."""

import math

import pytest
from tiny_training import tiny_net

from featherweight.train.recipe import Recipe
from featherweight.train.schedule import build_optimizer, image_size, learning_rate


def test_cosine_schedule_values():
    recipe = Recipe(epochs=1, lr=2.0, warmup_fraction=0.2, final_lr_fraction=0.1)
    rates = [learning_rate(step, 10, recipe) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 7 / 8))))


def test_onecycle_is_a_triangle():
    recipe = Recipe(epochs=1, lr=1.0, warmup_fraction=0.5, schedule="onecycle")
    assert [learning_rate(step, 4, recipe) for step in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_image_schedule_goes_up_to_full_size():
    recipe = Recipe(epochs=1, image_schedule=((0.25, 16), (0.5, 24)))
    assert [image_size(step, 8, recipe) for step in range(8)] == [16, 16, 24, 24, None, None, None, None]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_do_not_decay(name):
    model = tiny_net()
    optimizer = build_optimizer(model, Recipe(epochs=1, optimizer=name, weight_decay=0.3))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.3 if p.ndim > 1 else 0.0) for p in model.parameters())
    assert len(decays) == len(list(model.parameters()))
