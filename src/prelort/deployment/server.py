"""The server's Flower `ServerApp`: the run in its folder, over the sites that are there."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from prelort.federation.flower import Context, Grid, ServerApp
from prelort.quiet import quiet_libraries


def federation_app(federation: Path) -> ServerApp:
    """The app of a federation whose configuration is in this file.

    ``flwr run --run-config 'run="FOLDER"'`` names the folder of the run, on the server's machine.
    The same command again goes on with the run in it, from its last checkpoint.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        _end_with_parent()
        quiet_libraries()
        from prelort.deployment.rounds import carry_out

        folder = str(context.run_config.get("run", ""))
        overrides = shlex.split(str(context.run_config.get("set", "")))
        console = Console(file=sys.stdout, width=120)
        # What goes wrong is raised: Flower then calls the run failed and shows the sentence.
        carry_out(federation, Path(folder).expanduser(), overrides, grid, console)

    return app


def _end_with_parent() -> None:
    """End this process soon after the one that has started it: it belongs to the SuperLink.

    Flower 1.41 asks the app to stop then, but a call that it keeps retrying can hold it for
    minutes, and with it the run's folder. At any moment the run can be gone on with.
    """
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
