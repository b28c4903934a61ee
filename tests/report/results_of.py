"""Results of made-up runs for the tests of tables, charts and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from histories import run_history
from prelort.report.results import CellResult, Results

REFERENCE = {
    0: {2: 30.0, 4: 26.0, 8: 22.0},
    1: {2: 31.0, 4: 27.0, 8: 23.0},
    2: {2: 35.0, 4: 29.0, 8: 23.0},
}
OTHER = {
    0: {2: 31.0, 4: 30.0, 8: 29.0},
    1: {2: 30.0, 4: 30.0, 8: 30.0},
    2: {2: 36.0, 4: 34.0, 8: 32.0},
}
AREAS = {"prelort": [26.0, 27.0, 29.0], "zero-padding": [30.0, 30.0, 34.0]}
"""The areas by hand: (value at 2 / 2 + value at 4 + value at 8 / 2) / 2."""

TWO = {"prelort": REFERENCE, "zero-padding": OTHER}


def study(
    finals: Mapping[str, Mapping[int, Mapping[int, float]]],
    settings: Sequence[str] = ("",),
    **more: Any,
) -> Results:
    """Method -> seed -> rank -> final value, the same in every setting."""
    cells = [
        CellResult(setting, method, seed, run_history(method, curve, seed=seed, **more))
        for setting in settings
        for method, curves in finals.items()
        for seed, curve in curves.items()
    ]
    return Results(cells, "prelort", "a study")


def runs(**histories: Any) -> Results:
    """Method -> its history, with one seed."""
    cells = [CellResult("", method, 0, history) for method, history in histories.items()]
    return Results(cells, cells[0].method, "runs")
