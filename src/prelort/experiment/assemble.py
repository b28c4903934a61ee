"""Assembling a run from its configuration: data dealt and encoded, model loaded with LoRA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prelort import tasks
from prelort.adapters import AdapterSchema, LoraAdapter, ScaleRule, peft_folder
from prelort.adapters.initial import filled
from prelort.config import Config, cohort_size
from prelort.data import federated, ranks
from prelort.data.federated import ClientRows, Dropped, FederatedRows
from prelort.data.tables import Tables
from prelort.errors import AdapterError, ConfigError
from prelort.experiment.objects import NONE, Objects
from prelort.federation.allocation import Allocation, ByLoss
from prelort.federation.client import ClientRuntime, LocalClient
from prelort.federation.messages import MAX_NAME, AdapterSpec
from prelort.federation.personal import PersonalStore
from prelort.federation.sampling import check_numbers
from prelort.methods import find, trait
from prelort.models import base
from prelort.models.lora import ADAPTER, attach, initial_adapter
from prelort.planning.starter import SIZES, size_for
from prelort.privacy.example import ledger_in
from prelort.seeds import derive, numpy_generator
from prelort.tasks.interface import Example
from prelort.tasks.store import ExampleStore, StoredExamples
from prelort.tasks.token_losses import keep_at_once
from prelort.training.preflight import Preflight, check_examples, check_model, rehearse
from prelort.training.private import calibrate
from prelort.training.processes import ALONE, Processes, call_through
from prelort.training.truncation import Truncation

log = logging.getLogger(__name__)

Examples = Sequence[Example]

HIGH = 4
"""Times the usual learning rate of a model's size from which on it is said to be high."""

NO_EXAMPLE = "no usable example (too short a text, or no assistant turn)"


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a run in this process needs."""

    config: Config
    rows: FederatedRows
    clients: tuple[LocalClient, ...]
    test: Sequence[Example]
    runtime: ClientRuntime
    tokenizer: PreTrainedTokenizerBase
    initial: LoraAdapter
    """The global adapter before the first round."""
    template: LoraConfig
    """What an exported adapter's PEFT configuration says besides its ranks."""
    allocation: Allocation
    """Which ranks change during the run."""


class DataCache:
    """The rows and examples of the last configuration.

    Several methods are compared on the same rows, which are then read and tokenised once.
    """

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._rows: FederatedRows
        self.store: ExampleStore
        """Where examples of the rows are kept."""
        self._examples: dict[tuple[str, str], StoredExamples] = {}

    def rows(self, config: Config, tables: Tables | None = None) -> FederatedRows:
        """The rows, read again only if the configuration has other data."""
        data = (config.data, config.partition, config.ranks, config.evaluation.on)
        key = (config.seed, config.task, config.model, *data)
        if key != self._key:
            self._rows, self._examples = federated.load(config, tables), {}
            self.store = ExampleStore()
            self._key = key
        return self._rows

    def examples(
        self, kind: str, client: str, encode: Callable[[], StoredExamples]
    ) -> StoredExamples:
        """A client's examples of this kind; ``client`` is empty for those of no client."""
        if (kind, client) not in self._examples:
            self._examples[kind, client] = encode()
        return self._examples[kind, client]


def assemble(
    config: Config,
    folder: Path | None = None,
    cache: DataCache | None = None,
    objects: Objects = NONE,
    processes: Processes = ALONE,
) -> Assembly:
    """Load everything that a run needs.

    Args:
        config: the resolved configuration.
        folder: where clients keep personal factors and what they have spent of a budget.
        cache: rows and examples of earlier runs.
        objects: what is not loaded but given.
        processes: those in which clients train.

    Raises:
        ConfigError: for whatever is wrong in configuration or data.
    """
    cache = cache or DataCache()
    rows = _in_order_of_head(config, cache.rows(config, objects.tables))
    for client in rows.clients:
        if len(client.name) > MAX_NAME:
            raise ConfigError(
                f"client {client.name[:40]!r}... has a name of {len(client.name)} characters: "
                f"{MAX_NAME} are allowed"
            )
    check_numbers(len(rows.clients), config.federation.clients_per_round, config.federation.quorum)
    offered, max_rank, allocation = planned_ranks(config, rows)
    planned = {
        client.name: both for client, *both in zip(rows.clients, offered, max_rank, strict=True)
    }
    task = tasks.get(config.task)
    base.check_kind(config.model, task.kind)
    tokenizer = base.load_tokenizer(config.model)

    def encode(table: Any) -> StoredExamples:
        return cache.store.encode(task, table, tokenizer, config.data, rows.labels)

    train = {
        client.name: cache.examples("train", client.name, partial(encode, client.train))
        for client in rows.clients
    }
    rows = _without_empty_clients(rows, train, config)
    runtime, initial = prepare_model(
        config,
        tokenizer,
        rank=max(max_rank),
        labels=rows.labels,
        loaded=objects.model,
        processes=processes,
    )
    runtime = replace(runtime, compute_metrics=objects.compute_metrics)
    initial = start_adapter(config, initial)

    def own_test(client: ClientRows) -> Examples:
        if client.test is None:
            return ()
        return cache.examples("test", client.name, lambda: encode(client.test))

    def shared_examples(on: str) -> Examples:
        examples = cache.examples(
            f"all {on}", "", lambda: _at_most(config, encode(_pooled(rows, on)))
        )
        if not examples:
            raise ConfigError(f"the {on} set has {NO_EXAMPLE}")
        return examples

    validation = shared_examples("validation") if allocation.by_loss is not None else ()
    at_clients = config.evaluation.at_clients or trait(find(config.method.name), "personal")
    clients = tuple(
        LocalClient(
            name=client.name,
            rank=planned[client.name][0],
            examples=train[client.name],
            runtime=runtime,
            max_rank=planned[client.name][1],
            validation=validation,
            test=own_test(client) if at_clients else (),
            personal=PersonalStore(folder / "personal") if folder is not None else None,
            ledger=ledger_in(folder, client.name) if folder is not None else None,
        )
        for client in rows.clients
    )
    if at_clients and not any(client.test for client in clients):
        raise ConfigError(
            "no client has test rows of its own to measure on: omit data.test, so that each client "
            "holds out data.test_fraction of its rows, or add the column to it by which natural "
            "clients are dealt"
        )
    test = shared_examples(config.evaluation.on)
    template = runtime.model.peft_config[ADAPTER]
    return Assembly(config, rows, clients, test, runtime, tokenizer, initial, template, allocation)


