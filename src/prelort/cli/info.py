"""``prelort methods | config``: what to choose from."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from prelort.cli.screen import wide_console
from prelort.errors import ConfigError
from prelort.tasks import TASKS

CONFIG_EXAMPLES = """[bold]Examples[/bold]

  prelort config --task classification --model FacebookAI/roberta-base > my.toml

  prelort config --all
"""


def methods() -> None:
    """List the methods with their papers."""
    from rich.table import Table

    from prelort.methods import REGISTRY

    table = Table("method", "summary", "paper")
    for name, method in REGISTRY.items():
        table.add_row(f"[bold]{name}[/bold]", method.summary, method.paper)
    wide_console().print(table)


def config(
    task: Annotated[
        str | None, typer.Option("--task", help="causal-lm, instruction, chat or classification.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="For --task: a folder or a hub name.")
    ] = None,
    every_key: Annotated[
        bool, typer.Option("--all", help="Every key with its default and what is allowed.")
    ] = False,
) -> None:
    """Print a configuration to start from: the embedded default, or one for your task and model."""
    if every_key and (task or model):
        raise ConfigError("give --all alone, or --task with or without --model")
    if model is not None and task is None:
        raise ConfigError(f"--model {model} needs --task: {', '.join(TASKS)}")
    if every_key:
        from prelort.config_reference import reference

        text = reference()
    elif task is not None:
        from prelort.planning.starter import starter

        text = starter(task, model)
    else:
        from prelort.config import EMBEDDED_FILE

        text = EMBEDDED_FILE.read_text(encoding="utf-8")
    sys.stdout.write(text)
