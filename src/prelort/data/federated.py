"""From a configuration to each client's rows: read, check, deal, hold out, assign ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from datasets import Dataset, concatenate_datasets

from prelort import tasks
from prelort.config import EMBEDDED, Config, PartitionConfig
from prelort.data import ranks, sources
from prelort.data.partition import Part, client_column, partition, resolved
from prelort.data.shares import apportion
from prelort.errors import ConfigError
from prelort.seeds import numpy_generator
from prelort.tasks.columns import class_names, class_order, listed, require_filled
from prelort.tasks.columns import names as column_names


@dataclass(frozen=True)
class ClientRows:
    """One client's share: what it trains on, and what it is measured on (None: nothing).

    ``validation``: rows to choose settings by, None unless ``data.validation_fraction`` is given.
    """

    name: str
    rank: int
    train: Dataset
    test: Dataset | None
    validation: Dataset | None = None


@dataclass(frozen=True)
class Dropped:
    """A value of the client column that became no client, and why."""

    name: str
    rows: int
    reason: str


@dataclass(frozen=True)
class FederatedRows:
    """The rows of a whole run.

    ``test`` is the given test set, or else all clients' test rows one after another. ``labels``
    are the class names in the order of their numbers (empty unless the task is classification),
    and ``label_column`` the column that holds them, or the one that was dealt by.
    """

    clients: tuple[ClientRows, ...]
    test: Dataset
    labels: tuple[str, ...]
    label_column: str | None
    dropped: tuple[Dropped, ...]


def load(config: Config) -> FederatedRows:
    """Read, check and deal the configured data. Raises `ConfigError` in one sentence.

    Equal configurations and data give equal rows. Where there is no test set each client holds
    out ``data.test_fraction`` of its rows, at least one, and trains on at least one.
    """
    train, test = sources.read(config.data)
    columns = _check_columns(config, train, test)
    labels: tuple[str, ...] = ()
    if config.task == "classification":
        # Of all rows that were read: the classes belong to the data set, not to what was drawn.
        labels = _check_labels(train, test, columns[1], config.data.labels)
    label_column = columns[1] if labels else config.data.label_column
    train = _draw(train, config.data.max_train_examples, config.seed, "train")
    dealing = resolved(config.partition, train)
    config = config.model_copy(update={"partition": dealing})
    # A client needs a row to train on, and one for each set that it holds out itself.
    least = 1 + (test is None) + (config.data.validation_fraction > 0)
    dealing = dealing.model_copy(update={"min_examples": max(dealing.min_examples, least)})
    parts = partition(train, dealing, label_column, config.seed)
    dropped = _dropped(train, dealing, parts)
    trains = [train.select(part.indices) for part in parts]
    names = [part.name for part in parts]
    learnt, tests, pooled = _with_tests(config, test, trains, names)
    validation: Sequence[Dataset | None] = [None] * len(names)
    share = config.data.validation_fraction
    if share > 0:
        learnt, validation = _hold_out(config.seed, "validation", share, learnt, names)
    assigned = ranks.assign(config.ranks, [len(rows) for rows in learnt], config.seed)
    clients = map(ClientRows, names, assigned, learnt, tests, validation)
    shown = label_column or (config.partition.column if config.partition.by != "column" else None)
    return FederatedRows(tuple(clients), pooled, labels, shown, dropped)


def load_own(config: Config, name: str) -> ClientRows:
    """The rows of one site of this name, which sees no others; its rank is not known here (0).

    What it holds out is what it would hold out as a client of this name among others. Raises
    `ConfigError` in one sentence.
    """
    own = config.data.model_copy(update={"test": None})
    train, test = sources.read(own)
    columns = _check_columns(config, train, test)
    if config.task == "classification":
        if not config.data.labels:
            raise ConfigError(
                "data.labels is not set: sites that see only their own rows need the names of all "
                "classes, in one order"
            )
        _check_labels(train, test, columns[1], config.data.labels)
    train = _draw(train, config.data.max_train_examples, config.seed, "train")
    share = config.data.validation_fraction
    least = 1 + (config.data.test is None) + (share > 0)
    if len(train) < least:
        raise ConfigError(f"data.source has {len(train)} rows, at least {least} are needed")
    trains: list[Dataset] = [train]
    tests: Sequence[Dataset | None] = [None]
    if config.data.test is None:  # else the server has rows to test on
        trains, tests = _hold_out(
            config.seed, "hold-out", config.data.test_fraction, trains, [name]
        )
        tests = _draw_of_each(tests, config.data.max_test_examples, config.seed)
    validation: Sequence[Dataset | None] = [None]
    if share > 0:
        trains, validation = _hold_out(config.seed, "validation", share, trains, [name])
    return ClientRows(name, 0, trains[0], tests[0], validation[0])


def load_test(config: Config) -> Dataset:
    """The rows of ``data.test`` alone, on a server that has no others. Raises `ConfigError`."""
    alone = config.data.model_copy(update={"source": config.data.test, "test": None})
    rows, _ = sources.read(alone)
    _check_columns(config, rows, None)
    return _draw(rows, config.data.max_test_examples, config.seed, "test")


def _with_tests(
    config: Config, test: Dataset | None, trains: Sequence[Dataset], names: Sequence[str]
) -> tuple[Sequence[Dataset], Sequence[Dataset | None], Dataset]:
    """Each client's training rows, each client's test rows, and the pooled test rows."""
    most, seed = config.data.max_test_examples, config.seed
    if test is None:
        trains, tests = _hold_out(seed, "hold-out", config.data.test_fraction, trains, names)
    else:
        # The embedded test rows are those of all packages: of them only the clients' own count.
        embedded = config.data.source == EMBEDDED and config.data.test is None
        if not embedded or config.partition.by != "column":
            pooled = _draw(test, most, seed, "test")
            return trains, _own_tests(config, pooled, names), pooled
        tests = _own_tests(config, test, names)
    tests = _draw_of_each(tests, most, seed)
    return trains, tests, concatenate_datasets([rows for rows in tests if rows is not None])


def _check_columns(config: Config, train: Dataset, test: Dataset | None) -> tuple[str, ...]:
    """The task's columns, which exist in both sets; the first one is filled in every row."""
    columns = tasks.get(config.task).columns(config.data, train.column_names)
    for key, rows in (("data.source", train), ("data.test", test)):
        if rows is None:
            continue
        for column in columns:
            if column not in rows.column_names:
                raise ConfigError(f"{key} has no column {column!r}: {listed(rows.column_names)}")
        require_filled(rows, columns[0], key)
    return columns


