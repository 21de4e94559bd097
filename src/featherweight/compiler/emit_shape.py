"""Operators that only move elements: reshapes cost nothing, the rest are strided copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featherweight.compiler.graph import Node
from featherweight.compiler.loops import copy, fill, index_of, memory_order, nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter, row_major


@emits("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout")
def emit_reshape(lowering: Lowering, node: Node) -> None:
    """Another shape for the same memory."""
    if node.op == "Dropout" and (node.output(1) or _is_training(lowering, node)):
        lowering.refuse(node, "it is in training mode or returns its mask; export in evaluation mode")
    view = lowering.plain(node.inputs[0])
    shape = lowering.graph.shape(node.outputs[0])
    lowering.alias(node.outputs[0], view.flat(shape))


def _is_training(lowering: Lowering, node: Node) -> bool:
    mode = lowering.value(node, 2, "training mode")
    return mode is not None and bool(mode)


def step_between(lowering: Lowering, node: Node) -> tuple[StepWriter, Operand, Operand]:
    """Begin a step from the first input to the first output."""
    writer = lowering.start(node)
    return writer, lowering.read(writer, node.inputs[0]), lowering.write(writer, node.outputs[0])


@emits("Transpose")
def emit_transpose(lowering: Lowering, node: Node) -> None:
    """Permute the axes."""
    writer, x, y = step_between(lowering, node)
    order = node.attrs.get("perm") or list(range(len(x.shape)))[::-1]
    copy(writer, x, y, y.shape, source_strides=[x.strides[axis] for axis in order])


@emits("Slice")
def emit_slice(lowering: Lowering, node: Node) -> None:
    """Take every `step`-th element between fixed ends."""
    shape = lowering.graph.shape(node.inputs[0])
    starts, ends = lowering.value(node, 1, "starts"), lowering.value(node, 2, "ends")
    axes, steps = lowering.value(node, 3, "axes"), lowering.value(node, 4, "steps")
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    writer, x, y = step_between(lowering, node)
    offset, strides = 0, list(x.strides)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        first, _, _ = slice(int(start), int(end), int(step)).indices(shape[axis])
        offset += first * x.strides[axis]
        strides[axis] = x.strides[axis] * int(step)
    copy(writer, x, y, y.shape, source_strides=strides, source_offset=offset)


@emits("Split")
def emit_split(lowering: Lowering, node: Node) -> None:
    """Cut along an axis."""
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    axis = node.attrs.get("axis", 0) % len(x.shape)
    offset = 0
    for index, name in enumerate(node.outputs):
        if name:
            y = lowering.write(writer, name)
            copy(writer, x, y, y.shape, source_offset=offset)
            size = y.shape[axis]
        else:
            size = split_size(lowering, node, axis, index)
        offset += size * x.strides[axis]


def split_size(lowering: Lowering, node: Node, axis: int, index: int) -> int:
    """Return how many elements along the axis a part of a `Split` has."""
    sizes = lowering.value(node, 1, "sizes")
    if sizes is not None:
        return int(sizes[index])
    return -(-lowering.graph.shape(node.inputs[0])[axis] // len(node.outputs))


@emits("Concat")
def emit_concat(lowering: Lowering, node: Node) -> None:
    """Join along an axis."""
    writer = lowering.start(node)
    reads = [lowering.read(writer, name) for name in node.inputs]
    y = lowering.write(writer, node.outputs[0])
    axis = node.attrs["axis"] % len(y.shape)
    offset = 0
    for x in reads:
        copy(writer, x, y, x.shape, target_offset=offset)
        offset += x.shape[axis] * y.strides[axis]


@emits("Expand")
def emit_expand(lowering: Lowering, node: Node) -> None:
    """Repeat along the axes of size one."""
    writer, x, y = step_between(lowering, node)
    skipped = len(y.shape) - len(x.shape)
    strides = [0] * skipped + [
        stride if size != 1 else 0 for size, stride in zip(x.shape, x.strides, strict=True)
    ]
    copy(writer, x, y, y.shape, source_strides=strides)


@emits("Tile")
def emit_tile(lowering: Lowering, node: Node) -> None:
    """Repeat whole blocks along each axis."""
    repeats = lowering.value(node, 1, "repeats")
    writer, x, y = step_between(lowering, node)
    shape: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for size, times, source, target in zip(x.shape, repeats, x.strides, y.strides, strict=True):
        shape += [int(times), size]
        sources += [0, source]
        targets += [target * size, target]
    copy(writer, x, y, shape, sources, targets)


def _split_strides(operand: Operand, factors: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Return sizes and strides of an operand whose axes are each seen as several."""
    sizes: list[int] = []
    strides: list[int] = []
    for stride, parts in zip(operand.strides, factors, strict=True):
        sizes += parts
        strides += [stride * inner for inner in row_major(parts)]
    return sizes, strides


