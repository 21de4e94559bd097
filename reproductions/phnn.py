"""PHNNs' claim in miniature: hypercomplex layers with 1/n of the weights lose nothing against real ones.

The paper trains ResNets on images and an audio network with every convolution replaced. Here a small residual
network reads CIFAR-10 and Fashion-MNIST in 2-D, and a small one reads the spectra of spoken digits in 1-D.
The forms are real convolutions, learnt algebras over 2 and 4 components, and quaternions (4 components, the
algebra fixed to the Hamilton product). A form passes if it lies less than 1.5 points below the real network,
the errors of sampling and of seeds taken into account; it fails if it surely lies further below.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.errors import DataError
from featherweight.models.phc_resnet import PHCResNet
from featherweight.ops.phnn import PHConv1d, PHConv2d, hamilton_algebra
from featherweight.workflows.miniature import Plan, accuracies
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN, Reproduction, mean_spread, overall

CLAIM = "Convolutions with 1/n of the weights (n = 2 and 4) lose less than 1.5 points against real ones."
REAL, TWO, FOUR, HAMILTON = "real", "PHC, n = 2", "PHC, n = 4", "quaternions"
COMPONENTS = {REAL: 1, TWO: 2, FOUR: 4, HAMILTON: 4}
MARGIN = 0.015
"""How much accuracy a form may lose, 0 to 1."""

BANDS, FRAMES = 64, 64


def as_form(model: nn.Module, form: str) -> nn.Module:
    """Make a hypercomplex network real (freshly drawn), or fix its algebras to the quaternions'."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if not isinstance(layer, PHConv1d | PHConv2d):
                continue
            if form == REAL:
                plain = layer.fuse()
                plain.reset_parameters()
                setattr(parent, name, plain)
            elif form == HAMILTON:
                layer.algebra.data.copy_(hamilton_algebra())
                layer.algebra.requires_grad_(False)
    return model


def image_network(form: str, channels: int) -> nn.Module:
    """Build a residual network of three blocks, 24 to 96 channels."""
    model = PHCResNet(
        COMPONENTS[form],
        depths=(1, 1, 1),
        widths=(24, 48, 96),
        stem_stride=2,
        in_chans=channels,
        num_classes=10,
    )
    return as_form(model, form)


def audio_network(form: str) -> nn.Module:
    """Build four 1-D convolutions over the frames of a spectrum, `(N, BANDS, FRAMES)`."""
    layers: list[nn.Module] = []
    before = BANDS
    for channels in (64, 96, 128, 128):
        conv = PHConv1d(before, channels, 5, padding=2, bias=False, n=COMPONENTS[form])
        layers += [conv, nn.BatchNorm1d(channels), nn.ReLU(), nn.MaxPool1d(2)]
        before = channels
    head = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(before, 10))
    return as_form(nn.Sequential(*layers, *head), form)


def trained_values(model: nn.Module) -> int:
    """Count what the optimiser moves."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def within(ours: Sequence[float], real: Sequence[float], tests: int) -> str:
    """Say whether accuracies lie less than `MARGIN` below those of the real network."""
    gaps = [b - a for a, b in zip(ours, real, strict=True)]
    sampling = sum(p * (1 - p) for p in (statistics.fmean(ours), statistics.fmean(real))) / tests / len(gaps)
    seeds = statistics.variance(gaps) / len(gaps) if len(gaps) > 1 else 0.0
    gap, error = statistics.fmean(gaps), 1.96 * math.sqrt(sampling + seeds)
    if gap + error < MARGIN:
        return HOLDS
    return FAILS if gap - error > MARGIN else OPEN


def spectra(data_root: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log spectra `(720, BANDS, FRAMES)` of the spoken digits, the digits, and which are for testing.

    Raises:
        DataError: the recordings are not there.
    """
    path = (data_root or Path()) / "spoken_digits" / "spoken_digits.npz"
    if not path.exists():
        raise DataError(f"Found no {path}. Pass --data-root with the folder that holds spoken_digits.")
    stored = np.load(path)
    bounds, window = stored["offsets"], torch.hann_window(2 * BANDS)
    found = []
    for start, stop in itertools.pairwise(bounds):
        wave = torch.from_numpy(stored["samples"][start:stop].astype(np.float32)) / 2**15
        power = torch.stft(wave, 2 * BANDS, BANDS, window=window, return_complex=True).abs()[1:]
        logs = (power + 1e-3).log()[None]
        found.append(F.interpolate(logs, FRAMES, mode="linear")[0])
    x = torch.stack(found)
    x = (x - x.mean()) / x.std()
    return x, torch.from_numpy(stored["digit"].astype(np.int64)), torch.from_numpy(stored["is_test"] > 0)


