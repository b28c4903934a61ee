"""``prelort compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prelort.cli.options import Overrides, Quiet
from prelort.cli.screen import escaped, wide_console

EXAMPLES = """[bold]Examples[/bold]

  prelort compare study.toml

  prelort compare study.toml --out results/study --jobs 2

  prelort compare --method prelort --method zero-padding --seed 0 --seed 1 --out results/first

  prelort compare study.toml --set federation.rounds=2 --out results/quick

STUDY is the TOML file of a run with a section \\[compare]: methods, seeds, settings, and what holds
for one method alone; docs/compare.md has an example. The same command again goes on where it was
stopped, and repeats no finished cell.
"""


def compare(
    study: Annotated[
        Path | None, typer.Argument(help="TOML file of the study; default: the embedded run's.")
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
        str | None, typer.Option("--reference", help="Whom the other methods are compared to.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the study (default: runs/STUDY)."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Cells to run at a time, a process each.")
    ] = 1,
    quiet: Quiet = False,
) -> None:
    """Compare methods over seeds and settings: one run for each cell, tables, pictures, a page."""
    from prelort.experiment.compare import study as studies

    asked = studies.load(
        study, overrides or [], names=method or [], seeds=seed or [], reference=reference
    )

    from prelort.experiment.compare.results import PAGE_FILE
    from prelort.experiment.compare.run import compare as compare_all
    from prelort.report.compared import tables
    from prelort.report.compared.progress import CellsProgress

    target = out or Path("runs") / (study.stem if study is not None else "compare")
    console = wide_console()
    try:
        with CellsProgress(console, len(asked.cells), quiet=quiet) as progress:
            grid = compare_all(asked, target, progress, jobs=jobs)
    except KeyboardInterrupt:
        again = shlex.join(["prelort", *sys.argv[1:]])
        Console(stderr=True).print(
            f"stopped; the same command goes on: {escaped(again)}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    console.print(tables.terminal(grid))
    for path in (target / "results.md", *sorted(target.glob("*.png")), target / PAGE_FILE):
        if path.is_file():
            console.print(f"wrote  {escaped(path)}", soft_wrap=True, highlight=False)
    if any(not cell.finished for cell in grid.cells):
        raise typer.Exit(1)
