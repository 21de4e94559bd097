"""The official key layout of MobileMamba, and a second head joined into the first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

STEM = 4
"""Convolutions of the stem, the first entries of the body."""

RULES = (
    (r"^patch_embed\.(\d)\.", lambda match: f"body.{int(match[1]) // 2}."),
    (r"^head\.bn\.", "head."),
    (r"^head\.l\.", "classifier."),
    (r"\bm\.attn\.", "unit."),
    (r"\bm\.pw1\.", "unit.0."),
    (r"\bm\.pw2\.", "unit.1."),
    (r"\bm\.", "unit."),
    (r"\bdwconv3x3\.", "0.conv."),
    (r"\bbn1\.", "0.norm."),
    (r"\bdwconv1x1\.", "1.conv."),
    (r"\bbn2\.", "1.norm."),
    (r"\bproj\.1\.", "proj."),
    (r"\bc\.", "conv."),
    (r"\bbn\.", "norm."),
    (r"\bglobal_atten\.", "scan."),
    (r"\bconv2d\.", "conv."),
    (r"\bout_norm\.", "norm."),
    (r"\bx_proj_weight$", "x_proj"),
    (r"\bdt_projs_weight$", "dt_proj"),
    (r"\bdt_projs_bias$", "dt_bias"),
    (r"\bA_logs$", "a_log"),
    (r"\bDs$", "skip"),
    (r"\bbase_scale\.weight$", "scale"),
    (r"\bwavelet_convs\.0\.", "wavelet.conv."),
    (r"\bwavelet_scale\.0\.weight$", "wavelet.scale"),
    (r"\bfc1\.", "reduce."),
    (r"\bfc2\.", "expand."),
)


def from_official(state: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """Rename the official keys for a network with `depths` blocks in its stages."""
    starts = [STEM + sum(depths[:stage]) + stage for stage in range(len(depths))]
    renamed = {}
    for key, value in (_one_head(state) if "head_dist.l.weight" in state else state).items():
        if key.endswith("wt_filter"):  # fixed Haar filters
            continue
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        key = re.sub(r"^blocks(\d)\.(\d+)\.", lambda match: _position(match, starts), key)
        if key.endswith(("scan.a_log", "scan.skip")):
            value = value.reshape(2, -1, *value.shape[1:])  # officially the directions lie one after another
        renamed[key] = value
    return renamed


def _position(match: re.Match[str], starts: Sequence[int]) -> str:
    """Find the place in the body: officially the three parts of a transition are entries of their stage."""
    stage, index = int(match[1]) - 1, int(match[2])
    if stage == 0:
        return f"body.{starts[0] + index}."
    return f"body.{starts[stage] - 1}.{index}." if index < 3 else f"body.{starts[stage] + index - 3}."


def _one_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join two heads, each a norm and a linear layer, into one that gives their mean in eval mode."""
    weights, biases = [], []
    for name in ("head", "head_dist"):
        norm = {
            leaf: state[f"{name}.bn.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
        }
        scale = norm["weight"] * torch.rsqrt(norm["running_var"] + 1e-5)
        shift = norm["bias"] - norm["running_mean"] * scale
        weights.append(state[f"{name}.l.weight"] * scale)
        biases.append(state[f"{name}.l.bias"] + state[f"{name}.l.weight"] @ shift)
    ones = torch.ones_like(norm["weight"])
    kept = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
    # The joined norm does nothing: its variance and epsilon sum to one.
    own = {"weight": ones, "bias": 0 * ones, "running_mean": 0 * ones, "running_var": ones - 1e-5}
    joined = {"head.l.weight": sum(weights) / 2, "head.l.bias": sum(biases) / 2}
    return {**kept, **{f"head.bn.{leaf}": value for leaf, value in own.items()}, **joined}
