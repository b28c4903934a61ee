"""Runs as live progress bars on a terminal, or as plain lines elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from prelort.events import (
    Checkpointed,
    Evaluated,
    EvaluationFailed,
    Event,
    RankChanged,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunResumed,
    utc_now,
)
from prelort.history import RunHistory
from prelort.report.formatting import clock_time, human_seconds, metric_format, plain
from prelort.report.incidents import lines

Clock = Callable[[], datetime]

TICK_SECONDS = 0.25
"""How often the bars are drawn again."""


def elapsed(history: RunHistory, now: datetime) -> float:
    """Seconds since the run started or, in this process, was resumed; up to its end."""
    if history.started is None:
        return 0.0
    resumed = [event.time for event in history.incidents if isinstance(event, RunResumed)]
    start = resumed[-1] if resumed else history.started.time
    end = history.time if history.finished and history.time is not None else now
    return max((end - start).total_seconds(), 0.0)


def remaining(history: RunHistory, now: datetime) -> float | None:
    """Seconds to go at the mean pace of the rounds so far; None while it is unknown."""
    if history.started is None or history.finished or history.waiting is not None:
        return None
    record, todo = history.current, history.started.rounds - history.done
    current = (now - record.started).total_seconds() if record is not None else 0.0
    timed = sum(one.stats is not None for one in history.rounds.values())
    if timed:  # fewer than are done where an earlier process did some
        pace = sum(history.seconds.values()) / timed
    elif record is not None and (answered := _answered(history)):
        pace = current * len(record.clients) / answered
    else:
        return None
    return max(pace * todo - current, 0.0) if todo else None


def rounds_done(history: RunHistory) -> float:
    """Rounds done, with the share of the current one's clients that have answered."""
    record = history.current
    asked = len(record.clients) if record is not None else 0
    return history.done + (_answered(history) / asked if asked else 0.0)


def latest_metric(history: RunHistory, *, short: bool = False) -> str:
    """The latest evaluation: ``ppl 27.0@2 21.0@16``; short: at the highest rank only."""
    final = history.final
    if final is None or (final.round == 0 and history.base):
        for metric, value in history.base.items():
            form = metric_format(metric)
            return f"base {form.show(value)}" if short else f"base {form.short} {form.show(value)}"
        return ""
    ranks = [min(final.prefixes), max(final.prefixes)]
    form = metric_format(next(iter(final.prefixes[ranks[-1]])))
    shown = [
        f"{form.show(final.prefixes[rank].get(form.metric))}@{rank}"
        for rank in dict.fromkeys(ranks[-1:] if short else ranks)
    ]
    return " ".join([form.short, *shown])


def round_line(history: RunHistory) -> str:
    """The last round as one line of plain text."""
    rounds = history.started.rounds if history.started is not None else "?"
    parts = [f"round {history.round}/{rounds}"]
    record = history.rounds.get(history.round)
    if record is not None:
        failed = "; ".join(
            f"{plain(f.client)}: {plain(f.reason)}" for f in record.failures.values()
        )
        reasons = f" (failed: {failed})" if failed else ""
        parts.append(f"{len(record.replies)}/{len(record.clients)} clients{reasons}")
        if record.loss is not None:
            parts.append(f"train loss {record.loss:.3f}")
    measured = latest_metric(history)
    if measured and history.round in (0, *list(history.evaluations)[-1:]):
        parts.append(measured)
    if history.time is not None:
        parts.append(f"{human_seconds(elapsed(history, history.time))} so far")
        left = remaining(history, history.time)
        if left is not None:
            parts.append(f"about {human_seconds(left)} left")
    return ", ".join(parts)


def _answered(history: RunHistory) -> int:
    record = history.current
    return len(record.replies) + len(record.failures) if record is not None else 0


@dataclass(slots=True)
class _Cell:
    """A cell that runs. ``pending``: its last round's line is not printed yet."""

    history: RunHistory
    start: datetime
    task: TaskID | None = None
    pending: bool = False

    @property
    def rounds(self) -> int | None:
        return self.history.started.rounds if self.history.started is not None else None

    @property
    def share(self) -> float:
        """The part of its rounds that is done."""
        return rounds_done(self.history) / self.rounds if self.rounds else 0.0

    @property
    def share_before(self) -> float:
        """The part that an earlier process did."""
        return (self.history.resumed or 0) / self.rounds if self.rounds else 0.0


