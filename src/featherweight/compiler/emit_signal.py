"""Discrete Fourier transforms, sampling grids and column-to-image in the row-major layout."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.graph import Node
from featherweight.compiler.loops import nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import row_major


@emits("DFT")
def emit_dft(lowering: Lowering, node: Node) -> None:
    """Sums of the axis' elements times the roots of unity, which are a table."""
    shape = lowering.graph.shape(node.inputs[0])
    if lowering.graph.opset >= 20:
        given = lowering.value(node, 2, "axis")
        axis = -2 if given is None else int(given.reshape(-1)[0])
    else:
        axis = node.attrs.get("axis", 1)
    axis %= len(shape)
    inverse, onesided = node.attrs.get("inverse", 0), node.attrs.get("onesided", 0)
    if onesided and inverse:
        lowering.refuse(node, "it is inverse and one-sided")
    given = lowering.value(node, 1, "length")
    length = shape[axis] if given is None else int(given.reshape(-1)[0])
    lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    kind = x.ctype
    turns = 2 * np.pi * np.arange(length) / max(length, 1)
    wave = np.stack([np.cos(turns), np.sin(turns) * (1 if inverse else -1)], axis=1)
    table = writer.constant((wave / (length if inverse else 1)).astype(kind.dtype))
    outputs, parts = y.shape[axis], shape[-1]
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 : -1])
    with nested(writer, (before, outputs, after), ("b", "k", "a")):
        writer.line(f"{kind.name} real = 0, imaginary = 0;")
        with writer.loop("j", min(shape[axis], length)):
            writer.line(f"const {kind.name} *w = {table.var} + (size_t)k * j % {length} * 2;")
            writer.line(
                f"const {kind.name} *v = {x.var} + ((b * {shape[axis]} + j) * {after} + a) * {parts};"
            )
            if parts == 2:
                writer.line("real += v[0] * w[0] - v[1] * w[1];")
                writer.line("imaginary += v[0] * w[1] + v[1] * w[0];")
            else:
                writer.line("real += v[0] * w[0];")
                writer.line("imaginary += v[0] * w[1];")
        place = f"((b * {outputs} + k) * {after} + a) * {y.shape[-1]}"
        writer.line(f"{y.var}[{place}] = real;")
        if y.shape[-1] == 2:
            writer.line(f"{y.var}[{place} + 1] = imaginary;")
        else:
            writer.line("(void)imaginary;")


@emits("AffineGrid")
def emit_affine_grid(lowering: Lowering, node: Node) -> None:
    """Positions of a regular grid after an affine map, for GridSample."""
    size = [int(value) for value in lowering.value(node, 1, "size")]
    corners = node.attrs.get("align_corners", 0)
    lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    theta = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    spatial = size[2:]
    rank = len(spatial)
    axes = [
        np.linspace(-1, 1, count) if corners else (2 * np.arange(count) + 1) / count - 1 for count in spatial
    ]
    tables = [writer.constant(values.astype(theta.view.dtype)) for values in axes]
    names = ["n", *(f"i{axis}" for axis in range(rank))]
    places = row_major((size[0], *spatial))
    with nested(writer, (size[0], *spatial), names):
        target = " + ".join(f"{name} * {stride * rank}" for name, stride in zip(names, places, strict=True))
        for row in range(rank):
            # theta's columns are x, y, z; the grid's axes are z, y, x.
            terms = [
                f"{theta.var}[n * {rank * (rank + 1)} + {row * (rank + 1) + column}] * "
                f"{tables[rank - 1 - column].var}[i{rank - 1 - column}]"
                for column in range(rank)
            ]
            terms.append(f"{theta.var}[n * {rank * (rank + 1)} + {row * (rank + 1) + rank}]")
            writer.line(f"{y.var}[{target} + {row}] = {' + '.join(terms)};")


@emits("Col2Im")
def emit_col2im(lowering: Lowering, node: Node) -> None:
    """Add the columns of windows back to an image."""
    image = [int(value) for value in lowering.value(node, 1, "image shape")]
    block = [int(value) for value in lowering.value(node, 2, "block shape")]
    rank = len(image)
    strides = node.attrs.get("strides") or [1] * rank
    dilations = node.attrs.get("dilations") or [1] * rank
    pads = node.attrs.get("pads") or [0] * 2 * rank
    counts = [
        (image[a] + pads[a] + pads[rank + a] - dilations[a] * (block[a] - 1) - 1) // strides[a] + 1
        for a in range(rank)
    ]
    lowering.plain(node.inputs[0])
    writer = lowering.start(node)
    x = lowering.read(writer, node.inputs[0])
    y = lowering.write(writer, node.outputs[0])
    area, windows, taps = math.prod(image), math.prod(counts), math.prod(block)
    with writer.parallel("f", y.shape[0] * y.shape[1]):
        writer.line(f"{y.ctype.name} *out = {y.var} + f * {area};")
        writer.line(f"for (long i = 0; i < {area}; i++) out[i] = 0;")
        with writer.loop("t", taps), writer.loop("w", windows):
            place = []
            for axis, (tap, window, stride) in enumerate(
                zip(row_major(block), row_major(counts), row_major(image), strict=True)
            ):
                position = f"w / {window} % {counts[axis]} * {strides[axis]}"
                position += f" + t / {tap} % {block[axis]} * {dilations[axis]} - {pads[axis]}"
                writer.line(f"const long p{axis} = {position};")
                writer.line(f"if (p{axis} < 0 || p{axis} >= {image[axis]}) continue;")
                place.append(f"p{axis} * {stride}")
            writer.line(f"out[{' + '.join(place)}] += {x.var}[(f * {taps} + t) * {windows} + w];")
