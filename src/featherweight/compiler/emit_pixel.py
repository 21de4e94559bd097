"""Element-wise groups on vectors, and pools, in the pixel layout."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.compiler.conv_parts import initialiser
from featherweight.compiler.convert import NO_BORDER
from featherweight.compiler.emit_elementwise import share_memory
from featherweight.compiler.emit_reduce import emit_reduce
from featherweight.compiler.emit_shape import split_size
from featherweight.compiler.emit_vector import Read, emit_vector_loop
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import copy
from featherweight.compiler.lower import Lowering, emits_pixel
from featherweight.compiler.program import Operand, View
from featherweight.compiler.vector_expressions import is_vector
from featherweight.compiler.windows import conv_window

PIXEL_AXES = (0, 2, 3, 1)
"""The axes of (N, C, H, W) from the outermost in memory."""


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
    n, _c, h, w = shape
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


@emits_pixel("Split")
def emit_pixel_split(lowering: Lowering, node: Node) -> None:
    """Runs of channels cost nothing: their readers step over the others."""
    if node.attrs.get("axis", 0) % 4 != 1:
        lowering.emit_plainly(node)
        return
    whole = lowering.pixel_of(node.inputs[0])
    channel = 0
    for index, name in enumerate(node.outputs):
        if name:
            lowering.channels_of(name, whole, channel, NO_BORDER)
        channel += split_size(lowering, node, 1, index)


@emits_pixel("Slice")
def emit_pixel_slice(lowering: Lowering, node: Node) -> None:
    """A run of channels costs nothing; other slices are copied."""
    starts, axes, steps = (lowering.value(node, index, "bounds") for index in (1, 3, 4))
    if axes is None or len(axes) != 1 or int(axes[0]) % 4 != 1 or (steps is not None and int(steps[0]) != 1):
        lowering.emit_plainly(node)
        return
    whole = lowering.pixel_of(node.inputs[0])
    first, _, _ = slice(int(starts[0]), None).indices(whole.shape[1])
    lowering.channels_of(node.outputs[0], whole, first, NO_BORDER)


@emits_pixel("Concat")
def emit_pixel_concat(lowering: Lowering, node: Node) -> None:
    """Parts that were computed in place cost nothing; the others are copied to their channels."""
    parts = [
        name
        for name in node.inputs
        if name not in lowering.homes or lowering.homes[name][0] != node.outputs[0]
    ]
    if node.attrs["axis"] % 4 != 1:
        lowering.emit_plainly(node)
        return
    if not parts:
        return
    writer = lowering.start(node)
    y = lowering.write(writer, node.outputs[0])
    channel = 0
    for name in node.inputs:
        if name in parts:
            x = lowering.read(writer, name)
            copy(writer, x, y, x.shape, target_offset=channel * y.strides[1])
        channel += lowering.graph.shape(name)[1]
