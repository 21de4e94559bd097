"""MobileNetV2's two design claims in miniature, on CIFAR-10 at 32 pixels.

The paper (section 6, figure 6): a ReLU6 after the projection hurts, because it destroys information in a
thin tensor; and skips belong between the thin bottlenecks, not between the wide expansions, and not left
out. The same narrow network is trained in four forms, for equal epochs, on equal batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.workflows.miniature import Plan, accuracies, sizes
from featherweight.workflows.reproduce import Reproduction, judge, mean_spread, overall

CLAIM = (
    "A linear projection beats one followed by ReLU6, and skips between bottlenecks beat skips between "
    "expansions and no skips."
)
STAGES = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 24, 3, 2), (6, 40, 2, 1))
"""Expansion, output channels, blocks and first stride of each stage: narrow and for 32 pixels."""

BASELINE = "linear, skip between bottlenecks"
FORMS = {
    BASELINE: {},
    "ReLU6, skip between bottlenecks": {"linear": False},
    "linear, skip between expansions": {"skip": "expansion"},
    "linear, no skip": {"skip": "none"},
}


class Block(nn.Module):
    """One inverted residual, cut so that a skip can join the wide tensors as well as the thin ones.

    Args:
        channels: of the input.
        out: channels of the output.
        stride: of the depthwise convolution.
        expansion: widening of the hidden tensor.
        linear: leave the projection without an activation.
    """

    def __init__(self, channels: int, out: int, stride: int, expansion: int, linear: bool) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNormAct(channels, wide, 1, act=nn.ReLU6) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNormAct(wide, wide, 3, stride, groups=wide, act=nn.ReLU6)
        self.project = ConvNormAct(wide, out, 1, act=None if linear else nn.ReLU6)


class MiniMobileNetV2(nn.Module):
    """`(N, 3, 32, 32)` to `(N, 10)`.

    Args:
        linear: leave the projections without an activation.
        skip: `"bottleneck"`, `"expansion"` or `"none"`; a skip joins tensors of equal shape only.
    """

    def __init__(self, linear: bool = True, skip: str = "bottleneck") -> None:
        super().__init__()
        self.skip = skip
        self.stem = ConvNormAct(3, 16, 3, act=nn.ReLU6)
        channels, blocks = 16, []
        for expansion, out, repeats, first in STAGES:
            for stride in (first, *[1] * (repeats - 1)):
                blocks.append(Block(channels, out, stride, expansion, linear))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.last = ConvNormAct(channels, 160, 1, act=nn.ReLU6)
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, adding a skip where the form has one."""
        x, previous = self.stem(x), None
        for block in self.blocks:
            wide = block.expand(x)
            if self.skip == "expansion" and previous is not None and previous.shape == wide.shape:
                wide = wide + previous
            previous = wide
            out = block.project(block.depthwise(wide))
            x = x + out if self.skip == "bottleneck" and x.shape == out.shape else out
        return self.classifier(self.last(x).mean((2, 3)))


def reproduce(
    quick: bool, data_root: Path | None, seed: int, progress: Callable[[str], None]
) -> Reproduction:
    """Train the four forms and compare the first with each other one."""
    plan = Plan.sized(
        quick,
        seed,
        data="cifar10",
        train_images=(1_000, 6_000),
        test_images=(500, 5_000),
        epochs=6,
        lr=0.1,
        batch_size=128,
        weight_decay=1e-4,
        label_smoothing=0.0,
    )
    builders = {name: partial(MiniMobileNetV2, **form) for name, form in FORMS.items()}
    found, images = accuracies(builders, plan, data_root, progress)
    verdicts = {name: judge(found[BASELINE], found[name], images) for name in FORMS if name != BASELINE}
    rows = [
        {
            "form": name,
            **sizes(builders[name], (3, 32, 32)),
            "test accuracy": mean_spread(found[name]),
            "claim": verdicts.get(name, "baseline"),
        }
        for name in FORMS
    ]
    reason = "; ".join(f"against '{name}': {verdict}" for name, verdict in verdicts.items())
    verdict = overall(list(verdicts.values()))
    return Reproduction("mobilenetv2", CLAIM, rows, verdict, reason, found, plan.setting())
