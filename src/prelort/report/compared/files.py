"""The numbers of a study as CSV, for whoever wants to work on with them.

cells.csv          a row for each cell: where it stands, what it took
measurements.csv   every value that was measured: setting, method, seed, round, rank, metric
summary.csv        means, spread and paired differences, as in the tables
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from prelort.report.compared.grid import Cell, Grid, Place
from prelort.report.compared.spread import difference, spread
from prelort.report.events import base_row, evaluations, totals

CELLS = (
    "setting", "method", "seed", "status", "reason", "folder", "rounds", "bytes_up", "bytes_down",
    "passes", "train_seconds", "seconds",
)  # fmt: skip
MEASUREMENTS = ("setting", "method", "seed", "round", "rank", "metric", "value")
SUMMARY = (
    "setting", "method", "metric", "at", "seeds", "mean", "deviation", "reference", "pairs",
    "difference", "low", "high",
)  # fmt: skip


def cells(grid: Grid) -> str:
    """A row for each cell."""
    return _table(CELLS, (_of_cell(cell) for cell in grid.cells))


def measurements(grid: Grid) -> str:
    """A row for each value; ``base`` in place of a rank is the untuned base, before round 1."""
    rows: list[list[Any]] = []
    for cell in grid.cells:
        who = [cell.setting, cell.method, cell.seed]
        rows += [[*who, 0, "base", *item] for item in base_row(cell.events).items()]
        for found in evaluations(cell.events):
            for rank, values in sorted(found.prefixes.items()):
                rows += [[*who, found.round, rank, *item] for item in values.items()]
    return _table(MEASUREMENTS, rows)


def summary(grid: Grid) -> str:
    """A row for each setting, method, metric and place: a rank, ``AURAC``, ``at clients``."""
    rows: list[list[Any]] = []
    for setting in grid.settings:
        for metric in grid.metrics():
            places = grid.places(setting, metric)
            for method in grid.methods:
                rows += [_of_place(grid, setting, method, metric, at) for at in places]
    return _table(SUMMARY, rows)


def _of_cell(cell: Cell) -> list[Any]:
    spent = totals(cell.events)
    who = [cell.setting, cell.method, cell.seed, cell.status, cell.reason, cell.folder]
    cost = [spent.bytes_up, spent.bytes_down, cell.passes, cell.train_seconds, spent.seconds]
    return [*who, spent.rounds, *cost]


def _of_place(grid: Grid, setting: str, method: str, metric: str, at: Place) -> list[Any]:
    found = spread(list(grid.values(setting, method, metric, at).values()))
    own = [found.count, found.mean, found.deviation] if found else [0, None, None]
    pairs = [] if method == grid.reference else grid.pairs(setting, method, metric, at).values()
    apart = difference(list(pairs))
    other = [apart.pairs, apart.mean, apart.low, apart.high] if apart else [0, None, None, None]
    return [setting, method, metric, at, *own, grid.reference, *other]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """RFC 4180 text; nothing is written for None."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
