"""The import directions between packages (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "prelort"

# A package imports the packages listed here, itself and UNDER_ALL.
ALLOWED = {
    "adapters": set(),
    "aggregation": {"adapters"},
    "secure": set(),
    "methods": {"adapters", "aggregation"},
    "robustness": {"adapters", "methods"},
    "models": {"adapters"},
    "tasks": set(),
    "metrics": {"tasks", "training"},
    "privacy": {"adapters", "aggregation", "methods", "secure"},
    "training": {"adapters", "aggregation", "methods", "models", "privacy", "tasks"},
    "federation": {
        *("adapters", "aggregation", "methods", "metrics", "models", "privacy", "robustness"),
        *("secure", "tasks", "training"),
    },
    "data": {"tasks"},
    "diagnostics": {"adapters", "aggregation", "methods"},
    "report": {"data", "metrics", "tasks"},
    "planning": {"adapters", "data", "methods", "models", "privacy", "tasks", "training"},
    "experiment": {
        *("adapters", "aggregation", "data", "diagnostics", "federation", "methods", "metrics"),
        *("models", "planning", "privacy", "report", "tasks", "training"),
    },
    "study": {"experiment", "methods", "metrics", "report", "tasks"},
    "deployment": {
        *("data", "experiment", "federation", "planning", "report", "secure", "study", "training"),
    },
    "cli": {"deployment", "experiment", "methods", "planning", "report", "study", "tasks"},
}
CORE = {
    *("adapters", "aggregation", "methods", "models", "tasks", "metrics", "training"),
    *("federation", "privacy", "robustness", "secure"),
}
OPTIONAL = {
    *("report", "diagnostics", "planning", "deployment", "cli", "experiment", "study"),
}
UNDER_ALL = {
    "config",
    "config_reference",
    "errors",
    "events",
    "extensions",
    "files",
    "history",
    "hub",
    "library_logging",
    "seeds",
}


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
def test_a_package_imports_only_those_below_it(package: str) -> None:
    for file in (SOURCE / package).rglob("*.py"):
        unexpected = set(imported(file)) - ALLOWED[package] - UNDER_ALL - {package}
        assert not unexpected, file


def test_the_core_imports_no_optional_layer() -> None:
    assert not any(ALLOWED[package] & OPTIONAL for package in CORE)
    assert set(ALLOWED) == CORE | OPTIONAL | {"data"}


@pytest.mark.parametrize("module", sorted(UNDER_ALL))
def test_what_lies_under_all_imports_no_package(module: str) -> None:
    assert set(imported(SOURCE / f"{module}.py")) <= UNDER_ALL


def test_every_package_is_listed() -> None:
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == set(ALLOWED)


FLOWER = (SOURCE / "federation" / "flower.py", SOURCE / "deployment" / "flower_commands.py")


def test_only_two_files_import_flower() -> None:
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                assert file in FLOWER
