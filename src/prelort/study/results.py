"""Reading a study's folder: the histories of its cells, and the reasons of failed ones."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prelort.errors import ConfigError, PrelortError
from prelort.events import EventLog
from prelort.experiment.folder import RunFolder, is_taken
from prelort.files import as_path, write_atomically
from prelort.history import RunHistory
from prelort.report.results import CellResult, Results
from prelort.study.definition import STUDY_FILE, Cell, Study, of_folder

FAILURES_FILE = "failures.json"

POLL_SECONDS = 0.5
"""Time between two looks for a folder that another process is about to create."""


def read(path: Path | str) -> Results:
    """The results in the folder of a run or a study, finished or not.

    Args:
        path: the folder that `prelort.run`, `prelort run` or `prelort compare` wrote.

    Raises:
        ConfigError: the folder holds neither.
        PrelortError: a run's event log is damaged.
    """
    out = as_path(path)
    return results_of(of_folder(out), out)


def results_of(study: Study, out: Path) -> Results:
    """The results so far of a study in the folder ``out``. Raises `PrelortError` as `read`."""
    failures = read_failures(out)
    base = study.base
    facts = {
        "task": base.task,
        "model": base.model.name,
        "data": base.data.source,
        "rounds": str(base.federation.rounds),
        "seeds": ", ".join(map(str, study.seeds)),
    }
    if len(study.cells) > 1:
        facts["compared to"] = study.reference
    return Results(
        cells=[_result(study, cell, out, failures.get(cell.name, "")) for cell in study.cells],
        reference=study.reference,
        title=out.resolve().name,
        metric=study.compare.metric,
        facts=facts,
        versions=_versions(study, out),
        configuration=_text(study, out),
        folder=out,
    )


def is_finished(folder: Path, rounds: int = 0) -> bool:
    """Whether the run in a folder is finished, after ``rounds``; not if its log is damaged."""
    try:
        history = RunFolder(folder).history()
        return history.finished and history.done >= rounds
    except PrelortError:
        return False


def read_failures(out: Path) -> dict[str, str]:
    """A cell's name -> the reason of its last failure."""
    try:
        failures = json.loads((out / FAILURES_FILE).read_bytes())
        return {str(name): str(reason) for name, reason in failures.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def write_failures(out: Path, failures: Mapping[str, str]) -> None:
    """Write the reasons of failed cells; no file if none failed."""
    if failures:
        write_atomically(out / FAILURES_FILE, json.dumps(failures, indent=2).encode())
    else:
        (out / FAILURES_FILE).unlink(missing_ok=True)


def wait_for(out: Path, seconds: float, *, sleep: Callable[[float], None] = time.sleep) -> Study:
    """The study in a folder that another process is about to create.

    Raises `ConfigError` for a folder that holds something else, or if it does not exist after
    ``seconds``.
    """
    for _ in range(math.ceil(seconds / POLL_SECONDS) + 1):
        if is_taken(out):  # the first file that a run writes is its configuration
            return of_folder(out)
        sleep(POLL_SECONDS)
    raise ConfigError(f"{str(out)!r} holds no run after {seconds:.0f} s")


def logs_of(study: Study, out: Path) -> dict[str, EventLog]:
    """The logs of the cells that have not failed; they need not exist yet."""
    failures = read_failures(out)
    return {
        cell.name: RunFolder(out / cell.folder).events
        for cell in study.cells
        if cell.name not in failures
    }


def _result(study: Study, cell: Cell, out: Path, reason: str) -> CellResult:
    try:
        history = RunFolder(out / cell.folder).history()
    except PrelortError as error:
        if study.is_run:
            raise
        history, reason = RunHistory(), reason or str(error)
    config = cell.config.model_dump(mode="json")
    return CellResult(cell.setting, cell.method, cell.seed, history, cell.folder, reason, config)


def _text(study: Study, out: Path) -> str:
    """The run's or study's TOML, as written or as it will be."""
    file = RunFolder(out).config_file if study.is_run else out / STUDY_FILE
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return study.to_toml()


def _versions(study: Study, out: Path) -> dict[str, str]:
    """The versions of the first cell that has been run."""
    for cell in study.cells:
        try:
            versions = json.loads(RunFolder(out / cell.folder).versions_file.read_bytes())
            return {str(name): str(version) for name, version in versions.items()}
        except (OSError, ValueError, AttributeError):
            continue
    return {}
