"""Exception classes of the library, each with the exit code that the command line returns for it.

A message says what was seen, what was expected and what to do, in that order and in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatherweightError(Exception):
    """Base of every error raised on purpose; on its own an internal failure (exit code 1)."""

    exit_code = 1


class UsageError(FeatherweightError):
    """The request itself is wrong: an unknown name, an option out of range (exit code 2)."""

    exit_code = 2


class WriteError(FeatherweightError, OSError):
    """A file cannot be written; an older one of that name is as it was (exit code 1)."""


class DataError(FeatherweightError):
    """Input data cannot be used: missing, unreadable, corrupt or unsafe (exit code 3)."""

    exit_code = 3


class CheckpointError(DataError):
    """A checkpoint or run folder is missing, corrupt or not safe to load (exit code 3)."""


class BudgetError(FeatherweightError):
    """No candidate meets the budget; the nearest artefact, if any, was still written (exit code 4)."""

    exit_code = 4


class MissingExtraError(FeatherweightError):
    """An optional part is not installed; the message names the extra (exit code 5)."""

    exit_code = 5

    @classmethod
    def for_extra(cls, what: str, extra: str) -> MissingExtraError:
        """Build the standard message: `what` needs the optional dependency group `extra`."""
        return cls(
            f"{what} needs the optional part '{extra}'. Install it: pip install 'featherweight[{extra}]'"
        )


def close_matches(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean a, b?"` for the known names nearest to `name`, or an empty string.

    >>> close_matches("mobilenet_v2", ["mobilenetv2_100", "simplenet_5m_m1"])
    ' Did you mean mobilenetv2_100?'
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
