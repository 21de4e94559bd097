"""Element-wise operators, alone or as a group: one loop over the output, one expression an operator."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.compiler.ctype import CType
from featherweight.compiler.emit_vector import Read, emit_vector_loop, literals
from featherweight.compiler.expressions import ELEMENTWISE, expression, saturate
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import at, index_of, memory_order, nested, plan_nest
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter, broadcast
from featherweight.compiler.vector_expressions import is_vector


def share_memory(writer: StepWriter, lowering: Lowering, output: Operand, reads: Sequence[Read]) -> None:
    """Let the output take the place of an input of the same size that dies here."""
    for read in reads:
        mine, other = output.view, read.operand.view
        same = (other.dtype, other.offset, read.strides) == (mine.dtype, mine.offset, output.strides)
        if same and lowering.program.storages[read.operand.view.storage].place == "arena":
            writer.step.in_place.append((output.view.storage, read.operand.view.storage))


@emits("Group", *ELEMENTWISE)
def emit_group(lowering: Lowering, node: Node) -> None:
    """Emit one element-wise node, or a group of them of the same output shape."""
    body: list[Node] = node.attrs["body"]
    writer = lowering.start(node)
    writer.step.op = "+".join(inner.op for inner in body)
    shape = lowering.graph.shape(node.outputs[0])
    reads = {}
    for name in node.inputs:
        operand = writer.pointer(lowering.view(name), restrict=False)
        reads[name] = Read(operand, broadcast(operand, shape))
    output = lowering.write(writer, node.outputs[0], restrict=False)
    share_memory(writer, lowering, output, list(reads.values()))
    if 0 in shape:
        return
    if is_vector(lowering.graph, body) and _has_rows(output, list(reads.values()), shape):
        writer.step.kernel = "vector loop"
        emit_vector_loop(lowering, writer, node, reads, output, shape)
        return
    nest = plan_nest(
        shape,
        [output.strides, *(read.strides for read in reads.values())],
        memory_order(output.strides, shape),
    )
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    with nested(writer, nest.sizes, names):
        values = literals(lowering, node.inputs, vector=False)
        for (name, read), own in zip(reads.items(), nest.strides[1:], strict=True):
            if name not in values:
                values[name] = f"v{len(values)}"
                element = at(read.operand, index_of(own, names))
                writer.line(f"const {read.operand.ctype.name} {values[name]} = {element};")
        for inner in body:
            _emit_inner(lowering, writer, inner, values)
        writer.line(f"{at(output, index_of(nest.strides[0], names))} = {values[node.outputs[0]]};")


def _has_rows(output: Operand, reads: Sequence[Read], shape: Sequence[int]) -> bool:
    """Say whether the innermost loop walks through memory one element at a time, or stays."""
    nest = plan_nest(shape, [output.strides, *(read.strides for read in reads)])
    own = [strides[-1] for strides in nest.strides]
    return output.view.is_plain and own[0] == 1 and set(own) <= {0, 1} and nest.sizes[-1] >= 4


def _emit_inner(lowering: Lowering, writer: StepWriter, inner: Node, values: dict[str, str]) -> None:
    types = lowering.graph.types
    args = [values[name] if name else "" for name in inner.inputs]
    kinds = [CType(types[name or inner.inputs[0]].dtype) for name in inner.inputs]
    out = CType(types[inner.outputs[0]].dtype)
    var = f"v{len(values)}"
    text = expression(inner.op, args, kinds, out, inner.attrs)
    writer.line(f"const {out.name} {var} = {text};")
    values[inner.outputs[0]] = var


@emits("BatchNormalization")
def emit_batch_norm(lowering: Lowering, node: Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + shift, one of each a channel."""
    if node.attrs.get("training_mode", 0) or any(node.outputs[1:]):
        lowering.refuse(node, "it is in training mode; export the network in evaluation mode")
    writer = lowering.start(node)
    shape = lowering.graph.shape(node.inputs[0])
    x = lowering.read(writer, node.inputs[0])
    parameters = [lowering.read(writer, name) for name in node.inputs[1:5]]
    y = lowering.write(writer, node.outputs[0])
    along = tuple(1 if axis == 1 else 0 for axis in range(len(shape)))
    nest = plan_nest(shape, [y.strides, x.strides, along], memory_order(y.strides, shape))
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    kind = x.ctype
    epsilon = kind.literal(node.attrs.get("epsilon", 1e-5))
    with nested(writer, nest.sizes, names):
        into, out_of, channel = (index_of(own, names) for own in nest.strides)
        scale, shift, mean, variance = (at(operand, channel) for operand in parameters)
        root = f"{kind.function('sqrt')}(({kind.name})({variance}) + {epsilon})"
        value = f"({at(x, out_of)} - {mean}) / {root} * {scale} + {shift}"
        writer.line(f"{at(y, into)} = ({kind.name})({value});")


def _axis_view(lowering: Lowering, node: Node, name: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the loop shape, with the blocked axis split in two, and the strides of scale and zero point.

    The strides are None where the scale is one number.
    """
    shape = lowering.graph.shape(node.inputs[0])
    scale = lowering.graph.shape(name)
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)
    axis += len(shape) if axis < 0 else 0
    if len(scale) == 0 or (scale == (1,) and not (block or (axis < len(shape) and shape[axis] == 1))):
        return shape, None
    if not block:
        return shape, tuple(1 if index == axis else 0 for index in range(len(shape)))
    if shape[axis] != scale[axis] * block:
        lowering.refuse(node, f"blocks of {block} do not divide {shape[axis]} elements")
    split = (*shape[:axis], scale[axis], block, *shape[axis + 1 :])
    strides = [1] * len(scale)
    for index in range(len(scale) - 2, -1, -1):
        strides[index] = strides[index + 1] * scale[index + 1]
    return split, (*strides[: axis + 1], 0, *strides[axis + 1 :])


@emits("QuantizeLinear", "DequantizeLinear")
def emit_quantize(lowering: Lowering, node: Node) -> None:
    """Between numbers and integers of 8 to 32 bits; scale and zero point for a tensor, channel or block."""
    shape, along = _axis_view(lowering, node, node.inputs[1])
    blocked = shape != lowering.graph.shape(node.inputs[0])
    if blocked:
        lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    x, scale = lowering.read(writer, node.inputs[0]), lowering.read(writer, node.inputs[1])
    zero = lowering.read(writer, node.inputs[2]) if node.input(2) else None
    y = lowering.write(writer, node.outputs[0])
    strides = [operand.reshaped(shape).strides if blocked else operand.strides for operand in (y, x)]
    nest = plan_nest(shape, [*strides, along or (0,) * len(shape)], memory_order(strides[0], shape))
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    with nested(writer, nest.sizes, names):
        into, out_of, channel = (index_of(own, names) for own in nest.strides)
        value, factor = at(x, out_of), at(scale, channel)
        shift = at(zero, channel) if zero else "0"
        if node.op == "QuantizeLinear":
            kind = scale.ctype
            text = f"{kind.function('rint')}({value} / {factor}) + {shift}"
            writer.line(f"{at(y, into)} = {saturate(text, kind, y.ctype)};")
        else:
            kind = y.ctype.name
            writer.line(f"{at(y, into)} = ({kind})(({kind})((int64_t){value} - {shift}) * {factor});")
