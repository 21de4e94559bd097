"""What the tests of restoration networks share: recorded official answers, given weights, test images."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from featherweight.registry import create_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(os.environ.get("FEATHERWEIGHT_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def ruled_state(layout: list[str], gain: float = 3) -> dict[str, torch.Tensor]:
    """Fill `name:shape` entries by a rule that needs no file: noise seeded by the position, fan-in scaled."""
    state = {}
    for number, entry in enumerate(layout):
        key, _, sizes = entry.partition(":")
        shape = tuple(int(size) for size in sizes.split("x") if size)
        noise = torch.from_numpy(np.random.RandomState(number).uniform(-1, 1, shape)).float()
        if "layer_scale" in key:
            noise = 0.5 + 0.2 * noise
        elif len(shape) > 1:
            noise = noise * (gain / np.prod(shape[1:])) ** 0.5
        else:
            noise = 1 + 0.3 * noise if key.endswith("weight") else 0.1 * noise
        state[key] = noise
    return state


def official_layout(slug: str, case: str) -> list[str]:
    """The official keys and shapes of a recorded case."""
    return bytes(np.load(FIXTURES / f"{slug}.npz")[f"{case}.layout"]).decode().split("\n")


@torch.no_grad()
def parity_error(slug: str, case: str, fused: bool) -> float:
    """The largest gap to the official code's recorded answer, relative to its largest value."""
    recorded = np.load(FIXTURES / f"{slug}.npz")
    model = create_model(case.partition(".")[0]).eval()
    # SPAN's gates make steps of large maps, on which rounding errors grow without end.
    model.load_official(ruled_state(official_layout(slug, case), gain=1 if slug == "span" else 3))
    if fused:
        model.fuse()
    size, step = recorded[f"{case}.size"], int(recorded[f"{case}.step"])
    image = torch.from_numpy(np.random.RandomState(7).uniform(0, 1, (2, 3, *size))).float()
    found = model(image)[..., ::step, ::step].numpy()
    expected = recorded[f"{case}.image"]
    assert found.shape == expected.shape and expected.std() > 0.1
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def given_weights(name: str) -> Path:
    """A file of trained official weights, or skip."""
    path = SHARED / "weights" / name
    if not path.is_file():
        pytest.skip(f"official weights {name} are not beside the project")
    return path
