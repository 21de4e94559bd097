"""Loop nests over strided operands: dimensions of size one vanish, neighbours that lie together merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from featherweight.compiler.program import Operand, StepWriter


@dataclass(frozen=True)
class Nest:
    """Sizes of the merged loops, outermost first, and the strides of each operand in them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Iterations of all loops together."""
        total = 1
        for size in self.sizes:
            total *= size
        return total


def plan_nest(
    shape: Sequence[int], strides: Sequence[Sequence[int]], order: Sequence[int] | None = None
) -> Nest:
    """Merge the loops over `shape` as far as every operand's strides allow.

    Args:
        shape: sizes of the loops.
        strides: for each operand one stride a loop.
        order: the loops from the outermost; as given without it.

    >>> plan_nest((2, 1, 3, 4), [(12, 12, 4, 1), (0, 0, 4, 1)])
    Nest(sizes=(2, 12), strides=((12, 1), (0, 1)))
    """
    axes = [axis for axis in (order or range(len(shape))) if shape[axis] != 1]
    sizes: list[int] = []
    columns: list[list[int]] = []
    for axis in axes:
        column = [own[axis] for own in strides]
        inner = shape[axis]
        if sizes and all(outer == own * inner for outer, own in zip(columns[-1], column, strict=True)):
            sizes[-1] *= inner
            columns[-1] = column
        else:
            sizes.append(inner)
            columns.append(column)
    if not sizes:
        sizes, columns = [1], [[0] * len(strides)]
    return Nest(tuple(sizes), tuple(zip(*columns, strict=True)) if strides else ())


def memory_order(strides: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Return the loops in the order of falling strides, so that the innermost walks through memory."""
    return sorted(range(len(shape)), key=lambda axis: (-abs(strides[axis]), axis))


def index_of(strides: Sequence[int], names: Sequence[str], offset: int | str = 0) -> str:
    """Return the C expression of an element's index.

    >>> index_of((12, 0, 1), ("i0", "i1", "i2"))
    'i0 * 12 + i2'
    """
    parts = [
        name if stride == 1 else f"{name} * {stride}"
        for name, stride in zip(names, strides, strict=True)
        if stride
    ]
    if offset != 0:
        parts.append(str(offset))
    return " + ".join(parts) or "0"


def at(operand: Operand, index: str) -> str:
    """Return the C expression of one element."""
    return f"{operand.var}[{index}]"


@contextlib.contextmanager
def nested(
    writer: StepWriter, sizes: Sequence[int], names: Sequence[str], parallel: bool = True
) -> Iterator[None]:
    """Open one loop a size; the outermost is shared by the threads."""
    with contextlib.ExitStack() as stack:
        for depth, (size, name) in enumerate(zip(sizes, names, strict=True)):
            if depth == 0 and parallel:
                stack.enter_context(writer.parallel(name, size))
            else:
                stack.enter_context(writer.loop(name, size))
        yield


def copy(
    writer: StepWriter,
    source: Operand,
    target: Operand,
    shape: Sequence[int],
    source_strides: Sequence[int] | None = None,
    target_strides: Sequence[int] | None = None,
    source_offset: int = 0,
    target_offset: int = 0,
) -> None:
    """Copy a strided block; the strides are those of the operands unless given. Strides may be negative."""
    source_strides = source.strides if source_strides is None else source_strides
    target_strides = target.strides if target_strides is None else target_strides
    if 0 in shape:
        return
    nest = plan_nest(shape, [target_strides, source_strides], memory_order(target_strides, shape))
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    into, out_of = nest.strides
    dense = into[-1] == 1 and out_of[-1] == 1 and nest.sizes[-1] > 1
    if dense and len(nest.sizes) > 1:
        with nested(writer, nest.sizes[:-1], names[:-1]):
            a = index_of(into[:-1], names[:-1], target_offset)
            b = index_of(out_of[:-1], names[:-1], source_offset)
            size = nest.sizes[-1] * source.view.dtype.itemsize
            writer.line(f"memcpy({target.var} + {a}, {source.var} + {b}, {size});")
        return
    with nested(writer, nest.sizes, names):
        a, b = index_of(into, names, target_offset), index_of(out_of, names, source_offset)
        writer.line(f"{target.var}[{a}] = {source.var}[{b}];")


def fill(writer: StepWriter, target: Operand, value: str) -> None:
    """Set every element of an operand."""
    if 0 in target.shape:
        return
    nest = plan_nest(target.shape, [target.strides], memory_order(target.strides, target.shape))
    names = [f"i{depth}" for depth in range(len(nest.sizes))]
    with nested(writer, nest.sizes, names):
        writer.line(f"{target.var}[{index_of(nest.strides[0], names)}] = {value};")