@emits("DepthToSpace")
def emit_depth_to_space(lowering: Lowering, node: Node) -> None:
    """Channels to blocks of pixels, in depth-column-row or column-row-depth order."""
    n, c, h, w = lowering.graph.shape(node.inputs[0])
    block = node.attrs["blocksize"]
    depth = c // block**2
    by_block = node.attrs.get("mode", "DCR") == "DCR"
    writer, x, y = step_between(lowering, node)
    split = (block, block, depth) if by_block else (depth, block, block)
    _, sources = _split_strides(x, ((n,), split, (h,), (w,)))
    order = (0, 3, 4, 1, 5, 2) if by_block else (0, 1, 4, 2, 5, 3)
    shape, targets = _split_strides(y, ((n,), (depth,), (h, block), (w, block)))
    copy(writer, x, y, shape, [sources[axis] for axis in order], targets)


@emits("SpaceToDepth")
def emit_space_to_depth(lowering: Lowering, node: Node) -> None:
    """Blocks of pixels to channels, in the same two orders."""
    n, c, h, w = lowering.graph.shape(node.inputs[0])
    block = node.attrs["blocksize"]
    by_block = node.attrs.get("mode", "DCR") == "DCR"
    writer, x, y = step_between(lowering, node)
    shape, sources = _split_strides(x, ((n,), (c,), (h // block, block), (w // block, block)))
    split = (block, block, c) if by_block else (c, block, block)
    _, targets = _split_strides(y, ((n,), split, (h // block,), (w // block,)))
    order = (0, 3, 5, 1, 2, 4) if by_block else (0, 1, 3, 5, 2, 4)
    copy(writer, x, y, [shape[axis] for axis in order], [sources[axis] for axis in order], targets)


def take(
    writer: StepWriter, x: Operand, y: Operand, tables: Sequence[np.ndarray], missing: str = "0"
) -> None:
    """Copy `y[i, j, …] = x[tables[0][i], tables[1][j], …]`; an index of -1 takes the expression `missing`."""
    names = [f"i{axis}" for axis in range(len(y.shape))]
    order = memory_order(y.strides, y.shape)
    same = [
        len(table) == size and (table == np.arange(size)).all()
        for table, size in zip(tables, x.shape, strict=True)
    ]
    parts, tests = [], []
    for axis, (table, stride) in enumerate(zip(tables, x.strides, strict=True)):
        if same[axis]:
            parts.append(f"{names[axis]} * {stride}L")
            continue
        pointer = writer.constant(np.asarray(table, np.int32))
        parts.append(f"{pointer.var}[{names[axis]}] * {stride}L")
        if (table < 0).any():
            tests.append(f"{pointer.var}[{names[axis]}] < 0")
    last = order[-1] if order else -1
    if (
        len(order) > 1
        and same[last]
        and x.strides[last] == y.strides[last] == 1
        and y.shape[last] > 1
        and not tests
    ):
        # Whole runs move, the channels of a pixel say.
        places = [(parts[axis], y.strides[axis], names[axis]) for axis in order[:-1]]
        with nested(writer, [y.shape[axis] for axis in order[:-1]], [names[axis] for axis in order[:-1]]):
            source = " + ".join(part for part, _, _ in places) or "0"
            target = index_of([stride for _, stride, _ in places], [name for _, _, name in places])
            size = y.shape[last] * x.view.dtype.itemsize
            writer.line(f"memcpy({y.var} + {target}, {x.var} + {source}, {size});")
        return
    with nested(writer, [y.shape[axis] for axis in order], [names[axis] for axis in order]):
        value = f"{x.var}[{' + '.join(parts) or '0'}]"
        value = f"{' || '.join(tests)} ? {missing} : {value}" if tests else value
        writer.line(f"{y.var}[{index_of(y.strides, names)}] = {value};")


@emits("Pad")
def emit_pad(lowering: Lowering, node: Node) -> None:
    """Add or cut a border: constant, edge, reflect or wrap."""
    shape = lowering.graph.shape(node.inputs[0])
    pads, axes = lowering.value(node, 1, "pads"), lowering.value(node, 3, "axes")
    axes = list(range(len(shape))) if axes is None else [int(axis) % len(shape) for axis in axes]
    before, after = [0] * len(shape), [0] * len(shape)
    for index, axis in enumerate(axes):
        before[axis], after[axis] = int(pads[index]), int(pads[index + len(axes)])
    mode = node.attrs.get("mode", "constant")
    tables = [
        pad_table(size, first, last, mode) for size, first, last in zip(shape, before, after, strict=True)
    ]
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    missing = f"{lowering.read(writer, node.inputs[2]).var}[0]" if node.input(2) else "0"
    y = lowering.write(writer, node.outputs[0])
    if min(*before, *after) < 0 or mode != "constant":
        take(writer, x, y, tables, missing)
        return
    _pad_constant(writer, x, y, before, missing)


def _pad_constant(writer: StepWriter, x: Operand, y: Operand, before: Sequence[int], missing: str) -> None:
    """Fill, then copy the inside; one thread, for the two overlap."""
    offset = sum(count * stride for count, stride in zip(before, y.strides, strict=True))
    with writer.single():
        writer.line("const int tid = 0, threads = 1;")
        fill(writer, y, missing)
        copy(writer, x, y, x.shape, target_offset=offset)


def pad_table(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """Return for each position of the padded axis the input's position, -1 for the constant.

    >>> pad_table(3, 2, 1, "reflect").tolist()
    [2, 1, 0, 1, 2, 1]
    """
    positions = np.arange(-before, size + after)
    if mode == "constant":
        return np.where((positions < 0) | (positions >= size), -1, positions)
    if mode == "edge":
        return positions.clip(0, size - 1)
    if mode == "wrap" or size == 1:
        return positions % size
    folded = positions % (2 * (size - 1))
    return np.where(folded < size, folded, 2 * (size - 1) - folded)


@emits("ConstantOfShape")
def emit_constant_of_shape(lowering: Lowering, node: Node) -> None:
    """A tensor of one value."""
    value = node.attrs.get("value")
    writer = lowering.start(node)
    y = lowering.write(writer, node.outputs[0])
    fill(writer, y, y.ctype.literal(0 if value is None else value.reshape(-1)[0]))


@emits("EyeLike")
def emit_eye_like(lowering: Lowering, node: Node) -> None:
    """Ones on a diagonal."""
    writer = lowering.start(node)
    y = lowering.write(writer, node.outputs[0])
    with nested(writer, y.shape, ("i0", "i1")):
        writer.line(f"{y.var}[i0 * {y.shape[1]} + i1] = i1 == i0 + {node.attrs.get('k', 0)};")


@emits("Trilu")
def emit_trilu(lowering: Lowering, node: Node) -> None:
    """Keep the upper or the lower triangle of the last two axes."""
    diagonal = lowering.value(node, 1, "diagonal")
    k = 0 if diagonal is None else int(diagonal)
    lowering.plain(node.inputs[0])
    writer, x, y = step_between(lowering, node)
    test = f"i1 + {k} <= i2" if node.attrs.get("upper", 1) else f"i2 <= i1 + {k}"
    *batch, rows, columns = x.shape
    count = int(np.prod(batch, dtype=np.int64))
    with nested(writer, (count, rows, columns), ("i0", "i1", "i2")):
        index = f"(i0 * {rows} + i1) * {columns} + i2"
        writer.line(f"{y.var}[{index}] = {test} ? {x.var}[{index}] : 0;")
