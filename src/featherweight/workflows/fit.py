"""The main job: from a folder of images and a device's budget to the best small model."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from featherweight.data.sources import load_dataset
from featherweight.errors import UsageError
from featherweight.files import atomic_write
from featherweight.measure.accuracy import confusion
from featherweight.measure.machine import machine
from featherweight.report.content import RunReport, VariantResult
from featherweight.report.html import write_report
from featherweight.report.model_card import write_model_card
from featherweight.train.recipe import Recipe
from featherweight.workflows import delivery
from featherweight.workflows.budget import Budget, parse_quantity
from featherweight.workflows.candidates import Candidate, list_candidates
from featherweight.workflows.engine import add_engines
from featherweight.workflows.halving import Trial, successive_halving
from featherweight.workflows.run_folder import RunFolder, default_folder
from featherweight.workflows.screening import Screened, screen
from featherweight.workflows.shrinking import Shrunk, shrink
from featherweight.workflows.teachers import load_teacher
from featherweight.workflows.training import Task, make_recipe, make_task, train_candidate

log = logging.getLogger("featherweight")

# Shares of `time_s`: weighing candidates, comparing them, and what quantising, measuring and reporting
# need at the end.
_SCREEN_SHARE = 0.1
_SEARCH_SHARE = 0.15
_ENDING_SHARE = 0.04
_ENDING_LEAST_S = 20.0
_MAX_TRIALS = 4
_LEAST_TRIAL_S = 5.0
_TIE = 0.15
# What a training should see at least: networks too slow for it are not tried.
_WANTED_EPOCHS = 12
_WANTED_IMAGES = 200_000


@dataclass(frozen=True)
class FitConfig:
    """What a run was asked for. Times in seconds, sizes in bytes; None means no limit or the default.

    `epochs` fixes the length of the training in place of `time_s`, which makes a run repeatable to the bit.
    """

    data: str
    budget: Budget = dataclasses.field(default_factory=Budget)
    time_s: float = 1800.0
    models: tuple[str, ...] | None = None
    seed: int = 0
    data_root: str | None = None
    teacher: str | None = None
    pretrained: bool = False
    epochs: float | None = None
    devices: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FitResult:
    """What a run produced.

    `violations` lists the limits that the deployed variant breaks (empty: the budget is met).
    """

    run_dir: Path
    metrics: dict[str, Any]
    content: RunReport
    violations: tuple[str, ...]

    @property
    def report_path(self) -> Path:
        """The self-contained HTML report."""
        return self.run_dir / "report.html"


def fit(
    data: str | Path,
    *,
    max_latency: str | float | None = None,
    max_size: str | float | None = None,
    max_macs: str | float | None = None,
    max_drop: float = 1.0,
    time: str | float = "30m",
    models: Sequence[str] | str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    data_root: str | Path | None = None,
    teacher: str | None = None,
    pretrained: bool = False,
    epochs: float | None = None,
    devices: int = 1,
    command: str | None = None,
) -> FitResult:
    """Find, train, shrink, measure and export the best small classifier for a data set within a budget.

    Args:
        data: a folder with one folder per class, a CSV of path,label, an `.npz`, or a built-in name
            (`digits`, `mnist`, `fashion-mnist`, `cifar10`).
        max_latency: of one image on one thread of this machine, `"5ms"` or milliseconds.
        max_size: of the deployed file, `"1MB"` or bytes.
        max_macs: multiply-adds for one image, `"50M"` or a number.
        max_drop: percentage points of validation accuracy that int8 may lose.
        time: wall time for everything, `"30m"` or seconds.
        models: restrict the search to these networks (names, or one string with commas).
        seed: decides splits, order, augmentation and weights.
        out: run folder; by default the next free `runs/NAME`, or the last one with `resume`.
        resume: continue the run in `out` where it was interrupted.
        data_root: folder that holds a built-in set, for machines without a network.
        teacher: run folder of an earlier `fit` on the same classes, or `timm/NAME`, to distil from.
        pretrained: start from the published weights where the candidate has them.
        epochs: length of the final training in place of `time`.
        devices: processes to train with.
        command: the exact command, for the report.

    Raises:
        UsageError: an option cannot be read, `out` holds a run and `resume` is off, or no run is there
            to resume.
        DataError: the data cannot be used.
        BudgetError: no candidate fits the budget.

    Example:
        `fit("digits", max_latency="0.5ms", time="2m").metrics["variants"]["int8"]["test_accuracy"]`
    """
    config = FitConfig(
        data=str(data),
        budget=Budget.parse(max_latency, max_size, max_macs, max_drop),
        time_s=parse_quantity(time, "time"),
        models=_split_names(models),
        seed=seed,
        data_root=None if data_root is None else str(data_root),
        teacher=teacher,
        pretrained=pretrained,
        epochs=epochs,
        devices=devices,
    )
    if epochs is not None and epochs <= 0:
        raise UsageError(f"--epochs {epochs} must be above zero.")
    if devices < 1:
        raise UsageError(f"--devices {devices} must be at least 1.")
    folder = Path(out) if out is not None else default_folder(Path(str(data)).stem or "fit", resume)
    return _Job(config, RunFolder(folder, config.to_dict(), resume), command).run()


def _split_names(models: Sequence[str] | str | None) -> tuple[str, ...] | None:
    if models is None:
        return None
    names = models.split(",") if isinstance(models, str) else models
    return tuple(name.strip() for name in names if name.strip())


class _Job:
    """One run: its steps in order, each stored in the run folder when it is done."""

    def __init__(self, config: FitConfig, folder: RunFolder, command: str | None) -> None:
        self.config, self.folder = config, folder
        self.command = command or f"featherweight fit {shlex.quote(config.data)}"
        self.began = time.monotonic() - folder.spent_s

    def remaining_s(self) -> float:
        """Seconds of the budget not used yet, interruptions not counted."""
        return self.config.time_s - (time.monotonic() - self.began)

    def run(self) -> FitResult:
        """Go through the steps."""
        with self.folder.step("data"):
            task = self._load()
            teacher = load_teacher(self.config.teacher, task) if self.config.teacher else None
        with self.folder.step("search"):
            winner = self._search(task)
        with self.folder.step("train"):
            model, history = self._train(winner, task, teacher)
        with self.folder.step("shrink"):
            shrunk = shrink(model, winner, task, self.config.budget, self.folder.path, self.ending_s())
        with self.folder.step("measure"):
            variants, answers, images = self._measure(winner, task, shrunk)
        with self.folder.step("compile"):
            variants, notes = add_engines(self.folder.path, variants, images)
            shrunk = dataclasses.replace(shrunk, notes=(*shrunk.notes, *notes))
        return self._deliver(winner, task, model, shrunk, history, variants, answers, images)

    def ending_s(self) -> float:
        """Seconds kept for everything after the training."""
        return max(_ENDING_LEAST_S, _ENDING_SHARE * self.config.time_s)

    def _load(self) -> Task:
        dataset = load_dataset(self.config.data, data_root=self.config.data_root, seed=self.config.seed)
        if dataset.skipped:
            lines = ["path,reason", *(f"{_csv(path)},{_csv(reason)}" for path, reason in dataset.skipped)]
            atomic_write(self.folder.path / "skipped.csv", "\n".join(lines) + "\n")
        counts = dataset.summary()["images"]
        log.info(
            "%s: %d classes, %d images (train %d, val %d, test %d)",
            *(dataset.name, len(dataset.classes), counts["total"]),
            *(counts["train"], counts["val"], counts["test"]),
        )
        return make_task(dataset)

    def _search(self, task: Task) -> Candidate:
        progress = self.folder.progress
        if "winner" in progress:
            return Candidate(**progress["winner"])
        fitting = [entry for entry in self._screen(task) if not entry.dropped]
        by_label = {entry.candidate.label: entry for entry in fitting}
        alive = [entry.candidate for entry in fitting]
        trials = [Trial(**entry) for entry in progress.get("trials", [])]

        def store(trial: Trial) -> None:
            trials.append(trial)
            self.folder.save(trials=[entry.to_dict() for entry in trials])

        search_s = min(_SEARCH_SHARE * self.config.time_s, max(0.0, self.remaining_s()) / 2)
        search_s = progress.get("search_s", search_s)
        self.folder.save(search_s=search_s)
        winner, _ = successive_halving(
            alive,
            search_s,
            lambda candidate, time_s, number: self._try(candidate, task, time_s, number),
            done=tuple(trials),
            on_trial=store,
            tie=_TIE,
            images=len(task.dataset.val),
        )
        chosen = by_label[winner.label]
        log.info("Chosen: %s (%.3f ms, %.1f M MACs)", winner.label, chosen.latency_ms, chosen.macs / 1e6)
        self.folder.save(winner=winner.to_dict())
        return winner

    def _screen(self, task: Task) -> list[Screened]:
        if "screened" in self.folder.progress:
            return self._screened()
        native = max(task.dataset.sizes[1])
        candidates = list_candidates(native, self.config.models)
        train_s = max(1.0, (1 - _SCREEN_SHARE - _SEARCH_SHARE) * self.config.time_s - self.ending_s())
        images = max(_WANTED_EPOCHS * len(task.dataset.train), _WANTED_IMAGES)
        min_images_per_s = 0.0 if self.config.epochs else images / train_s
        # A trial shorter than a few seconds says nothing, so a short budget compares fewer candidates.
        keep = max(1, min(_MAX_TRIALS, int(_SEARCH_SHARE * self.config.time_s / _LEAST_TRIAL_S)))
        screened = screen(
            candidates,
            task.num_classes,
            task.in_chans,
            self.config.budget,
            keep=keep,
            work_dir=self.folder.path / "screening",
            min_images_per_s=min_images_per_s,
            time_s=_SCREEN_SHARE * self.config.time_s,
        )
        self.folder.save(screened=[entry.to_dict() for entry in screened])
        return screened

    def _try(self, candidate: Candidate, task: Task, time_s: float, number: int) -> tuple[float, float]:
        epochs = max(1.0, self.config.epochs / 8) * 2**number if self.config.epochs else None
        recipe = self._recipe(candidate, task, time_s, epochs)
        out = self.folder.path / "trials" / f"{candidate.label}-{number}"
        _, result = train_candidate(candidate, task, recipe, out, devices=self.config.devices)
        return result.val_accuracy, len(result.history)

    def _recipe(self, candidate: Candidate, task: Task, time_s: float, epochs: float | None) -> Recipe:
        """A length in epochs asks for a repeatable run, so nothing in it may depend on a stopwatch."""
        length: dict[str, Any] = {"epochs": epochs, "bf16": False} if epochs else {"time_budget_s": time_s}
        return make_recipe(candidate, task, seed=self.config.seed, **length)

    def _train(
        self, winner: Candidate, task: Task, teacher: nn.Module | None
    ) -> tuple[nn.Module, list[dict]]:
        progress = self.folder.progress
        time_s = progress.get("train_s", max(2.0, self.remaining_s() - self.ending_s()))
        self.folder.save(train_s=time_s)
        recipe = self._recipe(winner, task, time_s, self.config.epochs)
        model, result = train_candidate(
            winner,
            task,
            recipe,
            self.folder.path / "train",
            resume=True,
            teacher=teacher,
            pretrained=self.config.pretrained,
            devices=self.config.devices,
        )
        log.info("Trained %d steps: validation accuracy %.2f %%", result.steps, 100 * result.val_accuracy)
        return model, result.history

    def _measure(
        self, winner: Candidate, task: Task, shrunk: Shrunk
    ) -> tuple[dict[str, VariantResult], dict[str, delivery.Answers], Any]:
        test = task.dataset.test
        pixels = test.decode((winner.input, winner.input), task.mode)
        images = task.preprocess(winner.input).normalize(pixels).transpose(0, 3, 1, 2)
        variants, answers = {}, {}
        for name, file in delivery.FILES.items():
            variants[name], answers[name] = delivery.measure_variant(
                self.folder.path / file, images, test.labels, task.dataset.classes, shrunk.params
            )
        return variants, answers, images

    def _screened(self) -> list[Screened]:
        return [
            Screened(**{**entry, "candidate": Candidate(**entry["candidate"])})
            for entry in self.folder.progress["screened"]
        ]

    def _deliver(
        self,
        winner: Candidate,
        task: Task,
        model: nn.Module,
        shrunk: Shrunk,
        history: list[dict],
        variants: dict[str, VariantResult],
        answers: dict[str, delivery.Answers],
        images: Any,
    ) -> FitResult:
        budget, classes = self.config.budget, task.dataset.classes
        deployed = delivery.choose_variant(variants, budget, shrunk.val_accuracy)
        with self.folder.step("report"):
            content = RunReport(
                title=f"{winner.model} on {task.dataset.name}",
                command=self.command,
                classes=classes,
                variants=variants,
                dataset=task.dataset.summary(),
                budget={**budget.to_dict(), "time_s": self.config.time_s},
                candidates=delivery.candidate_points(
                    self._screened(), self.folder.progress.get("trials", []), winner
                ),
                history=history,
                confusion=confusion(answers[deployed].labels, answers[deployed].predicted, len(classes)),
                mistakes=delivery.pick_mistakes(task.dataset.test, answers[deployed], classes),
                gradcams=delivery.pick_cams(model, task.dataset.test, images, answers[deployed], classes),
                steps_s=self.folder.progress["wall_s"],
                machine=machine(),
                preprocess=json.loads(task.preprocess(winner.input).to_json()),
                warnings=task.dataset.warnings,
                notes=shrunk.notes,
                deployed=deployed,
                **delivery.provenance(),
            )
            violations = tuple(delivery.budget_violations(variants[deployed], budget))
            write_report(content, self.folder.path / "report.html")
            write_model_card(content, self.folder.path / "README.md")
        metrics = self._metrics(winner, task, shrunk, variants, deployed, violations)
        delivery.write_sidecars(self.folder.path, task.preprocess(winner.input), classes, metrics)
        return FitResult(self.folder.path, metrics, content, violations)

    def _metrics(
        self,
        winner: Candidate,
        task: Task,
        shrunk: Shrunk,
        variants: dict[str, VariantResult],
        deployed: str,
        violations: tuple[str, ...],
    ) -> dict[str, Any]:
        return {
            "model": winner.model,
            "width": winner.width,
            "input": [task.in_chans, winner.input, winner.input],
            "candidate": winner.to_dict(),
            "chosen": deployed,
            "files": delivery.FILES,
            "budget": {**self.config.budget.to_dict(), "time_s": self.config.time_s},
            "budget_violations": list(violations),
            "variants": {name: delivery.variant_metrics(result) for name, result in variants.items()},
            "val_accuracy": shrunk.val_accuracy,
            "quantization": {"method": shrunk.method, "kept_float": list(shrunk.kept_float)},
            "opset": shrunk.opset,
            "input_names": ["image"],
            "output_names": ["logits"],
            "seed": self.config.seed,
            "wall_s": self.folder.progress["wall_s"],
            "machine": machine(),
            **delivery.provenance(),
        }


def _csv(text: str) -> str:
    quoted = str(text).replace('"', '""').replace("\n", " ")
    return f'"{quoted}"'
