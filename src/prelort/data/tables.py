"""Rows that are given in Python, in place of a file or a name on the hub."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from datasets import Dataset, DatasetDict, Value, concatenate_datasets

from prelort.data.partition import Part
from prelort.errors import ConfigError
from prelort.extensions import calling

if TYPE_CHECKING:
    import pandas as pd

Table: TypeAlias = "Dataset | pd.DataFrame | Sequence[Mapping[str, Any]]"
"""Rows: a `datasets.Dataset`, a pandas data frame, or a list of dictionaries."""

Indices = Mapping[str, Sequence[int]]
"""A client's name -> the numbers of its rows, from 0."""

Partition = Indices | Callable[[Dataset], Indices]
"""Who holds which rows: by name, or a function from all rows to that."""


@dataclass(frozen=True)
class Tables:
    """Training rows, test rows (None: clients hold out theirs) and the rows of each client.

    ``parts`` None: the rows are dealt as ``[partition]`` says.
    """

    train: Dataset
    test: Dataset | None = None
    parts: tuple[Part, ...] | None = None

    @cached_property
    def digest(self) -> str:
        """Of all rows and who holds them."""
        digest = hashlib.sha256(repr(self.parts).encode())
        for rows in (self.train, self.test):
            # Without a format: long arrays are not written out.
            for batch in rows.with_format(None).iter(1000) if rows is not None else ():
                digest.update(repr(batch).encode())
        return digest.hexdigest()


def tables(
    rows: Table | Mapping[str, Table],
    test: Table | None = None,
    partition: Partition | None = None,
) -> Tables:
    """The tables of a federation: of one for each client, or of one with a partition.

    Raises `ConfigError` for what is no table, clients with different columns, and a partition with
    rows that do not exist or belong to two clients.
    """
    held_out = None if test is None else _table(test, "test")
    if not isinstance(rows, Mapping):
        train = _table(rows, "datasets")
        return Tables(train, held_out, None if partition is None else _parts(partition, train))
    if partition is not None:
        raise ConfigError("partition is for one data set: here each client has its own")
    if isinstance(rows, DatasetDict):
        raise ConfigError(
            f"datasets is a DatasetDict with the splits {', '.join(rows)}, which are no clients: "
            "give one split, and another one as test"
        )
    own = {str(name): _table(table, f"datasets[{name!r}]") for name, table in rows.items()}
    if len(own) < len(rows):
        raise ConfigError(f"datasets has two clients of one name: {', '.join(map(repr, rows))}")
    if not own:
        raise ConfigError("datasets has no client")
    if not all(name.strip() for name in own):
        raise ConfigError("datasets has a client without a name")
    first, *others = own
    for name in others:
        if set(own[name].column_names) != set(own[first].column_names):
            raise ConfigError(
                f"clients must have the same columns: {first!r} has {own[first].column_names}, "
                f"{name!r} has {own[name].column_names}"
            )
        own[name] = _aligned(own[name], own[first], name)
    train = concatenate_datasets(list(own.values()))
    parts, start = [], 0
    for name, table in own.items():
        parts.append(Part(name, tuple(range(start, start + len(table)))))
        start += len(table)
    return Tables(train, held_out, tuple(parts))


def _aligned(table: Dataset, first: Dataset, client: str) -> Dataset:
    """The rows with the types of the first client's columns, such as pandas' and Arrow's texts."""
    features = first.features
    for column, kind in features.items():
        own = table.features[column]
        if own != kind and not (isinstance(own, Value) and isinstance(kind, Value)):
            raise ConfigError(
                f"column {column!r} of client {client!r} is {own}, and of the first client {kind}"
            )
    try:
        return table.select_columns(list(features)).cast(features)
    except (ValueError, TypeError) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(
            f"the columns of client {client!r} have other types than the first client's: {error}"
        ) from None


def _table(rows: object, where: str) -> Dataset:
    """The rows as a data set with at least one row."""
    table: Any = rows
    try:
        if hasattr(rows, "iloc") and hasattr(rows, "columns"):
            table = Dataset.from_pandas(rows, preserve_index=False)
        elif isinstance(rows, list | tuple) and all(isinstance(row, Mapping) for row in rows):
            table = Dataset.from_list([dict(row) for row in rows])
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:  # pyarrow's
        raise ConfigError(f"{where} cannot be read as a table: {error}") from None
    if not isinstance(table, Dataset):
        inner = f" of {type(rows[0]).__name__}" if isinstance(rows, list) else ""
        raise ConfigError(
            f"{where} must be a datasets.Dataset, a pandas data frame or a list of dictionaries, "
            f"not {type(rows).__name__}{inner}"
        )
    if len(table) == 0:
        raise ConfigError(f"{where} has no rows")
    return table


def _parts(partition: Partition, rows: Dataset) -> tuple[Part, ...]:
    indices: object = partition
    if callable(partition):
        with calling("partition", "the function"):
            indices = partition(rows)
    if not isinstance(indices, Mapping) or not indices:
        raise ConfigError("partition must give the numbers of each client's rows by its name")
    holder: dict[int, str] = {}
    parts = []
    for client, numbers in indices.items():
        try:
            name, own = str(client), tuple(sorted(map(operator.index, numbers)))
        except TypeError:
            raise ConfigError(
                f"partition: client {client!r} has {numbers!r}, allowed are row numbers"
            ) from None
        for number in own:
            if not 0 <= number < len(rows):
                raise ConfigError(
                    f"partition: client {name!r} has row {number}, and the rows are 0 to "
                    f"{len(rows) - 1}"
                )
            if number in holder:
                clients = " and ".join(dict.fromkeys([repr(holder[number]), repr(name)]))
                raise ConfigError(f"partition: row {number} is listed twice, of {clients}")
            holder[number] = name
        parts.append(Part(name, own))
    return tuple(parts)