def hear(form: str, data: tuple[Tensor, Tensor, Tensor], epochs: int, seed: int) -> float:
    """Train a form on the spoken digits and return its test accuracy, 0 to 1."""
    x, labels, is_test = data
    torch.manual_seed(seed)
    model = audio_network(form).train()
    # Decay on both factors would shrink their product twice, so the algebra is spared.
    algebras = [p for name, p in model.named_parameters() if name.endswith("algebra")]
    others = [p for name, p in model.named_parameters() if not name.endswith("algebra")]
    groups = [{"params": others}, {"params": algebras, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 3e-3, weight_decay=0.02)
    train, order = x[~is_test], torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(train) // 32))
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=order).split(32):
            moved = train[rows].roll(int(torch.randint(-4, 5, (1,), generator=order)), 2)
            optimizer.zero_grad()
            F.cross_entropy(model(moved), labels[~is_test][rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float((model.eval()(x[is_test]).argmax(1) == labels[is_test]).double().mean())


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the forms on images and sounds and compare each with the real network."""
    seeds = (seed,) if quick else (seed, seed + 1, seed + 2)
    found: dict[str, list[float]] = {}
    rows: list[dict[str, str | int]] = []
    verdicts: list[str] = []
    setting = {}

    def compare(
        data: str, results: dict[str, list[float]], tests: int, build: Callable[[str], nn.Module]
    ) -> None:
        real = trained_values(build(REAL))
        for form, values in results.items():
            size = trained_values(build(form))
            verdict = within(values, results[REAL], tests) if form in (TWO, FOUR) else "baseline"
            if form in (TWO, FOUR):
                verdicts.append(verdict)
            found[f"{data}: {form}"] = values
            rows.append(
                {
                    "data": data,
                    "form": form,
                    "trained values": size,
                    "of the real": f"{size / real:.3f}",
                    "test accuracy": mean_spread(values),
                    "claim": verdict,
                }
            )

    for data, channels in (("cifar10", 3), ("fashion-mnist", 1)):
        plan = Plan(
            data=data,
            train_images=256 if quick else 10_000,
            test_images=200 if quick else 10_000,
            side=32,
            epochs=1 if quick else 8,
            seeds=seeds,
            recipe={"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.02, "batch_size": 128},
        )
        build = partial(image_network, channels=channels)
        results, tests = accuracies(
            {form: partial(build, form) for form in COMPONENTS}, plan, data_root, progress
        )
        compare(data, results, tests, build)
        setting[data] = plan.setting()
    sounds, epochs = spectra(data_root), 1 if quick else 40
    heard: dict[str, list[float]] = {form: [] for form in COMPONENTS}
    for one in seeds if quick else range(seed, seed + 6):
        for form, values in heard.items():
            values.append(hear(form, sounds, epochs, one))
        progress(f"seed {one}: spoken digits " + ", ".join(f"{f} {v[-1]:.2%}" for f, v in heard.items()))
    compare("spoken digits", heard, int(sounds[2].sum()), audio_network)
    setting["spoken digits"] = {"epochs": epochs, "recordings": int((~sounds[2]).sum())}
    reason = "; ".join(f"{r['data']}, {r['form']}: {r['claim']}" for r in rows if r["form"] in (TWO, FOUR))
    return Reproduction("phnn", CLAIM, rows, overall(verdicts), reason, found, setting)
