"""ONNX's own node cases: one of each operator by default, all of them among the slow tests."""

import os
import subprocess
import sys

import pytest
from backend_nodes import LIST, Case, build_cases, compare, load_cases, reason_of

from featherweight.compiler.build import find_compiler, target_named

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


SANITIZED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from backend_nodes import compare, load_cases
cases = load_cases()
for index, name in enumerate(sys.argv[3:]):
    problem = compare(cases[name], Path(sys.argv[2]), index)
    assert not problem, f"{name}: {problem}"
"""


@pytest.mark.slow
def test_sanitizers_find_nothing(cases, tmp_path):
    compiler = find_compiler(target_named("native"))
    command = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("this compiler has no AddressSanitizer")
    names = list(FIRST.values())
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover", "-O1", "-g")
    assert build_cases({name: cases[name] for name in names}, tmp_path, extra=flags) == {}
    options = "detect_leaks=0:alloc_dealloc_mismatch=0"
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
    words = [sys.executable, "-c", SANITIZED, str(LIST.parent), str(tmp_path), *names]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
