"""What stands between sparse layers, plane by plane: other convolutions, vector loops and the pool."""

from __future__ import annotations

import math

from featherweight.compiler.conv_parts import Epilogue, headers, initialiser
from featherweight.compiler.convert import has_planes
from featherweight.compiler.emit_elementwise import share_memory
from featherweight.compiler.emit_sparse import (
    bias_values,
    define_depthwise,
    part_table,
    planar_fields,
    planar_window,
)
from featherweight.compiler.emit_vector import Read, emit_vector_loop
from featherweight.compiler.graph import Node
from featherweight.compiler.lower import Lowering, emits_planar
from featherweight.compiler.pack_sparse import sparse_weights
from featherweight.compiler.program import Operand, View
from featherweight.compiler.tiles import registers


def emit_planar_depthwise(lowering: Lowering, node: Node) -> None:
    """A depthwise convolution whose vectors run over the pixels of a row."""
    graph = lowering.graph
    window = planar_window(lowering, node)
    source = lowering.planar_of(node.inputs[0])
    n, channels, _, _ = source.shape
    epilogue = Epilogue(lowering, node, planar=True)
    headers(lowering, "conv.h", "planar.h")
    writer = lowering.start(node, macs=n * channels * window.taps * math.prod(window.outputs))
    epilogue.define(channels)
    x = writer.pointer(source)
    w = writer.constant(graph.constants[node.inputs[1]].reshape(-1))
    bias = writer.constant(bias_values(lowering, node, channels))
    aux = epilogue.aux(writer, channels, 1)
    y = lowering.write(writer, node.outputs[0])
    function = define_depthwise(lowering, window, epilogue)
    fields = planar_fields(window, n, channels, source.strides[1], y.strides[1])
    writer.step.kernel = f"planar depthwise {window.kernel[0]}x{window.kernel[1]}"
    writer.line(f"static const fw_planar shape = {{{initialiser(fields)}}};")
    writer.line(f"{function}(&shape, {x.var}, {w.var}, {bias.var}, {aux}, {y.var}, tid, threads);")


def emit_planar_dense(lowering: Lowering, node: Node) -> None:
    """A dense convolution of few channels, which enters the region: its windows are gathered row by row."""
    graph = lowering.graph
    window = planar_window(lowering, node)
    source = lowering.view(node.inputs[0])
    source = source if has_planes(source) else lowering.plain(node.inputs[0])
    n, channels, _, _ = source.shape
    weight = graph.constants[node.inputs[1]]
    vl, rows, columns = lowering.vector, *window.outputs
    epilogue = Epilogue(lowering, node, planar=True)
    headers(lowering, "conv.h", "planar.h", "sparse.h", "sparse_region.h")
    writer = lowering.start(node, macs=n * weight.size * rows * columns)
    writer.step.kernel = f"planar convolution {window.kernel[0]}x{window.kernel[1]}"
    epilogue.define(len(weight))
    x = writer.pointer(source)
    aux = epilogue.aux(writer, len(weight), 1)
    y = lowering.write(writer, node.outputs[0])
    chunk = _chunk_rows(rows, columns, vl)
    vectors = -(-chunk * columns // vl)
    pitch = (vectors + 1) * vl
    taps = channels * window.taps
    scratch = writer.scratch("float32", (taps * pitch + vl) * lowering.threads)
    most = 6 if registers(vl) == 32 else 2
    # Stripes of equal width, or as wide as the registers allow.
    even = max(size for size in range(1, most + 1) if vectors % size == 0)
    wide = even if even * 2 > most else min(most, vectors)
    planar = planar_fields(window, n, channels, source.strides[1], y.strides[1])
    product = {
        "images": n,
        "vectors": vectors,
        "groups": 1,
        "x_image": pitch,
        "y_image": y.strides[0],
        "y_plane": y.strides[1],
    }
    flat = weight.reshape(len(weight), -1)
    packed = sparse_weights(flat, graph.constant(node.input(2)), pitch, rows=4, keep_zeros=True)
    writer.line(f"static const fw_planar shape = {{{initialiser(planar)}}};")
    for index, height in enumerate(sorted({part.rows_per_block for part in packed}, reverse=True)):
        own = [part for part in packed if part.rows_per_block == height]
        part_table(writer, own, f"parts{index}")
        function = lowering.program.define_named(
            "fw_planar_conv",
            f"FW_DEFINE_PLANAR_CONV({{name}}, {window.kernel[0]}, {window.kernel[1]}, {window.strides[0]}, "
            f"{wide}, {height}, {epilogue.name})",
        )
        writer.line(
            f"static const fw_sparse product{index} = {{{initialiser({**product, 'parts': len(own)})}}};"
        )
        pointers = f"{x.var}, {aux}, {y.var}, {scratch.var}"
        tables = f"&shape, &product{index}, parts{index}"
        writer.line(f"{function}({tables}, {chunk}, {channels}, {pointers}, tid, threads);")


def _chunk_rows(rows: int, columns: int, vector: int) -> int:
    """Return the least rows that are whole vectors, all of them where none are."""
    chunk = vector // math.gcd(columns, vector)
    return chunk if chunk < rows else rows


@emits_planar("Group")
def emit_planar_group(lowering: Lowering, node: Node) -> None:
    """One pass over whole planes, what lies behind their last pixel included."""
    graph = lowering.graph
    n, channels, height, width = graph.shape(node.outputs[0])
    wide = (n, channels, height, width)
    views = {name: _image(lowering, name) for name in node.inputs if graph.types[name].size > 1}
    writer = lowering.start(node, "vector loop")
    writer.step.op = "+".join(inner.op for inner in node.attrs["body"])
    reads = {}
    for name in node.inputs:
        operand = writer.pointer(views.get(name) or lowering.view(name), restrict=False)
        strides = _plane_strides(operand.view, wide) if name in views else (0, 0, 0)
        reads[name] = Read(operand, strides)
    y = lowering.write(writer, node.outputs[0], restrict=False)
    plane = y.strides[1]
    target: Operand = y.reshaped((n, channels, plane), (y.strides[0], plane, 1))
    share_memory(writer, lowering, target, [read for name, read in reads.items() if name in views])
    emit_vector_loop(lowering, writer, node, reads, target, (n, channels, plane))


def _image(lowering: Lowering, name: str) -> View:
    """Return a tensor of rank 4: whole planes where it has pixels, else as it lies."""
    shape = lowering.graph.shape(name)
    if math.prod(shape[2:]) == 1:
        return lowering.plain(name) if lowering.graph.constant(name) is None else lowering.view(name)
    return lowering.planar_of(name)


def _plane_strides(view: View, wide: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Return the strides of image, channel and pixel of a tensor that is broadcast to `wide`."""
    n, channels, height, width = view.shape
    return (
        view.strides[0] if n == wide[0] > 1 else 0,
        view.strides[1] if channels == wide[1] > 1 else 0,
        1 if height * width > 1 else 0,
    )


@emits_planar("GlobalAveragePool", "ReduceMean")
def emit_planar_pool(lowering: Lowering, node: Node) -> None:
    """The mean of every plane."""
    source = lowering.planar_of(node.inputs[0])
    n, channels, height, width = source.shape
    headers(lowering, "conv.h", "planar.h", "sparse.h", "sparse_region.h")
    writer = lowering.start(node, "planar pool")
    x = writer.pointer(source)
    y = lowering.write(writer, node.outputs[0])
    call = f"{n * channels}, {height * width}, {source.strides[1]}, {x.var}, {y.var}"
    writer.line(f"fw_planar_mean({call}, tid, threads);")
