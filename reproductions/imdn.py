"""IMDN: its published figures with its weights, and attention by contrast against plain squeeze-excite.

The paper (sections 3.2 and 4.3) replaces the mean, from which squeeze-excite computes its gates, by the mean
plus the standard deviation; at full size that is worth 0.01 dB on Set5. Here two small networks of equal size
differ in nothing else. The figures on BSD100, which take long, are held by slow tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from featherweight.blocks.squeeze_excite import SqueezeExcite
from featherweight.measure.count import count
from featherweight.models.imdn import IMDN, ContrastAttention
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
from featherweight.workflows.reproduce import Reproduction, overall

CLAIM = (
    "The published weights reach the published PSNR within 0.02 dB, and gates computed from contrast are not "
    "worse than those of squeeze-excite."
)
OURS, PLAIN = "contrast-aware attention", "squeeze-excite"
REDUCTION = 4
ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    OURS: partial(ContrastAttention, reduction=REDUCTION),
    PLAIN: lambda channels: SqueezeExcite(channels, channels // REDUCTION, gate=nn.Sigmoid),
}
PATCH = 32
EXTRA = 10
"""Pictures of BSD100 on which the small networks are compared, besides Set5."""


def network(kind: str) -> IMDN:
    """Build the small network with one of the attentions."""
    return IMDN(2, channels=12, depth=3, attention=ATTENTIONS[kind])


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Measure the published weights, train both small networks and compare."""
    names, sets = (("imdn_x4",), ("set5",)) if quick else (("imdn_x2", "imdn_x4"), ("set5",))
    pictures = training_pictures(data_root, 2, PATCH, limit=4 if quick else None)
    tests = [benchmark_pictures(name, 2, data_root, 1 if quick else EXTRA) for name in ("set5", "bsd100")]
    seeds, steps = ((seed,), 5) if quick else ((seed, seed + 1, seed + 2), 300)
    found: dict[str, list[float]] = {kind: [] for kind in ATTENTIONS}
    for each in seeds:
        for kind in ATTENTIONS:
            model = seeded(partial(network, kind), each)
            train(
                model,
                pictures,
                Restoration(PATCH),
                steps=steps,
                batch=16,
                lr=2e-3,
                seed=each,
                stage=f"{kind} {each}",
            )
            scores = [check.score(model) for check in tests]
            found[kind].append(sum(score for score, _ in scores) / len(scores))
            progress(f"seed {each}: {kind} {found[kind][-1]:.3f} dB")
    figures, reached = check_figures(names, sets, data_root, progress, limit=2 if quick else None)
    for kind, values in found.items():
        size = count(network(kind), (3, 64, 64))
        row = dict.fromkeys(figures[0])
        figures.append({**row, "network": f"12 channels, 3 blocks, {kind}, {size.params} parameters"})
        figures[-1] |= {"data": f"set5 and {EXTRA} of bsd100, x2", "psnr_db": spread_db(values)}
    kept = judge_db(found[OURS], found[PLAIN], WORSE_MARGIN_DB)
    reason = (
        f"published figures: {reached}; {spread_db(found[OURS])} against {spread_db(found[PLAIN])} for "
        f"squeeze-excite, not worse: {kept}, better: {judge_db(found[OURS], found[PLAIN])}"
    )
    setting = {
        "patch": PATCH,
        "steps": steps,
        "batch": 16,
        "seeds": list(seeds),
        "train": "t91, bsds500_train",
    }
    return Reproduction("imdn", CLAIM, figures, overall([reached, kept]), reason, found, setting)
