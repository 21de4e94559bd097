"""Networks from images to images as ONNX: export with free sizes, and what tiling has to know of a file.

A picture that is too large for memory is restored in tiles. Two properties of the graph decide whether that
gives the same result: how far an output pixel looks (`receptive_radius`), and whether something is averaged
over the whole picture, as channel attention does. `with_statistics` turns such averages into inputs, so that
every tile can be given those of the whole picture. Imports numpy and onnx only; torch just to export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import DataError
from featherweight.export.onnx import export_onnx

if TYPE_CHECKING:
    from torch import nn

PROBE = 96
"""Side in pixels at which shapes of a file with free sizes are looked at."""

_GLOBAL = frozenset(["GlobalMaxPool", "InstanceNormalization", "Softmax", "MatMul", "LSTM", "GRU"])
"""Operators that look at the whole map in a way that sharing averages cannot repair."""


@dataclass(frozen=True)
class Statistic:
    """An average over the whole map: its tensor, and positions of the input for one of the map."""

    source: str
    result: str
    channels: int
    jump: int


@dataclass(frozen=True)
class Reach:
    """How far a network looks.

    Args:
        radius: pixels of the input around an output pixel that it depends on, averages left aside.
        statistics: averages over the whole map, in the order of the graph.
        unshared: operators that depend on the whole map otherwise; tiles then differ from the whole.
        stride: pixels of the input between two positions of the coarsest map.
    """

    radius: int
    statistics: tuple[Statistic, ...]
    unshared: tuple[str, ...]
    stride: int = 1


def export_restorer(model: nn.Module, path: str | Path, channels: int = 3) -> None:
    """Write a restoration network `(N, channels, H, W)` with free batch, height and width.

    It is checked on smooth waves with values from 0 to 1: noise, which no photograph resembles, makes some
    networks amplify rounding errors.

    Raises:
        FeatherweightError: the file's answers differ from PyTorch's, at either of two sizes.
    """
    across, down = np.meshgrid(np.arange(40), np.arange(48))
    waves = [0.5 + 0.2 * np.sin(across / (2 + k)) + 0.2 * np.cos(down / (5 - k)) for k in range(channels)]
    images = np.stack([np.stack(waves), np.stack(waves[::-1])]).astype(np.float32)
    export_onnx(model, path, (channels, 48, 40), images=images, dynamic_size=True)


def with_sizes(proto: onnx.ModelProto, height: int, width: int) -> onnx.ModelProto:
    """Return a copy whose image input is (1, C, height, width), with the shapes of all tensors inferred."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    dims = fixed.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, (1, None, height, width), strict=True):
        if size is not None:
            dim.dim_value = size
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(fixed, data_prop=True)


