"""Run the parity tests of each system and record the result that `featherweight systems` reads.

A parity test is a test in `tests/<folder>/test_<slug>.py` whose name contains `parity`: it compares our code
with the official network or an independent reference. The record names the digest of the code it was made
for, so that a later change to the code takes the status *verified* away until this program has run again.

    python benchmarks/record_parity.py            # every implemented system
    python benchmarks/record_parity.py simplenet  # one
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from featherweight.cards import KINDS, Card, all_cards, get_card
from featherweight.files import atomic_write_json
from featherweight.measure.machine import machine
from featherweight.workflows.catalogue import code_digest, results_folder

ROOT = Path(__file__).resolve().parents[1]


def record(card: Card) -> dict[str, Any] | None:
    """Run the parity tests of one system and write its record; None where it has no such test."""
    tests = Path("tests") / KINDS[card.kind] / f"test_{card.module}.py"
    if card.module_path is None or not (ROOT / tests).exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", str(tests), "-k", "parity", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        outcomes = _outcomes(report)
    if not outcomes:
        return None
    result = {
        "slug": card.slug,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m pytest {tests} -k parity",
        "code": code_digest(card),
        **{
            kind: sorted(name for name, seen in outcomes.items() if seen == kind)
            for kind in ("passed", "failed")
        },
        "skipped": sorted(name for name, seen in outcomes.items() if seen == "skipped"),
        "machine": machine(),
    }
    atomic_write_json(results_folder() / "parity" / f"{card.slug}.json", result)
    return result


def _outcomes(report: Path) -> dict[str, str]:
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        failed = tags & {"failure", "error"}
        outcomes[case.get("name", "")] = "failed" if failed else "skipped" if "skipped" in tags else "passed"
    return outcomes


def main(slugs: list[str]) -> int:
    """Record the given systems, or all; the exit code is 1 if a parity test failed."""
    cards = [get_card(slug) for slug in slugs] or list(all_cards().values())
    failed = False
    for card in cards:
        result = record(card)
        if result:
            failed = failed or bool(result["failed"])
            counts = ", ".join(f"{len(result[kind])} {kind}" for kind in ("passed", "failed", "skipped"))
            print(f"{card.slug}: {counts}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
