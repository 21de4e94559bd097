"""Give every tensor a static shape and type, and fold nodes whose inputs are all known, in one pass."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from featherweight.compiler.functions import definition, expand
from featherweight.compiler.graph import Graph, Node, TensorType
from featherweight.errors import DataError

MAX_FOLDED_BYTES = 2**26
MAX_FOLDED_WORK = 2**24
"""Elements of inputs and outputs of one node that is computed at compile time by numpy."""

MAX_SHAPE_DATA = 4096
"""Elements of a constant that is shown to shape inference; larger ones are weights."""

MALFORMED = (ArithmeticError, AttributeError, IndexError, KeyError, MemoryError, TypeError, ValueError)
"""What a node of the wrong form raises below: missing inputs, attributes of other types or sizes."""

NEVER_FOLDED = frozenset(
    [
        "Conv",
        "ConvTranspose",
        "ConvInteger",
        "QLinearConv",
        "DequantizeLinear",
        "Einsum",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Bernoulli",
        "Multinomial",
        "If",
        "Loop",
        "Scan",
        "NonZero",
        "Unique",
        "Compress",
    ]
)
SAME_AS_INPUT = frozenset(
    [
        "Celu",
        "Clip",
        "Gelu",
        "GroupNormalization",
        "HardSwish",
        "LayerNormalization",
        "MeanVarianceNormalization",
        "Mish",
        "PRelu",
        "RMSNormalization",
        "Selu",
        "Shrink",
        "Softplus",
        "Softsign",
        "Swish",
        "Binarizer",
        "ThresholdedRelu",
        "Elu",
        "LogSoftmax",
        "Softmax",
    ]
)
"""Operators that ONNX defines by a function body; some versions carry no shape inference for them."""


class Inference:
    """One forward pass over a sorted graph.

    Args:
        graph: its `types` are filled, folded nodes move to its `constants`.
        max_bytes: the largest tensor.
        known: operators that need not be replaced by ONNX's definition of them.
        read: turns a node of ONNX into one of the compiler.

    Raises:
        DataError: a node whose output shape stays open, does not fit or is absurd.
    """

    def __init__(
        self, graph: Graph, max_bytes: int, known: Collection[str], read: Callable[[onnx.NodeProto], Node]
    ) -> None:
        self.graph, self.max_bytes, self.known, self.read = graph, max_bytes, known, read
        self.imports = [onnx.helper.make_opsetid("", graph.opset)]
        self.rules = onnx.checker.C.CheckerContext()
        self.rules.ir_version, self.rules.opset_imports = onnx.IR_VERSION, {"": graph.opset}
        self.protos: dict[str, onnx.TypeProto] = {}
        self.data: dict[str, onnx.TensorProto] = {}

    def run(self) -> None:
        """Fill `graph.types` and move folded nodes into `graph.constants`."""
        kept = []
        waiting = deque(self.graph.nodes)
        numbers = itertools.count()
        while waiting:
            node = waiting.popleft()
            try:
                definition_of = self._definition(node)
                if definition_of is not None:
                    waiting.extendleft(reversed(expand(node, definition_of, self.read, numbers)))
                else:
                    kept += self._visit(node)
            except MALFORMED as error:
                raise self._error(
                    node, f"it is malformed: {type(error).__name__}: {first_line(error)}"
                ) from error
        self.graph.nodes = kept

    def _definition(self, node: Node) -> onnx.FunctionProto | None:
        if node.op in self.known or "::" in node.op:
            return None
        return definition(self.graph, node, make_proto(node))

    def _visit(self, node: Node) -> list[Node]:
        """Fold a node or give its outputs types; return the node if it stays."""
        if node.op == "CastLike":
            # Only the type of the second input matters.
            node.op, node.attrs = "Cast", {"to": _elem_type(self.graph.dtype(node.inputs.pop()))}
        if node.op in ("Shape", "Size"):
            folded = self._sizes(node)
        elif all(name in self.graph.constants for name in node.inputs if name):
            folded = self._fold(node)
        else:
            folded = None
        if folded is None:
            self._infer(node)
            return [node]
        for name, value in zip(node.outputs, folded, strict=False):
            if name:
                self.graph.constants[name] = value
                self.graph.types[name] = TensorType(tuple(value.shape), value.dtype)
        return []

    def _sizes(self, node: Node) -> list[np.ndarray]:
        self._output_types(node)
        shape = self.graph.shape(node.inputs[0])
        if node.op == "Size":
            return [np.array(int(np.prod(shape, dtype=np.int64)), np.int64)]
        start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
        return [np.array(shape[slice(start, end)], np.int64).reshape(-1)]

    def _fold(self, node: Node) -> list[np.ndarray] | None:
        """Compute a node of known inputs, or return None where it is better left to the generated code."""
        if "::" in node.op or node.op in NEVER_FOLDED:
            return None
        try:
            types = self._output_types(node)
        except DataError:
            types = {}
        work = sum(kind.size for kind in types.values())
        work += sum(self.graph.types[name].size for name in node.inputs if name)
        sized = bool(types) and all(kind.size_bytes <= MAX_FOLDED_BYTES for kind in types.values())
        # Range has no static output: its length follows from its inputs' values.
        if not (sized or (node.op == "Range" and self._range_length(node) < MAX_FOLDED_WORK)):
            return None
        if work > MAX_FOLDED_WORK and node.op not in ("Constant", "Transpose", "Reshape", "Cast"):
            return None
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                values = ReferenceEvaluator(self._model(node)).run(
                    None, {name: self.graph.constants[name] for name in node.inputs if name}
                )
        except Exception as error:
            raise DataError(
                f"Node '{node.name}' ({node.op}, opset {self.graph.opset}) cannot be computed from its "
                f"constant inputs: {type(error).__name__}: {first_line(error)}."
            ) from error
        named = iter(values)
        return [np.asarray(next(named)) if name else np.empty(0) for name in node.outputs]

    def _range_length(self, node: Node) -> float:
        start, limit, delta = (float(self.graph.constants[name].reshape(-1)[0]) for name in node.inputs)
        return abs((limit - start) / delta) if delta else float("inf")

    def _model(self, node: Node) -> onnx.ModelProto:
        inputs = [
            onnx.helper.make_tensor_value_info(
                name, _elem_type(self.graph.dtype(name)), self.graph.shape(name)
            )
            for name in dict.fromkeys(node.inputs)
            if name
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.outputs if name]
        graph = onnx.helper.make_graph([make_proto(node)], "fold", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=self.imports)

    def _infer(self, node: Node) -> None:
        types = self._output_types(node)
        for name in node.outputs:
            if not name:
                continue
            if name not in types:
                raise self._error(node, f"its output '{name}' has no shape that is known before it runs")
            if types[name].size_bytes > self.max_bytes:
                raise self._error(node, f"its output would have the shape {list(types[name].shape)}")
            self.graph.types[name] = types[name]

    def _output_types(self, node: Node) -> dict[str, TensorType]:
        try:
            schema = onnx.defs.get_schema(node.op, self.graph.opset, "")
        except Exception as error:
            raise self._error(node, "the operator is not supported") from error
        inputs = {name: self._type_proto(name) for name in node.inputs if name}
        data = {name: self._shape_data(name) for name in inputs if self._is_shape_data(name)}
        proto = make_proto(node)
        self._check(node, proto)
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, inputs, data, opset_imports=self.imports
            )
        except Exception as error:
            raise self._error(node, f"its inputs do not fit: {first_line(error)}") from error
        types = {}
        for name, proto in found.items():
            kind = _static(proto)
            if kind is not None:
                types[name] = kind
        if node.op in SAME_AS_INPUT and node.outputs[0] not in types:
            types[node.outputs[0]] = self.graph.types[node.inputs[0]]
        return types

    def _check(self, node: Node, proto: onnx.NodeProto) -> None:
        """Refuse what ONNX's shape inference would not survive: it trusts numbers of inputs and axes."""
        if node.op == "Constant":
            return
        try:
            onnx.checker.check_node(proto, self.rules)
        except onnx.checker.ValidationError as error:
            raise self._error(node, f"it is malformed: {first_line(error)}") from error
        rank = max((len(self.graph.shape(entry)) for entry in node.inputs if entry), default=0)
        for name in ("axis", "axes", "perm", "batch_dims"):
            values = node.attrs.get(name, 0)
            axes = values if isinstance(values, list) else [values]
            if any(abs(axis) > rank + len(axes) for axis in axes):
                raise self._error(node, f"its attribute '{name}' is {values}, beyond the axes of its inputs")

    def _error(self, node: Node, problem: str) -> DataError:
        return DataError(f"Node '{node.name}' ({node.op}, opset {self.graph.opset}): {problem}.")

    def _type_proto(self, name: str) -> onnx.TypeProto:
        if name not in self.protos:
            kind = self.graph.types[name]
            self.protos[name] = onnx.helper.make_tensor_type_proto(_elem_type(kind.dtype), kind.shape)
        return self.protos[name]

    def _is_shape_data(self, name: str) -> bool:
        value = self.graph.constants.get(name)
        return value is not None and value.size <= MAX_SHAPE_DATA

    def _shape_data(self, name: str) -> onnx.TensorProto:
        if name not in self.data:
            self.data[name] = numpy_helper.from_array(np.asarray(self.graph.constants[name]), name)
        return self.data[name]


def _elem_type(dtype: np.dtype) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(dtype)


def _static(proto: onnx.TypeProto) -> TensorType | None:
    kind = proto.tensor_type
    if proto.WhichOneof("value") != "tensor_type" or not kind.HasField("shape"):
        return None
    if any(not dim.HasField("dim_value") or dim.dim_value < 0 for dim in kind.shape.dim):
        return None
    shape = tuple(dim.dim_value for dim in kind.shape.dim)
    return TensorType(shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def make_proto(node: Node) -> onnx.NodeProto:
    """Return the ONNX form of a node, for shape inference and reference evaluation."""
    attrs: dict[str, Any] = {
        name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in node.attrs.items()
    }
    proto = onnx.helper.make_node(node.op, node.inputs, node.outputs, node.name)
    for name, value in attrs.items():
        if isinstance(value, list) and not value:
            proto.attribute.append(onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS))
        else:
            proto.attribute.append(onnx.helper.make_attribute(name, value))
    return proto


def first_line(error: Exception) -> str:
    """Return the first line of a message, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
