"""The same checks over every network that has a card and code, without a line for any single one.

The quick run takes the smallest variant of each card; the slow run takes the others as well.
"""

import ast
import copy
import functools
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featherweight.cards import KINDS, Card, all_cards
from featherweight.errors import UsageError
from featherweight.measure.count import count
from featherweight.registry import create_model
from featherweight.shrink.fold import fold_batchnorm

UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
BUILT = [card for card in all_cards().values() if card.module_path]
MODELS = [card for card in BUILT if card.networks_path]
VARIANTS = [(card, name) for card in MODELS for name in card.variants]
NAMES = [name for _, name in VARIANTS]
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), None)


def smallest(card: Card) -> str:
    sizes = {name: (v.counted.get("macs", 0), name) for name, v in card.variants.items()}
    return min(sizes, key=sizes.get)


def names_of(task: str | None = None) -> list:
    """The smallest variant of each card as it is, the others marked slow."""
    return [
        name if name == smallest(card) else pytest.param(name, marks=pytest.mark.slow)
        for card, name in VARIANTS
        if task in (None, card.networks_task)
    ]


@functools.cache
def input_size(name: str) -> tuple[int, int, int]:
    """The card's input, shrunk: a third or so of 224 pixels keeps every layer at work."""
    card = next(card for card, variant in VARIANTS if variant == name)
    channels, *sides = card.variants[name].input
    return (channels, *(side if side <= 64 else max(64, side * 2 // 7 // 32 * 32) for side in sides))


def build(name: str, **kwargs) -> nn.Module:
    """Build with fixed, not trivial weights and statistics."""
    torch.manual_seed(0)
    model = create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(name: str, batch: int = 2, **changes) -> torch.Tensor:
    channels, *sides = input_size(name)
    generator = torch.Generator().manual_seed(1)
    grow = changes.get("grow", 0)
    shape = (batch, changes.get("channels", channels), *(side + grow for side in sides))
    return torch.randn(shape, generator=generator)


def relative(a, b) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))


@pytest.mark.parametrize("name", NAMES)
def test_counted_figures_are_exact(name):
    card = next(card for card, variant in VARIANTS if variant == name)
    variant = card.variants[name]
    assert variant.counted, f"the card of {name} counts nothing"
    with torch.device("meta"):
        model = create_model(name)
    found = count(model, variant.input)
    assert {key: getattr(found, key) for key in variant.counted} == dict(variant.counted)


@pytest.mark.parametrize("name", [name for card, name in VARIANTS if card.variants[name].fused])
def test_fused_figures_are_exact(name):
    variant = next(card for card, variant in VARIANTS if variant == name).variants[name]
    found = count(create_model(name).eval().fuse(), variant.input)
    assert {key: getattr(found, key) for key in variant.fused} == dict(variant.fused)


@pytest.mark.parametrize("name", [smallest(card) for card in MODELS if card.variants[smallest(card)].fused])
@torch.no_grad()
def test_fusing_keeps_the_answers_also_after_norms_were_folded(name):
    model, x = build(name), images(name)
    expected = model(x)
    assert relative(fold_batchnorm(model).fuse()(x), expected) < 1e-4
    assert relative(model.fuse()(x), expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_met_or_explained(name):
    card = next(card for card, variant in VARIANTS if variant == name)
    variant = card.variants[name]
    for figure in variant.claimed:
        if figure.what not in variant.counted or not figure.confirmed:
            continue
        unit = UNITS[figure.unit]
        decimals = len(str(figure.value).partition(".")[2])
        rounding = 0.5 * 10**-decimals * unit * (1 + 1e-9)
        met = abs(variant.counted[figure.what] - figure.value * unit) <= rounding
        assert met or variant.explain, f"{name}: {figure.what} {figure.value} {figure.unit} is unexplained"


@pytest.mark.parametrize("name", names_of("classify"))
@torch.no_grad()
def test_shapes(name):
    classes = 7
    model = build(name, num_classes=classes)
    for batch, grow in ((1, 0), (3, 32)):
        x = images(name, batch, grow=grow)
        assert model(x).shape == (batch, classes)
        features = model.forward_features(x)
        assert features.shape[:2] == (batch, model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (batch, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Linear)
    model.reset_classifier(3)
    assert model(images(name)).shape == (2, 3)
    assert build(name, num_classes=0)(images(name)).shape == (2, model.head_hidden_size)
    assert build(name, in_chans=1, num_classes=classes)(images(name, channels=1)).shape == (2, classes)


@pytest.mark.parametrize("name", names_of("classify"))
@torch.no_grad()
def test_scaling_arguments(name):
    narrow = build(name, width=0.5, num_classes=4)
    full = build(name, num_classes=4)
    size = [sum(p.numel() for p in model.parameters()) for model in (narrow, full)]
    assert size[0] < size[1]
    fine = build(name, stem_stride=1, width=0.5, num_classes=4)
    assert fine(images(name)).shape == (2, 4)
    assert fine.feature_info[-1]["reduction"] <= narrow.feature_info[-1]["reduction"]


@pytest.mark.parametrize("name", names_of("classify"))
@torch.no_grad()
def test_features_contract(name):
    model = build(name)
    x = images(name)
    extractor = build(name, features_only=True)
    maps = extractor(x)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert [math.ceil(s / info["reduction"]) for s in x.shape[2:]] == list(found.shape[2:])
        model.get_submodule(info["module"])
    assert model.default_cfg["num_classes"] == model.num_classes
    for key in ("first_conv", "classifier"):
        model.get_submodule(model.default_cfg[key])


@pytest.mark.parametrize("name", names_of())
def test_every_parameter_gets_a_gradient(name):
    model = build(name).train()
    model(images(name, 4)).square().sum().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", names_of())
@torch.no_grad()
def test_answer_depends_on_its_own_image_and_not_on_the_memory_layout(name):
    model = build(name)
    x = images(name, 3)
    together = model(x)
    assert relative(model(x[1:2]), together[1:2]) < 1e-4
    turned = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert relative(turned, together) < 1e-4


@pytest.mark.parametrize("name", names_of())
@torch.no_grad()
def test_safetensors_round_trip(name, tmp_path):
    model = build(name)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    twin = create_model(name).eval()
    twin.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(twin(images(name)), model(images(name)))


@pytest.mark.parametrize("name", names_of())
@torch.no_grad()
def test_bfloat16_runs(name):
    model = build(name)
    expected = model(images(name))
    found = model.to(torch.bfloat16)(images(name).to(torch.bfloat16))
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape and found.isfinite().all()


@pytest.mark.parametrize("name", names_of())
@torch.no_grad()
def test_torch_export_with_dynamic_batch(name):
    model = build(name)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images(name, 2),), dynamic_shapes=(batch,))
    x = images(name, 5)
    assert relative(program.module()(x), model(x)) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not CXX, reason="torch.compile needs a C++ compiler: none at $CXX, no g++, no clang++")
