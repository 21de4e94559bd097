"""Read an ONNX file into a `Graph`: everything checked, every shape static, constants folded.

The file is treated as hostile: weights outside its folder, sizes that do not add up, cycles and absurd shapes
end in one DataError. Nothing of the network runs here except small nodes whose inputs are all known.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from featherweight.compiler.graph import Graph, Node, TensorType, sort_nodes
from featherweight.compiler.infer import Inference
from featherweight.errors import DataError

MIN_OPSET, MAX_OPSET = 13, 28
MAX_TENSOR_BYTES = 2**31
MAX_FILE_BYTES = 2**31 - 1
"""A protobuf message ends here; larger networks keep their weights in a second file."""

PASSIVE = frozenset({"CastLike", "Constant", "Shape", "Size", "Range"})
"""Operators that inference itself replaces or folds."""

Shapes = Mapping[str, Sequence[int]]


def read_model(
    source: str | Path | onnx.ModelProto,
    shapes: Shapes | None = None,
    batch: int = 1,
    known: Collection[str] = (),
) -> Graph:
    """Read an ONNX file.

    Args:
        source: the file, or a model that is already in memory.
        shapes: the whole shape of inputs whose sizes the file leaves free, by input name.
        batch: size of a free first dimension.
        known: operators that stay as they are; others are replaced by ONNX's definition, where there is one.

    Raises:
        DataError: the file is missing, corrupt, unsafe, of an opset outside 13-28, or leaves a shape open;
            the message names the node or tensor.
    """
    if isinstance(source, onnx.ModelProto):
        model, folder = source, None
    else:
        model, folder = _load(Path(source)), Path(source).resolve().parent
    opset = _opset(model)
    _check_names(model.graph)
    if model.functions:
        model = _inline(model)
    graph_proto = model.graph
    constants = {}
    for tensor in graph_proto.initializer:
        constants[tensor.name] = read_tensor(tensor, folder, f"initializer '{tensor.name}'")
    if graph_proto.sparse_initializer:
        raise DataError("The file holds sparse initializers, which are not supported. Store them dense.")
    nodes = [_node(proto, index, folder) for index, proto in enumerate(graph_proto.node)]
    graph = Graph(
        name=graph_proto.name or "model",
        nodes=nodes,
        constants=constants,
        types={name: TensorType(tuple(value.shape), value.dtype) for name, value in constants.items()},
        inputs=[],
        outputs=[value.name for value in graph_proto.output],
        opset=opset,
    )
    _add_inputs(graph, graph_proto, dict(shapes or {}), batch)
    _order(graph)
    passive = {*known, *PASSIVE}
    Inference(graph, MAX_TENSOR_BYTES, passive, lambda proto: _node(proto, 0, folder)).run()
    for name in graph.outputs:
        if name not in graph.types:
            raise DataError(f"Output '{name}' is computed by no node. Export the file again.")
    graph.remove_dead()
    return graph


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise DataError(f"No ONNX file at {path}; expected the path of a .onnx file.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes; an ONNX file has at most {MAX_FILE_BYTES}.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:
        raise DataError(
            f"{path} is not a readable ONNX file ({type(error).__name__}). Export it again."
        ) from error
    if not model.graph.node and not model.graph.output:
        raise DataError(f"{path} holds no network. Expected an ONNX file with a graph.")
    return model


def _check_names(graph: onnx.GraphProto) -> None:
    """Refuse names that are no text, which protobuf hands out as bytes, and those of two tensors."""
    texts = [graph.name]
    for node in graph.node:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attr.name for attr in node.attribute]
    for part in (graph.input, graph.output, graph.initializer):
        names = [entry.name for entry in part]
        texts += names
        if len(set(names)) < len(names):
            name = next(name for index, name in enumerate(names) if name in names[:index])
            raise DataError(f"The file lists '{name}' twice. Export it again.")
    for text in texts:
        if isinstance(text, bytes):
            raise DataError(f"The name {text!r} is not UTF-8. Export the file again.")


def _opset(model: onnx.ModelProto) -> int:
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise DataError(
            f"The file uses opset {opset}; supported are {MIN_OPSET} to {MAX_OPSET}. "
            "Export it again with another opset, or convert it with onnx.version_converter."
        )
    return opset


def _inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of the file's own functions by their bodies."""
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:
        raise DataError(f"The file's functions cannot be inlined: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def read_tensor(proto: onnx.TensorProto, folder: Path | None, where: str) -> np.ndarray:
    """Return the value of a stored tensor.

    Args:
        proto: the tensor, its data inside or in a file beside the model.
        folder: the model's folder; None refuses data outside the file.
        where: what the tensor is, for messages.

    Raises:
        DataError: sizes do not add up, the type is unknown, or the data lie outside `folder`.
    """
    dims = list(proto.dims)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
    except (KeyError, TypeError) as error:
        raise DataError(f"The {where} has the unknown data type {proto.data_type}.") from error
    if any(size < 0 for size in dims) or math.prod(dims) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise DataError(f"The {where} has the shape {dims}; expected at most {MAX_TENSOR_BYTES} bytes.")
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raw = _external(proto, folder, where, math.prod(dims) * dtype.itemsize)
        return np.frombuffer(raw, dtype=dtype.newbyteorder("<")).reshape(dims).astype(dtype)
    try:
        # Checked here because a fill of one value can claim any shape.
        value = np.asarray(numpy_helper.to_array(proto))
    except Exception as error:
        raise DataError(f"The {where} cannot be read: {_first_line(error)}.") from error
    if list(value.shape) != dims:
        raise DataError(f"The {where} says shape {dims} and holds {list(value.shape)}.")
    return value


def _external(proto: onnx.TensorProto, folder: Path | None, where: str, size: int) -> bytes:
    """Read a tensor's bytes from the file beside the model that it names."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    if folder is None or not location:
        raise DataError(f"The {where} keeps its data in another file, which is not at hand.")
    path = (folder / location).resolve()
    if Path(location).is_absolute() or not path.is_relative_to(folder):
        raise DataError(f"The {where} names data outside the model's folder: {location!r}.")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        if offset < 0 or length != size:
            raise ValueError(f"offset {offset}, length {length}, expected {size} bytes")
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(size)
        if len(raw) != size:
            raise ValueError(f"{path.name} ends after {len(raw)} of {size} bytes")
    except (OSError, ValueError) as error:
        raise DataError(f"The external data of the {where} cannot be read: {_first_line(error)}.") from error
    return raw


def _node(proto: onnx.NodeProto, index: int, folder: Path | None) -> Node:
    name = proto.name or f"node {index}"
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}::{proto.op_type}"
    attrs: dict[str, Any] = {}
    for attr in proto.attribute:
        if attr.type == onnx.AttributeProto.TENSOR:
            attrs[attr.name] = read_tensor(attr.t, folder, f"attribute '{attr.name}' of node '{name}'")
            continue
        if attr.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) or attr.ref_attr_name:
            raise DataError(
                f"Node '{name}' ({op}) holds a subgraph or an unbound attribute; networks with control flow "
                "are not supported. Export with fixed control flow."
            )
        value = onnx.helper.get_attribute_value(attr)
        attrs[attr.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if attr.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
            attrs[attr.name] = list(value)
    return Node(op, name, list(proto.input), list(proto.output), attrs)


def _add_inputs(graph: Graph, proto: onnx.GraphProto, shapes: dict[str, Sequence[int]], batch: int) -> None:
    for value in proto.input:
        if value.name in graph.constants:
            continue
        kind = value.type.tensor_type
        known = value.type.WhichOneof("value") == "tensor_type" and kind.HasField("shape")
        if not known and (value.name not in shapes or not kind.elem_type):
            raise DataError(f"Input '{value.name}' is not a tensor with a known rank and type.")
        try:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        except (KeyError, TypeError) as error:
            raise DataError(f"Input '{value.name}' has the unknown data type {kind.elem_type}.") from error
        shape = shapes.pop(value.name, None)
        if shape is None:
            shape = [_size(dim, axis, value.name, batch) for axis, dim in enumerate(kind.shape.dim)]
        elif any(
            dim.HasField("dim_value") and dim.dim_value != size
            for dim, size in zip(kind.shape.dim, shape, strict=False)
        ) or (kind.HasField("shape") and len(kind.shape.dim) != len(shape)):
            fixed = [dim.dim_value or dim.dim_param or "?" for dim in kind.shape.dim]
            raise DataError(f"Input '{value.name}' has the shape {fixed}; {list(shape)} does not fit it.")
        if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > MAX_TENSOR_BYTES:
            raise DataError(f"Input '{value.name}' has the shape {list(shape)}, which is absurd.")
        graph.types[value.name] = TensorType(tuple(int(size) for size in shape), dtype)
        graph.inputs.append(value.name)
    if shapes:
        raise DataError(f"No input is called {', '.join(shapes)}; the file has {', '.join(graph.inputs)}.")


def _size(dim: Any, axis: int, name: str, batch: int) -> int:
    if dim.HasField("dim_value"):
        return dim.dim_value
    if axis == 0:
        return batch
    label = dim.dim_param or "unnamed"
    raise DataError(
        f"Input '{name}' leaves dimension {axis} ({label}) open. "
        f"Give its whole shape: --shape {name}=1,3,224,224."
    )


def _order(graph: Graph) -> None:
    """Sort the nodes; refuse double definitions and cycles."""
    seen = set(graph.types)
    for node in graph.nodes:
        for name in node.outputs:
            if name and name in seen:
                raise DataError(f"Tensor '{name}' is defined twice, the second time by node '{node.name}'.")
            seen.add(name)
    graph.nodes, left = sort_nodes(graph.nodes, graph.types)
    if left:
        node = left[0]
        unknown = [name for name in node.inputs if name and name not in seen]
        problem = f"reads the unknown tensor '{unknown[0]}'" if unknown else "lies on or behind a cycle"
        raise DataError(f"Node '{node.name}' ({node.op}) {problem}. Export the file again.")
