"""The examples of docs/operators.md run, and every built operator has its row and its section."""

import re
from pathlib import Path

import pytest

from featherweight.registry import list_ops

PAGE = (Path(__file__).parents[1] / "docs" / "operators.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number):
    """Where a comment behind an expression gives a shape or a number, it is compared."""
    names: dict = {}
    for line in EXAMPLES[number].splitlines():
        code, _, comment = line.partition("  # ")
        told = re.match(r"\((\d+(, \d+)*)\)|\d+", comment)
        if told and " = " not in code:
            value = eval(code, names)
            assert (tuple(value) if told[0][0] == "(" else value) == eval(told[0])
        else:
            exec(code, names)


@pytest.mark.parametrize("slug", list_ops())
def test_every_operator_is_on_the_page(slug):
    assert f"| `{slug}` |" in PAGE and re.search(rf"^## .*`{slug}`", PAGE, re.MULTILINE)