@pytest.mark.parametrize("mode", ["inference", "eval", "train"])
@pytest.mark.parametrize("name", [smallest(card) for card in MODELS])
def test_compiled_network_gives_the_same_answers_and_gradients(name, mode):
    torch.compiler.reset()
    model = build(name).train(mode == "train")
    model.drop_rate = 0.0  # the compiler draws other random numbers
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    x, found = images(name, 4), []
    with torch.set_grad_enabled(mode != "inference"):
        for network in (model, torch.compile(copy.deepcopy(model))):
            answers = network(x)
            if mode != "inference":
                answers.square().mean().backward()
            found.append((answers.detach(), [p.grad for p in network.parameters()]))
    (expected, gradients), (answers, compiled) = found
    assert relative(answers, expected) < 1e-3
    if mode != "inference":
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        errors = [float((a - b).abs().max()) for a, b in zip(compiled, gradients, strict=True)]
        assert max(errors) < 1e-2 * largest


@pytest.mark.parametrize("name", names_of())
@torch.no_grad()
def test_onnx_parity_with_dynamic_batch(name, tmp_path):
    onnx = pytest.importorskip("featherweight.export.onnx", reason="export/onnx.py is not there yet")
    model = build(name)
    onnx.export_onnx(model, tmp_path / "m.onnx", input_size(name))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    for batch in (1, 3):
        x = images(name, batch)
        assert relative(onnx.run_onnx(tmp_path / "m.onnx", x.numpy()), model(x).numpy()) < 1e-4


