"""From a configuration to each client's rows: read, check, partition, hold out, assign ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from datasets import Dataset, concatenate_datasets

from prelort import tasks
from prelort.config import EMBEDDED, Config, DataConfig, PartitionConfig
from prelort.data import ranks, sources
from prelort.data.partition import CLIENT_COLUMNS, Part, client_column, partition, resolved
from prelort.data.shares import apportion
from prelort.data.tables import Tables
from prelort.errors import ConfigError
from prelort.extensions import calling
from prelort.seeds import numpy_generator
from prelort.tasks.classification import Classification
from prelort.tasks.columns import class_names, listed, usual
from prelort.tasks.columns import names as column_names


@dataclass(frozen=True)
class ClientRows:
    """One client's rows: for training, for testing and for validation (None: it has none)."""

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

    ``test``: the given test set, or else all clients' test rows one after another. ``labels``: the
    names of a classifier's outputs in the order of their numbers, mostly classes.
    ``label_column``: the column that holds them, or by which the rows were partitioned.
    """

    clients: tuple[ClientRows, ...]
    test: Dataset
    labels: tuple[str, ...]
    label_column: str | None
    dropped: tuple[Dropped, ...]


def load(config: Config, given: Tables | None = None) -> FederatedRows:
    """Read, check and partition the configured data, or what is given in Python.

    Equal configurations and data give equal rows. Without a test set each client holds out
    ``data.test_fraction`` of its rows, at least one, and trains on at least one. Raises
    `ConfigError` with one sentence.
    """
    train, test, labels, label_column = _read(config, config.data, given)
    scheme, needed = config.partition, _min_rows(config, holds_out_tests=test is None)
    if given is not None and given.parts is not None:
        parts = list(given.parts)
        _check_sizes(parts, max(scheme.min_examples, needed))
    else:
        train = _draw(train, config.data.max_train_examples, config.seed, "train")
        scheme = resolved(scheme, train)
        config = config.model_copy(update={"partition": scheme})
        min_examples = max(scheme.min_examples, needed)
        scheme = scheme.model_copy(update={"min_examples": min_examples})
        parts = partition(train, scheme, label_column, config.seed)
    names = [part.name for part in parts]
    trains: Sequence[Dataset] = [train.select(part.indices) for part in parts]
    trains, tests, pooled = _with_tests(config, test, trains, names)
    trains, validation = _with_validation(config, trains, names)
    assigned = ranks.assign(config.ranks, [len(rows) for rows in trains], config.seed)
    clients = map(ClientRows, names, assigned, trains, tests, validation)
    shown = label_column or (scheme.column if scheme.by != "column" else None)
    return FederatedRows(tuple(clients), pooled, labels, shown, _dropped(train, scheme, parts))


def load_own(config: Config, name: str) -> ClientRows:
    """The rows of one real site, which knows no other site's; its rank is left open (0).

    It holds out the rows that it would hold out as a client of this name among others. Raises
    `ConfigError` with one sentence.
    """
    if tasks.get(config.task).kind == "classification" and not config.data.labels:
        raise ConfigError(
            "data.labels is not set: real sites, which see only their own rows, need the names of "
            "all classes in one order"
        )
    train, *_ = _read(config, config.data.model_copy(update={"test": None}))
    train = _draw(train, config.data.max_train_examples, config.seed, "train")
    holds_out_tests = config.data.test is None  # else the server has the test set
    needed = _min_rows(config, holds_out_tests)
    if len(train) < needed:
        raise ConfigError(f"data.source has {len(train)} rows, at least {needed} are needed")
    trains: Sequence[Dataset] = [train]
    tests: Sequence[Dataset | None] = [None]
    if holds_out_tests:
        trains, tests, _ = _with_tests(config, None, trains, [name])
    trains, validation = _with_validation(config, trains, [name])
    return ClientRows(name, 0, trains[0], tests[0], validation[0])


def load_test(config: Config) -> Dataset:
    """The rows of ``data.test``, for a server without other data. Raises `ConfigError`."""
    alone = config.data.model_copy(update={"source": config.data.test, "test": None})
    rows, *_ = _read(config, alone)
    return _draw(rows, config.data.max_test_examples, config.seed, "test")


def _min_rows(config: Config, holds_out_tests: bool) -> int:
    """One row to train on, and one for each set that the client holds out itself."""
    return 1 + holds_out_tests + (config.data.validation_fraction > 0)


def _check_sizes(parts: Sequence[Part], needed: int) -> None:
    """Raise `ConfigError` for a client with fewer rows than are needed."""
    for part in parts:
        if len(part.indices) < needed:
            raise ConfigError(
                f"client {part.name!r} has {len(part.indices)} rows, at least {needed} are needed"
            )


def _with_tests(
    config: Config, test: Dataset | None, trains: Sequence[Dataset], names: Sequence[str]
) -> tuple[Sequence[Dataset], Sequence[Dataset | None], Dataset]:
    """Each client's training rows, each client's test rows, and the pooled test rows."""
    limit, seed = config.data.max_test_examples, config.seed
    tests: Sequence[Dataset | None]
    if test is None:
        trains, tests = _hold_out(seed, "hold-out", config.data.test_fraction, trains, names)
    else:
        # The embedded test set covers all packages: clients are tested on their own ones only.
        embedded = config.data.source == EMBEDDED and config.data.test is None
        if not embedded or config.partition.by != "column":
            pooled = _draw(test, limit, seed, "test")
            return trains, _own_tests(config, pooled, names), pooled
        tests = _own_tests(config, test, names)
    tests = _draw_of_each(tests, limit, seed)
    return trains, tests, concatenate_datasets([rows for rows in tests if rows is not None])


def _with_validation(
    config: Config, trains: Sequence[Dataset], names: Sequence[str]
) -> tuple[Sequence[Dataset], Sequence[Dataset | None]]:
    """Each client's training rows and its validation rows."""
    if config.data.validation_fraction == 0:
        return trains, [None] * len(names)
    fraction = config.data.validation_fraction
    return _hold_out(config.seed, "validation", fraction, trains, names)


