"""Following runs on a terminal, from another process than theirs: `prelort watch`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from prelort.events import Waiting, utc_now
from prelort.history import ClientRecord, RunHistory, Status
from prelort.report.follow import LogFollower, NewEvents
from prelort.report.formatting import clock_time, human_bytes, human_seconds, listing, plain
from prelort.report.incidents import lines, waits_for
from prelort.report.progress import Clock, StudyProgress, elapsed, latest_metric, remaining

POLL_SECONDS = 0.5
"""Time between two looks at the logs."""
SILENCE_SECONDS = 60.0
"""Silence of a log that is mentioned: the run may have been stopped."""
INCIDENTS = 5
"""Maximum number of incidents on the screen."""

_STYLES: dict[Status, str] = {
    "failed": "red",
    "training": "cyan",
    "answered": "green",
    "idle": "dim",
    "left": "dim",
}
URGENCY: tuple[Status, ...] = tuple(_STYLES)
"""Who is shown first where there is no room for all."""

Logs = Callable[[], Mapping[str, Path]]
"""A study's cells and their logs; neither need exist yet."""


def watch(
    logs: Logs,
    place: str,
    console: Console,
    *,
    clock: Clock = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the runs of ``place`` until all are finished.

    On a terminal a screen that is drawn anew, elsewhere the plain lines that a run prints. Raises
    `PrelortError` for a damaged log.
    """
    live = console.is_terminal and not console.is_dumb_terminal
    followers: dict[str, LogFollower] = {}
    with _Screen(place, console, clock) if live else _Lines(place, console) as view:
        while True:
            followers = {
                name: followers.get(name) or LogFollower(path) for name, path in logs().items()
            }
            news = {
                name: follower.poll()
                for name, follower in followers.items()
                if not follower.history.finished
            }
            histories = {name: follower.history for name, follower in followers.items()}
            view.show(histories, news)
            if histories and all(history.finished for history in histories.values()):
                return
            sleep(POLL_SECONDS)


def screen(
    name: str, history: RunHistory, width: int, height: int, now: datetime
) -> RenderableType:
    """A run's state in at most ``height`` lines of ``width`` characters."""
    top = [_headline(name, history, now), _numbers(history, now)]
    if history.waiting is not None:
        top.append(Text(f"waiting for {waits_for(history.waiting)}", style="yellow"))
    top = top[: max(height, 1)]
    room = height - len(top)
    news = [
        text
        for event in history.incidents[-INCIDENTS:]
        if not isinstance(event, Waiting)  # which has a line of its own while it lasts
        for text in lines(event)
    ]
    news = news[-min(INCIDENTS, max(room // 3, 0)) :] if room > 2 else []
    room -= len(news)
    parts: list[RenderableType] = [_cropped(line) for line in top]
    if history.clients and room >= 2:  # the table's head and a client
        count = room - 1
        if len(history.clients) > count:
            count -= 1  # the line on the others
        shown, others = most_urgent(history.clients.values(), count)
        if shown:
            parts.append(_table(history, shown, width, now))
        if others:
            parts.append(_cropped(Text(others, style="dim")))
    return Group(*parts, *(_cropped(Text(line, style="dim")) for line in news))


def most_urgent(clients: Iterable[ClientRecord], count: int) -> tuple[list[ClientRecord], str]:
    """``count`` clients by name, and a line on the others (empty: all are shown).

    Where they do not all fit, those that failed or are training come first.
    """
    rows = sorted(clients, key=lambda client: client.name)
    if len(rows) <= count:
        return rows, ""
    rows.sort(key=lambda client: URGENCY.index(client.status))
    rest = rows[max(count, 0) :]
    doing = _counts(rest) if len({row.status for row in rest}) > 1 else rest[0].status
    return rows[: max(count, 0)], f"and {len(rest)} other{'' if len(rest) == 1 else 's'} ({doing})"


def _counts(clients: Iterable[ClientRecord]) -> str:
    """How many have which status: ``1 failed and 2 training``."""
    numbers = Counter(client.status for client in clients)
    return listing(f"{numbers[status]} {status}" for status in URGENCY if numbers[status])


def _headline(name: str, history: RunHistory, now: datetime) -> Text:
    rounds = history.started.rounds if history.started is not None else "?"
    spent = clock_time(elapsed(history, now))
    left = remaining(history, now)
    if left is not None:
        spent += f", {clock_time(left)} left"
    asked = [c for c in history.clients.values() if c.status not in ("idle", "left")]
    doing = "finished" if history.finished else _counts(asked)
    parts = [f"round {history.round}/{rounds}", spent, *filter(None, [doing])]
    head = Text(plain(name), style="bold")
    return head.append("  " + "  ".join(parts), style="not bold")


def _numbers(history: RunHistory, now: datetime) -> Text:
    parts: list[str] = []
    record = history.rounds.get(history.round)
    if record is not None and record.loss is not None:
        parts.append(f"loss {record.loss:.3f}")
    parts += filter(None, [latest_metric(history)])
    if history.bytes_up or history.bytes_down:
        up, down = human_bytes(history.bytes_up), human_bytes(history.bytes_down)
        parts.append(f"{up} up, {down} down")
    if history.time is not None and not history.finished:
        silence = (now - history.time).total_seconds()
        if silence > SILENCE_SECONDS:
            parts.append(f"last event {human_seconds(silence)} ago")
    return Text("  ".join(parts) or "nothing trained yet")


def _table(history: RunHistory, clients: list[ClientRecord], width: int, now: datetime) -> Table:
    """One line a client; columns that a narrow terminal has no room for are left out."""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True, overflow="ellipsis", ratio=1)
    columns: list[tuple[int, str, Callable[[ClientRecord], str]]] = [
        (44, "loss", lambda client: f"{client.last.loss:.3f}" if client.last else ""),
        (60, "examples", lambda client: str(client.last.examples) if client.last else ""),
        (52, "time", lambda client: _time(history, client, now)),
        (68, "rounds", lambda client: str(client.rounds)),
    ]
    columns = [column for column in columns if width >= column[0]]
    for _, head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for client in clients:
        old = "" if client.status == "answered" else "dim"  # numbers of an earlier round
        status = client.status + (f": {plain(client.reason)}" if client.reason else "")
        table.add_row(
            Text(plain(client.name)),
            Text("–" if client.rank is None else str(client.rank)),
            Text(status, style=_STYLES[client.status]),
            *(Text(show(client), style=old) for _, _, show in columns),
        )
    return table


def _time(history: RunHistory, client: ClientRecord, now: datetime) -> str:
    """How long a client's last reply took, or the current one has taken so far."""
    if client.status == "training" and history.current is not None:
        return human_seconds(max((now - history.current.started).total_seconds(), 0.0) // 1)
    return human_seconds(client.last.seconds) if client.last is not None else ""


def _cropped(line: Text) -> Text:
    """One line on the screen, however long."""
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _not_started(place: str) -> Text:
    return Text(f"{plain(place)} has not started: waiting for its first event")


class _Screen:
    """The screen of the cell that is running."""

    def __init__(self, place: str, console: Console, clock: Clock) -> None:
        self._place, self._console, self._clock = place, console, clock
        # Drawn after each poll, not by a thread, which would see a history half updated.
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._name = ""

    def __enter__(self) -> _Screen:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, histories: Mapping[str, RunHistory], news: Mapping[str, NewEvents]) -> None:
        """Draw the cell shown before until it is finished, then the next that has started."""
        begun = [name for name, history in histories.items() if history.time is not None]
        running = [name for name in begun if not histories[name].finished]
        if self._name not in running:
            self._name = next(iter(running), self._name or next(reversed(begun), ""))
        parts: list[RenderableType] = []
        if len(histories) > 1:
            finished = sum(history.finished for history in histories.values())
            parts.append(Text(f"{finished} of {len(histories)} cells finished", style="dim"))
        if self._name:
            width, height = self._console.size
            room = max(height - 1 - len(parts), 1)  # the cursor stands on the last line
            title = self._name
            parts.append(screen(title, histories[title], width, room, self._clock()))
        else:
            parts.append(_cropped(_not_started(self._place)))
        self._live.update(Group(*parts), refresh=True)


class _Lines:
    """The lines that the runs print themselves where there is no terminal."""

    def __init__(self, place: str, console: Console) -> None:
        self._place, self._console = place, console
        self._progress = StudyProgress(console)
        self._started: set[str] = set()
        self._announced = False

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.close()

    def show(self, histories: Mapping[str, RunHistory], news: Mapping[str, NewEvents]) -> None:
        """Print the new events; after a truncation not again what was printed."""
        for name, new in news.items():
            if name not in self._started and new.events:
                self._started.add(name)
                self._progress.started(name)
            if new.truncated:
                self._progress.replaced(name, histories[name])
                continue
            for event in new.events:
                self._progress.event(name, event)
        if not self._started and not self._announced:
            self._announced = True
            self._console.print(_not_started(self._place), soft_wrap=True, highlight=False)
