"""Find a super-resolution network as an ONNX file, learn what it does, and open it on an engine.

A network of the registry becomes an ONNX file in the cache the first time; from then on neither torch nor a
connection is needed. A file of the user's own is taken as it is. Compiled networks are cached too, one for
each shape of tile.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import CheckpointError, DataError, FeatherweightError, UsageError, WriteError
from featherweight.files import cache_folder

if TYPE_CHECKING:
    import onnx

    from featherweight.export.restoration import Reach

log = logging.getLogger("featherweight")

ENGINES = ("auto", "compiled", "onnxruntime")
WORTH_COMPILING = 24
"""Tiles of one shape from which on `auto` compiles it: about what the C compiler's seconds cost."""

_EXPORT = "2"
"""Goes into the names of cached files; another number where the export changes."""

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


@dataclass(frozen=True)
class Restorer:
    """A network from an image to a larger one, as an ONNX file.

    Args:
        name: what the user called it.
        path: the ONNX file.
        scale: sides of the result over sides of the image.
        channels: 3 for RGB, 1 for luma.
        fixed: height and width that the file is made for, or None where any size will do.
        multiple: both sides must be a multiple of this many pixels.
        reach: how far an output pixel looks.
        bytes_per_pixel: memory of a run for each pixel of the image.
        input_name: of the file's input.
    """

    name: str
    path: Path
    scale: int
    channels: int
    fixed: tuple[int, int] | None
    multiple: int
    reach: Reach
    bytes_per_pixel: float
    input_name: str

    @property
    def margin(self) -> int:
        """Pixels by which tiles overlap on each side.

        The whole radius where it is short. What lies in the outer half of a long one hardly counts: with 32
        of CFSR's 63 pixels no value moves by more than 0.003 grey levels (docs/super-resolution.md).
        """
        radius = self.reach.radius
        return radius if radius <= 32 else max(32, math.ceil(radius / 2))


def find_restorer(model: str | Path, weights: Path | None = None) -> Restorer:
    """Return the network of a name from the registry, or of an ONNX file.

    Args:
        model: a name such as `cfsr_x4`, or a file.
        weights: official or own weights of a network from the registry (.pth or .safetensors); None takes
            the published ones.

    Raises:
        UsageError: no such network, or weights for an ONNX file.
        CheckpointError: the weights are missing, unsafe or those of another network.
        DataError: the ONNX file is no network from images to images.
    """
    if str(model).endswith(".onnx"):
        if weights is not None:
            raise UsageError(f"{model} holds its weights already. Leave --weights out.")
        return inspect_restorer(Path(model), str(model))
    return inspect_restorer(registry_onnx(str(model), weights), str(model))


def registry_onnx(name: str, weights: Path | None) -> Path:
    """Return the ONNX file of a network of the registry, made once for each set of weights.

    Raises:
        UsageError: the network is unknown, does something else, or has no published weights.
        CheckpointError: the weights cannot be had or read.
    """
    from featherweight.registry import card_of

    card = card_of(name)
    if card.networks_task != "restore":
        raise UsageError(f"'{name}' restores no images. See: featherweight list --task restore")
    if weights is not None:
        if not weights.is_file():
            raise CheckpointError(f"No weights at {weights}. Expected a .pth or .safetensors file.")
        with weights.open("rb") as stream:
            path = _cached_onnx(name, hashlib.file_digest(stream, "sha256").hexdigest())
        return path if path.is_file() else _export(name, weights, path)
    entries = card.variants[name].weights
    if not entries:
        raise UsageError(f"'{name}' has no published weights. Give your own: --weights FILE")
    from featherweight.weights import fetch_weights

    failures = []
    for entry in entries:
        path = _cached_onnx(name, hashlib.sha256(entry.url.encode()).hexdigest())
        if path.is_file():
            return path
        try:
            return _export(name, fetch_weights(entry), path)
        except CheckpointError as error:
            failures.append(str(error))
    raise CheckpointError(f"{' '.join(failures)} Or give a file: --weights FILE")


def inspect_restorer(path: Path, name: str) -> Restorer:
    """Read an ONNX file and try it on small images.

    Raises:
        DataError: it is unreadable, or no network from images in [0, 1] to images.
    """
    import onnx

    from featherweight.export.onnx import open_session
    from featherweight.export.restoration import bytes_per_pixel, find_reach

    session = open_session(path)
    inputs, proto = session.get_inputs(), onnx.load(path)
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or inputs[0].type != "tensor(float)" or shape[1] not in (1, 3):
        raise DataError(
            f"{path} takes {', '.join(f'{i.name} {i.type} {i.shape}' for i in inputs)}. "
            "Expected one float image (N, 1 or 3, H, W) with values from 0 to 1."
        )
    sides = [side if isinstance(side, int) else None for side in shape[2:]]
    fixed = None if None in sides else (int(sides[0]), int(sides[1]))
    reach = find_reach(proto)
    run = functools.partial(_output_shape, session, inputs[0].name, shape[1])
    scale, multiple = _scale_and_multiple(run, fixed, path)
    return Restorer(
        name,
        path,
        scale,
        shape[1],
        fixed,
        math.lcm(multiple, reach.stride) if fixed is None else 1,
        reach,
        bytes_per_pixel(proto),
        inputs[0].name,
    )


def _output_shape(session: Any, name: str, channels: int, height: int, width: int) -> tuple[int, ...] | None:
    """Return the shape of the output for an image of this size, None where the network refuses it."""
    try:
        return session.run(None, {name: np.zeros((1, channels, height, width), np.float32)})[0].shape
    except Exception:  # onnxruntime's own exceptions share no public base class
        return None


