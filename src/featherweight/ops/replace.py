"""Swap the convolutions of a network for a published operator.

    conv ──from_conv──► operator      the weights, device, dtype, mode and hooks go along
      ▲                    │
      └── parent[name] ◄───┘          every place that holds the same layer gets the same operator

Works on any network of `torch.nn` layers: ours, torchvision's, timm's.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherweight.errors import UsageError
from featherweight.registry import get_operators

Where = Callable[[str, nn.Module], bool] | str | Sequence[str] | None

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""Where `torch.nn.Module` keeps the hooks on its calls; those on state dicts know the old layout and stay."""


def replace_convs(
    model: nn.Module,
    op: str | type[nn.Module],
    where: Where = None,
    *,
    input_size: Sequence[int] | None = None,
    linear: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Replace convolutions of `model` by an operator, in place, and return the model.

    Pretrained weights carry over wherever the operator's paper says so (see its `from_conv`). Nothing is
    changed unless every chosen layer can be replaced. To keep the original, pass `copy.deepcopy(model)`.

    Args:
        model: the network; when it is itself a convolution, the operator is returned.
        op: slug of an operator (`list_ops()`), or a class with `from_conv`.
        where: which layers: a name pattern as a shell would match it, several of them, or a function of the
            dotted name and the layer. None takes the layers that the published networks replace.
        input_size: `(C, H, W)` of one image; needed by operators that are built for one size.
        linear: look at `torch.nn.Linear` layers as well, where the operator has a form for them.
        **kwargs: the operator's own arguments, for every layer.

    Raises:
        UsageError: the operator is unknown, no layer is chosen, or a chosen layer cannot be replaced; the
            message names the layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> type(replace_convs(net, "fdconv")[2]).__name__
    'FDConv2d'
    """
    operators = _operators(op, linear)
    chosen = _choose(model, operators, where)
    if not chosen:
        kinds = ", ".join(kind.__name__ for kind in operators)
        raise UsageError(
            f"No layer of {type(model).__name__} is chosen for {_title(op)} by where={where!r}; expected at "
            f"least one of {kinds}. See the names in model.named_modules()."
        )
    _check_owned(model, chosen)
    sizes: dict[int, tuple[int, ...]] = {}
    if any(getattr(_operator_of(layer, operators), "NEEDS_SIZE", False) for layer in chosen):
        sizes = _output_sizes(model, chosen, input_size)
    made = {}
    for layer, name in chosen.items():
        own = {**kwargs, "size": sizes[id(layer)]} if id(layer) in sizes else kwargs
        made[id(layer)] = _build(layer, name, _operator_of(layer, operators), own)
    if id(model) in made:
        return made[id(model)]
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in made:
                parent._modules[key] = made[id(child)]
    return model


def _title(op: str | type[nn.Module]) -> str:
    return op if isinstance(op, str) else op.__name__


def _operators(op: str | type[nn.Module], linear: bool) -> Mapping[type[nn.Module], type[nn.Module]]:
    """Return kind of layer -> class that replaces it."""
    if isinstance(op, str):
        found = get_operators(op)
        kept = {kind: found[kind] for kind in found if linear or kind is not nn.Linear}
        if kept:
            return kept
        raise UsageError(f"'{op}' replaces {', '.join(k.__name__ for k in found) or 'no layer'} only.")
    if not hasattr(op, "from_conv"):
        raise UsageError(f"{op!r} has no from_conv(conv); expected a slug or an operator's class.")
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return {kinds[getattr(op, "DIMS", 2)]: op}


def _operator_of(
    layer: nn.Module, operators: Mapping[type[nn.Module], type[nn.Module]]
) -> type[nn.Module] | None:
    return next((op for kind, op in operators.items() if isinstance(layer, kind)), None)


def _choose(
    model: nn.Module, operators: Mapping[type[nn.Module], type[nn.Module]], where: Where
) -> dict[nn.Module, str]:
    """Return the layers to replace and the name of each (its first, where it stands in several places)."""
    patterns = (where,) if isinstance(where, str) else where
    chosen: dict[nn.Module, str] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        operator = _operator_of(layer, operators)
        if operator is None or layer in chosen:
            continue
        if where is None:
            # A subclass may compute something else, so only plain layers are taken unasked.
            taken = type(layer) in operators and operator.suits(layer, name)
        elif callable(where):
            taken = where(name, layer)
        else:
            taken = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if taken:
            chosen[layer] = name
    return chosen


def _check_owned(model: nn.Module, chosen: Mapping[nn.Module, str]) -> None:
    """Refuse layers whose weights are computed from other parameters or belong to a second layer as well."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for layer, name in chosen.items():
        other = sorted(set(layer._parameters) - {"weight", "bias"})
        if other or "weight" not in layer._parameters:
            raise UsageError(
                f"Layer '{name}' computes its weight from others ({', '.join(other) or 'parametrized'}); "
                "remove that (weight norm, spectral norm, pruning) first or leave the layer out by `where`."
            )
        if any(holders[id(p)] > 1 for p in layer._parameters.values() if p is not None):
            raise UsageError(
                f"Layer '{name}' shares its parameters with another layer, which replacing would undo; "
                "leave both out by `where`."
            )


def _output_sizes(
    model: nn.Module, chosen: Mapping[nn.Module, str], input_size: Sequence[int] | None
) -> dict[int, tuple[int, ...]]:
    """Run the network once, on zeros, and note the output size of each chosen layer."""
    if input_size is None:
        raise UsageError("This operator is built for one size; pass input_size=(C, H, W) of an image.")
    seen: dict[int, set[tuple[int, ...]]] = {id(layer): set() for layer in chosen}

    def note(layer: nn.Module, args: Any, out: torch.Tensor) -> None:
        seen[id(layer)].add(tuple(out.shape[2:]))

    handles = [layer.register_forward_hook(note) for layer in chosen]
    like = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    for layer, name in chosen.items():
        if len(seen[id(layer)]) != 1:
            found = sorted(seen[id(layer)]) or "never"
            raise UsageError(
                f"Layer '{name}' runs at {found} for images of {tuple(input_size)}; expected one output size."
            )
    return {key: sizes.pop() for key, sizes in seen.items()}


def _build(layer: nn.Module, name: str, operator: type[nn.Module], kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        new = operator.from_conv(layer, **kwargs)
    except UsageError as error:
        raise UsageError(f"Layer '{name}' ({layer}) cannot be replaced: {error}") from error
    new.train(layer.training)
    for attribute in HOOKS:
        setattr(new, attribute, getattr(layer, attribute))
    return new
