"""The status of a run and of its clients for a terminal, from the run's history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from prelort.events import RunResumed, Transferring
from prelort.history import ClientRecord, RunHistory, Status
from prelort.report.formatting import (
    clock_time,
    human_bytes,
    human_seconds,
    listing,
    metric_format,
    plain,
    plural,
)
from prelort.report.incidents import waits_for

STYLES: dict[Status, str] = {
    "failed": "red",
    "training": "cyan",
    "answered": "green",
    "idle": "dim",
    "left": "dim",
}
"""The statuses of clients, in the order in which they are shown if there is no room for all."""


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
    if timed:
        pace = sum(history.seconds.values()) / timed
    elif record is not None and record.answers:
        pace = current * len(record.clients) / record.answers
    else:
        return None
    return max(pace * todo - current, 0.0) if todo else None


def share_done(history: RunHistory) -> float:
    """The share of finished rounds; the current one counts by the share of its clients."""
    record, started = history.current, history.started
    if started is None:
        return 0.0
    part = record.answers / len(record.clients) if record is not None and record.clients else 0.0
    return (history.done + part) / started.rounds


def latest_metric(history: RunHistory, *, short: bool = False) -> str:
    """The latest evaluation: ``ppl 27.0@2 21.0@16``; short: at the highest rank only."""
    final = history.final
    if final is None or (final.round == 0 and history.base):
        for metric, value in history.base.items():
            form = metric_format(metric)
            return f"base {'' if short else form.short + ' '}{form.show(value)}"
        return ""
    ranks = [min(final.prefixes), max(final.prefixes)]
    form = metric_format(next(iter(final.prefixes[ranks[-1]])))
    values = [
        f"{form.show(final.prefixes[rank].get(form.metric))}@{rank}"
        for rank in dict.fromkeys(ranks[-1:] if short else ranks)
    ]
    return " ".join([form.short, *values])


def summary(history: RunHistory, now: datetime, *, short: bool = False) -> list[str]:
    """The progress of a run, in parts; short ones for a terminal of 80 columns."""
    if history.started is None:
        return ["loading"]
    parts = [f"{'' if short else 'round '}{history.round}/{history.started.rounds}"]
    record, evaluating = history.rounds.get(history.round), history.evaluating
    if evaluating is not None:
        parts.append(f"evaluating {evaluating.done / max(evaluating.total, 1):.0%}")
    elif record is not None:
        answers = record.answers if history.current is not None else len(record.replies)
        parts.append(f"{answers}/{len(record.clients)} clients")
    if record is not None and record.loss is not None:
        parts.append(f"loss {record.loss:.3f}")
    parts += filter(None, [latest_metric(history, short=short)])
    left = remaining(history, now)
    more = f", {clock_time(left)} left" if left is not None else ""
    return [*parts, clock_time(elapsed(history, now)) + more]


def details(
    history: RunHistory, width: int, height: int, now: datetime
) -> Iterator[RenderableType]:
    """The clients of a run in at most ``height`` lines of ``width`` characters."""
    counts = Counter(client.status for client in history.clients.values())
    parts = [listing(f"{counts[s]} {s}" for s in STYLES if counts[s] and s not in ("idle", "left"))]
    if history.bytes_up or history.bytes_down:
        up, down = human_bytes(history.bytes_up), human_bytes(history.bytes_down)
        parts.append(f"{up} up, {down} down")
    top = [Text("  ".join(filter(None, parts)), style="dim")] if any(parts) else []
    if history.waiting is not None:
        top.append(Text(f"waiting for {waits_for(history.waiting)}", style="yellow"))
    for line in top[:height]:
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line
    room = height - len(top) - 1  # below the table's head
    if not history.clients or room < 2:
        return
    order = list(STYLES)
    clients = sorted(history.clients.values(), key=lambda client: client.name)
    if len(clients) > room:
        clients.sort(key=lambda client: order.index(client.status))
        clients, rest = clients[: room - 1], clients[room - 1 :]
        yield _client_table(history, clients, width, now)
        doing = listing(f"{len(list(group))} {s}" for s, group in groupby(c.status for c in rest))
        yield Text(f"and {plural(len(rest), 'other')}: {doing}", style="dim", no_wrap=True)
    else:
        yield _client_table(history, clients, width, now)


def on_its_way(event: Transferring) -> str:
    """``320 MB (49 %) received``."""
    done = {"down": "sent", "up": "received"}[event.direction]
    return f"{human_bytes(event.bytes)} ({event.share:.0%}) {done}"


def _client_table(
    history: RunHistory, clients: Sequence[ClientRecord], width: int, now: datetime
) -> Table:
    """One line a client; a narrow terminal has no room for its numbers."""
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("client", no_wrap=True, overflow="ellipsis", max_width=max(8, width // 4))
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True, overflow="ellipsis", ratio=1)
    heads = ("loss", "examples", "time", "rounds") if width >= 68 else ()
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for client in clients:
        last, seconds = client.last, client.last.seconds if client.last is not None else None
        if client.status == "training" and history.current is not None:
            seconds = max((now - history.current.started).total_seconds(), 0.0) // 1
        values = ("", "") if last is None else (f"{last.loss:.3f}", str(last.examples))
        time_text = "" if seconds is None else human_seconds(seconds)
        old = "" if client.status == "answered" else "dim"  # numbers of an earlier round
        status = client.status + (f": {plain(client.reason)}" if client.reason else "")
        if client.transfer is not None:
            status += f", {on_its_way(client.transfer)}"
        table.add_row(
            Text(plain(client.name)),
            Text("–" if client.rank is None else str(client.rank)),
            Text(status, style=STYLES[client.status]),
            *(Text(v, style=old) for v in (*values, time_text, str(client.rounds))[: len(heads)]),
        )
    return table
