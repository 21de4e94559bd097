"""Element-wise functions of one byte tensor as tables, computed by ONNX's reference operators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from featherweight.compiler.expressions import ELEMENTWISE
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.infer import make_proto

if TYPE_CHECKING:
    from featherweight.compiler.passes.quantised import Source

MAX_NODES = 32


def table_of(
    graph: Graph, last: Node, source: Callable[[str], Source | None]
) -> tuple[str, np.ndarray] | None:
    """Return the byte tensor and the table behind a QuantizeLinear, None where more than one tensor decides.

    Args:
        graph: the graph.
        last: a QuantizeLinear to uint8.
        source: gives the byte tensor behind a float one.
    """
    producers = graph.producers()
    chain: list[Node] = []
    found: Source | None = None
    waiting = [last.inputs[0]]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or graph.constant(name) is not None:
            if name not in seen and graph.constants[name].size != 1:
                return None
            continue
        seen.add(name)
        leaf = source(name)
        node = producers.get(name)
        if leaf is not None:
            if found is not None and leaf.name != found.name:
                return None
            found = leaf
        elif node is None or node.op not in ELEMENTWISE or len(chain) == MAX_NODES:
            return None
        else:
            chain.append(node)
            waiting += [part for part in node.inputs if part]
    if found is None or graph.shape(found.name) != graph.shape(last.outputs[0]):
        return None
    chain = [node for node in graph.nodes if any(node is other for other in chain)]
    return found.name, _evaluate(graph, chain, last, found, source)


def _evaluate(
    graph: Graph, chain: list[Node], last: Node, leaf: Source, source: Callable[[str], Source | None]
) -> np.ndarray:
    """Run the chain on all 256 bytes."""
    names = {name for node in [*chain, last] for name in node.inputs if name}
    inputs = [name for name in names if (own := source(name)) is not None and own.name == leaf.name]
    values = (np.arange(256) - leaf.zero).astype(np.float32) * np.float32(leaf.scale)
    constants = [name for name in names if graph.constant(name) is not None]
    proto = onnx.helper.make_graph(
        [make_proto(node) for node in [*chain, last]],
        "table",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [256]) for name in inputs],
        [onnx.helper.make_tensor_value_info(last.outputs[0], onnx.TensorProto.UINT8, [256])],
        [onnx.numpy_helper.from_array(graph.constants[name].reshape(()), name) for name in constants],
    )
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", graph.opset)])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        (table,) = ReferenceEvaluator(model).run(None, dict.fromkeys(inputs, values))
    return np.asarray(table, np.uint8).reshape(256)
