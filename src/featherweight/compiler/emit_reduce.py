"""Reductions, global pools, softmax and running sums in the row-major layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from featherweight.compiler.ctype import CType
from featherweight.compiler.emit_shape import step_between
from featherweight.compiler.graph import Node
from featherweight.compiler.loops import index_of, nested, plan_nest
from featherweight.compiler.lower import Lowering, emits
from featherweight.compiler.program import Operand, StepWriter

_STARTS = {"Max": "lowest", "Min": "highest"}


def _accumulator(kind: CType, op: str) -> tuple[str, str, str]:
    """Return the accumulator's type, its first value and the statement that takes in `v`."""
    if op in ("Max", "Min"):
        sign = ">" if op == "Max" else "<"
        return kind.name, getattr(kind, _STARTS[op]), f"if (v {sign} sum || v != v) sum = v;"
    # Sums in double: the cost is hidden by the loads, and means of large maps stay exact to the last digits.
    wide = "double" if kind.is_float else "int64_t" if kind.dtype.kind != "u" else "uint64_t"
    statements = {
        "Prod": "sum *= v;",
        "L1": f"sum += {'fabs(v)' if kind.is_float else '(v < 0 ? -v : v)'};",
        "L2": "sum += v * v;",
        "SumSquare": "sum += v * v;",
    }
    return wide, "1" if op == "Prod" else "0", statements.get(op, "sum += v;")


def _finish(op: str, count: int) -> str:
    return {
        "Mean": f"sum / {max(count, 1)}",
        "L2": "sqrt((double)sum)",
        "LogSum": "log((double)sum)",
    }.get(op, "sum")


def reduce(writer: StepWriter, x: Operand, y: Operand, axes: Sequence[int], op: str) -> None:
    """Write `y`, whose elements are those of `x` reduced over `axes`, in the order of the other axes."""
    outer = [axis for axis in range(len(x.shape)) if axis not in axes]
    inner = [axis for axis in axes if x.shape[axis] != 1]
    count = math.prod(x.shape[axis] for axis in axes)
    kept = [(x.shape[axis], x.strides[axis]) for axis in outer]
    targets = [stride for stride, size in zip(y.strides, y.shape, strict=True) if size != 1]
    sizes = [size for size, _ in kept if size != 1]
    nest = plan_nest(sizes, [targets, [stride for size, stride in kept if size != 1]])
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    inside = plan_nest([x.shape[axis] for axis in inner], [[x.strides[axis] for axis in inner]])
    depths = [f"k{depth}" for depth in range(len(inside.sizes))]
    kind = x.ctype
    with nested(writer, nest.sizes, names):
        writer.line(f"const {kind.name} *p = {x.var} + {index_of(nest.strides[1], names)};")
        target = f"{y.var}[{index_of(nest.strides[0], names)}]"
        element = f"p[{index_of(inside.strides[0], depths)}]"
        if op == "LogSumExp":
            _log_sum_exp(writer, kind, inside.sizes, depths, element, target)
            return
        wide, start, statement = _accumulator(kind, op)
        writer.line(f"{wide} sum = {start};")
        if count:
            with nested(writer, inside.sizes, depths, parallel=False):
                writer.line(f"const {wide} v = {element};")
                writer.line(statement)
        writer.line(f"{target} = ({y.ctype.name})({_finish(op, count)});")


def _log_sum_exp(
    writer: StepWriter, kind: CType, sizes: Sequence[int], names: Sequence[str], element: str, target: str
) -> None:
    writer.line("double most = -INFINITY, sum = 0;")
    with nested(writer, sizes, names, parallel=False):
        writer.line(f"if ({element} > most) most = {element};")
    writer.line("const double shift = most - most == 0 ? most : 0;")
    with nested(writer, sizes, names, parallel=False):
        writer.line(f"sum += exp({element} - shift);")
    writer.line(f"{target} = ({kind.name})(log(sum) + shift);")


