"""Conversions between the row-major and the pixel layout, and borders of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.compiler.graph import Node
from featherweight.compiler.loops import copy
from featherweight.compiler.program import StepWriter, View

if TYPE_CHECKING:
    from featherweight.compiler.lower import Lowering

Border = tuple[int, int, int, int]
"""Pixels of zeros kept above, left, below and right."""

NO_BORDER: Border = (0, 0, 0, 0)


def _corner(view: View, border: Border) -> int:
    """Return the offset of the border's first element."""
    return view.offset - border[0] * view.strides[2] - border[1] * view.strides[3]


def _shape_struct(view: View, border: Border, stored: int, source: View | None = None, plane: int = 0) -> str:
    n, c, h, w = view.shape
    fields = {
        "images": n,
        "channels": c,
        "rows": h,
        "columns": w,
        "stored": stored,
        "top": border[0],
        "left": border[1],
        "bottom": border[2],
        "right": border[3],
        "pixel_image": view.strides[0],
        "pixel_row": view.strides[2],
        "pixel_column": view.strides[3],
        "x_image": source.strides[0] if source else 0,
        "x_row": source.strides[2] if source else 0,
        "plane": plane or h * w,
    }
    values = ", ".join(f".{name} = {value}" for name, value in fields.items())
    return f"static const fw_layout shape = {{{values}}};"


def _at_corner(view: View, border: Border) -> View:
    return View(view.storage, view.dtype, view.shape, view.strides, _corner(view, border))


def clear_border(lowering: Lowering, writer: StepWriter, view: View, border: Border) -> None:
    """Set the border around a pixel tensor to zero, at the start of the step that writes the inside."""
    lowering.program.need_header("vector.h")
    lowering.program.need_header("layout.h")
    lowering.program.need_header("border.h")
    start = writer.pointer(_at_corner(view, border), writes=True, restrict=False)
    with writer.single():
        writer.line(_shape_struct(view, border, view.strides[3]))
        writer.line(f"fw_clear_border(&shape, {start.var});")


def has_planes(view: View) -> bool:
    """Say whether each plane of an image lies row-major, and the planes evenly behind each other."""
    if view.pixel or len(view.shape) != 4:
        return False
    _, c, _, w = view.shape
    return view.strides[2:] == (w, 1) and view.strides[0] == c * view.strides[1]


def convert_to_pixel(lowering: Lowering, name: str, target: View, border: Border) -> None:
    """Emit a step that writes a tensor into `target`, the border around it included."""
    source = lowering.view(name)
    lowering.program.need_header("vector.h")
    lowering.program.need_header("layout.h")
    writer = lowering.start(Node("Convert", f"{name} to pixels", [name], [name]), "layout")
    if source.pixel and source.strides[3] == target.strides[3]:
        x = writer.pointer(source)
        y = writer.pointer(_at_corner(target, border), writes=True)
        writer.line(_shape_struct(target, border, target.strides[3], source))
        writer.line(f"fw_pad(&shape, {x.var}, {y.var}, tid, threads);")
        return
    rows = source if has_planes(source) else lowering.plain(name)
    x = writer.pointer(source if source.pixel else rows)
    if source.pixel:
        if any(border):
            clear_border(lowering, writer, target, border)
        copy(writer, x, writer.pointer(target, writes=True), target.shape)
        return
    y = writer.pointer(_at_corner(target, border), writes=True)
    plane = rows.strides[1] if has_planes(rows) else 0
    writer.line(_shape_struct(target, border, target.strides[3], plane=plane))
    writer.line(f"fw_to_pixel(&shape, {x.var}, {y.var}, tid, threads);")


def convert_to_plain(lowering: Lowering, name: str, source: View, target: View) -> None:
    """Emit a step that writes a tensor row-major into `target`, whose planes may lie apart."""
    pixel = source.pixel and target.dtype == "float32"
    writer = lowering.start(Node("Convert", f"{name} to rows", [name], [name]), "layout")
    x, y = writer.pointer(source), writer.pointer(target, writes=True)
    if not pixel or source.shape[1] < 4:
        copy(writer, x, y, source.shape)
        return
    lowering.program.need_header("vector.h")
    lowering.program.need_header("layout.h")
    writer.line(_shape_struct(source, NO_BORDER, source.strides[3], plane=target.strides[1]))
    writer.line(f"fw_from_pixel(&shape, {x.var}, {y.var}, tid, threads);")