def _in_order_of_head(config: Config, rows: FederatedRows) -> FederatedRows:
    """The rows with their classes in the order of the base's own head, if it has just these."""
    names = getattr(base.load_configuration(config.model), "id2label", None) or {}
    in_order = tuple(str(names[number]) for number in sorted(names))
    same = config.data.labels is None and {*in_order} == {*rows.labels}
    return replace(rows, labels=in_order) if same and len(in_order) == len(rows.labels) else rows


def _without_empty_clients(
    rows: FederatedRows, examples: Mapping[str, Examples], config: Config
) -> FederatedRows:
    """The rows without clients that have no training example, which a warning names.

    Raises `ConfigError` if too few clients are left.
    """
    without = [client for client in rows.clients if not examples[client.name]]
    if not without:
        return rows
    names = ", ".join(repr(client.name) for client in without[:5]) + ", ..." * (len(without) > 5)
    reason = f"clients left out, since they have {NO_EXAMPLE}: {len(without)} ({names})"
    left = tuple(client for client in rows.clients if examples[client.name])
    if not left:
        raise ConfigError(f"data.source has {NO_EXAMPLE}, at any of its {len(without)} clients")
    per_round, quorum = config.federation.clients_per_round, config.federation.quorum
    try:
        check_numbers(len(left), cohort_size(per_round, len(left)), quorum)
    except ConfigError as error:
        raise ConfigError(f"{error}; {reason}") from None
    warnings.warn(reason, stacklevel=3)
    dropped = [Dropped(client.name, len(client.train), NO_EXAMPLE) for client in without]
    return replace(rows, clients=left, dropped=(*rows.dropped, *dropped))


def preflight(assembly: Assembly) -> Preflight:
    """Try the model on the first client's examples, before anything is trained."""
    config, runtime = assembly.config, assembly.runtime
    check_examples(config, runtime.tokenizer, {c.name: c.examples for c in assembly.clients})
    _check_rate(config, runtime.model.get_base_model())
    found = rehearse(config, runtime, assembly.initial, assembly.clients[0].examples)
    for client in assembly.clients:
        calibrate(config, len(client.examples))
    return found


def _check_rate(config: Config, model: PreTrainedModel) -> None:
    """Say that a rate is made for a smaller model: that of the embedded one, for instance."""
    parameters, rate = model.num_parameters(), config.training.learning_rate
    size = size_for(parameters)
    usual, is_tiny = float(size.rate), size is SIZES[0]  # which bear any rate
    if config.training.optimizer != "sgd" and not is_tiny and rate > HIGH * usual:
        warnings.warn(
            f"training.learning_rate = {rate:g} is high for a model of {parameters / 1e6:.0f} "
            f"million parameters, where {usual:g} is usual: `prelort config --task {config.task} "
            f"--model {config.model.name}` writes values that suit it",
            stacklevel=3,
        )


def planned_ranks(config: Config, rows: FederatedRows) -> tuple[list[int], list[int], Allocation]:
    """Each client's first rank, the largest rank it may get, and the allocation of ranks."""
    offered = [client.rank for client in rows.clients]
    names = [client.name for client in rows.clients]
    sizes = [len(client.train) for client in rows.clients]
    by_loss = None
    if config.ranks.allocation == "by-loss":
        by_loss = ByLoss(max(offered), config.ranks.high_share)
        offered = [min(offered)] * len(offered)
    schedule: dict[int, dict[str, int]] = {}
    for key, mix in config.ranks.schedule.items():
        later = config.ranks.model_copy(update={"mix": mix})
        try:
            assigned = ranks.assign(later, sizes, config.seed)
        except ConfigError as error:
            message = str(error).replace("ranks.mix", f"ranks.schedule.{key}", 1)
            raise ConfigError(message) from None
        schedule[int(key)] = dict(zip(names, assigned, strict=True))
    allocation = Allocation(schedule, by_loss)
    of_all = {by_loss.high} if by_loss is not None else set()
    if trait(find(config.method.name), "ignores_ranks"):
        of_all |= {max({*offered, *allocation.levels()})}
    max_rank = [
        max({rank, *of_all, *(later[name] for later in schedule.values())})
        for name, rank in zip(names, offered, strict=True)
    ]
    return offered, max_rank, allocation


