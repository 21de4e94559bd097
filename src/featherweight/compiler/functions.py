"""Replace operators that ONNX itself defines by smaller ones, Attention say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import onnx

from featherweight.compiler.graph import Graph, Node


def definition(graph: Graph, node: Node, proto: onnx.NodeProto) -> onnx.FunctionProto | None:
    """Return ONNX's definition of an operator by others, None where there is none.

    Args:
        graph: knows the inputs' types, on which some definitions depend.
        node: the operator.
        proto: the same node in ONNX's form.
    """
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, "")
    except Exception:
        return None
    if schema.has_function:
        versions = [version for version in schema.function_opset_versions if version <= graph.opset]
        if versions:
            function = onnx.FunctionProto()
            function.ParseFromString(schema.get_function_with_opset_version(max(versions)))
            return function
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= graph.opset]
        kinds = [
            onnx.helper.make_tensor_type_proto(
                onnx.helper.np_dtype_to_tensor_dtype(graph.dtype(name)), graph.shape(name)
            ).SerializeToString()
            if name
            else onnx.TypeProto().SerializeToString()
            for name in node.inputs
        ]
        if versions:
            function = onnx.FunctionProto()
            raw = schema.get_context_dependent_function_with_opset_version(
                max(versions), proto.SerializeToString(), kinds
            )
            function.ParseFromString(raw)
            return function
    return None


def expand(
    node: Node, function: onnx.FunctionProto, read: Callable[[onnx.NodeProto], Node], numbers: Iterator[int]
) -> list[Node]:
    """Return the nodes of a definition in place of a call, with names and attributes bound.

    Args:
        node: the call.
        function: its definition.
        read: turns a node of ONNX into one of the compiler.
        numbers: makes the names of inner tensors unique.
    """
    prefix = f"{node.name}/{next(numbers)}/"
    names = {"": ""}
    names |= dict(itertools.zip_longest(function.input, node.inputs, fillvalue=""))
    names |= dict(zip(function.output, node.outputs, strict=False))
    defaults = {attr.name: attr for attr in function.attribute_proto}
    found = []
    for inner in function.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(inner)
        bound = {}
        for attr in list(copy.attribute):
            if not attr.ref_attr_name:
                continue
            copy.attribute.remove(attr)
            if attr.ref_attr_name in node.attrs:
                bound[attr.name] = node.attrs[attr.ref_attr_name]
            elif attr.ref_attr_name in defaults:
                default = onnx.AttributeProto()
                default.CopyFrom(defaults[attr.ref_attr_name])
                default.name = attr.name
                copy.attribute.append(default)
        result = read(copy)
        result.attrs |= bound
        result.name = prefix + (inner.name or inner.op_type)
        result.inputs = [names.get(name) if name in names else prefix + name for name in inner.input]
        result.outputs = [names[name] if names.get(name) else prefix + name for name in inner.output]
        found.append(result)
    return found
