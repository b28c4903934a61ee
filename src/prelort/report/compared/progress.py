"""How far a study is: a bar for all its cells and one for each that runs, or plain lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from prelort.report.events import Event
from prelort.report.wording import human_seconds, plain

WHOLE = 100.0


class CellsProgress:
    """Shows the cells of a study as they begin, go on and end; may be called from any thread.

    ``total``: all cells. Time left is reckoned from what this process has done, cells that run by
    their share of rounds. Use as a context manager; ``quiet`` prints nothing; ``clock`` returns
    seconds.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._quiet = quiet
        self._clock = clock
        self._total, self._kept = total, 0
        self._ended = self._failed = 0
        self._shares: dict[str, float] = {}  # of the cells that run: how much of each is done
        self._first: dict[str, float] = {}  # how much of it was done before
        self._rounds: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self._start = clock()
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._bars = self._progress() if live else None
        self._all = self._bars.add_task("cells", total=total, words="") if self._bars else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
            self._draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def kept(self, cells: int) -> None:
        """So many cells were finished by an earlier call."""
        with self._lock:
            self._kept, self._start = cells, self._clock()
            if cells and self._bars is None:
                self._print(f"{cells} of {self._total} cells are finished already")
            self._draw()

    def began(self, name: str) -> None:
        """A cell begins, or goes on."""
        with self._lock:
            self._shares[name], self._began[name] = 0.0, self._clock()
            if self._bars is not None:
                self._tasks[name] = self._bars.add_task(plain(name), total=WHOLE, words="")
            self._draw()

    def heard(self, name: str, event: Event) -> None:
        """A cell's run has told an event."""
        kind = event["event"]
        if kind not in ("run_started", "round_started", "aggregated", "resumed"):
            return
        with self._lock:
            rounds = event.get("rounds")
            if isinstance(rounds, int) and rounds > 0:
                self._rounds[name] = rounds
            planned = self._rounds.get(name)
            if planned is None:
                return
            done = int(event.get("round", 0)) - (kind == "round_started")
            share = min(1.0, max(0, done) / planned)
            if kind == "resumed":
                self._first[name] = share
            self._shares[name] = share
            if self._bars is not None and name in self._tasks:
                words = f"round {done} of {planned}"
                self._bars.update(self._tasks[name], completed=WHOLE * share, words=words)
            self._draw()

    def ended(self, name: str, reason: str) -> None:
        """A cell has a result, or has failed for a reason."""
        with self._lock:
            taken = self._clock() - self._began.pop(name)
            self._shares.pop(name)
            self._ended += 1
            self._failed += bool(reason)
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(name))
            if reason:
                self._print(f"{name}: failed: {plain(reason)}", style="yellow")
            elif self._bars is None:
                self._print(f"{name}: finished in {human_seconds(taken)}", counted=True)
            self._draw()

    @property
    def _left(self) -> float | None:
        """Seconds left; None before anything can be said."""
        running = sum(share - self._first.get(name, 0.0) for name, share in self._shares.items())
        done = self._ended + running
        todo = self._total - self._kept - self._ended - sum(self._shares.values())
        if done <= 0:
            return None
        return (self._clock() - self._start) * todo / done

    def _words(self) -> str:
        words = f"{self._kept + self._ended} of {self._total} cells"
        if self._failed:
            words += f", {self._failed} failed"
        left = self._left
        if left is not None and self._kept + self._ended < self._total:
            words += f", about {human_seconds(left)} left"
        return words

    def _draw(self) -> None:
        if self._bars is not None and self._all is not None:
            done = self._kept + self._ended + sum(self._shares.values())
            self._bars.update(self._all, completed=done, words=self._words())

    def _print(self, text: str, *, style: str = "", counted: bool = False) -> None:
        if self._quiet:
            return
        line = f"{text}; {self._words()}" if counted else text
        console = self._console if self._bars is None else self._bars.console
        console.print(Text(line, style=style), soft_wrap=True, highlight=False)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[words]}", markup=False),
            console=self._console,
            expand=True,
        )
