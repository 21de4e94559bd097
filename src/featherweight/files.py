"""Writing files so that a crash, a kill or a full disk never leaves a half-written one behind."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file so that its old or its new content is there at any moment, never a part.

    Raises:
        FeatherweightError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a run folder is meant to be shared like any other file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise FeatherweightError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another folder."
        ) from error


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        FeatherweightError: the file cannot be written.
    """
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
