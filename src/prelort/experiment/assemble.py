"""From a configuration to what a run needs: data dealt and encoded, model loaded and adapted."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig

from prelort import tasks
from prelort.adapters import AdapterSchema, LoraAdapter, ScaleRule
from prelort.config import Config
from prelort.data import federated
from prelort.data.federated import FederatedRows
from prelort.errors import ConfigError
from prelort.federation.registry import Agreement
from prelort.federation.sampling import check_numbers
from prelort.federation.site import Site, Workspace
from prelort.models import base
from prelort.models.lora import ADAPTER, attach, initial_adapter
from prelort.seeds import derive, numpy_generator
from prelort.tasks.interface import Example
from prelort.training.truncation import Truncation

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a run in this process works with."""

    config: Config
    rows: FederatedRows
    sites: tuple[Site, ...]
    test: Sequence[Example]
    workspace: Workspace
    tokenizer: Any
    initial: LoraAdapter
    """The global adapter before the first round."""
    template: LoraConfig
    """What an exported adapter's PEFT configuration says besides its ranks."""


def assemble(config: Config) -> Assembly:
    """Load everything. Raises `ConfigError` for whatever is wrong in configuration or data."""
    rows = federated.load(config)
    check_numbers(len(rows.clients), config.federation.clients_per_round, config.federation.quorum)
    tokenizer = base.load_tokenizer(config.model)
    workspace, initial = prepare_model(
        config, tokenizer, rank=max(client.rank for client in rows.clients), labels=rows.labels
    )
    task = workspace.task

    def encode(what: str, some: Any) -> list[Example]:
        examples = task.encode(some, tokenizer, config.data, rows.labels)
        if not examples:
            raise ConfigError(f"{what} has no text long enough to make one example")
        return examples

    sites = tuple(
        Site(client.name, client.rank, encode(f"client {client.name!r}", client.train), workspace)
        for client in rows.clients
    )
    test = _at_most(config, encode("the test set", rows.test))
    template = workspace.model.peft_config[ADAPTER]
    return Assembly(config, rows, sites, test, workspace, tokenizer, initial, template)


def prepare_model(
    config: Config, tokenizer: Any, *, rank: int, labels: Sequence[str]
) -> tuple[Workspace, LoraAdapter]:
    """The base model with LoRA layers of ``rank``, and the federation's initial adapter."""
    task = tasks.get(config.task)
    fingerprint = base.fingerprint(config.model)
    with torch.random.fork_rng():
        # A new classification head comes from the global generator: the same head for a seed.
        torch.manual_seed(derive(config.seed, "head"))
        model = base.load_model(config.model, task.kind, labels, pad_id=tokenizer.pad_token_id)
        wrapped = attach(model, config.lora, rank, task.kind)
    scale = ScaleRule(config.lora.scale_rule, config.lora.scale)
    initial = initial_adapter(wrapped, scale, config.seed)
    _warn_of_large_ranks(initial)
    workspace = Workspace(
        model=wrapped,
        truncation=Truncation(wrapped, scale),
        task=task,
        pad_id=tokenizer.pad_token_id,
        agreement=Agreement(fingerprint, AdapterSchema.of(initial), scale),
    )
    return workspace, initial


def _at_most(config: Config, examples: list[Example]) -> list[Example]:
    """The test examples, in an order drawn by the seed, at most ``data.max_test_examples``."""
    order = numpy_generator(config.seed, "test examples").permutation(len(examples))
    return [examples[index] for index in order[: config.data.max_test_examples]]


def _warn_of_large_ranks(adapter: LoraAdapter) -> None:
    for name, factors in adapter.layers.items():
        smaller = min(factors.A.shape[1], factors.B.shape[0])
        if factors.rank > smaller:
            warnings.warn(
                f"rank {factors.rank} is above the smaller dimension of layer {name!r} "
                f"({smaller}): the slots above {smaller} cannot add anything",
                stacklevel=2,
            )
            return
