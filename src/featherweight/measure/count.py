"""Count parameters and multiply-adds, exactly, of a PyTorch network or of an exported ONNX file.

Only convolutions and linear layers count as MACs (1 MAC is one multiply-add), for a batch of 1: the
convention of the papers. Attention products between two activations, normalisation and pooling are left out.
A module with a method `macs(input_shape)`, such as an operator of `ops/`, is counted by its own formula.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import DataError

if TYPE_CHECKING:
    import onnx
    import torch


@dataclass(frozen=True)
class Count:
    """What a network holds and costs: parameters, and MACs for one image."""

    params: int
    macs: int


@dataclass(frozen=True)
class OnnxCount:
    """The same for an exported file, with its weight on disk in bytes."""

    params: int
    macs: int
    size_bytes: int


def _meta_copy(model: torch.nn.Module) -> torch.nn.Module:
    """Copy `model` to the meta device without copying the values of its tensors."""
    import torch

    memo: dict[int, Any] = {id(b): b.detach().to("meta") for b in model.buffers()}
    memo |= {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def macs_of(name: str, args: Sequence[Any], out: Any) -> int:
    """Return the MACs of one operator below autograd: a convolution or a product with a weight, else 0.

    Args:
        name: qualified name, such as `aten::convolution`.
        args: its arguments.
        out: its result.
    """
    if name == "aten::convolution":
        # Each output element (input element when transposed) meets one slice of the weight.
        places = args[0].numel() if args[6] else out.numel()
        return places * math.prod(args[1].shape[1:])
    if name in ("aten::mm", "aten::addmm"):
        left, right = args[-2:]
        return left.shape[0] * left.shape[1] * right.shape[1]
    return 0


def _counting_mode(model: torch.nn.Module) -> Any:
    """Build a dispatch mode whose `macs` adds up every convolution and matrix product that it sees."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class CountMacs(TorchDispatchMode):
        """Adds up MACs below autograd, so that functional calls count as well as modules."""

        macs = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.macs += macs_of(func._schema.name, args, out)
            return out

    mode, before = CountMacs(), []

    def enter(module: torch.nn.Module, args: Any) -> None:
        before.append(mode.macs)

    def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
        mode.macs = before.pop() + len(args[0]) * module.macs(tuple(args[0].shape[1:]))

    for module in model.modules():
        if callable(getattr(module, "macs", None)):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    return mode


def run_under(
    make_mode: Callable[[torch.nn.Module], Any], model: torch.nn.Module, shape: Sequence[int]
) -> Any:
    """Run a copy of `model` once, on zeros, under a dispatch mode and return the mode.

    The copy runs in eval mode on the meta device (no arithmetic, no memory); one that looks at values and so
    cannot run there runs on the CPU. `model` itself is left as it was.

    Args:
        make_mode: builds the mode for the copy.
        model: the network.
        shape: of the input, the batch first.
    """
    import torch

    for device in ("meta", "cpu"):
        twin = (_meta_copy(model) if device == "meta" else copy.deepcopy(model).cpu()).eval()
        mode, x = make_mode(twin), torch.zeros(*shape, device=device)
        try:
            with torch.no_grad(), mode:
                twin(x)
        except (NotImplementedError, RuntimeError):
            if device == "cpu":
                raise
            continue
        break
    return mode


def count(model: torch.nn.Module, input_size: tuple[int, ...]) -> Count:
    """Count parameters and the MACs of one image of `input_size` = `(C, H, W)`; see `run_under`.

    >>> import torch
    >>> count(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 10, 10))
    Count(params=224, macs=21600)
    """
    params = sum(p.numel() for p in model.parameters())
    return Count(params, run_under(_counting_mode, model, (1, *input_size)).macs)


