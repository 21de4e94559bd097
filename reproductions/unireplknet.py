"""UniRepLKNet's claims in miniature: what a large kernel sees, what dilated branches add, sound as an image.

The paper argues that large kernels give a large effective receptive field at once (section 3), that small
dilated kernels beside a large one raise its accuracy (section 3.2), and that the same network serves other
kinds of input. A small UniRepLKNet of two stages is trained on CIFAR-10 in three forms that differ in their
depthwise layers only: 13x13 with dilated branches, 13x13 alone, 3x3. Its field is measured by gradients: the
share of the image's pixels that hold half of the gradient of the last map's centre. The first form then
learns spoken digits from spectrograms, if that set lies beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data.modalities import Spectrogram, mask_spectrogram
from featherweight.data.sources import load_dataset
from featherweight.models.unireplknet import UniRepLKBlock, UniRepLKNet
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = (
    "Large kernels see more of the image than small ones, dilated branches raise their accuracy, and the "
    "same network recognises spoken digits."
)
DILATED, ALONE, SMALL = "13x13 with dilated branches", "13x13 alone", "3x3"
SPOKEN, SPOKEN_GOAL = "spoken digits", 0.9
SPOKEN_FILE = Path("spoken_digits") / "spoken_digits.npz"
FIELD_IMAGES = 64


def trunk(form: str, in_chans: int = 3, stem_stride: int = 1) -> UniRepLKNet:
    """Build one form: two blocks at 16x16 places, one at 8x8."""
    side = 3 if form == SMALL else 13
    model = UniRepLKNet(
        24, ((side,) * 2, (side,)), stem_stride=stem_stride, in_chans=in_chans, num_classes=10
    )
    for block in model.body if form == ALONE else ():
        if isinstance(block, UniRepLKBlock):
            block.depthwise = block.depthwise.branches[0][0]
    return model


def field_share(model: UniRepLKNet, images: Tensor) -> float:
    """Return the share of the pixels that hold half of the gradient of the last map's centre.

    Args:
        model: in eval mode.
        images: normalised images, over which the gradient's size is averaged.
    """
    images = images.clone().requires_grad_()
    maps = model.forward_features(images)
    (gradient,) = torch.autograd.grad(maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].sum(), images)
    energy = gradient.abs().sum((0, 1)).flatten().sort(descending=True).values.cumsum(0)
    return float((energy < energy[-1] / 2).sum() + 1) / len(energy)


def spoken_digits(root: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return spectrograms `(720, 1, 64, 64)`, digits, and which recordings are for testing."""
    stored = np.load(root / SPOKEN_FILE)
    to_map = Spectrogram(8000, bins=64, frames=64, window_s=0.032, hop_s=0.016)
    samples = torch.from_numpy(stored["samples"] / np.float32(32768))
    bounds = stored["offsets"].tolist()
    maps = torch.stack([to_map(samples[a:b]) for a, b in pairwise(bounds)])
    return maps, torch.from_numpy(stored["digit"].astype(np.int64)), torch.from_numpy(stored["is_test"] > 0)


def hear(root: Path, epochs: int, seed: int) -> tuple[float, int]:
    """Train the dilated form on spoken digits; return its test accuracy and the number of test recordings."""
    maps, labels, is_test = spoken_digits(root)
    train = maps[~is_test]
    mean, std = train.mean(), train.std()
    maps, generator = (maps - mean) / std, torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = trunk(DILATED, in_chans=1, stem_stride=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    rows = torch.nonzero(~is_test).flatten()
    batches = epochs * (len(rows) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=batches)
    for step in range(batches):
        if step % (len(rows) // 32) == 0:
            order = rows[torch.randperm(len(rows), generator=generator)]
            blocks = iter(order[: len(rows) // 32 * 32].view(-1, 32))
        chosen = next(blocks)
        shift = int(torch.randint(0, 12, (), generator=generator))
        batch = mask_spectrogram(maps[chosen].roll(shift, 3), 12, 12, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        answers = model.eval()(maps[is_test]).argmax(1)
    return float((answers == labels[is_test]).float().mean()), int(is_test.sum())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the three forms, measure their fields, and let the first one hear."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(250, 5_000),
        test_images=(500, 10_000),
        epochs=6,
        optimizer="adamw",
        lr=4e-3,
        weight_decay=0.05,
        label_smoothing=0.1,
    )
    built: dict[str, list[UniRepLKNet]] = {DILATED: [], ALONE: [], SMALL: []}

    def builder(form: str) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            built[form].append(trunk(form))
            return built[form][-1]

        return build

    found, tested = accuracies({form: builder(form) for form in built}, plan, data_root, progress)
    images = _field_images(data_root)
    fields = {form: [field_share(model.eval(), images) for model in models] for form, models in built.items()}
    verdicts = {
        "field of 13x13 against 3x3": _larger(fields[DILATED], fields[SMALL]),
        "dilated branches against none": judge(found[DILATED], found[ALONE], tested),
    }
    rows = [_row(form, trunk(form), 32, found[form], fields[form]) for form in built]
    if data_root is not None and (data_root / SPOKEN_FILE).exists():
        heard = [hear(data_root, 1 if quick else 20, number) for number in plan.seeds]
        found[SPOKEN] = [accuracy for accuracy, _ in heard]
        progress(f"{SPOKEN}: {mean_spread(found[SPOKEN])}")
        goal = [SPOKEN_GOAL] * len(heard)
        verdicts[f"{SPOKEN} above {SPOKEN_GOAL:.0%}"] = judge(found[SPOKEN], goal, heard[0][1])
        rows.append(_row(f"{DILATED}, {SPOKEN}", trunk(DILATED, 1, 2), 64, found[SPOKEN]))
    found |= {f"field of {form}": shares for form, shares in fields.items()}
    reason = "; ".join(f"{what}: {verdict}" for what, verdict in verdicts.items())
    return Reproduction(
        "unireplknet", CLAIM, rows, overall(list(verdicts.values())), reason, found, plan.setting()
    )


def _row(name: str, model: UniRepLKNet, side: int, found: list[float], field: Sequence[float] = ()) -> dict:
    return {
        "network": name,
        **sizes(lambda: model, (model.in_chans, side, side)),
        "test accuracy": mean_spread(found),
        "pixels with half the gradient": mean_spread(field) if field else "",
    }


def _larger(larger: list[float], smaller: list[float]) -> str:
    """Compare fields, which are measured without sampling error worth naming: every seed must agree."""
    pairs = list(zip(larger, smaller, strict=True))
    if all(a > b for a, b in pairs):
        return HOLDS
    return FAILS if all(a < b for a, b in pairs) else OPEN


def _field_images(data_root: Path | None) -> Tensor:
    split = load_dataset("cifar10", data_root=data_root).test
    pixels = torch.from_numpy(split.subset(np.arange(FIELD_IMAGES)).decode((32, 32), "RGB"))
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
