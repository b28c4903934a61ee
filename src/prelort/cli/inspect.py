"""``prelort watch | evaluate | report | export``: commands on existing runs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from prelort.cli.options import Overrides, Quiet
from prelort.cli.screen import escaped, wide_console
from prelort.errors import ConfigError, PrelortError

WATCH_EXAMPLES = """[bold]Examples[/bold]

  prelort watch runs/first

  prelort watch runs/both/prelort

  prelort watch runs/first | tee first.log

It only reads the event logs, waits a minute for a run that has not started, and ends with the run
(exit code 2 if that was stopped) or on Ctrl-C, which does not stop the run.
"""

WAIT_SECONDS = 60

EVALUATE_EXAMPLES = (
    "[bold]Examples[/bold]\n\n  prelort evaluate runs/first\n\n"
    "  prelort evaluate runs/first --set data.test=other.csv --out other.json"
)

REPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n  prelort report runs/first\n\n"
    "  prelort report runs/both --out both.html"
)

EXPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "  prelort export runs/first --rank 4 --out adapter-r4 --base-name Qwen/Qwen3-0.6B\n\n"
    "  prelort export runs/first --rank 16 --merge --out model-tuned"
)


Precision = Literal["float32", "bfloat16", "float16"]


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a study.")],
) -> None:
    """Watch a run from another terminal: live status of every client."""
    from prelort.experiment.folder import is_running
    from prelort.report import live, tables
    from prelort.study.results import logs_of, read, wait_for

    console = wide_console()
    with suppress(KeyboardInterrupt):  # the run goes on
        if not run.exists():
            what = (
                f"{escaped(run)} does not exist: waiting {WAIT_SECONDS} s for a run to start there"
            )
            console.print(what, soft_wrap=True, highlight=False)
        study = wait_for(run, WAIT_SECONDS)
        with live.Display(console, len(study.cells)) as display:
            finished = live.watch(lambda: logs_of(study, run), lambda: is_running(run), display)
        console.print(tables.terminal(read(run)))
        if not finished:
            raise PrelortError(f"{str(run)!r} was stopped: no process runs it any more")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the values to this file, as JSON.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run's adapter again at every rank prefix, for instance on other data."""
    from rich.progress import Progress

    from prelort.events import RunFinished, encode
    from prelort.experiment.inspect import evaluate_run
    from prelort.history import RunHistory
    from prelort.report import tables
    from prelort.report.results import CellResult, Results

    console = wide_console()
    with Progress(console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("measuring", total=None)
        evaluated = evaluate_run(
            run, overrides or [], lambda done, total: bar.update(task, completed=done, total=total)
        )
    if out is not None:
        out.write_text(encode(evaluated) + "\n", encoding="utf-8")
    measured = RunHistory.of([evaluated, RunFinished(evaluated.round)])
    cell = CellResult("", run.resolve().name, 0, measured)
    console.print(tables.terminal(Results([cell], cell.method)))


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run or a study; finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (default: RUN/report.html).")
    ] = None,
) -> None:
    """Write one page of HTML: curves, who failed and why, clients, configuration."""
    from prelort.report.write import PAGE_FILE, write_page
    from prelort.study.results import read

    written = write_page(read(run), out or run / PAGE_FILE)
    Console().print(f"wrote {escaped(written)}", soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Rank to cut to (default: the largest).")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, adapter merged into the base.")
    ] = False,
    base_name: Annotated[
        str | None,
        typer.Option("--base-name", help="Where users find the base model (default: its place)."),
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option("--dtype", help="Type of the merged model (default: the base's own)."),
    ] = None,
) -> None:
    """Write any prefix of a run's adapter as a PEFT folder, or merged into the base model."""
    from prelort.experiment.inspect import export_run

    if merge and base_name is not None:
        raise ConfigError("--base-name is for adapters: a merged model names no base")
    if dtype is not None and not merge:
        raise ConfigError("--dtype is for merged models: an adapter's tensors stay float32")
    written = export_run(run, out, rank, merge=merge, base_name=base_name, dtype=dtype)
    Console().print(f"wrote {escaped(written)}", soft_wrap=True)
