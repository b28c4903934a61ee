"""Estimates as a table to read and as values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from prelort.planning.memory import Estimate
from prelort.planning.sizes import show


def estimates_table(estimates: Sequence[Estimate], budget: int, title: str) -> Table:
    """One row a rank."""
    parts = ("weights", "adapter", "gradients", "optimiser", "activations", "total")
    table = Table(title=title)
    for column in ("rank", *parts, "sent a round", "fits"):
        table.add_column(column, justify="right" if column != "fits" else "left")
    for estimate in estimates:
        sizes = [show(getattr(estimate, part)) for part in (*parts, "sent")]
        fits = "[green]yes[/green]" if estimate.total <= budget else "[red]no[/red]"
        table.add_row(f"[bold]{estimate.rank}[/bold]", *sizes, fits)
    return table


def as_values(
    estimates: Sequence[Estimate], budget: int, largest: Estimate | None
) -> dict[str, Any]:
    """Everything in bytes; ``largest_rank`` is null where not even rank 1 fits."""
    rows = [
        asdict(e) | {"total": e.total, "sent": e.sent, "fits": e.total <= budget} for e in estimates
    ]
    rank = largest.rank if largest is not None else None
    return {"memory": budget, "largest_rank": rank, "ranks": rows}


def conclusion(largest: Estimate, budget: int, where: str, most: int) -> str:
    """The largest rank that fits, in one sentence."""
    limit = " (the largest that was considered)" if largest.rank == most else ""
    return (
        f"The largest rank that fits into {show(budget)} ({where}) is {largest.rank}{limit}: "
        f"it needs {show(largest.total)} and sends {show(largest.sent)} a round."
    )
