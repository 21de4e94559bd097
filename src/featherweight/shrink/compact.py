"""Make an ONNX file small: below 100 KB the names and the repeated constants weigh as much as the weights."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DIGITS = string.ascii_lowercase + string.ascii_uppercase


def short_name(index: int) -> str:
    """Return the `index`-th of the shortest names: a, b, ... Z, aa, ...

    >>> short_name(0), short_name(51), short_name(52)
    ('a', 'Z', 'aa')
    """
    name = ""
    while index >= 0:
        name = DIGITS[index % len(DIGITS)] + name
        index = index // len(DIGITS) - 1
    return name


def _free_outputs(graph: onnx.GraphProto) -> None:
    """Let the graph's outputs stay float: a rounding of the logits costs an operation and wins nothing."""
    makers = {name: node for node in graph.node for name in node.output}
    for output in graph.output:
        back = makers.get(output.name)
        if back is None or back.op_type != "DequantizeLinear":
            continue
        there = makers.get(back.input[0])
        layer = (
            makers.get(there.input[0]) if there is not None and there.op_type == "QuantizeLinear" else None
        )
        readers = [n for n in graph.node if layer is not None and there.input[0] in n.input]
        if layer is not None and layer.op_type in ("Gemm", "MatMul") and len(readers) == 1:
            layer.output[0] = output.name
            graph.node.remove(there)
            graph.node.remove(back)


def _share_constants(graph: onnx.GraphProto) -> None:
    """Keep one copy of constants with equal type, shape and content, and drop the unused ones."""
    from onnx import numpy_helper

    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed, kept = {}, []
    used = {name for node in graph.node for name in node.input}
    for tensor in graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
        if tensor.name not in used:
            continue
        if key in first:
            renamed[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)


def _shorten(graph: onnx.GraphProto) -> None:
    """Rename every inner tensor and forget node names; inputs and outputs keep theirs."""
    fixed = {value.name for value in [*graph.input, *graph.output]}
    names: dict[str, str] = {name: name for name in fixed} | {"": ""}
    counter = 0

    def rename(name: str) -> str:
        nonlocal counter
        if name not in names:
            while (short := short_name(counter)) in fixed:
                counter += 1
            names[name], counter = short, counter + 1
        return names[name]

    for node in graph.node:
        node.name, node.doc_string = "", ""
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name, tensor.doc_string = rename(tensor.name), ""


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shrink `model` in place and return it; it computes the same and keeps its metadata.

    Raises:
        onnx.checker.ValidationError: the result is not a valid model.
    """
    import onnx

    _free_outputs(model.graph)
    _share_constants(model.graph)
    _shorten(model.graph)
    del model.graph.value_info[:]
    del model.graph.quantization_annotation[:]
    # onnxruntime's quantiser leaves a note on how it was called.
    for entry in [e for e in model.metadata_props if e.key.startswith("onnx.")]:
        model.metadata_props.remove(entry)
    used = {node.domain for node in model.graph.node}
    for entry in list(model.opset_import):
        if entry.domain and entry.domain not in used:
            model.opset_import.remove(entry)
    onnx.checker.check_model(model)
    return model
