"""Patches: aligned, a function of the step, turned all ways; losses; training that resumes to the bit."""

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data.pictures import Pictures
from featherweight.errors import DataError, UsageError
from featherweight.models.span import SPAN
from featherweight.models.span.adapt import ConvLoRA, Supervised, adapt
from featherweight.train.dense_losses import frequency_loss, pixel_loss
from featherweight.train.loop import fit_model
from featherweight.train.patches import RECIPES, PatchBatches, PatchData, Restoration
from featherweight.train.progress import silent
from featherweight.train.recipe import Recipe
from featherweight.train.schedule import learning_rate


def repeated_pictures(scale: int = 2) -> Pictures:
    """Large pictures whose pixels repeat the small ones', so that a shifted patch shows."""
    noise = np.random.RandomState(0)
    low = [noise.randint(0, 256, size).astype(np.uint8) for size in ((20, 24, 3), (16, 40, 3))]
    high = [picture.repeat(scale, 0).repeat(scale, 1) for picture in low]
    return Pictures(scale, ("one", "two"), high, low)


class Check:
    """Validation that needs nothing of the other floors."""

    score_name = "val_psnr"

    def __len__(self):
        return 1

    def head(self, count):
        return self

    def score(self, model, *, bf16=False):
        was = model.training
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 4, 4))
        model.train(was)
        return 30.0, 0.1


def recipe(**changes) -> Recipe:
    fields = {
        "optimizer": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "batch_size": 4,
        "epochs": 3,
        "bf16": False,
    }
    return Recipe(**{**fields, "ema_decay": 0.9, "ema_every": 1, "eval_every": 1, "threads": 1, **changes})


def test_patches_are_aligned_and_a_function_of_the_step():
    data = PatchData(repeated_pictures(), Restoration(patch=8))
    batches = PatchBatches(data, recipe())
    seen = set()
    for step in range(12):
        low, high = batches.get(step)
        assert low.shape == (4, 3, 4, 4) and high.shape == (4, 3, 8, 8) and high.max() <= 1
        assert torch.equal(high, low.repeat_interleave(2, 2).repeat_interleave(2, 3))
        again = PatchBatches(data, recipe()).get(step)
        assert torch.equal(low, again[0])
        seen.add(low.sum().item())
    assert len(seen) == 12
    assert not torch.equal(
        PatchBatches(data, recipe(seed=1)).get(0)[0], PatchBatches(data, recipe()).get(0)[0]
    )
    assert not torch.equal(
        PatchBatches(data, recipe(), rank=1, world=2).get(0)[0], PatchBatches(data, recipe()).get(0)[0]
    )
    assert batches.get(0, 12)[1].shape == (4, 3, 12, 12)


def test_all_eight_positions_occur_only_when_asked_for():
    low = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    square = Pictures(1, ("one",), [low], [low])
    for flips, expected in ((True, 8), (False, 1)):
        batches = PatchBatches(PatchData(square, Restoration(patch=4, flips=flips)), recipe(batch_size=64))
        images, _ = batches.get(0)
        assert len({image.numpy().tobytes() for image in images}) == expected


