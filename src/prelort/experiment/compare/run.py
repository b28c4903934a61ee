"""All cells of a study, one after the other or several at a time, and what they leave.

study.toml                        the resolved study; `prelort compare study.toml` repeats it
cells/SETTING/METHOD/seed-N/      a run's folder for each cell
results.md, *.csv, *.png          tables and pictures
report.html                       the page

Calling it again with the same study goes on where it has stopped: finished cells are kept as they
are, one that was killed goes on from its last checkpoint, one that failed is tried again.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from prelort import config as configuration
from prelort.errors import ConfigError
from prelort.experiment.compare import cell as running
from prelort.experiment.compare.results import write_all, write_text
from prelort.experiment.compare.study import Cell, Study
from prelort.experiment.folder import RunFolder
from prelort.files import write_atomically
from prelort.report.compared.grid import Grid
from prelort.report.events import Event

STUDY_FILE = "study.toml"

WRITE_SECONDS = 15.0
"""While cells run the tables are written anew after so many seconds, not after every small cell."""

_OURS = {".lock", f".{STUDY_FILE}.tmp"}


class Watcher(Protocol):
    """Who is told how far a study is; from any thread."""

    def kept(self, cells: int) -> None:
        """So many cells were finished by an earlier call."""
        ...

    def began(self, name: str) -> None:
        """A cell begins, or goes on."""
        ...

    def heard(self, name: str, event: Event) -> None:
        """A cell's run has told an event."""
        ...

    def ended(self, name: str, reason: str) -> None:
        """A cell has a result, or has failed for a reason."""
        ...


def compare(
    study: Study,
    out: Path,
    watcher: Watcher,
    *,
    jobs: int = 1,
) -> Grid:
    """Run the cells of ``study`` that are not finished in ``out``, then write all results there.

    ``jobs``: with more than one so many cells run at a time, each in a process of its own with its
    share of the cores (where ``threads`` is not set). A cell that fails is in the results with its
    reason, the others go on. Raises `ConfigError` where ``out`` holds something else, or cells that
    were run with another configuration; nothing is touched then. On an interruption the results
    so far are written.
    """
    with claimed(out):
        todo = _unfinished(study, out)
        write_atomically(out / STUDY_FILE, study.to_toml().encode())
        watcher.kept(len(study.cells) - len(todo))
        reasons: dict[str, str] = {}
        written = time.monotonic()

        def ended(cell: Cell, reason: str) -> None:
            nonlocal written
            if reason:
                reasons[cell.name] = reason
            watcher.ended(cell.name, reason)
            if time.monotonic() - written > WRITE_SECONDS:
                write_text(study, out, reasons)
                written = time.monotonic()

        try:
            if jobs == 1:
                _one_by_one(todo, out, watcher, ended)
            else:
                _side_by_side(todo, out, watcher, ended, jobs)
        finally:
            grid = write_all(study, out, reasons)
        return grid


def _one_by_one(
    cells: Sequence[Cell], out: Path, watcher: Watcher, ended: Callable[[Cell, str], None]
) -> None:
    from prelort.experiment.stage import InProcess

    stage_of = InProcess()  # one for all: what cells have in common is read once
    for cell in cells:
        folder = out / cell.folder
        watcher.began(cell.name)
        config = running.configuration_of(folder, cell.config)
        ended(cell, running.run_here(folder, config, _teller(watcher, cell), stage_of))


def _side_by_side(
    cells: Sequence[Cell],
    out: Path,
    watcher: Watcher,
    ended: Callable[[Cell, str], None],
    jobs: int,
) -> None:
    """Each thread has a process that runs its cells; results are written by this one."""
    stop = threading.Event()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    free: queue.SimpleQueue[running.Apart] = queue.SimpleQueue()
    processes = [running.Apart(stop) for _ in range(jobs)]
    for process in processes:
        free.put(process)

    def work(cell: Cell) -> str:
        folder, config = out / cell.folder, cell.config
        if config.threads is None:
            config = config.model_copy(update={"threads": threads})
        watcher.began(cell.name)
        config = running.configuration_of(folder, config)
        parallel = max(1, threads // (config.threads or threads))
        process = free.get()
        try:
            return process.run(folder, config, _teller(watcher, cell), parallel)
        finally:
            free.put(process)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                ended(futures[future], future.result())
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            for process in processes:
                process.close()


def _teller(watcher: Watcher, cell: Cell) -> Callable[[Event], None]:
    return lambda event: watcher.heard(cell.name, event)


def _unfinished(study: Study, out: Path) -> list[Cell]:
    """The cells to run. Raises `ConfigError` for one that was run as something else."""
    todo = []
    for cell in study.cells:
        folder = RunFolder(out / cell.folder)
        if folder.config_file.is_file():
            keys = configuration.differences(folder.read_config(), cell.config)
            differ = [key for key in keys if key != "threads"]
            if differ:
                raise ConfigError(
                    f"{str(folder.path)!r} was run with another configuration; these keys differ: "
                    f"{', '.join(differ)}. Choose another --out, or delete that folder to run the "
                    "cell again"
                )
        if not running.is_finished(folder.path):
            todo.append(cell)
    return todo


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """A study's folder, made if need be, for this process alone.

    Raises `ConfigError` where it is in use, holds something else or cannot be written.
    """
    lock = FileLock(out / ".lock")
    try:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{str(out)!r} is a file: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        others = {child.name for child in out.iterdir()} - _OURS
        if others and not (out / STUDY_FILE).is_file():
            raise ConfigError(
                f"{str(out)!r} exists and holds no study ({STUDY_FILE} is missing): choose "
                "another --out"
            )
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{str(out)!r} is in use: another prelort compare is running it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{str(out)!r} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
