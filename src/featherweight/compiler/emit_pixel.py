"""Element-wise groups on vectors, and pools, in the pixel layout."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.compiler.ctype import CType
from featherweight.compiler.emit_elementwise import Read, share_memory
from featherweight.compiler.emit_reduce import emit_reduce
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import Nest, index_of, nested, plan_nest
from featherweight.compiler.lower import Lowering, emits_pixel
from featherweight.compiler.program import Operand, StepWriter, View
from featherweight.compiler.vector_expressions import body_lines, is_vector
from featherweight.compiler.windows import conv_window

PIXEL_AXES = (0, 2, 3, 1)
"""The axes of (N, C, H, W) from the outermost in memory."""


def literals(lowering: Lowering, names: Sequence[str], vector: bool) -> dict[str, str]:
    """Return the constants of one element as C literals."""
    found = {}
    for name in names:
        value = lowering.graph.constant(name)
        if value is not None and value.size == 1:
            text = CType(value.dtype).literal(value.reshape(-1)[0])
            found[name] = f"vf_set({text})" if vector else text
    return found


def emit_vector_loop(
    lowering: Lowering, writer: StepWriter, node: Node, reads: dict[str, Read], output: Operand, shape: Sequence[int]
) -> None:
    """Emit a group as one loop over vectors of the last axis of `shape`.

    Args:
        lowering: the state of lowering.
        writer: the step's writer.
        node: the group.
        reads: its inputs with their strides under `shape`, whose last stride is 0 or 1.
        output: where the result goes; its last stride is 1.
        shape: the loops; the last may end in the middle of a vector.
    """
    lowering.program.need_header("vector.h")
    values = literals(lowering, node.inputs, vector=True)
    nest = plan_nest(shape, [output.strides, *(read.strides for read in reads.values())])
    if nest.strides[0][-1] != 1:
        # The last axis has one element and fell away.
        last = [1, *([0] * len(reads))]
        joined = tuple((*own, end) for own, end in zip(nest.strides, last, strict=True))
        nest = Nest((*nest.sizes, 1), joined)
    vl, width = lowering.vector, nest.sizes[-1]
    names = [f"i{depth}" for depth in range(len(nest.sizes) - 1)]
    with nested(writer, nest.sizes[:-1], names):
        first, last = "0", str(width // vl * vl)
        if not names:
            first, last = (f"{width // vl}L * {part} / threads * {vl}" for part in ("tid", "(tid + 1)"))
        if width >= vl:
            with writer.block(f"for (long k = {first}; k < {last}; k += {vl})"):
                _vector_body(lowering, writer, node, dict(values), reads, nest, output, 0)
        if width % vl:
            with writer.block("" if names else "if (tid == threads - 1)"):
                writer.line(f"const long k = {width // vl * vl};")
                _vector_body(lowering, writer, node, dict(values), reads, nest, output, width % vl)


def _vector_body(
    lowering: Lowering,
    writer: StepWriter,
    node: Node,
    values: dict[str, str],
    reads: dict[str, Read],
    nest: Nest,
    output: Operand,
    lanes: int,
) -> None:
    """Load, compute and store one vector at `k`; `lanes` is 0 for a whole one."""
    names = [f"i{depth}" for depth in range(len(nest.sizes) - 1)]
    for (name, read), own in zip(reads.items(), nest.strides[1:], strict=True):
        if name in values:
            continue
        base = f"{read.operand.var} + {index_of(own[:-1], names)}"
        var = f"v{len(values)}"
        if own[-1] == 0:
            text = f"vf_set(*({base}))"
        else:
            text = f"vf_load_n({base} + k, {lanes})" if lanes else f"vf_load({base} + k)"
        writer.line(f"const vf {var} = {text};")
        values[name] = var
    body = node.attrs["body"]
    lines = body_lines(lowering.graph, body, values)
    lowering.program.need_math("".join(lines))
    for line in lines:
        writer.line(line)
    target = f"{output.var} + {index_of(nest.strides[0][:-1], names)} + k"
    result = values[body[-1].outputs[0]]
    writer.line(f"vf_store_n({target}, {result}, {lanes});" if lanes else f"vf_store({target}, {result});")


@emits_pixel("Group")
def emit_pixel_group(lowering: Lowering, node: Node) -> None:
    """One pass over the pixels, whole vectors of channels at a time."""
    body = node.attrs["body"]
    if not is_vector(lowering.graph, body):
        lowering.emit_plainly(node)
        return
    shape = lowering.graph.shape(node.outputs[0])
    views = {name: pixel_operand(lowering, name, shape) for name in node.inputs}
    writer = lowering.start(node, "vector loop")
    writer.step.op = "+".join(inner.op for inner in body)
    reads = {}
    for name, view in views.items():
        operand = writer.pointer(view, restrict=False)
        reads[name] = Read(operand, view.strides)
    output = lowering.write(writer, node.outputs[0], restrict=False)
    n, c, h, w = shape
    channels = output.view.padded_channels(lowering.vector)
    loop = (n, h, w, channels)
    inside = Operand(output.var, output.view)
    share_memory(writer, lowering, inside, list(reads.values()))
    ordered = {
        name: Read(read.operand, tuple(_loop_strides(read.operand.view, shape)[axis] for axis in PIXEL_AXES))
        for name, read in reads.items()
    }
    target = output.reshaped(loop, [output.strides[axis] for axis in PIXEL_AXES])
    emit_vector_loop(lowering, writer, node, ordered, target, loop)


def _loop_strides(view: View, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        0 if own == 1 and wide != 1 else stride
        for own, wide, stride in zip(view.shape, shape, view.strides, strict=True)
    )


def pixel_operand(lowering: Lowering, name: str, shape: Sequence[int]) -> View:
    """Return a tensor as a rank-4 view in the pixel layout; broadcast axes have size one."""
    own = lowering.graph.shape(name)
    wide = (1,) * (4 - len(own)) + own
    constant = lowering.graph.constant(name)
    if constant is not None:
        return lowering.pixel_constant(constant.reshape(wide))
    return lowering.pixel_of(name, wide)


@emits_pixel("MaxPool", "AveragePool")
def emit_pixel_pool(lowering: Lowering, node: Node) -> None:
    """Windows over pixels, vectors of channels at a time."""
    lowering.program.need_header("vector.h")
    lowering.program.need_header("pool.h")
    shape, outputs = lowering.graph.shape(node.inputs[0]), lowering.graph.shape(node.outputs[0])
    window = conv_window(node.attrs, node.attrs["kernel_shape"], shape[2:], outputs[2:])
    source = lowering.pixel_of(node.inputs[0])
    writer = lowering.start(node, "vector pool")
    x = writer.pointer(source)
    y = lowering.write(writer, node.outputs[0])
    padded = bool(node.attrs.get("count_include_pad", 0))
    fields = {
        "images": shape[0],
        "rows": outputs[2],
        "columns": outputs[3],
        "in_rows": shape[2],
        "in_columns": shape[3],
        "tap_rows": window.kernel[0],
        "tap_columns": window.kernel[1],
        "stride_rows": window.strides[0],
        "stride_columns": window.strides[1],
        "dilation_rows": window.dilations[0],
        "dilation_columns": window.dilations[1],
        "pad_top": window.before[0],
        "pad_left": window.before[1],
        "vectors": -(-shape[1] // lowering.vector),
        "include_pad": int(padded),
        "divisor_rows": shape[2] + (window.after[0] if padded else 0),
        "divisor_columns": shape[3] + (window.after[1] if padded else 0),
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
    }
    writer.line(f"static const fw_pool shape = {{{initialiser(fields)}}};")
    name = "fw_max_pool" if node.op == "MaxPool" else "fw_average_pool"
    writer.line(f"{name}(&shape, {x.var}, {y.var}, tid, threads);")


def pixel_strides(letter: str, view: View) -> dict[str, int]:
    """Return the fields of a kernel's struct for the strides of a pixel view."""
    n, _, h, w = view.strides
    return {f"{letter}_image": n, f"{letter}_row": h, f"{letter}_column": w}


