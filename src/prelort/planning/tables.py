"""Estimates as a table and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from prelort.planning.memory import Estimate
from prelort.planning.sizes import show


def estimates_table(estimates: Sequence[Estimate], budget: int, title: str) -> Table:
    """One row per rank."""
    parts = ("weights", "adapter", "optimiser", "activations", "total")
    table = Table(title=title)
    for column in ("rank", *parts, "sent per round", "fits"):
        table.add_column(column, justify="right" if column != "fits" else "left")
    for estimate in estimates:
        sizes = [show(getattr(estimate, part)) for part in (*parts, "sent")]
        fits = "[green]yes[/green]" if estimate.total <= budget else "[red]no[/red]"
        table.add_row(f"[bold]{estimate.rank}[/bold]", *sizes, fits)
    return table


def as_values(
    estimates: Sequence[Estimate], budget: int, largest: Estimate | None
) -> dict[str, Any]:
    """Sizes in bytes; ``largest_rank`` is None if not even rank 1 fits."""
    rows = [
        asdict(e) | {"total": e.total, "sent": e.sent, "fits": e.total <= budget} for e in estimates
    ]
    rank = largest.rank if largest is not None else None
    return {"memory": budget, "largest_rank": rank, "ranks": rows}


def conclusion(largest: Estimate, budget: int, where: str, max_rank: int) -> str:
    """The largest rank that fits, in one sentence."""
    limit = " (the largest considered)" if largest.rank == max_rank else ""
    return (
        f"The largest rank that fits into {show(budget)} ({where}) is {largest.rank}{limit}: "
        f"it needs {show(largest.total)} and sends {show(largest.sent)} per round."
    )
