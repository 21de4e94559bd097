"""Where files go and how they are written: a crash, a kill or a full disk leaves none half-written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

from featherweight.errors import WriteError

TEMPORARY_SUFFIX = ".tmp"
_NAME_KEPT = 48
"""Characters of the name in the temporary one: at four bytes each they stay below a file system's 255."""


def cache_folder(kind: str) -> Path:
    """Return the folder for what can be fetched or measured again: `kind` below the user's cache folder.

    `FEATHERWEIGHT_CACHE` names another place than the system's. The folder need not exist yet.
    """
    chosen = os.environ.get("FEATHERWEIGHT_CACHE")
    root = Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("featherweight"))
    return root / kind


def atomic_write(path: str | Path, content: bytes | str) -> Path:
    """Write a file so that its old or its new content is there at any moment, never a part; return its path.

    Raises:
        WriteError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path = Path(path)
    raw = content.encode("utf-8") if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(TEMPORARY_SUFFIX, f".{path.name[:_NAME_KEPT]}.", path.parent)
        try:
            rest = memoryview(raw)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # mkstemp makes private files; a run folder is meant to be shared like any other file.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise WriteError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another folder."
        ) from error
    return path


def atomic_write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON, atomically, and return the path.

    Raises:
        WriteError: the file cannot be written; the old file is untouched.
    """
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