def initialiser(fields: dict[str, int]) -> str:
    """Return a designated initialiser of C99."""
    return ", ".join(f".{name} = {value}" for name, value in fields.items())


@emits_pixel("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
def emit_pixel_global_pool(lowering: Lowering, node: Node) -> None:
    """The mean or maximum of every channel."""
    if node.op.startswith("Reduce") and lowering.graph.shape(node.inputs[0])[2:] == (1, 1):
        emit_reduce(lowering, node)
        return
    lowering.program.need_header("vector.h")
    lowering.program.need_header("pool.h")
    shape = lowering.graph.shape(node.inputs[0])
    source = lowering.pixel_of(node.inputs[0])
    writer = lowering.start(node, "vector pool")
    x = writer.pointer(source)
    y = lowering.write(writer, node.outputs[0])
    fields = {
        "images": shape[0],
        "in_rows": shape[2],
        "in_columns": shape[3],
        "vectors": -(-shape[1] // lowering.vector),
        **pixel_strides("x", source),
        **pixel_strides("y", y.view),
    }
    writer.line(f"static const fw_pool shape = {{{initialiser(fields)}}};")
    maximum = int("Max" in node.op)
    writer.line(f"fw_global_pool(&shape, {maximum}, {x.var}, {y.var}, tid, threads);")

