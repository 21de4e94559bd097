"""Turn QDQ graphs into integer operators: what stands between the two conversions runs on bytes.

Activations become unsigned throughout. The integer operators are the compiler's own; their quantisation is
in the attributes as `(scale, zero)` pairs:

- `QConv` (x): weight int8 (O, I / groups, kh, kw), bias int32 or None, w_scale, x, y or None for a float32
  result, low and high in real numbers. A fully connected layer is one with kh = kw = 1 on rows of features.
- `QTable` (x): table of 256 bytes. `QAdd`, `QMul` (a, b): a, b, y, low and high in steps of y.
- `QGlobalPool`, `QPool` (x): x, y. `QConcat`: parts and y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from featherweight.compiler.graph import Graph, Node, TensorType
from featherweight.compiler.passes.quantised_fusion import fuse_concats, fuse_sums, fuse_tables
from featherweight.compiler.passes.quantised_tables import table_of

Scale = tuple[float, int]
MOVES = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True)
class Source:
    """A float tensor that is a byte tensor in disguise."""

    name: str
    scale: float
    zero: int

    @property
    def pair(self) -> Scale:
        """Scale and zero point."""
        return self.scale, self.zero


def lift_quantised(graph: Graph) -> None:
    """Rewrite the graph in place; float operators that have no integer form stay as they are."""
    make_unsigned(graph)
    fold_constants(graph, most=1)
    lifter = _Lifter(graph)
    for node in list(graph.nodes):
        rule = RULES.get(node.op)
        if rule is not None and id(node) not in lifter.gone:
            rule(lifter, node)
    for node in list(graph.nodes):
        if node.op == "QuantizeLinear" and id(node) not in lifter.gone:
            lifter.lift_group(node)
    graph.remove_dead()
    fuse_tables(graph)
    fuse_sums(graph)
    fuse_concats(graph)
    fold_constants(graph)


def scalar(value: np.ndarray | None) -> float | None:
    """Return the one element of a constant, None where it has more or is absent."""
    return None if value is None or value.size != 1 else value.reshape(-1)[0].item()


def make_unsigned(graph: Graph) -> None:
    """Store int8 activations as uint8 with a zero point 128 higher: the same numbers, one kind of kernel."""
    consumers = graph.consumers()
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or node.outputs[0] in graph.outputs:
            continue
        readers = consumers.get(node.outputs[0], [])
        quantisers = [node, *readers]
        zeros = [graph.constant(other.input(2)) for other in quantisers]
        signed = graph.dtype(node.outputs[0]) == np.int8
        if (
            not signed
            or any(other.op != "DequantizeLinear" for other in readers)
            or any(z is None for z in zeros)
        ):
            continue
        for other, zero in zip(quantisers, zeros, strict=True):
            name = graph.add_constant(other.inputs[2], (zero.astype(np.int16) + 128).astype(np.uint8))
            other.inputs = [*other.inputs[:2], name]
        node.attrs = {key: value for key, value in node.attrs.items() if key != "output_dtype"}
        graph.types[node.outputs[0]] = TensorType(graph.shape(node.outputs[0]), np.dtype(np.uint8))


class _Lifter:
    """Rules that replace one operator and the QuantizeLinear behind it by an integer operator."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.gone: set[int] = set()
        self.producers, self.consumers = graph.producers(), graph.consumers()

    def source(self, name: str) -> Source | None:
        """Return the byte tensor behind a float one that a DequantizeLinear of uint8 made."""
        node = self.producers.get(name)
        if node is None or node.op != "DequantizeLinear" or self.graph.dtype(node.inputs[0]) != np.uint8:
            return None
        return self._pair(node, node.inputs[0])

    def _pair(self, node: Node, name: str) -> Source | None:
        scale = scalar(self.graph.constant(node.inputs[1]))
        zero = scalar(self.graph.constant(node.inputs[2])) if node.input(2) else 0
        return None if scale is None or zero is None else Source(name, scale, int(zero))

    def target(self, name: str) -> tuple[Node, Source] | None:
        """Return the QuantizeLinear to uint8 that alone reads a tensor."""
        readers = self.consumers.get(name, [])
        if len(readers) != 1 or readers[0].op != "QuantizeLinear" or name in self.graph.outputs:
            return None
        node = readers[0]
        pair = self._pair(node, node.outputs[0])
        if pair is None or self.graph.dtype(node.outputs[0]) != np.uint8:
            return None
        return node, pair

    def clipped(self, name: str) -> tuple[str, float, float]:
        """Follow ReLU and clips that alone read a tensor: the last result, and the limits."""
        low, high = -np.inf, np.inf
        while True:
            readers = self.consumers.get(name, [])
            if len(readers) != 1 or name in self.graph.outputs or readers[0].op not in ("Relu", "Clip"):
                return name, low, high
            node = readers[0]
            bounds = [0.0, np.inf]
            if node.op == "Clip":
                given = [scalar(self.graph.constant(node.input(index))) for index in (1, 2)]
                if any(value is None and node.input(i + 1) for i, value in enumerate(given)):
                    return name, low, high
                bounds = [
                    given[0] if given[0] is not None else -np.inf,
                    given[1] if given[1] is not None else np.inf,
                ]
            low, high = max(low, bounds[0]), min(high, bounds[1])
            name = node.outputs[0]

    def replace(self, last: Node, new: Node) -> None:
        """Put an integer operator in the place of the last node that it stands for."""
        self.graph.nodes[self.graph.nodes.index(last)] = new
        self.gone.add(id(last))
        self.producers |= dict.fromkeys(new.outputs, new)

    def lift_group(self, node: Node) -> None:
        """Element-wise operators of one byte tensor are a table; a sum or product of two has a kernel."""
        end = self._pair(node, node.outputs[0])
        if end is None or self.graph.dtype(node.outputs[0]) != np.uint8:
            return
        table = table_of(self.graph, node, self.source)
        if table is not None:
            name, values = table
            self.replace(node, Node("QTable", node.name, [name], [node.outputs[0]], {"table": values}))


