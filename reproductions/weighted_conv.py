"""Weighted convolution's claim in miniature, with the controls that tell a density from an initial scale.

The paper multiplies the taps of every convolution by a density and reports better classification and
denoising. A density also changes the scale of the first weights, tap by tap, so the gain may come from there.
Three controls take that apart: the same effective weights at the start (weight / Phi), the same norm at the
start, and a plain convolution whose first weights were multiplied by Phi. CIFAR-10: three 5x5 convolutions,
the density searched on held-out training images as the authors search it; denoising: a small DnCNN on crops
of T91 with noise of 25/255, tested on BSDS photographs, at the published density.
"""

from __future__ import annotations

import io
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featherweight.data.sources import Split, load_dataset
from featherweight.errors import DataError
from featherweight.ops.weighted_conv import PUBLISHED, RANGES, WeightedConv2d, search_density
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, judge, mean_spread, overall

CLAIM = "A density on the taps improves classification and denoising, beyond what its initial scale explains."
PLAIN, WEIGHTED = "plain", "weighted"
SAME_START, SAME_NORM, START_ONLY = "weighted, plain start", "weighted, plain norm", "plain, weighted start"
PUBLISHED_FORM = "weighted, published density"
FORMS = (PLAIN, WEIGHTED, SAME_START, SAME_NORM, START_ONLY)
TAPS, SIDE, SIGMA = 5, 24, 25 / 255

Values = tuple[float, ...]


@torch.no_grad()
def as_form(model: nn.Module, form: str) -> nn.Module:
    """Change the first weights of freshly drawn weighted layers, or take their density away."""
    for layer in model.modules():
        if isinstance(layer, WeightedConv2d):
            phi, norm = layer.phi.clone(), layer.weight.norm()
            if form == SAME_START:
                layer.weight.div_(phi)
            elif form == SAME_NORM:
                layer.weight.mul_(norm / (layer.weight * phi).norm())
            elif form in (PLAIN, START_ONLY):
                layer.set_density((1.0,) * len(layer.density(layer.kernel_size[0])))
                layer.weight.mul_(phi if form == START_ONLY else 1.0)
    return model


def classifier(form: str, density: Values) -> nn.Module:
    """Build three 5x5 convolutions with batch norms, 24 to 96 channels."""
    layers: list[nn.Module] = []
    before = 3
    for index, channels in enumerate((24, 48, 96)):
        conv = WeightedConv2d(before, channels, TAPS, 1 if index else 2, 2, bias=False, density=density)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if index else []
        before = channels
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return as_form(nn.Sequential(*layers, *head), form)


def denoiser(form: str, density: Values) -> nn.Module:
    """Build a DnCNN of six 3x3 convolutions with 32 channels; it predicts the noise."""
    layers: list[nn.Module] = [WeightedConv2d(1, 32, 3, padding=1, density=density), nn.ReLU(inplace=True)]
    for _ in range(4):
        conv = WeightedConv2d(32, 32, 3, padding=1, bias=False, density=density)
        layers += [conv, nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    return as_form(nn.Sequential(*layers, WeightedConv2d(32, 1, 3, padding=1, density=density)), form)


def fit(
    model: nn.Module,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    seed: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    lr: float,
) -> nn.Module:
    """Train with AdamW (weight decay 0.01) and a cosine schedule; the batches depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, wanted = batches(generator)
        optimizer.zero_grad()
        loss(model(x), wanted).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def tensors(split: Split, limit: int, mode: str) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, about -2 to 2, and their labels."""
    part = split.subset(np.arange(min(limit, len(split.labels))))
    pixels = torch.from_numpy(part.decode((SIDE, SIDE), mode)).permute(0, 3, 1, 2).float()
    return (pixels / 255 - 0.47) / 0.25, torch.from_numpy(part.labels.astype(np.int64))


def classify(
    form: str,
    density: Values,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
) -> float:
    """Train a form and return its accuracy on `test`, 0 to 1."""
    torch.manual_seed(seed)
    model = classifier(form, density)
    x, labels = train

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(x), (128,), generator=generator)
        mirror = int(torch.randint(0, 2, (1,), generator=generator))
        return (x[rows].flip(3) if mirror else x[rows]), labels[rows]

    fit(model, batch, epochs * len(x) // 128, seed, F.cross_entropy, 3e-3)
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in test[0].split(500)])
    return float((answers == test[1]).double().mean())


def photographs(data_root: Path | None, name: str, limit: int) -> list[Tensor]:
    """Return grey photographs `(1, H, W)`, 0 to 1.

    Raises:
        DataError: the photographs are not there.
    """
    path = (data_root or Path()) / name / f"{name}.zip"
    if not path.exists():
        raise DataError(f"Found no {path}. Pass --data-root with the folder that holds {name}.")
    found = []
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.namelist())[:limit]:
            grey = Image.open(io.BytesIO(archive.read(entry))).convert("L")
            found.append(torch.from_numpy(np.asarray(grey, np.float32) / 255)[None])
    return found


