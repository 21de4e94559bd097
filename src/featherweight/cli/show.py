"""`featherweight show`: all that is known about one network or system."""

from __future__ import annotations

from typing import Annotated

import typer

from featherweight.cli.output import JsonOption, human, print_json, print_table, print_text


def show(
    name: Annotated[str, typer.Argument(help="A network (mobilenetv2_100) or a system (mobilenetv2).")],
    json: JsonOption = False,
) -> None:
    """Show one network or system in full.

    Its paper, code, counts, claims, status and what is unknown.
    """
    from featherweight.workflows.catalogue import describe

    card = describe(name)
    if json:
        print_json(card)
        return
    print_text(f"{card['title']}\n{card['summary']}")
    print_text("")
    facts = ("slug", "kind", "task", "status", "paper", "official_code", "module")
    print_table(("fact", "value"), [(fact.replace("_", " "), str(card[fact] or "-")) for fact in facts])
    if card["variants"]:
        print_text("")
        print_table(
            ("variant", ">input", ">params", ">MACs"),
            [
                (v["name"], "x".join(map(str, v["input"])) or "-", human(v["params"]), human(v["macs"]))
                for v in card["variants"]
            ],
        )
    if card["claimed"]:
        print_text("")
        print_table(
            ("claimed by the paper", ">value", "of", "on", "where"),
            [
                (
                    f["what"] + ("" if f["confirmed"] else " (unconfirmed)"),
                    f"{f['value']:g} {f['unit']}",
                    f["variant"] or "-",
                    f["data"] or "-",
                    f["where"],
                )
                for f in card["claimed"]
            ],
        )
    if card["unknown"]:
        print_text("\nUnknown:\n" + "\n".join(f"- {line}" for line in card["unknown"]))
