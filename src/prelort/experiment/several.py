"""Several methods on the same clients, data and seeds, one run after the other in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from prelort import methods
from prelort.config import Config
from prelort.errors import ConfigError
from prelort.experiment.folder import METHODS_FILE as METHODS_FILE
from prelort.experiment.folder import RunFolder, is_taken
from prelort.experiment.folder import folder_name as folder_name
from prelort.experiment.folder import methods_in as methods_in
from prelort.experiment.run import Listener, RunResult, run
from prelort.experiment.stage import InProcess, StageOf
from prelort.files import write_atomically
from prelort.report import events, plots, tables, trackers


def run_methods(
    config: Config,
    names: Sequence[str],
    out: Path,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    stage_of: StageOf | None = None,
    track: Sequence[str] = (),
) -> list[RunResult]:
    """Run ``config`` with each of the methods, in ``out/<method>``, and compare them in ``out``.

    With ``resume`` finished runs are kept, an unfinished one goes on, the others are started.
    By default all in this process, where the rows are read and tokenised once for all of them.
    """
    stage_of = stage_of or InProcess()
    trackers.check(track)
    for name in names:
        methods.find(name)
    if not resume:
        try:
            if is_taken(out):
                raise ConfigError(
                    f"{str(out)!r} exists and is not empty: choose another --out, or go on with "
                    f"the runs in it by --resume {out}"
                )
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / METHODS_FILE, json.dumps(list(names)).encode())
        except OSError as error:
            raise ConfigError(
                f"{str(out)!r} cannot be written: {error.strerror or error}"
            ) from None
    results: list[RunResult] = []
    for name in names:
        folder = out / folder_name(name)
        begun = RunFolder(folder).config_file.is_file()
        chosen = with_method(config, name)
        try:
            results.append(
                run(
                    chosen,
                    folder,
                    resume=begun,
                    listeners=listeners,
                    stage_of=stage_of,
                    track=track,
                )
            )
        except ConfigError:
            if not resume and not results:
                (out / METHODS_FILE).unlink()  # nothing has begun: the same --out can be used again
            raise
        write_results({n: out / folder_name(n) for n in names}, out)
    return results


def with_method(config: Config, name: str) -> Config:
    """The configuration with another method, and otherwise the same."""
    return config.model_copy(update={"method": config.method.model_copy(update={"name": name})})


def read_runs(folders: dict[str, Path]) -> dict[str, list[events.Event]]:
    """The events of the runs that have begun, by name."""
    logs = {name: RunFolder(path).metrics_file for name, path in folders.items()}
    return {name: events.read(file) for name, file in logs.items() if file.is_file()}


def write_results(folders: dict[str, Path], out: Path) -> None:
    """Write ``results.md``, ``rank_curves.png`` and ``diagnostics.png`` of the runs to ``out``."""
    runs = read_runs(folders)
    results = tables.comparison_markdown(runs)
    if any(events.diagnostics(written) for written in runs.values()):
        results += "\n" + tables.diagnostics_markdown(runs)
        plots.diagnostic_curves(runs, out / "diagnostics.png")
    write_atomically(out / "results.md", results.encode())
    if any(events.final_evaluation(written) for written in runs.values()):
        plots.rank_curves(runs, out / "rank_curves.png")
