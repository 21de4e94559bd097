"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from featherweight.train.memory import keep_freed_memory

FAULTS = """
import resource, sys
from featherweight.train.memory import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    raise SystemExit("not set")
size_small, size_large = 6_000_000, 9_000_000
for _ in range(10):
    b"x" * size_small
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    b"x" * size_small
    b"x" * size_large
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    """Count the pages that the system had to clear for a hundred large blocks."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="needs the GNU C library")
def test_large_blocks_are_used_again():
    assert faults("kept") < faults("default") / 2


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_left_alone(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert not keep_freed_memory()
