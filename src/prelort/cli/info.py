"""``prelort methods | config``: what to choose from."""

from __future__ import annotations

import sys

from prelort.cli.screen import wide_console


def methods() -> None:
    """List the methods with their papers."""
    from rich.table import Table

    from prelort.methods import REGISTRY

    table = Table("method", "summary", "paper")
    for name, method in REGISTRY.items():
        table.add_row(f"[bold]{name}[/bold]", method.summary, method.paper)
    wide_console().print(table)


def config() -> None:
    """Print the embedded default configuration, a start for your own."""
    from prelort.config import EMBEDDED_FILE

    sys.stdout.write(EMBEDDED_FILE.read_text(encoding="utf-8"))
