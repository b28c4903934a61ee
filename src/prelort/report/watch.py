"""Following a run on a terminal, from another process than its own: `prelort watch`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prelort.report import events
from prelort.report.follow import Look, follow
from prelort.report.happened import waits_for
from prelort.report.progress import LiveProgress
from prelort.report.tables import comparison_table
from prelort.report.watched import Row, Status, Watched, counts
from prelort.report.wording import clock_time, human_bytes, human_seconds, plain

QUIET_SECONDS = 60.0
"""Silence of the log after which it is mentioned: the run may have been stopped."""
HAPPENINGS = 5
"""So many are shown, at most."""

_OF_A_ROUND_DONE = ("aggregated", "evaluated", "evaluated_at_clients")

Logs = Callable[[], Mapping[str, Path]]
"""Name to event log of a run, or of several that run one after the other; may change."""

_STYLES: dict[Status, str] = {
    "failed": "red",
    "training": "cyan",
    "answered": "green",
    "not asked": "dim",
    "gone": "dim",
}


def watch(
    logs: Logs,
    place: str,
    console: Console,
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the run in ``place`` until it is finished, then its table.

    On a terminal a picture that is drawn anew, elsewhere plain lines as a run prints them itself.
    ``clock`` returns seconds since the epoch. Raises `PrelortError` for a damaged log.
    """
    looks = follow(logs, clock, sleep)
    if console.is_terminal and not console.is_dumb_terminal:
        _draw(looks, place, console, clock)
    else:
        _print(looks, place, console)
    runs = {name: events.read(log) for name, log in logs().items()}
    methods = {name: plain(events.started(run).get("method", "run")) for name, run in runs.items()}
    console.print(comparison_table({name or methods[name]: run for name, run in runs.items()}))


