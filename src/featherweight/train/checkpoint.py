"""Training state on disk: tensors as safetensors, everything else as JSON; atomic, checked, never pickle.

A state is `state-<step>.safetensors`, pointed to by `state.json`, which is written last and by rename.
Before that the old pointer becomes `state.previous.json`, so at any moment one complete state exists.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor

from ..errors import CheckpointError, WriteError
from ..files import TEMPORARY_SUFFIX, atomic_write

log = logging.getLogger("featherweight")

CURRENT, PREVIOUS = "state.json", "state.previous.json"
_FORMAT = 1
_LEFTOVERS = f".state*{TEMPORARY_SUFFIX}"


@dataclass(frozen=True)
class State:
    """A loaded state: its step, named tensors and JSON scalars."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


def write_run_file(path: Path, payload: bytes) -> None:
    """Write a file that a run needs to go on, atomically.

    Raises:
        CheckpointError: The disk is full or refuses the write; nothing is left behind, `path` is unchanged.
    """
    try:
        atomic_write(path, payload)
    except WriteError as error:
        if getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"Disk full while writing {path} ({len(payload)} bytes); the previous checkpoint is kept. "
                "Free some space and go on with --resume."
            ) from error
        raise CheckpointError(str(error)) from error


def _sync_folder(folder: Path) -> None:
    """Make the folder's renames durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically, and return the file's SHA-256.

    The bytes depend on names, types, shapes and values only, not on memory layout.
    """
    payload = serialise_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    write_run_file(path, payload)
    return hashlib.sha256(payload).hexdigest()


def load_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, checking its digest if one is given.

    Raises:
        CheckpointError: Missing, corrupt, or a pickle, which is never opened.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Cannot read checkpoint {path}: {error.strerror or error}.") from error
    if payload[:2] == b"PK" or payload[:1] == b"\x80":
        raise CheckpointError(f"{path} is a pickle, which can run code; refused. Expected safetensors.")
    if sha256 is not None and hashlib.sha256(payload).hexdigest() != sha256:
        raise CheckpointError(f"{path} is corrupt: its SHA-256 differs from the recorded one.")
    try:
        return parse_tensors(payload)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}).") from error


def save_state(folder: Path, step: int, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write the state of `step` into `folder`, keeping the one before it.

    Raises:
        CheckpointError: The disk is full or not writable; the state before stays in force.
    """
    folder = Path(folder)
    file = f"state-{step:09d}.safetensors"
    sha256 = save_tensors(folder / file, tensors)
    body = {"format": _FORMAT, "step": step, "file": file, "sha256": sha256, "scalars": dict(scalars)}
    pointer = json.dumps({"body": body, "digest": _digest(body)}).encode()
    current = folder / CURRENT
    staged = folder / f"{CURRENT}.new"
    write_run_file(staged, pointer)
    if current.exists() and _pointed_file(current) != file:
        os.replace(current, folder / PREVIOUS)
    os.replace(staged, current)
    _sync_folder(folder)
    _remove_stale(folder)


def _pointed_file(pointer: Path) -> str | None:
    """Return the tensor file that a pointer names, or None where it cannot be read."""
    try:
        return json.loads(pointer.read_text())["body"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove_stale(folder: Path) -> None:
    """Delete state files that no pointer names, and leftovers of killed writers."""
    named = {_pointed_file(folder / CURRENT), _pointed_file(folder / PREVIOUS)}
    for path in [*folder.glob("state-*.safetensors"), *folder.glob(_LEFTOVERS)]:
        if path.name not in named:
            with contextlib.suppress(OSError):
                path.unlink()


def clear_states(folder: Path) -> None:
    """Delete every state in `folder`, pointers first."""
    for pattern in ("state*.json*", "state-*.safetensors*", _LEFTOVERS):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def _load_pointer(pointer: Path) -> State:
    try:
        content = json.loads(pointer.read_text())
        body = content["body"]
        intact = content["digest"] == _digest(body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer} is not readable ({error}).") from error
    if not intact or body["format"] != _FORMAT:
        raise CheckpointError(f"{pointer} is corrupt or of another version.")
    tensors = load_tensors(pointer.parent / Path(body["file"]).name, body["sha256"])
    return State(body["step"], tensors, body["scalars"])


def load_state(folder: Path) -> State | None:
    """Return the newest intact state in `folder`, or None where there never was one.

    A corrupt state is reported as a warning and the one before it is used (and becomes the current one).

    Raises:
        CheckpointError: There are states, but none is intact.
    """
    folder = Path(folder)
    current, previous = folder / CURRENT, folder / PREVIOUS
    if not current.exists() and not previous.exists():
        return None
    problems = []
    for pointer in (current, previous):
        if not pointer.exists():
            continue
        try:
            state = _load_pointer(pointer)
        except CheckpointError as error:
            log.warning("%s Falling back to the checkpoint before it.", error)
            problems.append(str(error))
            continue
        if pointer is previous:
            os.replace(previous, current)
        return state
    raise CheckpointError(
        f"No intact checkpoint in {folder}: {' '.join(problems)} Start again without --resume, or elsewhere."
    )
