"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. --set seed=3."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]
Jobs = Annotated[
    int, typer.Option("--jobs", "-j", min=1, help="Runs at a time, each in its own process.")
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Log rounds to tensorboard, wandb, mlflow, ... (docs/watching.md); repeatable.",
    ),
]
