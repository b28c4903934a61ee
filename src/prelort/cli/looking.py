"""``prelort watch | evaluate | report | export``: what is done with a run that is there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prelort.cli.options import Overrides, Quiet
from prelort.cli.screen import escaped, wide_console

WATCH_EXAMPLES = """[bold]Examples[/bold]

  prelort watch runs/first

  prelort watch runs/first/prelort

  prelort watch runs/first | tee first.log

It reads RUN/metrics.jsonl and nothing else, waits for a run that has not begun, and ends with the
run or on Ctrl-C, which does not stop the run.
"""

EVALUATE_EXAMPLES = (
    "[bold]Examples[/bold]\n\n  prelort evaluate runs/first/prelort\n\n"
    "  prelort evaluate runs/first/prelort --set data.test=other.csv"
)

REPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n  prelort report runs/first\n\n"
    "  prelort report runs/first/prelort --out prelort.html"
)

EXPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "  prelort export runs/first/prelort --rank 4 --out adapter-r4\n\n"
    "  prelort export runs/first/prelort --rank 16 --merge --out model-tuned"
)


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of several; begun or not.")],
) -> None:
    """Watch a run from another terminal: who trains, has answered or failed, and is missing."""
    from prelort.experiment.folder import logs_in
    from prelort.report import watch as watching

    with suppress(KeyboardInterrupt):  # the run goes on
        watching.watch(lambda: logs_in(run), str(run), wide_console())


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Measure a run's adapter again, at every rank prefix, perhaps on other data."""
    from prelort.experiment.inspect import evaluate_run
    from prelort.report.tables import comparison_table

    console = wide_console()
    with console.status("measuring", spinner="dots") if not quiet else console.capture():
        event = evaluate_run(run, overrides or [])
    console.print(comparison_table({run.name: [event]}))


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of several; finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (default: RUN/report.html).")
    ] = None,
) -> None:
    """Write one page of HTML about a run: curves, who failed and why, clients, configuration."""
    from prelort.experiment.page import write_page

    Console().print(f"wrote {escaped(write_page(run, out))}", soft_wrap=True)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Cut to this rank (default: the largest).")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model, adapter merged into the base.")
    ] = False,
) -> None:
    """Write any prefix of a run's adapter as a PEFT folder, or merged into the base model."""
    from prelort.experiment.inspect import export_run

    written = export_run(run, out, rank, merge=merge)
    Console().print(f"wrote {written}", soft_wrap=True)
