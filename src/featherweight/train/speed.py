"""How fast this machine trains a network, measured by a few steps before anything is decided."""

from __future__ import annotations

import time

import torch
from torch import nn

from .memory import keep_freed_memory
from .plan import cpu_has_bf16

_BATCH = 64
_STEPS = 2
_PLAIN_SIDE, _PLAIN_CHANNELS, _PLAIN_LAYERS = 16, 48, 4


def training_images_per_s(
    model: nn.Module, input_size: tuple[int, int, int], enough: float = 0.0, batch: int = _BATCH
) -> float:
    """Return the images per second of a training step, without loading and augmentation.

    The faster of float32 and, where the processor multiplies it, bfloat16 counts. The weights stay as they
    are, the statistics of batch norms move. A few images tell first whether the full batch is worth its time.

    Args:
        model: the network.
        input_size: channels, height and width of its input.
        enough: the speed that matters; far below it, the first estimate is returned.
        batch: images of a step.
    """
    keep_freed_memory()
    model = model.train().to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *input_size, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    few = images[: max(2, batch // 8)]
    estimate = len(few) / _step_s(model, few, False)
    if estimate < enough / 6:
        return estimate
    precisions = (False, True) if cpu_has_bf16() else (False,)
    return batch / min(_step_s(model, images, bf16) for bf16 in precisions)


def training_macs_per_s() -> float:
    """Return the multiply-adds per second that training reaches on plain convolutions.

    A step counts three per use of a weight: one forward, two backward. The network is four 3x3 convolutions
    with batch norm, of the size that nets for small images have.
    """
    side, channels = _PLAIN_SIDE, _PLAIN_CHANNELS
    with torch.random.fork_rng(devices=()):
        net = nn.Sequential(*(layer for _ in range(_PLAIN_LAYERS) for layer in _plain_layers(channels)))
    macs = _PLAIN_LAYERS * channels**2 * 9 * side**2
    return 3 * macs * training_images_per_s(net, (channels, side, side))


def _step_s(model: nn.Module, images: torch.Tensor, bf16: bool) -> float:
    """Return the shortest time of a step in seconds; the first one also prepares the kernels."""
    times = []
    for _ in range(_STEPS):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            answers = model(images)
        answers.float().square().mean().backward()
        model.zero_grad()
        times.append(time.perf_counter() - began)
    return min(times)


def _plain_layers(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
