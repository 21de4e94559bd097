"""CFSR: its published figures with its weights, and edge filters beside the 3x3 convolution against none.

The paper (section III-C) lets Sobel and Laplace filters of learned strength run beside the depthwise
convolution of the feed-forward part while training. Both small networks here cost the same once merged. The
figures on BSD100, which take long, are held by slow tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from featherweight.measure.count import count
from featherweight.models.cfsr import CFSR
from featherweight.train.patches import Restoration
from featherweight.workflows.miniature_sr import (
    WORSE_MARGIN_DB,
    benchmark_pictures,
    check_figures,
    judge_db,
    seeded,
    spread_db,
    train,
    training_pictures,
)
from featherweight.workflows.reproduce import FAILS, HOLDS, Reproduction, overall

CLAIM = (
    "The published weights reach the published PSNR within 0.02 dB; edge filters in training are not worse "
    "than none, and merging them changes no figure."
)
FORMS: dict[str, str | None] = {"edge filters": "paper", "none": None}
PATCH = 32
EXTRA = 10
"""Pictures of BSD100 on which the small networks are compared, besides Set5."""


def network(masks: str | None) -> CFSR:
    """Build the small network."""
    return CFSR(2, channels=12, depths=(2, 2), masks=masks)


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Measure the published weights, train both small networks and compare."""
    names, sets = (("cfsr_x4",), ("set5",)) if quick else (("cfsr_x2", "cfsr_x4"), ("set5",))
    pictures = training_pictures(data_root, 2, PATCH, limit=4 if quick else None)
    tests = [benchmark_pictures(name, 2, data_root, 1 if quick else EXTRA) for name in ("set5", "bsd100")]
    seeds, steps = ((seed,), 5) if quick else ((seed, seed + 1, seed + 2), 300)
    found: dict[str, list[float]] = {form: [] for form in FORMS}
    moved = 0.0
    for each in seeds:
        for form, masks in FORMS.items():
            model = seeded(partial(network, masks), each)
            train(
                model,
                pictures,
                Restoration(PATCH),
                steps=steps,
                batch=16,
                lr=3e-3,
                seed=each,
                stage=f"{form} {each}",
            )
            merged = copy.deepcopy(model).fuse()
            scores = [check.score(merged) for check in tests]
            found[form].append(sum(score for score, _ in scores) / len(scores))
            moved = max(moved, abs(tests[0].score(model)[0] - scores[0][0]))
            progress(f"seed {each}: {form} {found[form][-1]:.3f} dB")
    figures, reached = check_figures(names, sets, data_root, progress, limit=2 if quick else None)
    for form, values in found.items():
        size = count(network(FORMS[form]).eval().fuse(), (3, 64, 64))
        row = dict.fromkeys(figures[0])
        figures.append(
            {**row, "network": f"12 channels, 2x2 blocks, {form}, {size.params} parameters merged"}
        )
        figures[-1] |= {"data": f"set5 and {EXTRA} of bsd100, x2", "psnr_db": spread_db(values)}
    with_edges, without = found.values()
    kept = judge_db(with_edges, without, WORSE_MARGIN_DB)
    same = HOLDS if moved < 1e-3 else FAILS
    reason = (
        f"published figures: {reached}; {spread_db(with_edges)} with filters against {spread_db(without)}, "
        f"not worse: {kept}, better: {judge_db(with_edges, without)}; merging moves {moved:.1e} dB"
    )
    setting = {
        "patch": PATCH,
        "steps": steps,
        "batch": 16,
        "seeds": list(seeds),
        "train": "t91, bsds500_train",
    }
    return Reproduction("cfsr", CLAIM, figures, overall([reached, kept, same]), reason, found, setting)