def _pooled(rows: FederatedRows, on: str) -> Any:
    """The test rows, or all clients' validation rows."""
    if on == "test":
        return rows.test
    return concatenate_datasets([c.validation for c in rows.clients if c.validation is not None])


def prepare_model(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    labels: Sequence[str],
    loaded: PreTrainedModel | None = None,
    processes: Processes = ALONE,
) -> tuple[ClientRuntime, LoraAdapter]:
    """The base model with LoRA layers of ``rank``, and the federation's initial adapter.

    ``loaded``: the base model if it need not be loaded; its weights are shared.
    ``processes``: those in which clients train. Raises `ConfigError`, also for modules to save
    where FSDP splits the base.
    """
    task = tasks.get(config.task)
    fingerprint = base.fingerprint(config.model)
    new = base.new_modules(config.model, task.kind, labels)
    with torch.random.fork_rng():
        # A new classification head comes from the global generator: the same head for a seed.
        torch.manual_seed(derive(config.seed, "head"))
        name, pad_id = config.model.name, tokenizer.pad_token_id
        if loaded is not None:
            model = base.shared_copy(loaded, name, task.kind, labels, pad_id=pad_id)
        else:
            to_split = processes.split is not None
            model = base.load_model(
                config.model, task.kind, labels, pad_id=pad_id, to_split=to_split
            )
        check_model(config, model, task.kind)
        if processes.split is not None:
            if config.lora.target_parameters:
                raise ConfigError(
                    "FSDP does not work with lora.target_parameters: use a distributed_type "
                    "without FSDP, where each GPU holds the base"
                )
            if new or config.lora.modules_to_save:
                raise ConfigError(
                    "FSDP does not work with modules that are trained in full "
                    f"({', '.join((*new, *(config.lora.modules_to_save or ())))}): use a "
                    "distributed_type without FSDP, where each GPU holds the base"
                )
            processes.split(model)
            keep_at_once(model)  # processes would wait for each other in parts that not all have
        wrapped = attach(model, config.lora, rank, task.kind, new)
        if processes.split is not None:  # a copy of the model would call this one's base
            call_through(wrapped)
    scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
    initial = initial_adapter(wrapped, scale, config.seed)
    _warn_of_large_ranks(initial)
    runtime = ClientRuntime(
        model=wrapped,
        truncation=Truncation(wrapped, scale),
        task=task,
        pad_id=tokenizer.pad_token_id,
        spec=AdapterSpec(fingerprint, AdapterSchema.of(initial), scale),
        tokenizer=tokenizer,
        modules_to_save=initial.modules_to_save,
        processes=processes,
    )
    return runtime, initial


def start_adapter(config: Config, initial: LoraAdapter) -> LoraAdapter:
    """The initial adapter, or that of ``lora.start_from``, filled up to the initial one's ranks.

    Raises `ConfigError` for an adapter of other layers, modules or another scale.
    """
    if config.lora.start_from is None:
        return initial
    folder = Path(config.lora.start_from)
    ranks = sorted(folder.glob("adapters/rank-*"), key=lambda path: int(path.name[5:]))
    try:
        adapter, _ = peft_folder.load(ranks[-1] if ranks else folder)
        if adapter.scale != initial.scale:
            raise AdapterError(
                f"its scale is {adapter.scale}, and that of this run {initial.scale}"
            )
        adapter = adapter.prefix(min(adapter.rank, initial.rank))
        AdapterSchema.of(initial).check(adapter, adapter.rank)
    except AdapterError as error:
        runs = sorted(repr(str(path.parent)) for path in folder.glob("*/adapters"))
        advice = f"; name one of its runs: {', '.join(runs)}" if runs and not ranks else ""
        raise ConfigError(
            f"lora.start_from = {config.lora.start_from!r}: {error}{advice}"
        ) from None
    return filled(adapter, initial, config.seed)


def _at_most(config: Config, examples: StoredExamples) -> StoredExamples:
    """The test examples, in an order drawn by the seed, at most ``data.max_test_examples``."""
    order = numpy_generator(config.seed, "test examples").permutation(len(examples))
    return examples.select(order[: config.data.max_test_examples])


def _warn_of_large_ranks(adapter: LoraAdapter) -> None:
    for name, factors in adapter.layers.items():
        smaller = min(factors.A.shape[1], factors.B.shape[0])
        if factors.rank > smaller:
            warnings.warn(
                f"rank {factors.rank} is above the smaller dimension of layer {name!r} "
                f"({smaller}): the rank dimensions above {smaller} cannot add anything",
                stacklevel=2,
            )
            return
