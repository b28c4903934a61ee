"""Where a run takes place: what is known before its rounds, and who carries them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft import LoraConfig
from rich.console import Console

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.data import describe
from prelort.experiment.assemble import Assembly, Encoded, assemble
from prelort.experiment.measure import Measured, measure
from prelort.federation.allocation import Allocation
from prelort.federation.exchange import Engine
from prelort.federation.flower import Context, RecordDict
from prelort.federation.in_process import RUN_ID, InProcessGrid
from prelort.federation.registry import Agreement
from prelort.federation.server import ServerPlan, make_server_app
from prelort.federation.site import make_client_app

Measure = Callable[[Mapping[int, LoraAdapter], Callable[[int, int], None]], Measured]
"""The metrics of adapters, by the rank they stand for (0: the base); told of its progress."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run needs from its place.

    ``measure``: None where the server has no test rows, so that the clients measure.
    ``describe`` leaves a table and a picture of who holds what, where that is known.
    """

    agreement: Agreement
    initial: LoraAdapter
    template: LoraConfig
    carry_out: Callable[[ServerPlan], None] = lambda plan: None
    allocation: Allocation = field(default_factory=Allocation)
    measure: Measure | None = None
    describe: Callable[[Path], None] = lambda folder: None
    planned: tuple[int, ...] = ()


StageOf = Callable[[Config, Path], Stage]
"""From a configuration and the run's folder to its stage."""


def in_process(config: Config, folder: Path) -> Stage:
    """All clients in this process, one after the other."""
    return InProcess()(config, folder)


class InProcess:
    """`in_process` for several runs: what they have in common is read and tokenised once."""

    def __init__(self) -> None:
        self._encoded = Encoded()

    def __call__(self, config: Config, folder: Path) -> Stage:
        """The stage of one run."""
        assembly = assemble(config, folder, self._encoded)
        return with_all_data(assembly, lambda plan: _in_this_process(plan, assembly))


def with_all_data(assembly: Assembly, carry_out: Callable[[ServerPlan], None]) -> Stage:
    """The stage of a run whose clients' data are all here."""
    return Stage(
        agreement=assembly.workspace.agreement,
        initial=assembly.initial,
        template=assembly.template,
        allocation=assembly.allocation,
        carry_out=carry_out,
        measure=lambda adapters, told: measure(
            assembly.config, assembly.workspace, assembly.test, adapters, told
        ),
        describe=lambda path: _describe(assembly, path),
    )


def _in_this_process(plan: ServerPlan, assembly: Assembly) -> None:
    sites = assembly.sites
    client_app = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    nodes = [{"partition-id": i, "num-partitions": len(sites)} for i in range(len(sites))]
    server_app = make_server_app(plan, lambda grid: Engine(grid, 1, float("inf")))
    server_app(InProcessGrid(client_app, nodes), Context(RUN_ID, 1, {}, RecordDict(), {}))


def _describe(assembly: Assembly, folder: Path) -> None:
    rows = assembly.rows
    with (folder / "clients.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(describe.summary(rows, rows.label_column))
    describe.picture(rows, rows.label_column, folder / "clients.png")
