"""``prelort run | compare``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from prelort.cli.options import Jobs, Overrides, Quiet, Track
from prelort.cli.screen import escaped, wide_console
from prelort.errors import ConfigError

if TYPE_CHECKING:
    from prelort.study.definition import Study
    from prelort.study.worker import Run

RUN_EXAMPLES = """[bold]Examples[/bold]

  prelort run

  prelort run my.toml --method prelort --method zero-padding --out runs/both

  prelort run my.toml --set federation.rounds=50 --set seed=1 --out runs/first

  prelort run --set model.name=Qwen/Qwen3-0.6B --set data.source=reports.csv

  prelort run --resume runs/first

  prelort run --resume runs/first --set federation.rounds=40

  prelort run my.toml --start-from runs/first

  prelort run --set threads=1 --parallel 4

  prelort run --engine simulation --client-cpus 2

  prelort run --track tensorboard --track mlflow

Without CONFIG the embedded default runs; `prelort config` prints it.
"""

COMPARE_EXAMPLES = """[bold]Examples[/bold]

  prelort compare study.toml

  prelort compare study.toml --out results/study --jobs 2

  prelort compare --method prelort --method zero-padding --seed 0 --seed 1 --out results/first

  prelort compare study.toml --set federation.rounds=2 --out results/quick

STUDY is a run's TOML file with a section \\[compare]: methods, seeds, settings, and overrides for
single methods; docs/compare.md has an example. The same command again continues where it stopped;
finished runs are kept.
"""


def run(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; default: the embedded configuration.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Overrides method.name; several are compared."),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write (default: runs/METHOD-TIME)."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Continue what is in this folder.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--start-from", help="Begin from this adapter: a PEFT folder, or a run."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="in-process, or simulation (Flower's, with Ray).")
    ] = "in-process",
    parallel: Annotated[
        int | None,
        typer.Option(
            "--parallel",
            min=1,
            help="in-process: number of clients that train side by side, in threads; does not "
            "change the results (default: cores / threads, if `threads` is set).",
        ),
    ] = None,
    client_cpus: Annotated[
        int, typer.Option("--client-cpus", min=1, help="simulation: CPU cores of a client.")
    ] = 1,
    client_gpus: Annotated[
        float, typer.Option("--client-gpus", min=0, help="simulation: GPUs (or share) of a client.")
    ] = 0.0,
    jobs: Jobs = 1,
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Train one adapter for clients of mixed ranks, and measure it at every rank prefix."""
    from prelort.study.definition import folder_name, of_run

    if resume is not None and out is not None:
        raise ConfigError("give --out for a new run or --resume for an old one, not both")
    if jobs > 1 and (engine, parallel) != ("in-process", None):
        raise ConfigError("--jobs shares the cores between runs: give no --engine or --parallel")
    if start_from is not None:
        overrides = [*(overrides or []), f"lora.start_from={json.dumps(str(start_from))}"]
    if resume is not None:
        study = _resumed(resume, config, overrides or [], method or [])
    else:
        study = of_run(config, overrides or [], method or [])
    name = folder_name(study.methods[0]) if study.is_run else "several"
    target = resume or out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    _run_study(
        study,
        target,
        new=resume is None,
        jobs=jobs,
        run=_engine(engine, parallel, client_cpus, client_gpus),
        track=track or [],
        adapters=True,
        quiet=quiet,
        again=f"continue with: prelort run --resume {shlex.quote(str(target))}",
    )


def compare(
    study: Annotated[
        Path | None, typer.Argument(help="TOML file; default: the embedded configuration.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Overrides compare.methods; repeatable."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", "-s", min=0, help="Overrides compare.seeds; repeatable."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="The method to compare the others to.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write (default: runs/STUDY).")
    ] = None,
    jobs: Jobs = 1,
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Compare methods over seeds and settings: one run for each cell, tables, pictures, a page."""
    from prelort.study.definition import load

    loaded = load(
        study, overrides or [], methods=method or [], seeds=seed or [], reference=reference
    )
    _run_study(
        loaded,
        out or Path("runs") / (study.stem if study is not None else "compare"),
        jobs=jobs,
        track=track or [],
        quiet=quiet,
        again=f"the same command continues: {shlex.join(['prelort', *sys.argv[1:]])}",
    )


def _run_study(
    study: Study,
    out: Path,
    *,
    again: str,
    new: bool = False,
    jobs: int = 1,
    run: Run | None = None,
    track: Sequence[str] = (),
    adapters: bool = False,
    quiet: bool = False,
) -> None:
    """Run a study, print its tables and where everything is; exit code 1 where a cell failed."""
    if track:
        from prelort.report import trackers

        trackers.check(track)

    from prelort.experiment.folder import RunFolder
    from prelort.report import tables
    from prelort.report.live import Display
    from prelort.study.run import run_study

    console, cells = wide_console(), len(study.cells)
    try:
        with Display(console, cells, quiet=quiet) as display:
            results = run_study(study, out, display, new=new, jobs=jobs, run=run, track=track)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"stopped; {escaped(again)}", soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(tables.terminal(results))
    files = [out / "results.md", *sorted(out.glob("*.png")), out / "report.html"]
    folders = [RunFolder(out / cell.folder).adapters for cell in study.cells] if adapters else []
    for path in (*files, *folders):
        if path.exists():
            console.print(f"wrote  {escaped(path)}", soft_wrap=True, highlight=False)
    if any(cell.status != "finished" for cell in results.cells):
        raise typer.Exit(1)


def _resumed(
    out: Path, path: Path | None, overrides: Sequence[str], methods: Sequence[str]
) -> Study:
    """The study in a folder. What is given again must be what it was started with."""
    from prelort import config as configuration
    from prelort.study import definition

    held = definition.of_folder(out)
    if path is None and not overrides and not methods:
        definition.check_methods(held)
        return held
    file = path or out / ("config.toml" if held.is_run else definition.STUDY_FILE)
    if "compare" in configuration.read_values(file):
        study = definition.load(file, overrides, methods=methods)
    else:
        renamed = any(one.partition("=")[0].strip() == "method.name" for one in overrides)
        study = definition.of_run(file, overrides, methods or ([] if renamed else held.methods))
    names, given = ([cell.name for cell in one.cells] for one in (held, study))
    if names != given:
        raise ConfigError(f"{str(out)!r} holds {'; '.join(names)}, not {'; '.join(given)}")
    return study


def _engine(name: str, parallel: int | None, cpus: int, gpus: float) -> Run:
    """`prelort.run` at a place, by its name. Raises `ConfigError` for an unknown one."""
    if name == "in-process":
        from prelort.experiment.backend import InProcess
        from prelort.experiment.run import run

        return partial(run, backend=InProcess(parallel))
    if name != "simulation":
        raise ConfigError(
            f"--engine {name!r} is not allowed: in-process or simulation; for real sites see "
            "`prelort new --help`"
        )
    if parallel is not None:
        raise ConfigError(
            f"--parallel {parallel} is for --engine in-process; for the simulation give the cores "
            "of a client by --client-cpus"
        )
    from prelort.experiment.simulation import run_simulated

    return partial(run_simulated, cpus=cpus, gpus=gpus)
