"""ONNX's own node cases: one of each operator by default, all of them among the slow tests."""

import pytest
from backend_nodes import LIST, Case, build_cases, compare, load_cases, reason_of

ROWS = [line.rstrip("\n").split("\t") for line in LIST.read_text(encoding="utf-8").splitlines()]
PASSING = {name: op for name, op, outcome, _ in ROWS if outcome == "pass"}
FIRST = {op: name for name, op in reversed(PASSING.items())}
CHUNKS = 12
"""The slow cases are built in so many libraries, so that a failure to build is narrowed down."""


@pytest.fixture(scope="module")
def cases():
    found = load_cases()
    listed = {row[0] for row in ROWS}
    if listed != set(found):
        pytest.skip("this ONNX has other node cases than the list; run tests/compiler/backend_nodes.py")
    return found


def check(cases: dict[str, Case | str], names: list[str], folder, **build) -> list[str]:
    chosen = {name: cases[name] for name in names}
    refused = build_cases(chosen, folder, **build)
    problems = [f"{name}: {reason}" for name, reason in refused.items()]
    for index, (name, case) in enumerate(chosen.items()):
        if name not in refused:
            problem = compare(case, folder, index)
            problems += [f"{name}: {problem}"] if problem else []
    return problems


def test_the_list_has_no_failure():
    assert {row[2] for row in ROWS} == {"pass", "skip"}
    assert len(PASSING) > 1000
    assert not [row for row in ROWS if row[2] == "skip" and not row[3]], "a skip without a reason"


def test_one_case_of_each_operator(cases, tmp_path):
    assert check(cases, list(FIRST.values()), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_listed_case(cases, chunk, tmp_path):
    assert check(cases, list(PASSING)[chunk::CHUNKS], tmp_path) == []


@pytest.mark.slow
def test_skipped_cases_are_still_refused_for_the_listed_reason(cases, tmp_path):
    rows = [row for row in ROWS if row[2] == "skip" and isinstance(cases[row[0]], Case)]
    refused = build_cases({row[0]: cases[row[0]] for row in rows}, tmp_path, build=False)
    assert {row[0]: row[3] for row in rows} == {name: reason_of(text) for name, text in refused.items()}


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_portable_c99_gives_the_same(cases, chunk, tmp_path):
    assert check(cases, list(FIRST.values())[chunk::4], tmp_path, target="generic-c") == []