def shapes_of(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the known shapes of all tensors of a graph; a free size is 0."""
    graph = proto.graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    } | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def find_reach(proto: onnx.ModelProto) -> Reach:
    """Follow every operator from the image and return how far the outputs look."""
    sized = with_sizes(proto, *_probe_size(proto))
    shapes, constants = shapes_of(sized), _constants(sized)
    side = shapes[sized.graph.input[0].name][2]
    radius: dict[str, float] = {sized.graph.input[0].name: 0.0}
    statistics, unshared, stride = [], [], 1
    for node in sized.graph.node:
        source = next((name for name in node.input if name in radius), None)
        if source is None:
            continue
        shape = shapes.get(source, ())
        jump = side / shape[2] if len(shape) == 4 and shape[2] > 1 else 1.0
        stride = max(stride, round(jump))
        if _is_average(node, shape, constants):
            statistics.append(Statistic(source, node.output[0], shape[1], max(round(jump), 1)))
            continue
        if node.op_type in _GLOBAL and not _is_pointwise(node, shapes):
            unshared.append(node.op_type)
        reached = max(radius[name] for name in node.input if name in radius)
        reached += jump * _window(node, constants, shapes)
        radius |= dict.fromkeys(node.output, reached)
    last = sized.graph.output[0].name
    return Reach(int(np.ceil(radius.get(last, 0))), tuple(statistics), tuple(sorted(set(unshared))), stride)


def with_statistics(proto: onnx.ModelProto, statistics: Sequence[Statistic]) -> onnx.ModelProto:
    """Return a copy in which every average over the map is an input, and the tile's own share an output.

    Inputs besides the image: `statistic_0`... of (1, C, 1, 1), and for each resolution `mask_J` of
    (1, 1, H / J, W / J), 1 where the tile counts. Outputs besides the result: `share_0`..., the average over
    the tile of what counts, zeros elsewhere.
    """
    shared = onnx.ModelProto()
    shared.CopyFrom(proto)
    graph = shared.graph
    replaced = {entry.result: f"statistic_{index}" for index, entry in enumerate(statistics)}
    nodes = [node for node in graph.node if node.output[0] not in replaced]
    for node in nodes:
        node.input[:] = [replaced.get(name, name) for name in node.input]
    axes = numpy_helper.from_array(np.array([2, 3], np.int64), "statistic_axes")
    for index, entry in enumerate(statistics):
        nodes.append(helper.make_node("Mul", [entry.source, f"mask_{entry.jump}"], [f"counted_{index}"]))
        nodes.append(
            helper.make_node(
                "ReduceMean", [f"counted_{index}", axes.name], [f"share_{index}"], name=f"share_{index}"
            )
        )
        shape = [1, entry.channels, 1, 1]
        graph.input.append(helper.make_tensor_value_info(f"statistic_{index}", TensorProto.FLOAT, shape))
        graph.output.append(helper.make_tensor_value_info(f"share_{index}", TensorProto.FLOAT, shape))
    for jump in sorted({entry.jump for entry in statistics}):
        dims = [1, 1, f"height_{jump}", f"width_{jump}"]
        graph.input.append(helper.make_tensor_value_info(f"mask_{jump}", TensorProto.FLOAT, dims))
    del graph.node[:]
    graph.node.extend(_sorted(nodes, graph))
    graph.initializer.append(axes)
    return shared


def with_averages(proto: onnx.ModelProto, statistics: Sequence[Statistic]) -> onnx.ModelProto:
    """Return a copy that also gives its averages over the map, in their order, as further outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    for entry in statistics:
        shape = [1, entry.channels, 1, 1]
        shown.graph.output.append(helper.make_tensor_value_info(entry.result, TensorProto.FLOAT, shape))
    return shown


def bytes_per_pixel(proto: onnx.ModelProto) -> float:
    """Return the most bytes of maps that are needed at one time, for each pixel of the image."""
    height, width = _probe_size(proto)
    sized = with_sizes(proto, height, width)
    shapes, graph = shapes_of(sized), sized.graph
    weights = {tensor.name for tensor in graph.initializer}
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last |= {output.name: len(graph.node) for output in graph.output}
    size = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items() if name not in weights}
    live = size.get(graph.input[0].name, 0)
    most = live
    for index, node in enumerate(graph.node):
        live += sum(size.get(name, 0) for name in node.output)
        most = max(most, live)
        live -= sum(size.get(name, 0) for name in set(node.input) if last.get(name) == index)
    return most / (height * width)


def _probe_size(proto: onnx.ModelProto) -> tuple[int, int]:
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    if len(shape) != 4:
        raise DataError(f"The network's input has {len(shape)} dimensions. Expected an image (N, C, H, W).")
    return shape[2].dim_value or PROBE, shape[3].dim_value or PROBE


def _constants(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return {name: numpy_helper.to_array(t) for name, t in found.items() if int(np.prod(t.dims)) <= 16}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _is_average(node: onnx.NodeProto, shape: Sequence[int], constants: dict[str, np.ndarray]) -> bool:
    """Tell whether a node averages (N, C, H, W) over height and width and keeps the dimensions."""
    if node.op_type == "GlobalAveragePool":
        return len(shape) == 4
    if node.op_type != "ReduceMean" or len(shape) != 4:
        return False
    attributes = _attributes(node)
    axes = attributes.get("axes")
    if axes is None and len(node.input) > 1:
        axes = constants.get(node.input[1])
    return axes is not None and sorted(int(a) % 4 for a in axes) == [2, 3] and attributes.get("keepdims", 1)


def _is_pointwise(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Tell whether a matrix product only mixes channels: its second factor is a weight of two dimensions."""
    return node.op_type == "MatMul" and len(shapes.get(node.input[1], (0, 0, 0))) == 2


def _window(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> float:
    """Return how many positions of its input a node looks to one side."""
    attributes = _attributes(node)
    if node.op_type == "Resize":
        return 2.0 if attributes.get("mode") == b"cubic" else 1.0
    if node.op_type not in ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "QLinearConv", "ConvInteger"):
        return 0.0
    kernel = (
        attributes.get("kernel_shape") or shapes[node.input[3 if node.op_type == "QLinearConv" else 1]][2:]
    )
    dilations = attributes.get("dilations") or [1] * len(kernel)
    reach = max((size - 1) * step for size, step in zip(kernel, dilations, strict=True))
    if node.op_type == "ConvTranspose":
        return float(np.ceil(reach / max(attributes.get("strides") or [1])))
    return max(reach - min(attributes.get("pads") or [0]), *(attributes.get("pads") or [0]), reach / 2)


def _sorted(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes with every one behind those that it reads from."""
    ready = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    ready |= {"", "statistic_axes"}
    waiting, result = list(nodes), []
    while waiting:
        now = [node for node in waiting if ready.issuperset(node.input)]
        if not now:
            raise DataError(f"The network's graph has a circle at {waiting[0].name or waiting[0].op_type}.")
        ready.update(name for node in now for name in node.output)
        result += now
        taken = {id(node) for node in now}
        waiting = [node for node in waiting if id(node) not in taken]
    return result
