"""Which networks suit a data set."""

import pytest
import torch

from featherweight.cards import all_cards
from featherweight.errors import UsageError
from featherweight.registry import card_of
from featherweight.workflows.candidates import Candidate, list_candidates


def test_small_images_keep_their_resolution_and_large_ones_do_not():
    small = list_candidates(32, ["mobilenetv2_100"])
    large = list_candidates(224, ["mobilenetv2_100"])
    assert {candidate.stem_stride for candidate in small if candidate.input <= 48} == {1}
    assert {candidate.stem_stride for candidate in large} == {2}
    assert max(candidate.input for candidate in large) == 224


def test_inputs_stay_near_the_size_of_the_images():
    assert all(16 <= candidate.input <= 32 for candidate in list_candidates(8))
    assert all(candidate.input <= 48 for candidate in list_candidates(32))


def test_every_network_with_a_variant_under_6m_parameters_is_a_candidate():
    small = {
        card.slug
        for card in all_cards().values()
        if card.kind == "model"
        and card.task in ("classify", "reidentify")
        and card.module_path
        and any(v.counted and v.counted["params"] < 6e6 for v in card.variants.values())
    }
    assert small == {card_of(candidate.model).slug for candidate in list_candidates(224)}


def test_every_label_is_unique():
    labels = [candidate.label for candidate in list_candidates(32)]
    assert len(labels) == len(set(labels)) > 10


def test_a_candidate_builds_what_it_says():
    model = Candidate("simplenet_cifar_310k", 0.5, 16, 2).build(num_classes=7, in_chans=1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.num_classes == 7


@pytest.mark.parametrize("models", [[], ["no_such_network"]])
def test_wrong_names_are_usage_errors(models):
    with pytest.raises(UsageError):
        list_candidates(32, models)


def test_timm_networks_pass_through():
    assert {candidate.model for candidate in list_candidates(64, ["timm/mobilenetv3_small_050"])} == {
        "timm/mobilenetv3_small_050"
    }
