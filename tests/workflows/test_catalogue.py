"""Statuses follow from files, never from a word that somebody typed."""

import dataclasses
import json

import pytest

from featherweight.cards import all_cards, get_card
from featherweight.errors import UsageError
from featherweight.workflows import catalogue


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A system in a folder of its own, with an empty folder of results."""
    like = get_card("simplenet")  # read first: the cards are cached, and the folder below holds none
    monkeypatch.setattr("featherweight.cards.PACKAGE_ROOT", tmp_path)
    monkeypatch.setattr(catalogue, "results_folder", lambda: tmp_path / "results")
    (tmp_path / "models").mkdir()
    return dataclasses.replace(like, slug="demo", module="demo")


def write(folder, name, entry):
    (folder / "results" / name).mkdir(parents=True, exist_ok=True)
    (folder / "results" / name / "demo.json").write_text(json.dumps(entry))


def test_status_climbs_with_the_evidence(card, tmp_path):
    assert catalogue.status_of(card) == "planned"
    (tmp_path / "models" / "demo.py").write_text('"""Text."""\nx = 1\n')
    assert catalogue.status_of(card) == "implemented"
    parity = {"passed": ["test_parity"], "failed": [], "code": catalogue.code_digest(card)}
    write(tmp_path, "parity", parity)
    assert catalogue.status_of(card) == "verified"
    write(tmp_path, "reproductions", {"verdict": "inconclusive", "quick": False})
    assert catalogue.status_of(card) == "verified"
    write(tmp_path, "reproductions", {"verdict": "holds", "quick": True})
    assert catalogue.status_of(card) == "verified"
    write(tmp_path, "reproductions", {"verdict": "holds", "quick": False})
    assert catalogue.status_of(card) == "reproduced"
    write(tmp_path, "parity", {**parity, "failed": ["test_parity_of_b"]})
    assert catalogue.status_of(card) == "implemented"


def test_changed_code_loses_the_status_and_changed_comments_do_not(card, tmp_path):
    path = tmp_path / "models" / "demo.py"
    path.write_text('"""Text."""\nx = 1\n')
    before = catalogue.code_digest(card)
    path.write_text('"""Other text."""\n\n# why\nx  =  1\n')
    assert catalogue.code_digest(card) == before
    path.write_text('"""Text."""\nx = 2\n')
    assert catalogue.code_digest(card) != before


def test_rows_cover_every_card():
    assert [row["slug"] for row in catalogue.system_rows()] == list(all_cards())
    assert all(row["kind"] == "op" for row in catalogue.system_rows(kind="op"))


def test_markdown_has_one_row_per_system():
    text = catalogue.systems_markdown()
    assert all(text.count(f"| `{slug}`: ") == 1 for slug in all_cards())


@pytest.mark.parametrize("text", ["-1", "abc", "5X", "M", "nan"])
def test_counts_that_are_none(text):
    with pytest.raises(UsageError, match="not a count"):
        catalogue.parse_count(text)


def test_unknown_names_get_suggestions():
    with pytest.raises(UsageError, match="Did you mean simplenet"):
        catalogue.describe("simplnet")
    with pytest.raises(UsageError, match="No network matches"):
        catalogue.model_rows("qqqqq")
    with pytest.raises(UsageError, match="No task"):
        catalogue.model_rows(task="cook")


def test_describe_a_network_and_a_system():
    assert [v["name"] for v in catalogue.describe("mobilenetv2_100")["variants"]] == ["mobilenetv2_100"]
    assert len(catalogue.describe("mobilenetv2")["variants"]) >= 6
