"""Running a study: all cells, one after the other or several at a time, and their results."""

from __future__ import annotations

import os
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from prelort import config as configuration
from prelort.config import Config
from prelort.errors import ConfigError, PrelortError
from prelort.events import Event
from prelort.experiment.folder import BASE, TOKENIZER, RunFolder, is_taken
from prelort.files import as_path, write_atomically
from prelort.report.live import Display
from prelort.report.results import Results
from prelort.report.write import PAGE_FILE, write_page, write_results, write_tables
from prelort.study.definition import STUDY_FILE, Cell, Study, load
from prelort.study.results import is_finished, results_of, write_failures
from prelort.study.worker import PATIENCE, Job, Run, Worker, reason_of, run_cell

WRITE_SECONDS = 15.0
"""Minimum time between two updates of the results while cells run."""


def compare(study: Study | Path | str, out: Path | str, *, jobs: int = 1) -> Results:
    """Run a study, or continue it, and return its results; `prelort compare` from Python.

    Args:
        study: the study's TOML file, or the result of `prelort.study.definition.load`.
        out: the study's folder; the same call again continues a study that was stopped.
        jobs: number of cells to run at a time, each in a process of its own.

    Raises:
        ConfigError: the study is wrong, or ``out`` holds something else. A cell that fails raises
            nothing: the results have its reason.
    """
    loaded = study if isinstance(study, Study) else load(as_path(study))
    return run_study(loaded, as_path(out), jobs=jobs)


def run_study(
    study: Study,
    out: Path,
    display: Display | None = None,
    *,
    new: bool = False,
    jobs: int = 1,
    run: Run | None = None,
    track: Sequence[str] = (),
) -> Results:
    """Run the cells of a study that are not finished in ``out``, and write all results there.

    Args:
        study: what to run.
        out: its folder.
        display: shows all cells and their events; none by default.
        new: refuse a folder that holds anything.
        jobs: number of cells to run at a time; with more than one each runs in a process of its
            own with its share of the cores (where ``threads`` is not set).
        run: `prelort.run` on another backend; default: in this process (none with several jobs).
        track: names of experiment trackers.

    Returns:
        The results. A cell that failed has its reason there, and the others are run.

    Raises:
        ConfigError: ``out`` holds something else or cells of another configuration, and is left as
            it is; or all cells were refused, and nothing is left of them.
        Exception: whatever a plain run raises.
    """
    display = display or Display(Console(quiet=True), quiet=True)
    if new and is_taken(out):
        raise ConfigError(
            f"{str(out)!r} exists and is not empty: choose another --out, or continue what is in "
            f"it by --resume {out}"
        )
    made = not out.exists()
    with _claimed(study, out):
        todo = _unfinished(study, out, track)
        display.skipped(len(study.cells) - len(todo))
        state = _State(study, out, display)
        try:
            if jobs > 1 and not study.is_run:
                _side_by_side(todo, state, track, jobs)
            else:
                _one_by_one(todo, state, track, run)
        except (KeyboardInterrupt, PrelortError):
            if state.begun:
                state.write(last=True)
            raise
        if state.begun:
            return state.write(last=True)
    _discard(out, made)
    raise ConfigError(next(iter(state.failures.values())))


class _State:
    """The progress of a study in its folder. Used by one thread."""

    def __init__(self, study: Study, out: Path, display: Display) -> None:
        self.study, self.out, self.display = study, out, display
        self.failures: dict[str, str] = {}
        self._written = time.monotonic()

    def ended(self, cell: Cell, reason: str) -> None:
        """A cell is finished, or has failed for a reason."""
        self.display.ended(cell.name, reason)
        if reason:
            self.failures[cell.name] = reason
            write_failures(self.out, self.failures)
        elif time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    @property
    def begun(self) -> bool:
        """Whether a cell has been started."""
        return any(RunFolder(self.out / c.folder).config_file.is_file() for c in self.study.cells)

    def listener_of(self, cell: Cell) -> Callable[[Event], None]:
        """The listener of a cell's run."""
        return lambda event: self.display.event(cell.name, event)

    def write(self, *, last: bool = False) -> Results:
        """Write the tables so far; at the end the pictures and the page too."""
        results = results_of(self.study, self.out)
        if last:
            write_results(results, self.out)
            write_page(results, self.out / PAGE_FILE)
        else:
            write_tables(results, self.out)
        self._written = time.monotonic()
        return results


