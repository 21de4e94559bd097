"""Time each 1x1 layer of a network with mostly zero weights: our two forms, and torch's CSR product.

    python benchmarks/sparse_layers.py mobilenetv2_100 --zeros 0.8 --zeros 0.9

All layers stand side by side in one ONNX file, which is compiled twice, dense and sparse; a layer's time is
that of its step. torch multiplies its CSR matrix (MKL) with the dense map, without bias or activation. All
take turns, the least time of each counts. One thread.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from engine_files import input_shape, make_module
from featherweight.compiler import Session
from featherweight.compiler.alternatives import Alternatives
from featherweight.compiler.build import LIBRARY, build_library, target_named
from featherweight.compiler.driver import generate, random_inputs, write_files
from featherweight.compiler.tiles import Tiles
from featherweight.errors import FeatherweightError
from side_by_side import provenance, store

KEY = ("network", "layer", "zeros")
COLUMNS = (*KEY, "sparse_us", "dense_us", "torch_csr_us", "times_as_fast", "date", "machine", "versions")
FORMS = ("sparse", "dense", "torch_csr")
LEAST_PIXELS = 16


def layer_shapes(name: str) -> list[tuple[int, int, int, int]]:
    """Return (inputs, outputs, height, width) of the distinct 1x1 layers of a network."""
    model, found = make_module(name, "float32"), {}

    def note(module: torch.nn.Conv2d, given: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        if module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1):
            shape = (module.in_channels, module.out_channels, *given[0].shape[2:])
            if shape[2] * shape[3] >= LEAST_PIXELS:
                found[shape] = True

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(note)
    with torch.inference_mode():
        model(torch.zeros(1, *input_shape(model, name)))
    return list(found)


def side_by_side(shapes: list[tuple[int, int, int, int]], weights: list[np.ndarray]) -> onnx.ModelProto:
    """Return a model whose layers have nothing to do with each other."""
    nodes, inputs, outputs, constants = [], [], [], []
    for number, ((channels, filters, height, width), weight) in enumerate(zip(shapes, weights, strict=True)):
        nodes.append(helper.make_node("Conv", [f"x{number}", f"w{number}"], [f"y{number}"], name=f"{number}"))
        nodes.append(helper.make_node("Relu", [f"y{number}"], [f"z{number}"], name=f"relu {number}"))
        constants.append(numpy_helper.from_array(weight[:, :, None, None], f"w{number}"))
        kind = onnx.TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(f"x{number}", kind, [1, channels, height, width]))
        outputs.append(helper.make_tensor_value_info(f"z{number}", kind, [1, filters, height, width]))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def open_form(model: onnx.ModelProto, form: str, folder: Path) -> tuple[Session, dict[int, int]]:
    """Compile with every layer in one form; return the session and each layer's step."""
    target = target_named("native")
    compiled = generate(model, target, tiles=Tiles(alternatives=Alternatives(trial=form)))
    write_files(compiled, folder)
    build_library([folder / "model.c"], folder / LIBRARY, target)
    steps = {number: index for index, step in enumerate(compiled.program.steps) for _, number in step.timed}
    return Session(folder), steps


def compare(name: str, zeros: float, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each layer."""
    rng = np.random.default_rng(0)
    shapes = layer_shapes(name)
    weights = []
    for channels, filters, _, _ in shapes:
        weight = rng.standard_normal((filters, channels)).astype(np.float32)
        weights.append(weight * (np.abs(weight) > np.quantile(np.abs(weight), zeros)))
    maps = [torch.randn(shape[0], shape[2] * shape[3]) for shape in shapes]
    matrices = [torch.from_numpy(weight).to_sparse_csr() for weight in weights]
    best = np.full((3, len(shapes)), np.inf)
    with tempfile.TemporaryDirectory() as place:
        model = side_by_side(shapes, weights)
        ours = [open_form(model, form, Path(place) / form) for form in ("planar", "apart")]
        feeds = random_inputs(ours[0][0])
        for _ in range(repeats):
            for row, (session, steps) in enumerate(ours):
                times = session.time_steps(feeds, 2)
                best[row] = np.minimum(best[row], [times[steps[number]] for number in range(len(shapes))])
            for number, (matrix, image) in enumerate(zip(matrices, maps, strict=True)):
                start = time.perf_counter()
                matrix @ image
                best[2, number] = min(best[2, number], time.perf_counter() - start)
    origin = provenance(("featherweight", "torch"))
    return [
        {
            "network": name,
            "layer": f"{shape[0]}-{shape[1]} on {shape[2]}x{shape[3]}",
            "zeros": f"{zeros:.2f}",
            **{f"{what}_us": f"{best[row, number] * 1e6:.1f}" for row, what in enumerate(FORMS)},
            "times_as_fast": f"{best[2, number] / best[0, number]:.2f}",
            **origin,
        }
        for number, shape in enumerate(shapes)
    ]  # fmt: skip


def main(
    networks: Annotated[list[str] | None, typer.Argument(help="Names.")] = None,
    zeros: Annotated[list[float] | None, typer.Option(help="Shares of zeros.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results/sparse_layers"),
) -> None:
    """Time the layers, print a table and store the rows."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    console, rows = Console(), []
    try:
        for name in networks or ["mobilenetv2_100"]:
            for share in zeros or [0.8, 0.9]:
                rows += compare(name, share, repeats)
        path = store(out, rows, KEY, COLUMNS)
    except FeatherweightError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(error.exit_code) from error
    table = Table("layer", "zeros", "sparse, us", "dense, us", "torch CSR, us", "x")
    for row in rows:
        table.add_row(*(row[name] for name in COLUMNS[1:7]))
    console.print(table)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
