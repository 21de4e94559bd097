"""What the miniatures of super-resolution share: data, official weights, a short training, verdicts in dB."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.cards import Figure
from featherweight.data.pictures import Pictures, load_pictures
from featherweight.data.sr_pairs import find_sr_set, sr_pairs
from featherweight.errors import DataError
from featherweight.registry import card_of, create_model
from featherweight.train.loop import fit_model
from featherweight.train.patches import PatchData, Restoration
from featherweight.train.recipe import Recipe
from featherweight.workflows.reproduce import FAILS, HOLDS, OPEN
from featherweight.workflows.restoration_check import PictureCheck

FIGURE_TOLERANCE_DB = 0.02
WORSE_MARGIN_DB = 0.05
"""A loss below this is none, for "not worse"."""

OTHER_FILES = {
    "imdn_as": "IMDN_AS.pth",
    "imdn_rtc": "model_RTC.pth",
    "imdn_rte": "model_RTE.pth",
    "dscf_x4": "DSCF_x4.pth",
}
"""Files of weights that are not called like their network."""


def benchmark_pictures(
    name: str, scale: int, data_root: Path | None, limit: int | None = None
) -> PictureCheck:
    """Return a test set with the small pictures that it brings.

    Raises:
        DataError: the set is not below `data_root`.
    """
    if data_root is None:
        raise DataError(f"{name} is needed. Give the folder that holds it with --data-root.")
    pairs = list(itertools.islice(sr_pairs(find_sr_set(name, data_root), scale), limit))
    high = [
        np.ascontiguousarray(pair.high[: pair.low.shape[0] * scale, : pair.low.shape[1] * scale])
        for pair in pairs
    ]
    return PictureCheck(Pictures(scale, tuple(p.name for p in pairs), high, [pair.low for pair in pairs]))


def training_pictures(data_root: Path | None, scale: int, patch: int, limit: int | None = None) -> Pictures:
    """Return T91 and the training photographs of BSDS500, with bicubic small pictures.

    Raises:
        DataError: a set is not below `data_root`.
    """
    if data_root is None:
        raise DataError("T91 and BSDS500 are needed. Give the folder that holds them with --data-root.")
    parts = [load_pictures(data_root / name, scale, patch, limit=limit) for name in ("t91", "bsds500_train")]
    first, second = parts
    high, low = [*first.high, *second.high], [*first.low, *second.low]
    return Pictures(scale, first.names + second.names, high, low, first.skipped + second.skipped)


def official_network(name: str, data_root: Path | None) -> nn.Module:
    """Return a network with its published weights, from `weights` beside `data_root` or downloaded."""
    file = OTHER_FILES.get(name, name.upper().replace("_X", "_x") + ".pth")
    path = None if data_root is None else Path(os.path.abspath(data_root)).parent / "weights" / file
    if path is not None and path.is_file():
        model = create_model(name, checkpoint_path=str(path))
    else:
        model = create_model(name, pretrained=True)
    return model.eval().fuse()


def published_figures(name: str, data: str) -> dict[str, Figure]:
    """Return the claimed PSNR and SSIM of a variant on a test set, as the card has them."""
    label = {"set5": "Set5", "bsd100": "B100"}[data]
    variant = card_of(name).variants[name]
    return {
        f.what: f for f in variant.claimed if f.what in ("psnr", "ssim") and f.data.startswith(f"{label},")
    }


def check_figures(
    names: Sequence[str],
    sets: Sequence[str],
    data_root: Path | None,
    progress: Callable[[str], None],
    limit: int | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """Measure networks with their official weights on test sets beside what is published.

    Returns:
        One row for each network and set, and whether every published PSNR is reached within 0.02 dB.
    """
    rows, verdicts = [], []
    for name in names:
        model = official_network(name, data_root)
        for data in sets:
            found = benchmark_pictures(data, model.scale, data_root, limit).measure(model)
            claimed = published_figures(name, data)
            row: dict[str, Any] = {"network": name, "data": data, "psnr_db": round(found["psnr"], 4)}
            row |= {
                "published_db": claimed["psnr"].value if "psnr" in claimed else None,
                "ssim": round(found["ssim"], 5),
            }
            row["published_ssim"] = claimed["ssim"].value if "ssim" in claimed else None
            if "psnr" in claimed:
                close = abs(found["psnr"] - claimed["psnr"].value) <= FIGURE_TOLERANCE_DB
                verdicts.append(HOLDS if close else FAILS)
            rows.append(row)
            progress(f"{name} on {data}: {found['psnr']:.3f} dB, SSIM {found['ssim']:.4f}")
    return rows, FAILS if FAILS in verdicts else HOLDS


def train(
    model: nn.Module,
    pictures: Pictures,
    task: Restoration,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    teacher: nn.Module | None = None,
    ema: float | None = 0.99,
    stage: str | None = None,
) -> nn.Module:
    """Train a network for a number of steps, as `train-sr` does, and return it in evaluation mode.

    Args:
        model: the network.
        pictures: to train on.
        task: patches and losses.
        steps: of the optimiser.
        batch: patches of a step.
        lr: highest learning rate.
        seed: decides patches and their order.
        teacher: see `train.patches`.
        ema: decay of the average.
        stage: name of this training; where the environment names a folder (`FEATHERWEIGHT_STAGES`), the state
            stays there, and a run that was stopped goes on from it.
    """
    data = PatchData(pictures, task)
    recipe = Recipe(
        optimizer="adamw",
        lr=lr,
        weight_decay=0.0,
        batch_size=batch,
        epochs=1.0,
        warmup_fraction=0.05,
        ema_decay=ema,
        ema_every=1,
        bf16=False,
        seed=seed,
        eval_every=10**6,
        checkpoint_every_s=20.0,
    )
    per_epoch = data.batches(recipe, None, model).steps_per_epoch
    recipe = Recipe(**{**recipe.to_dict(), "epochs": steps / per_epoch})
    kept = os.environ.get("FEATHERWEIGHT_STAGES") if stage else None
    with contextlib.nullcontext(Path(kept, stage)) if kept else tempfile.TemporaryDirectory() as folder:
        fit_model(
            model,
            data,
            PictureCheck(None),
            recipe,
            None,
            folder,
            teacher=teacher,
            resume=bool(kept),
            progress=lambda event: None,
        )
    return model


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network whose start depends on the seed alone."""
    torch.manual_seed(seed)
    return build()


def judge_db(better: Sequence[float], worse: Sequence[float], margin: float = 0.0) -> str:
    """Say whether PSNR `better` (one per seed) lies above `worse`, or with a margin: not below it.

    Holds if the mean gain less 1.96 standard errors over the seeds exceeds `-margin`; does not hold if the
    mean gain plus as much is negative.

    >>> judge_db([31.2, 31.3], [31.0, 31.1]), judge_db([31.0, 31.2], [31.02, 31.19], margin=0.05)
    ('holds', 'holds')
    >>> judge_db([31.0, 31.4], [31.1, 31.2]), judge_db([30.0, 30.1], [31.0, 31.1])
    ('inconclusive', 'does not hold')
    """
    gains = [a - b for a, b in zip(better, worse, strict=True)]
    gain = statistics.fmean(gains)
    error = 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    if gain - error > -margin:
        return HOLDS
    return FAILS if gain + error < 0 else OPEN


def spread_db(values: Sequence[float]) -> str:
    """Write PSNR of several seeds as mean ± standard deviation.

    >>> spread_db([31.0, 31.2])
    '31.100 ± 0.141 dB'
    """
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} dB"