def _one_by_one(
    cells: Sequence[Cell], state: _State, track: Sequence[str], run: Run | None
) -> None:
    if run is None:
        from prelort.experiment.backend import InProcess
        from prelort.experiment.run import run as run_in_process

        run = partial(run_in_process, backend=InProcess())  # which reads shared rows once
    if not state.study.is_run:
        run = partial(run, patience=PATIENCE)
    for cell in cells:
        folder, reason = state.out / cell.folder, ""
        state.display.started(cell.name)
        job = Job(_with_own_threads(folder, cell.config), folder, track)
        try:
            run_cell(job, state.listener_of(cell), run)
        except Exception as error:
            if state.study.is_run:
                raise
            reason = reason_of(error)  # whatever it is, the other cells can be run
        state.ended(cell, reason)


def _side_by_side(cells: Sequence[Cell], state: _State, track: Sequence[str], jobs: int) -> None:
    """Run cells in ``jobs`` worker processes; this thread writes the results."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers = [Worker() for _ in range(jobs)]
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def work(cell: Cell) -> str:
        folder, config = state.out / cell.folder, cell.config
        if config.threads is None:
            config = config.model_copy(update={"threads": threads})
        config = _with_own_threads(folder, config)
        state.display.started(cell.name)
        worker = free.get()
        try:
            max_parallel = max(1, threads // (config.threads or threads))
            return worker.run(Job(config, folder, track), state.listener_of(cell), max_parallel)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                state.ended(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            for worker in workers:
                worker.close()


def _with_own_threads(folder: Path, config: Config) -> Config:
    """The configuration to run a cell with: a started run keeps its number of threads.

    Its result depends on it in the last bits, while ``jobs`` may change from call to call.
    """
    run = RunFolder(folder)
    if not run.config_file.is_file():
        return config
    return config.model_copy(update={"threads": run.read_config().threads})


def _unfinished(study: Study, out: Path, track: Sequence[str]) -> list[Cell]:
    """The cells to run. Raises `ConfigError` for one that was run with another configuration.

    A plain run is resumed even if it is finished, as is every run if there are trackers.
    """
    for cell in study.cells:
        folder = RunFolder(out / cell.folder)
        if folder.config_file.is_file():
            differ = configuration.conflicts(folder.read_config(), cell.config)
            if cell.config.threads is None:  # then a started run keeps its own number
                differ = [key for key in differ if key != "threads"]
            if differ:
                raise ConfigError(
                    f"{str(folder.path)!r} was run with another configuration; these keys differ: "
                    f"{', '.join(differ)}. A run that goes on keeps its own: leave them as they "
                    "are, or choose another --out"
                )
    always = study.is_run or bool(track)
    return [
        cell
        for cell in study.cells
        if always or not is_finished(out / cell.folder, cell.config.federation.rounds)
    ]


@contextmanager
def _claimed(study: Study, out: Path) -> Iterator[None]:
    """Create and lock a study's folder, with its file; a plain run does so itself.

    Raises `ConfigError` if the folder is in use, holds something else or cannot be written.
    """
    if study.is_run:
        yield
        return
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is a file: choose another --out")
    if is_taken(out) and not (out / STUDY_FILE).is_file():
        raise ConfigError(
            f"{str(out)!r} exists and holds no study ({STUDY_FILE} is missing): choose "
            "another --out"
        )
    folder = RunFolder(out)
    folder.lock()
    try:
        _unfinished(study, out, ())  # before the study's file changes
        write_atomically(out / STUDY_FILE, study.to_toml().encode())
        write_failures(out, {})
        yield
    finally:
        folder.unlock()


def _discard(out: Path, made: bool) -> None:
    """Delete the files of a study of which no cell was started."""
    for file in (STUDY_FILE, "failures.json", ".lock"):
        (out / file).unlink(missing_ok=True)
    for name in (BASE, TOKENIZER):
        shutil.rmtree(out / name, ignore_errors=True)
    for folder in sorted(out.rglob("*"), reverse=True):
        with suppress(OSError):  # the user may have put something there
            folder.rmdir()
    if made:
        with suppress(OSError):
            out.rmdir()
