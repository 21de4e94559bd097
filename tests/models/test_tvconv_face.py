"""TVConv face networks: parity with numbers that the official code gave, sizes in use, embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight.errors import UsageError
from featherweight.ops.tvconv import TVConv2d
from featherweight.registry import create_model

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tvconv.npz"
CONSTANTS = ("TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w", "num_batches_tracked")


def ruled(shape: tuple[int, ...], number: int, name: str) -> torch.Tensor:
    """The rule that filled the official networks: noise seeded by the position of the key."""
    noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
    if name.endswith(("running_var", "posi_map")):
        return 1 + 0.5 * noise
    if len(shape) in (2, 4):
        return noise * (3 / np.prod(shape[1:])) ** 0.5
    return 1 + 0.3 * noise if name.endswith("weight") else 0.1 * noise


def official_state(stored, name: str) -> dict[str, torch.Tensor]:
    state = {}
    for number, entry in enumerate(bytes(stored[f"{name}.keys"]).decode().split("\n")):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        constant = key.split(".")[-1] in CONSTANTS
        state[key] = torch.tensor(0) if constant else ruled(shape, number, key)
    return state


@pytest.mark.parametrize(
    "name",
    [
        "face_mobilenetv2_010",
        "face_shufflenetv2_050",
        "tvconv_shufflenetv2_050",
        pytest.param("tvconv_mobilenetv2_010", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_parity_with_the_official_networks(name):
    stored = np.load(FIXTURE)
    model = create_model(name).eval()
    model.load_official(official_state(stored, name))
    x = torch.from_numpy(np.random.RandomState(7).uniform(-2, 2, (2, 3, 96, 96))).float()
    expected = torch.from_numpy(stored[f"{name}.y"])
    found = model(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    # The two embeddings share most of their values, so their difference is compared by itself.
    apart, wanted = found[0] - found[1], expected[0] - expected[1]
    assert float((apart - wanted).abs().max() / wanted.abs().max()) < 1e-3
    fused = model.fuse()(x)
    assert float((fused - expected).abs().max() / expected.abs().max()) < 1e-5


def test_embedding_and_classifier():
    model = create_model("tvconv_shufflenetv2_050", generator={"hidden": 4, "layers": 0}).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 512)
    assert model(torch.randn(2, 3, 64, 80)).shape == (2, 512)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 7)
    sizes = {layer.size for layer in model.modules() if isinstance(layer, TVConv2d)}
    assert sizes == {(24, 24), (12, 12), (6, 6)}
    with pytest.raises(UsageError, match="pooled"):
        create_model("face_shufflenetv2_050", global_pool="")


def test_built_for_other_images():
    small = {"generator": {"hidden": 4, "layers": 0}, "input_size": (3, 64, 48)}
    model = create_model("tvconv_mobilenetv2_010", **small).eval()
    sizes = [layer.size for layer in model.modules() if isinstance(layer, TVConv2d)]
    assert sizes[0] == (64, 48) and sizes[-1] == (4, 3) and len(sizes) == 17
    assert model.default_cfg["input_size"] == (3, 64, 48)
