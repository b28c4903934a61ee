"""Atomic replacement of files and folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prelort.errors import ConfigError


def as_path(given: object) -> Path:
    """A path as an object. Raises `ConfigError` for what is none, such as None."""
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"a path is expected, not {given!r}")
    return Path(given)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: readers, also after a crash, see the old or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a loss of power."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Replace a folder: filled under another name, synced, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    fill(temporary)
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    old = path.with_name(f".{path.name}.old")
    remove_folder(old)
    if path.is_dir():
        os.replace(path, old)
    os.replace(temporary, path)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Delete a flat folder if it exists."""
    if path.is_dir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
