"""Time a network of ours against its peers on the CPU: the forward pass and a training step.

Peers are the implementations of timm and torchvision, where they have the network, and any class that is
named: `--peer PATH:MODULE:FACTORY` puts the folder PATH (a checkout of the official code, say) before the
import path, imports MODULE and calls FACTORY without arguments. Nothing is fetched. All contenders, each in
both memory layouts, run in turns; where our network can load the peer's weights it does, and the row says how
far the answers are apart.

    python benchmarks/models.py efficientformer_l1
    python benchmarks/models.py osnet_x0_25 --peer ../deep-person-reid:torchreid.models.osnet:osnet_x0_25
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from featherweight.errors import CheckpointError, FeatherweightError, UsageError
from featherweight.measure.latency import Latency
from featherweight.measure.machine import machine
from featherweight.registry import create_model
from side_by_side import CLOCKS, cells, in_turns, provenance, store

log = logging.getLogger("featherweight")

OURS = "featherweight"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TORCHVISION = {
    "mobilenetv2_100": "mobilenet_v2",
    "shufflenetv2_050": "shufflenet_v2_x0_5",
    "shufflenetv2_100": "shufflenet_v2_x1_0",
    "shufflenetv2_150": "shufflenet_v2_x1_5",
    "shufflenetv2_200": "shufflenet_v2_x2_0",
}
KEY = ("model", "pass", "batch", "threads", "system", "layout")
COLUMNS = (
    *KEY,
    *("input", "p50_ms", "low_ms", "high_ms", "clock", "runs", "times_as_fast", "weights", "difference"),
    *("date", "machine", "versions"),
)


@dataclass(frozen=True)
class Contender:
    """One implementation in one memory layout, and how it relates to our weights and answers."""

    system: str
    layout: str
    network: nn.Module
    weights: str
    difference: str

    @property
    def name(self) -> str:
        """The name in a table."""
        return f"{self.system} {self.layout}"

    def forward(self, images: Tensor) -> None:
        """Run the network in eval mode, without gradients."""
        self.network.eval()
        with torch.no_grad():
            self.network(images)

    def train(self, images: Tensor) -> None:
        """Run a step of SGD on the mean square of all answers."""
        self.network.train()
        # At a rate of 0 every turn has the same weights.
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0)
        optimizer.zero_grad()
        answers = tensors(self.network(images))
        torch.stack([answer.float().square().mean() for answer in answers]).sum().backward()
        optimizer.step()


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors inside whatever a network gives: a tensor, or a tuple, list or dictionary."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output or ()
    return [tensor for value in values for tensor in tensors(value)]


def library_peers(name: str) -> dict[str, nn.Module]:
    """Build the network in timm, if it has one of that name (underscores aside), and in torchvision."""
    peers: dict[str, nn.Module] = {}
    if importlib.util.find_spec("timm"):
        import timm

        same = (other for other in timm.list_models() if other.replace("_", "") == name.replace("_", ""))
        peers.update({f"timm/{other}": timm.create_model(other) for other in same})
    if name in TORCHVISION:
        peers[f"torchvision/{TORCHVISION[name]}"] = getattr(torchvision.models, TORCHVISION[name])()
    return peers


def named_peer(spec: str) -> tuple[str, nn.Module]:
    """Build the peer that `PATH:MODULE:FACTORY` names; return `MODULE:FACTORY` and the network.

    Raises:
        UsageError: the text has another form, the folder or the factory is missing, or it gives no network.
    """
    folder, *names = spec.rsplit(":", 2)
    if len(names) != 2 or not Path(folder).is_dir():
        raise UsageError(f"No peer in '{spec}'. Expected PATH:MODULE:FACTORY, where PATH is a folder.")
    sys.path.insert(0, str(Path(folder).resolve()))
    module, factory = names
    try:
        network = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"Cannot build the peer '{module}:{factory}': {error}.") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"'{module}:{factory}' gives {type(network).__name__}. Expected an nn.Module.")
    return f"{module}:{factory}", network


def share_weights(ours: nn.Module, peer: nn.Module) -> bool:
    """Load the peer's weights into our network, and tell whether they fitted."""
    try:
        ours.load_official(peer.state_dict())
    except CheckpointError as error:
        log.info("Each runs with its own weights. %s", error)
        return False
    return True


@torch.no_grad()
def difference(ours: nn.Module, peer: nn.Module, size: Sequence[int]) -> str:
    """Return the largest difference of the answers in eval mode, relative to the largest answer.

    Empty where the answers have different shapes: some official networks give features in eval mode.
    """
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    found, expected = (tensors(network.eval()(images))[0] for network in (ours, peer))
    if found.shape != expected.shape:
        return ""
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def line_up(name: str, peers: Mapping[str, nn.Module], size: Sequence[int]) -> list[Contender]:
    """Return ours and the peers, each in every layout that it runs in.

    The peers that come last give their weights to ours; an earlier one whose weights fit too keeps its own,
    which costs the same time.

    Args:
        name: our variant.
        peers: built peers by name.
        size: channels, height and width of an image.

    Raises:
        UsageError: no peer runs in any layout.
    """
    ours, said = create_model(name), {}
    for system, peer in peers.items():
        shared = share_weights(ours, peer)
        said[system] = ("shared", difference(ours, peer, size)) if shared else ("own", "")
    systems = {OURS: ours, **peers}
    contenders = []
    for system, network in systems.items():
        for layout, memory_format in LAYOUTS.items():
            contender = Contender(
                system, layout, _turned(network, memory_format), *said.get(system, ("", ""))
            )
            try:
                contender.train(torch.randn(2, *size).contiguous(memory_format=memory_format))
            except RuntimeError as error:
                log.warning("%s does not run: %s", contender.name, str(error).splitlines()[0])
            else:
                contenders.append(contender)
    if all(contender.system == OURS for contender in contenders):
        raise UsageError(f"No peer of {name} runs on images of {'x'.join(map(str, size))}.")
    return contenders


