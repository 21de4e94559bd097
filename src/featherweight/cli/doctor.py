"""`featherweight doctor`: what is installed, and whether it works together."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, print_json, print_table, print_text


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Read versions only; do not try to import torch and torchvision.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check what is installed and works together.

    The exit code is 5 when something required is missing or broken.
    """
    from featherweight.workflows.doctor import examine

    found = examine(quick=quick)
    if json:
        print_json(found)
    else:
        print_text(f"Python {found['python']} on {found['platform']}")
        print_text(f"Processor: {found['cpu']['model']}, {found['cpu']['cores']} cores")
        print_text(f"Features: {', '.join(found['cpu']['features']) or 'none known'}\n")
        print_table(
            ("package", "installed", "needed", "state"),
            [(p["name"], p["version"] or "-", p["needed"] or "any", p["state"]) for p in found["packages"]],
        )
        print_text("")
        print_table(
            ("optional part", "state", "install"),
            [
                (e["name"], e["state"], "" if e["state"] == "present" else e["install"])
                for e in found["extras"]
            ],
        )
        print_text("\n" + ("\n".join(f"Problem: {p}" for p in found["problems"]) or "No problem found."))
    if found["problems"]:
        raise typer.Exit(5)
