"""The command line: ``prelort run | compare | tune | watch | plan | evaluate | ...``.

A module for each group of commands. Heavy imports (torch, transformers) are inside the commands,
so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import sys
import warnings
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console

from prelort.cli import info, inspect, plan, run, sites, tune
from prelort.cli.screen import escaped, warn
from prelort.errors import PrelortError
from prelort.library_logging import quiet_libraries

app = typer.Typer(
    help="Federated LoRA fine-tuning for clients whose hardware affords different ranks.",
    no_args_is_help=True,
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if version:
        print(f"prelort {metadata.version('prelort')}")
        raise typer.Exit


app.command(epilog=run.RUN_EXAMPLES)(run.run)
app.command(epilog=run.COMPARE_EXAMPLES)(run.compare)
app.command(epilog=tune.EXAMPLES)(tune.tune)
app.command(epilog=inspect.WATCH_EXAMPLES)(inspect.watch)
app.command(epilog=plan.EXAMPLES)(plan.plan)
app.command(epilog=inspect.EVALUATE_EXAMPLES)(inspect.evaluate)
app.command(epilog=inspect.REPORT_EXAMPLES)(inspect.report)
app.command(epilog=inspect.EXPORT_EXAMPLES)(inspect.export)
app.command()(info.methods)
app.command(epilog=sites.NEW_EXAMPLES)(sites.new)
app.command(epilog=info.CONFIG_EXAMPLES)(info.config)
app.add_typer(sites.site_app, name="site", no_args_is_help=True)

_NO_SUCH_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_NO_ACCESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
"""Full disk or no permission, perhaps in the middle of a run: the user can correct it."""


def main() -> None:
    """Run the command line; an error that the user can correct is one sentence, exit code 2."""
    warnings.showwarning = warn
    quiet_libraries()
    console = Console(stderr=True)
    try:
        app(standalone_mode=True)
    except PrelortError as error:
        console.print(f"[bold red]error:[/bold red] {escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (*_NO_SUCH_PLACE, *_NO_ACCESS):
            raise
        where = f" {error.filename!r}" if error.filename else ""
        advice = ": finished rounds are kept; make room or choose another folder, then "
        advice += "prelort run --resume FOLDER"
        console.print(
            f"[bold red]error:[/bold red] {escaped(error.strerror or str(error))}"
            f"{escaped(where)}{advice if error.errno in _NO_ACCESS else ''}",
            soft_wrap=True,
        )
        sys.exit(2)
