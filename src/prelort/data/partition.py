"""Partitioning rows among clients: pure functions of the rows and the seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from prelort.config import PYTHON, PartitionConfig
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator
from prelort.tasks.columns import class_names, find, listed, require, usual

if TYPE_CHECKING:
    from datasets import Dataset

Indices = npt.NDArray[np.int64]

DEFAULT_CLIENTS = 16
"""Number of clients without natural clients and ``partition.clients``."""

CLIENT_COLUMNS = ("client", "client_id")
"""Usual names of the column of natural clients, without regard to case."""

TRIES = 100
"""Draws of Dirichlet shares before the smallest clients are topped up."""


@dataclass(frozen=True)
class Part:
    """The rows of one client: their numbers in the data set, ascending."""

    name: str
    indices: tuple[int, ...]


def resolved(config: PartitionConfig, rows: Dataset) -> PartitionConfig:
    """Resolve ``auto`` for these rows, and the number of clients where no column gives it.

    By the column of clients if there is one, else iid; 16 clients, or as many as there is data for.
    """
    by, clients = config.by, config.clients
    if by == "auto":
        named = config.column is not None or usual(CLIENT_COLUMNS, rows.column_names)
        by = "column" if named else "iid"
    if by != "column" and clients is None:
        most = len(rows) // max(config.min_examples, 2)  # one row may be held out
        clients = max(1, min(DEFAULT_CLIENTS, most))
    return config.model_copy(update={"by": by, "clients": clients})


def partition(
    rows: Dataset, config: PartitionConfig, label_column: str | None, seed: int
) -> list[Part]:
    """Partition the rows by ``config.by``; each client gets at least ``config.min_examples``.

    - ``auto``: see `resolved`.
    - ``column``: one client per value, named by it, largest first (of equal ones, by name);
      ``clients`` keeps the largest, and values with too few rows are left out.
    - ``iid``: equal random shares.
    - ``dirichlet``: each label's rows in shares drawn from a symmetric Dirichlet(``alpha``).
    - ``quantity``: sizes drawn from Dirichlet(``alpha``), labels at random.
    - ``shards``: rows sorted by label and cut into equal shards, ``shards_per_client`` each.

    All but ``column`` use every row exactly once. dirichlet and shards partition by
    ``config.column``, or else by ``label_column``. Raises `ConfigError`.
    """
    config = resolved(config, rows)
    if config.by == PYTHON:
        raise ConfigError("partition.by = 'python' is for the objects of prelort.Federation")
    if config.by == "column":
        return _by_column(rows, config)
    clients = _number_of_clients(config, len(rows))
    random = numpy_generator(seed, "partition", config.by)
    every = np.arange(len(rows))
    match config.by:
        case "iid":
            dealt = np.array_split(random.permutation(every), clients)
        case "quantity":
            dealt = _dirichlet([every], clients, config, random)
        case "dirichlet":
            groups = _label_groups(rows, config, label_column)
            dealt = _dirichlet(groups, clients, config, random)
        case "shards":
            groups = _label_groups(rows, config, label_column)
            dealt = _shards(groups, clients, config, random)
    width = len(str(clients - 1))
    return [Part(f"client-{k:0{width}d}", _ascending(indices)) for k, indices in enumerate(dealt)]


def client_column(config: PartitionConfig, available: Sequence[str]) -> str:
    """The column whose values are the natural clients: the configured one, else a usual one."""
    return find("partition.column", config.column, CLIENT_COLUMNS, available)


def _by_column(rows: Dataset, config: PartitionConfig) -> list[Part]:
    column = client_column(config, rows.column_names)
    groups = _groups(class_names(rows, column, "partition.column"))
    enough = {k: v for k, v in groups.items() if len(v) >= config.min_examples}
    largest_first = sorted(enough, key=lambda name: (-len(enough[name]), name))
    if len(enough) < (config.clients or 1):
        requested = f", and partition.clients = {config.clients}" if config.clients else ""
        raise ConfigError(
            f"{len(enough)} of the {len(groups)} values of column {column!r} have the "
            f"{config.min_examples} rows that a client needs{requested}"
        )
    return [Part(name, _ascending(enough[name])) for name in largest_first[: config.clients]]


def _number_of_clients(config: PartitionConfig, rows: int) -> int:
    assert config.clients is not None  # `resolved` has set it
    needed = config.clients * config.min_examples
    if needed > rows and config.clients == 1:
        raise ConfigError(f"data.source: there are {rows} rows, at least {needed} are needed")
    if needed > rows:
        raise ConfigError(
            f"partition.clients = {config.clients} needs {needed} rows, {config.min_examples} for "
            f"each client, and there are {rows}"
        )
    return config.clients


def _label_groups(
    rows: Dataset, config: PartitionConfig, label_column: str | None
) -> list[Indices]:
    """The rows of each label, labels in a fixed order."""
    column = config.column or label_column
    if column is None:
        raise ConfigError(
            f"partition.by = {config.by!r} needs a label: set partition.column, "
            f"where {listed(rows.column_names)}"
        )
    require("partition.column", column, rows.column_names)
    groups = _groups(class_names(rows, column, "partition.column"))
    return [groups[name] for name in sorted(groups)]


def _groups(names: Sequence[str]) -> dict[str, Indices]:
    values, inverse = np.unique(np.asarray(names, dtype=object), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    cuts = np.cumsum(np.bincount(inverse, minlength=len(values)))[:-1]
    return dict(zip((str(v) for v in values), np.split(order, cuts), strict=True))


def _dirichlet(
    groups: Sequence[Indices], clients: int, config: PartitionConfig, random: np.random.Generator
) -> list[Indices]:
    """Cut each group at random shares, until every client has enough or tries run out."""
    for _ in range(TRIES):
        dealt: list[list[Indices]] = [[] for _ in range(clients)]
        for group in groups:
            shares = random.dirichlet(np.full(clients, config.alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(group)).astype(np.int64)
            for client, piece in enumerate(np.split(random.permutation(group), cuts)):
                dealt[client].append(piece)
        joined = [np.concatenate(pieces) for pieces in dealt]
        if min(map(len, joined)) >= config.min_examples:
            return joined
    return _top_up(joined, config.min_examples)


def _shards(
    groups: Sequence[Indices], clients: int, config: PartitionConfig, random: np.random.Generator
) -> list[Indices]:
    by_label = np.concatenate([random.permutation(group) for group in groups])
    number = clients * config.shards_per_client
    if number > len(by_label):
        raise ConfigError(
            f"partition.clients = {clients} with partition.shards_per_client = "
            f"{config.shards_per_client} needs {number} rows, and there are {len(by_label)}"
        )
    shards = np.array_split(by_label, number)
    hands = random.permutation(number).reshape(clients, config.shards_per_client)
    dealt = [np.concatenate([shards[i] for i in hand]) for hand in hands]
    return _top_up(dealt, config.min_examples)


def _top_up(dealt: Iterable[Indices], min_examples: int) -> list[Indices]:
    """Move rows, one by one, from the largest client to the smallest until all have enough."""
    hands = [list(indices) for indices in dealt]
    while len(smallest := min(hands, key=len)) < min_examples:
        smallest.append(max(hands, key=len).pop())
    return [np.asarray(hand, dtype=np.int64) for hand in hands]


def _ascending(indices: Indices) -> tuple[int, ...]:
    return tuple(int(i) for i in np.sort(indices))
