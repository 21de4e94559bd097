"""Fold batch norms into the convolutions and linear layers before them.

In eval mode a batch norm is one scale and one shift per channel, which the layer before can carry:
`W' = g W / s`, `b' = beta + g (b - mu) / s` with `s = sqrt(var + eps)`. The folded network computes the same
with fewer layers, and it is the folded weights that must be quantised.

Reference: Krishnamoorthi, arXiv 1806.08342, section 3.1.
"""

from __future__ import annotations

import copy
import itertools

from torch import fx, nn

from featherweight.blocks.fold import NORMS, fold_after

FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def fold_pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return a copy of `layer` that also does what `norm` does in eval mode."""
    folded = copy.deepcopy(layer)
    fold_after(folded, norm)
    return folded


def _can_fold(layer: object, norm: object) -> bool:
    """Tell whether `norm` is a batch norm with statistics that fits `layer`'s output channels."""
    if not isinstance(layer, FOLDABLE) or not isinstance(norm, NORMS) or norm.running_var is None:
        return False
    return layer.weight.shape[0] == norm.num_features


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of `model` at the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _pairs_by_graph(model: nn.Module) -> list[tuple[str, str]]:
    """Find (layer, batch norm) names along the traced data flow; the layer's output must go nowhere else."""
    graph = fx.Tracer().trace(model)
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        names = str(source.target), str(node.target)
        # A layer called twice shares its weights, so a norm after one of the calls cannot be folded.
        if _can_fold(*(modules[name] for name in names)) and all(calls.count(name) == 1 for name in names):
            pairs.append(names)
    return pairs


def _pairs_by_neighbour(model: nn.Module) -> list[tuple[str, str]]:
    """Find (layer, batch norm) names that are neighbours in a `Sequential`, where tracing fails."""
    pairs = []
    for prefix, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):
            children = [(f"{prefix}.{name}".lstrip("."), child) for name, child in parent.named_children()]
            neighbours = itertools.pairwise(children)
            pairs += [(a, b) for (a, layer), (b, norm) in neighbours if _can_fold(layer, norm)]
    return pairs


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode whose batch norms went into the layers before them.

    The copy keeps the class and module names; each folded batch norm became an `nn.Identity`. A batch norm
    without a foldable layer before it stays as it is.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).eval()
    >>> fold_batchnorm(net)[1]
    Identity()
    """
    folded = copy.deepcopy(model).eval()
    try:
        pairs = _pairs_by_graph(folded)
    except Exception:  # tracing fails in as many ways as there are forward methods
        pairs = _pairs_by_neighbour(folded)
    for layer, norm in pairs:
        set_module(folded, layer, fold_pair(folded.get_submodule(layer), folded.get_submodule(norm)))
        set_module(folded, norm, nn.Identity())
    return folded
