"""Every file, module and configuration key that the documentation names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from prelort.config import Config

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prelort"
TEMPLATE = SOURCE / "deployment" / "template"
"""`prelort new` copies its files, which the documentation names as they are there."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "src|tests|docs|benchmarks|examples|scripts"
SECTIONS = "|".join(Config.model_fields)
PACKAGES = "|".join(path.parent.name for path in SOURCE.glob("*/__init__.py"))

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(rf"(?<![\w./@:-])(?:{FOLDERS})/[\w./*-]*[\w*/]")
MODULE_FILE = re.compile(r"(?<![\w./@:-])\w+(?:/\w+)+\.py\b")
DOTTED = re.compile(
    rf"(?<![\w./:-])(?:prelort|{SECTIONS}|{PACKAGES})(?:\.[A-Za-z_]\w*)+(?![\w/:(-])"
)
SUFFIXES = {"csv", "html", "jsonl", "json", "md", "png", "py", "sh", "svg", "toml", "txt"}


def missing_in(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    code = " ".join(CODE.findall(text))
    links = [link for link in LINK.findall(text) if not re.match(r"https?:|mailto:", link)]
    files = {*FILE.findall(text)} | {*MODULE_FILE.findall(code)}
    return [
        *(link for link in links if not (page.parent / link).exists()),
        *(name for name in sorted(files) if not file_exists(name)),
        *(name for name in sorted({*DOTTED.findall(code)}) if not name_exists(name)),
    ]


def file_exists(name: str) -> bool:
    return any([*folder.glob(name.rstrip("/"))] for folder in (ROOT, TEMPLATE, SOURCE))


def name_exists(name: str) -> bool:
    """Whether it is a file of a run or a site, a configuration key, or a name in the package."""
    if name.rsplit(".", 1)[-1] in SUFFIXES:
        return True
    parts = name.split(".")
    return is_key(parts) or is_attribute(parts if parts[0] == "prelort" else ["prelort", *parts])


def is_key(parts: list[str]) -> bool:
    found: Any = Config
    for part in parts:
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            return str(found).startswith("dict")  # its keys are the user's
        if part not in found.model_fields:
            return False
        found = found.model_fields[part].annotation
    return True


def is_attribute(parts: list[str]) -> bool:
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:number]))
            except ImportError:
                return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing_in(page) == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[gone](gone.md) `tests/gone.py`, `training/gone.py`, `prelort.gone.now`, `data.gone`\n"
        "    python benchmarks/gone.py\n"
        "`tests/test_config.py` `adapters/algebra.py` `prelort.methods.build` `data.source` "
        "`method.options.hetlora.gamma` `scripts/run.sh` `training.local.train`\n"
    )
    missing = ["gone.md", "benchmarks/gone.py", "tests/gone.py", "training/gone.py"]
    assert missing_in(page) == [*missing, "data.gone", "prelort.gone.now"]
