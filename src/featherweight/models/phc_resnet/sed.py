"""The paper's network for sound events: PHC convolutions, a recurrent layer, a real or hypercomplex head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from featherweight.blocks.fold import check_eval
from featherweight.blocks.layouts import rename
from featherweight.models.phc_resnet.pieces import PHUnit
from featherweight.ops.phnn import PHLinear, rename_official

POOLS = ((8, 2), (8, 2), (2, 2), (1, 1))
"""Frequencies and frames that each stage's maximum joins."""

WIDTHS = (64, 128, 256, 512)
HIDDEN, HEAD, DROP = 256, 1024, 0.3


class PHCSedNet(nn.Module):
    """Spectrograms of an array of microphones to the classes that sound in each frame.

    `(N, channels, frequencies, T)` to `(N, T // 8, outputs)`, between 0 and 1.

    Args:
        n: components of the hypercomplex numbers.
        channels: spectrograms of a recording: 4 for each microphone array, twice that with phases.
        frequencies: of a spectrogram, a multiple of 128.
        outputs: classes times how many of a class may sound at once.
        full: make the hidden layers of the head hypercomplex too.

    >>> import torch
    >>> PHCSedNet(4).eval()(torch.zeros(1, 4, 256, 16)).shape
    torch.Size([1, 2, 42])
    """

    def __init__(
        self,
        n: int = 4,
        channels: int = 4,
        frequencies: int = 256,
        outputs: int = 42,
        full: bool = False,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for width, pool in zip(WIDTHS, POOLS, strict=True):
            stages += [PHUnit(n, channels, width), nn.MaxPool2d(pool), nn.Dropout(DROP)]
            channels = width
        self.cnn = nn.Sequential(*stages)
        features = channels * (frequencies // math.prod(pool for pool, _ in POOLS))
        self.rnn = nn.GRU(features, HIDDEN, 3, batch_first=True, bidirectional=True, dropout=DROP)
        layers: list[nn.Module] = []
        before = 2 * HIDDEN
        for _ in range(3):
            layers += [PHLinear(before, HEAD, n=n) if full else nn.Linear(before, HEAD), nn.ReLU()]
            before = HEAD
        self.head = nn.Sequential(*layers, nn.Dropout(DROP), nn.Linear(before, outputs), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Give the probability of each output in each of the `T // 8` frames."""
        y = self.cnn(x).permute(0, 3, 1, 2).flatten(2)  # (N, T // 8, features)
        return self.head(self.rnn(y)[0])

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys to ours and set the biases that were never added to zero."""
        rules = [(r"sed\.", "head.")]
        for stage in range(len(WIDTHS)):
            rules += [
                (rf"cnn\.{stage}\.0\.", f"cnn.{3 * stage}.conv."),
                (rf"cnn\.{stage}\.1\.", f"cnn.{3 * stage}.norm."),
            ]
        return rename(rename_official(state), rules)

    def fuse(self) -> Self:
        """Turn the hypercomplex layers into ordinary ones and fold the norms, in place.

        Raises:
            UsageError: the network is in training mode.
        """
        check_eval(self)
        for index, module in enumerate(self.head):
            if isinstance(module, PHLinear):
                self.head[index] = module.fuse()
        for module in self.cnn:
            if isinstance(module, PHUnit):
                module.fuse()
        return self
