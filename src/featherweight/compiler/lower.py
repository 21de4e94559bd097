"""Turn the nodes of a graph into steps of C: give every tensor its memory, call the operator's emitter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from featherweight.compiler.convert import NO_BORDER, Border, clear_border, convert_to_pixel, convert_to_plain
from featherweight.compiler.ctype import is_supported
from featherweight.compiler.graph import Graph, Node
from featherweight.compiler.infer import MALFORMED, first_line
from featherweight.compiler.loops import copy
from featherweight.compiler.program import ALIGNMENT, Operand, Program, Step, StepWriter, View, row_major
from featherweight.compiler.tiles import Tile, Tiles
from featherweight.errors import DataError

if TYPE_CHECKING:
    from featherweight.compiler.passes import Layout

Emitter = Callable[["Lowering", Node], None]
FLOAT32 = np.dtype(np.float32)
EMITTERS: dict[str, Emitter] = {}
PIXEL_EMITTERS: dict[str, Emitter] = {}
PLANAR_EMITTERS: dict[str, Emitter] = {}


def emits(*ops: str) -> Callable[[Emitter], Emitter]:
    """Register the emitter of one or more operators."""

    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(ops, emitter))
        return emitter

    return register


def emits_pixel(*ops: str) -> Callable[[Emitter], Emitter]:
    """Register the emitter of operators whose result lies in the pixel layout."""

    def register(emitter: Emitter) -> Emitter:
        PIXEL_EMITTERS.update(dict.fromkeys(ops, emitter))
        return emitter

    return register


def emits_planar(*ops: str) -> Callable[[Emitter], Emitter]:
    """Register the emitter of operators marked `planar`: whole planes, each of whole vectors."""

    def register(emitter: Emitter) -> Emitter:
        PLANAR_EMITTERS.update(dict.fromkeys(ops, emitter))
        return emitter

    return register


class Lowering:
    """The state of lowering one graph.

    Args:
        graph: after all passes.
        layout: which tensors lie channels last, and where.
        vector: floats of a vector register of the target.
        threads: threads of the compiled network.
        tiles: chooses the register tiles.

    `byte_images` are images that their convolution quantises itself: the float tensor and its scale.
    """

    def __init__(
        self, graph: Graph, layout: Layout, vector: int, threads: int = 1, tiles: Tiles | None = None
    ) -> None:
        self.graph, self.vector, self.threads = graph, vector, threads
        self.tiles = tiles or Tiles()
        self.consumers = graph.consumers()
        self.byte_images: dict[str, tuple[str, float]] = {}
        self.pixel, self.homes, self.borders = layout.pixel, layout.homes, layout.borders
        self.planar = layout.planar
        self.program = Program()
        self._pixels: dict[str, list[tuple[View, Border, bool]]] = {}
        self._together: dict[str, View] = {}
        self._planes: dict[str, View] = {}

    def run(self) -> Program:
        """Lower every node and return the program.

        Raises:
            DataError: an operator, or a form of it, that is not supported; names node, operator and opset.
        """
        program = self.program
        for index, name in enumerate(self.graph.inputs):
            kind = self.graph.types[name]
            storage = program.allocate(kind.size_bytes, "input", index)
            program.views[name] = View(storage, kind.dtype, kind.shape, row_major(kind.shape))
        for node in self.graph.nodes:
            pixel = bool(node.outputs) and node.outputs[0] in self.pixel
            table = PIXEL_EMITTERS if pixel and node.op in PIXEL_EMITTERS else EMITTERS
            emitter = (PLANAR_EMITTERS if "planar" in node.attrs else table)[node.op]
            try:
                emitter(self, node)
            except MALFORMED as error:
                self.refuse(node, f"it is malformed: {type(error).__name__}: {first_line(error)}", error)
        for index, name in enumerate(self.graph.outputs):
            view = self.view(name)
            storage = program.storages[view.storage]
            if (storage.place, storage.offset) == ("output", index) and view.is_plain and view.offset == 0:
                continue
            self._copy_out(name, view, index)
        return program

    def _copy_out(self, name: str, view: View, index: int) -> None:
        kind = self.graph.types[name]
        storage = self.program.allocate(kind.size_bytes, "output", index)
        target = View(storage, kind.dtype, kind.shape, row_major(kind.shape))
        convert_to_plain(self, name, view, target)

    def view(self, name: str) -> View:
        """Return where a tensor lies; a constant is stored on first use."""
        if name not in self.program.views:
            self.program.views[name] = self.program.store(self.graph.constants[name])
        return self.program.views[name]

    def start(self, node: Node, kernel: str = "loops", macs: int = 0) -> StepWriter:
        """Begin a step."""
        step = Step(node.name, node.op, kernel, macs)
        step.timed = node.attrs.get("timed", ())
        step.facts = node.attrs.get("facts", {})
        self.program.steps.append(step)
        return StepWriter(self.program, step)

    def read(self, writer: StepWriter, name: str) -> Operand:
        """Declare a pointer to a tensor that the step reads."""
        return writer.pointer(self.view(name))

    def write(self, writer: StepWriter, name: str, restrict: bool = True) -> Operand:
        """Give a computed tensor its memory and declare a pointer to it."""
        whole = self._whole(name)
        if name in self.pixel and whole not in self.program.views:
            kind = self.graph.types[whole]
            view = self.pixel_view(kind.shape, self.borders.get(whole, NO_BORDER), dtype=kind.dtype)
            self.place_pixels(whole, view, self.borders.get(whole, NO_BORDER))
            if any(self.borders.get(whole, NO_BORDER)):
                clear_border(self, writer, view, self.borders[whole])
        self.program.views[name] = view = self._place(name)
        return writer.pointer(view, writes=True, restrict=restrict)

    def _whole(self, name: str) -> str:
        """Return the concatenation that a tensor is a part of, itself where it is none."""
        while name in self.homes:
            name = self.homes[name][0]
        return name

    def place_pixels(self, name: str, view: View, border: Border = NO_BORDER) -> None:
        """Let a tensor of the pixel layout lie in `view`, which has a border of zeros."""
        self.program.views[name] = view
        self._pixels[name] = [(view, border, False)]

    def _place(self, name: str) -> View:
        """Return new memory for a computed tensor, in the layout that was chosen for it."""
        kind = self.graph.types[name]
        if name in self.homes:
            whole, channel = self.homes[name]
            self.channels_of(name, self._place(whole), channel, self._border(whole))
            return self.program.views[name]
        if name in self.pixel:
            return self.program.views[name]
        if name in self.planar:
            return self._planar_view(name)
        if name in self.graph.outputs:
            place, offset = "output", self.graph.outputs.index(name)
        else:
            place, offset = "arena", -1
        # Kernels read up to a vector behind the last element.
        size = kind.size_bytes + (ALIGNMENT if place == "arena" else 0)
        storage = self.program.allocate(max(size, 1), place, offset)
        return View(storage, kind.dtype, kind.shape, row_major(kind.shape))

    def _planar_view(self, name: str) -> View:
        """Return new memory for an image whose planes are whole vectors."""
        kind = self.graph.types[name]
        n, c, h, w = kind.shape
        plane = -(-h * w // self.vector) * self.vector
        # Kernels may read a vector behind the last plane.
        storage = self.program.allocate(n * c * plane * 4 + ALIGNMENT)
        return View(storage, kind.dtype, kind.shape, (c * plane, plane, w, 1))

    def planar_of(self, name: str) -> View:
        """Return an image whose planes are whole vectors, of aligned memory; copied once where it is not."""
        view = self.program.views.get(name) or self.view(name)
        _, c, h, w = view.shape
        plane = -(-h * w // self.vector) * self.vector
        place = self.program.storages[view.storage].place
        if view.strides == (c * plane, plane, w, 1) and place == "arena":
            return view
        if name not in self._planes:
            self._planes[name] = target = self._planar_view(name)
            convert_to_plain(self, name, view, target)
        return self._planes[name]

    def _border(self, name: str) -> Border:
        return self._pixels[name][0][1]

    def channels_of(self, name: str, whole: View, channel: int, border: Border) -> None:
        """Let a tensor of the pixel layout be some channels of a larger one."""
        part = replace(
            whole,
            shape=self.graph.shape(name),
            offset=whole.offset + channel * whole.strides[1],
            lanes_free=False,
        )
        self.place_pixels(name, part, border)

    def channel_step(self, channels: int, dtype: np.dtype) -> int:
        """Return the elements from a pixel to the next: whole vectors of float32, or 16 bytes."""
        unit = 16 if dtype.itemsize == 1 else self.vector
        return -(-channels // unit) * unit

    def pixel_view(
        self,
        shape: tuple[int, ...],
        border: Border = NO_BORDER,
        tight: bool = False,
        dtype: np.dtype = FLOAT32,
    ) -> View:
        """Return new memory in the pixel layout `[N][H][W][Cs]` for a tensor of logical shape (N, C, H, W).

        Args:
            shape: (N, C, H, W).
            border: pixels kept around each image; they are not cleared here.
            tight: leave no room behind the last channel.
            dtype: float32 or uint8.
        """
        n, c, h, w = shape
        top, left, bottom, right = border
        step = c if tight else self.channel_step(c, dtype)
        row = (left + w + right) * step
        image = (top + h + bottom) * row
        # Kernels read whole vectors, at the very end too.
        storage = self.program.allocate(n * image * dtype.itemsize + ALIGNMENT)
        offset = top * row + left * step
        strides = (image, 1, row, step)
        return View(storage, dtype, shape, strides, offset, pixel=True, lanes_free=not tight)

    def own_pixels(self, name: str) -> View:
        """Return a tensor in the pixel layout with nothing between its pixels; copied where there is."""
        view = self.pixel_of(name)
        _n, c, h, w = view.shape
        step = self.channel_step(c, view.dtype)
        if view.strides == (h * w * step, 1, w * step, step):
            return view
        if name not in self._together:
            target = self.pixel_view(view.shape, dtype=view.dtype)
            writer = self.start(Node("Convert", f"{name} together", [name], [name]), "layout")
            copy(writer, writer.pointer(view), writer.pointer(target, writes=True), view.shape)
            self._together[name] = target
        return self._together[name]

    def pixel_of(
        self, name: str, shape: tuple[int, ...] = (), border: Border = NO_BORDER, tight: bool = False
    ) -> View:
        """Return a tensor in the pixel layout with at least the given border; converted once where it is not.

        Args:
            name: a computed float32 tensor.
            shape: its shape as rank 4, where it has fewer axes.
            border: zeros that the reader needs.
            tight: the reader wants no padding between the pixels of a row-major tensor.
        """
        shape = shape or self.graph.shape(name)
        for view, own, packed in self._pixels.get(name, []):
            if all(a >= b for a, b in zip(own, border, strict=True)) and (
                packed == tight or name in self.pixel
            ):
                return view
        view = self.pixel_view(shape, border, tight and name not in self.pixel, self.graph.dtype(name))
        convert_to_pixel(self, name, view, border)
        self._pixels.setdefault(name, []).append((view, border, tight))
        return view

    def pixel_constant(self, value: np.ndarray) -> View:
        """Store a constant of rank 4 in the pixel layout; one channel stays one value a pixel."""
        n, c, h, w = value.shape
        step = 1 if c == 1 else -(-c // self.vector) * self.vector
        packed = np.zeros((n, h, w, step), np.float32)
        packed[..., :c] = value.transpose(0, 2, 3, 1)
        view = self.program.store(packed)
        strides = (h * w * step, 1, w * step, step)
        return View(view.storage, view.dtype, value.shape, strides, pixel=True, lanes_free=c > 1)

    def alias(self, name: str, view: View) -> None:
        """Let a tensor share another's memory."""
        self.program.views[name] = view

    def plain(self, name: str) -> View:
        """Return a row-major view of a tensor; a copy is emitted where it lies otherwise."""
        view = self.view(name)
        if view.is_plain:
            return view
        kind = self.graph.types[name]
        storage = self.program.allocate(kind.size_bytes + ALIGNMENT)
        target = View(storage, kind.dtype, kind.shape, row_major(kind.shape))
        convert_to_plain(self, name, view, target)
        self.program.views[name] = target
        return target

    def choose_tile(
        self, writer: StepWriter, fields: Mapping[str, int], depth: int, vectors: int, integer: bool = False
    ) -> Tile:
        """Return the register tile of a step that runs a product, and give the step its key.

        Args:
            writer: the step's writer.
            fields: of the kernel's struct: rows, columns, taps.
            depth: input channels.
            vectors: output vectors, or blocks of 16 outputs of an 8-bit layer.
            integer: whether it is an 8-bit layer.
        """
        sizes = [fields[name] for name in ("rows", "columns", "tap_rows", "tap_columns")]
        key = f"{'u8' if integer else 'f32'}-{self.vector}-{'x'.join(map(str, [*sizes, depth, vectors]))}"
        writer.step.tile_key = key
        return self.tiles.choose(key, fields["columns"], vectors, self.vector, integer)

    def emit_plainly(self, node: Node) -> None:
        """Emit a node of the pixel layout with the strided loops that serve every layout."""
        EMITTERS[node.op](self, node)

    def value(self, node: Node, index: int, what: str) -> np.ndarray | None:
        """Return a constant input of a node, None where it is absent.

        Raises:
            DataError: the input is computed at run time; the generated code needs it fixed.
        """
        name = node.input(index)
        if not name:
            return None
        value = self.graph.constant(name)
        if value is None:
            self.refuse(node, f"its {what} ('{name}') is computed at run time; it must be a constant")
        return value

    def refuse(self, node: Node, problem: str, cause: Exception | None = None) -> NoReturn:
        """Raise the error for a node that cannot be compiled."""
        where = f"Node '{node.name}' ({node.op}, opset {self.graph.opset})"
        raise DataError(f"{where} is not supported: {problem}.") from cause


def check_supported(graph: Graph) -> None:
    """Pass if every operator and data type can be compiled.

    Raises:
        DataError: names the first node that cannot, with its operator and opset.
    """
    for node in graph.nodes:
        problem = ""
        if node.op not in EMITTERS:
            problem = "the compiler does not know this operator"
        for name in [*node.inputs, *node.outputs]:
            if name and not is_supported(graph.dtype(name)):
                problem = problem or f"'{name}' has the data type {graph.dtype(name).name}"
        if problem:
            raise DataError(
                f"Node '{node.name}' ({node.op}, opset {graph.opset}) is not supported: {problem}."
            )
    for name in [*graph.inputs, *graph.outputs]:
        if not is_supported(graph.dtype(name)):
            raise DataError(
                f"Tensor '{name}' has the data type {graph.dtype(name).name}, which is not supported."
            )
