"""The reproduction machinery: verdicts, records, and the real entries in their quick form."""

import csv
import json
import sys
from pathlib import Path

import pytest

from featherweight.cli.main import main
from featherweight.errors import UsageError
from featherweight.workflows import reproduce as module

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"

ENTRY = """
from featherweight.workflows.reproduce import Reproduction
def reproduce(quick, data_root, seed, progress):
    progress("working")
    rows = [{"form": "a", "accuracy": "70 %"}, {"form": "b", "accuracy": "60 %"}]
    return Reproduction("demo", "a beats b", rows, "holds", "10 points", {"a": [0.7], "b": [0.6]}, {"seed":
    seed})
"""


@pytest.fixture
def demo(tmp_path, monkeypatch):
    (tmp_path / "demo.py").write_text(ENTRY)
    monkeypatch.setattr(module, "entries_folder", lambda: tmp_path)
    return tmp_path


def test_a_full_run_is_recorded_with_date_machine_and_command(demo):
    result = module.reproduce("demo", seed=3, out=demo / "out")
    entry = json.loads((demo / "out" / "demo.json").read_text())
    assert result.verdict == entry["verdict"] == "holds"
    assert entry["command"] == "featherweight reproduce demo --seed 3" and entry["setting"] == {"seed": 3}
    assert entry["date"].startswith("20") and entry["machine"]["cores"] >= 1
    assert [row["form"] for row in csv.DictReader((demo / "out" / "demo.csv").open())] == ["a", "b"]


def test_a_quick_run_gives_no_verdict(demo):
    assert module.reproduce("demo", quick=True, out=demo / "out").verdict == "inconclusive"
    assert json.loads((demo / "out" / "demo.json").read_text())["quick"] is True


def test_the_verb_prints_table_and_json(demo, capsys):
    words = ["reproduce", "demo", "--out", str(demo / "out")]
    assert main(words) == 0
    assert "Verdict: holds" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["a"] == [0.7]
    assert main(["reproduce"]) == 0
    assert capsys.readouterr().out == "demo\n"


def test_unknown_entries_are_refused(demo):
    with pytest.raises(UsageError, match="Did you mean demo"):
        module.reproduce("dmo")


def test_judgement_needs_every_seed_and_more_than_noise():
    assert module.judge([0.8, 0.79], [0.7, 0.8], 10_000) == "inconclusive"
    assert module.judge([0.71, 0.71], [0.70, 0.70], 100) == "inconclusive"
    assert module.judge([0.75, 0.76], [0.70, 0.71], 10_000) == "holds"
    assert module.overall(["holds", "inconclusive"]) == "inconclusive"
    assert module.overall(["holds", "does not hold"]) == "does not hold"


def test_the_plain_rival_of_simplenet_has_its_size():
    sys.path.insert(0, str(ROOT / "reproductions"))
    try:
        import simplenet as entry
    finally:
        sys.path.pop(0)
    ours, rival = (sum(p.numel() for p in build().parameters()) for build in (entry.simplenet, entry.plain))
    assert abs(rival / ours - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["mobilenetv2", "simplenet"])
def test_real_entries_run_quickly(slug, tmp_path):
    if not (SHARED / "cifar10").is_dir():
        pytest.skip(f"no data sets at {SHARED}")
    result = module.reproduce(slug, quick=True, data_root=SHARED, out=tmp_path)
    assert result.wall_s < 120 and all(0 <= a <= 1 for values in result.measured.values() for a in values)
