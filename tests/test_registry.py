"""Tests of the registry: listing, suggestions, and the arguments of create_model."""

import pytest
import torch
from safetensors.torch import save_file

from featherweight.cards import all_cards
from featherweight.errors import UsageError
from featherweight.registry import card_of, create_model, get_builder, list_models

SMALL = "simplenet_cifar_310k"


def test_list_by_pattern_word_and_task():
    assert list_models("shufflenetv2_*") == [f"shufflenetv2_{w}" for w in ("050", "100", "150", "200")]
    assert "mobilenetv2_100" in list_models("v2_1") and list_models("nothing") == []
    assert set(list_models(task="classify")) <= set(list_models())
    assert set(list_models()) <= set(list_models(implemented=False))


def test_unknown_name_suggests_one():
    with pytest.raises(UsageError, match=r"Did you mean mobilenetv2_100.*featherweight list"):
        create_model("mobilenet_v2_100")
    assert card_of(SMALL).slug == "simplenet"


def test_planned_network_says_so():
    planned = [n for c in all_cards().values() if c.kind == "model" and not c.module_path for n in c.variants]
    if not planned:
        pytest.skip("every network is built")
    with pytest.raises(UsageError, match="planned"):
        get_builder(planned[0])


def test_arguments_have_timms_meaning(tmp_path):
    model = create_model(SMALL, num_classes=7, in_chans=1, drop_rate=0.3, global_pool="avg", width=0.5)
    assert (model.num_classes, model.global_pool, model.drop_rate) == (7, "avg", 0.3)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert create_model(SMALL).num_classes == 10
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    twin = create_model(SMALL, num_classes=7, in_chans=1, width=0.5, checkpoint_path=str(path))
    assert torch.equal(twin.classifier.weight, model.classifier.weight)


def test_features_only():
    model = create_model(SMALL, features_only=True, out_indices=(0, -1)).eval()
    maps = model(torch.zeros(2, 3, 32, 32))
    assert [m.shape[1:] for m in maps] == [(32, 32, 32), (64, 2, 2)]


def test_timm_passes_through():
    pytest.importorskip("timm", reason="the extra 'timm' is not installed")
    assert create_model("timm/mobilenetv2_035", num_classes=3).num_classes == 3
    assert create_model("timm/repvit_m0_9", num_classes=3).num_classes == 3  # takes no drop_path_rate
    with pytest.raises(UsageError, match="timm has no model"):
        create_model("timm/mobilenetv2_036")
