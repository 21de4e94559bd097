"""Every operator is at hand as `featherweight.ops.NAME`."""

import pytest

from featherweight import ops
from featherweight.registry import get_operators, list_ops


@pytest.mark.parametrize("slug", list_ops())
def test_operators_load_from_the_folder(slug):
    for operator in get_operators(slug).values():
        assert getattr(ops, operator.__name__) is operator
        assert operator.__name__ in dir(ops)


def test_a_name_that_is_none_fails_as_usual():
    with pytest.raises(AttributeError, match="no attribute 'NoConv2d'"):
        _ = ops.NoConv2d
