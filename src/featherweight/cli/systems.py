"""`featherweight systems`: the catalogue of published systems and how far each one is."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def systems(
    kind: Annotated[str, typer.Option(help="Only this kind: op, model or method.")] = "",
    status: Annotated[
        str, typer.Option(help="Only this status: planned, implemented, verified, reproduced.")
    ] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the text of SYSTEMS.md.")] = False,
    json: JsonOption = False,
) -> None:
    """List the published systems and their statuses."""
    from featherweight.workflows.catalogue import system_rows, systems_markdown

    if markdown:
        print_text(systems_markdown())
        return
    rows = system_rows(kind, status)
    if json:
        print_json(rows)
        return
    print_table(
        ("system", "kind", "task", "status", "paper"),
        [(row["slug"], row["kind"], row["task"], row["status"], row["paper"]) for row in rows],
    )
    counts = {
        name: sum(row["status"] == name for row in rows) for name in dict.fromkeys(r["status"] for r in rows)
    }
    print_text(f"\n{len(rows)} systems: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
