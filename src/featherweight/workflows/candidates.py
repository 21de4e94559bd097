"""Candidates of the main job: which network, at which width and input size, may be tried for a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from featherweight.cards import Card, Search, all_cards
from featherweight.errors import UsageError
from featherweight.registry import card_of, create_model

if TYPE_CHECKING:
    from torch import nn

SMALL_IMAGE_SIDE = 48
"""Images up to this side, in pixels, keep their resolution through the stem (stride 1 in place of 2)."""

_DEFAULT_INPUTS = (64, 96, 128, 160, 224)
_CLASSIFIER_TASKS = ("classify", "reidentify")


@dataclass(frozen=True)
class Candidate:
    """One network at one width and input size; `input` is the side of the square image in pixels."""

    model: str
    width: float
    input: int
    stem_stride: int | None = None

    @property
    def label(self) -> str:
        """Short name for tables and folders, for example `simplenet_cifar_310k-w0.5-32px`."""
        stem = "" if self.stem_stride is None else f"-s{self.stem_stride}"
        return f"{self.model.replace('/', '_')}-w{self.width:g}-{self.input}px{stem}"

    def build(self, num_classes: int, in_chans: int, **kwargs: Any) -> nn.Module:
        """Build the network with fresh weights for `num_classes` and `in_chans`."""
        if not self.model.startswith("timm/"):
            kwargs["width"] = self.width
            if self.stem_stride is not None:
                kwargs["stem_stride"] = self.stem_stride
        return create_model(self.model, num_classes=num_classes, in_chans=in_chans, **kwargs)

    def recipe(self) -> Mapping[str, Any]:
        """Return the training recipe of the network's card (timm's networks take the default)."""
        if self.model.startswith("timm/"):
            return {}
        search = card_of(self.model).search
        return search.recipe if search else {}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def list_candidates(native_side: int, models: Sequence[str] | None = None) -> list[Candidate]:
    """Return every candidate that suits images of this size.

    Args:
        native_side: usual side of the data set's images in pixels.
        models: names to restrict the search to; a name the card does not scale is tried at width 1.
            None takes every network whose card has a `[search]` table.

    Raises:
        UsageError: a name is unknown, or `models` is empty.
    """
    if models is not None and not models:
        raise UsageError("--models names no network. See: featherweight list --task classify")
    if models is None:
        wanted = [
            (name, card.search)
            for card in all_cards().values()
            if card.search and card.task in _CLASSIFIER_TASKS and card.module_path
            for name in card.search.variants
        ]
    else:
        wanted = [(name, _search_of(name)) for name in models]
    return [
        Candidate(name, width, side, stem)
        for name, search in wanted
        for side in _input_sides(search, native_side)
        for stem in _stem_strides(name, side)
        for width in search.widths
    ]


def _search_of(name: str) -> Search:
    if name.startswith("timm/"):
        return Search(inputs=_DEFAULT_INPUTS)
    card: Card = card_of(name)
    return card.search or Search(inputs=_DEFAULT_INPUTS)


def _input_sides(search: Search, native_side: int) -> list[int]:
    """Sides near the images' own: enlarging adds cost but no detail, so at most one step up is offered."""
    sides = sorted(search.inputs or _DEFAULT_INPUTS)
    smaller = [side for side in sides if side <= native_side][-2:]
    larger = [side for side in sides if side > native_side][: 0 if len(smaller) == 2 else 1]
    return smaller + larger


def _stem_strides(name: str, side: int) -> list[int | None]:
    if name.startswith("timm/"):
        return [None]
    native = card_of(name).variants[name].input[-1]
    if native <= SMALL_IMAGE_SIDE:
        return [1, 2] if side >= 24 else [1]
    return [1] if side <= SMALL_IMAGE_SIDE else [2]
