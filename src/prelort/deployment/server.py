"""The server's Flower `ServerApp`: the run in its folder, over the sites that are there."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console

from prelort.experiment.parent_watchdog import end_with_parent
from prelort.federation.flower import Context, Grid, ServerApp
from prelort.library_logging import quiet_libraries


def federation_app(federation: Path) -> ServerApp:
    """The app of a federation whose configuration is in this file.

    ``flwr run --run-config 'run="FOLDER"'`` names the folder of the run, on the server's machine.
    The same command again goes on with the run in it, from its last checkpoint.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        # Flower 1.41 asks the app to stop when the SuperLink ends, but a call that it keeps
        # retrying can hold it for minutes, and with it the run's folder.
        end_with_parent()
        quiet_libraries()
        from prelort.deployment.rounds import carry_out

        folder = str(context.run_config.get("run", ""))
        overrides = shlex.split(str(context.run_config.get("set", "")))
        console = Console(file=sys.stdout, width=120)
        # What goes wrong is raised: Flower then calls the run failed and shows the sentence.
        carry_out(federation, Path(folder).expanduser(), overrides, grid, console)

    return app
