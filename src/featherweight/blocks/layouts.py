"""Bring published weights, which come in many wrappings and key layouts, to ours, or say why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from featherweight.errors import CheckpointError

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "params",
)
"""Entries of a training checkpoint that hold weights; averaged ones first, for those were published."""

PREFIXES = ("module.", "_orig_mod.")


def clean_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unwrap a training checkpoint and strip the prefixes of wrapped modules.

    >>> list(clean_state({"state_dict": {"module.conv.weight": torch.zeros(1)}, "epoch": 3}))
    ['conv.weight']

    Raises:
        CheckpointError: there are no tensors inside.
    """
    for wrapper in WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            return clean_state(state[wrapper])
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        entries = ", ".join(list(state)[:5]) or "nothing"
        raise CheckpointError(f"The checkpoint holds no weights (found: {entries}). Expected a state dict.")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            return clean_state({key.removeprefix(prefix): value for key, value in tensors.items()})
    return tensors


def rename(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    r"""Rename each key by the first rule (regular expression, replacement) that matches its beginning.

    >>> list(rename({"conv1.weight": torch.zeros(1)}, [(r"conv(\d)\.", r"body.\1.")]))
    ['body.1.weight']
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for key, value in state.items():
        match = next(((p, r) for p, r in patterns if p.match(key)), None)
        renamed[match[0].sub(match[1], key, count=1) if match else key] = value
    return renamed


def rename_wrapped(
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], state: Mapping[str, Tensor], network: str
) -> dict[str, Tensor]:
    """Run a network's own renaming; a layout it does not know becomes a clear error.

    Raises:
        CheckpointError: the layout is unknown to the network.
    """
    try:
        return convert(state)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The weights do not belong to {network}: {error!r}. First keys: {', '.join(list(state)[:3])}."
        ) from error


def fit_input_channels(state: Mapping[str, Tensor], key: str, in_chans: int) -> dict[str, Tensor]:
    """Adapt the first convolution's weights to another number of input channels.

    One channel takes the sum over the colours; more channels repeat them, scaled to keep the sum.
    """
    weight = state.get(key)
    if weight is None or weight.shape[1] == in_chans:
        return dict(state)
    old = weight.shape[1]
    repeated = weight.repeat(1, -(-in_chans // old), 1, 1)[:, :in_chans] * (old / in_chans)
    fitted = weight.sum(1, keepdim=True) if in_chans == 1 else repeated
    return {**state, key: fitted}


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], network: str) -> None:
    """Compare names and shapes with those of the network.

    Raises:
        CheckpointError: names are missing or unknown, or a shape differs; the message names the first ones.
    """
    # Counters of seen batches are not needed for inference and some published files leave them out.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and torch.Size(state[key].shape) != value.shape
    ]
    found = (("missing", missing), ("unknown", unknown), ("other shape", shapes))
    problems = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in found if keys]
    if problems:
        raise CheckpointError(f"The weights do not fit {network}: {'; '.join(problems)}.")