@emits(
    *(
        f"Reduce{op}"
        for op in ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"]
    )
)
def emit_reduce(lowering: Lowering, node: Node) -> None:
    """Reduce over fixed axes."""
    shape = lowering.graph.shape(node.inputs[0])
    axes = node.attrs.get("axes")
    if axes is None and node.input(1):
        axes = lowering.value(node, 1, "axes").reshape(-1).tolist()
    if not axes:
        axes = [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(len(shape)))
    writer, x, y = step_between(lowering, node)
    if 0 not in y.shape:
        reduce(
            writer, x, y, sorted({int(axis) % len(shape) for axis in axes}), node.op.removeprefix("Reduce")
        )


@emits("GlobalAveragePool", "GlobalMaxPool")
def emit_global_pool(lowering: Lowering, node: Node) -> None:
    """Reduce every channel to one value."""
    writer, x, y = step_between(lowering, node)
    reduce(writer, x, y, range(2, len(x.shape)), "Mean" if node.op == "GlobalAveragePool" else "Max")


@emits("GlobalLpPool")
def emit_global_lp_pool(lowering: Lowering, node: Node) -> None:
    """The p-norm of every channel, for p of 1 and 2."""
    order = node.attrs.get("p", 2)
    if order not in (1, 2):
        lowering.refuse(node, f"p is {order}, not 1 or 2")
    writer, x, y = step_between(lowering, node)
    reduce(writer, x, y, range(2, len(x.shape)), f"L{order}")


@emits("Softmax", "LogSoftmax", "Hardmax")
def emit_softmax(lowering: Lowering, node: Node) -> None:
    """Exponentials over their sum along an axis, shifted by the largest so that none overflows."""
    writer, x, y = step_between(lowering, node)
    if 0 in x.shape:
        return
    axis = node.attrs.get("axis", -1) % len(x.shape)
    outer = [index for index in range(len(x.shape)) if index != axis]
    nest = plan_nest(
        [x.shape[index] for index in outer],
        [[y.strides[index] for index in outer], [x.strides[index] for index in outer]],
    )
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    kind, size = x.ctype, x.shape[axis]
    source, target = f"in[k * {x.strides[axis]}]", f"out[k * {y.strides[axis]}]"
    with nested(writer, nest.sizes, names):
        writer.line(f"const {kind.name} *in = {x.var} + {index_of(nest.strides[1], names)};")
        writer.line(f"{kind.name} *out = {y.var} + {index_of(nest.strides[0], names)};")
        writer.line(f"{kind.name} most = in[0], sum = 0;")
        writer.line("long best = 0;")
        with writer.loop("k", size):
            writer.line(f"if ({source} > most) {{ most = {source}; best = k; }}")
        writer.line("(void)best, (void)sum;")
        if node.op == "Hardmax":
            writer.line(f"for (long k = 0; k < {size}; k++) {target} = k == best;")
            return
        exponential = f"{kind.function('exp')}({source} - most)"
        if node.op == "Softmax":
            writer.line(f"for (long k = 0; k < {size}; k++) sum += {target} = {exponential};")
            writer.line(f"for (long k = 0; k < {size}; k++) {target} /= sum;")
        else:
            writer.line(f"for (long k = 0; k < {size}; k++) sum += {exponential};")
            writer.line(f"sum = {kind.function('log')}(sum);")
            writer.line(f"for (long k = 0; k < {size}; k++) {target} = {source} - most - sum;")


@emits("CumSum", "CumProd")
def emit_running(lowering: Lowering, node: Node) -> None:
    """Running sums or products along an axis, from either end."""
    axis = lowering.value(node, 1, "axis")
    lowering.plain(node.inputs[0])
    writer, x, y = step_between(lowering, node)
    index = int(axis.reshape(-1)[0]) % len(x.shape)
    size, after = x.shape[index], math.prod(x.shape[index + 1 :])
    product = node.op == "CumProd"
    place = f"(i0 * {size} + k) * {after} + i1"
    with nested(writer, (math.prod(x.shape[:index]), after), ("i0", "i1")):
        writer.line(f"{x.ctype.name} sum = {'1' if product else '0'};")
        with writer.loop("q", size):
            writer.line(f"const long k = {f'{size - 1} - q' if node.attrs.get('reverse', 0) else 'q'};")
            take = f"sum {'*' if product else '+'}= {x.var}[{place}];"
            put = f"{y.var}[{place}] = sum;"
            for line in (put, take) if node.attrs.get("exclusive", 0) else (take, put):
                writer.line(line)
