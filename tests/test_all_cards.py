"""The catalogue as a whole: every planned system has a card, and every card can be shown to a user."""

import re
import subprocess
import sys
from collections import Counter

import pytest

from featherweight.cards import KINDS, Card, Figure, all_cards

SYSTEMS = {
    "op": "fdconv tvconv phnn weighted_conv hyperzzw flashfftconv flashbutterfly deform_codesign",
    "model": (
        "mobilenetv2 ghostnetv2 inceptionnext simplenet sugarcane_shufflenet lsnet emov2 efficientformer "
        "unireplknet spartan affnet mobilemamba convfirst osnet imdn cfsr dsclora lightm_unet "
        "reversible_unet3d pkyolo codenet powerbev bev_lio sdpose"
    ),
    "method": (
        "quant_whitepaper sparse_convnets precropping apriori_compression cbnet dual_complementary "
        "dual_input_cnn fedconv clr xscore token_compression pyramiddrop"
    ),
}
KIND_OF = {slug: kind for kind, slugs in SYSTEMS.items() for slug in slugs.split()}
CARDS = list(all_cards().values())

every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)


def figures(card: Card) -> list[Figure]:
    return [*card.claimed, *(figure for variant in card.variants.values() for figure in variant.claimed)]


def test_list_is_complete() -> None:
    assert len(KIND_OF) == 44


@pytest.mark.parametrize("slug", KIND_OF)
def test_system_has_a_card(slug: str) -> None:
    assert slug in all_cards()
    assert all_cards()[slug].kind == KIND_OF[slug]


@every_card
def test_card_lies_in_its_folder(card: Card) -> None:
    assert card.path.stem == card.slug
    assert card.path.parent.name == KINDS[card.kind]


@every_card
def test_texts_are_present(card: Card) -> None:
    texts = (card.task, card.title, card.paper, card.summary, card.official_repo, card.official_licence)
    assert all(text.strip() for text in texts)
    assert card.official_repo == "none" or re.fullmatch(r"[\w.-]+/[\w.-]+", card.official_repo)


@every_card
def test_paper_identifier_is_well_formed(card: Card) -> None:
    if card.paper.lower().startswith("arxiv"):
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", card.paper)


@every_card
def test_figures_are_attributed(card: Card) -> None:
    for figure in figures(card):
        assert figure.what.strip() and figure.unit.strip() and figure.where.strip(), figure
        assert figure.confirmed or figure.note.strip(), f"unconfirmed without a reason: {figure}"


@every_card
def test_no_figure_is_stated_twice(card: Card) -> None:
    for group in (card.claimed, *(variant.claimed for variant in card.variants.values())):
        counts = Counter(
            (figure.what, figure.data, figure.where, figure.unit, figure.value) for figure in group
        )
        assert [key for key, count in counts.items() if count > 1] == []


@every_card
def test_counted_and_weights_are_usable(card: Card) -> None:
    for variant in card.variants.values():
        assert set(variant.counted) <= {"params", "macs"}
        assert all(isinstance(count, int) and count > 0 for count in variant.counted.values())
        assert all(weights.url.startswith("https://") and weights.layout for weights in variant.weights)
        assert all(size > 0 for size in variant.input)


def test_variant_names_are_lower_case_and_unique() -> None:
    names = [name for card in CARDS for name in card.variants]
    assert [name for name in names if not re.fullmatch(r"[a-z][a-z0-9_]*", name)] == []
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_reading_the_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from featherweight.cards import all_cards; all_cards(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
