"""A run's events as live progress bars, or as plain lines where nobody watches a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from prelort.report.events import Event
from prelort.report.happened import lines
from prelort.report.state import RunState
from prelort.report.wording import plain

_NEWS = {
    "waiting",
    "client_joined",
    "client_left",
    "client_refused",
    "client_failed",
    "round_repeated",
    "measuring_failed",
}
"""What is told at once as a line of its own."""


class _StateColumn(ProgressColumn):
    """What a run is at, drawn anew at every refresh so that its clock ticks."""

    def __init__(self, clock: Callable[[], float], console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._clock = clock
        self._console = console  # asked each time, since a window can change its size

    def render(self, task: Task) -> Text:
        """One run's numbers."""
        state: RunState = task.fields["state"]
        return Text("  ".join(state.parts(self._clock(), narrow=self._console.width < 100)))


class LiveProgress:
    """Shows runs as their events come in; one bar a run, one run after the other.

    Use as a context manager and call it with each event (from one thread at a time). On a
    terminal it draws bars: round, clients of this round, mean training loss, latest metric, time
    taken and left. Elsewhere it prints one plain line a round, and one for whoever is waited for,
    comes, goes, is refused or fails. ``quiet`` prints nothing. ``clock`` returns seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._quiet = quiet
        self._clock = clock
        self._state: RunState | None = None
        self._task: TaskID | None = None
        self._names: set[str] = set()
        self._loading = False
        self._pending = False  # a round's line that waits for its evaluation
        live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._bars = self._progress() if live else None

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._flush()
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event and show what changed."""
        kind = event["event"]
        if kind in ("run_started", "round_started"):
            self._flush()
        state = self._state
        if state is None or kind == "loading" or (kind == "run_started" and not self._loading):
            state = self._open(event)
        # The bar of the run that is about to start is there, however long it waits for sites.
        self._loading = kind == "loading" or (self._loading and kind != "run_started")
        state.absorb(event, self._clock())
        self._pending = self._pending or kind in ("aggregated", "evaluated")
        if kind == "run_finished":
            self._flush()
        if kind in _NEWS:
            self._tell(event)
        if self._bars is not None and self._task is not None:
            if kind == "client_failed":
                warning = f"{state.name}: round {state.round} left out {state.left_out[-1]}"
                self._bars.console.print(Text(warning, style="yellow"))
            self._bars.update(self._task, completed=state.done, total=state.rounds)

    def _open(self, event: Event) -> RunState:
        """Begin a run's bar; without its ``run_started`` the length is not known."""
        name = plain(event.get("method", "run"))
        if name in self._names:
            name = f"{name}, seed {event.get('seed', '?')}"
        self._names.add(name)
        self._state = state = RunState(name, began=self._clock(), rounds=event.get("rounds"))
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=state.rounds, state=state)
        return state

    def _flush(self) -> None:
        """Print the line of the round that is complete, where lines are printed."""
        if self._pending and self._state is not None and self._bars is None and not self._quiet:
            line = Text(self._state.line(self._clock()))
            self._console.print(line, soft_wrap=True, highlight=False)
        self._pending = False

    def _tell(self, event: Event) -> None:
        """Print what happened, where lines are printed: a log has to say why nothing moves."""
        if self._bars is not None or self._quiet or self._state is None:
            return
        if event["event"] != "measuring_failed":  # it comes before the line of its round is whole
            self._flush()
        for words in lines(event):
            line = Text(f"{self._state.name}: {words}")
            self._console.print(line, soft_wrap=True, highlight=False)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            _StateColumn(self._clock, self._console),
            console=self._console,
            expand=True,
        )
