"""Resize and GridSample in the row-major layout."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.emit_shape import take
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of, memory_order, nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter
from featherweight.compiler.resize import nearest, source_positions, taps


def resize_scales(lowering: Lowering, node: Node) -> tuple[list[float], list[tuple[float, float]]]:
    """Return scale and region of every axis."""
    graph = lowering.graph
    inputs, outputs = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    rank = len(inputs)
    axes = [axis % rank for axis in node.attrs.get("axes") or range(rank)]
    scales, sizes = lowering.value(node, 2, "scales"), lowering.value(node, 3, "sizes")
    region = lowering.value(node, 1, "roi")
    found = [1.0] * rank
    windows = [(0.0, 1.0)] * rank
    for index, axis in enumerate(axes):
        found[axis] = outputs[axis] / max(inputs[axis], 1)
        if scales is not None and scales.size:
            found[axis] = float(scales[index])
        elif sizes is not None and node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            ratios = [int(size) / inputs[other] for other, size in zip(axes, sizes, strict=True)]
            policy = node.attrs["keep_aspect_ratio_policy"]
            found[axis] = min(ratios) if policy == "not_larger" else max(ratios)
        if region is not None and region.size:
            windows[axis] = (float(region[index]), float(region[index + len(axes)]))
    return found, windows


@emits("Resize")
def emit_resize(lowering: Lowering, node: Node) -> None:
    """Nearest by an index table an axis; linear and cubic by weights, all axes in one pass."""
    shape, outputs = lowering.graph.shape(node.inputs[0]), lowering.graph.shape(node.outputs[0])
    scales, windows = resize_scales(lowering, node)
    mode = node.attrs.get("mode", "nearest")
    coordinates = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    positions = [
        source_positions(size, output, scale, coordinates, window)
        for size, output, scale, window in zip(shape, outputs, scales, windows, strict=True)
    ]
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    outside = [np.zeros(output, bool) for output in outputs]
    if coordinates == "tf_crop_and_resize":
        outside = [(p < 0) | (p > size - 1) for p, size in zip(positions, shape, strict=True)]
    missing = y.ctype.literal(node.attrs.get("extrapolation_value", 0.0))
    if mode == "nearest":
        rounding = node.attrs.get("nearest_mode", "round_prefer_floor")
        tables = [nearest(p, size, rounding) for p, size in zip(positions, shape, strict=True)]
        tables = [np.where(out, -1, table) for table, out in zip(tables, outside, strict=True)]
        take(writer, x, y, tables, missing)
        return
    weighted = [
        taps(p, size, scale, {**node.attrs, "mode": mode}) if size != output or scale != 1 else None
        for p, size, output, scale in zip(positions, shape, outputs, scales, strict=True)
    ]
    _weighted(writer, x, y, weighted, outside, missing)


def _weighted(
    writer: StepWriter,
    x: Operand,
    y: Operand,
    tables: list[tuple[np.ndarray, np.ndarray] | None],
    outside: list[np.ndarray],
    missing: str,
) -> None:
    """Sum the taps of all resized axes; the others are copied through."""
    names = [f"i{axis}" for axis in range(len(y.shape))]
    pointers = {
        axis: (writer.constant(table[0].astype(np.int32)), writer.constant(table[1].astype(np.float32)))
        for axis, table in enumerate(tables)
        if table is not None
    }
    marks = {axis: writer.constant(mask.astype(np.uint8)) for axis, mask in enumerate(outside) if mask.any()}
    order = memory_order(y.strides, y.shape)
    with nested(writer, [y.shape[axis] for axis in order], [names[axis] for axis in order]):
        target = f"{y.var}[{index_of(y.strides, names)}]"
        if marks:
            test = " || ".join(f"{pointer.var}[{names[axis]}]" for axis, pointer in marks.items())
            writer.line(f"if ({test}) {{ {target} = {missing}; continue; }}")
        writer.line("float sum = 0;")
        parts = [
            f"{name} * {stride}"
            for axis, (name, stride) in enumerate(zip(names, x.strides, strict=True))
            if axis not in pointers
        ]
        counts = [tables[axis][0].shape[1] for axis in pointers]
        loops = [f"k{axis}" for axis in pointers]
        with nested(writer, counts, loops, parallel=False):
            weights = []
            for axis, (indices, shares) in pointers.items():
                place = f"[{names[axis]} * {tables[axis][0].shape[1]} + k{axis}]"
                parts.append(f"(long){indices.var}{place} * {x.strides[axis]}")
                weights.append(f"{shares.var}{place}")
            factor = " * ".join(weights) or "1"
            writer.line(f"sum += {factor} * (float){x.var}[{' + '.join(parts)}];")
        writer.line(f"{target} = ({y.ctype.name})sum;")


_UNNORMALISE = {0: "(({g} + 1) * {size} - 1) / 2", 1: "({g} + 1) / 2 * ({size} - 1)"}


@emits("GridSample")
def emit_grid_sample(lowering: Lowering, node: Node) -> None:
    """Sample an image or a volume at positions that are data."""
    for name in node.inputs:
        lowering.plain(name)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(
        node.attrs.get("mode", "linear"), node.attrs.get("mode", "linear")
    )
    padding, corners = node.attrs.get("padding_mode", "zeros"), node.attrs.get("align_corners", 0)
    lowering.program.need_header("gridsample.h")
    writer = lowering.start(node)
    x, grid = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    rank = len(x.shape) - 2
    sizes, area = x.shape[2:], math.prod(y.shape[2:])
    batch, channels = x.shape[:2]
    reach = {"nearest": 1, "linear": 2, "cubic": 4}[mode]
    code = {"zeros": 0, "border": 1, "reflection": 2}[padding]
    with nested(writer, (batch, area), ("n", "q")):
        writer.line(f"const {grid.ctype.name} *g = {grid.var} + (n * {area} + q) * {rank};")
        for axis, size in enumerate(sizes):
            # The grid's last coordinate is the first in memory: x, then y, then z.
            text = _UNNORMALISE[int(bool(corners))].format(g=f"(double)g[{rank - 1 - axis}]", size=size)
            writer.line(f"double w{axis}[{reach}];")
            writer.line(f"long p{axis}[{reach}];")
            call = f"fw_grid_{mode}({text}, {size}, {code}, {corners}, p{axis}, w{axis});"
            writer.line(call)
        with writer.loop("c", channels):
            writer.line(f"const {x.ctype.name} *in = {x.var} + (n * {channels} + c) * {math.prod(sizes)};")
            writer.line("double sum = 0;")
            with nested(writer, [reach] * rank, [f"k{axis}" for axis in range(rank)], parallel=False):
                test = " && ".join(f"p{axis}[k{axis}] >= 0" for axis in range(rank))
                weight = " * ".join(f"w{axis}[k{axis}]" for axis in range(rank))
                place = index_of(x.strides[2:], [f"p{axis}[k{axis}]" for axis in range(rank)])
                writer.line(f"if ({test}) sum += {weight} * in[{place}];")
            writer.line(f"{y.var}[(n * {channels} + c) * {area} + q] = ({y.ctype.name})sum;")
