"""The command line: ``prelort run | compare | watch | plan | evaluate | report | export | ...``.

A module for each group of commands. Heavy imports (torch, transformers) are inside the commands,
so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import sys
import warnings

import typer
from rich.console import Console

from prelort.cli import comparing, listing, looking, planning, running, sites
from prelort.cli.screen import escaped, warn
from prelort.errors import PrelortError
from prelort.library_logging import quiet_libraries

app = typer.Typer(
    help="Federated LoRA fine-tuning for clients whose hardware affords different ranks.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=running.EXAMPLES)(running.run)
app.command(epilog=comparing.EXAMPLES)(comparing.compare)
app.command(epilog=looking.WATCH_EXAMPLES)(looking.watch)
app.command(epilog=looking.EVALUATE_EXAMPLES)(looking.evaluate)
app.command(epilog=looking.REPORT_EXAMPLES)(looking.report)
app.command(epilog=looking.EXPORT_EXAMPLES)(looking.export)
app.command(epilog=planning.EXAMPLES)(planning.plan)
app.command()(listing.methods)
app.command(epilog=sites.NEW_EXAMPLES)(sites.new)
app.command()(listing.config)
app.add_typer(sites.site_app, name="site", no_args_is_help=True)

_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)
"""No room, no permission, no such place: what a user can put right."""


def main() -> None:
    """Run the command line; what a user can put right is told in one sentence, exit code 2."""
    warnings.showwarning = warn
    quiet_libraries()
    console = Console(stderr=True)
    try:
        app(standalone_mode=True)
    except PrelortError as error:
        console.print(f"[bold red]error:[/bold red] {escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        console.print(
            f"[bold red]error:[/bold red] {escaped(error.strerror or str(error))}{where}: what was "
            "finished is kept; make room or choose another folder, then prelort run --resume "
            "FOLDER",
            soft_wrap=True,
        )
        sys.exit(2)
