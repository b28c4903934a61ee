"""The progress of runs: a live display on a terminal, lines elsewhere.

The same display follows the runs of this process and, from their logs, those of another one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prelort.events import (
    ClientsEvaluated,
    Evaluated,
    Evaluating,
    EvaluationFailed,
    Event,
    EventLog,
    RankChanged,
    RoundFinished,
    RunFinished,
    Transferring,
    utc_now,
)
from prelort.history import RunHistory
from prelort.report.formatting import human_seconds, plain
from prelort.report.incidents import lines
from prelort.report.status import details, elapsed, on_its_way, share_done, summary

TICK_SECONDS = 0.25
"""Time between two updates of the display."""
POLL_SECONDS = 0.5
"""Time between two reads of the logs."""
QUIET_POLLS = 10
"""Polls without events after which to check whether a process still runs."""
WIDE = 100
"""Columns of a terminal with room for all numbers."""


@dataclass(slots=True)
class _Cell:
    """A running cell. ``pending``: the line of its last round is not printed yet."""

    history: RunHistory
    pending: bool = False

    @property
    def share_before(self) -> float:
        """The part of the rounds that an earlier process did."""
        started = self.history.started
        return (self.history.resumed or 0) / started.rounds if started is not None else 0.0


class Display:
    """Shows the progress of a study's runs. A context manager, whose methods any thread may call.

    On a terminal it draws a bar for each cell that runs, and the status of every client where one
    cell runs. Elsewhere it prints a line for each round. Incidents are lines on both.

    Args:
        console: to print on.
        cells: number of cells in the study.
        quiet: print nothing.
        clock: returns the time.
    """

    def __init__(
        self,
        console: Console,
        cells: int = 1,
        *,
        quiet: bool = False,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._console, self._quiet, self._clock = console, quiet, clock
        self._total = cells
        self._skipped = self._ended = self._failed = self._parallel = 0
        self._seconds = self._shares = 0.0  # of the cells that ended
        self._cells: dict[str, _Cell] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._live = None
        if console.is_terminal and not console.is_dumb_terminal and not quiet:
            # Drawn with the lock: another thread would see a history half updated.
            self._live = Live(
                console=console,
                get_renderable=self._screen,
                auto_refresh=False,
                vertical_overflow="crop",
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        with self._lock:
            for name in self._cells:
                self._flush(name)
            if self._live is not None:
                self._live.stop()

    def skipped(self, cells: int) -> None:
        """Count cells that an earlier call finished."""
        with self._lock:
            self._skipped = cells
            if cells:
                self._print(f"{cells} of {self._total} cells are finished already")

    def started(self, name: str, events: Iterable[Event] = ()) -> None:
        """Show a cell that starts or continues; after a truncation of its log, with ``events``."""
        with self._lock:
            self._cells[name] = cell = _Cell(RunHistory.of(events))
            self._parallel = max(self._parallel, len(self._cells))
            if cell.history.started is not None:
                self._print(f"{plain(name)}: continues after round {cell.history.done}")

    def event(self, name: str, event: Event) -> None:
        """Show an event of a cell's run."""
        with self._lock:
            cell = self._cells[name]
            results = RoundFinished | Evaluated | ClientsEvaluated | EvaluationFailed | Evaluating
            if not isinstance(event, results):  # the line of the round before is complete
                self._flush(name)
            cell.history.apply(event)
            cell.pending |= isinstance(event, RoundFinished | Evaluated)
            if isinstance(event, Transferring) and self._live is None:
                done = f"{plain(event.client)}: {on_its_way(event)}"
                self._print(f"{plain(name)}: round {event.round}: {done}")
            if not isinstance(event, RankChanged):
                for line in lines(event):
                    self._print(f"{plain(name)}: {line}", style="yellow")

    def ended(self, name: str, reason: str = "") -> None:
        """Close a cell that is finished, or has failed for a reason."""
        with self._lock:
            self._flush(name)
            cell = self._cells.pop(name)
            seconds = elapsed(cell.history, self._clock())
            self._seconds += seconds
            self._shares += 1 - cell.share_before
            self._ended += 1
            self._failed += bool(reason)
            if reason:
                self._print(f"{plain(name)}: failed: {plain(reason)}", style="yellow")
            else:
                more = f"; {self._progress()}" if self._total > 1 else ""
                self._print(f"{plain(name)}: finished in {human_seconds(seconds)}{more}")

    @property
    def seconds_left(self) -> float | None:
        """For the whole study, at the pace so far; None before anything is done."""
        now, running = self._clock(), self._cells.values()
        shares = sum(share_done(cell.history) for cell in running)
        done = self._shares + shares - sum(cell.share_before for cell in running)
        todo = self._total - self._skipped - self._ended - shares
        seconds = self._seconds + sum(elapsed(cell.history, now) for cell in running)
        return seconds / done * todo / max(self._parallel, 1) if done > 0 else None

    def _flush(self, name: str) -> None:
        """Print the line of the round that is complete."""
        cell = self._cells[name]
        if cell.pending and cell.history.time is not None and self._live is None:
            self._print(f"{plain(name)}: {', '.join(summary(cell.history, cell.history.time))}")
        cell.pending = False

    def _print(self, text: str, *, style: str = "") -> None:
        if not self._quiet:
            self._console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def _progress(self) -> str:
        text = f"{self._skipped + self._ended} of {self._total} cells"
        if self._failed:
            text += f", {self._failed} failed"
        left = self.seconds_left
        if left:
            text += f", about {human_seconds(left)} left"
        return text

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            with self._lock:
                if self._live is not None:
                    self._live.refresh()

    def _screen(self) -> RenderableType:
        with self._lock:
            now, (width, height) = self._clock(), self._console.size
            bars = Table.grid(expand=True, padding=(0, 1))
            bars.add_column(no_wrap=True, overflow="ellipsis", style="bold", max_width=width // 2)
            bars.add_column(ratio=1)
            bars.add_column(no_wrap=True, overflow="ellipsis")
            for name, cell in self._cells.items():
                bar = ProgressBar(1.0, share_done(cell.history))
                parts = summary(cell.history, now, short=width < WIDE)
                bars.add_row(Text(plain(name)), bar, Text("  ".join(parts)))
            if self._total > 1 and self._cells:
                shares = sum(share_done(cell.history) for cell in self._cells.values())
                done = self._skipped + self._ended + shares
                bars.add_row("", ProgressBar(self._total, done), self._progress())
            if len(self._cells) != 1:
                return bars
            (cell,) = self._cells.values()
            return Group(bars, *details(cell.history, width, height - bars.row_count - 1, now))


def watch(
    logs: Callable[[], Mapping[str, EventLog]],
    running: Callable[[], bool],
    display: Display,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Show the runs of another process until all are finished, or the process is gone.

    Args:
        logs: the cells of a study and their logs, which need not exist yet.
        running: whether a process runs them.
        display: shows them.
        sleep: waits for a number of seconds.

    Returns:
        Whether all are finished. Raises `PrelortError` for a damaged log.
    """
    following: dict[str, Iterator[tuple[list[Event], bool]]] = {}
    started: set[str] = set()
    finished: set[str] = set()
    quiet_polls = 0
    while True:
        quiet_polls += 1
        # Checked before its last events are read.
        stopped = quiet_polls % QUIET_POLLS == 0 and not running()
        cells = logs()
        for name, log in cells.items():
            if name in finished:
                continue
            events, truncated = next(following.setdefault(name, log.follow()))
            if events or truncated:
                quiet_polls, stopped = 0, False
            if truncated:
                display.started(name, events)
            elif name not in started and (events or len(cells) == 1):
                display.started(name)
                started.add(name)
            for event in events if not truncated else ():
                display.event(name, event)
            if events and isinstance(events[-1], RunFinished):
                display.ended(name)
                finished.add(name)
        if finished.issuperset(cells):
            return True
        if stopped:
            return False
        sleep(POLL_SECONDS)
