"""Cards: what the papers claim and what our code counts, read from `<slug>.toml` beside each system.

Reading cards needs no torch, so that `featherweight list`, `show` and `systems` start at once. Three kinds of
figures are never mixed: *claimed* (by the paper, with the place), *counted* (exact, from our code; a test
asserts equality) and *measured* (by us, files under `benchmarks/results`, never in a card).
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import DataError, UsageError, close_matches

KINDS = {"op": "ops", "model": "models", "method": "methods"}
"""Kind of a system -> the folder it lives in."""

PACKAGE_ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Figure:
    """One published figure and where it stands; `confirmed=False` marks a figure nobody could check yet."""

    what: str
    value: float
    unit: str
    where: str
    data: str = ""
    confirmed: bool = True
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """Published weights: address, optional SHA-256 and the key layout that `load_official` expects."""

    url: str
    layout: str
    sha256: str = ""


@dataclass(frozen=True)
class Variant:
    """One named network (or operator) of a system, with its exact counts and published figures.

    `fused` are the counts after `fuse()`, where the network can be re-parameterised.
    """

    name: str
    input: tuple[int, ...] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    fused: Mapping[str, int] = field(default_factory=dict)
    claimed: tuple[Figure, ...] = ()
    explain: tuple[str, ...] = ()
    weights: tuple[Weights, ...] = ()
    num_classes: int = 1000
    summary: str = ""


@dataclass(frozen=True)
class Search:
    """How `fit` may scale a network: variants, width multipliers, input sides in pixels, and its recipe."""

    variants: tuple[str, ...] = ()
    widths: tuple[float, ...] = (1.0,)
    inputs: tuple[int, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """Everything known about one published system.

    `networks` is the module under `models/` that registers the card's variants, where the system itself is an
    operator: the published networks that are built with it.
    """

    slug: str
    kind: str
    task: str
    title: str
    paper: str
    summary: str
    official_repo: str
    official_licence: str
    module: str
    path: Path
    variants: Mapping[str, Variant] = field(default_factory=dict)
    claimed: tuple[Figure, ...] = ()
    unknown: tuple[str, ...] = ()
    search: Search | None = None
    networks: str = ""

    @property
    def module_name(self) -> str:
        """Dotted name of the module that implements the system, whether or not it exists yet."""
        return f"featherweight.{KINDS[self.kind]}.{self.module}"

    @property
    def module_path(self) -> Path | None:
        """File (or package) that implements the system; None while it is only planned."""
        return _module_file(PACKAGE_ROOT / KINDS[self.kind], self.module)

    @property
    def networks_name(self) -> str:
        """Dotted name of the module that registers the variants, whether or not it exists yet."""
        return f"featherweight.models.{self.networks}" if self.networks else self.module_name

    @property
    def networks_path(self) -> Path | None:
        """File (or package) that registers the variants as networks; None for a bare operator or a plan."""
        if self.networks:
            return _module_file(PACKAGE_ROOT / "models", self.networks)
        return self.module_path if self.kind == "model" else None

    @property
    def networks_task(self) -> str:
        """What the networks are for; those built with an operator classify."""
        return "classify" if self.networks else self.task


def _module_file(folder: Path, name: str) -> Path | None:
    """Return the file of a module or package, None where there is none."""
    for path in (folder / f"{name}.py", folder / name / "__init__.py"):
        if path.exists():
            return path
    return None


def load_card(path: Path) -> Card:
    """Read one card.

    Raises:
        DataError: the file is not valid TOML, or a key is missing, unknown or of the wrong kind.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        system = dict(table.pop("system"))
        official = dict(system.pop("official"))
        claimed = _figures(system.pop("claimed", []))
        variants = {name: _variant(name, entry) for name, entry in table.pop("variant", {}).items()}
        search = _search(table.pop("search", None))
        if table:
            raise KeyError(f"unknown table [{next(iter(table))}]")
        if system["kind"] not in KINDS:
            raise KeyError(f"kind '{system['kind']}', expected one of {', '.join(KINDS)}")
        system["unknown"] = tuple(system.pop("unknown", ()))
        return Card(
            **{"module": path.stem, **system},
            official_repo=official.get("repo", ""),
            official_licence=official.get("licence", ""),
            path=path,
            variants=variants,
            claimed=claimed,
            search=search,
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"Card {path} cannot be read: {error}. See CONTRIBUTING.md for the format."
        ) from error


@functools.cache
def all_cards() -> Mapping[str, Card]:
    """Return every card by slug, in alphabetical order."""
    paths = [path for folder in KINDS.values() for path in (PACKAGE_ROOT / folder).glob("*.toml")]
    return {card.slug: card for card in sorted(map(load_card, paths), key=lambda card: card.slug)}


def get_card(slug: str) -> Card:
    """Return the card of one system.

    Raises:
        UsageError: no system has this slug.
    """
    cards = all_cards()
    if slug not in cards:
        raise UsageError(f"No system '{slug}'.{close_matches(slug, cards)} See: featherweight systems")
    return cards[slug]


def _figures(entries: list[dict[str, Any]]) -> tuple[Figure, ...]:
    return tuple(Figure(**entry) for entry in entries)


def _variant(name: str, entry: dict[str, Any]) -> Variant:
    values = dict(entry)
    values["input"] = tuple(values.get("input", ()))
    values["claimed"] = _figures(values.get("claimed", []))
    values["explain"] = tuple(values.get("explain", ()))
    values["weights"] = tuple(Weights(**weights) for weights in values.get("weights", ()))
    return Variant(name=name, **values)


def _search(entry: dict[str, Any] | None) -> Search | None:
    if entry is None:
        return None
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Search(**values)
