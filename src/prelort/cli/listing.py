"""``prelort methods | config``: what there is to choose from."""

from __future__ import annotations

import sys

from prelort.cli.screen import wide_console


def methods() -> None:
    """List the methods: what each is, and its paper."""
    from rich.table import Table

    from prelort.methods import REGISTRY

    table = Table("method", "what it is", "paper")
    for name, method in REGISTRY.items():
        table.add_row(f"[bold]{name}[/bold]", method.summary, method.paper)
    wide_console().print(table)


def config() -> None:
    """Print the embedded default's configuration, to start your own from."""
    from prelort.config import EMBEDDED_FILE

    sys.stdout.write(EMBEDDED_FILE.read_text(encoding="utf-8"))
