"""Operators whose indices are data: gathers, scatters, one-hot, sorting out the largest."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.emit_shape import step_between, take
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import copy, index_of, nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter


def _wrapped(index: str, size: int) -> str:
    """Return an index counted from the end where negative, and kept inside whatever the data say."""
    return f"fw_max(0, fw_min({size - 1}, {index} < 0 ? {index} + {size} : {index}))"


def _around(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Return the elements before, along and after an axis."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


@emits("Gather")
def emit_gather(lowering: Lowering, node: Node) -> None:
    """Pick slices along an axis."""
    shape = lowering.graph.shape(node.inputs[0])
    axis = node.attrs.get("axis", 0) % len(shape)
    indices = lowering.graph.constant(node.inputs[1])
    if indices is not None and indices.ndim <= 1:
        writer, x, y = step_between(lowering, node)
        wide = (*shape[:axis], indices.size, *shape[axis + 1 :])
        strides = list(y.strides)
        if indices.ndim == 0:
            strides.insert(axis, 1)
        tables = [np.arange(size) for size in shape]
        tables[axis] = indices.reshape(-1) % shape[axis]
        if indices.ndim == 0:
            offset = int(tables[axis][0]) * x.strides[axis]
            copy(writer, x, y, wide, target_strides=strides, source_offset=offset)
        else:
            take(writer, x, y, tables)
        return
    for name in node.inputs:
        lowering.plain(name)
    writer = lowering.start(node)
    x, chosen = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    before, size, after = _around(shape, axis)
    count = math.prod(chosen.shape)
    with nested(writer, (before, count), ("i0", "i1")):
        writer.line(f"const long k = (long){chosen.var}[i1];")
        source = f"(i0 * {size} + {_wrapped('k', size)}) * {after}"
        with writer.loop("i2", after):
            writer.line(f"{y.var}[(i0 * {count} + i1) * {after} + i2] = {x.var}[{source} + i2];")


def _coordinates(writer: StepWriter, operand: Operand) -> list[str]:
    return [f"i{axis}" for axis in range(len(operand.shape))]


@emits("GatherElements")
def emit_gather_elements(lowering: Lowering, node: Node) -> None:
    """Pick single elements along an axis."""
    writer = lowering.start(node)
    x, chosen = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    axis = node.attrs.get("axis", 0) % len(x.shape)
    names = _coordinates(writer, y)
    with nested(writer, y.shape, names):
        writer.line(f"const long k = (long){chosen.var}[{index_of(chosen.strides, names)}];")
        own = [name if index != axis else _wrapped("k", x.shape[axis]) for index, name in enumerate(names)]
        writer.line(f"{y.var}[{index_of(y.strides, names)}] = {x.var}[{index_of(x.strides, own)}];")


@emits("GatherND")
def emit_gather_nd(lowering: Lowering, node: Node) -> None:
    """Pick slices by index tuples."""
    for name in node.inputs:
        lowering.plain(name)
    writer = lowering.start(node)
    x, chosen = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    batch = node.attrs.get("batch_dims", 0)
    depth = chosen.shape[-1]
    outer, rows = math.prod(chosen.shape[:batch]), math.prod(chosen.shape[batch:-1])
    size = math.prod(x.shape[batch + depth :])
    with nested(writer, (outer, rows), ("i0", "i1")):
        start = f"{chosen.var} + (i0 * {rows} + i1) * {depth}"
        writer.line(f"const {chosen.ctype.name} *k = {start};")
        _, position = _tuple_index(x, batch, depth)
        writer.line(f"const long p = i0 * {math.prod(x.shape[batch:])} + {position};")
        with writer.loop("i2", size):
            writer.line(f"{y.var}[(i0 * {rows} + i1) * {size} + i2] = {x.var}[p + i2];")


def _tuple_index(x: Operand, batch: int, depth: int) -> tuple[int, str]:
    parts = [
        f"{_wrapped(f'(long)k[{axis}]', x.shape[batch + axis])} * {x.strides[batch + axis]}"
        for axis in range(depth)
    ]
    return depth, " + ".join(parts) or "0"


_REDUCTIONS = {
    "none": "{old} = {new};",
    "add": "{old} += {new};",
    "mul": "{old} *= {new};",
    "max": "if ({new} > {old}) {old} = {new};",
    "min": "if ({new} < {old}) {old} = {new};",
}


@emits("ScatterElements")
def emit_scatter_elements(lowering: Lowering, node: Node) -> None:
    """Copy, then write single elements along an axis; one thread, for writes may meet."""
    writer = lowering.start(node)
    x, chosen, updates = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    axis = node.attrs.get("axis", 0) % len(x.shape)
    names = _coordinates(writer, chosen)
    with writer.single():
        writer.line("const int tid = 0, threads = 1;")
        copy(writer, x, y, x.shape)
        with nested(writer, chosen.shape, names):
            writer.line(f"const long k = (long){chosen.var}[{index_of(chosen.strides, names)}];")
            own = [name if index != axis else "j" for index, name in enumerate(names)]
            writer.line(f"const long j = {_wrapped('k', x.shape[axis])};")
            old = f"{y.var}[{index_of(y.strides, own)}]"
            new = f"{updates.var}[{index_of(updates.strides, names)}]"
            writer.line(_REDUCTIONS[node.attrs.get("reduction", "none")].format(old=old, new=new))


@emits("ScatterND")
def emit_scatter_nd(lowering: Lowering, node: Node) -> None:
    """Copy, then write slices by index tuples; one thread, for writes may meet."""
    for name in node.inputs:
        lowering.plain(name)
    writer = lowering.start(node)
    x, chosen, updates = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    depth = chosen.shape[-1]
    rows, size = math.prod(chosen.shape[:-1]), math.prod(x.shape[depth:])
    with writer.single():
        writer.line("const int tid = 0, threads = 1;")
        copy(writer, x, y, x.shape)
        with writer.parallel("i0", rows):
            writer.line(f"const {chosen.ctype.name} *k = {chosen.var} + i0 * {depth};")
            writer.line(f"const long p = {_tuple_index(x, 0, depth)[1]};")
            with writer.loop("i1", size):
                old, new = f"{y.var}[p + i1]", f"{updates.var}[i0 * {size} + i1]"
                writer.line(_REDUCTIONS[node.attrs.get("reduction", "none")].format(old=old, new=new))


@emits("OneHot")
def emit_one_hot(lowering: Lowering, node: Node) -> None:
    """Off everywhere but at the indices."""
    lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    chosen, values = lowering.read(writer, node.inputs[0]), lowering.read(writer, node.inputs[2])
    y = lowering.write(writer, node.outputs[0])
    axis = node.attrs.get("axis", -1) % len(y.shape)
    before, size, after = _around(y.shape, axis)
    with nested(writer, (before, size, after), ("i0", "i1", "i2")):
        writer.line(f"const long k = (long){chosen.var}[i0 * {after} + i2];")
        test = f"(k < 0 ? k + {size} : k) == i1"
        writer.line(f"{y.var}[(i0 * {size} + i1) * {after} + i2] = {values.var}[{test} ? 1 : 0];")


@emits("ArgMax", "ArgMin")
def emit_arg(lowering: Lowering, node: Node) -> None:
    """The position of the largest or smallest along an axis."""
    lowering.plain(node.inputs[0])
    writer, x, y = step_between(lowering, node)
    before, size, after = _around(x.shape, node.attrs.get("axis", 0) % len(x.shape))
    sign = ">" if node.op == "ArgMax" else "<"
    sign += "=" if node.attrs.get("select_last_index", 0) else ""
    with nested(writer, (before, after), ("i0", "i2")):
        writer.line(f"const {x.ctype.name} *p = {x.var} + i0 * {size * after} + i2;")
        writer.line("long best = 0;")
        with writer.loop("i1", size):
            writer.line(f"if (p[i1 * {after}] {sign} p[best * {after}]) best = i1;")
        writer.line(f"{y.var}[i0 * {after} + i2] = best;")


@emits("TopK")
def emit_top_k(lowering: Lowering, node: Node) -> None:
    """The K largest or smallest along an axis in order, by repeated selection; ties by position."""
    lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    axis = node.attrs.get("axis", -1) % len(x.shape)
    count = int(lowering.value(node, 1, "K").reshape(-1)[0])
    values, indices = (lowering.write(writer, name) if name else None for name in node.outputs)
    before, size, after = _around(x.shape, axis)
    sign = ">" if node.attrs.get("largest", 1) else "<"
    with nested(writer, (before, after), ("i0", "i2")):
        writer.line(f"const {x.ctype.name} *p = {x.var} + i0 * {size * after} + i2;")
        writer.line("long last = -1;")
        with writer.loop("i1", count):
            writer.line("long best = -1;")
            with writer.loop("k", size):
                beyond = f"last >= 0 && (p[k * {after}] {sign} p[last * {after}] || "
                beyond += f"(p[k * {after}] == p[last * {after}] && k <= last))"
                writer.line(f"if ({beyond}) continue;")
                writer.line(f"if (best < 0 || p[k * {after}] {sign} p[best * {after}]) best = k;")
            writer.line("last = best < 0 ? 0 : best;")
            target = f"[(i0 * {count} + i1) * {after} + i2]"
            if values:
                writer.line(f"{values.var}{target} = p[last * {after}];")
            if indices:
                writer.line(f"{indices.var}{target} = last;")


@emits("ReverseSequence")
def emit_reverse_sequence(lowering: Lowering, node: Node) -> None:
    """Turn the first elements of each sequence around."""
    writer = lowering.start(node)
    x, lengths = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    time, batch = node.attrs.get("time_axis", 0), node.attrs.get("batch_axis", 1)
    names = _coordinates(writer, y)
    with nested(writer, y.shape, names):
        writer.line(f"const long n = (long){lengths.var}[i{batch}];")
        own = [
            f"(i{time} < n ? n - 1 - i{time} : i{time})" if axis == time else name
            for axis, name in enumerate(names)
        ]
        writer.line(f"{y.var}[{index_of(y.strides, names)}] = {x.var}[{index_of(x.strides, own)}];")
