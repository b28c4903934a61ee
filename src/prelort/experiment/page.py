"""The page of a run's folder, or of a folder of several runs, finished or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from prelort import config as configuration
from prelort.errors import ConfigError
from prelort.experiment.folder import RunFolder, folder_name, methods_in
from prelort.files import write_atomically
from prelort.report import events
from prelort.report.page import Source, render

PAGE_FILE = "report.html"


def write_page(path: Path, out: Path | None = None) -> Path:
    """Write the page of what is in ``path`` so far to ``out`` and return where it is.

    Nothing of the run is touched. Raises `ConfigError` where no run is there or ``out`` cannot be
    written, `PrelortError` for a damaged event log.
    """
    together = methods_in(path)
    folders = {name: path / folder_name(name) for name in together} if together else {"": path}
    begun = {name: folder for name, folder in folders.items() if _is_run(folder)}
    if not begun:
        raise ConfigError(f"{str(path)!r} holds no run: config.toml is missing")
    sources = [_source(name, folder) for name, folder in begun.items()]
    target = out or path / PAGE_FILE
    try:
        write_atomically(target, render(sources, path.resolve().name).encode())
    except OSError as error:
        raise ConfigError(f"{str(target)!r} cannot be written: {error.strerror or error}") from None
    return target


def _is_run(folder: Path) -> bool:
    return RunFolder(folder).config_file.is_file()


def _source(name: str, path: Path) -> Source:
    folder = RunFolder(path)
    # As it is written, not as a `Config`: a run of another version has a page too.
    values = configuration.read_toml(folder.config_file)
    method = values.get("method")
    named = method.get("name") if isinstance(method, dict) else None
    return Source(
        name=name or str(named or path.resolve().name),
        events=events.read(folder.metrics_file) if folder.metrics_file.is_file() else [],
        config=values,
        config_text=folder.config_file.read_text(encoding="utf-8"),
        versions=_versions(folder.versions_file),
    )


def _versions(path: Path) -> Mapping[str, str]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # the page is no worse for it
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
