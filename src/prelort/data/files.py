"""Reading one local file as a table of rows, with errors that name the row."""

from __future__ import annotations

import codecs
import csv
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetsError

from prelort.data._json import read_json, read_json_lines
from prelort.data._reading import lines, load, reason
from prelort.errors import ConfigError

UNNAMED = "Unnamed: 0"
"""What pandas calls a first column without a name."""


def read(path: Path, key: str) -> Dataset:
    """The rows of a file by its suffix; ``key``: the configuration's key, for errors.

    CSV (with commas, semicolons or tabs) and TSV need a header, and their cells are text as written
    ('007' and 'NA' stay); pandas' column of row numbers, which has no name, is left out. JSON is a
    list of objects, or an object with one such list inside; JSON lines one object a line. A text
    file gives column ``text``, one row a line that is not blank. Text is UTF-8, or UTF-16 with its
    mark.

    Raises `ConfigError`: unknown suffix, empty, malformed (with the row's number), not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"{key} = {str(path)!r} has an unknown kind of file: allowed are {', '.join(READERS)}"
        )
    try:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with _as_utf8(path) as text:
            rows = reader(text)
    except (ValueError, OSError, DatasetsError) as error:
        raise ConfigError(f"{key} = {str(path)!r} cannot be read: {reason(error)}") from None
    if len(rows) == 0:
        raise ConfigError(f"{key} = {str(path)!r} cannot be read: it has no rows")
    return rows


@contextmanager
def _as_utf8(path: Path) -> Iterator[Path]:
    """The file, or a copy of it in UTF-8 if it begins with the mark of UTF-16."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with tempfile.TemporaryDirectory(prefix="prelort-") as folder:
            copy = Path(folder, path.name)
            with (
                path.open(encoding="utf-16", newline="") as old,
                copy.open("w", encoding="utf-8", newline="") as new,
            ):
                shutil.copyfileobj(old, new)
            yield copy
    elif b"\0" in start and path.suffix.lower() != ".parquet":
        raise ValueError("it has zero bytes: it is UTF-16 without its mark, or no text")
    else:
        yield path


def _csv(path: Path) -> Dataset:
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    try:
        separator = csv.Sniffer().sniff(header, delimiters=",;\t").delimiter
    except csv.Error:  # a single column
        separator = ","
    return _delimited(path, separator, csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Dataset:
    try:
        return _delimited(path, "\t", csv.QUOTE_MINIMAL)
    except ValueError:
        # Spreadsheets quote cells; TSV proper, as many data sets have it, does not.
        return _delimited(path, "\t", csv.QUOTE_NONE)


def _delimited(path: Path, separator: str, quoting: Literal[0, 3]) -> Dataset:
    header = _check_delimited(path, separator, quoting)
    # Text everywhere: types guessed from the first rows would break on later ones, turn '007'
    # to 7 and the word 'None' to a missing value.
    index = UNNAMED if header[0] == "" else None
    rows = load(
        "csv",
        path,
        sep=separator,
        quoting=quoting,
        encoding="utf-8-sig",
        features=Features({name or UNNAMED: Value("string") for name in header}),
        keep_default_na=False,
    )
    return rows.remove_columns(index) if index is not None else rows


def _check_delimited(path: Path, separator: str, quoting: Literal[0, 3]) -> list[str]:
    """The header; raises ValueError for a row of another length, which pandas would bend."""
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        # strict: a quote that is never closed would swallow the rest of the file.
        rows = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) < len(header) or not all(header[1:]) or header == [""]:
                raise ValueError(f"the header has an empty or repeated name: {header}")
            number = 0
            for number, cells in enumerate(filter(None, rows), start=1):
                if len(cells) != len(header):
                    raise ValueError(
                        f"row {number} (line {rows.line_num}) has {len(cells)} cells, "
                        f"and the header has {len(header)}"
                    )
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: {error}") from None
    if number == 0:
        raise ValueError("it has no rows")
    return header


def _text(path: Path) -> Dataset:
    kept = np.fromiter((number - 1 for number, _ in lines(path)), np.int64)
    return load("text", path, encoding="utf-8-sig").select(kept)


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a cell: a cell may be a whole document."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


READERS: dict[str, Callable[[Path], Dataset]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".parquet": lambda path: load("parquet", path),
    ".txt": _text,
}
"""Suffix -> reader."""
