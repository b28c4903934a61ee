"""A number by client and round as strips of cells: geometry for ``templates/heat.svg``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prelort.report.charts import Tick, linear_ticks

CELLS = 4000
"""The strips have so many cells, at most: rounds are joined until it does."""

ROWS = 100
STEPS = 8
CELL_HEIGHT = 13.0


@dataclass(frozen=True, slots=True)
class HeatCell:
    """A cell: its step from 0 (low) to `STEPS` - 1, None where there is no value."""

    x: float
    step: int | None
    failed: bool
    text: str


@dataclass(frozen=True, slots=True)
class HeatRow:
    """A client's cells."""

    y: float
    name: str
    cells: list[HeatCell]


@dataclass(frozen=True, slots=True)
class Heat:
    """A strip of cells a client, one a round (or a few rounds), darker for a higher value."""

    rows: list[HeatRow]
    columns: list[Tick]
    cell: float
    left: float
    width: float
    height: float
    low: str
    high: str
    any_failed: bool
    notes: list[str]
    summary: str
    cell_height: float = CELL_HEIGHT
    steps: int = STEPS


def heat_strip(
    values: Mapping[str, Mapping[int, float]],
    failed: Mapping[str, Sequence[int]],
    show: Callable[[float], str],
) -> Heat | None:
    """The strips of these clients in their order; None where none has a value or has failed.

    Rounds are joined (mean of the values) so that there are at most `CELLS` cells, and of
    many clients the first `ROWS` are shown.
    """
    names = list(values)[:ROWS]
    numbers = sorted({n for name in names for n in [*values[name], *failed.get(name, ())]})
    finite = sorted(v for name in names for v in values[name].values() if math.isfinite(v))
    if not numbers:
        return None
    joined = math.ceil((numbers[-1] - numbers[0] + 1) / max(20, CELLS // len(names)))
    bins = math.ceil((numbers[-1] - numbers[0] + 1) / joined)
    left = 16 + 6.6 * min(24, max(len(name) for name in names))
    cell = max(7.0, min(26.0, math.floor((1000 - left) / bins)))
    # One loss that exploded must not leave all others alike.
    low, high = (finite[0], finite[math.ceil(0.98 * (len(finite) - 1))]) if finite else (0.0, 0.0)
    rows = []
    for index, name in enumerate(names):
        cells = []
        for column in range(bins):
            first = numbers[0] + column * joined
            span = range(first, first + joined)
            some = [values[name][n] for n in span if n in values[name]]
            bad = [n for n in failed.get(name, ()) if n in span]
            if some or bad:
                x = round(left + column * cell, 1)
                cells.append(
                    HeatCell(
                        x, _step(some, low, high), bool(bad), _text(name, span, some, bad, show)
                    )
                )
        rows.append(HeatRow(index * CELL_HEIGHT, name, cells))
    columns = [
        Tick(left + (at - numbers[0] + 0.5) / joined * cell, f"{at:g}")
        for at in (linear_ticks(numbers[0], numbers[-1], 8) if len(numbers) > 1 else numbers)
        if at == int(at)
    ]
    notes = [f"Each cell is the mean of {joined} rounds."] if joined > 1 else []
    if len(values) > len(names):
        notes.append(f"The first {len(names)} of {len(values)} clients; the table has them all.")
    lost = sum(len(failed.get(name, ())) for name in names)
    return Heat(
        rows=rows,
        columns=columns,
        cell=cell,
        left=round(left, 1),
        width=round(left + bins * cell + 12, 1),
        height=len(names) * CELL_HEIGHT + 36,
        low=show(low) if finite else "–",
        high=show(high) + (" or more" if finite[-1] > high else "") if finite else "–",
        any_failed=lost > 0,
        notes=notes,
        summary=f"{len(names)} clients in rounds {numbers[0]} to {numbers[-1]}, losses from "
        f"{show(finite[0])} to {show(finite[-1])}, {lost} replies left out"
        if finite
        else f"{len(names)} clients, {lost} replies left out",
    )


def _step(values: Sequence[float], low: float, high: float) -> int | None:
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return None
    share = (sum(kept) / len(kept) - low) / (high - low) if high > low else 0.0
    return max(0, min(STEPS - 1, int(share * STEPS)))


def _text(
    name: str,
    span: range,
    values: Sequence[float],
    failed: Sequence[int],
    show: Callable[[float], str],
) -> str:
    kept = [value for value in values if math.isfinite(value)]
    parts = [show(sum(kept) / len(kept))] if kept else ["not finite"] if values else []
    if failed:
        parts.append("left out" if len(span) == 1 else f"{len(failed)} left out")
    rounds = f"round {span[0]}" if len(span) == 1 else f"rounds {span[0]} to {span[-1]}"
    return f"{name}, {rounds}: {', '.join(parts)}"