def _read(
    config: Config, data: DataConfig, given: Tables | None = None
) -> tuple[Dataset, Dataset | None, tuple[str, ...], str | None]:
    """Training rows and test rows, which can be read; the classes, and the column they are in."""
    train, test = sources.read(data) if given is None else (given.train, given.test)
    task = tasks.get(config.task)
    with calling(f"task {type(task).__name__}", "columns(), check() or labels()"):
        try:
            columns = task.columns(data, train.column_names)
            task.check(train, data, "data.source")
        except ConfigError as error:
            raise ConfigError(f"{error}{_other_task(config.task, train, data)}") from None
        # The classes belong to the data set, not to the rows that are drawn from it.
        labels = task.labels(train, data)
        if test is not None:
            for column in columns:
                if column not in test.column_names:
                    raise ConfigError(
                        f"data.test has no column {column!r}: {listed(test.column_names)}"
                    )
            # A further column could be taken for one that the training rows do not have.
            test = test.select_columns([c for c in test.column_names if c in train.column_names])
            task.check(test, data.model_copy(update={"labels": labels or None}), "data.test")
    if task.kind == "classification" and not labels:
        raise ConfigError(f"task {type(task).__name__}: labels() must name the model's outputs")
    classes = isinstance(task, Classification) and len(labels) > 1
    return train, test, labels, columns[1] if classes else data.label_column


def _other_task(name: str, rows: Dataset, data: DataConfig) -> str:
    """The end of a sentence about rows that task ``name`` cannot read: which one can."""
    for other in (name, "chat", "instruction"):
        with suppress(ConfigError):
            task = tasks.get(other)
            task.columns(data, rows.column_names)
            task.check(rows.select([0]), data, "data.source")
            return f'; task = "{other}" reads such rows' if other != name else ""
    return ""


def _dropped(train: Dataset, scheme: PartitionConfig, parts: Sequence[Part]) -> tuple[Dropped, ...]:
    if scheme.by != "column":
        return ()
    column = client_column(scheme, train.column_names)
    counts = Counter(class_names(train, column, "partition.column"))
    kept = {part.name for part in parts}
    return tuple(
        Dropped(
            name,
            rows,
            "too few rows" if rows < scheme.min_examples else "more than partition.clients",
        )
        for name, rows in counts.most_common()
        if name not in kept
    )


def _hold_out(
    seed: int, purpose: str, fraction: float, trains: Sequence[Dataset], names: Sequence[str]
) -> tuple[list[Dataset], list[Dataset | None]]:
    """The rows that each client keeps, and those that it holds out."""
    kept: list[Dataset] = []
    held: list[Dataset | None] = []
    for rows, name in zip(trains, names, strict=True):
        size = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        order = numpy_generator(seed, purpose, name).permutation(len(rows))
        held.append(rows.select(np.sort(order[:size])))
        kept.append(rows.select(np.sort(order[size:])))
    return kept, held


def _own_tests(config: Config, test: Dataset, names: Sequence[str]) -> list[Dataset | None]:
    """The test rows of each natural client, if the test set has the client column."""
    own = config.partition.column
    columns = usual(CLIENT_COLUMNS if own is None else (own,), test.column_names)
    if config.partition.by != "column" or not columns:
        return [None] * len(names)
    of: dict[str, list[int]] = {name: [] for name in names}
    for index, name in enumerate(column_names(test, columns[0])):
        if name in of:
            of[name].append(index)
    return [test.select(of[name]) if of[name] else None for name in names]


def _draw(rows: Dataset, limit: int | None, seed: int, purpose: str) -> Dataset:
    """At most ``limit`` rows, drawn by the seed and in their order."""
    if limit is None or limit >= len(rows):
        return rows
    drawn = numpy_generator(seed, "draw", purpose).choice(len(rows), limit, replace=False)
    return rows.select(np.sort(drawn))


def _draw_of_each(
    tests: Sequence[Dataset | None], limit: int | None, seed: int
) -> list[Dataset | None]:
    """Draw in proportion; every client keeps a row as long as ``limit`` allows it."""
    sizes = [0 if rows is None else len(rows) for rows in tests]
    if limit is None or limit >= sum(sizes):
        return list(tests)
    holders = [k for k, size in enumerate(sizes) if size]
    quotas = apportion(limit, [Fraction(sizes[k]) for k in holders], at_least_one=True)
    drawn: list[Dataset | None] = [None] * len(tests)
    for k, quota in zip(holders, quotas, strict=True):
        rows = tests[k]
        if rows is not None and quota:
            drawn[k] = _draw(rows, quota, seed, f"test-{k}")
    return drawn
