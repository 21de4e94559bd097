"""Fold what scales and shifts channels into the weights before it; turn products with weights into `Linear`.

`Linear` is the compiler's own operator: inputs x (…, K), weight (K, N) and bias (N,), result x W + b.
"""

from __future__ import annotations

import numpy as np

from featherweight.compiler.graph import Graph, Node, rewrite

WEIGHTED = ("Conv", "ConvTranspose", "Linear")


def fold_norms(graph: Graph) -> None:
    """Apply the folds until none is left."""
    rewrite(graph, _spread_norm)
    rewrite(graph, _lift_linear)
    fold_scales(graph)


def fold_scales(graph: Graph) -> None:
    """Fold products and sums with one constant a channel into the weights before them."""
    while rewrite(graph, _fold_scale):
        pass


def _spread_norm(graph: Graph, node: Node) -> bool:
    """Write a batch norm of constants as a product and a sum."""
    if node.op != "BatchNormalization" or node.attrs.get("training_mode", 0):
        return False
    values = [graph.constant(name) for name in node.inputs[1:5]]
    kind = graph.types[node.inputs[0]]
    if any(value is None for value in values) or kind.dtype != np.float32 or any(node.outputs[1:]):
        return False
    scale, shift, mean, variance = (np.asarray(value, np.float64) for value in values)
    factor = scale / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    wide = (-1, *([1] * (len(kind.shape) - 2)))
    product = graph.free_name(node.name + ".scaled")
    graph.types[product] = kind
    factors = graph.add_constant(node.name + ".factor", factor.astype(np.float32).reshape(wide))
    terms = graph.add_constant(node.name + ".term", (shift - mean * factor).astype(np.float32).reshape(wide))
    place = graph.nodes.index(node)
    graph.nodes[place : place + 1] = [
        Node("Mul", node.name, [node.inputs[0], factors], [product]),
        Node("Add", node.name, [product, terms], [node.outputs[0]]),
    ]
    return True


def _lift_linear(graph: Graph, node: Node) -> bool:
    """Turn MatMul and Gemm with constant float32 weights into `Linear`."""
    if node.op not in ("MatMul", "Gemm") or graph.dtype(node.inputs[0]) != np.float32:
        return False
    weight = graph.constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or len(graph.shape(node.inputs[0])) < 2:
        return False
    attrs = node.attrs if node.op == "Gemm" else {}
    if attrs.get("transA", 0):
        return False
    weight = weight.T if attrs.get("transB", 0) else weight
    weight = weight * np.float32(attrs.get("alpha", 1.0))
    bias = np.zeros(weight.shape[1], np.float32)
    if node.input(2):
        added = graph.constant(node.inputs[2])
        if (
            added is None
            or added.size not in (1, weight.shape[1])
            or (added.ndim == 2 and added.shape[0] != 1)
        ):
            return False
        bias = bias + added.reshape(-1) * np.float32(attrs.get("beta", 1.0))
    node.op, node.attrs = "Linear", {}
    node.inputs = [
        node.inputs[0],
        graph.add_constant(node.name + ".weight", np.ascontiguousarray(weight)),
        graph.add_constant(node.name + ".bias", bias.astype(np.float32)),
    ]
    return True


def _fold_scale(graph: Graph, node: Node) -> bool:
    """Fold a product or sum with one constant a channel into the weighted node that feeds it."""
    if node.op not in ("Mul", "Add", "Sub", "Div") or graph.dtype(node.outputs[0]) != np.float32:
        return False
    constants = [graph.constant(name) for name in node.inputs]
    side = 0 if constants[0] is not None else 1
    value = constants[side]
    if value is None or constants[1 - side] is not None or (side == 0 and node.op in ("Sub", "Div")):
        return False
    source = node.inputs[1 - side]
    producer = graph.producers().get(source)
    if producer is None or producer.op not in WEIGHTED or source in graph.outputs:
        return False
    if len(graph.consumers()[source]) != 1 or graph.shape(source) != graph.shape(node.outputs[0]):
        return False
    weight = graph.constant(producer.inputs[1])
    bias = graph.constant(producer.input(2)) if producer.input(2) else 0.0
    channels = _channels(graph, producer)
    per_channel = channel_values(value, len(graph.shape(source)), channels, producer.op == "Linear")
    if weight is None or bias is None or per_channel is None:
        return False
    weight, bias = weight.astype(np.float64), np.zeros(channels) + bias
    if node.op in ("Mul", "Div"):
        factor = per_channel if node.op == "Mul" else 1.0 / per_channel
        weight, bias = _scaled(producer, weight, factor), bias * factor
    else:
        bias = bias + (per_channel if node.op == "Add" else -per_channel)
    producer.inputs = [
        producer.inputs[0],
        graph.add_constant(producer.inputs[1], weight.astype(np.float32)),
        graph.add_constant(producer.name + ".bias", bias.astype(np.float32)),
    ]
    producer.outputs = list(node.outputs)
    graph.nodes.remove(node)
    return True


def _channels(graph: Graph, producer: Node) -> int:
    shape = graph.shape(producer.outputs[0])
    return shape[-1] if producer.op == "Linear" else shape[1]


def channel_values(value: np.ndarray, rank: int, channels: int, last: bool = False) -> np.ndarray | None:
    """Return a constant as one value a channel, or None if it varies along another axis."""
    value = value.astype(np.float64)
    if value.size == 1:
        return np.full(channels, value.reshape(-1)[0])
    wide = (1,) * (rank - value.ndim) + value.shape
    axis = rank - 1 if last else 1
    if value.size != channels or len(wide) != rank or wide[axis] != channels:
        return None
    return value.reshape(-1)


def _scaled(producer: Node, weight: np.ndarray, factor: np.ndarray) -> np.ndarray:
    if producer.op == "Linear":
        return weight * factor
    if producer.op == "Conv":
        return weight * factor.reshape(-1, *([1] * (weight.ndim - 1)))
    # A transposed convolution has (inputs, outputs / groups, …): the output channels of a group lie in a row.
    groups = producer.attrs.get("group", 1)
    split = weight.reshape(groups, -1, *weight.shape[1:])
    split = split * factor.reshape(groups, 1, -1, *([1] * (weight.ndim - 2)))
    return split.reshape(weight.shape)
