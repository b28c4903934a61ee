"""A run whose data are at real sites: the server's backend without rows, and a site's client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from prelort import tasks
from prelort.adapters import AdapterSchema, LoraAdapter, ScaleRule
from prelort.adapters.initial import fresh
from prelort.config import SITES, Config
from prelort.data import federated, ranks
from prelort.errors import ConfigError
from prelort.events import Metrics
from prelort.experiment.assemble import (
    NO_EXAMPLE,
    assemble,
    preflight,
    prepare_model,
    start_adapter,
)
from prelort.experiment.backend import Backend, Connect, Evaluate
from prelort.experiment.measure import Progress, measure
from prelort.federation.allocation import Allocation, ByLoss
from prelort.federation.client import ClientRuntime, LocalClient
from prelort.federation.flower import Grid
from prelort.federation.messages import AdapterSpec
from prelort.federation.personal import PersonalStore
from prelort.federation.site_keys import SiteKeys
from prelort.federation.transport import Transport
from prelort.models import base
from prelort.models.lora import ADAPTER, shapes
from prelort.planning.skeleton import skeleton
from prelort.privacy.example import ledger_in
from prelort.tasks.interface import Example
from prelort.tasks.store import ExampleStore
from prelort.training.preflight import check_examples, rehearse
from prelort.training.private import calibrate
from prelort.training.processes import ALONE, Processes


def at_sites(grid: Grid) -> Connect:
    """The backend of a run over a Flower grid whose nodes are real sites."""

    @contextmanager
    def connect(config: Config, folder: Path) -> Iterator[Backend]:
        backend = backend_at_sites(config, grid)
        verified = config.federation.verify_names
        yield replace(backend, site_keys=SiteKeys(folder)) if verified else backend

    return connect


def backend_at_sites(config: Config, grid: Grid) -> Backend:
    """The server's backend of a run whose data are at real sites.

    The global adapter has the highest rank of ``ranks.mix``; each site states its own. The server
    measures if it has rows (``data.test``, or a ``data.source`` other than "sites", which is dealt
    to the demonstration's sites); otherwise the sites do, each on its own rows. A server without
    rows or a head to initialise loads no weights.
    """
    planned = ranks.levels(config.ranks.mix)
    if config.ranks.schedule:
        raise ConfigError(
            "ranks.schedule needs clients that are known beforehand: real sites state their own "
            "ranks, and may offer others"
        )
    if config.data.source != SITES:
        assembly = assemble(config)
        server = _with_weights(config, assembly.runtime, assembly.initial, assembly.test)
        labels, initial = assembly.rows.labels, assembly.initial
    else:
        server = _without_rows(config, max(planned))
        labels = config.data.labels or ()
        initial = start_adapter(config, server.initial)
    federation = config.federation
    by_loss = ByLoss(max(planned), config.ranks.high_share)
    return Backend(
        spec=server.spec,
        initial=initial,
        template=server.template,
        tokenizer=_tokenizer(config),
        transport=Transport(grid, deadline=federation.timeout, patience=federation.wait),
        allocation=Allocation({}, by_loss if config.ranks.allocation == "by-loss" else None),
        evaluate=server.evaluate,
        planned_ranks=planned,
        labels=labels,
    )


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The tokenizer to export; None where the server has none, which needs no more than weights."""
    try:
        return base.load_tokenizer(config.model)
    except ConfigError:
        return None


def own_site(
    config: Config,
    name: str,
    rank: int,
    folder: Path | None = None,
    processes: Processes = ALONE,
) -> LocalClient:
    """The client of the site ``name`` with this rank, on all rows of its own ``data.source``.

    In ``folder`` it keeps personal factors, if the method has any. ``processes``: those in which it
    trains. Raises `ConfigError`.
    """
    planned = ranks.levels(config.ranks.mix)
    if not 1 <= rank <= max(planned):
        raise ConfigError(
            f"rank = {rank} is not allowed: the federation's highest is {max(planned)} (ranks.mix)"
        )
    base.check_kind(config.model, tasks.get(config.task).kind)
    rows = federated.load_own(config, name)
    tokenizer = base.load_tokenizer(config.model)
    labels = config.data.labels or ()
    runtime, initial = prepare_model(
        config, tokenizer, rank=max(planned), labels=labels, processes=processes
    )

    store = ExampleStore()

    def encode(table: Any) -> Sequence[Example]:
        if table is None:
            return ()
        return store.encode(runtime.task, table, tokenizer, config.data, labels)

    examples = encode(rows.train)
    if not examples:
        raise ConfigError(f"data.source has {NO_EXAMPLE}")
    check_examples(config, tokenizer, {name: examples})
    rehearse(config, runtime, initial, examples)
    calibrate(config, len(examples))
    by_loss = config.ranks.allocation == "by-loss"
    return LocalClient(
        name=name,
        rank=min(planned[0], rank) if by_loss else rank,
        examples=examples,
        runtime=runtime,
        max_rank=rank,
        validation=encode(rows.validation) if by_loss else (),
        test=encode(rows.test),
        personal=PersonalStore(folder / "personal") if folder is not None else None,
        ledger=ledger_in(folder, name) if folder is not None else None,
    )


def dealt_site(
    config: Config,
    index: int,
    rank: int | None = None,
    folder: Path | None = None,
    processes: Processes = ALONE,
) -> LocalClient:
    """Client ``index`` of the configured data as a site, for demonstrations.

    ``rank``: instead of the one that it was assigned. ``processes``: those in which it trains.
    Raises `ConfigError`.
    """
    assembly = assemble(config, folder, processes=processes)
    preflight(assembly)
    clients = assembly.clients
    if not 0 <= index < len(clients):
        raise ConfigError(
            f"partition = {index} is not allowed: the data are dealt to {len(clients)} clients, "
            "counted from 0"
        )
    client = clients[index]
    return client if rank is None else replace(client, rank=rank, max_rank=rank)


@dataclass(frozen=True, slots=True)
class _ServerModel:
    """What the server knows of the model by itself."""

    spec: AdapterSpec
    initial: LoraAdapter
    template: LoraConfig
    evaluate: Evaluate | None = None


def _without_rows(config: Config, rank: int) -> _ServerModel:
    """The model with weights if the server has test rows or a head, else its shapes alone."""
    labels = config.data.labels or ()
    classes = tasks.get(config.task).kind == "classification"
    if classes and not labels:
        raise ConfigError(
            "data.labels is not set: with data at real sites nobody sees all classes, so their "
            "names, in one order, must be configured"
        )
    if config.data.test is None and not classes and not config.lora.modules_to_save:
        return _without_weights(config, rank)
    tokenizer = base.load_tokenizer(config.model)
    runtime, initial = prepare_model(config, tokenizer, rank=rank, labels=labels)
    examples: Sequence[Example] = ()
    if config.data.test is not None:
        rows = federated.load_test(config)
        examples = ExampleStore().encode(runtime.task, rows, tokenizer, config.data, labels)
    return _with_weights(config, runtime, initial, examples)


def _with_weights(
    config: Config, runtime: ClientRuntime, initial: LoraAdapter, examples: Sequence[Example]
) -> _ServerModel:
    template: LoraConfig = runtime.model.peft_config[ADAPTER]
    if not examples:
        return _ServerModel(runtime.spec, initial, template)

    def evaluate(adapters: Mapping[int, LoraAdapter], progress: Progress) -> dict[int, Metrics]:
        return measure(config, [runtime], examples, adapters, progress)

    return _ServerModel(runtime.spec, initial, template, evaluate)


def _without_weights(config: Config, rank: int) -> _ServerModel:
    """The adapter specification and the initial adapter from the model's configuration alone."""
    task = tasks.get(config.task)
    plain = config.model.model_copy(update={"quantization": "none"})  # the shapes are the same
    model = skeleton(plain, config.lora, rank, task.kind, labels=0)
    scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
    initial = fresh(shapes(model, scale), config.seed)
    spec = AdapterSpec(base.fingerprint(config.model), AdapterSchema.of(initial), scale)
    return _ServerModel(spec, initial, model.peft_config[ADAPTER])