@pytest.mark.parametrize("name", names_of("restore"))
@torch.no_grad()
def test_restored_shapes(name):
    model = build(name)
    assert model.default_cfg["scale"] == model.scale and model.default_cfg["num_classes"] == 0
    for batch, grow in ((1, 0), (3, 5), (2, 1 - min(input_size(name)[1:]))):
        x = images(name, batch, grow=grow)
        expected = (batch, x.shape[1], *(model.scale * side for side in x.shape[2:]))
        assert model(x).shape == expected
    features = model.forward_features(images(name))
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True) is features
    grey = build(name, in_chans=1)(images(name, channels=1))
    assert grey.shape[1] == 1 and isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0)
    for argument in ({"num_classes": 3}, {"drop_rate": 0.1}, {"drop_path_rate": 0.1}, {"global_pool": "avg"}):
        with pytest.raises(UsageError, match="restores images"):
            create_model(name, **argument)


@pytest.mark.parametrize("name", names_of("restore"))
@torch.no_grad()
def test_maps_contract(name):
    model, x = build(name), images(name, 1, grow=3)
    maps = build(name, features_only=True)(x)
    assert len(maps) == len(model.feature_info)
    for found, info in zip(maps, model.feature_info, strict=True):
        assert found.shape[1] == info["num_chs"]
        assert [math.ceil(s / info["reduction"]) for s in x.shape[2:]] == list(found.shape[2:])
        model.get_submodule(info["module"])
    chosen = build(name, features_only=True, out_indices=(1, 0))(x)
    assert [torch.equal(a, b) for a, b in zip(chosen, maps, strict=False)] == [True, True]
    with pytest.raises(UsageError, match="Feature maps"):
        create_model(name, features_only=True, out_indices=(99,))


@pytest.mark.parametrize("name", names_of("restore"))
@torch.no_grad()
def test_fused_restoration_gives_the_same(name):
    model, x = build(name), images(name, 1)
    expected, modules = model(x), len(list(model.modules()))
    assert model.fuse() is model and relative(model(x), expected) < 1e-4
    assert len(list(model.modules())) <= modules
    twin = create_model(name).eval()
    twin.load_official(model.state_dict())
    assert relative(twin(x), expected) < 1e-4


@pytest.mark.parametrize("name", names_of("restore"))
def test_checkpointing_keeps_the_gradients(name):
    model, x = build(name).train(), images(name, 1)[..., :24, :20]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(relative(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", names_of("restore"))
@torch.no_grad()
def test_open_sizes_in_torch_export_and_onnx(name, tmp_path):
    onnx = pytest.importorskip("featherweight.export.onnx", reason="export/onnx.py is not there yet")
    model = build(name).fuse()
    sizes = {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    example = images(name, 2)[..., :24, :28].contiguous()
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim("batch"), **sizes},)
    ).module()
    onnx.export_onnx(model, tmp_path / "m.onnx", tuple(example.shape[1:]), dynamic_size=True)
    for batch, height, width in ((1, 31, 16), (3, 12, 41)):
        x = images(name, batch)[..., :height, :width].contiguous()
        assert relative(program(x), model(x)) < 1e-4
        assert relative(onnx.run_onnx(tmp_path / "m.onnx", x.numpy()), model(x)) < 1e-4


@pytest.mark.parametrize("name", names_of("restore"))
@torch.no_grad()
def test_restoration_is_captured_in_one_graph(name):
    model = build(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((24, 28), (20, 33)):
        x = images(name, 1)[..., : size[0], : size[1]]
        assert relative(compiled(x), model(x)) < 1e-4


@pytest.mark.parametrize("card", BUILT, ids=lambda card: card.slug)
def test_docstring_sections(card):
    tree = ast.parse(card.module_path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert "\nShapes:\n" in text and "\nDiffers:\n" in text, f"{card.slug}: Shapes and Differs are missing"
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    assert all(ast.get_docstring(node) for node in public)
    assert card.module_path.is_relative_to(card.path.parent) and card.path.parent.name == KINDS[card.kind]
