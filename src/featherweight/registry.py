"""The registry: names of networks, how to build one, and suggestions for a name that does not exist.

Names come from the cards, so listing them needs no torch; a network's module is imported when it is built.
The arguments of `create_model` have timm's meaning.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from featherweight.cards import Card, all_cards
from featherweight.errors import MissingExtraError, UsageError, close_matches

if TYPE_CHECKING:
    from torch import nn

_BUILDERS: dict[str, Callable[..., Any]] = {}


def register_model(builder: Callable[..., Any]) -> Callable[..., Any]:
    """Register a function that builds a network; its name is the variant's name on the card."""
    _BUILDERS[builder.__name__] = builder
    return builder


def card_of(name: str) -> Card:
    """Return the card that holds the variant `name`.

    Raises:
        UsageError: no variant has this name; the message lists close matches.
    """
    for card in all_cards().values():
        if name in card.variants:
            return card
    known = [variant for card in all_cards().values() for variant in card.variants]
    raise UsageError(f"No model '{name}'.{close_matches(name, known)} See: featherweight list '{name[:6]}*'")


def list_models(pattern: str = "*", task: str | None = None, implemented: bool = True) -> list[str]:
    """Return the names of the networks that match a shell pattern, in alphabetical order.

    Args:
        pattern: shell-style pattern; a plain word matches anywhere in the name.
        task: keep only networks for this task, for example `"classify"`.
        implemented: leave out networks that are planned but not built yet.

    >>> list_models("mobilenetv2_1*")
    ['mobilenetv2_100', 'mobilenetv2_130', 'mobilenetv2_140']
    """
    glob = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    names = [
        name
        for card in all_cards().values()
        if (card.kind == "model" or card.networks)
        and task in (None, card.networks_task)
        and (card.networks_path or not implemented)
        for name in card.variants
    ]
    return sorted(fnmatch.filter(names, glob))


def get_builder(name: str) -> Callable[..., Any]:
    """Return the function that builds the network `name`, importing its module on first use.

    Raises:
        UsageError: the name is unknown, or the system is planned but not built yet.
    """
    card = card_of(name)
    if card.networks_path is None:
        raise UsageError(f"'{name}' ({card.title}) is planned, not built yet. See: featherweight systems")
    importlib.import_module(card.networks_name)
    return _BUILDERS[name]


def create_model(
    name: str,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str | None = None,
    checkpoint_path: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network by name; arguments have timm's meaning.

    Args:
        name: a name from `list_models`, or `timm/NAME` to build the network with timm.
        pretrained: load the published weights (from the cache, else downloaded).
        num_classes: size of the last layer; 0 leaves the pooled features; None takes the card's number.
        in_chans: channels of the input image.
        features_only: return a network that gives the list of feature maps instead of logits.
        out_indices: which feature maps, counted from the finest; None gives all.
        drop_rate: dropout before the last layer.
        drop_path_rate: stochastic depth of the deepest block (0 where a network has no residual).
        global_pool: `"avg"`, `"max"` or `""`; None takes the network's own.
        checkpoint_path: a safetensors file (or a `.pt` state dict, loaded without pickle) to load.
        **kwargs: passed to the network, for example `width` or `stem_stride`.

    Raises:
        UsageError: the name is unknown.
        MissingExtraError: `timm/NAME` was asked for and timm is not installed.
        CheckpointError: the checkpoint is unreadable, unsafe or of another network.
    """
    shared = {
        "in_chans": in_chans,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        **({} if global_pool is None else {"global_pool": global_pool}),
        **kwargs,
    }
    if name.startswith("timm/"):
        # Not every network of timm knows both rates; 0 is what all of them start from.
        shared = {key: value for key, value in shared.items() if value or not key.startswith("drop_")}
        return _create_timm(
            name.removeprefix("timm/"),
            pretrained=pretrained,
            features_only=features_only,
            checkpoint_path=checkpoint_path or "",
            **({"out_indices": out_indices} if features_only and out_indices is not None else {}),
            **({} if num_classes is None or features_only else {"num_classes": num_classes}),
            **shared,
        )
    builder = get_builder(name)
    variant = card_of(name).variants[name]
    model = builder(num_classes=variant.num_classes if num_classes is None else num_classes, **shared)
    if pretrained or checkpoint_path:
        from featherweight.weights import load_checkpoint, load_pretrained

        if pretrained:
            load_pretrained(model, variant)
        if checkpoint_path:
            load_checkpoint(model, checkpoint_path)
    return model.feature_extractor(out_indices) if features_only else model


def _create_timm(name: str, **kwargs: Any) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_extra(f"timm/{name}", "timm") from error
    try:
        return timm.create_model(name, **kwargs)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        matches = close_matches(name, timm.list_models())
        raise UsageError(f"timm has no model '{name}'.{matches} See: timm.list_models()") from error


def list_ops() -> list[str]:
    """Return the slugs of the operators that are built, in alphabetical order.

    >>> "fdconv" in list_ops()
    True
    """
    return [card.slug for card in all_cards().values() if card.kind == "op" and card.module_path]


def get_operators(slug: str) -> Mapping[type[Any], type[Any]]:
    """Return kind of layer (`torch.nn.Conv2d`, ...) -> the class of operator `slug` that replaces it.

    Raises:
        UsageError: there is no such operator, it is planned but not built, or it replaces no layer.
    """
    card, built = all_cards().get(slug), ", ".join(list_ops()) or "none"
    if card is None or card.kind != "op":
        known = [card.slug for card in all_cards().values() if card.kind == "op"]
        raise UsageError(f"No operator '{slug}'.{close_matches(slug, known)} Built: {built}.")
    if card.module_path is None:
        raise UsageError(f"'{slug}' ({card.title}) is planned, not built yet. Built: {built}.")
    found: Mapping[type[Any], type[Any]] = getattr(importlib.import_module(card.module_name), "OPERATORS", {})
    if not found:
        raise UsageError(f"'{slug}' ({card.title}) replaces no layer of torch.nn; build it by hand.")
    return found
