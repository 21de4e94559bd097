"""LSNet: parity with numbers that the official code gave, the aggregation, folding, two heads, key layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import relative
from torch import nn

from featherweight.blocks.ls_conv import LSConv, aggregate
from featherweight.errors import CheckpointError, UsageError
from featherweight.models.lsnet import Attention, Block, DistilledLSNet, LSNet
from featherweight.registry import create_model
from featherweight.shrink.fold import fold_batchnorm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lsnet.npz"
SMALL = ((16, 24, 32, 40), (1, 2, 2, 2))


def ruled_state(layout: list[str]) -> dict[str, torch.Tensor]:
    """Fill `name:shape` entries by a rule that needs no file: noise seeded by the position, fan-in scaled."""
    state = {}
    for number, entry in enumerate(layout):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif key.endswith("attention_bias_idxs"):
            state[key] = torch.zeros(shape, dtype=torch.long)
        else:
            noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
            if key.endswith("running_var"):
                noise = 1 + 0.5 * noise
            elif key.endswith("attention_biases"):
                noise = 2 * noise
            elif len(shape) > 1:
                noise = noise * (3 / np.prod(shape[1:])) ** 0.5
            elif key.endswith("pw2.bn.weight"):  # keeps the residual stream from growing
                noise = 0.3 + 0.2 * noise
            elif key.endswith("weight"):
                noise = 0.75 + 0.25 * noise
            else:
                noise = 0.1 * noise
            state[key] = noise
    return state


def recorded(name: str) -> tuple[list[str], torch.Tensor]:
    """The official keys of a variant with 50 classes, and the images."""
    layout = bytes(np.load(FIXTURE)[f"{name}.layout"]).decode().split("\n")
    noise = np.random.RandomState(0).uniform(-2, 2, (4, 3, 224, 224))
    return layout, torch.from_numpy(noise).float()


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that shows when it is left out."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            centred = (noise - 0.5) * (2 / max(1, value[0].numel() if value.ndim > 1 else 25)) ** 0.5
            positive = key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight"))
            value.copy_(0.5 + 0.5 * noise if positive else centred)
    return model.eval()


@pytest.mark.parametrize("name", ["lsnet_t", "lsnet_t_distill", "lsnet_b"])
@torch.no_grad()
def test_parity_with_the_official_code(name):
    layout, x = recorded(name)
    model = create_model(name, num_classes=50).eval()
    model.load_official(ruled_state(layout))
    expected = torch.from_numpy(np.load(FIXTURE)[f"{name}.logits"])
    assert expected.std() > 1e-2
    assert relative(model(x[: len(expected)]), expected) < 1e-4


@torch.no_grad()
def test_parity_of_both_heads_in_training():
    layout, x = recorded("lsnet_t_distill")
    model = create_model("lsnet_t_distill", num_classes=50).train()
    model.load_official(ruled_state(layout))
    model.set_distilled_training()
    expected = torch.from_numpy(np.load(FIXTURE)["lsnet_t_distill.both"])
    assert relative(torch.stack(model(x)), expected) < 1e-4


def test_official_checkpoints_give_the_plain_weights():
    layout, _ = recorded("lsnet_t_distill")
    state = {f"module.{key}": value for key, value in ruled_state(layout).items()}
    average = {key: torch.zeros_like(value) for key, value in state.items()}
    model = create_model("lsnet_t_distill", num_classes=50)
    model.load_official({"model": state, "model_ema": average, "epoch": 299})
    assert torch.equal(model.body[0].conv.weight, state["module.patch_embed.0.c.weight"])
    assert torch.equal(model.classifier_dist.weight, state["module.head_dist.l.weight"])
    table = state["module.blocks4.3.mixer.m.attention_biases"]
    attention = next(m for m in model.modules() if isinstance(m, Attention))
    assert torch.equal(attention.table.flatten(1), table)
    with pytest.raises(CheckpointError, match="unknown"):
        create_model("lsnet_t", num_classes=50).load_official(state)
    with pytest.raises(CheckpointError, match="other shape"):
        create_model("lsnet_t_distill", num_classes=3).load_official(state)
    for classes in (3, 0):
        other = create_model("lsnet_t_distill", num_classes=classes)
        other.load_official(state, adapt=True)
        assert torch.equal(other.head_dist.weight, state["module.head_dist.bn.weight"])


def test_aggregation_equals_five_lines_of_loops():
    x, kernels = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 9, 4, 5)
    expected, padded = torch.zeros_like(x), F.pad(x, (1, 1, 1, 1))
    for n, c, i, j in np.ndindex(*x.shape):
        for k in range(9):
            expected[n, c, i, j] += kernels[n, c % 3, k, i, j] * padded[n, c, i + k // 3, j + k % 3]
    assert torch.allclose(aggregate(x, kernels), expected, atol=1e-5)
    turned = x.to(memory_format=torch.channels_last).requires_grad_()
    assert torch.allclose(aggregate(turned, kernels), expected, atol=1e-5)


def test_aggregation_has_the_right_gradients():
    x = torch.randn(2, 6, 3, 4, dtype=torch.double, requires_grad=True)
    kernels = torch.randn(2, 3, 9, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(aggregate, (x, kernels))
    turned = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(aggregate, (turned, kernels))


def test_constant_kernels_make_a_depthwise_convolution():
    x, kernel = torch.randn(2, 8, 5, 5), torch.randn(4, 9)
    expected = F.conv2d(x, kernel.view(4, 1, 3, 3).repeat(2, 1, 1, 1), padding=1, groups=8)
    found = aggregate(x, kernel[None, :, :, None, None].expand(2, -1, -1, 5, 5))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    x, kernels = torch.randn(1, 16, 6, 6).to(dtype), torch.randn(1, 2, 9, 6, 6).to(dtype)
    found = aggregate(x, kernels)
    assert found.dtype == dtype
    assert torch.equal(found, aggregate(x.float(), kernels.float()).to(dtype))
    assert aggregate(x.float(), kernels).dtype == torch.float32


@pytest.mark.parametrize(("channels", "params"), [(32, 2_396), (64, 7_480), (128, 25_712), (256, 94_432)])
def test_ls_convolution_is_as_large_as_the_official_one(channels, params):
    assert sum(p.numel() for p in LSConv(channels).parameters()) == params


def test_weights_see_seven_pixels_and_values_three():
    conv = randomise(LSConv(16))
    conv.perceive[4] = nn.Identity()  # the group norm sees the whole map
    seen = []
    for frozen in (False, True):
        x = torch.randn(1, 16, 11, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
        kernels = conv.perceive(x).unflatten(1, (2, 9))
        aggregate(x, kernels.detach() if frozen else kernels)[0, :, 5, 5].sum().backward()
        rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
        seen.append((rows.min().item(), rows.max().item()))
    assert seen == [(2, 8), (4, 6)]


@torch.no_grad()
def test_position_bias_depends_on_distance_alone():
    attention = Attention(40)
    attention.table.normal_()
    bias = attention.bias(4, 4)
    for a, b in np.ndindex(16, 16):
        down, right = abs(a // 4 - b // 4), abs(a % 4 - b % 4)
        assert torch.equal(bias[:, a, b], attention.table[:, down, right])
    other = attention.bias(3, 7)
    assert other.shape == (4, 21, 21) and torch.equal(other, other.transpose(1, 2))
    attention.table.fill_(0.5)
    assert torch.allclose(attention.bias(6, 5), torch.tensor(0.5))


@pytest.mark.parametrize("size", [(64, 64), (97, 160), (256, 224)])
@torch.no_grad()
def test_any_size_of_image(size):
    model = randomise(LSNet(*SMALL, num_classes=5))
    assert model(torch.randn(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("network", [LSNet, DistilledLSNet])
@torch.no_grad()
def test_fused_network_gives_the_same_with_fewer_layers(network):
    model = randomise(network(*SMALL, num_classes=5))
    x = torch.randn(2, 3, 128, 128)
    expected, layers = model(x), sum(1 for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d))
    assert model.fuse() is model and relative(model(x), expected) < 1e-4
    left = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert len(left) < 0.6 * layers
    convs = [m for m in model.modules() if isinstance(m, LSConv)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in left) == len(convs) == 2
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 1
    assert relative(model.fuse()(x), expected) < 1e-4


def test_fusing_after_the_norms_were_folded():
    model = randomise(LSNet(*SMALL, num_classes=5))
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(fold_batchnorm(model).fuse()(x), model(x)) < 1e-4


def test_fusing_needs_eval_mode():
    with pytest.raises(UsageError, match="eval"):
        LSNet(*SMALL).train().fuse()


@torch.no_grad()
def test_two_heads_are_averaged_unless_asked_for():
    model = randomise(DistilledLSNet(*SMALL, num_classes=5))
    x = model.forward_features(torch.randn(2, 3, 64, 64))
    pooled = x.mean((2, 3), keepdim=True)
    first = model.classifier(model.head(pooled).flatten(1))
    second = model.classifier_dist(model.head_dist(pooled).flatten(1))
    model.set_distilled_training()
    assert torch.allclose(model.forward_head(x), (first + second) / 2, atol=1e-6)
    model.train()
    assert isinstance(model.forward_head(x), tuple)
    model.set_distilled_training(False)
    assert model.forward_head(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model.eval().forward_head(x).shape == (2, 40)


@torch.no_grad()
def test_a_fresh_feed_forward_adds_nothing():
    block = Block(16, stage=0, index=0).eval()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(x), block.squeeze(block.mixer(x)))


@pytest.mark.slow
def test_compiled_training_step_equals_the_plain_one():
    conv = randomise(LSConv(16)).train()
    x = torch.randn(2, 16, 8, 8)
    gradients = []
    for run in (conv, torch.compile(conv, fullgraph=True)):
        conv.zero_grad()
        run(x).square().sum().backward()
        gradients.append(conv.perceive[0].conv.weight.grad.clone())
    assert relative(gradients[1], gradients[0]) < 1e-4
