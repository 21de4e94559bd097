"""Imports point down, never up: the floors of the house, held over every import, the lazy ones too."""

import ast
from pathlib import Path

import pytest

import featherweight.cards as cards_module

ROOT = Path(cards_module.__file__).resolve().parent
FLOORS = {
    name: floor
    for floor, names in enumerate(
        (
            ("errors",),
            ("cards", "files"),
            ("weights",),
            ("registry",),
            ("blocks",),
            ("ops",),
            ("models", "methods", "data"),
            ("train", "shrink", "export", "measure"),
            ("report",),
            ("workflows",),
            ("cli",),
        )
    )
    for name in names
}
SYSTEM_FOLDERS = ("ops", "models", "methods")
PRIVATE_TO_ITSELF = ("compiler",)
"""Stands beside the floors: imports nothing of the house but errors."""

OPEN_TO_ALL = (("compiler", "build"),)
"""Calls the C compiler for whoever has C kernels of their own."""

LAZY_LOADERS = ("__init__", "webapp")
FILES = sorted(path for path in ROOT.rglob("*.py") if "templates" not in path.parts)


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports_of(path: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Every import of the house's own modules in a file, as (line, dotted parts below featherweight)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = []
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = ("featherweight", *parts[: len(parts) - node.level], *base)
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found += [(node.lineno, name[1:]) for name in names if name[0] == "featherweight" and name[1:]]
    return found


def is_allowed(source: tuple[str, ...], target: tuple[str, ...]) -> bool:
    if source[0] in PRIVATE_TO_ITSELF:
        return target[0] in (source[0], "errors")
    if source[0] in SYSTEM_FOLDERS and target[0] == source[0]:
        return len(target) < 2 or target[1] == source[1]
    if source[0] == target[0]:
        return True
    if target[0] in PRIVATE_TO_ITSELF:
        return target[:2] in OPEN_TO_ALL or FLOORS[source[0]] >= FLOORS["export"]
    return target[0] not in FLOORS or FLOORS[target[0]] < FLOORS[source[0]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    source = module_of(path)
    if source[0] in LAZY_LOADERS:
        return
    assert source[0] in (*FLOORS, *PRIVATE_TO_ITSELF), f"{source[0]} stands on no floor; see docs/DESIGN"
    wrong = [f"line {n}: {'.'.join(t)}" for n, t in imports_of(path) if not is_allowed(source, t)]
    assert not wrong, f"{'.'.join(source)} must not import: {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        (("models", "a"), ("blocks", "conv"), True),
        (("blocks", "conv"), ("models", "a"), False),
        (("models", "a"), ("models", "b"), False),
        (("models", "a"), ("models", "a", "part"), True),
        (("train", "loop"), ("data", "sources"), True),
        (("train", "loop"), ("shrink", "fold"), False),
        (("models", "a"), ("data", "images"), False),
        (("compiler", "graph"), ("cards",), False),
        (("compiler", "graph"), ("errors",), True),
        (("cards",), ("registry",), False),
    ],
)
def test_the_rule_itself(source, target, allowed):
    assert is_allowed(source, target) is allowed


def test_cards_and_registry_need_no_torch():
    for name in ("cards", "errors", "registry", "weights", "files"):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "torch" not in ast.unparse(ast.Module(top, [])), name
