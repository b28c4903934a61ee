"""``prelort run``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from prelort.cli.options import Overrides, Quiet
from prelort.cli.screen import escaped, wide_console
from prelort.errors import ConfigError

if TYPE_CHECKING:
    from prelort.config import Config

EXAMPLES = """[bold]Examples[/bold]

  prelort run

  prelort run --method prelort --method zero-padding --out runs/first

  prelort run my.toml --set federation.rounds=50 --set seed=1

  prelort run --set model.name=Qwen/Qwen3-0.6B --set data.source=reports.csv

  prelort run --resume runs/first

  prelort run --set threads=1 --parallel 4

  prelort run --engine simulation --client-cpus 2

  prelort run --track tensorboard --track mlflow

Without CONFIG the embedded default runs; `prelort config` prints it, to start your own from.
"""


def run(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; without one, the embedded default.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Overrides method.name; several are compared."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run (default: runs/METHOD-TIME)."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the run in this folder.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="in-process, or simulation (Flower's, with Ray).")
    ] = "in-process",
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            min=1,
            help="in-process: clients that train side by side, in threads of their own; does not "
            "change the results (default: cores / threads, where `threads` is set).",
        ),
    ] = None,
    client_cpus: Annotated[
        int, typer.Option("--client-cpus", min=1, help="simulation: CPU cores for one client.")
    ] = 1,
    client_gpus: Annotated[
        float, typer.Option("--client-gpus", min=0, help="simulation: (share of) a GPU for one.")
    ] = 0.0,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Tell a tracker too: tensorboard, mlflow, wandb; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train one adapter for clients of mixed ranks, and measure it at every rank prefix."""
    from prelort import config as configuration

    if resume is not None and out is not None:
        raise ConfigError("give --out for a new run or --resume for an old one, not both")
    if resume is None:
        configuration.load(config, overrides or [])  # what is wrong there is told at once

    from prelort.report import trackers

    trackers.check(track or [])

    from prelort.experiment import several
    from prelort.experiment.run import run as run_one
    from prelort.report.progress import LiveProgress

    stage_of = _engine(engine, parallel, client_cpus, client_gpus)
    target, settings, names = _what_to_run(config, method or [], overrides or [], out, resume)
    console = wide_console()
    try:
        with LiveProgress(console, quiet=quiet) as progress:
            if len(names) == 1:
                folders = {names[0]: target}
                run_one(
                    settings,
                    target,
                    resume=resume is not None,
                    listeners=[progress],
                    stage_of=stage_of,
                    track=track or [],
                )
                several.write_results(folders, target)
            else:
                folders = {name: target / several.folder_name(name) for name in names}
                several.run_methods(
                    settings,
                    names,
                    target,
                    resume=resume is not None,
                    listeners=[progress],
                    stage_of=stage_of,
                    track=track or [],
                )
    except KeyboardInterrupt:
        Console(stderr=True).print(
            f"stopped; go on with: prelort run --resume {escaped(target)}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    _show(console, folders, target)


def _what_to_run(
    path: Path | None,
    names: Sequence[str],
    overrides: Sequence[str],
    out: Path | None,
    resume: Path | None,
) -> tuple[Path, Config, list[str]]:
    """The folder, the configuration and the methods that the options mean."""
    from prelort import config as configuration
    from prelort.experiment import several
    from prelort.experiment.folder import RunFolder

    if resume is None:
        settings = configuration.load(path, overrides)
        chosen = list(dict.fromkeys(names)) or [settings.method.name]
        if len(chosen) == 1:
            settings = several.with_method(settings, chosen[0])
        name = several.folder_name(chosen[0]) if len(chosen) == 1 else "several"
        return out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", settings, chosen
    together = several.methods_in(resume)
    first = RunFolder(resume / several.folder_name(together[0]) if together else resume)
    settings = first.read_config()
    held = together or [settings.method.name]
    chosen = list(dict.fromkeys(names)) or held
    if chosen != held:
        raise ConfigError(f"{str(resume)!r} holds the methods {held}, not {chosen}")
    if path is not None or overrides:
        # Given again: it must be what the run was started with; run() names what differs.
        given = configuration.load(path or first.config_file, overrides)
        renamed = any(override.split("=")[0].strip() == "method.name" for override in overrides)
        settings = given if renamed else several.with_method(given, settings.method.name)
    return resume, settings, chosen


def _engine(name: str, parallel: int | None, cpus: int, gpus: float) -> Any:
    """Who carries out the rounds, by name. Raises `ConfigError` for one that there is not."""
    if name == "in-process":
        from prelort.experiment.stage import InProcess

        return InProcess(parallel)
    if name == "simulation":
        if parallel is not None:
            raise ConfigError(
                f"--parallel {parallel} is for --engine in-process; for the simulation say by "
                "--client-cpus how many cores a client has"
            )
        from functools import partial

        from prelort.experiment.simulation import check_installed, simulated

        check_installed()
        return partial(simulated, cpus=cpus, gpus=gpus)
    raise ConfigError(
        f"--engine {name!r} is not allowed: in-process or simulation; for real sites see "
        "`prelort new --help`"
    )


def _show(console: Console, folders: dict[str, Path], target: Path) -> None:
    """The table, and where everything is."""
    from prelort.experiment.several import read_runs
    from prelort.report.events import phases
    from prelort.report.tables import comparison_table
    from prelort.report.wording import human_seconds

    runs = read_runs(folders)
    console.print(comparison_table(runs))
    for name, events in runs.items():
        taken = ", ".join(f"{phase} {human_seconds(s)}" for phase, s in phases(events).items())
        console.print(f"time      {name}: {taken}", soft_wrap=True, highlight=False)
    for picture in sorted(target.glob("*.png")):
        console.print(f"picture   {picture}", soft_wrap=True)
    for path in folders.values():
        if (path / "adapters").is_dir():
            console.print(f"adapters  {path / 'adapters'}", soft_wrap=True)
