"""Shared by the readers of local files."""

from __future__ import annotations

import glob
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset

IN_MEMORY = 2**28
"""Bytes up to which files are read to memory; larger ones are mapped from the datasets cache."""


def load(builder: str, path: Path, **options: Any) -> Dataset:
    """Read with a loader of `datasets`, silently."""
    # data_files are patterns: a bracket in the path would be read as one.
    options.update(data_files=glob.escape(str(path.resolve())), split="train")
    with _silent():
        if path.stat().st_size > IN_MEMORY:
            return load_dataset(builder, **options)
        # A cache of our own that goes away: no stale copy, and the home need not be writable.
        with tempfile.TemporaryDirectory(prefix="prelort-") as cache:
            return load_dataset(builder, **options, cache_dir=cache, keep_in_memory=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the loaders' progress bars and log lines: one sentence reports an error."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their numbers from 1."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\n")


def reason(error: BaseException) -> str:
    """An error, or the cause that it names, as one line."""
    if error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(error, UnicodeDecodeError):
        return (
            f"it is not UTF-8 text ({error.reason} at byte {error.start}); older Windows programs "
            "write cp1252: save it as UTF-8, or convert it by iconv -f cp1252 -t utf-8"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
