"""Products of two computed matrices: the right one is packed, then the convolution kernel runs on it."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.conv_parts import define_conv, initialiser
from featherweight.compiler.emit_matmul import emit_matmul, matrix_shapes
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import StepWriter, View, broadcast, row_major
from featherweight.compiler.tiles import Tile, rank_tiles

MIN_ROWS, MIN_WORK = 4, 4096
"""Smaller products do not earn back the packing."""


@emits("MatMul")
def emit_matmul_packed(lowering: Lowering, node: Node) -> None:
    """Pack the right matrices, then multiply each left matrix by its own."""
    graph = lowering.graph
    left, right, batch = matrix_shapes(*(graph.shape(name) for name in node.inputs))
    rows, depth, columns = left[-2], left[-1], right[-1]
    work = math.prod(batch) * rows * depth * columns
    if graph.dtype(node.inputs[0]) != np.float32 or rows < MIN_ROWS or columns < 2 or work < MIN_WORK:
        emit_matmul(lowering, node)
        return
    for name in ("vector.h", "conv.h", "product.h"):
        lowering.program.need_header(name)
    sources = [lowering.plain(name) for name in node.inputs]
    tile = rank_tiles(rows, -(-columns // lowering.vector), lowering.vector)[0]
    packed = _emit_packing(lowering, node, sources[1], right, tile)
    writer = lowering.start(node, f"product, tile {tile.rows}x{tile.vectors}", work)
    a, b = writer.pointer(sources[0]), writer.pointer(packed)
    vectors = -(-columns // lowering.vector)
    bias = writer.constant(np.zeros(vectors * lowering.vector, np.float32))
    y = lowering.write(writer, node.outputs[0])
    function = define_conv(lowering.program, tile)
    groups = -(-vectors // tile.vectors)
    fields = {
        "images": 1,
        "rows": 1,
        "columns": rows,
        "tap_rows": 1,
        "tap_columns": 1,
        "depth": depth,
        "vectors": vectors,
        "lanes": (columns - 1) % lowering.vector + 1,
        "block_rows": 1,
        "block_columns": rows,
        "block_groups": 1 if math.prod(batch) == 1 else groups,
        "x_column": depth,
        "y_column": columns,
    }
    writer.line(f"static const fw_conv shape = {{{initialiser(fields)}, .first = NULL}};")
    a_steps = broadcast(a.reshaped(left[:-2], row_major(left)[:-2]), batch)
    b_strides = tuple(stride * packed.strides[0] for stride in row_major(right[:-2]))
    b_steps = broadcast(b.reshaped(right[:-2], b_strides), batch)
    names = [f"n{axis}" for axis in range(len(batch))]
    call = (
        f"{function}(&shape, {a.var} + {index_of(a_steps, names)}, {b.var} + {index_of(b_steps, names)}, "
        f"{bias.var}, NULL, NULL, {y.var} + {index_of(row_major((*batch, rows * columns))[:-1], names)}, "
    )
    _call_for_each(writer, batch, names, call)


def _call_for_each(writer: StepWriter, batch: tuple[int, ...], names: list[str], call: str) -> None:
    """Share the products among the threads, or each product where there is only one."""
    count = math.prod(batch)
    if count == 1:
        for name in names:
            writer.line(f"const long {name} = 0;")
        writer.line(f"{call}tid, threads);")
        return
    with writer.parallel("q", count):
        for axis, (size, stride) in enumerate(zip(batch, row_major(batch), strict=True)):
            writer.line(f"const long n{axis} = q / {stride} % {size};")
        writer.line(f"{call}0, 1);")


def _emit_packing(lowering: Lowering, node: Node, source: View, right: tuple[int, ...], tile: Tile) -> View:
    """Emit the step that packs all right matrices; return them as (matrices, floats)."""
    depth, columns = right[-2:]
    count = math.prod(right[:-2])
    vectors = -(-columns // lowering.vector)
    size, groups = depth * vectors * lowering.vector, -(-vectors // tile.vectors)
    storage = lowering.program.allocate(count * size * 4)
    packed = View(storage, np.dtype(np.float32), (count, size), (size, 1))
    writer = lowering.start(Node("Pack", node.name, [], []), "layout")
    b, to = writer.pointer(source), writer.pointer(packed, writes=True)
    with writer.parallel("q", count * groups):
        writer.line(f"const long matrix = q / {groups}, group = q % {groups};")
        writer.line(
            f"fw_pack_columns({b.var} + matrix * {depth * columns}, {columns}, 1, {depth}, {columns}, "
            f"{tile.vectors}, {to.var} + matrix * {size}, (int)group, (int)group + 1);"
        )
    return packed