def denoise(
    form: str, density: Values, train: list[Tensor], test: list[Tensor], steps: int, seed: int
) -> float:
    """Train a form on noisy crops and return its mean PSNR on `test`, in dB."""
    torch.manual_seed(seed)
    model = denoiser(form, density)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        crops = []
        for index in torch.randint(0, len(train), (16,), generator=generator).tolist():
            room = [size - 40 + 1 for size in train[index].shape[1:]]
            y, x = (int(torch.randint(0, r, (1,), generator=generator)) for r in room)
            crops.append(train[index][:, y : y + 40, x : x + 40])
        noise = SIGMA * torch.randn(16, 1, 40, 40, generator=generator)
        return torch.stack(crops) + noise, noise

    fit(model, batch, steps, seed, F.mse_loss, 1e-3)
    noise, found = torch.Generator().manual_seed(1), []
    with torch.no_grad():
        for image in test:
            noisy = image[None] + SIGMA * torch.randn(1, *image.shape, generator=noise)
            restored = (noisy - model(noisy)).clamp(0, 1)
            found.append(-10 * math.log10(float(F.mse_loss(restored, image[None]))))
    return statistics.fmean(found)


def judge_db(better: Sequence[float], worse: Sequence[float]) -> str:
    """Say whether PSNRs of the same seeds really lie above others: by the mean gain and by every seed."""
    gains = [a - b for a, b in zip(better, worse, strict=True)]
    error = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    if statistics.fmean(gains) > error and min(gains) > 0:
        return HOLDS
    return FAILS if statistics.fmean(gains) < -error and max(gains) < 0 else OPEN


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Search the density, then train all forms with every seed, on images and on noise."""
    seeds = (seed,) if quick else tuple(range(seed, seed + 4))
    images, epochs, steps = (600, 1, 4) if quick else (8_000, 8, 250)
    dataset = load_dataset("cifar10", data_root=data_root)
    train = tensors(dataset.train, images, dataset.mode)
    held = tensors(dataset.val, 300 if quick else 2_500, dataset.mode)
    test = tensors(dataset.test, 300 if quick else 10_000, dataset.mode)
    short = partial(classify, WEIGHTED, train=train, test=held, epochs=max(1, epochs // 3), seed=seed + 100)
    best, curve = search_density(short, RANGES[TAPS], steps=1 if quick else 3)
    progress(f"searched density {best}: " + ", ".join(f"{d} {s:.2%}" for d, s in curve))
    clean, photos = (
        photographs(data_root, "t91", 91),
        photographs(data_root, "bsds500_train", 2 if quick else 20),
    )
    # A search that ends at ones has nothing to compare; the published density then stands in for it.
    density = best if best != (1.0,) * len(best) else PUBLISHED[TAPS]
    accuracy: dict[str, list[float]] = {form: [] for form in (*FORMS, PUBLISHED_FORM)}
    decibel: dict[str, list[float]] = {form: [] for form in FORMS}
    for one in seeds:
        for form, values in accuracy.items():
            used = PUBLISHED[TAPS] if form == PUBLISHED_FORM else density
            values.append(
                classify(WEIGHTED if form == PUBLISHED_FORM else form, used, train, test, epochs, one)
            )
        for form, values in decibel.items():
            values.append(denoise(form, PUBLISHED[3], clean, photos, steps, one))
        progress(
            f"seed {one}: " + ", ".join(f"{f} {accuracy[f][-1]:.2%} {decibel[f][-1]:.3f} dB" for f in FORMS)
        )
    rows = [
        {
            "form": form,
            "density": str(PUBLISHED[TAPS] if form == PUBLISHED_FORM else density),
            "CIFAR-10 accuracy": mean_spread(values),
            "denoising, dB": f"{statistics.fmean(decibel[form]):.3f}" if form in decibel else "-",
        }
        for form, values in accuracy.items()
    ]
    pairs = ((WEIGHTED, PLAIN), (WEIGHTED, START_ONLY), (SAME_START, PLAIN))
    verdicts = {f"accuracy, {a} against {b}": judge(accuracy[a], accuracy[b], len(test[0])) for a, b in pairs}
    verdicts |= {f"denoising, {a} against {b}": judge_db(decibel[a], decibel[b]) for a, b in pairs}
    reason = "; ".join(f"{what}: {verdict}" for what, verdict in verdicts.items())
    measured = accuracy | {f"{form}, dB": values for form, values in decibel.items()}
    setting = {"train_images": images, "epochs": epochs, "steps": steps, "seeds": list(seeds)}
    setting |= {"search": [[list(d), s] for d, s in curve], "density": list(density)}
    return Reproduction(
        "weighted_conv", CLAIM, rows, overall(list(verdicts.values())), reason, measured, setting
    )
