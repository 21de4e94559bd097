"""Steps of C and the memory that they read and write: what lowering produces and the source file is made of.

A *storage* is one run of memory: a piece of the arena, of the weights, or a caller's input or output. A
tensor is a *view* of a storage: an offset and one stride a dimension, in elements. So a reshape, a split or
a pixel layout costs nothing to describe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from featherweight.compiler.ctype import CType

ALIGNMENT = 64
MATH = tuple(
    ["exp", "expm1", "log", "sigmoid", "tanh", "erf", "gelu", "gelu_tanh", "softplus", "mish", "softsign"]
)
"""Functions of kernels/vmath.h that element-wise expressions call."""


@dataclass
class Storage:
    """One run of memory. `place` is arena, weights, input or output; `offset` is in bytes, or the index of an
    input or output."""

    size_bytes: int
    place: str = "arena"
    offset: int = -1


@dataclass(frozen=True)
class View:
    """Where the elements of a tensor lie.

    `pixel` says that channels lie last; `lanes_free` that nothing else lies in the last vector of a pixel.
    """

    storage: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    pixel: bool = False
    lanes_free: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the elements lie row-major without gaps."""
        dense = row_major(self.shape)
        return all(
            own == wanted or size == 1
            for own, wanted, size in zip(self.strides, dense, self.shape, strict=True)
        )

    def flat(self, shape: tuple[int, ...]) -> View:
        """Return a view of the same elements, which lie row-major, with another shape."""
        return View(self.storage, self.dtype, shape, row_major(shape), self.offset)

    def padded_channels(self, vector: int) -> int:
        """Return how many channels of a pixel may be written: to the end of the last vector if it is free."""
        channels = self.shape[1]
        whole = -(-channels // vector) * vector
        return whole if self.pixel and self.lanes_free else channels


@dataclass(frozen=True)
class Operand:
    """A view inside one step, with the C variable that points at its first element."""

    var: str
    view: View

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in elements."""
        return self.view.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements."""
        return self.view.strides

    @property
    def ctype(self) -> CType:
        """The C type of an element."""
        return CType(self.view.dtype)

    def reshaped(self, shape: Sequence[int], strides: Sequence[int] | None = None) -> Operand:
        """Return the same memory seen with another shape; row-major unless strides are given."""
        strides = row_major(tuple(shape)) if strides is None else tuple(strides)
        return replace(self, view=replace(self.view, shape=tuple(shape), strides=strides, pixel=False))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense row-major tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def broadcast(operand: Operand, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides with which an operand is read under the broader `shape`: 0 where it repeats."""
    skipped = len(shape) - len(operand.shape)
    strides = [0] * skipped
    for size, stride, wide in zip(operand.shape, operand.strides, shape[skipped:], strict=True):
        strides.append(stride if size == wide and size != 1 else 0)
    return tuple(strides)


@dataclass
class Step:
    """One C function of the network. Reads and writes are storages; `in_place` pairs (written, read) may
    share memory. `timed` names the forms of parts of the network that its time counts to, `facts` are for the
    report."""

    name: str
    op: str
    kernel: str = "loops"
    macs: int = 0
    tile_key: str = ""
    timed: tuple[tuple[str, int], ...] = ()
    facts: dict[str, float | str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    pointers: list[tuple[str, View, bool]] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    in_place: list[tuple[int, int]] = field(default_factory=list)


class Program:
    """All steps, storages, the weights' bytes and the tensors' views."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.storages: list[Storage] = []
        self.views: dict[str, View] = {}
        self.headers: list[str] = []
        self.globals: list[str] = []
        self.weights = bytearray()
        self._known: dict[tuple[bytes, str], int] = {}
        self._named: dict[str, str] = {}

    def allocate(self, size_bytes: int, place: str = "arena", offset: int = -1) -> int:
        """Add a storage and return its number."""
        self.storages.append(Storage(size_bytes, place, offset))
        return len(self.storages) - 1

    def store(self, value: np.ndarray) -> View:
        """Put a constant into the weights, once for equal contents, and return its view."""
        value = np.asarray(value, order="C")
        raw = value.tobytes()
        key = (raw, value.dtype.name)
        if key not in self._known:
            self.weights += b"\0" * (-len(self.weights) % ALIGNMENT)
            self._known[key] = self.allocate(len(raw), "weights", len(self.weights))
            self.weights += raw
        return View(self._known[key], value.dtype, value.shape, row_major(value.shape))

    def need_header(self, name: str) -> None:
        """Make the source include a kernel header, in order of first need."""
        if name not in self.headers:
            self.headers.append(name)

    def need_math(self, text: str) -> None:
        """Include the vector functions if a text calls one of them."""
        self.need_header("vector.h")
        if any(f"vf_{name}(" in text for name in MATH):
            self.need_header("vmath.h")

    def define_named(self, prefix: str, text: str) -> str:
        """Add a definition before the steps, once for equal texts, and return its name.

        Args:
            prefix: the name starts with it and ends with a number.
            text: the definition; `{name}` stands for the name.
        """
        if text not in self._named:
            self._named[text] = f"{prefix}_{len(self._named)}"
            self.globals.append(text.replace("{name}", self._named[text]))
        return self._named[text]


class StepWriter:
    """Writes one step: pointers to its tensors, lines of C, loops."""

    def __init__(self, program: Program, step: Step) -> None:
        self.program, self.step = program, step
        self._depth = 1

    def pointer(self, view: View, writes: bool = False, restrict: bool = True) -> Operand:
        """Declare a pointer to a view's first element."""
        var = f"t{len(self.step.pointers)}"
        self.step.pointers.append((var, view, restrict))
        if self.program.storages[view.storage].place == "arena":
            (self.step.writes if writes else self.step.reads).add(view.storage)
        return Operand(var, view)

    def constant(self, value: np.ndarray) -> Operand:
        """Declare a pointer to a constant of the compiler's own, packed weights say."""
        return self.pointer(self.program.store(value))

    def scratch(self, dtype: np.dtype | type, count: int) -> Operand:
        """Declare memory that lives for this step only."""
        kind = np.dtype(dtype)
        storage = self.program.allocate(max(count, 1) * kind.itemsize)
        return self.pointer(View(storage, kind, (count,), (1,)), writes=True)

    def line(self, text: str) -> None:
        """Add a line at the present depth."""
        self.step.lines.append("    " * self._depth + text)

    @contextlib.contextmanager
    def block(self, head: str = "") -> Iterator[None]:
        """Open braces after `head`, and close them."""
        self.line((head + " {").lstrip())
        self._depth += 1
        yield
        self._depth -= 1
        self.line("}")

    @contextlib.contextmanager
    def loop(self, var: str, stop: int | str, step: int = 1) -> Iterator[None]:
        """Loop over 0 <= var < stop."""
        advance = f"{var}++" if step == 1 else f"{var} += {step}"
        with self.block(f"for (long {var} = 0; {var} < {stop}; {advance})"):
            yield

    @contextlib.contextmanager
    def parallel(self, var: str, stop: int) -> Iterator[None]:
        """Loop over this thread's share of 0 <= var < stop."""
        share = f"long {var} = {stop}L * tid / threads; {var} < {stop}L * (tid + 1) / threads; {var}++"
        with self.block(f"for ({share})"):
            yield

    @contextlib.contextmanager
    def single(self) -> Iterator[None]:
        """Run the body on the first thread only."""
        with self.block("if (tid == 0)"):
            yield
