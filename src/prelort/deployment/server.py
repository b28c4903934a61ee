"""The server's Flower `ServerApp`: the run in its folder, over the sites that are connected."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path

from prelort.errors import ConfigError
from prelort.experiment.parent_watchdog import end_with_parent
from prelort.federation.flower import Context, Grid, ServerApp
from prelort.library_logging import quiet_libraries

LEAVING_SECONDS = 10.0
"""How long the app of a killed SuperLink may still hold the run's folder."""


def federation_app(federation: Path) -> ServerApp:
    """The app of the federation that this file configures.

    ``flwr run --run-config 'run="FOLDER"'`` names the folder of the run, on the server's machine.
    The same command again continues the run in it, from its last checkpoint.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        # Flower asks the app to stop when the SuperLink ends, but a call that it keeps retrying can
        # hold it for minutes, and with it the run's folder.
        end_with_parent()
        quiet_libraries()
        folder = str(context.run_config.get("run", ""))
        if not folder:
            raise ConfigError("no folder for the run: give --run-config 'run=\"/path/of/the/run\"'")
        overrides = shlex.split(str(context.run_config.get("set", "")))
        # Errors are raised: Flower then marks the run as failed and shows the sentence.
        run_over_sites(federation, Path(folder).expanduser(), overrides, grid)

    return app


def run_over_sites(federation: Path, out: Path, overrides: list[str], grid: Grid) -> None:
    """Start the run in ``out`` or continue it, and write its results. Raises `PrelortError`."""
    from rich.console import Console

    from prelort.experiment.at_sites import at_sites
    from prelort.experiment.run import run
    from prelort.report import tables
    from prelort.report.live import Display
    from prelort.study.definition import of_run
    from prelort.study.results import is_finished
    from prelort.study.run import run_study

    console = Console(file=sys.stdout, width=120)
    study = of_run(federation, overrides)
    if is_finished(out):
        console.print(f"the run in {out} is finished", markup=False, soft_wrap=True)
        return
    run_at_sites = partial(run, backend=at_sites(grid), patience=LEAVING_SECONDS)
    with Display(console) as display:
        results = run_study(study, out, display, run=run_at_sites)
    console.print(tables.terminal(results))
    for path in (out / "results.md", out / "report.html", out / "adapters"):
        console.print(f"wrote  {path}", markup=False, soft_wrap=True)