class StudyProgress:
    """Shows the runs of a study while they go on. Use as a context manager, from any thread.

    On a terminal it draws a bar for each cell that runs (round, clients, training loss, latest
    metric, time so far and left), and one for the whole study. Elsewhere it prints lines.

    Args:
        console: where to.
        cells: number of cells in the study.
        by_round: whether to print a line for each round and incident, not only for each cell.
        quiet: print nothing.
        clock: the time.
    """

    def __init__(
        self,
        console: Console,
        cells: int = 1,
        *,
        by_round: bool = True,
        quiet: bool = False,
        clock: Clock = utc_now,
    ) -> None:
        self._console = console
        self._total = cells
        self._by_round, self._quiet, self._clock = by_round, quiet, clock
        self._kept = self._ended = self._failed = 0
        self._start = clock()
        self._cells: dict[str, _Cell] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._bars = self._progress() if live else None
        self._whole = (
            self._bars.add_task("cells", total=cells, text=self._words)
            if self._bars is not None and cells > 1
            else None
        )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Print what is left."""
        self._closed.set()
        with self._lock:
            for name in self._cells:
                self._flush(name)
            if self._bars is not None:
                self._bars.stop()

    def kept(self, cells: int) -> None:
        """So many cells were finished by an earlier call."""
        with self._lock:
            self._kept, self._start = cells, self._clock()
            if cells:
                self._print(f"{cells} of {self._total} cells are finished already")
            self._draw()

    def started(self, name: str) -> None:
        """A cell starts or continues."""
        with self._lock:
            self._cells[name] = cell = _Cell(RunHistory(), self._clock())
            if self._bars is not None:
                cell.task = self._bars.add_task(
                    plain(name), total=None, text=lambda: self._numbers(cell)
                )

    def event(self, name: str, event: Event) -> None:
        """A cell's run has an event."""
        with self._lock:
            cell = self._cells[name]
            if isinstance(event, RoundStarted):
                self._flush(name)
            cell.history.apply(event)
            cell.pending |= isinstance(event, RoundFinished | Evaluated)
            if self._by_round and not isinstance(event, RankChanged):
                for text in lines(event):
                    # A failed evaluation comes before the line of its round is complete.
                    if not isinstance(event, EvaluationFailed | RoundFinished):
                        self._flush(name)
                    self._print(f"{plain(name)}: {text}", style="yellow")
            if isinstance(event, Checkpointed | RunFinished):
                self._flush(name)
            self._draw(cell)

    def replaced(self, name: str, history: RunHistory) -> None:
        """A cell's log was truncated: this is its history now."""
        with self._lock:
            cell = self._cells[name]
            cell.history, cell.pending = history, False
            self._print(
                f"{plain(name)}: the log was truncated: continues after round {history.done}"
            )
            self._draw(cell)

    def ended(self, name: str, reason: str = "") -> None:
        """A cell is finished, or has failed for a reason."""
        with self._lock:
            self._flush(name)
            cell = self._cells.pop(name)
            seconds = (self._clock() - cell.start).total_seconds()
            self._ended += 1
            self._failed += bool(reason)
            keep = self._by_round and not reason  # the bars of finished runs stay
            if self._bars is not None and cell.task is not None and not keep:
                self._bars.remove_task(cell.task)
            if reason:
                self._print(f"{plain(name)}: failed: {plain(reason)}", style="yellow")
            elif self._bars is None or not keep:
                more = f"; {self._words()}" if self._total > 1 else ""
                self._print(f"{plain(name)}: finished in {human_seconds(seconds)}{more}")
            self._draw()

    @property
    def seconds_left(self) -> float | None:
        """Of the whole study, at the pace of what this process has done; None before anything."""
        shares = [(cell.share, cell.share_before) for cell in self._cells.values()]
        done = self._ended + sum(share - before for share, before in shares)
        todo = self._total - self._kept - self._ended - sum(share for share, _ in shares)
        if done <= 0:
            return None
        return (self._clock() - self._start).total_seconds() * todo / done

    def _flush(self, name: str) -> None:
        """Print the line of the round that is complete."""
        cell = self._cells[name]
        if cell.pending and self._by_round and self._bars is None:
            self._print(f"{plain(name)}: {round_line(cell.history)}")
        cell.pending = False

    def _words(self) -> str:
        words = f"{self._kept + self._ended} of {self._total} cells"
        if self._failed:
            words += f", {self._failed} failed"
        left = self.seconds_left
        if left is not None and self._kept + self._ended < self._total:
            words += f", about {human_seconds(left)} left"
        return words

    def _numbers(self, cell: _Cell) -> str:
        """What stands beside a cell's bar; less on a terminal of 80 columns."""
        narrow = self._console.width < 100
        history, now = cell.history, self._clock()
        if history.started is None:
            return "loading"
        record = history.rounds.get(history.round)
        parts = [f"{'' if narrow else 'round '}{history.round}/{history.started.rounds}"]
        if history.current is not None:
            parts.append(f"client {_answered(history)}/{len(history.current.clients)}")
        if record is not None and record.loss is not None:
            parts.append(f"loss {record.loss:.2f}")
        parts += filter(None, [latest_metric(history, short=narrow)])
        left = remaining(history, now)
        more = f", {clock_time(left)} left" if left is not None else ""
        return "  ".join([*parts, clock_time(elapsed(history, now)) + more])

    def _draw(self, cell: _Cell | None = None) -> None:
        if self._bars is None:
            return
        if cell is not None and cell.task is not None and cell.rounds:
            done = rounds_done(cell.history)
            self._bars.update(cell.task, completed=done, total=cell.rounds)
        if self._whole is not None:
            shares = sum(one.share for one in self._cells.values())
            self._bars.update(self._whole, completed=self._kept + self._ended + shares)

    def _print(self, text: str, *, style: str = "") -> None:
        if not self._quiet:
            console = self._console if self._bars is None else self._bars.console
            console.print(Text(text, style=style), soft_wrap=True, highlight=False)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            _TextColumn(table_column=Column(no_wrap=True)),
            console=self._console,
            expand=True,
            auto_refresh=False,
        )

    def _tick(self) -> None:
        """Redraw, with the lock: other threads change what is drawn."""
        while not self._closed.wait(TICK_SECONDS):
            with self._lock:
                if self._bars is not None:
                    self._bars.refresh()


class _TextColumn(ProgressColumn):
    """A text made anew at every refresh, so that its clock ticks."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["text"]())
