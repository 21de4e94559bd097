"""Matrix products in the row-major layout: MatMul, Gemm, Einsum and their integer forms."""

from __future__ import annotations

import math

import numpy as np

from featherweight.compiler.ctype import CType
from featherweight.compiler.expressions import saturate
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of, nested
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import broadcast, row_major


def matrix_shapes(
    a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return both shapes with at least two axes and the broadcast batch."""
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    return left, right, np.broadcast_shapes(left[:-2], right[:-2])


@emits("MatMul")
def emit_matmul(lowering: Lowering, node: Node) -> None:
    """Rows of the output as sums of scaled rows of the right matrix."""
    for name in node.inputs:
        lowering.plain(name)
    left, right, batch = matrix_shapes(*(lowering.graph.shape(name) for name in node.inputs))
    rows, depth, columns = left[-2], left[-1], right[-1]
    writer = lowering.start(node, "plain product", math.prod(batch) * rows * depth * columns)
    a, b = (lowering.read(writer, name) for name in node.inputs)
    y = lowering.write(writer, node.outputs[0])
    a_steps = broadcast(a.reshaped(left[:-2], row_major(left)[:-2]), batch)
    b_steps = broadcast(b.reshaped(right[:-2], row_major(right)[:-2]), batch)
    kind = y.ctype.name
    with writer.parallel("r", math.prod(batch) * rows):
        writer.line(f"const long q = r / {rows};")
        for axis, (size, stride) in enumerate(zip(batch, row_major(batch), strict=True)):
            writer.line(f"const long n{axis} = q / {stride} % {size};")
        names = [f"n{axis}" for axis in range(len(batch))]
        writer.line(f"const {kind} *pa = {a.var} + {index_of(a_steps, names)} + r % {rows} * {depth};")
        writer.line(f"const {kind} *pb = {b.var} + {index_of(b_steps, names)};")
        writer.line(f"{kind} *py = {y.var} + r * {columns};")
        writer.line(f"for (long j = 0; j < {columns}; j++) py[j] = 0;")
        with writer.loop("k", depth):
            writer.line(f"const {kind} v = pa[k];")
            writer.line(f"for (long j = 0; j < {columns}; j++) py[j] += v * pb[k * {columns} + j];")


@emits("Gemm")
def emit_gemm(lowering: Lowering, node: Node) -> None:
    """alpha A B + beta C with either matrix transposed."""
    for name in node.inputs:
        if name:
            lowering.plain(name)
    rows, columns = lowering.graph.shape(node.outputs[0])
    shape_a = lowering.graph.shape(node.inputs[0])
    flip_a, flip_b = node.attrs.get("transA", 0), node.attrs.get("transB", 0)
    depth = shape_a[0] if flip_a else shape_a[1]
    writer = lowering.start(node, "plain product", rows * depth * columns)
    a, b = (lowering.read(writer, name) for name in node.inputs[:2])
    c = lowering.read(writer, node.inputs[2]) if node.input(2) else None
    y = lowering.write(writer, node.outputs[0])
    kind = y.ctype
    alpha, beta = (kind.literal(node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
    with writer.parallel("i", rows), writer.loop("j", columns):
        start = f"{c.var}[{index_of(broadcast(c, (rows, columns)), ('i', 'j'))}] * {beta}" if c else "0"
        writer.line(f"{kind.name} sum = 0;")
        left = f"{a.var}[{f'k * {rows} + i' if flip_a else f'i * {depth} + k'}]"
        right = f"{b.var}[{f'j * {depth} + k' if flip_b else f'k * {columns} + j'}]"
        writer.line(f"for (long k = 0; k < {depth}; k++) sum += {left} * {right};")
        writer.line(f"{y.var}[i * {columns} + j] = ({kind.name})({alpha} * sum + {start});")


@emits("MatMulInteger", "QLinearMatMul")
def emit_integer_matmul(lowering: Lowering, node: Node) -> None:
    """Products of zero-point corrected integers; QLinearMatMul scales and saturates them."""
    linear = node.op == "QLinearMatMul"
    a_at, b_at = (0, 3) if linear else (0, 1)
    names = [node.inputs[a_at], node.inputs[b_at]]
    for name in names:
        lowering.plain(name)
    left, right, batch = matrix_shapes(*(lowering.graph.shape(name) for name in names))
    rows, depth, columns = left[-2], left[-1], right[-1]
    writer = lowering.start(node, "plain integer product", math.prod(batch) * rows * depth * columns)
    a, b = (lowering.read(writer, name) for name in names)
    a_steps = broadcast(a.reshaped(left[:-2], row_major(left)[:-2]), batch)
    b_steps = broadcast(b.reshaped(right[:-2], row_major(right)[:-2]), batch)

    def parameter(index: int, position: str) -> str:
        if not node.input(index):
            return "0"
        operand = lowering.read(writer, node.inputs[index])
        return f"{operand.var}[{position if math.prod(operand.shape) > 1 else '0'}]"

    a_zero, b_zero = (parameter(2, "i"), parameter(5 if linear else 3, "j"))
    scales = [parameter(1, "i"), parameter(4, "j"), parameter(6, "i"), parameter(7, "i")] if linear else []
    y = lowering.write(writer, node.outputs[0])
    axes = [f"n{axis}" for axis in range(len(batch))]
    with nested(writer, (*batch, rows, columns), (*axes, "i", "j")):
        writer.line("int32_t sum = 0;")
        with writer.loop("k", depth):
            one = f"{a.var}[{index_of(a_steps, axes, f'i * {depth} + k')}]"
            two = f"{b.var}[{index_of(b_steps, axes, f'k * {columns} + j')}]"
            writer.line(f"sum += ((int32_t){one} - {a_zero}) * ((int32_t){two} - {b_zero});")
        value = "sum"
        if linear:
            text = f"rintf((float)sum * ((float){scales[0]} * {scales[1]} / {scales[2]})) + {scales[3]}"
            value = saturate(text, CType(np.dtype(np.float32)), y.ctype)
        place = index_of(row_major((*batch, rows, columns)), (*axes, "i", "j"))
        writer.line(f"{y.var}[{place}] = {value};")


@emits("Einsum")
def emit_einsum(lowering: Lowering, node: Node) -> None:
    """One loop a label: those of the output outside, the summed ones inside."""
    terms, result = parse_equation(node.attrs["equation"], [lowering.graph.shape(n) for n in node.inputs])
    sizes: dict[str, int] = {}
    for name, term in zip(node.inputs, terms, strict=True):
        for label, size in zip(term, lowering.graph.shape(name), strict=True):
            if sizes.get(label, 1) not in (1, size) and size != 1:
                lowering.refuse(node, f"label '{label}' has the sizes {sizes[label]} and {size}")
            sizes[label] = max(sizes.get(label, 1), size)
    summed = [label for label in sizes if label not in result]
    writer = lowering.start(node, "plain sum of products", math.prod(sizes.values()))
    reads = [lowering.read(writer, name) for name in node.inputs]
    y = lowering.write(writer, node.outputs[0])
    variables = {label: f"i{index}" for index, label in enumerate(sizes)}
    factors = []
    for operand, term in zip(reads, terms, strict=True):
        own = [
            0 if size == 1 else stride for size, stride in zip(operand.shape, operand.strides, strict=True)
        ]
        factors.append(f"{operand.var}[{index_of(own, [variables[label] for label in term])}]")
    outer = [variables[label] for label in result]
    with nested(writer, [sizes[label] for label in result], outer, parallel=bool(result)):
        if not result:
            writer.line("if (tid) return;")
        writer.line(f"{y.ctype.name} sum = 0;")
        with nested(
            writer, [sizes[label] for label in summed], [variables[label] for label in summed], False
        ):
            writer.line(f"sum += {' * '.join(factors)};")
        writer.line(f"{y.var}[{index_of(y.strides, outer)}] = sum;")


def parse_equation(equation: str, shapes: list[tuple[int, ...]]) -> tuple[list[list[str]], list[str]]:
    """Return the labels of each operand and of the result; an ellipsis becomes labels of its own.

    >>> parse_equation("...ij,jk", [(5, 2, 3), (3, 4)])
    ([['.0', 'i', 'j'], ['j', 'k']], ['.0', 'i', 'k'])
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    hidden = max(
        (len(shape) - len(part) + 3 for part, shape in zip(parts, shapes, strict=True) if "..." in part),
        default=0,
    )
    dots = [f".{index}" for index in range(hidden)]

    def expand(part: str, rank: int | None) -> list[str]:
        before, ellipsis, after = part.partition("...")
        count = hidden if rank is None else rank - len(before) - len(after)
        return [*before, *(dots[hidden - count :] if ellipsis else []), *after]

    terms = [expand(part, len(shape)) for part, shape in zip(parts, shapes, strict=True)]
    if arrow:
        return terms, expand(right, None)
    letters = left.replace(",", "").replace(".", "")
    single = sorted(label for label in set(letters) if letters.count(label) == 1)
    return terms, [*(dots if "..." in left else []), *single]