def _turned(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Copy a network and lay its kernels out; `Module.to` would refuse parameters of five dimensions."""
    turned = copy.deepcopy(network)
    for parameter in turned.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return turned


def measure(
    name: str,
    contenders: Sequence[Contender],
    size: Sequence[int],
    batches: Iterable[int],
    threads: Iterable[int],
    runs: int,
    seconds: float,
    clock: str,
) -> list[dict[str, Any]]:
    """Time all contenders in every cell of pass, batch and threads; one row for each.

    Batch norms see too little in a training step of a single image, so that cell is left out.
    """
    shared = {"model": name, "input": "x".join(map(str, size)), "clock": clock, **provenance()}
    cells = [(p, b, t) for p in ("forward", "train") for b in batches for t in threads]
    rows = []
    for which, batch, count in cells:
        if which == "train" and batch == 1:
            continue
        torch.set_num_threads(count)
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        turned = {layout: images.contiguous(memory_format=form) for layout, form in LAYOUTS.items()}
        jobs = {c.name: lambda c=c: getattr(c, which)(turned[c.layout]) for c in contenders}  # noqa: B023
        found = in_turns(jobs, runs, count, seconds, clock)
        cell = {**shared, "pass": which, "batch": batch, "threads": count}
        rows += _rows(cell, contenders, found)
        log.info("%s %s, batch %d, %d thread(s): %s", name, which, batch, count, verdict(found))
    return rows


def _rows(
    cell: Mapping[str, Any], contenders: Sequence[Contender], found: Mapping[str, Latency]
) -> list[dict[str, Any]]:
    peer = _quickest(found, ours=False)
    return [
        {
            **cell,
            **{"system": c.system, "layout": c.layout, "weights": c.weights, "difference": c.difference},
            **cells(found[c.name]),
            "times_as_fast": f"{peer.p50_ms / found[c.name].p50_ms:.3f}",
        }
        for c in contenders
    ]


def _quickest(found: Mapping[str, Latency], ours: bool) -> Latency:
    chosen = [latency for name, latency in found.items() if name.startswith(f"{OURS} ") == ours]
    return min(chosen, key=lambda latency: latency.p50_ms)


def verdict(found: Mapping[str, Latency]) -> str:
    """Compare our quicker layout with the quickest peer; overlapping intervals are no difference."""
    ours, peer = _quickest(found, ours=True), _quickest(found, ours=False)
    ratio = peer.p50_ms / ours.p50_ms
    apart = ours.interval[1] < peer.interval[0] or peer.interval[1] < ours.interval[0]
    return f"ours is {ratio:.2f} times as fast" if apart else f"no difference ({ratio:.2f})"


def show(rows: Iterable[Mapping[str, Any]], console: Console) -> None:
    """Print the rows as a table; "x" is how many times as fast as the quickest peer."""
    table = Table("pass", "batch", "threads", "contender", "ms", "95 %", "runs", "x", "weights", "difference")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in ("pass", "batch", "threads")),
            *(f"{row['system']} {row['layout']}", row["p50_ms"], f"{row['low_ms']} - {row['high_ms']}"),
            *(str(row[key]) for key in ("runs", "times_as_fast", "weights", "difference")),
        )
    console.print(table)


def main(
    model: Annotated[str, typer.Argument(help="One of our variants.")],
    peer: Annotated[list[str] | None, typer.Option(help="PATH:MODULE:FACTORY, may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images; 1 and 32 by default.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Of PyTorch; 1 and all by default.")] = None,
    side: Annotated[int | None, typer.Option(help="Of the image in pixels, in place of its own.")] = None,
    runs: Annotated[int, typer.Option(help="Turns at most.")] = 50,
    seconds: Annotated[float, typer.Option(help="Time for one cell, turns cut to five at least.")] = 120.0,
    clock: Annotated[str, typer.Option(help="wall, or cpu: for one thread on a busy machine.")] = "wall",
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results/models"),
) -> None:
    """Time a variant against its peers, print a table and store one CSV row per contender and cell."""
    console = Console()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        size = create_model(model).default_cfg["input_size"]
        size = (size[0], side, side) if side else size
        peers = library_peers(model) | dict(named_peer(spec) for spec in peer or ())
        if not peers:
            found = f"Neither timm nor torchvision has {model}"
            raise UsageError(f"{found}. Name a peer: --peer PATH:MODULE:FACTORY.")
        counts = threads or sorted({1, machine()["cores"]})
        if clock not in CLOCKS or (clock == "cpu" and max(counts) > 1):
            raise UsageError(f"Clock '{clock}' with {counts} threads. Expected wall, or cpu with one thread.")
        contenders = line_up(model, peers, size)
        rows = measure(model, contenders, size, batch or (1, 32), counts, runs, seconds, clock)
        path = store(out, rows, KEY, COLUMNS)
    except FeatherweightError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    show(rows, console)
    console.print(f"Stored in {path}")


if __name__ == "__main__":
    typer.run(main)
