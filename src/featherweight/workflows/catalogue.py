"""The catalogue: one row per network or system, with a status that is computed and never typed.

*planned*: there is a card. *implemented*: the module exists, so the conformance suite runs over it.
*verified*: `benchmarks/results/parity/<slug>.json` records that the system's parity tests passed, for the
code as it stands. *reproduced*: `benchmarks/results/reproductions/<slug>.json` also records that the paper's
claim held in miniature. Both files are written by programs (`benchmarks/record_parity.py`, `featherweight
reproduce`), never by hand.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from featherweight.cards import KINDS, PACKAGE_ROOT, Card, Figure, Variant, all_cards, get_card
from featherweight.errors import UsageError, close_matches
from featherweight.registry import list_models

STATUSES = ("planned", "implemented", "verified", "reproduced")
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9}


def source_root() -> Path | None:
    """Return the root of the source checkout, or None in an installed package."""
    root = PACKAGE_ROOT.parents[1]
    return root if (root / "pyproject.toml").exists() and (root / "reproductions").is_dir() else None


def results_folder() -> Path:
    """Return the folder of the recorded results: of the checkout, else the copy inside the package."""
    root = source_root()
    return root / "benchmarks" / "results" if root else PACKAGE_ROOT / "_results"


def code_digest(card: Card) -> str:
    """Return a digest of the system's code that comments, docstrings and layout do not change.

    A record of a passed test names the digest it was made for; after a change to the code it no longer
    counts.
    """
    if card.module_path is None:
        return ""
    files = [
        file
        for path in dict.fromkeys(filter(None, (card.module_path, card.networks_path)))
        for file in (sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path])
    ]
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documented and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def status_of(card: Card) -> str:
    """Return the status of a system, one of `STATUSES`."""
    if card.module_path is None:
        return "planned"
    parity = read_record("parity", card.slug)
    if not (parity.get("passed") and not parity.get("failed") and parity.get("code") == code_digest(card)):
        return "implemented"
    claim = read_record("reproductions", card.slug)
    holds = claim.get("verdict") == "holds" and not claim.get("quick")
    return "reproduced" if holds else "verified"


def read_record(folder: str, slug: str) -> dict[str, Any]:
    """Return one recorded result; an empty one where there is none or it cannot be read."""
    try:
        return json.loads((results_folder() / folder / f"{slug}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def system_rows(kind: str = "", status: str = "") -> list[dict[str, Any]]:
    """Return one row per system, by slug.

    Raises:
        UsageError: no such kind or status.
    """
    _check("kind", kind, KINDS)
    _check("status", status, STATUSES)
    rows = [
        {
            "slug": card.slug,
            "kind": card.kind,
            "task": card.task,
            "status": status_of(card),
            "title": card.title,
            "paper": card.paper,
            "official_code": card.official_repo,
            "licence": card.official_licence,
            "variants": len(card.variants),
        }
        for card in all_cards().values()
    ]
    return [row for row in rows if kind in ("", row["kind"]) and status in ("", row["status"])]


def model_rows(
    pattern: str = "*", task: str = "", max_params: str = "", max_macs: str = "", planned: bool = False
) -> list[dict[str, Any]]:
    """Return one row per network that matches, by name.

    Args:
        pattern: shell pattern; a plain word matches anywhere in the name.
        task: keep only this task.
        max_params: at most this many parameters, such as `"5M"`; networks without a count drop out.
        max_macs: at most this many multiply-adds at the published input.
        planned: include networks that are not built yet.

    Raises:
        UsageError: a limit is not a number, the task is unknown, or no network has such a name.
    """
    _check("task", task, {card.networks_task for card in all_cards().values() if card.variants})
    limits = {"params": parse_count(max_params), "macs": parse_count(max_macs)}
    names = list_models(pattern, task=task or None, implemented=not planned)
    known = list_models(implemented=False)
    if not names and not list_models(pattern, implemented=False):
        raise UsageError(
            f"No network matches '{pattern}'.{close_matches(pattern, known)} See: featherweight list"
        )
    cards = {name: card for card in all_cards().values() for name in card.variants}
    rows = [_model_row(cards[name], cards[name].variants[name]) for name in names]
    return [
        row
        for row in rows
        if all(limit is None or (row[key] is not None and row[key] <= limit) for key, limit in limits.items())
    ]


def describe(name: str) -> dict[str, Any]:
    """Return all that is known about a system, or about one network of it.

    Raises:
        UsageError: neither a system nor a network has this name.
    """
    cards = all_cards()
    owners = {variant: card for card in cards.values() for variant in card.variants}
    if name not in cards and name not in owners:
        known = [*owners, *cards]
        raise UsageError(
            f"No network or system '{name}'.{close_matches(name, known)} See: featherweight list"
        )
    card = owners[name] if name in owners else get_card(name)
    chosen = [card.variants[name]] if name in owners else list(card.variants.values())
    claimed = [_figure(figure, variant.name) for variant in chosen for figure in variant.claimed]
    return {
        "slug": card.slug,
        "kind": card.kind,
        "task": card.task,
        "title": card.title,
        "summary": card.summary,
        "paper": card.paper,
        "official_code": " ".join(
            filter(None, (card.official_repo, f"({card.official_licence or 'no licence'})"))
        ),
        "status": status_of(card),
        "module": card.module_name if card.module_path else "",
        "variants": [_model_row(card, variant) for variant in chosen],
        "claimed": [*([] if name in owners else [_figure(f, "") for f in card.claimed]), *claimed],
        "unknown": list(card.unknown),
        "parity": read_record("parity", card.slug),
        "reproduction": read_record("reproductions", card.slug),
    }


def systems_markdown() -> str:
    """Return the text of `SYSTEMS.md`: one row per system, and the recorded verdicts."""
    rows = system_rows()
    counts = ", ".join(f"{sum(row['status'] == name for row in rows)} {name}" for name in STATUSES)
    lines = [
        "# Systems",
        "",
        "Written by `featherweight systems --markdown > SYSTEMS.md`; do not edit. The status is computed:",
        "*planned* (a card) → *implemented* (the module exists, the conformance suite runs over it) →",
        "*verified* (recorded parity with the official network or an independent reference) →",
        "*reproduced* (recorded verdict that the paper's claim holds in miniature).",
        "",
        f"{len(rows)} systems: {counts}.",
        "",
        "| system | kind | task | paper | official code | licence | variants | status |",
        "|---|---|---|---|---|---|--:|---|",
    ]
    for row in rows:
        title = row["title"].replace("|", "\\|")
        cells = (
            f"`{row['slug']}`: {title}",
            row["kind"],
            row["task"],
            row["paper"],
            row["official_code"] or "none",
        )
        lines.append(
            f"| {' | '.join(cells)} | {row['licence'] or '-'} | {row['variants']} | {row['status']} |"
        )
    lines += _verdict_lines(row["slug"] for row in rows)
    return "\n".join(lines) + "\n"


def parse_count(text: str) -> float | None:
    """Read a count such as `5M`, `300k` or `1200`; None for an empty text.

    Raises:
        UsageError: not a count.

    >>> parse_count("5M"), parse_count("300k"), parse_count("")
    (5000000.0, 300000.0, None)
    """
    if not text:
        return None
    scale = _SUFFIXES.get(text[-1].lower(), 1.0)
    try:
        value = float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise UsageError(f"'{text}' is not a count. Expected a number such as 5M, 300k or 1200.")
    return value


def _verdict_lines(slugs: Any) -> list[str]:
    lines = []
    for slug in slugs:
        record = read_record("reproductions", slug)
        if record:
            lines.append(f"| `{slug}` | {record['claim']} | {record['verdict']} | {record['date'][:10]} |")
    if not lines:
        return []
    head = [
        "",
        "## Claims reproduced in miniature",
        "",
        "| system | claim | verdict | date |",
        "|---|---|---|---|",
    ]
    return [*head, *lines]


def _model_row(card: Card, variant: Variant) -> dict[str, Any]:
    top1 = next((figure for figure in variant.claimed if figure.what == "top1"), None)
    best = top1 or next(iter(variant.claimed), None)
    return {
        "name": variant.name,
        "system": card.slug,
        "task": card.task,
        "input": list(variant.input),
        "params": variant.counted.get("params"),
        "macs": variant.counted.get("macs"),
        "claimed": _short(best) if best else "",
        "claimed_confirmed": best.confirmed if best else None,
        "status": status_of(card),
    }


def _short(figure: Figure) -> str:
    unit = figure.unit if figure.unit == "%" else f" {figure.unit}".rstrip()
    mark = "" if figure.confirmed else "?"
    return f"{figure.what} {figure.value:g}{unit}{mark}"


def _figure(figure: Figure, variant: str) -> dict[str, Any]:
    keys = ("what", "value", "unit", "where", "data", "confirmed", "note")
    return {"variant": variant, **{key: getattr(figure, key) for key in keys}}


def _check(what: str, value: str, known: Any) -> None:
    if value and value not in known:
        raise UsageError(
            f"No {what} '{value}'.{close_matches(value, known)} Known: {', '.join(sorted(known))}"
        )
