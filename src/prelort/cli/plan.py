"""``prelort plan``."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from prelort.cli.options import Overrides
from prelort.cli.screen import escaped, wide_console
from prelort.errors import ConfigError

if TYPE_CHECKING:
    from prelort.config import Config

EXAMPLES = """[bold]Examples[/bold]

  prelort plan --model Qwen/Qwen3-0.6B --memory 8GiB

  prelort plan my.toml --memory 16GB --set model.quantization=4bit

  prelort plan my.toml --set training.batch_size=2 --set data.max_length=512

  prelort plan --ranks 8,12,16 --json

  prelort plan my.toml --privacy --set privacy.epsilon=8 --set partition.clients=200

Only the model's configuration is read, never its weights. Everything else (batch size, tokens,
precision, method, ...) comes from CONFIG as in `prelort run`. Leave a margin: docs/choose-ranks.md
says what is not counted.
"""


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; default: the embedded configuration.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Overrides model.name: a folder or a hub name.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Memory for training, e.g. 8GiB (default: what is free)."),
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option("--ranks", help="Ranks to show, e.g. 4,8 (default: powers of two to 256)."),
    ] = None,
    labels: Annotated[
        int, typer.Option("--labels", min=2, help="Classes, for task = 'classification'.")
    ] = 2,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
    only_privacy: Annotated[
        bool,
        typer.Option("--privacy", help="Only what [privacy] means: noise and clients."),
    ] = False,
) -> None:
    """Estimate the memory and traffic of each rank, and name the largest rank that fits."""
    from prelort import config as configuration

    named = [f"model.name={json.dumps(model)}"] if model is not None else []
    settings = configuration.load(config, [*(overrides or []), *named])
    chosen = _ranks(ranks) if ranks is not None else []
    console = wide_console()
    if only_privacy:
        if as_json:
            raise ConfigError("--json has no plan of privacy: leave out --json or --privacy")
        _print_privacy(settings, console)
        return

    from prelort.planning import plan as planning
    from prelort.planning import sizes, tables

    budget = None if memory is None else sizes.parse(memory, "--memory")
    with console.status("planning", spinner="dots") if not as_json else nullcontext():
        found = planning.plan(settings, memory=budget, ranks=chosen, labels=labels)
    estimates, largest = found.estimates, found.largest
    if as_json:
        values = tables.as_values(estimates, found.budget, largest)
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
    else:
        title = (
            f"{escaped(settings.model.name)}: batches of {settings.training.batch_size} x "
            f"{settings.data.max_length} tokens, {escaped(settings.method.name)}"
        )
        console.print(tables.estimates_table(estimates, found.budget, title))
    if largest is None:
        raise ConfigError(found.refusal)
    if not as_json:
        where = found.where if memory is None else "--memory"
        text = tables.conclusion(largest, found.budget, where, found.max_rank)
        console.print(text, soft_wrap=True)
    privacy = settings.privacy
    if not as_json and (privacy.epsilon is not None or privacy.secure_aggregation):
        _print_privacy(settings, console)


def _print_privacy(settings: Config, console: Console) -> None:
    from prelort.planning import privacy

    for sentence in privacy.sentences(settings):
        console.print(sentence, soft_wrap=True)


def _ranks(text: str) -> list[int]:
    """The ranks of ``--ranks``, in rising order."""
    entries = [entry.strip() for entry in text.split(",")]
    wrong = next((e for e in entries if not (e.isascii() and e.isdigit() and int(e) > 0)), None)
    if wrong is not None:
        raise ConfigError(
            f"--ranks {text!r}: {wrong!r} is not a rank: give whole numbers from 1 on, e.g. 4,8,16"
        )
    return sorted({int(entry) for entry in entries})
