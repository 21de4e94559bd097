"""Train a super-resolution network on a folder of photographs, and deliver it with its figures.

The run folder holds `config.json`, `metrics.jsonl`, `model.safetensors` (merged, in our layout), `model.onnx`
(any height and width), `preprocess.json`, `metrics.json` and `README.md`, the model card. With `adapt` a
trained network is fine-tuned by DSCLoRA: low-rank updates under a teacher, merged at the end.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.blocks.restorer import Restorer
from featherweight.data.pictures import Pictures, list_pictures, load_pictures
from featherweight.errors import UsageError, close_matches
from featherweight.export.onnx import export_onnx
from featherweight.files import atomic_write, atomic_write_json
from featherweight.measure.count import count
from featherweight.models.span.adapt import Supervised, adapt, merge_adapters
from featherweight.registry import card_of, create_model
from featherweight.train.checkpoint import save_tensors
from featherweight.train.loop import FINAL_WEIGHTS, TrainResult, fit_model
from featherweight.train.patches import RECIPES, PatchData, Restoration
from featherweight.train.progress import ProgressCallback
from featherweight.train.recipe import Recipe
from featherweight.workflows.restoration_check import PictureCheck
from featherweight.workflows.run_folder import RunFolder, default_folder

log = logging.getLogger("featherweight")

MAX_HELD_OUT = 10
EXPORT_SIZE = (48, 40)
"""Height and width in pixels with which the ONNX file is made; any other will do for running it."""

PREPROCESS = {"mode": "RGB", "range": [0.0, 1.0], "layout": "NCHW", "size": "any"}


@dataclass(frozen=True)
class TrainSROptions:
    """What may be asked of a training; None takes the recipe's value.

    Args:
        model: name of a restoration network.
        val: folder or zip of validation pictures; None holds out the last pictures of the training.
        recipe: a name from `train.patches.RECIPES`; None takes the network's, or `dsclora` to adapt.
        epochs: passes over the pictures (of at most 1000 steps).
        time_s: wall time of the training in seconds.
        patch: side of a patch of the large pictures, in pixels.
        batch: patches of a step.
        lr: learning rate.
        loss: `l1`, `l2` or `charbonnier`.
        frequency: weight of the distance between spectra.
        ema: decay of the averaged weights; 0 for none.
        channels: width of the network, if not the published one.
        weights: file to start from.
        adapt: freeze `weights` and train low-rank updates.
        teacher: name of a network to learn from.
        teacher_weights: its weights; None takes the published ones.
        teacher_channels: its width, if not the published one.
        teacher_weight: weight of the pixel loss against the teacher's image.
        affinity: weight of the distance between affinities.
        limit: at most this many training pictures.
        seed: decides start, patches and order.
        threads: processor threads.
    """

    model: str = "imdn_x2"
    val: str | None = None
    recipe: str | None = None
    epochs: float | None = None
    time_s: float | None = None
    patch: int | None = None
    batch: int | None = None
    lr: float | None = None
    loss: str | None = None
    frequency: float | None = None
    ema: float | None = None
    channels: int | None = None
    weights: str | None = None
    adapt: bool = False
    teacher: str | None = None
    teacher_weights: str | None = None
    teacher_channels: int | None = None
    teacher_weight: float | None = None
    affinity: float | None = None
    limit: int | None = None
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class TrainSRResult:
    """The run folder and what stands in its `metrics.json`."""

    run_dir: Path
    metrics: dict[str, Any]


def train_sr(
    data: str | Path,
    options: TrainSROptions = TrainSROptions(),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> TrainSRResult:
    """Train, measure, export and describe a super-resolution network.

    Args:
        data: folder, below it too, or zip file of photographs.
        options: what to train and how.
        out: the run folder; None takes `runs/<model>`.
        resume: continue the interrupted run there; it ends with the same weights.
        progress: see `train.progress`; None draws a bar with the time left on a terminal.

    Raises:
        UsageError: a name is unknown, or options contradict each other.
        DataError: the place holds no usable picture.
        CheckpointError: weights or the run's state cannot be used.
    """
    recipe, task = plan_training(options)
    # What can be refused is, before the folder is taken.
    model, teacher = _build(options, task)
    list_pictures(data)
    folder = Path(out) if out else default_folder(options.model, resume)
    config = {"data": str(data), **dataclasses.asdict(options)}
    config |= {"recipe_fields": recipe.to_dict(), "task": dataclasses.asdict(task)}
    run = RunFolder(folder, config, resume)
    spill = folder / "pictures.raw"
    spill.unlink(missing_ok=True)
    try:
        train, check = _load(data, options, model.scale, task.patch, spill)
        start = check.measure(model) if options.weights and len(check) else None
        with run.step("train"):
            found = _fit(
                model, teacher, PatchData(train, task), check, recipe, options, folder, resume, progress
            )
        model.eval().fuse()
        save_tensors(folder / FINAL_WEIGHTS, model.state_dict())
        metrics = _describe(model, options, recipe, train, check, found, start)
    finally:
        spill.unlink(missing_ok=True)
    with run.step("export"):
        report = export_onnx(
            model,
            folder / "model.onnx",
            (model.in_chans, *EXPORT_SIZE),
            dynamic_size=True,
            metadata={"featherweight.scale": str(model.scale), "featherweight.model": options.model},
        )
    metrics |= {"size_bytes": report.size_bytes, "max_relative_error": report.max_relative_error}
    metrics["wall_s"] = run.progress["wall_s"]
    atomic_write_json(folder / "preprocess.json", {**PREPROCESS, "scale": model.scale})
    atomic_write(folder / "README.md", model_card(metrics))
    atomic_write_json(folder / "metrics.json", metrics)
    return TrainSRResult(folder, metrics)


def plan_training(options: TrainSROptions) -> tuple[Recipe, Restoration]:
    """Return the recipe and the task: a named recipe's, changed by the options.

    Raises:
        UsageError: a name is unknown, or options contradict each other.
    """
    card = card_of(options.model)
    if card.networks_task != "restore":
        raise UsageError(f"'{options.model}' restores no images. See: featherweight list --task restore")
    own = "dsclora" if options.adapt else {"dsclora": "span"}.get(card.slug, card.slug)
    name = options.recipe or own
    if name not in RECIPES:
        raise UsageError(f"No recipe '{name}'.{close_matches(name, RECIPES)} Known: {', '.join(RECIPES)}.")
    if options.adapt and not options.weights:
        raise UsageError("--adapt refines a trained network. Give its weights: --weights FILE")
    if options.teacher_weights and not options.teacher:
        raise UsageError("--teacher-weights without --teacher. Name the teacher's network.")
    fields, task = (dict(part) for part in RECIPES[name])
    changed = {
        "epochs": options.epochs,
        "time_budget_s": options.time_s,
        "batch_size": options.batch,
        "lr": options.lr,
    }
    fields |= {key: value for key, value in changed.items() if value is not None}
    if options.ema is not None:
        fields["ema_decay"] = options.ema or None
    fields |= {"seed": options.seed, "threads": options.threads}
    dense = {
        "patch": options.patch,
        "loss": options.loss,
        "frequency_weight": options.frequency,
        "teacher_weight": options.teacher_weight,
        "affinity_weight": options.affinity,
    }
    task |= {key: value for key, value in dense.items() if value is not None}
    if not options.teacher:
        task["affinity_weight"] = 0.0
    return Recipe(**fields), Restoration(**task)


def _build(options: TrainSROptions, task: Restoration) -> tuple[Restorer, Restorer | None]:
    """Build the network and its teacher, with their weights."""
    torch.manual_seed(options.seed)
    model = _network(options.model, options.channels)
    if options.weights:
        model.load_official(options.weights)
    if task.patch % model.scale:
        raise UsageError(f"--patch {task.patch} is no multiple of the scale {model.scale}.")
    if not options.teacher:
        return model, None
    teacher = _network(options.teacher, options.teacher_channels)
    if options.teacher_weights:
        teacher.load_official(options.teacher_weights)
    else:
        teacher = create_model(options.teacher, pretrained=True)
    if teacher.scale != model.scale:
        raise UsageError(
            f"The teacher's scale is {teacher.scale}, the network's {model.scale}. Take equal ones."
        )
    if task.affinity_weight and len(teacher.blocks) != len(model.blocks):
        raise UsageError(
            f"Affinities compare block by block; the teacher has {len(teacher.blocks)} blocks, the network "
            f"{len(model.blocks)}. Set --affinity 0."
        )
    return model, teacher.eval().fuse()


def _network(name: str, channels: int | None) -> Restorer:
    if card_of(name).networks_task != "restore":
        raise UsageError(f"'{name}' restores no images. See: featherweight list --task restore")
    return create_model(name, **({} if channels is None else {"channels": channels}))


def _load(
    data: str | Path, options: TrainSROptions, scale: int, patch: int, spill: Path
) -> tuple[Pictures, PictureCheck]:
    """Read training and validation pictures; without a place for the latter, the last ones are held out."""
    pictures = load_pictures(data, scale, patch, limit=options.limit, spill=spill)
    if pictures.skipped:
        log.warning(
            "%d of %d files were skipped", len(pictures.skipped), len(pictures.skipped) + len(pictures)
        )
    if options.val:
        return pictures, PictureCheck(load_pictures(options.val, scale, 2 * scale + 11))
    held_out = min(MAX_HELD_OUT, len(pictures) // 10 or int(len(pictures) > 1))
    if not held_out:
        return pictures, PictureCheck(None)
    last = len(pictures) - held_out
    return pictures.take(range(last)), PictureCheck(pictures.take(range(last, len(pictures))))


def _fit(
    model: Restorer,
    teacher: Restorer | None,
    data: PatchData,
    check: PictureCheck,
    recipe: Recipe,
    options: TrainSROptions,
    folder: Path,
    resume: bool,
    progress: ProgressCallback | None,
) -> TrainResult:
    """Train `model` in place, with maps and low-rank updates where they are asked for."""
    if options.adapt:
        torch.manual_seed(options.seed)
        adapt(model)
    trained: nn.Module = model
    guide: nn.Module | None = teacher
    if data.task.affinity_weight and teacher is not None:
        trained, guide = Supervised(model), Supervised(teacher, always=True)
    found = fit_model(
        trained, data, check, recipe, None, folder, teacher=guide, resume=resume, progress=progress
    )
    if options.adapt:
        merge_adapters(model)
    return found


def _describe(
    model: Restorer,
    options: TrainSROptions,
    recipe: Recipe,
    train: Pictures,
    check: PictureCheck,
    found: TrainResult,
    start: dict[str, float] | None,
) -> dict[str, Any]:
    """Collect what is known about the trained network."""
    size = count(model, (model.in_chans, 64, 64))
    metrics: dict[str, Any] = {
        "model": options.model,
        "scale": model.scale,
        "params": size.params,
        "macs_64x64": size.macs,
        "pictures": {"train": len(train), "val": len(check), "skipped": len(train.skipped)},
        "skipped": [list(entry) for entry in train.skipped],
        "steps": found.steps,
        "epochs": len(found.history),
        "train_loss": found.history[-1]["train_loss"],
        "lr": recipe.lr,
        "seed": recipe.seed,
        "adapted": options.adapt,
        "teacher": options.teacher,
    }
    if len(check):
        metrics |= {"val": check.measure(model), "val_bicubic": check.measure(None)}
    if start is not None:
        metrics["val_before"] = start
    return metrics


def model_card(metrics: dict[str, Any]) -> str:
    """Return the model card as Markdown."""
    scale, size = metrics["scale"], f"{metrics['params']:,} parameters"
    lines = [
        f"# {metrics['model']}, trained",
        "",
        f"Enlarges RGB photographs {scale} times." if scale > 1 else "Restores RGB photographs.",
        f"{size}; {metrics['macs_64x64']:,} multiply-adds for 64 x 64 pixels.",
        "",
        "| network | PSNR dB (luma) | SSIM |",
        "|---|---|---|",
    ]
    for title, key in (("this one", "val"), ("before training", "val_before"), ("bicubic", "val_bicubic")):
        if key in metrics:
            lines.append(f"| {title} | {metrics[key]['psnr']:.3f} | {metrics[key]['ssim']:.4f} |")
    pictures = metrics["pictures"]
    lines += [
        "",
        f"Measured on {pictures['val']} pictures that were not trained on, {scale} border pixels cut;",
        f"trained on {pictures['train']} pictures for {metrics['steps']:,} steps. Small ones were made by",
        "bicubic reduction.",
        "",
        "Input: values from 0 to 1, `(N, 3, H, W)`, any height and width. It has seen clean photographs",
        "only: noise and strong compression come out enlarged as well.",
        "",
        "    featherweight upscale PHOTO --model model.onnx",
        "",
    ]
    return "\n".join(lines)
