"""How results reach stdout: JSON for programs, tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

PIPE_WIDTH = 160
"""Columns of a table whose reader is not a terminal, so that `grep` sees whole lines."""


def print_json(data: Any) -> None:
    """Print `data` as indented JSON on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; a column whose name starts with `>` is aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        numeric = column.startswith(">")
        table.add_column(
            column.lstrip(">"), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_text(text: str) -> None:
    """Print plain lines on stdout, as they are."""
    sys.stdout.write(text.rstrip("\n") + "\n")


def human(number: float | None) -> str:
    """Write a count in at most five characters, or a dash where there is none.

    >>> human(3_504_872), human(612), human(None)
    ('3.50M', '612', '-')
    """
    if number is None:
        return "-"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}" if number / limit >= 10 else f"{number / limit:.2f}{unit}"
    return f"{number:g}"


def _console() -> Any:
    from rich.console import Console

    # markup off: a class or file name may hold square brackets
    return Console(
        markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH
    )


def print_renderable(table: Any) -> None:
    """Print a table that another part of the library built."""
    _console().print(table)
