"""DSCLoRA in miniature: low-rank fine-tuning under a teacher's affinities against the same without a teacher.

A small SPAN trains normally and is frozen. Its convolutions get low-rank updates, trained (b) on the true
images alone or (c) also on a wider SPAN's images and affinities (section 3), equally long; then they merge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from featherweight.data.pictures import Pictures
from featherweight.measure.count import count
from featherweight.models.span import SPAN
from featherweight.models.span.adapt import Supervised, adapt, merge_adapters
from featherweight.train.patches import Restoration
from featherweight.workflows.miniature_sr import (
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
    "Low-rank updates under a teacher's affinities lift a trained SPAN at the same cost, above the same "
    "updates without a teacher."
)
START, ALONE, TAUGHT = "trained SPAN", "low-rank updates alone", "low-rank updates with a teacher"
WIDTH, TEACHER_WIDTH = 8, 16
PATCH = 32
IMG_RANGE = 16.0
EXTRA = 10
"""Pictures of BSD100 on which the networks are compared, besides Set5."""
TEACHING = {"teacher_weight": 0.5, "affinity_weight": 0.02}


def network(channels: int) -> SPAN:
    """Build a SPAN for twice the size in its merged form, for a range in which short trainings get far."""
    return SPAN(2, channels=channels, img_range=IMG_RANGE).fuse()


def fine_tune(
    start: nn.Module, teacher: nn.Module | None, pictures: Pictures, steps: int, seed: int
) -> nn.Module:
    """Adapt a copy of the trained network and merge the updates."""
    student = Supervised(seeded(lambda: adapt(copy.deepcopy(start)), seed))
    task = Restoration(PATCH, **(TEACHING if teacher else {}))
    guide = Supervised(teacher, always=True) if teacher else None
    stage = f"{'taught' if teacher else 'alone'}-{seed}"
    train(student, pictures, task, steps=steps, batch=16, lr=1e-3, seed=seed, teacher=guide, stage=stage)
    return merge_adapters(student.model)


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train a teacher and students, fine-tune each student both ways, and compare."""
    pictures = training_pictures(data_root, 2, PATCH, limit=4 if quick else None)
    tests = [benchmark_pictures(name, 2, data_root, 1 if quick else EXTRA) for name in ("set5", "bsd100")]
    seeds = (seed,) if quick else (seed, seed + 1, seed + 2)
    taught_steps, steps, more = (3, 3, 3) if quick else (700, 500, 150)

    def score(model: nn.Module) -> float:
        return sum(check.score(model)[0] for check in tests) / len(tests)

    plain = {"pictures": pictures, "task": Restoration(PATCH), "batch": 16, "lr": 2e-3}
    teacher = seeded(partial(network, TEACHER_WIDTH), seed + 100)
    train(teacher, **plain, steps=taught_steps, seed=seed + 100, stage="teacher")
    progress(f"teacher: {score(teacher):.3f} dB")
    found: dict[str, list[float]] = {START: [], ALONE: [], TAUGHT: []}
    costs = set()
    for each in seeds:
        start = seeded(partial(network, WIDTH), each)
        train(start, **plain, steps=steps, seed=each, stage=f"start-{each}")
        forms = {START: start, ALONE: fine_tune(start, None, pictures, more, each)}
        forms[TAUGHT] = fine_tune(start, teacher, pictures, more, each)
        for form, model in forms.items():
            costs.add(count(model, (3, 64, 64)))
            found[form].append(score(model))
            progress(f"seed {each}: {form} {found[form][-1]:.3f} dB")
    figures, _ = check_figures(("dscf_x4",), ("set5",), data_root, progress, limit=2 if quick else None)
    for form, values in found.items():
        row = {**dict.fromkeys(figures[0]), "network": f"SPAN, {WIDTH} channels, {form}"}
        figures.append({**row, "data": f"set5 and {EXTRA} of bsd100, x2", "psnr_db": spread_db(values)})
    verdicts = [judge_db(found[TAUGHT], found[other]) for other in (START, ALONE)]
    same = HOLDS if len(costs) == 1 else FAILS
    reason = (
        f"{spread_db(found[TAUGHT])} with a teacher against {spread_db(found[START])} before ({verdicts[0]}) "
        f"and {spread_db(found[ALONE])} without a teacher ({verdicts[1]}), teacher {score(teacher):.3f} dB; "
        f"equal parameters and MACs: {same}"
    )
    setting = {"patch": PATCH, "steps": [taught_steps, steps, more], "seeds": list(seeds), **TEACHING}
    return Reproduction("dsclora", CLAIM, figures, overall([*verdicts, same]), reason, found, setting)
