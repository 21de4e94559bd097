"""The peer of `fit_vs_peer.py`: how a user of timm trains, exports and quantises a small network by hand.

Independent of featherweight's training, export and quantisation, so that it can be compared with them.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.data.dataset import Split
from featherweight.data.preprocess import Preprocess
from featherweight.measure.machine import machine

LR, WEIGHT_DECAY, LABEL_SMOOTHING, EMA_DECAY = 1e-3, 0.05, 0.1, 0.999
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class PeerData:
    """One split in memory: uint8 images (N, C, H, W) with C 1 or 3, and int64 labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def prepare(split: Split, side: int, mode: str) -> PeerData:
    """Decode a split at `side` pixels; grey images stay grey until they are batched, to save memory."""
    pixels = torch.from_numpy(split.decode((side, side), mode)).permute(0, 3, 1, 2)
    return PeerData(pixels.contiguous(), torch.from_numpy(np.asarray(split.labels, np.int64)))


def statistics_of(data: PeerData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of the three channels on the 0 to 1 scale, from up to 2000 images."""
    sample = data.images[:: max(1, len(data) // 2000)].float() / 255
    mean = sample.mean((0, 2, 3)).expand(3)
    std = sample.std((0, 2, 3)).clamp_min(0.02).expand(3)
    return tuple(mean.tolist()), tuple(std.tolist())


def to_input(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Return the normalised float32 batch (N, 3, H, W) of uint8 images with one or three channels."""
    x = images.float().div(255).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def crop_and_flip(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each uint8 image by up to an eighth of its side (reflected border); mirror half if `flip`."""
    count, _, height, width = images.shape
    pad = height // 8
    windows = F.pad(images.float(), (pad,) * 4, mode="reflect").unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)
    x = windows[torch.arange(count), :, top, left]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


class PeerTrainer:
    """A training loop as a user of timm writes it: AdamW, warm-up and cosine by step, EMA."""

    def __init__(
        self, model: nn.Module, data: PeerData, preprocess: Preprocess, flip: bool, seed: int
    ) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.data, self.preprocess, self.flip, self.seed = data, preprocess, flip, seed
        # At least twenty steps in an epoch of a small set; 128 otherwise.
        largest = max(8, min(128, len(data) // 20))
        self.batch = min(2 ** int(np.log2(largest)), len(data))
        self.steps_per_epoch = len(data) // self.batch
        self.bf16 = False

    def _step(self, model: nn.Module, optimizer: Any, rows: Tensor, generator: torch.Generator) -> None:
        images = crop_and_flip(self.data.images[rows], self.flip, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = model(to_input(images, self.preprocess))
        loss = F.cross_entropy(logits.float(), self.data.labels[rows], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def _equip(self, model: nn.Module) -> tuple[Any, Any]:
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        lr = LR * (self.batch / 128) ** 0.5
        optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
        return optimizer, ModelEmaV3(model, decay=EMA_DECAY, use_warmup=True)

    def _seconds_per_step(self, limit_s: float) -> float:
        model = copy.deepcopy(self.model).train()
        optimizer, ema = self._equip(model)
        generator, times, began = torch.Generator().manual_seed(0), [], time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < limit_s:
            start = time.perf_counter()
            rows = torch.randint(len(self.data), (self.batch,), generator=generator)
            self._step(model, optimizer, rows, generator)
            ema.update(model, step=1)
            times.append(time.perf_counter() - start)
        # The first steps choose kernels. The mean of the rest also holds the slow ones, as the training will.
        return statistics.fmean(times[2:])

    def plan(self, time_s: float) -> int:
        """Return the steps that fit, timed on a copy, in bfloat16 too where the processor has it."""
        began = time.perf_counter()
        limit_s = min(5.0, 0.04 * time_s)
        seconds = {False: self._seconds_per_step(limit_s)}
        if {"avx512_bf16", "amx_bf16"} & set(machine()["features"]):
            self.bf16 = True
            seconds[True] = self._seconds_per_step(limit_s)
        self.bf16 = min(seconds, key=seconds.__getitem__)
        left_s = time_s - (time.perf_counter() - began)
        return max(1, int(left_s / seconds[self.bf16]))

    def train(self, steps: int) -> nn.Module:
        """Take `steps` steps, the cosine ending with the last, and return the EMA network."""
        from timm.scheduler import CosineLRScheduler

        optimizer, ema = self._equip(self.model)
        warmup = max(1, steps // 20)
        schedule = CosineLRScheduler(
            optimizer,
            t_initial=steps,
            lr_min=1e-6,
            warmup_t=warmup,
            warmup_lr_init=1e-5,
            t_in_epochs=False,
        )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.int64)
        self.model.train()
        for step in range(steps):
            place = step % self.steps_per_epoch
            if place == 0:
                order = torch.randperm(len(self.data), generator=generator)
            schedule.step_update(step)
            rows = order[place * self.batch : (place + 1) * self.batch]
            self._step(self.model, optimizer, rows, generator)
            ema.update(self.model, step=step + 1)
        return ema.module


@torch.no_grad()
def right_share(model: nn.Module, data: PeerData, preprocess: Preprocess) -> float:
    """Return the accuracy of a PyTorch network on up to 2048 images spread over a split."""
    model.eval()
    right, rows = 0, torch.linspace(0, len(data) - 1, min(2048, len(data))).long()
    for part in rows.split(256):
        images, labels = data.images[part], data.labels[part]
        right += int((model(to_input(images, preprocess)).argmax(1) == labels).sum())
    return right / max(1, len(rows))


def export_peer(model: nn.Module, data: PeerData, preprocess: Preprocess, out: Path) -> dict[str, Path]:
    """Write the float32 and the int8 file by `torch.onnx.export` and onnxruntime's documented steps."""
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    files = {"float32": out / "model.onnx", "int8": out / "model.int8.onnx"}
    example = torch.zeros(1, 3, *preprocess.size)
    torch.onnx.export(
        model.eval(),
        (example,),
        files["float32"],
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=18,
        dynamo=False,
    )
    rows = torch.linspace(0, len(data) - 1, min(CALIBRATION_IMAGES, len(data))).long()
    images = to_input(data.images[rows], preprocess).contiguous().numpy()

    class Reader(ort.CalibrationDataReader):
        """Hands out the calibration images one at a time."""

        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.rest, None)
            return None if image is None else {"image": image[None]}

    prepared = out / "prepared.onnx"
    quant_pre_process(files["float32"], prepared)
    ort.quantize_static(
        prepared,
        files["int8"],
        Reader(),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        calibrate_method=ort.CalibrationMethod.MinMax,
    )
    prepared.unlink()
    return files
