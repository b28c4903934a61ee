"""What a study leaves: tables, CSV files, pictures and the page, from the cells' event logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prelort.errors import PrelortError
from prelort.experiment.compare.passes import passes
from prelort.experiment.compare.study import Cell, Study, folder_name
from prelort.experiment.folder import RunFolder, versions
from prelort.files import write_atomically
from prelort.report import events as reading
from prelort.report.compared import files, page, plots, tables
from prelort.report.compared.grid import Cell as Measured
from prelort.report.compared.grid import Grid

RESULTS_FILE = "results.md"
PAGE_FILE = "report.html"


def write_text(study: Study, out: Path, reasons: Mapping[str, str]) -> Grid:
    """Write the tables and CSV files of what there is so far: while cells run."""
    grid = grid_of(study, out, reasons)
    title = out.resolve().name
    write_atomically(out / RESULTS_FILE, tables.markdown(grid, title).encode())
    for name, text in (
        ("cells.csv", files.cells(grid)),
        ("measurements.csv", files.measurements(grid)),
        ("summary.csv", files.summary(grid)),
    ):
        write_atomically(out / name, text.encode())
    return grid


def write_all(study: Study, out: Path, reasons: Mapping[str, str]) -> Grid:
    """Write the pictures and the page too: at the end."""
    grid = write_text(study, out, reasons)
    for setting in grid.settings:
        if grid.finished(setting) and grid.metrics():
            plots.picture(grid, setting, out / picture_name(setting))
    text = page.render(grid, out.resolve().name, study.to_toml(), versions())
    write_atomically(out / PAGE_FILE, text.encode())
    return grid


def picture_name(setting: str) -> str:
    """The file of a setting's picture."""
    return f"{folder_name(setting)}.png" if setting else "comparison.png"


def grid_of(study: Study, out: Path, reasons: Mapping[str, str]) -> Grid:
    """The cells with what they have written; ``reasons``: why cells failed, by their names."""
    base = study.base
    facts = {
        "task": base.task,
        "model": base.model.name,
        "data": base.data.source,
        "rounds": str(base.federation.rounds),
        "seeds": ", ".join(map(str, study.compare.seeds)),
        "compared to": study.reference,
    }
    return Grid(
        methods=study.compare.methods,
        seeds=study.compare.seeds,
        settings=study.settings,
        reference=study.reference,
        cells=[_measured(cell, out, reasons.get(cell.name, "")) for cell in study.cells],
        metric=study.compare.metric,
        facts=facts,
    )


def _measured(cell: Cell, out: Path, reason: str) -> Measured:
    log = RunFolder(out / cell.folder).metrics_file
    who = (cell.setting, cell.method, cell.seed, str(cell.folder))
    try:
        events = reading.read(log) if log.is_file() else []
        return Measured(*who, events, passes(cell.config, events), reason)
    except PrelortError as error:
        return Measured(*who, reason=reason or str(error))
