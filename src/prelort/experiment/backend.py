"""Where a run takes place: what it needs before its rounds, and a transport to its clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from prelort.adapters import LoraAdapter
from prelort.config import Config
from prelort.data.federated import FederatedRows
from prelort.events import Metrics
from prelort.experiment.assemble import Assembly, DataCache, assemble, preflight
from prelort.experiment.exported import check_adapters
from prelort.experiment.measure import Progress, measure
from prelort.experiment.objects import NONE, Objects
from prelort.experiment.workers import RuntimePool, default_threads, replica
from prelort.federation.allocation import Allocation
from prelort.federation.batched import answer_batched
from prelort.federation.client import ClientRuntime, LocalClient, respond
from prelort.federation.client_app import Kind, client_app
from prelort.federation.flower import Context, RecordDict
from prelort.federation.in_process import InProcessGrid
from prelort.federation.messages import AdapterSpec
from prelort.federation.site_keys import SiteKeys
from prelort.federation.transport import Transport

Evaluate = Callable[[Mapping[int, LoraAdapter], Progress], dict[int, Metrics]]
"""The metrics of adapters, by the rank they stand for (0: the untuned base)."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What a run needs from the place where it is.

    ``initial``: the global adapter before the first round. ``template``: what an exported adapter's
    PEFT configuration says besides its ranks. ``tokenizer``: exported beside it. ``evaluate``: None
    where the server has no test examples, so that the clients measure. ``check_exported``: whether
    adapters in PEFT folders are what was measured; None where the server has no model.
    ``planned_ranks``: rank levels that are expected whoever is connected. ``rows``: who holds which
    data, where that is known. ``labels``: the class names in the order of their numbers, for a
    classification. ``site_keys``: which node's key may use which client's name; None where names
    are not verified.
    """

    spec: AdapterSpec
    initial: LoraAdapter
    template: LoraConfig
    tokenizer: PreTrainedTokenizerBase | None
    transport: Transport
    allocation: Allocation = field(default_factory=Allocation)
    evaluate: Evaluate | None = None
    check_exported: Callable[[Mapping[Path, LoraAdapter]], None] | None = None
    planned_ranks: tuple[int, ...] = ()
    rows: FederatedRows | None = None
    labels: tuple[str, ...] = ()
    site_keys: SiteKeys | None = None


Connect = Callable[[Config, Path], AbstractContextManager[Backend]]
"""From a configuration and the run's folder to a backend, for as long as the run goes on."""


class InProcess:
    """All clients in this process; runs on the same data share what was read and tokenised.

    ``parallel``: how many clients train at a time, in threads; by default as many as suits model
    and configuration, and ``max_parallel`` at most. Neither changes the results. ``objects``: what
    is given in Python.
    """

    def __init__(
        self,
        parallel: int | None = None,
        max_parallel: int | None = None,
        objects: Objects = NONE,
    ) -> None:
        self._parallel = parallel
        self._max = max_parallel
        self._objects = objects
        self._cache = DataCache()

    @contextmanager
    def __call__(self, config: Config, folder: Path) -> Iterator[Backend]:
        """The backend of one run: its clients in threads, or several in one batch."""
        self._objects.store(config.model, folder)
        assembly = assemble(config, folder, self._cache, self._objects)
        preflight(assembly)
        runtime, clients = assembly.runtime, assembly.clients
        batched = clients_per_batch(config, runtime.model.device, len(clients))
        threads = 1 if batched > 1 else self._parallel or default_threads(config, runtime.model)
        threads = min(threads, self._max or threads, len(clients))
        runtimes = [runtime, *(replica(runtime) for _ in range(threads - 1))]
        pool, ended = RuntimePool(runtimes), threading.Event()

        def client_of(context: Context) -> LocalClient:
            return clients[int(context.node_config["partition-id"])]

        def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
            with pool.one() as own:
                client = replace(client_of(context), runtime=own, stopped=ended.is_set)
                return respond(client, kind, content)

        grid = InProcessGrid(
            client_app(answer),
            [
                {"partition-id": index, "num-partitions": len(clients)}
                for index in range(len(clients))
            ],
            threads=threads,
            answer_batched=answer_batched(client_of) if batched > 1 else None,
            clients_per_batch=batched,
        )
        # Two for each thread: one under way, and one that waits while replies are aggregated.
        in_flight = batched if batched > 1 else 1 if threads == 1 else 2 * threads
        try:
            yield with_all_data(assembly, Transport(grid, in_flight), runtimes)
        finally:
            ended.set()  # cancels clients that still train
            grid.close()


def clients_per_batch(config: Config, device: torch.device, clients: int) -> int:
    """The number of clients to train in one batch: "auto" is one on a CPU, all on a GPU.

    Where a GPU's memory does not suffice they are trained in halves. With packing they train alone,
    and with an optimiser in 8 bits, whose blocks of numbers would span layers.
    """
    if config.federation.clients_per_batch != "auto":
        return config.federation.clients_per_batch
    alone = config.training.packing or config.training.optimizer == "adamw-8bit"
    return 1 if device.type == "cpu" or alone else clients


def with_all_data(
    assembly: Assembly, transport: Transport, runtimes: Sequence[ClientRuntime] = ()
) -> Backend:
    """The backend of a run whose clients' data are all on this machine."""
    return Backend(
        spec=assembly.runtime.spec,
        initial=assembly.initial,
        template=assembly.template,
        tokenizer=assembly.tokenizer,
        transport=transport,
        allocation=assembly.allocation,
        planned_ranks=tuple(sorted({client.rank for client in assembly.clients})),
        evaluate=lambda adapters, progress: measure(
            assembly.config,
            runtimes or [assembly.runtime],
            assembly.test,
            adapters,
            progress,
        ),
        check_exported=lambda exported: check_adapters(
            assembly.config.model, assembly.runtime, assembly.rows.labels, exported
        ),
        rows=assembly.rows,
        labels=assembly.rows.labels,
    )
