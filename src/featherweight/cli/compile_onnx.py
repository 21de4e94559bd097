"""`featherweight compile`: one C file and a library from an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from featherweight.cli.output import JsonOption, human, print_json, print_table, print_text


def compile_onnx(
    model: Annotated[Path, typer.Argument(help="The ONNX file.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the C source, the weights and the library.")],
    target: Annotated[
        str,
        typer.Option("--target", help="native, x86-64-v3, x86-64-v4, aarch64, wasm32 or generic-c."),
    ] = "native",
    threads: Annotated[int, typer.Option("--threads", help="Threads of the compiled network.")] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Size of a free first dimension.")] = 1,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="Whole shape of an input: image=1,3,224,224.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time the candidate tiles of each layer here.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare the outputs with onnxruntime's.")] = False,
    json: JsonOption = False,
) -> None:
    """Compile an ONNX file into a self-contained C source and a library.

    Layers are timed on this machine where the target runs on it.
    """
    from featherweight.workflows.compile import compile_and_check

    report = compile_and_check(
        model, out, target=target, threads=threads, batch=batch, shapes=shape or [], tune=tune, check=check
    )
    if json:
        print_json(report)
        return
    timed = "time_ms" in report
    sparse = any("break_even_zeros" in layer for layer in report["layers"])
    print_table(
        (
            *("layer", "operator", "kernel", ">MACs", ">ms", ">GMAC/s", ">of peak"),
            *((">zeros", ">break-even") if sparse else ()),
        ),
        [
            (
                layer["name"],
                layer["op"],
                layer["kernel"],
                human(layer["macs"]),
                f"{layer['time_ms']:.3f}" if timed else "-",
                f"{layer['gmacs_per_s']:.1f}" if timed and layer["macs"] else "-",
                f"{layer['share_of_peak']:.0%}" if "share_of_peak" in layer else "-",
                *(_sparsity(layer) if sparse else ()),
            )
            for layer in report["layers"]
        ],
    )
    print_text("")
    print_text(
        f"{out}: {report['steps']} steps, {human(report['macs'])} MACs, "
        f"{report['weights_bytes'] / 1e6:.2f} MB weights, {report['arena_bytes'] / 1e6:.2f} MB arena"
        + (f", {report['time_ms']:.2f} ms" if timed else "")
    )
    if "max_relative_error" in report:
        print_text(
            f"Largest difference from onnxruntime: {report['max_relative_error']:.2g} of the largest output."
        )


def _sparsity(layer: dict[str, Any]) -> tuple[str, str]:
    """Return the share of zero weights, and that from which on they are skipped; "~" marks a modelled one."""
    if "break_even_zeros" not in layer:
        return "-", "-"
    mark = "" if layer["break_even_by"] == "measured" else "~"
    return f"{layer['zeros']:.0%}", f"{mark}{layer['break_even_zeros']:.0%}"
