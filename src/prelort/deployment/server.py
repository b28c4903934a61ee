"""The server's Flower `ServerApp`: the run in its folder, over the sites that are there."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from prelort import config as configuration
from prelort.errors import ConfigError
from prelort.experiment import several
from prelort.experiment.at_sites import at_sites
from prelort.experiment.folder import RunFolder
from prelort.experiment.run import run
from prelort.federation.flower import Context, Grid, ServerApp
from prelort.report import events as reading
from prelort.report.progress import LiveProgress
from prelort.report.tables import comparison_table


def federation_app(federation: Path) -> ServerApp:
    """The app of a federation whose configuration is in this file.

    ``flwr run --run-config 'run="FOLDER"'`` names the folder of the run, on the server's machine.
    The same command again goes on with the run in it, from its last checkpoint.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        folder = str(context.run_config.get("run", ""))
        overrides = shlex.split(str(context.run_config.get("set", "")))
        console = Console(file=sys.stdout, width=120)
        # What goes wrong is raised: Flower then calls the run failed and shows the sentence.
        carry_out(federation, Path(folder).expanduser(), overrides, grid, console)

    return app


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
            stage_of=lambda config, folder: at_sites(config, grid),
        )
    several.write_results({config.method.name: out}, out)
    console.print(comparison_table({config.method.name: reading.read(folder.metrics_file)}))
    console.print(f"adapters  {folder.adapters}", markup=False, soft_wrap=True)
