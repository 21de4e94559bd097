"""`featherweight reproduce`: show a paper's claim in miniature."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def reproduce(
    slug: Annotated[str, typer.Argument(help="A system with an entry; leave out to list them.")] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny subset, one seed, under two minutes; gives no verdict.")
    ] = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder holding the built-in data sets, offline.")
    ] = None,
    seed: Annotated[int, typer.Option(help="First of the seeds.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result; default: benchmarks/results/reproductions.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a paper's claim in miniature.

    Records the verdict, whatever it is.
    """
    from featherweight.workflows.reproduce import entries, record, run_entry

    if not slug:
        names = sorted(entries())
        print_json(names) if json else print_text("\n".join(names))
        return
    result = run_entry(slug, quick=quick, data_root=data_root, seed=seed, progress=_report)
    path = record(result, quick=quick, seed=seed, out=out)
    if json:
        print_json({**result.to_dict(), "file": str(path)})
        return
    print_text(f"Claim: {result.claim}\n")
    columns = list(result.rows[0])
    print_table(columns, [[str(row[column]) for column in columns] for row in result.rows])
    print_text(f"\nVerdict: {result.verdict}. {result.reason}\nRecorded in {path}")


def _report(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)