def test_epochs_cover_the_pictures():
    data = PatchData(repeated_pictures(), Restoration(patch=8))
    assert PatchBatches(data, recipe()).steps_per_epoch == -(-(40 * 48 + 32 * 80) // 64 // 4)
    assert PatchBatches(data, recipe(batch_size=1000)).steps_per_epoch == 1


def test_losses_are_means_that_the_definition_gives():
    a, b = torch.rand(2, 3, 6, 5), torch.rand(2, 3, 6, 5)
    gap = (a - b).numpy()
    assert np.isclose(pixel_loss(a, b), np.abs(gap).mean())
    assert np.isclose(pixel_loss(a, b, "l2"), (gap**2).mean())
    assert np.isclose(pixel_loss(a, b, "charbonnier"), np.sqrt(gap**2 + 1e-6).mean())
    spectrum = np.fft.rfft2(gap)
    assert np.isclose(
        frequency_loss(a, b), (np.abs(spectrum.real) + np.abs(spectrum.imag)).mean() / 2, rtol=1e-5
    )
    assert frequency_loss(a, a) == 0


def test_the_loss_adds_its_parts():
    task = Restoration(patch=8, frequency_weight=0.1, teacher_weight=2.0, affinity_weight=3.0)
    batches = PatchBatches(PatchData(repeated_pictures(), task), recipe())
    low, high = batches.get(0)
    student, teacher = (SPAN(2, channels=c, depth=1) for c in (4, 6))
    loss = batches.loss(Supervised(student).train(), low, high, Supervised(teacher, always=True).eval())
    image, maps = Supervised(student).both(low)
    told, taught = Supervised(teacher).both(low)
    plain = pixel_loss(image, high) + 0.1 * frequency_loss(image, high)
    from featherweight.models.span.adapt import affinity_loss

    expected = plain + 2 * pixel_loss(image, told) + 3 * affinity_loss(maps, taught)
    assert torch.allclose(loss, expected) and torch.allclose(batches.loss(student, low, high, None), plain)
    with pytest.raises(UsageError, match="Supervised"):
        batches.loss(student, low, high, teacher)


def network() -> nn.Module:
    torch.manual_seed(0)
    return adapt(SPAN(2, channels=4, depth=2).fuse())


class Stop:
    """Interrupts like Ctrl-C at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, event):
        if event["event"] == "checkpoint" and event["step"] == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path):
    data = PatchData(repeated_pictures(), Restoration(patch=8, affinity_weight=0.1))
    torch.manual_seed(1)
    teacher = Supervised(SPAN(2, channels=6, depth=2), always=True)
    settings = recipe(checkpoint_every_s=0)
    whole = Supervised(network())
    result = fit_model(whole, data, Check(), settings, None, tmp_path / "a", teacher=teacher, progress=silent)
    halved = Supervised(network())
    with pytest.raises(KeyboardInterrupt):
        fit_model(halved, data, Check(), settings, None, tmp_path / "b", teacher=teacher, progress=Stop(7))
    halved = Supervised(network())
    again = fit_model(
        halved, data, Check(), settings, None, tmp_path / "b", teacher=teacher, resume=True, progress=silent
    )
    assert again.steps == result.steps and result.history[-1]["val_psnr"] == 30.0
    for (key, one), (_, two) in zip(whole.state_dict().items(), halved.state_dict().items(), strict=True):
        assert torch.equal(one, two), key
    moved = [layer.up.abs().sum() > 0 for layer in whole.modules() if isinstance(layer, ConvLoRA)]
    assert all(moved) and len(moved) == 8


def test_halving_in_equal_parts():
    settings = recipe(schedule="halving", halvings=4, warmup_fraction=0.0, lr=2e-4)
    rates = [learning_rate(step, 1000, settings) for step in (0, 199, 200, 399, 400, 799, 800, 999)]
    assert np.allclose(rates, np.array([1, 1, 0.5, 0.5, 0.25, 0.125, 0.0625, 0.0625]) * 2e-4)
    with pytest.raises(UsageError, match="halvings"):
        recipe(schedule="halving", halvings=-1)


def test_recipes_are_complete_and_bad_tasks_are_refused():
    for fields, task in RECIPES.values():
        assert Recipe(**fields).epochs and Restoration(**task).patch % 12 == 0
    assert RECIPES["imdn"][0]["lr"] == 2e-4 and RECIPES["imdn"][1]["patch"] == 192
    with pytest.raises(UsageError, match="Did you mean l1"):
        Restoration(loss="l11")
    with pytest.raises(UsageError, match="affinity_weight"):
        Restoration(affinity_weight=-1)
    with pytest.raises(UsageError, match="multiple"):
        PatchData(repeated_pictures(), Restoration(patch=9))
    with pytest.raises(DataError, match="smaller"):
        PatchData(repeated_pictures(), Restoration(patch=64))
    with pytest.raises(UsageError, match="augment"):
        PatchData(repeated_pictures(), Restoration(patch=8)).batches(recipe(), lambda *x: x, nn.Identity())