_COUNTED = frozenset(
    [
        *("Conv", "ConvInteger", "QLinearConv", "ConvTranspose"),
        *("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "QGemm"),
    ]
)


def _node_macs(node: onnx.NodeProto, shapes: dict[str, list[int]], weights: dict[str, list[int]]) -> int:
    """Return the MACs of one ONNX node, 0 where it is neither a convolution nor a linear layer."""
    kind = node.op_type
    if kind in ("Conv", "ConvInteger", "QLinearConv"):
        weight = weights.get(node.input[3 if kind == "QLinearConv" else 1])
        return math.prod(shapes[node.output[0]]) * math.prod(weight[1:]) if weight else 0
    if kind == "ConvTranspose":
        weight = weights.get(node.input[1])
        return math.prod(shapes[node.input[0]]) * math.prod(weight[1:]) if weight else 0
    if kind in ("Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "QGemm"):
        sides = (0, 3) if kind in ("QLinearMatMul", "QGemm") else (0, 1)
        if not any(node.input[i] in weights for i in sides):
            return 0
        left = shapes.get(node.input[sides[0]]) or weights[node.input[sides[0]]]
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        inner = left[-2] if turned else left[-1]
        return math.prod(shapes[node.output[0]]) * inner
    return 0


def _fix_batch(proto: onnx.ModelProto) -> None:
    """Set the first dimension of every input to 1 and forget recorded inner shapes, which hold the symbol."""
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()
            dims[0].dim_value = 1
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()


def _complete(shapes: dict[str, list[int]], proto: onnx.ModelProto, weights: dict[str, list[int]]) -> None:
    """Add what inference left open: it cannot follow all arithmetic on shapes, so the network runs once."""
    import onnx
    import onnxruntime

    nodes = [node for node in proto.graph.node if node.op_type in _COUNTED]
    names = {name for node in nodes for name in (*node.input, node.output[0]) if name and name not in weights}
    unknown = sorted(name for name in names if 0 in shapes.get(name, [0]))
    if not unknown:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in unknown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    dtype_of = onnx.helper.tensor_dtype_to_np_dtype
    feeds = {
        value.name: np.zeros(shapes[value.name], dtype_of(value.type.tensor_type.elem_type))
        for value in probe.graph.input
        if value.name not in weights
    }
    found = session.run(unknown, feeds)
    shapes.update({name: list(value.shape) for name, value in zip(unknown, found, strict=True)})


def count_onnx(path: str | Path) -> OnnxCount:
    """Count an ONNX file: weights (not scales and zero points), MACs for batch 1, and bytes on disk.

    Raises:
        DataError: the file is missing, is no ONNX model, or its shapes cannot be inferred.
    """
    import onnx
    from onnx import numpy_helper

    path = Path(path)
    try:
        proto = onnx.load(path)
    except Exception as error:
        raise DataError(
            f"Cannot read {path} as an ONNX file ({error}); expected one written by export."
        ) from error
    _fix_batch(proto)
    try:
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except Exception as error:
        raise DataError(f"Shapes of {path} cannot be inferred ({error}); export it again.") from error
    graph = proto.graph
    constants = {t.name: list(t.dims) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = list(numpy_helper.to_array(attribute.t).shape)
    weights, helpers = dict(constants), set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            helpers.update(node.input[1:])
        if node.op_type in ("DequantizeLinear", "Identity", "Transpose") and node.input[0] in weights:
            shape = weights[node.input[0]]
            perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), range(len(shape)))
            weights[node.output[0]] = [shape[i] for i in perm]
    shapes: dict[str, list[int]] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        shapes[value.name] = [d.dim_value for d in value.type.tensor_type.shape.dim]
    try:
        _complete(shapes, proto, weights)
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        raise DataError(f"{path} cannot be run to see its shapes ({error}); export it again.") from error
    macs = sum(_node_macs(node, shapes, weights) for node in graph.node)
    params = sum(
        int(np.prod(t.dims))
        for t in graph.initializer
        if t.name not in helpers and t.data_type != onnx.TensorProto.INT64
    )
    return OnnxCount(params, macs, path.stat().st_size)
