"""Groups of element-wise float32 operators as loops over whole vectors, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featherweight.compiler.ctype import CType
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import Nest, index_of, nested, plan_nest
from featherweight.compiler.lower import Lowering
from featherweight.compiler.program import Operand, StepWriter
from featherweight.compiler.vector_expressions import body_lines


@dataclass(frozen=True)
class Read:
    """One input of a loop: its operand and its strides under the loop's shape."""

    operand: Operand
    strides: tuple[int, ...]


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
    lowering: Lowering,
    writer: StepWriter,
    node: Node,
    reads: dict[str, Read],
    output: Operand,
    shape: Sequence[int],
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
