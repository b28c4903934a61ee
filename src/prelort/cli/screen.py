"""Consoles, warnings, and texts that are not markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

PACKAGE = Path(__file__).parents[1]


WIDE = 400
"""Columns of a file or a pipe: no interval of a table is broken."""


def wide_console() -> Console:
    """Standard output; wide enough for the tables where it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print our warnings in one line, and no library's."""
    if category is UserWarning and not from_library(str(where[0]) if where else ""):
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {escaped(message)}", soft_wrap=True)


def from_library(filename: str) -> bool:
    """Whether a file belongs to a library, which may stand in a folder of our name."""
    ours = Path(filename).is_relative_to(PACKAGE)
    return "site-packages" in filename and not ours


def escaped(text: object) -> str:
    """The text with its square brackets escaped: they are not markup."""
    from rich.markup import escape

    return escape(str(text))
