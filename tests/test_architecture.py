"""Data flows one way: no package imports one that stands after it (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "prelort"

ALLOWED = {
    "adapters": set(),
    "methods": {"adapters"},
    "models": {"adapters"},
    "tasks": set(),
    "data": {"tasks"},
    "metrics": {"tasks"},
    "report": {"data", "metrics", "tasks"},
    "training": {"adapters", "methods", "models", "tasks"},
    "planning": {"adapters", "methods", "models", "tasks", "training"},
    "federation": {"adapters", "methods", "metrics", "models", "tasks", "training"},
    "experiment": {
        "adapters",
        "data",
        "federation",
        "methods",
        "metrics",
        "models",
        "planning",
        "report",
        "tasks",
        "training",
    },
    "study": {"experiment", "methods", "report", "tasks"},
    "deployment": {"data", "experiment", "federation", "planning", "report", "study"},
    "cli": {"deployment", "experiment", "methods", "planning", "report", "study"},
}
UNDER_ALL = {"config", "errors", "events", "files", "history", "library_logging", "seeds"}


def imported(file: Path) -> Iterator[str]:
    """The parts of prelort that a file imports, e.g. ``methods``."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "prelort":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prelort."):
            yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (parts[1] for parts in names if parts[0] == "prelort" and len(parts) > 1)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_stands_before_it(package: str) -> None:
    allowed = ALLOWED[package] | UNDER_ALL | {package}
    for file in (SOURCE / package).rglob("*.py"):
        assert set(imported(file)) <= allowed, file


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(ALLOWED)


def test_flower_is_touched_in_one_package_and_its_private_parts_in_one_file() -> None:
    for file in SOURCE.rglob("*.py"):
        names = [
            getattr(node, "module", None) or ""
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        ]
        if any(name.split(".")[0] == "flwr" for name in names):
            assert file == SOURCE / "federation" / "flower.py"
