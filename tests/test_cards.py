"""Tests of the cards: the loader itself, and what every card in the house must hold."""

import subprocess
import sys

import pytest

from featherweight.cards import KINDS, Figure, all_cards, get_card, load_card
from featherweight.errors import DataError, UsageError

CARD = """
[system]
slug = "thing"
kind = "model"
task = "classify"
title = "Thing"
paper = "arXiv:0000.00000"
summary = "Does a thing."
official = { repo = "a/b", licence = "MIT" }
[variant.thing_100]
input = [3, 32, 32]
counted = { params = 10, macs = 20 }
claimed = [{ what = "top1", value = 70.0, unit = "%", where = "table 1" }]
weights = [{ url = "https://example.org/w", layout = "own" }]
[search]
variants = ["thing_100"]
widths = [0.5, 1.0]
inputs = [32]
recipe = { optimizer = "sgd", lr = 0.1 }
"""


def write(tmp_path, text):
    path = tmp_path / "thing.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_card_round_trip(tmp_path):
    card = load_card(write(tmp_path, CARD))
    variant = card.variants["thing_100"]
    assert (card.slug, card.module, card.official_licence) == ("thing", "thing", "MIT")
    assert variant.input == (3, 32, 32) and variant.counted["macs"] == 20 and variant.num_classes == 1000
    assert variant.claimed == (Figure("top1", 70.0, "%", "table 1"),)
    assert card.search.widths == (0.5, 1.0) and card.search.recipe["lr"] == 0.1
    assert card.module_name == "featherweight.models.thing" and card.module_path is None
    assert card.networks_name == card.module_name and card.networks_path is None


def test_an_operator_may_name_the_module_of_its_networks(tmp_path):
    text = CARD.replace('kind = "model"', 'kind = "op"\nnetworks = "simplenet"')
    card = load_card(write(tmp_path, text.replace('task = "classify"', 'task = "operator"')))
    assert card.networks_name == "featherweight.models.simplenet"
    assert card.networks_path.name == "simplenet.py" and card.networks_task == "classify"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("[system]", "[system"),
        lambda text: text.replace('title = "Thing"\n', ""),
        lambda text: text.replace('kind = "model"', 'kind = "engine"'),
        lambda text: text.replace("[search]", "[hunt]"),
        lambda text: text.replace("widths", "width"),
        lambda text: text.replace('where = "table 1"', 'page = "1"'),
    ],
)
def test_bad_card_names_the_file(tmp_path, change):
    with pytest.raises(DataError, match=r"thing\.toml"):
        load_card(write(tmp_path, change(CARD)))


def test_unknown_slug_suggests_one():
    with pytest.raises(UsageError, match="Did you mean mobilenetv2"):
        get_card("mobilenet_v2")


def test_reading_cards_needs_no_torch():
    code = "import sys, featherweight.registry as r; r.list_models(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("slug", list(all_cards()))
def test_card_is_whole(slug):
    card = all_cards()[slug]
    assert card.path.stem == slug and card.path.parent.name == KINDS[card.kind]
    assert card.title and card.paper and card.summary and card.task
    for variant in card.variants.values():
        assert variant.name == variant.name.lower()
        assert all(isinstance(value, int) and value >= 0 for value in variant.counted.values()), variant.name
    if card.search:
        assert set(card.search.variants) <= set(card.variants)
        assert all(0 < width <= 4 for width in card.search.widths) and card.search.inputs


def test_variant_names_are_unique():
    names = [name for card in all_cards().values() for name in card.variants]
    assert len(names) == len(set(names))
