"""A run over real sites, begun or gone on with, and what it leaves."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prelort import config as configuration
from prelort.errors import ConfigError
from prelort.experiment import several
from prelort.experiment.at_sites import at_sites
from prelort.experiment.folder import RunFolder
from prelort.experiment.page import write_page
from prelort.experiment.run import run
from prelort.federation.flower import Grid
from prelort.report import events as reading
from prelort.report.progress import LiveProgress
from prelort.report.tables import comparison_table

LEAVING_SECONDS = 10.0
"""How long the app of a SuperLink that was killed may still have the run's folder."""


def carry_out(
    federation: Path, out: Path, overrides: list[str], grid: Grid, console: Console
) -> None:
    """Begin the run in ``out`` or go on with it. Raises `PrelortError`."""
    if out == Path():
        raise ConfigError("no folder for the run: give --run-config 'run=\"/path/of/the/run\"'")
    config = configuration.load(federation, overrides)
    folder = RunFolder(out)
    begun = folder.config_file.is_file()
    if begun and reading.is_finished(reading.read(folder.metrics_file)):
        console.print(f"the run in {out} is finished", markup=False, soft_wrap=True)
        return
    with LiveProgress(console) as progress:
        run(
            config,
            out,
            resume=begun,
            listeners=[progress],
            patience=LEAVING_SECONDS,
            stage_of=lambda config, folder: at_sites(config, grid),
        )
    several.write_results({config.method.name: out}, out)
    page = write_page(out)
    console.print(comparison_table({config.method.name: reading.read(folder.metrics_file)}))
    console.print(f"page      {page}", markup=False, soft_wrap=True)
    console.print(f"adapters  {folder.adapters}", markup=False, soft_wrap=True)
