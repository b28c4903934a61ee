"""Where a run takes place: what is known before its rounds, and who carries them out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from rich.console import Console

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.experiment.assemble import Assembly, Encoded, assemble
from prelort.experiment.measure import Measured, measure
from prelort.experiment.workers import RuntimePool, default_threads, replica
from prelort.federation.allocation import Allocation
from prelort.federation.batched import answer_batched
from prelort.federation.client import ClientRuntime, LocalClient, respond
from prelort.federation.client_app import Kind, client_app
from prelort.federation.client_manager import AdapterSpec
from prelort.federation.flower import Context, RecordDict
from prelort.federation.in_process import RUN_ID, InProcessGrid
from prelort.federation.server import ServerPlan, make_server_app
from prelort.federation.transport import Engine
from prelort.report import describe

Measure = Callable[[Mapping[int, LoraAdapter], Callable[[int, int], None]], Measured]
"""The metrics of adapters, by the rank they stand for (0: the base); told of its progress."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a run needs from its place.

    ``measure``: None where the server has no test rows, so that the clients measure.
    ``describe`` leaves a table and a picture of who holds what, where that is known.
    """

    spec: AdapterSpec
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
    """All clients in this process, as many side by side as suits model and configuration."""
    return InProcess()(config, folder)


class InProcess:
    """`in_process` for several runs: what they have in common is read and tokenised once.

    ``threads``: how many clients train side by side, by default as many as suits model and
    configuration, but ``most_threads``. Neither changes the results.
    """

    def __init__(self, threads: int | None = None, most_threads: int | None = None) -> None:
        self._threads = threads
        self._most = most_threads
        self._encoded = Encoded()

    def __call__(self, config: Config, folder: Path) -> Stage:
        """The stage of one run: its clients in so many threads, or several in one batch."""
        assembly = assemble(config, folder, self._encoded)
        work = assembly.runtime
        together = clients_together(config, work.model.device, len(assembly.sites))
        threads = 1 if together > 1 else self._threads or default_threads(config, work.model)
        threads = min(threads, self._most or threads, len(assembly.sites))
        runtimes = [work, *(replica(work) for _ in range(threads - 1))]
        return with_all_data(
            assembly,
            lambda plan: _in_this_process(plan, assembly, runtimes, together),
            runtimes,
        )


def clients_together(config: Config, device: torch.device, clients: int) -> int:
    """How many clients of so many are trained in one batch: by itself on a CPU one, on a GPU all.

    Where a GPU's memory does not suffice they are trained in halves.
    """
    if config.federation.together != "auto":
        return config.federation.together
    return 1 if device.type == "cpu" else clients


def with_all_data(
    assembly: Assembly,
    carry_out: Callable[[ServerPlan], None],
    runtimes: Sequence[ClientRuntime] = (),
) -> Stage:
    """The stage of a run whose clients' data are all here."""
    return Stage(
        spec=assembly.runtime.spec,
        initial=assembly.initial,
        template=assembly.template,
        allocation=assembly.allocation,
        carry_out=carry_out,
        measure=lambda adapters, told: measure(
            assembly.config,
            runtimes or [assembly.runtime],
            assembly.test,
            adapters,
            told,
        ),
        describe=lambda path: _describe(assembly, path),
    )


def _in_this_process(
    plan: ServerPlan, assembly: Assembly, runtimes: Sequence[ClientRuntime], together: int
) -> None:
    free, ended = RuntimePool(runtimes), threading.Event()

    def site_of(context: Context) -> LocalClient:
        return assembly.sites[int(context.node_config["partition-id"])]

    def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
        with free.one() as work:
            site = replace(site_of(context), runtime=work, stopped=ended.is_set)
            return respond(site, kind, content)

    nodes = [
        {"partition-id": index, "num-partitions": len(assembly.sites)}
        for index in range(len(assembly.sites))
    ]
    threads = len(runtimes)
    grid = InProcessGrid(
        client_app(answer),
        nodes,
        threads=threads,
        together=answer_batched(site_of) if together > 1 else None,
        group=together,
    )
    # Two for each thread: one under way, and one that waits while replies are added up.
    in_flight = together if together > 1 else 1 if threads == 1 else 2 * threads
    server_app = make_server_app(plan, lambda grid: Engine(grid, in_flight, float("inf")))
    try:
        server_app(grid, Context(RUN_ID, 1, {}, RecordDict(), {}))
    finally:
        ended.set()  # whoever still trains need not go on
        grid.close()


def _describe(assembly: Assembly, folder: Path) -> None:
    rows = assembly.rows
    with (folder / "clients.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(describe.summary(rows, rows.label_column))
    describe.picture(rows, rows.label_column, folder / "clients.png")
