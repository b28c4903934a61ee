"""Finding the columns of a task, and reading their cells."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prelort.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

MANY_CLASSES = 20
"""Up to so many classes may be those of a small sample."""

OTHER_LABELS = "name another data.label_column, or list the classes in data.labels"


def find(key: str, named: str | None, candidates: Sequence[str], available: Sequence[str]) -> str:
    """The column named by the configuration's ``key``, or else the first usual name that exists.

    Usual names are matched without regard to case. Warns of several. Raises `ConfigError` that
    lists the columns.
    """
    if named is not None:
        require(key, named, available)
        return named
    found = usual(candidates, available)
    if len(found) > 1:
        others = ", ".join(map(repr, found[1:]))
        warnings.warn(
            f"{key} is not set: column {found[0]!r} is read, and not {others}", stacklevel=2
        )
    if found:
        return found[0]
    raise ConfigError(
        f"{key} is not set, and none of the usual names ({', '.join(candidates)}) "
        f"is a column: {listed(available)}"
    )


def usual(candidates: Sequence[str], available: Sequence[str]) -> list[str]:
    """The columns with one of the names, in the names' order and without regard to case."""
    lower = {name.lower(): name for name in reversed(available)}
    return [lower[name.lower()] for name in candidates if name.lower() in lower]


def require(key: str, named: str, available: Sequence[str]) -> None:
    """Raise `ConfigError` unless the column ``named`` by ``key`` exists."""
    if named not in available:
        raise ConfigError(f"{key} = {named!r} is not a column: {listed(available)}")


def listed(available: Sequence[str]) -> str:
    """The columns that exist, for the end of a sentence."""
    return "the columns are " + ", ".join(repr(name) for name in available)


def cells(rows: Dataset, column: str) -> Iterator[Any]:
    """The cells of a column, as they are; a part of them in memory at a time."""
    for start in range(0, len(rows), 1000):
        yield from rows[column][start : start + 1000]


def require_texts(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise `ConfigError` naming the first row (counted from 1) of ``where`` that is no text.

    The first of the columns must have a value in every row; warns of blank ones.
    """
    for column in columns:
        blank = sum(not text.strip() for text in iter_texts(rows, column, where))
        if column == columns[0] and blank:
            warnings.warn(
                f"{where}: {blank} of {len(rows)} rows have no text in column {column!r}",
                stacklevel=2,
            )
    for number, cell in enumerate(cells(rows, columns[0]), start=1):
        if cell is None:
            raise ConfigError(f"{where}: row {number} has no value in column {columns[0]!r}")


def texts(rows: Dataset, column: str, where: str = "data") -> list[str]:
    """The cells of a column as text: numbers as written, a missing cell as the empty text.

    Raises `ConfigError` naming the first row of ``where`` with a list, an object or the like.
    """
    return list(iter_texts(rows, column, where))


def iter_texts(rows: Dataset, column: str, where: str) -> Iterator[str]:
    """`texts` one by one."""
    for number, cell in enumerate(cells(rows, column), start=1):
        text = _text(cell)
        if text is None:
            raise ConfigError(
                f"{where}: row {number} has {type(cell).__name__} {str(cell)[:40]} in column "
                f"{column!r}, where text or a number is needed"
            )
        yield text


def names(rows: Dataset, column: str, where: str = "data") -> list[str | None]:
    """The value of each row in a column as the name of a class (or client), None where missing.

    A `datasets.ClassLabel` gives its names, a whole number its digits, a string itself. The empty
    string counts as missing.
    """
    feature = rows.features[column]
    if hasattr(feature, "int2str"):
        # The hub marks the classes of unlabelled rows by -1.
        values = cells(rows, column)
        return [None if v is None or v < 0 else str(feature.int2str(v)) for v in values]
    seen: dict[str, str] = {}  # one object for each name: there are few, and may be many rows
    return [seen.setdefault(text, text) or None for text in iter_texts(rows, column, where)]


def class_names(rows: Dataset, column: str, where: str) -> list[str]:
    """`names`, all of them present; raises `ConfigError` naming the first row without one."""
    found: list[str] = []
    for number, name in enumerate(names(rows, column, where), start=1):
        if name is None:
            raise ConfigError(f"{where}: row {number} has no value in column {column!r}")
        found.append(name)
    return found


def class_order(rows: Dataset, column: str, where: str) -> tuple[str, ...]:
    """The classes that occur: in the order of a `datasets.ClassLabel`, else sorted.

    Names that are all whole numbers are sorted as numbers. Raises `ConfigError` for what are no
    classes: numbers that are not whole, and different values in most rows.
    """
    names = class_names(rows, column, where)
    seen = set(names)
    feature = rows.features[column]
    if hasattr(feature, "int2str"):
        return tuple(name for name in feature.names if name in seen)
    for number, name in enumerate(names, start=1):
        if _is_fraction(name):
            raise ConfigError(
                f"{where}: row {number} has {name} in column {column!r}, which is a measurement "
                f"and no class: regression needs a task of your own; {OTHER_LABELS}"
            )
    if len(seen) > max(MANY_CLASSES, len(names) / 2):
        raise ConfigError(
            f"{where}: column {column!r} has {len(seen)} different values in {len(names)} rows, "
            f"so that most classes would have one example; {OTHER_LABELS}"
        )
    similar = {name.strip().casefold(): name for name in seen}
    for name in sorted(seen - {*similar.values()}):
        warnings.warn(
            f"{where}: {name!r} and {similar[name.strip().casefold()]!r} in column {column!r} are "
            "two classes, which differ in case or blanks only",
            stacklevel=2,
        )
    if all(name.lstrip("-").isdecimal() for name in seen):
        return tuple(sorted(seen, key=lambda name: (int(name), name)))
    return tuple(sorted(seen))


def _is_fraction(name: str) -> bool:
    try:
        value = float(name)
    except ValueError:
        return False
    return math.isfinite(value) and not value.is_integer()


def _text(cell: Any) -> str | None:
    """A cell as text; None where it is no text and no number."""
    if cell is None or cell != cell:  # pandas writes a missing cell as nan
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # whole numbers become floats where a neighbour is missing
    if isinstance(cell, (bool, int, float)):
        return str(cell)
    return None
