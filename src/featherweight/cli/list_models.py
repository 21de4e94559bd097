"""`featherweight list`: the networks and their published figures."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, human, print_json, print_table


def list_models(
    pattern: Annotated[str, typer.Argument(help="Shell pattern; a plain word matches anywhere.")] = "*",
    max_params: Annotated[str, typer.Option(help="At most this many parameters, such as 5M or 300k.")] = "",
    max_macs: Annotated[str, typer.Option(help="At most this many multiply-adds, such as 300M.")] = "",
    task: Annotated[str, typer.Option(help="Only networks for this task, such as classify.")] = "",
    planned: Annotated[bool, typer.Option("--planned", help="Include networks not built yet.")] = False,
    json: JsonOption = False,
) -> None:
    """List networks with their published figures.

    A claim with a question mark is one that nobody could confirm.
    """
    from featherweight.workflows.catalogue import model_rows

    rows = model_rows(pattern, task=task, max_params=max_params, max_macs=max_macs, planned=planned)
    if json:
        print_json(rows)
        return
    print_table(
        ("name", ">input", ">params", ">MACs", ">claimed", "status"),
        [
            (
                row["name"],
                "x".join(map(str, row["input"])) or "-",
                human(row["params"]),
                human(row["macs"]),
                row["claimed"] or "-",
                row["status"],
            )
            for row in rows
        ],
    )
