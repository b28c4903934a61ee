"""``prelort tune``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prelort.cli.options import Overrides, Quiet
from prelort.cli.screen import escaped

EXAMPLES = """[bold]Examples[/bold]

  prelort tune study.toml --out runs/tuned

  prelort tune study.toml --trials 20 --jobs 4 --out runs/tuned

  prelort tune --method prelort --method zero-padding --set data.validation_fraction=0.1

  prelort compare runs/tuned/study.toml

STUDY is a study's TOML file (docs/compare.md). Its section \\[tune] names the keys to search:

  \\[tune.search]
  "training.learning_rate" = {low = 1e-3, high = 3e-2, log = true}
  "training.rank_exponent" = \\[0.0, 0.4, 0.7]

Without it the learning rate is tuned. The same command again goes on where it stopped; several
processes may share the folder.
"""


def tune(
    study: Annotated[
        Path | None, typer.Argument(help="TOML file; default: the embedded configuration.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Overrides compare.methods; repeatable."),
    ] = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trials of each method in each setting.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write (default: runs/tune-STUDY).")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Trials at a time, each in its own process.")
    ] = 1,
    quiet: Quiet = False,
) -> None:
    """Choose learning rates or other keys for each method, on validation rows."""
    from prelort.study.tune import load
    from prelort.study.tune import tune as run_trials

    plan = load(study, overrides or [], methods=method or [], trials=trials)
    target = out or Path("runs") / f"tune-{study.stem if study is not None else 'embedded'}"
    try:
        file = run_trials(plan, target, jobs=jobs, say=_say_nothing if quiet else _say)
    except KeyboardInterrupt:
        again = shlex.join(["prelort", *sys.argv[1:]])
        Console(stderr=True).print(
            f"stopped; the same command continues: {escaped(again)}", soft_wrap=True
        )
        raise typer.Exit(130) from None
    command = shlex.join(["prelort", "compare", str(file)])
    Console().print(f"compare with:  {escaped(command)}", soft_wrap=True)


def _say(line: str) -> None:
    Console().print(escaped(line), soft_wrap=True, highlight=False)


def _say_nothing(line: str) -> None:
    return