def _weights(lifter: _Lifter, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return int8 weights and their scales, one or one a channel."""
    graph = lifter.graph
    node = lifter.producers.get(name)
    if node is None or node.op != "DequantizeLinear":
        return None
    values = [graph.constant(part) for part in node.inputs]
    if any(value is None for value in values) or values[0].dtype not in (np.int8, np.uint8):
        return None
    zero = values[2] if len(values) > 2 else np.zeros(1, values[0].dtype)
    if values[0].dtype != np.int8 or zero.any():
        return None
    return values[0], values[1].reshape(-1)


def _bias(lifter: _Lifter, name: str, x_scale: float, w_scale: np.ndarray) -> np.ndarray | None:
    """Return the bias in steps of the sums, empty where there is none, None where it is not fixed."""
    if not name:
        return np.zeros(0, np.int32)
    node = lifter.producers.get(name)
    value = lifter.graph.constant(name)
    if value is None and node is not None and node.op == "DequantizeLinear":
        steps = lifter.graph.constant(node.inputs[0])
        if steps is None or steps.dtype != np.int32:
            return None
        scale = lifter.graph.constant(node.inputs[1])
        if scale is None:
            return None
        value = steps.astype(np.float64) * scale.reshape(-1)
    if value is None:
        return None
    steps = np.rint(value.reshape(-1).astype(np.float64) / (np.float64(x_scale) * w_scale))
    return steps.astype(np.int32) if np.abs(steps).max(initial=0) < 2**30 else None


def _lift_product(lifter: _Lifter, node: Node) -> None:
    """Conv, Gemm and MatMul with byte inputs and fixed int8 weights."""
    graph = lifter.graph
    x, found = lifter.source(node.inputs[0]), _weights(lifter, node.inputs[1])
    if x is None or found is None:
        return
    weight, w_scale = found
    if node.op == "Conv" and weight.ndim != 4:
        return
    if node.op != "Conv":
        if weight.ndim != 2 or len(graph.shape(node.inputs[0])) < 2 or node.attrs.get("transA", 0):
            return
        if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
            return
        weight = weight if node.attrs.get("transB", 0) else weight.T
        weight = np.ascontiguousarray(weight)[:, :, None, None]
    if len(w_scale) not in (1, len(weight)):
        return
    bias = _bias(lifter, node.input(2), x.scale, w_scale)
    if bias is None or len(bias) not in (0, len(weight)):
        return
    end, low, high = lifter.clipped(node.outputs[0])
    attrs = {
        "conv": node.attrs if node.op == "Conv" else {},
        "rows": node.op != "Conv",
        "weight": weight,
        "bias": bias if len(bias) else None,
        "w_scale": w_scale,
        "x": x.pair,
        "y": None,
        "low": low,
        "high": high,
    }
    target = lifter.target(end)
    if target is not None:
        last, y = target
        attrs["y"] = y.pair
        lifter.replace(last, Node("QConv", node.name, [x.name], [y.name], attrs))
    else:
        lifter.replace(lifter.producers[end], Node("QConv", node.name, [x.name], [end], attrs))


def _limits(low: float, high: float, y: Source) -> tuple[int, int]:
    """Return limits in steps of the result."""
    steps = [float(np.rint(value / y.scale)) + y.zero for value in (low, high)]
    return int(max(0, min(255, steps[0]))), int(max(0, min(255, steps[1])))


def _lift_binary(lifter: _Lifter, node: Node) -> None:
    """Sums and products of two byte tensors of one shape, or of a map and one value a channel."""
    graph = lifter.graph
    parts = [lifter.source(name) for name in node.inputs]
    end, low, high = lifter.clipped(node.outputs[0])
    target = lifter.target(end)
    if any(part is None for part in parts) or target is None:
        return
    shape = graph.shape(node.outputs[0])
    shapes = [graph.shape(part.name) for part in parts]
    if shapes[0] != shape:
        parts, shapes = parts[::-1], shapes[::-1]
    gate = len(shape) == 4 and shapes[1] == (*shape[:2], 1, 1) and node.op == "Mul"
    if shapes[0] != shape or (shapes[1] != shape and not gate):
        return
    last, y = target
    steps = _limits(low, high, y)
    attrs = {"a": parts[0].pair, "b": parts[1].pair, "y": y.pair, "low": steps[0], "high": steps[1]}
    names = [part.name for part in parts]
    lifter.replace(last, Node(f"Q{node.op}", node.name, names, [y.name], attrs))


def _lift_pool(lifter: _Lifter, node: Node) -> None:
    """Pools of byte tensors."""
    x, target = lifter.source(node.inputs[0]), lifter.target(node.outputs[0])
    if x is None or target is None or len(lifter.graph.shape(node.inputs[0])) != 4 or any(node.outputs[1:]):
        return
    last, y = target
    if node.op == "MaxPool" and x.pair != y.pair:
        return
    if set(node.attrs.get("dilations") or [1]) != {1} or node.attrs.get("ceil_mode", 0):
        return
    op = "QGlobalPool" if node.op == "GlobalAveragePool" else "QPool"
    attrs = {"pool": {**node.attrs, "op": node.op}, "x": x.pair, "y": y.pair}
    lifter.replace(last, Node(op, node.name, [x.name], [y.name], attrs))


def _lift_concat(lifter: _Lifter, node: Node) -> None:
    """A concatenation of channels; parts of another scale pass through a table."""
    parts, target = [lifter.source(name) for name in node.inputs], lifter.target(node.outputs[0])
    rank = len(lifter.graph.shape(node.outputs[0]))
    if any(part is None for part in parts) or target is None or rank != 4 or node.attrs["axis"] % 4 != 1:
        return
    last, y = target
    attrs = {"parts": [part.pair for part in parts], "y": y.pair}
    lifter.replace(last, Node("QConcat", node.name, [part.name for part in parts], [y.name], attrs))


def _lift_move(lifter: _Lifter, node: Node) -> None:
    """Moving bytes is moving numbers, as long as the scale stays."""
    x, target = lifter.source(node.inputs[0]), lifter.target(node.outputs[0])
    if x is None or target is None or target[1].pair != x.pair:
        return
    if node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest":
        return
    last, y = target
    lifter.replace(last, Node(node.op, node.name, [x.name, *node.inputs[1:]], [y.name], dict(node.attrs)))


def _lift_split(lifter: _Lifter, node: Node) -> None:
    """A split whose parts keep the scale."""
    x = lifter.source(node.inputs[0])
    targets = [lifter.target(name) if name else None for name in node.outputs]
    if x is None or any(target is None or target[1].pair != x.pair for target in targets):
        return
    outputs = [target[1].name for target in targets]
    first = min((target[0] for target in targets), key=lifter.graph.nodes.index)
    lifter.replace(first, Node("Split", node.name, [x.name, *node.inputs[1:]], outputs, dict(node.attrs)))
    for last, _ in targets:
        lifter.gone.add(id(last))
        if last in lifter.graph.nodes:
            lifter.graph.nodes.remove(last)


RULES: dict[str, Callable[[_Lifter, Node], None]] = {
    "Conv": _lift_product,
    "Gemm": _lift_product,
    "MatMul": _lift_product,
    "Add": _lift_binary,
    "Mul": _lift_binary,
    "MaxPool": _lift_pool,
    "AveragePool": _lift_pool,
    "GlobalAveragePool": _lift_pool,
    "Concat": _lift_concat,
    "Split": _lift_split,
    "Resize": _lift_move,
    **dict.fromkeys(MOVES, _lift_move),
}


def fold_constants(graph: Graph, most: int | None = None) -> None:
    """Compute the DequantizeLinear of constants, of at most `most` elements."""
    for node in list(graph.nodes):
        if node.op != "DequantizeLinear":
            continue
        values = [graph.constant(name) for name in node.inputs]
        shape = graph.shape(node.inputs[0])
        if any(value is None for value in values) or node.attrs.get("block_size", 0):
            continue
        if most is not None and values[0].size > most:
            continue
        axis = node.attrs.get("axis", 1)
        wide = [1] * len(shape)
        if values[1].size > 1:
            wide[axis] = -1
        zero = values[2].reshape(wide).astype(np.int64) if len(values) > 2 else 0
        result = (values[0].astype(np.int64) - zero).astype(values[1].dtype) * values[1].reshape(wide)
        graph.constants[node.outputs[0]] = result.reshape(shape).astype(graph.dtype(node.outputs[0]))
        graph.nodes.remove(node)