def screen(watched: Watched, width: int, height: int, now: float) -> RenderableType:
    """A run as it stands, in ``height`` lines of ``width`` characters or fewer."""
    lines = [_headline(watched, now), _numbers(watched, now)]
    if watched.waiting is not None:
        lines.append(Text(f"waiting for {waits_for(watched.waiting)}", style="yellow"))
    lines = lines[: max(height, 1)]
    room = height - len(lines)
    happened = list(watched.happenings)[-min(HAPPENINGS, max(room // 3, 0)) :] if room > 2 else []
    room -= len(happened)
    parts: list[RenderableType] = [_cropped(line) for line in lines]
    if watched.rows and room >= 2:  # the table's head and a client
        count = room - 1
        if len(watched.rows) > count:
            count -= 1  # the line on the others
        shown, others = watched.most_urgent(count)
        if shown:
            parts.append(_table(watched, shown, width, now))
        if others:
            parts.append(_cropped(Text(others, style="dim")))
    parts += [_cropped(Text(line, style="dim")) for line in happened]
    return Group(*parts)


def _headline(watched: Watched, now: float) -> Text:
    run = watched.run
    head = Text(plain(watched.name), style="bold")
    if run is None:
        return head
    clock = clock_time(max(run.elapsed(now), 0.0))
    left = run.left(now)
    if left is not None:
        clock += f", {clock_time(max(left, 0.0))} left"
    asked = [row for row in watched.rows.values() if row.status not in ("not asked", "gone")]
    doing = "finished" if watched.finished else counts(asked)
    more = [f"round {run.round}/{run.rounds or '?'}", clock, *([doing] if doing else [])]
    return head.append("  " + "  ".join(more), style="not bold")


def _numbers(watched: Watched, now: float) -> Text:
    run = watched.run
    parts: list[str] = []
    if run is not None and run.loss is not None:
        parts.append(f"loss {run.loss:.3f}")
    if run is not None and run.measured:
        parts.append(run.measured)
    if watched.bytes_up or watched.bytes_down:
        up, down = human_bytes(watched.bytes_up), human_bytes(watched.bytes_down)
        parts.append(f"{up} up, {down} down")
    silent = now - watched.last
    if silent > QUIET_SECONDS and not watched.finished:
        parts.append(f"last event {human_seconds(silent)} ago")
    return Text("  ".join(parts) or "nothing trained yet")


def _table(watched: Watched, rows: list[Row], width: int, now: float) -> Table:
    """One line a client; columns that a narrow terminal has no room for are left out."""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True, overflow="ellipsis", ratio=1)
    cells: list[tuple[int, str, Callable[[Row], str]]] = [
        (44, "loss", lambda row: "" if row.loss is None else f"{row.loss:.3f}"),
        (60, "examples", lambda row: "" if row.examples is None else str(row.examples)),
        (52, "time", lambda row: _taken(watched.seconds(row, now))),
        (68, "rounds", lambda row: str(row.rounds)),
    ]
    cells = [cell for cell in cells if width >= cell[0]]
    for _, head, _ in cells:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        old = "" if row.status == "answered" else "dim"  # numbers of an earlier round
        status = row.status + (f": {row.reason}" if row.reason else "")
        table.add_row(
            Text(row.name),
            Text("–" if row.rank is None else str(row.rank)),
            Text(status, style=_STYLES[row.status]),
            *(Text(show(row), style=old) for _, _, show in cells),
        )
    return table


def _taken(seconds: float | None) -> str:
    return "" if seconds is None else human_seconds(seconds)


def _cropped(line: Text) -> Text:
    """One line on the screen, however long."""
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _not_begun(place: str, looks: list[Look]) -> Text:
    name = looks[-1].name if looks else ""
    where = f"{plain(name)} in {plain(place)}" if name else plain(place)
    return Text(f"{where} has not begun: waiting for its first event")


def _draw(
    looks: Iterator[list[Look]], place: str, console: Console, clock: Callable[[], float]
) -> None:
    watched = Watched("")
    # Drawn by hand after each look: a thread that draws would see events half taken in.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for found in looks:
            for look in found:
                if look.afresh:
                    watched = Watched(look.name or "run")
                for event, when in look.events:
                    watched.absorb(event, when)
            if watched.run is None:
                shown: RenderableType = _not_begun(place, found)
            else:
                width, height = console.size
                # One line less than there are: the cursor stands below.
                shown = screen(watched, width, max(height - 1, 1), clock())
            live.update(shown, refresh=True)


def _print(looks: Iterator[list[Look]], place: str, console: Console) -> None:
    lines, told = _Lines(console), ""
    try:
        for found in looks:
            for look in found:
                lines.take(look)
            words = str(_not_begun(place, found))
            if not lines.begun and words != told:
                console.print(Text(words), soft_wrap=True, highlight=False)
            told = "" if lines.begun else words
    finally:
        lines.close()


class _Lines:
    """Runs as plain lines; what was told is not told again when a log is cut back."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._now = 0.0
        self._progress = self._new()
        self.begun = False
        """Whether the log that is being read has an event."""

    def take(self, look: Look) -> None:
        """Print what a look has found."""
        found = list(look.events)
        if look.again:
            done = [i for i, (event, _) in enumerate(found) if event["event"] in _OF_A_ROUND_DONE]
            back = int(found[done[-1]][0].get("round", 0)) if done else 0
            goes_on = f"goes on after round {back}" if back else "begins again"
            words = f"the log was cut back: the run {goes_on}"
            self._console.print(Text(words), soft_wrap=True, highlight=False)
            if back:
                resumed = ({"event": "resumed", "round": back}, found[done[-1]][1])
                found = [resumed, *found[done[-1] + 1 :]]
            else:
                self._progress = self._new()
        self.begun = bool(found) or (self.begun and not look.afresh)
        for event, self._now in found:
            self._progress(event)

    def close(self) -> None:
        """Print what is held back."""
        self._progress.__exit__(None, None, None)

    def _new(self) -> LiveProgress:
        return LiveProgress(self._console, clock=lambda: self._now)
