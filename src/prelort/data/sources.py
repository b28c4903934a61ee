"""Reading the configured data set: embedded, a file, a saved folder, or a name on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from prelort.config import EMBEDDED, SITES, DataConfig
from prelort.data import files
from prelort.data._reading import reason
from prelort.errors import ConfigError

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
SAVED = ("state.json", "dataset_dict.json")
"""What `datasets.save_to_disk` leaves in a folder: of one split, of several."""


def read(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """All training rows, and all test rows where ``config.test`` or the source names some.

    Raises `ConfigError` in one sentence: no such file, hub name or split; malformed; no rows.
    """
    if config.source == SITES:
        raise ConfigError(
            "data.source = 'sites' has no rows here: each real site names its own in its site "
            "file. To run in one place, name a file"
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
        return train, _filled(files.read(_path(config.test), "data.test"), "data.test")
    train = _filled(_one(config.source, config.split, config.subset, "data.source"), "data.source")
    if config.test is None:
        return train, None
    if _is_path(config.test):
        return train, _filled(_one(config.test, "train", None, "data.test"), "data.test")
    if _path(config.source).is_file():
        raise ConfigError(
            f"data.test = {config.test!r} does not exist: with the file {config.source!r} as "
            "data.source it must be a file, too"
        )
    return train, _filled(_one(config.source, config.test, config.subset, "data.test"), "data.test")


def _one(source: str, split: str, subset: str | None, key: str) -> Dataset:
    """One split of a source; ``key`` is the configuration's key that an error names."""
    path = _path(source)
    if path.is_file():
        return files.read(path, key)
    if any((path / name).is_file() for name in SAVED):
        return _saved(path, split, key)
    if source and path.is_dir():
        return _loaded(str(path), subset, split, key)
    if _is_path(source) or not HUB_NAME.fullmatch(source):
        raise ConfigError(f"{key} = {source!r}: there is no such file or folder")
    return _loaded(source, subset, split, key)


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _is_path(source: str) -> bool:
    """Whether a source is meant as a path, so that the hub is not asked for it."""
    if source.startswith((".", "/", "~")) or Path(source).is_absolute():
        return True
    return Path(source).suffix.lower() in files.READERS or _path(source).exists()


def _saved(path: Path, split: str, key: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise ConfigError(
            f"{key} = {str(path)!r} is not a folder that datasets.save_to_disk wrote: "
            f"{reason(error)}"
        ) from None
    if not isinstance(saved, DatasetDict):
        return _check_type(saved, str(path), key)
    if split not in saved:
        raise ConfigError(_no_split(str(path), split, list(saved)))
    return _check_type(saved[split], str(path), key)


def _loaded(name: str, subset: str | None, split: str, key: str) -> Dataset:
    """Through `datasets.load_dataset`: from the hub, or a local copy of a hub repository."""
    try:
        return _check_type(load_dataset(name, subset, split=split), name, key)
    except ConfigError:
        raise
    except DatasetNotFoundError:
        raise ConfigError(
            f"{key} = {name!r} is neither a file nor a folder, nor a data set on the hub that "
            "can be read (a private one needs `hf auth login`)"
        ) from None
    except ConnectionError:
        raise ConfigError(
            f"{key} = {name!r} is neither a file nor a folder, and the hub cannot be reached to "
            "look for a data set of that name"
        ) from None
    except Exception as error:
        # What load_dataset raises for an unknown split or subset is a ValueError with the
        # existing ones in its text; the rest (disk full, malformed data) is told as it is.
        text = reason(error)
        existing = re.search(r"Unknown split .*Should be one of \[(.*)\]", text)
        if existing:
            splits = [part.strip(" '\"") for part in existing[1].split(",")]
            raise ConfigError(_no_split(name, split, splits)) from None
        raise ConfigError(f"{key} = {name!r} cannot be loaded: {text}") from None


def _no_split(name: str, split: str, existing: list[str]) -> str:
    splits = ", ".join(repr(name) for name in existing)
    return f"data set {name!r} has no split {split!r}: the splits are {splits}"


def _check_type(rows: Any, name: str, key: str) -> Dataset:
    if not isinstance(rows, Dataset):
        raise ConfigError(f"{key} = {name!r} is not a table of rows but {type(rows).__name__}")
    return rows


def _filled(rows: Dataset, key: str) -> Dataset:
    if len(rows) == 0:
        raise ConfigError(f"{key} has no rows")
    return rows
