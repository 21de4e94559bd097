"""The recipe's own checks."""

import pytest

from featherweight.errors import UsageError
from featherweight.train.recipe import Recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no length"),
        ({"epochs": 1, "optimizer": "sdg"}, "Did you mean sgd"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1, "label_smoothing": 2}, "label_smoothing=2"),
        ({"epochs": 1, "bf16": "maybe"}, "bf16='maybe'"),
    ],
)
def test_recipe_refuses_nonsense(fields, message):
    with pytest.raises(UsageError, match=message):
        Recipe(**fields)
