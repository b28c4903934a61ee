"""Reading JSON and JSON lines."""

from __future__ import annotations

import json
from bisect import bisect_left
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetsError

from prelort.data._reading import lines, load, reason


def read_json_lines(path: Path) -> Dataset:
    """One object per line; raises ValueError naming the first line that is none."""
    for _ in lines(path):
        pass  # the loader does not check that the text is UTF-8
    try:
        return load("json", path, parse_agent_traces=False)
    except (ValueError, DatasetsError) as error:
        number = 0
        for number, line in lines(path):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as wrong:
                raise ValueError(f"line {number} is not JSON: {wrong.msg}") from None
            if not isinstance(value, dict):
                raise ValueError(f"line {number} is not an object: {line[:60]}") from None
        raise ValueError(reason(error) if number else "it has no rows") from None


def read_json(path: Path) -> Dataset:
    """A list of objects, or an object with one such list inside; raises ValueError.

    It is read to memory as a whole, unless it has an object per line, as many on the hub do.
    """
    if _is_json_lines(path):
        return read_json_lines(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if isinstance(content, dict):
        lists = {
            key: value
            for key, value in content.items()
            if isinstance(value, list) and value and all(isinstance(v, dict) for v in value)
        }
        if len(lists) != 1:
            found = ", ".join(repr(name) for name in lists) or "none"
            raise ValueError(f"an object must have one list of objects inside, and has: {found}")
        (content,) = lists.values()
    if not isinstance(content, list):
        raise ValueError("it must be a list of objects, or an object with one inside")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object: {json.dumps(row)[:60]}")
    # Not Dataset.from_list, which takes its columns from the first row.
    names = list(dict.fromkeys(name for row in content for name in row))
    columns = {name: [row.get(name) for row in content] for name in names}
    try:
        return Dataset.from_dict(columns)
    except (ValueError, TypeError) as error:
        name = next((name for name in names if not _is_of_one_type(columns[name])), None)
        if name is None:
            raise ValueError(reason(error)) from None
        values = columns[name]
        ends = range(1, len(values) + 1)
        if isinstance(error, UnicodeError):
            raise ValueError(f"column {name!r} has half of a character: {reason(error)}") from None
        row = ends[bisect_left(ends, True, key=lambda end: not _is_of_one_type(values[:end]))]
        raise ValueError(
            f"row {row} has another kind of value in column {name!r} than the rows before it: "
            f"{json.dumps(values[row - 1])[:60]}"
        ) from None


def _is_of_one_type(values: list[Any]) -> bool:
    try:
        Dataset.from_dict({"": values})
    except (ValueError, TypeError):
        return False
    return True


def _is_json_lines(path: Path) -> bool:
    """Whether the first of several lines is an object."""
    first, *others = islice(lines(path), 2)
    try:
        return bool(others) and isinstance(json.loads(first[1]), dict)
    except json.JSONDecodeError:
        return False
