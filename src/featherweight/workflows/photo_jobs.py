"""Which pictures to enlarge and where each result goes: what can go wrong before the first pixel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featherweight.data.images import SUFFIXES as READABLE
from featherweight.data.images import readable
from featherweight.data.photo_files import MAX_SIDE, SUFFIXES, check_size
from featherweight.errors import DataError, UsageError, WriteError

FORMATS = {"jpeg": "JPEG", "jpg": "JPEG", "png": "PNG", "tiff": "TIFF", "tif": "TIFF", "webp": "WEBP"}
"""What `--format` takes -> the format."""

_OWN_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}


@dataclass(frozen=True)
class Job:
    """One picture to enlarge: its file, the result's, the result's format and its sides in pixels."""

    source: Path
    target: Path
    kind: str
    height: int
    width: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A picture that cannot be used, and why."""

    source: Path
    reason: str


def plan_jobs(
    inputs: Sequence[str | Path],
    out: str | Path | None,
    factor: float,
    kind: str | None = None,
    recursive: bool = False,
) -> tuple[list[Job], list[Failure]]:
    """Find the pictures and name their results.

    A result is called NAME_xFACTOR. It goes beside its picture; for a folder, into a new folder
    FOLDER_xFACTOR beside that; or into `out`, which may also name the one result of a single file.

    Args:
        inputs: files and folders.
        out: folder of the results, or the one result.
        factor: how many times the sides grow.
        kind: format of all results, None for each picture's own.
        recursive: take folders within folders too; results keep their place.

    Raises:
        UsageError: no input, an unknown format, a result that would replace an input, or two results of one
            name.
        DataError: a folder without a picture.
        WriteError: a result's folder cannot be written.
    """
    if not inputs:
        raise UsageError("No picture given. Expected files or folders.")
    given = [Path(entry) for entry in inputs]
    chosen = Path(out) if out is not None else None
    exact = chosen is not None and chosen.suffix.lower() in READABLE and not chosen.is_dir()
    if exact and (len(given) > 1 or given[0].is_dir()):
        raise UsageError(f"--out {chosen} names one file, but there are several pictures. Name a folder.")
    if kind is None and exact:
        assert chosen is not None
        kind = FORMATS.get(chosen.suffix.lower().lstrip("."))
        if kind is None:
            raise UsageError(f"Cannot write {chosen.suffix} files. Expected {', '.join(SUFFIXES.values())}.")
    jobs, failures = [], []
    for source, folder in _pictures(given, chosen, factor, recursive):
        try:
            jobs.append(_job(source, chosen if exact else None, folder, factor, kind))
        except DataError as error:
            failures.append(Failure(source, str(error)))
    _check_names(jobs)
    for folder in {job.target.parent for job in jobs}:
        _check_folder(folder)
    return jobs, failures


def _pictures(
    given: Iterable[Path], out: Path | None, factor: float, recursive: bool
) -> list[tuple[Path, Path]]:
    """Return each picture with the folder of its result."""
    found = []
    for entry in given:
        if not entry.is_dir():
            found.append((entry, out or entry.parent))
            continue
        base = out or entry.with_name(f"{entry.resolve().name}_x{factor:g}")
        files = sorted(
            path
            for path in (entry.rglob("*") if recursive else entry.iterdir())
            if path.suffix.lower() in READABLE
            and not path.name.startswith(".")
            and path.is_file()
            # what an earlier call wrote into a folder within is no input
            and not (base != entry and base.resolve() in path.resolve().parents)
        )
        if not files:
            deeper = "" if recursive else " Folders within it are searched with --recursive."
            raise DataError(f"{entry} holds no picture ({', '.join(sorted(READABLE)[:6])}, ...).{deeper}")
        found += [(path, base / path.relative_to(entry).parent) for path in files]
    return found


def _job(source: Path, exact: Path | None, folder: Path, factor: float, kind: str | None) -> Job:
    with readable(source) as image:
        own, width, height = image.format or "", image.width, image.height
        turned = image.getexif().get(0x0112, 1) in range(5, 9)
    if turned:
        height, width = width, height
    large = [max(1, round(side * factor)) for side in (height, width)]
    notes: list[str] = []
    result = kind or (own if own in SUFFIXES else "PNG")
    if kind is None and result != own:
        notes.append(f"{own} files are not written; the result is PNG.")
    if kind is None and max(large) > MAX_SIDE[result]:
        notes.append(f"{result} holds at most {MAX_SIDE[result]:,} pixels a side; the result is PNG.")
        result = "PNG"
    suffix = source.suffix if source.suffix.lower() in _OWN_SUFFIXES[result] else SUFFIXES[result]
    target = exact or folder / f"{source.stem}_x{factor:g}{suffix}"
    check_size(result, *large, target.name)
    return Job(source, target, result, height, width, tuple(notes))


def _check_names(jobs: Sequence[Job]) -> None:
    sources = {_key(job.source): job.source for job in jobs}
    taken: dict[str, Path] = {}
    for job in jobs:
        key = _key(job.target)
        if key in sources:
            raise UsageError(
                f"The result of {job.source} would replace the input {sources[key]}. Change --out."
            )
        if key in taken:
            raise UsageError(
                f"{taken[key]} and {job.source} would both become {job.target}. "
                "Enlarge them one by one, or into different folders."
            )
        taken[key] = job.source


def _key(path: Path) -> str:
    """One string for all names of a file, also on file systems that ignore capitals."""
    return os.path.realpath(path).casefold()


def _check_folder(folder: Path) -> None:
    """Pass if results can be written there; said before the first picture is computed, not after it.

    Raises:
        WriteError: they cannot.
    """
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise WriteError(
            f"Cannot write to {folder}: {nearest} is no writable folder. Choose another with --out."
        )
