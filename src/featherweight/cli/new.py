"""`featherweight new`: scaffold the files of one more system."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_text


def new(
    kind: Annotated[str, typer.Argument(help="op, model or method.")],
    slug: Annotated[str, typer.Argument(help="Lower-case name of the system, such as tinynet.")],
    root: Annotated[
        Path | None, typer.Option(help="Source checkout to write into; default: the one this runs from.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Scaffold the files of one more system.

    Writes a module, a card and a test that work from the first minute.
    """
    from featherweight.workflows.scaffold import next_steps, scaffold

    written = scaffold(kind, slug, root)
    if json:
        print_json({"kind": kind, "slug": slug, "files": [str(path) for path in written]})
        return
    print_text("\n".join(f"wrote {path}" for path in written))
    print_text("\n" + next_steps(kind, slug))
