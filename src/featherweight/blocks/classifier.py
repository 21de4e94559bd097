"""Base of every classification network: the methods and attributes that timm's networks also have.

A network is a sequence (`body`), a pooling, an optional `head` before the logits and a linear `classifier`.
Keeping the body a plain sequence gives feature maps, gradient checkpointing and splitting to every network at
once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featherweight.blocks.fold import NORMS
from featherweight.blocks.layouts import check_fit, clean_state, fit_input_channels, rename_wrapped
from featherweight.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
POOLS = ("avg", "max", "")


class Classifier(nn.Module):
    """A network `(N, in_chans, H, W)` to logits `(N, num_classes)`.

    Args:
        body: the modules from image to last feature map, run one after another.
        levels: (channels, reduction in pixels) after each module of the body that may serve as a feature map.
        num_features: channels of the last feature map.
        num_classes: number of logits; 0 leaves the pooled features.
        in_chans: channels of the image.
        drop_rate: dropout before the classifier.
        global_pool: `"avg"`, `"max"`, or `""` for no pooling, which leaves no classifier either.
        head: modules between the pooling and the classifier, on `(N, C, 1, 1)`.
        head_hidden_size: channels that the head gives; `num_features` without a head.
        input_size: (channels, height, width) the variant was published for.
        interpolation: how the published recipe resizes.

    Raises:
        UsageError: the pooling is unknown, or there are classes and no pooling.
    """

    def __init__(
        self,
        body: nn.Sequential,
        levels: Sequence[tuple[int, int]],
        num_features: int,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        head: nn.Module | None = None,
        head_hidden_size: int | None = None,
        input_size: tuple[int, int, int] = (3, 224, 224),
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.body = body
        self.head = head or nn.Identity()
        self.num_features = num_features
        self.head_hidden_size = head_hidden_size or num_features
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.global_pool = global_pool
        self.feature_info = _feature_info(levels)
        self.default_cfg: dict[str, Any] = {
            "input_size": (in_chans, *input_size[1:]),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": interpolation,
            "crop_pct": 0.875,
            "first_conv": "body.0.conv",
            "classifier": "classifier",
        }
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Give the logits (or the pooled features when there is no classifier)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Give the last feature map, `(N, num_features, h, w)`."""
        for module in self.body:
            x = _run_again(module, x) if self.grad_checkpointing and self.training else module(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last feature map and classify it; `pre_logits` stops before the classifier."""
        if self.global_pool == "avg":
            x = F.adaptive_avg_pool2d(x, 1)
        elif self.global_pool == "max":
            x = x.amax((2, 3), keepdim=True)
        x = self.head(x)
        if self.global_pool:
            x = x.flatten(1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one with `num_classes` outputs; 0 removes it.

        Raises:
            UsageError: the pooling is unknown, or there are classes and no pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in POOLS:
            raise UsageError(f"No global pooling '{pool}'. Expected one of 'avg', 'max' or ''.")
        if num_classes > 0 and not pool:
            raise UsageError(
                f"{num_classes} classes and no global pooling: the classifier takes pooled features. "
                "Expected num_classes=0, or the global pooling 'avg' or 'max'."
            )
        self.global_pool = pool
        like = next(self.body.parameters())
        self.num_classes = num_classes
        self.default_cfg["num_classes"] = num_classes
        self.classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            self.classifier = nn.Linear(
                self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype
            )

    def feature_extractor(self, out_indices: int | Sequence[int] | None = None) -> FeatureExtractor:
        """Return a network that shares these weights and gives the chosen feature maps, finest first."""
        return FeatureExtractor(self, out_indices)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
        self.grad_checkpointing = enable

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights to our keys; a network with foreign layouts overrides this."""
        return dict(state)

    def load_official(self, state: Mapping[str, Any], *, adapt: bool = False) -> None:
        """Load weights in the official, torchvision, timm or our own layout.

        Args:
            state: a state dict, or a checkpoint that wraps one (`state_dict`, `model`, EMA entries).
            adapt: accept weights for another number of classes (the classifier keeps its values) or of input
                channels (the first convolution is summed or repeated).

        Raises:
            CheckpointError: keys or shapes are not those of this network.
        """
        state = clean_state(state)
        own = self.state_dict()
        # Most layouts call the last layer `classifier`, so that name says nothing about the layout.
        if not any(key in own for key in state if not key.startswith("classifier.")):
            state = rename_wrapped(self.from_official, state, type(self).__name__)
        if adapt:
            first = f"{self.default_cfg['first_conv']}.weight"
            state = fit_input_channels(state, first, self.in_chans)
            state = {
                key: own[key] if key.startswith("classifier.") and own[key].shape != value.shape else value
                for key, value in state.items()
                if key in own or not key.startswith("classifier.")
            }
        check_fit(own, state, type(self).__name__)
        self.load_state_dict({key: state.get(key, value) for key, value in own.items()})


def _run_again(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module now and again in the backward pass, which must not count the batch twice."""
    if torch.compiler.is_compiling():  # a compiler knows checkpoints without contexts only
        return checkpoint(module, x, use_reentrant=False)
    contexts = contextlib.nullcontext(), _still_statistics(module)
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch norms in training mode use the batch's statistics without following them."""
    norms = [norm for norm in module.modules() if isinstance(norm, NORMS)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class FeatureInfo(list[dict[str, Any]]):
    """What is known of each feature map, as dictionaries and, as in timm, column by column."""

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Return how many pixels of the image a step of each map takes."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """Return the dotted name of the module that gives each map."""
        return [info["module"] for info in self]


class FeatureExtractor(nn.Module):
    """The body of a network up to the deepest map asked for: `(N, C, H, W)` to a list of maps, finest first.

    Args:
        model: the network; its weights are shared, not copied.
        out_indices: positions in `model.feature_info`, negative ones from the end; a number takes so many of
            the last, None all.

    Raises:
        UsageError: an index does not exist, or there is none.
    """

    def __init__(self, model: Classifier, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        infos = model.feature_info
        if out_indices is None:
            out_indices = len(infos)
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        if not out_indices or any(not -len(infos) <= index < len(infos) for index in out_indices):
            raise UsageError(f"Feature maps {tuple(out_indices)} asked for; there are {len(infos)}, from 0.")
        chosen = sorted({index % len(infos) for index in out_indices})
        self.feature_info = FeatureInfo(infos[index] for index in chosen)
        self._taps = [int(info["module"].removeprefix("body.")) for info in self.feature_info]
        self.body = model.body[: self._taps[-1] + 1]
        self.default_cfg = model.default_cfg
        self.grad_checkpointing = model.grad_checkpointing

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """Give the chosen feature maps."""
        maps = []
        for index, module in enumerate(self.body):
            x = _run_again(module, x) if self.grad_checkpointing and self.training else module(x)
            if index in self._taps:
                maps.append(x)
        return maps


def _feature_info(levels: Sequence[tuple[int, int]]) -> FeatureInfo:
    """Keep the last module of each resolution."""
    following = [reduction for _, reduction in levels[1:]] + [None]
    return FeatureInfo(
        {"num_chs": channels, "reduction": reduction, "module": f"body.{index}"}
        for index, ((channels, reduction), after) in enumerate(zip(levels, following, strict=True))
        if reduction != after
    )
