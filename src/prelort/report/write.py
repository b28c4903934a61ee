"""The files that a run or a study leaves: tables, CSV files, pictures and the page.

results.md          the tables
measurements.csv    every measured value; rank 0 is the untuned base model
cells.csv           of several runs: status and costs of each
summary.csv         of several runs: means, spread and paired differences
rank_curves.png     the first metric; comparison.png with several seeds, SETTING.png with settings
diagnostics.png     what the rounds did to the products, if that was measured
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prelort.errors import PrelortError
from prelort.files import write_atomically
from prelort.report import tables
from prelort.report.results import Results

if TYPE_CHECKING:
    import altair as alt

RESULTS_FILE = "results.md"
PAGE_FILE = "report.html"


def write_tables(results: Results, out: Path) -> None:
    """Write the Markdown and CSV files: quick enough while runs are under way."""
    _write(out / RESULTS_FILE, tables.markdown(results))
    frames = {"measurements": results.to_pandas()}
    if len(results.cells) > 1:
        frames |= {"cells": results.overview, "summary": results.summary}
    for name, frame in frames.items():
        _write(out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))


def write_results(results: Results, out: Path) -> None:
    """Write the tables and the pictures. Raises `PrelortError` if a file cannot be written."""
    write_tables(results, out)
    from prelort.report import charts, drawing

    pictures: tuple[tuple[str, str, Callable[[Results, str], alt.TopLevelMixin | None]], ...] = (
        ("", "comparison" if len(results.seeds) > 1 else "rank_curves", charts.overview),
        ("-diagnostics", "diagnostics", charts.diagnostics_overview),
    )
    for setting in results.settings:
        for suffix, name, build in pictures:
            chart = build(results, setting)
            if chart is not None:
                named = f"{file_name(setting)}{suffix}" if setting else name
                drawing.save(chart, out / f"{named}.png")


def write_page(results: Results, path: Path) -> Path:
    """Write the page and return its path. Raises `PrelortError` if that fails."""
    from prelort.report.page import render

    return _write(path, render(results, path.parent))


def file_name(setting: str) -> str:
    """A setting's name as a file's."""
    return setting.replace(":", "-").replace("/", "-")


def _write(path: Path, text: str) -> Path:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        reason = error.strerror or error
        raise PrelortError(f"{str(path)!r} cannot be written: {reason}") from None
    return path
