"""AFFNet: parity with what the official code gave, the convolution behind the mask, old layouts, graphs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.spectrum import to_spectrum
from featherweight.models.affnet import AFFStage, FrequencyFilter, MapNorm, PixelNorm
from featherweight.registry import create_model
from featherweight.shrink.fold import fold_batchnorm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "affnet.npz"
RECORDED = {
    "affnet_et": {},
    "affnet_t": {},
    "affnet": {},
    "affnet_et other options": {"norm": PixelNorm, "act": nn.ReLU},
}
"""Recorded case -> how our network is built for it."""


def ruled_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Fill a state dict by a rule that needs no file: a cosine over the position, scaled by the fan-in."""
    state = {}
    for number, (key, shape) in enumerate(shapes.items()):
        wave = torch.from_numpy(np.cos(0.7 * np.arange(np.prod(shape, dtype=int)) ** 1.1 + number)).float()
        wave = wave.reshape(shape)
        if key.endswith("num_batches_tracked"):
            wave = torch.zeros((), dtype=torch.long)
        elif ".filter.b" in key:
            wave = 0.3 * wave
        elif ".filter.w" in key:
            wave = wave * 2 / shape[2] ** 0.5
        elif len(shape) > 1:
            wave = wave * (2 / np.prod(shape[1:])) ** 0.5
        else:
            wave = 1 + 0.3 * wave if key.endswith(("weight", "running_var")) else 0.1 * wave
        state[key] = wave
    return state


def recorded_state(case: str) -> dict[str, torch.Tensor]:
    recorded = np.load(FIXTURE)
    return ruled_state(json.loads(str(recorded[f"{case}.shapes"])))


@torch.no_grad()
def random_filter(channels: int, seed: int = 0, size: float = 0.5) -> FrequencyFilter:
    """A mixer in double precision whose mask matters."""
    module = FrequencyFilter(channels).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return module


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", RECORDED)
def test_parity_with_the_official_code(case):
    recorded = np.load(FIXTURE)
    expected = recorded[f"{case}.logits"]
    model = create_model(case.split()[0], num_classes=expected.shape[1], **RECORDED[case]).eval()
    model.load_official(recorded_state(case))
    shape = (2, 3, *recorded[f"{case}.sides"].tolist())
    wave = torch.from_numpy(np.sin(0.37 * np.arange(np.prod(shape)) ** 1.05)).float().reshape(shape)
    with torch.no_grad():
        logits = model(wave).numpy()
    assert expected.std() > 1e-2
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_official_checkpoints_in_their_wrappings():
    state = recorded_state("affnet_et")
    averaged = {f"module.{key}": value for key, value in state.items()}
    wrapped = {"epoch": 3, "model_state_dict": {}, "ema_state_dict": averaged}
    model = create_model("affnet_et", num_classes=10)
    model.load_official(wrapped)
    loaded = model.state_dict()
    assert torch.equal(loaded["body.8.blocks.3.token_mixer.w1"], state["layer_4.1.global_rep.3.filter.w1"])
    assert torch.equal(loaded["body.8.norm.weight"], state["layer_4.1.global_rep.4.weight"])
    for name in ("affnet_t", "affnet"):
        other = recorded_state(name)
        create_model(name, num_classes=10).load_official(other)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 3), (3, 6)])
def test_mask_is_a_circular_convolution_as_large_as_the_map(height, width):
    module, x = random_filter(16), random(1, 16, height, width)
    kernel = torch.fft.irfft2(torch.complex(*module.mask(to_spectrum(x)).unbind(2)), s=(height, width))
    naive = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            naive += kernel[..., i, j, None, None] * x.roll((i, j), (2, 3))
    torch.testing.assert_close(module(x), x + naive, rtol=0, atol=1e-10)


def test_mask_of_one_doubles_the_map():
    module, x = random_filter(8, size=0.0), random(2, 8, 5, 6)
    module.b2.data[0] = 1.01
    torch.testing.assert_close(module(x), 2 * x)
    assert not module(torch.zeros_like(x)).any()


def test_mask_depends_on_the_channels_of_its_group_only():
    module, x = random_filter(24), random(1, 24, 4, 5)
    moved = x.clone()
    moved[:, 7] += random(4, 5, seed=2)
    changed = (module.mask(to_spectrum(x)) != module.mask(to_spectrum(moved))).flatten(2).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [6, 7, 8]


def test_every_place_reaches_every_other_and_shifts_do_not_commute():
    module, x = random_filter(8), random(1, 8, 6, 6)
    moved = x.clone()
    moved[:, 0, 0, 0] += 1
    assert ((module(x) - module(moved)).abs().amax(1) > 1e-6).all()
    shifted = module(x.roll((1, 2), (2, 3))).roll((-1, -2), (2, 3))
    assert (shifted - module(x)).abs().max() > 1e-3, "the mask sees phases"
    frozen = module.mask(to_spectrum(x))
    module.mask = lambda spectrum: frozen
    torch.testing.assert_close(module(x.roll((1, 2), (2, 3))).roll((-1, -2), (2, 3)), module(x))


def test_gradients_of_the_mixer():
    module = random_filter(8)
    assert torch.autograd.gradcheck(module, random(1, 8, 3, 4).requires_grad_())


def test_norms():
    x = random(2, 6, 4, 5)
    torch.testing.assert_close(MapNorm(6).double()(x), nn.functional.layer_norm(x, x.shape[1:]))
    pixel = nn.functional.layer_norm(x.movedim(1, 3), (6,)).movedim(3, 1)
    torch.testing.assert_close(PixelNorm(6).double()(x), pixel, rtol=0, atol=1e-3)


def small_stage() -> nn.Module:
    """A convolution and one mixing stage: all that a graph of the network is made of."""
    torch.manual_seed(0)
    return nn.Sequential(ConvNormAct(3, 8, 3, 2), AFFStage(8, [0.0], nn.SiLU, MapNorm)).eval()


@torch.no_grad()
def test_batch_norms_fold_and_the_folded_network_still_exports(tmp_path):
    onnx = pytest.importorskip("featherweight.export.onnx")
    model, x = small_stage(), torch.randn(2, 3, 11, 14)
    folded = fold_batchnorm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    traced = torch.fx.symbolic_trace(folded)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    report = onnx.export_onnx(traced, tmp_path / "m.onnx", (3, 11, 14))
    assert report.exporter == "traced" and report.max_relative_error < 1e-4


@torch.no_grad()
def test_compiled_stage_agrees():
    model, x = small_stage(), torch.randn(2, 3, 11, 14)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_spectrum_in_single_precision():
    model, x = create_model("affnet_et", width=0.25, num_classes=3).train(), torch.randn(4, 3, 32, 32)
    seen = []
    model.body[6].blocks[0].token_mixer.act.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert seen == [torch.float32]
