"""Scaffold one more system: its module, card and test, from templates that work from the first minute."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from featherweight.cards import KINDS, all_cards
from featherweight.errors import UsageError, close_matches
from featherweight.files import atomic_write
from featherweight.workflows.catalogue import source_root

_TEMPLATES = Path(__file__).parent / "templates"
_SLUG = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def scaffold(kind: str, slug: str, root: Path | None = None) -> list[Path]:
    """Write the three files of a new system and return their paths.

    Args:
        kind: `"op"`, `"model"` or `"method"`.
        slug: lower-case name, letters, digits and single underscores.
        root: source checkout; None takes the one this code runs from.

    Raises:
        UsageError: the kind or slug is not valid, the system exists, a file is in the way, or there is no
            checkout.
    """
    if kind not in KINDS:
        raise UsageError(f"No kind '{kind}'.{close_matches(kind, KINDS)} Known: {', '.join(KINDS)}")
    if not _SLUG.fullmatch(slug) or keyword.iskeyword(slug):
        raise UsageError(
            f"'{slug}' is no slug. Expected lower-case letters, digits and underscores, such as tinynet."
        )
    if slug in all_cards():
        raise UsageError(f"A system '{slug}' exists already. See: featherweight show {slug}")
    root = root or source_root()
    if root is None or not (root / "src" / "featherweight").is_dir():
        raise UsageError(f"{root or 'The installed package'} is no source checkout. Give one with --root.")
    folder = KINDS[kind]
    targets = {
        root / "src" / "featherweight" / folder / f"{slug}.py": f"{kind}.py.j2",
        root / "src" / "featherweight" / folder / f"{slug}.toml": f"{kind}.toml.j2",
        root / "tests" / folder / f"test_{slug}.py": f"{kind}_test.py.j2",
    }
    taken = [str(path) for path in targets if path.exists()]
    if taken:
        raise UsageError(f"{', '.join(taken)} exists already. Nothing was written; choose another slug.")
    for path, template in targets.items():
        atomic_write(path, _render(template, slug))
    return list(targets)


def next_steps(kind: str, slug: str) -> str:
    """Return what a developer does after scaffolding, as lines to print."""
    folder = KINDS[kind]
    conformance = " tests/conformance" if kind == "model" else ""
    return "\n".join(
        (
            "Next:",
            f"1. Fill in the card src/featherweight/{folder}/{slug}.toml: paper and claims.",
            f"2. Write src/featherweight/{folder}/{slug}.py; keep the docstring's sections.",
            f"3. Run: python -m pytest tests/{folder}/test_{slug}.py{conformance} -k {slug}",
            "4. Run: featherweight systems --markdown > SYSTEMS.md",
        )
    )


def _render(template: str, slug: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    camel = "".join(part.capitalize() for part in slug.split("_"))
    return environment.get_template(template).render(slug=slug, camel=camel)