def _check_labels(
    train: Dataset, test: Dataset | None, column: str, given: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The classes: those that are ``given`` or else occur. Every row's label is one of them."""
    labels = given or class_order(train, column, "data.source")
    if len(labels) < 2:
        raise ConfigError(
            f"data.source has one class only, {labels[0]!r} in column {column!r}: "
            "classification needs two or more"
        )
    for key, rows in (("data.source", train if given else None), ("data.test", test)):
        if rows is None:
            continue
        known = "is not in data.labels" if given else "no training row has"
        for number, name in enumerate(class_names(rows, column, key), start=1):
            if name not in labels:
                which = f"the label {name!r}, which {known}"
                raise ConfigError(f"{key}: row {number} has {which}")
    return labels


def _dropped(
    train: Dataset, dealing: PartitionConfig, parts: Sequence[Part]
) -> tuple[Dropped, ...]:
    if dealing.by != "column":
        return ()
    column = client_column(dealing, train.column_names)
    counts = Counter(class_names(train, column, "partition.column"))
    kept = {part.name for part in parts}
    least = dealing.min_examples
    return tuple(
        Dropped(name, rows, "too few rows" if rows < least else "more than partition.clients")
        for name, rows in counts.most_common()
        if name not in kept
    )


def _hold_out(
    seed: int, purpose: str, share: float, trains: Sequence[Dataset], names: Sequence[str]
) -> tuple[list[Dataset], list[Dataset | None]]:
    kept: list[Dataset] = []
    held: list[Dataset | None] = []
    for rows, name in zip(trains, names, strict=True):
        size = min(max(round(len(rows) * share), 1), len(rows) - 1)
        order = numpy_generator(seed, purpose, name).permutation(len(rows))
        held.append(rows.select(np.sort(order[:size])))
        kept.append(rows.select(np.sort(order[size:])))
    return kept, held


def _own_tests(config: Config, test: Dataset, names: Sequence[str]) -> list[Dataset | None]:
    """The test rows of each natural client, where the test set says whose a row is."""
    column = config.partition.column or "client"
    if config.partition.by != "column" or column not in test.column_names:
        return [None] * len(names)
    of: dict[str, list[int]] = {name: [] for name in names}
    for index, name in enumerate(column_names(test, column)):
        if name in of:
            of[name].append(index)
    return [test.select(of[name]) if of[name] else None for name in names]


def _draw(rows: Dataset, most: int | None, seed: int, purpose: str) -> Dataset:
    if most is None or most >= len(rows):
        return rows
    drawn = numpy_generator(seed, "draw", purpose).choice(len(rows), most, replace=False)
    return rows.select(np.sort(drawn))


def _draw_of_each(
    tests: Sequence[Dataset | None], most: int | None, seed: int
) -> list[Dataset | None]:
    """Draw in proportion, so that every client keeps a row as long as there are enough."""
    sizes = [0 if rows is None else len(rows) for rows in tests]
    if most is None or most >= sum(sizes):
        return list(tests)
    holders = [k for k, size in enumerate(sizes) if size]
    quotas = apportion(most, [Fraction(sizes[k]) for k in holders], at_least_one=True)
    drawn: list[Dataset | None] = [None] * len(tests)
    for k, quota in zip(holders, quotas, strict=True):
        rows = tests[k]
        if rows is not None and quota:
            drawn[k] = _draw(rows, quota, seed, f"test-{k}")
    return drawn
