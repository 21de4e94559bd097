"""Tests of the base of all classifiers."""

import copy

import pytest
import torch
from torch import nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct
from featherweight.errors import CheckpointError, UsageError


def net(**kwargs) -> Classifier:
    torch.manual_seed(0)
    body = nn.Sequential(ConvNormAct(3, 4, 3, 2), ConvNormAct(4, 6, 3, 2), ConvNormAct(6, 8, 3))
    return Classifier(body, [(4, 2), (6, 4), (8, 4)], 8, **{"num_classes": 5, **kwargs}).eval()


def test_attributes_and_head():
    model = net(in_chans=3, input_size=(3, 32, 32))
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (5, 8, 8)
    assert model.default_cfg["input_size"] == (3, 32, 32) and model.default_cfg["num_classes"] == 5
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    x = torch.rand(2, 3, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, 8, 4, 4)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    torch.testing.assert_close(model.forward_head(features), model(x))


def test_last_map_of_each_resolution_is_a_feature():
    model = net()
    assert [(i["num_chs"], i["reduction"], i["module"]) for i in model.feature_info] == [
        (4, 2, "body.0"),
        (8, 4, "body.2"),
    ]
    x = torch.rand(1, 3, 16, 16)
    maps = model.feature_extractor()(x)
    assert [m.shape[1:] for m in maps] == [(4, 8, 8), (8, 4, 4)]
    torch.testing.assert_close(maps[-1], model.forward_features(x))
    assert len(model.feature_extractor([0]).body) == 1
    assert model.feature_extractor([-1]).body[0].conv.weight is model.body[0].conv.weight
    with pytest.raises(UsageError, match="there are 2"):
        model.feature_extractor([2])


def test_reset_classifier_and_pooling():
    model = net(num_classes=0)
    x = torch.rand(2, 3, 16, 16)
    assert model(x).shape == (2, 8)
    model.reset_classifier(3, "max")
    torch.testing.assert_close(model.forward_head(torch.ones(1, 8, 2, 2), pre_logits=True), torch.ones(1, 8))
    assert model(x).shape == (2, 3) and model.default_cfg["num_classes"] == 3
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 8, 4, 4)
    with pytest.raises(UsageError, match="sum"):
        model.reset_classifier(3, "sum")


def test_classes_need_pooling():
    with pytest.raises(UsageError, match="pooled features"):
        net(global_pool="")
    model = net(global_pool="", num_classes=0)
    with pytest.raises(UsageError, match="pooled features"):
        model.reset_classifier(3)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 8, 4, 4)
    model.reset_classifier(3, "avg")
    with pytest.raises(UsageError, match="pooled features"):
        model.reset_classifier(3, "")
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_feature_maps_by_number_and_their_columns():
    model = net()
    assert model.feature_extractor(1).feature_info.module_name() == ["body.2"]
    assert model.feature_extractor((1, 0)).feature_info.channels() == [4, 8]
    assert model.feature_info.reduction() == [2, 4]
    for wrong in ((), 0, 3, (-3,)):
        with pytest.raises(UsageError, match="there are 2"):
            model.feature_extractor(wrong)


def test_gradient_checkpointing_changes_nothing():
    model, x = net().train(), torch.rand(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    twin.body[1].norm.eval()
    model.body[1].norm.eval()
    for network in (model, twin):
        network(x).square().sum().backward()
    for expected, found in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    # Statistics, and the counts of batches, follow each batch once.
    for (name, expected), found in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(found, expected), name
    assert {unit.norm.momentum for unit in twin.body} == {0.1}
    extractor = twin.feature_extractor()
    extractor.set_grad_checkpointing()
    assert [m.grad_fn is not None for m in extractor(x)] == [True, True]
    for found, expected in zip(extractor(x), model.feature_extractor()(x), strict=True):
        torch.testing.assert_close(found, expected)


def test_load_official_checks_what_it_is_given():
    model = net()
    state = model.state_dict()
    twin = net()
    twin.load_official({"model_ema": {f"module.{k}": v for k, v in state.items()}, "model": {"x": state}})
    lean = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    twin.load_official(lean)
    for bad in ({}, {"epoch": 3}, {**state, "more": torch.zeros(1)}, dict(list(state.items())[2:])):
        with pytest.raises(CheckpointError):
            twin.load_official(bad)
    with pytest.raises(CheckpointError):
        net(num_classes=6).load_official(state)
    other = net(num_classes=6)
    fresh = other.classifier.weight.clone()
    other.load_official(state, adapt=True)
    assert torch.equal(other.classifier.weight, fresh)
    assert torch.equal(other.body[2].conv.weight, model.body[2].conv.weight)
