"""Pools in the row-major layout."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.emit_conv import tap_loops, unravel
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import StepWriter, row_major
from featherweight.compiler.windows import Window, conv_window


def _begin(lowering: Lowering, node: Node) -> tuple[StepWriter, Window, int]:
    lowering.plain(node.inputs[0])
    shape = lowering.graph.shape(node.inputs[0])
    window = conv_window(
        node.attrs, node.attrs["kernel_shape"], shape[2:], lowering.graph.shape(node.outputs[0])[2:]
    )
    return lowering.start(node), window, shape[0] * shape[1]


def _place(window: Window) -> str:
    return index_of(row_major(window.inputs), [f"p{axis}" for axis in range(len(window.kernel))])


@emits("MaxPool")
def emit_max_pool(lowering: Lowering, node: Node) -> None:
    """The largest element of each window, and where it lies."""
    writer, window, planes = _begin(lowering, node)
    x = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    indices = lowering.write(writer, node.outputs[1]) if node.output(1) else None
    area, inside = math.prod(window.outputs), math.prod(window.inputs)
    rank = len(window.kernel)
    with writer.parallel("f", planes):
        writer.line(f"const {x.ctype.name} *in = {x.var} + f * {inside};")
        with writer.loop("r", area):
            unravel(writer, "r", window.outputs, "o")
            writer.line(f"{x.ctype.name} best = {x.ctype.lowest};")
            writer.line("long where = -1;")
            with tap_loops(writer, window, rank, "o", window.inputs):
                writer.line(f"const long place = {_place(window)};")
                writer.line("if (where < 0 || in[place] > best) { best = in[place]; where = place; }")
            writer.line(f"{y.var}[f * {area} + r] = best;")
            if indices:
                writer.line(f"{indices.var}[f * {area} + r] = f * {inside} + {_index(node, window)};")


def _index(node: Node, window: Window) -> str:
    """Return the flat index of `where`, rows or columns first as the node asks."""
    if not node.attrs.get("storage_order", 0) or len(window.kernel) == 1:
        return "where"
    # Column-major over the last two axes.
    height, width = window.inputs[-2:]
    plane = height * width
    return f"(where / {plane} * {plane} + where % {width} * {height} + where % {plane} / {width})"


@emits("AveragePool")
def emit_average_pool(lowering: Lowering, node: Node) -> None:
    """The mean of each window; padding counts only where the node says so."""
    writer, window, planes = _begin(lowering, node)
    x = lowering.read(writer, node.inputs[0])
    counts = _counts(window, bool(node.attrs.get("count_include_pad", 0)))
    kind = x.ctype
    share = writer.constant((1.0 / np.maximum(counts, 1)).astype(kind.dtype))
    y = lowering.write(writer, node.outputs[0])
    area, rank = math.prod(window.outputs), len(window.kernel)
    with writer.parallel("f", planes):
        writer.line(f"const {kind.name} *in = {x.var} + f * {math.prod(window.inputs)};")
        with writer.loop("r", area):
            unravel(writer, "r", window.outputs, "o")
            writer.line(f"{kind.name} sum = 0;")
            with tap_loops(writer, window, rank, "o", window.inputs):
                writer.line(f"sum += in[{_place(window)}];")
            writer.line(f"{y.var}[f * {area} + r] = sum * {share.var}[r];")


def _counts(window: Window, padded: bool) -> np.ndarray:
    """Return how many elements each output position averages over, flat."""
    total = np.ones((1,), np.int64)
    for axis in range(len(window.kernel)):
        starts = np.arange(window.outputs[axis]) * window.strides[axis] - window.before[axis]
        taps = starts[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis]
        low, high = 0, window.inputs[axis]
        if padded:
            # Rounding the output up may reach beyond the padding; that part never counts.
            low, high = -window.before[axis], window.inputs[axis] + window.after[axis]
        own = ((taps >= low) & (taps < high)).sum(axis=1)
        total = (total[:, None] * own[None, :]).reshape(-1)
    return total


@emits("LpPool")
def emit_lp_pool(lowering: Lowering, node: Node) -> None:
    """The p-norm of each window."""
    writer, window, planes = _begin(lowering, node)
    x = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    kind, power = x.ctype, x.ctype.literal(node.attrs.get("p", 2))
    area, rank = math.prod(window.outputs), len(window.kernel)
    absolute, raise_to = kind.function("fabs"), kind.function("pow")
    with writer.parallel("f", planes):
        writer.line(f"const {kind.name} *in = {x.var} + f * {math.prod(window.inputs)};")
        with writer.loop("r", area):
            unravel(writer, "r", window.outputs, "o")
            writer.line(f"{kind.name} sum = 0;")
            with tap_loops(writer, window, rank, "o", window.inputs):
                writer.line(f"sum += {raise_to}({absolute}(in[{_place(window)}]), {power});")
            writer.line(f"{y.var}[f * {area} + r] = {raise_to}(sum, {kind.literal(1)} / {power});")


@emits("MaxUnpool")
def emit_max_unpool(lowering: Lowering, node: Node) -> None:
    """Put each value back where the pool found it, zeros elsewhere; one thread."""
    for name in node.inputs[:2]:
        lowering.plain(name)
    writer = lowering.start(node)
    x, where = (lowering.read(writer, name) for name in node.inputs[:2])
    y = lowering.write(writer, node.outputs[0])
    shape = lowering.graph.shape(node.inputs[0])
    attrs = {**node.attrs, "kernel_shape": node.attrs["kernel_shape"]}
    rank = len(shape) - 2
    strides, pads = attrs.get("strides") or [1] * rank, attrs.get("pads") or [0] * 2 * rank
    # The indices count elements of the tensor that was pooled, which may be smaller than the output.
    inferred = [
        (shape[2 + axis] - 1) * strides[axis] + attrs["kernel_shape"][axis] - pads[axis] - pads[rank + axis]
        for axis in range(rank)
    ]
    source = (*shape[:2], *inferred)
    with writer.single():
        writer.line(f"for (long i = 0; i < {math.prod(y.shape)}; i++) {y.var}[i] = 0;")
        with writer.loop("i", math.prod(shape)):
            writer.line(f"const long k = (long){where.var}[i];")
            place = " + ".join(
                f"k / {step} % {size} * {target}"
                for step, size, target in zip(row_major(source), source, y.strides, strict=True)
            )
            writer.line(f"const long place = {place};")
            writer.line(f"if (k >= 0 && place < {math.prod(y.shape)}) {y.var}[place] = {x.var}[i];")
