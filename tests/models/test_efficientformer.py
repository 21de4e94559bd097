"""EfficientFormer: parity with the official file and timm, the two heads, the bias table, folding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import assert_parity, ruled_state
from torch import nn

from featherweight.errors import CheckpointError
from featherweight.models.efficientformer import (
    Attention,
    EfficientFormer,
    PoolBlock,
    TokenBlock,
    TokenStage,
    grid_distances,
)
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "efficientformer.npz"
VARIANTS = ["l1", pytest.param("l3", marks=pytest.mark.slow), pytest.param("l7", marks=pytest.mark.slow)]


def images() -> torch.Tensor:
    wave = np.sin(0.37 * np.arange(2 * 3 * 224 * 224) ** 1.05)
    return torch.from_numpy(wave).float().reshape(2, 3, 224, 224)


def official_state(variant: str) -> dict[str, torch.Tensor]:
    """The official keys in the official order, tables of positions and counters included."""
    shapes = json.loads(np.load(FIXTURE)[f"{variant}.keys"].tobytes())
    weights = {key: tuple(shape) for key, shape in shapes.items() if not key.endswith(("idxs", "tracked"))}
    state = ruled_state(weights)
    return {key: state.get(key, torch.zeros(shape, dtype=torch.long)) for key, shape in shapes.items()}


def gap(found: torch.Tensor, expected: np.ndarray) -> float:
    assert expected.std() > 1e-3, "the logits say nothing"
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parity_with_the_official_file(variant):
    recorded = np.load(FIXTURE)
    model = create_model(f"efficientformer_{variant}", num_classes=10)
    state = {f"module.{key}": value for key, value in official_state(variant).items()}
    model.load_official({"model": state, "epoch": 299})
    model.eval()
    assert gap(model(images()), recorded[f"{variant}.eval"]) < 1e-4
    model.set_distilled_training()
    label, teacher = model.train()(images())
    assert gap(label, recorded[f"{variant}.label"]) < 1e-4
    assert gap(teacher, recorded[f"{variant}.teacher"]) < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_with_timm(variant):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = timm.create_model(f"efficientformer_{variant}")
    for key, parameter in reference.named_parameters():
        if key.endswith(("gamma", "attention_biases")):
            nn.init.normal_(parameter, 0, 0.3)
    assert_parity(f"efficientformer_{variant}", reference, 224)


def test_one_head_takes_the_mean_of_two_and_other_classes_adapt():
    state = official_state("l1")
    single = create_model("efficientformer_l1", num_classes=10, distillation=False)
    single.load_official(state)
    assert torch.equal(single.classifier.bias, (state["head.bias"] + state["dist_head.bias"]) / 2)
    single.load_official({key: value for key, value in state.items() if not key.startswith("dist_head")})
    assert torch.equal(single.classifier.weight, state["head.weight"])
    other = create_model("efficientformer_l1", num_classes=3, in_chans=1)
    other.load_official(state, adapt=True)
    assert other.get_classifier().out_features == 3
    assert torch.equal(other.body[-1].weight, state["norm.weight"])
    with pytest.raises(CheckpointError, match="do not fit"):
        create_model("efficientformer_l3", num_classes=10).load_official(state)


def small(**kwargs) -> EfficientFormer:
    torch.manual_seed(0)
    model = EfficientFormer((16, 32), (2, 3), 2, num_classes=5, scale=0.5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, Attention):
            nn.init.normal_(module.biases)
    return model.eval()


@torch.no_grad()
def test_attention_equals_a_loop_over_heads_and_tokens():
    torch.manual_seed(0)
    layer, grid = Attention(12, heads=2).eval(), (7, 7)
    nn.init.normal_(layer.biases)
    x = torch.randn(1, 49, 12)
    found = layer(x, grid, grid_distances(grid, x.device))
    rows = layer.qkv(x)[0].reshape(49, 2, 192)
    mixed = torch.zeros(49, 2, 128)
    for head in range(2):
        q, k, v = rows[:, head, :32], rows[:, head, 32:64], rows[:, head, 64:]
        for i in range(49):
            away = [abs(i // 7 - j // 7) * 7 + abs(i % 7 - j % 7) for j in range(49)]
            logits = torch.stack([q[i] @ k[j] / 32**0.5 + layer.biases[head, away[j]] for j in range(49)])
            mixed[i, head] = logits.softmax(0) @ v
    assert torch.allclose(found[0], layer.project(mixed.flatten(1)), atol=1e-5)


def test_blocks_have_right_gradients():
    torch.manual_seed(0)
    maps = PoolBlock(2, scale=0.7).double().eval()
    tokens = TokenStage([TokenBlock(4, heads=1, scale=0.7)]).double().eval()
    for block, channels in ((maps, 2), (tokens, 4)):
        x = torch.randn(1, channels, 2, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(block, (x,))


@torch.no_grad()
def test_pooling_ignores_padding_and_zero_factors_are_the_identity():
    block = PoolBlock(4, scale=1.0).eval()
    flat = torch.full((1, 4, 5, 5), 3.0)
    assert torch.equal(block.pool(flat), flat)
    block = PoolBlock(4, scale=0.0).eval()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_bias_table_follows_the_grid():
    layer = Attention(8, heads=2)
    nn.init.normal_(layer.biases)
    assert layer.grid_biases((7, 7)) is layer.biases
    for grid in ((14, 14), (3, 5), (1, 1)):
        table = layer.grid_biases(grid).reshape(2, *grid)
        assert torch.allclose(table[:, 0, 0], layer.biases[:, 0], atol=1e-6)
    assert torch.allclose(
        layer.grid_biases((13, 13)).reshape(2, 13, 13)[:, ::2, ::2].flatten(1), layer.biases
    )


@torch.no_grad()
def test_fused_network_answers_the_same_with_fewer_layers():
    model = small()
    x = torch.randn(3, 3, 64, 96)
    expected, layers = model(x), len(list(model.modules()))
    fused = model.fuse()
    assert fused is model and torch.allclose(model(x), expected, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(list(model.modules())) < layers
    assert type(model.get_classifier()) is nn.Linear and model.default_cfg["classifier"] == "classifier"


def test_training_gives_one_answer_unless_asked_for_both():
    model = small().train()
    x = torch.randn(4, 3, 64, 64)
    assert model(x).shape == (4, 5)
    model.set_distilled_training()
    label, teacher = model(x)
    (F.cross_entropy(label, torch.arange(4)) + F.cross_entropy(teacher, torch.arange(4))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(x).shape == (4, 5)
    model.train().reset_classifier(3)
    assert [logits.shape for logits in model(x)] == [(4, 3), (4, 3)]
    model.reset_classifier(0)
    model.set_distilled_training(False)
    model.reset_classifier(2)
    assert model(x).shape == (4, 2)


def test_widths_scale_heads_and_drop_path_grows_with_depth():
    model = create_model("efficientformer_l1", width=0.5, drop_path_rate=0.14)
    stage = model.body[-2]
    assert isinstance(stage, TokenStage) and stage.blocks[0].attention.heads == 4
    rates = [m.drop_path.rate for m in model.modules() if isinstance(m, PoolBlock | TokenBlock)]
    assert rates == pytest.approx([0.01 * index for index in range(15)])


@torch.no_grad()
def test_compiles_into_one_graph():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