def _scale_and_multiple(
    run: Callable[[int, int], tuple[int, ...] | None], fixed: tuple[int, int] | None, path: Path
) -> tuple[int, int]:
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        height, width = fixed or (64 + multiple, 64 + 3 * multiple)
        shape = run(height, width)
        if shape is not None and len(shape) == 4:
            scale = shape[2] // height
            if scale >= 1 and shape[2:] == (height * scale, width * scale):
                return scale, multiple
        if fixed:
            break
    raise DataError(
        f"{path} gives {'an error' if shape is None else list(shape)} for an image of {height} x {width}. "
        "Expected an image of a whole multiple of both sides."
    )


class Runner:
    """Opens a restorer on an engine, and keeps what it opened.

    Args:
        restorer: the network.
        engine: one of `ENGINES`; `auto` compiles what pays, and runs the rest on onnxruntime.
        threads: of either engine.

    Raises:
        UsageError: the engine is unknown.
    """

    def __init__(self, restorer: Restorer, engine: str = "auto", threads: int = 1) -> None:
        if engine not in ENGINES:
            raise UsageError(f"Engine '{engine}' is unknown. Expected one of {', '.join(ENGINES)}.")
        self.restorer, self.engine, self.threads = restorer, engine, threads
        self.used: dict[str, int] = {}
        self._opened: dict[Any, Run] = {}

    def open(self, form: str, height: int, width: int, tiles: int) -> Run:
        """Return a function from inputs by name to the list of outputs.

        Args:
            form: `plain`, `shared` (averages over the map are inputs), `averages` (they are outputs too).
            height: of the tile, in pixels.
            width: of the tile, in pixels.
            tiles: how many of this shape will be run.

        Raises:
            MissingExtraError: the engine is `compiled` and there is no C compiler.
            DataError: the engine is `compiled` and an operator of the file is not supported.
        """
        key = (form, height, width)
        if key not in self._opened:
            self._opened[key] = self._choose(form, height, width, tiles)
        return self._opened[key]

    def _choose(self, form: str, height: int, width: int, tiles: int) -> Run:
        if form != "averages" and self.engine != "onnxruntime":
            folder = self._folder(form, height, width)
            if self.engine == "compiled" or tiles >= WORTH_COMPILING or folder.is_dir():
                try:
                    return self._count("compiled", self._compiled(form, height, width, folder))
                except FeatherweightError as error:
                    if self.engine == "compiled":
                        raise
                    log.info("%s runs on onnxruntime: %s", self.restorer.name, error)
        if (form,) not in self._opened:
            from featherweight.export.onnx import open_session

            session = open_session(self._proto(form).SerializeToString(), self.threads)
            self._opened[(form,)] = functools.partial(session.run, None)
        return self._count("onnxruntime", self._opened[(form,)])

    def _count(self, engine: str, run: Run) -> Run:
        def counted(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            self.used[engine] = self.used.get(engine, 0) + 1
            return run(feeds)

        return counted

    def _proto(self, form: str) -> onnx.ModelProto:
        import onnx

        from featherweight.export.restoration import with_averages, with_statistics

        proto = onnx.load(self.restorer.path)
        statistics = self.restorer.reach.statistics
        if form == "shared":
            return with_statistics(proto, statistics)
        return with_averages(proto, statistics) if form == "averages" else proto

    def _folder(self, form: str, height: int, width: int) -> Path:
        from featherweight.measure.machine import machine_id

        words = [_digest(self.restorer.path), form, f"{height}x{width}", str(self.threads), machine_id()]
        return cache_folder("restorers") / f"compiled-{hashlib.sha256(repr(words).encode()).hexdigest()[:16]}"

    def _compiled(self, form: str, height: int, width: int, folder: Path) -> Run:
        from featherweight.compiler import Session, compile_onnx

        if not folder.is_dir():
            proto = self._proto(form)
            shapes = {value.name: _shape(value, height, width) for value in proto.graph.input}
            log.info("compiling %s for tiles of %d x %d pixels", self.restorer.name, width, height)
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                made = Path(tempfile.mkdtemp(dir=folder.parent))
            except OSError as error:
                raise WriteError(
                    f"Cannot write to the cache {folder.parent}: {error.strerror}. Set FEATHERWEIGHT_CACHE."
                ) from error
            try:
                compile_onnx(proto, made, threads=self.threads, shapes=shapes)
                # Another process may have been quicker; its work is as good.
                if not folder.is_dir():
                    made.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        return functools.partial(Session(folder).run, None)


def _shape(value: onnx.ValueInfoProto, height: int, width: int) -> list[int]:
    """Return the whole shape of an input: the image, a mask of a coarser map, or a statistic."""
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    if value.name.startswith("statistic_"):
        return dims
    jump = int(value.name.removeprefix("mask_")) if value.name.startswith("mask_") else 1
    return [1, dims[1], -(-height // jump), -(-width // jump)]


def has_compiler() -> bool:
    """Tell whether a C compiler is there."""
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def _cached_onnx(name: str, digest: str) -> Path:
    return cache_folder("restorers") / f"{name}-{digest[:12]}-{_EXPORT}.onnx"


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _export(name: str, weights: Path, path: Path) -> Path:
    """Write a network of the registry with these weights as ONNX; the only step that needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise CheckpointError(f"{name} is not in the cache and torch, which makes it, is not installed.")
    from featherweight.export.restoration import export_restorer
    from featherweight.registry import create_model
    from featherweight.weights import read_state_dict

    log.info("exporting %s", name)
    model = create_model(name)
    model.load_official(read_state_dict(weights))
    export_restorer(model.eval().fuse(), path, model.in_chans)
    return path
