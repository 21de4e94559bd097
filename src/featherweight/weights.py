"""Reading, fetching and loading weights: safetensors, and foreign `.pt` files without running pickles."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from featherweight.errors import CheckpointError, UsageError
from featherweight.files import cache_folder

if TYPE_CHECKING:
    from torch import nn

    from featherweight.cards import Variant
    from featherweight.cards import Weights as WeightsEntry

logger = logging.getLogger("featherweight")

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30

Progress = Callable[[int, int | None], None]
"""Called with the bytes there are and the bytes expected (None when the server does not say)."""


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into a dictionary, possibly a training checkpoint that wraps the weights.

    Args:
        path: a `.safetensors` file, or a file of `torch.save`, read with `weights_only=True`.

    Raises:
        CheckpointError: the file is missing, corrupt, or would run code when loaded.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No checkpoint at {path}. Expected a .safetensors or .pt file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no plain set of weights: loading it could run code, so it was refused. "
            "Convert it to safetensors where you trust it."
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no readable checkpoint: {reason}. It may be cut off.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}. Expected a dictionary of weights.")
    return state


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint into `model`: our own keys, or any layout its `load_official` knows.

    Raises:
        CheckpointError: the file is unreadable or unsafe, or belongs to another network.
    """
    state = read_state_dict(path)
    if hasattr(model, "load_official"):
        model.load_official(state)
        return
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {error}") from error


def load_official(model: nn.Module, source: str | Path | Mapping[str, Any]) -> nn.Module:
    """Load official weights, every one of them, into a network of ours and return it.

    Args:
        model: a network that knows its official layout (has a method `load_official`).
        source: a file, or an opened checkpoint.

    Raises:
        UsageError: the network knows no official layout.
        CheckpointError: the file is unreadable or unsafe, or belongs to another network.
    """
    if not hasattr(model, "load_official"):
        raise UsageError(f"{type(model).__name__} knows no official weights. Use its load_state_dict().")
    model.load_official(read_state_dict(source) if isinstance(source, str | Path) else source)
    return model


def load_pretrained(model: nn.Module, variant: Variant, progress: Progress | None = None) -> Path:
    """Load the published weights of a card's variant, from the cache or downloaded; return their file.

    The classifier stays fresh where the number of classes differs, and the first convolution adapts to
    another number of input channels. The card's sources are tried in order.

    Raises:
        UsageError: the card lists no weights for this variant.
        CheckpointError: no source can be reached, or the weights are not those of this network.
    """
    if not variant.weights:
        raise UsageError(f"'{variant.name}' has no published weights. Train it, or give checkpoint_path=.")
    failures = []
    for entry in variant.weights:
        try:
            path = fetch_weights(entry, progress)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        model.load_official(read_state_dict(path), adapt=True)
        return path
    raise CheckpointError(" ".join(failures))


def is_offline() -> bool:
    """Tell whether downloads are forbidden by `HF_HUB_OFFLINE`."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def fetch_weights(entry: WeightsEntry, progress: Progress | None = None) -> Path:
    """Return the file of published weights, downloading it once; a broken download resumes where it stopped.

    Raises:
        CheckpointError: offline, unreachable, or the checksum differs.
    """
    parts = urlparse(entry.url)
    # The address is part of the name: two sources may use one file name for different weights.
    tag = hashlib.sha256(entry.url.encode()).hexdigest()[:8]
    target = cache_folder("weights") / f"{tag}-{Path(unquote(parts.path)).name}"
    if target.is_file():
        return target
    if is_offline() and parts.scheme != "file":
        raise CheckpointError(
            f"{entry.url} is not in the cache ({target}) and HF_HUB_OFFLINE forbids downloads. "
            "Put the file there, or unset it."
        )
    part = target.with_name(target.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(entry.url, part, progress)
        _check_sha256(entry, part)
        os.replace(part, target)
    except OSError as error:
        raise CheckpointError(
            f"Cannot fetch {entry.url}: {getattr(error, 'reason', None) or error}. "
            f"Check the connection, or put the file at {target}."
        ) from error
    return target


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Append to `part` what is missing; a server without ranges makes it start again."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        # 416: nothing lies beyond what is there already; the checksum or the reader judges it.
        if error.code == 416 and have:
            return
        raise
    with response:
        if have and getattr(response, "status", None) != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        logger.info("fetching %s to %s", url, part)
        with part.open("ab" if have else "wb") as stream:
            while chunk := response.read(CHUNK_BYTES):
                stream.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes; the next call resumes")


def _check_sha256(entry: WeightsEntry, path: Path) -> None:
    """Compare with the card's SHA-256, which may be a prefix as in the file names of PyTorch's hub."""
    if not entry.sha256:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(entry.sha256.lower()):
        path.unlink()
        raise CheckpointError(
            f"{entry.url} has SHA-256 {found}, expected {entry.sha256}. The file was deleted; try again."
        )
