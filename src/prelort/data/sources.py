"""Reading the configured data set: embedded, a file, a saved folder, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from prelort import hub
from prelort.config import EMBEDDED, PYTHON, SITES, DataConfig
from prelort.data import files
from prelort.data._reading import reason
from prelort.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SAVED = ("state.json", "dataset_dict.json")
"""What `datasets.save_to_disk` writes to a folder: for one split, for several."""


def read(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """All training rows, and all test rows if ``config.test`` or the source names some.

    Raises `ConfigError` with one sentence: no such file, hub name or split; malformed; no rows.
    """
    if config.source == SITES:
        raise ConfigError(
            "data.source = 'sites' has no rows here: each real site names its own in its site "
            "file. To run in one place, name a file"
        )
    if config.source == PYTHON:
        raise ConfigError(
            "data.source = 'python' was given as an object: continue in Python with the same "
            "prelort.Federation, or name a file"
        )
    if config.source == EMBEDDED:
        from prelort.data import standard_library

        train, test = standard_library.load()
        if config.test is None:
            return train, test
        if not _is_path(config.test):
            raise ConfigError(
                f"data.test = {config.test!r} is not allowed with the embedded text, which has "
                "its own test rows: leave it out, or name a file"
            )
    else:
        train = _read(config.source, config.split, config.subset, "data.source")
        if config.test is None:
            return train, None
        if not _is_path(config.test):
            if _path(config.source).is_file():
                raise ConfigError(
                    f"data.test = {config.test!r} does not exist: with the file "
                    f"{config.source!r} as data.source it must be a file, too"
                )
            return train, _read(config.source, config.test, config.subset, "data.test")
    return train, _read(config.test, "train", None, "data.test")


def _read(source: str, split: str, subset: str | None, key: str) -> Dataset:
    """One split of a source, not empty; ``key``: the configuration's key, for errors."""
    path = _path(source)
    if path.is_file():
        return files.read(path, key)
    if any((path / name).is_file() for name in SAVED):
        rows = _saved(path, split, key)
    elif source and path.is_dir():
        rows = _loaded(str(path), subset, split, key)
    elif _is_path(source) or not HUB_NAME.fullmatch(source):
        raise ConfigError(f"{key} = {source!r}: there is no such file or folder")
    else:
        rows = _loaded(source, subset, split, key)
    if not isinstance(rows, Dataset):
        raise ConfigError(f"{key} = {source!r} is not a table of rows but {type(rows).__name__}")
    if len(rows) == 0:
        raise ConfigError(f"{key} has no rows")
    return rows


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _is_path(source: str) -> bool:
    """Whether a source is meant as a path, so that it is not looked up on the hub."""
    if source.startswith((".", "/", "~")) or Path(source).is_absolute():
        return True
    return Path(source).suffix.lower() in files.READERS or _path(source).exists()


def _saved(path: Path, split: str, key: str) -> Any:
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(
            f"{key} = {str(path)!r} is not a folder that datasets.save_to_disk wrote: "
            f"{reason(error)}"
        ) from None
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ConfigError(_no_split(str(path), split, list(saved)))
    return saved[split]


def _loaded(name: str, subset: str | None, split: str, key: str) -> Any:
    """Through `datasets.load_dataset`: from the hub, or a local copy of a hub repository."""
    if not Path(name).is_dir():
        hub.offline()
    try:
        return load_dataset(name, subset, split=split)
    except DatasetNotFoundError:
        raise ConfigError(
            f"{key} = {name!r} is neither a file nor a folder, nor a readable data set on the hub "
            "(a private one needs `hf auth login`)"
        ) from None
    except ConnectionError:
        raise ConfigError(
            f"{key} = {name!r} is neither a file nor a folder, and the hub cannot be reached"
        ) from None
    except Exception as error:
        # load_dataset raises a ValueError for an unknown split or subset, with the existing ones in
        # its text; other errors (disk full, malformed data) are shown as they are.
        text = reason(error)
        existing = re.search(r"Unknown split .*Should be one of \[(.*)\]", text)
        if existing:
            splits = [part.strip(" '\"") for part in existing[1].split(",")]
            raise ConfigError(_no_split(name, split, splits)) from None
        raise ConfigError(f"{key} = {name!r} cannot be loaded: {text}") from None


def _no_split(name: str, split: str, existing: list[str]) -> str:
    splits = ", ".join(repr(name) for name in existing)
    return f"data set {name!r} has no split {split!r}: the splits are {splits}"
