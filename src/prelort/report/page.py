"""A run, or several side by side, as one page of HTML that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prelort.report import happened
from prelort.report.axes import COLOURS, has_room, wants_log
from prelort.report.charts import Chart, Series, line_chart
from prelort.report.clients import ClientRow, client_rows, losses_by_rank
from prelort.report.events import (
    Event,
    at_clients,
    base_row,
    evaluations,
    final_evaluation,
    metrics_of,
    phases,
    settled,
    started,
    totals,
    train_losses,
)
from prelort.report.heat import Heat, heat_strip
from prelort.report.tables import Block, blocks
from prelort.report.wording import (
    Wording,
    capital,
    human_bytes,
    human_seconds,
    listed,
    plain,
    wording,
)

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_INCIDENTS = 400
"""So many lines of what happened are shown, at most."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the page is made from: one run's events and the texts beside them."""

    name: str
    events: Sequence[Event]
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration, as its TOML says it; keys may lack."""
    config_text: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Phase:
    """Wall seconds of one phase, and its share of all in percent."""

    name: str
    seconds: str
    percent: float


@dataclass(frozen=True, slots=True)
class ClientLine:
    """A line of the table of clients, as texts."""

    name: str
    rank: str
    examples: str
    asked: int
    answered: int
    failed: int
    failed_rounds: str
    loss: str
    own: list[str]
    up: str
    down: str
    seconds: str


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as the page shows it."""

    name: str
    status: str
    finished: bool
    waiting: str
    facts: list[tuple[str, str]]
    charts: list[Chart]
    losses: Heat | None
    phases: list[Phase]
    incidents: list[happened.Incident]
    more_incidents: int
    clients: list[ClientLine]
    own_metrics: list[str]
    never_asked: int
    has_down: bool
    config: str
    versions: list[tuple[str, str]]
    notes: list[str]


def render(sources: Sequence[Source], title: str) -> str:
    """The page of these runs. Every text of theirs is escaped; nothing is fetched to show it."""
    runs = {source.name: happened.known(source.events) for source in sources}
    return (
        environment()
        .get_template("report.html")
        .render(
            title=plain(title),
            tables=_tables(runs),
            overview=_overview(runs),
            runs=[view(source) for source in sources],
            colours=COLOURS,
        )
    )


def environment() -> Environment:
    """The templates; whatever they are given is escaped."""
    # Imported here: the command line imports this package for its names.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("prelort.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def view(source: Source) -> RunView:
    """What the page shows of one run."""
    events = happened.known(source.events)
    words = [wording(name) for name in metrics_of({"": events})]
    found, rows = happened.incidents(events), client_rows(events)
    own = at_clients(events)
    own_metrics = [w for w in words_of_clients(own) if w]
    spent, facts = totals(events), started(events)
    looks = _looks(events)
    charts = [_metric_chart(events, metric, looks) for metric in words]
    charts += [_loss_chart(events, looks), _bytes_chart(events), _seconds_chart(events)]
    clients = facts.get("clients")
    return RunView(
        name=plain(source.name),
        status=_status(events),
        finished=spent.finished,
        waiting=_waiting(events),
        facts=_facts(source.config, events),
        charts=[chart for chart in charts if chart is not None],
        losses=heat_strip(
            {plain(row.name): row.losses for row in rows},
            {plain(row.name): row.failed for row in rows},
            wording("loss").show,
        ),
        phases=_phases(phases(events)),
        incidents=found[:MOST_INCIDENTS],
        more_incidents=len(found[MOST_INCIDENTS:]),
        clients=[_client_line(row, own_metrics, own) for row in rows],
        own_metrics=[f"own {w.short} {w.arrow}" for w in own_metrics],
        never_asked=max(0, clients - len(rows)) if isinstance(clients, int) else 0,
        has_down=any(row.bytes_down is not None for row in rows),
        config="\n".join(map(plain, source.config_text.strip().splitlines())),
        versions=[(plain(name), plain(text)) for name, text in source.versions.items()],
        notes=_notes(events, happened.unknown_kinds(source.events)),
    )


def words_of_clients(own: Mapping[str, Any]) -> list[Wording]:
    """The metrics that clients measured on their own rows; loss only if there is no other."""
    names = dict.fromkeys(name for found in own.values() for name in found.metrics)
    return [wording(name) for name in names if name != "loss" or len(names) == 1]


def _tables(runs: Mapping[str, Sequence[Event]]) -> list[Block]:
    return blocks(runs) if any(map(started, runs.values())) else []


def _overview(runs: Mapping[str, Sequence[Event]]) -> list[Chart]:
    """Each metric at every rank prefix, a line a run; of several runs by round too."""
    charts = []
    for words in (wording(name) for name in metrics_of(runs)):
        finals = {name: final_evaluation(events) for name, events in runs.items()}
        lines = [
            _series(plain(name), final.by_rank(words.metric) if final else {}, words, look)
            for look, (name, final) in enumerate(finals.items())
        ]
        bases = [row[words.metric] for row in map(base_row, runs.values()) if words.metric in row]
        if any(len(line.points) > 1 for line in lines):
            title = f"{capital(words.name)} at each rank prefix"
            charts.append(_measured(title, lines, words, bases[:1], "rank prefix in use", True))
        if len(runs) > 1:
            charts.append(_best_by_round(runs, words, bases[:1]))
    return [chart for chart in charts if chart is not None]


def _best_by_round(
    runs: Mapping[str, Sequence[Event]], words: Wording, bases: Sequence[float]
) -> Chart | None:
    lines, tops = [], set()
    for look, (name, events) in enumerate(runs.items()):
        curves = _by_prefix(events, words.metric)
        if curves:
            tops.add(max(curves))
            lines.append(_series(plain(name), curves[max(curves)], words, look))
    if not any(len(line.points) > 1 for line in lines):
        return None
    where = f"rank {tops.pop()}" if len(tops) == 1 else "the highest rank"
    title = f"{capital(words.name)} by round at {where}"
    return _measured(title, lines, words, bases, "round", False)


def _looks(events: Sequence[Event]) -> dict[int, int]:
    """Rank -> the number of its colour, the same in every chart of the run."""
    ranks = {int(rank) for rank in started(events).get("levels", ())}
    ranks |= {rank for one in evaluations(events) for rank in one.prefixes}
    return {rank: look for look, rank in enumerate(sorted(ranks | losses_by_rank(events).keys()))}


def _metric_chart(
    events: Sequence[Event], words: Wording, looks: Mapping[int, int]
) -> Chart | None:
    """One line a prefix over the rounds."""
    curves = _by_prefix(events, words.metric)
    if not any(len(curve) > 1 for curve in curves.values()):
        return None  # the table says as much
    lines = [_series(f"rank {rank}", curve, words, looks[rank]) for rank, curve in curves.items()]
    base = base_row(events).get(words.metric)
    title = f"{capital(words.name)} by round, at each rank prefix"
    return _measured(title, lines, words, [] if base is None else [base], "round", False)


def _measured(
    title: str,
    lines: Sequence[Series],
    words: Wording,
    bases: Sequence[float],
    x_label: str,
    log_x: bool,
) -> Chart | None:
    values = [y for line in lines for y in line.points.values() if math.isfinite(y)]
    log_y = wants_log(values, words) and min(values) > 0
    reference = None
    if bases and has_room(values, bases[0] * words.factor, log_y):
        reference = (f"untuned base {words.show(bases[0])}", bases[0] * words.factor)
    return line_chart(
        title,
        f"{words.title}, {words.direction}",
        lines,
        x_label=x_label,
        log_x=log_x,
        log_y=log_y,
        show=lambda value: words.show(value / words.factor),
        reference=reference,
    )


def _loss_chart(events: Sequence[Event], looks: Mapping[int, int]) -> Chart | None:
    lines = [
        Series(f"rank {rank}", spread.mean, looks[rank], spread.low, spread.high)
        for rank, spread in losses_by_rank(events).items()
    ]
    if not lines:
        lines = [
            Series("all clients", {float(at): loss for at, loss in train_losses(events).items()})
        ]
    unit = "example" if started(events).get("task") == "classification" else "token"
    return line_chart(
        "Training loss by round and rank",
        f"nats per {unit}; line: mean over the clients of a rank, band: lowest to highest",
        lines,
        show=wording("loss").show,
    )


def _bytes_chart(events: Sequence[Event]) -> Chart | None:
    rounds = _rounds(events)
    return line_chart(
        "Bytes by round",
        "all clients of the round together",
        [
            Series("down, to the clients", _column(rounds, "bytes_down"), 0),
            Series("up, from the clients", _column(rounds, "bytes_up"), 1, dashed=True),
        ],
        from_zero=True,
        show=human_bytes,
        tick=human_bytes,
    )


def _seconds_chart(events: Sequence[Event]) -> Chart | None:
    taken = {at: event.get("seconds", {}) for at, event in _rounds(events).items()}
    names = ("train", "aggregate", "diagnose")
    curves = {name: {at: float(s[name]) for at, s in taken.items() if name in s} for name in names}
    measuring: dict[float, float] = {}
    for event in settled(events):
        if event["event"] in ("evaluated", "evaluated_at_clients") and event.get("round", 0) > 0:
            at = event["round"]
            measuring[at] = measuring.get(at, 0.0) + event.get("seconds", 0.0)
    curves["evaluate"] = measuring
    shown = {name: curve for name, curve in curves.items() if any(curve.values())}
    values = [v for curve in shown.values() for v in curve.values() if v > 0]
    log = bool(values) and max(values) > 20 * min(values)
    return line_chart(
        "Time by round",
        "wall seconds of each phase; train: with all messages",
        [Series(name, curve, look) for look, (name, curve) in enumerate(shown.items())],
        log_y=log,
        from_zero=not log,
        show=human_seconds,
    )


def _by_prefix(events: Sequence[Event], metric: str) -> dict[int, dict[float, float]]:
    """Rank -> round -> value, lowest rank first."""
    found = [(one.round, one.by_rank(metric)) for one in evaluations(events)]
    ranks = sorted({rank for _, curve in found for rank in curve})
    return {rank: {at: curve[rank] for at, curve in found if rank in curve} for rank in ranks}


def _series(name: str, curve: Mapping[Any, float], words: Wording, look: int) -> Series:
    return Series(name, {x: value * words.factor for x, value in curve.items()}, look)


def _rounds(events: Sequence[Event]) -> dict[float, Event]:
    return {e["round"]: e for e in settled(events) if e["event"] == "aggregated"}


def _column(rounds: Mapping[float, Event], key: str) -> dict[float, float]:
    return {at: float(event[key]) for at, event in rounds.items() if key in event}


def _status(events: Sequence[Event]) -> str:
    spent, planned = totals(events), started(events).get("rounds", "?")
    if spent.finished:
        return f"finished after {spent.rounds} rounds"
    if not started(events):
        return "no round has begun"
    return f"unfinished: {spent.rounds} of {planned} rounds done"


def _waiting(events: Sequence[Event]) -> str:
    """What the run waits for now: its last event says so."""
    last = events[-1] if events else {"event": ""}
    return happened.waited_for(last) if last["event"] == "waiting" else ""


def _facts(config: Mapping[str, Any], events: Sequence[Event]) -> list[tuple[str, str]]:
    facts, spent = started(events), totals(events)
    clients, asked = facts.get("clients"), _in(config, "federation", "clients_per_round")
    share = isinstance(asked, float)
    per_round = f", {f'{asked:.0%}' if share else asked} a round" if asked is not None else ""
    everything = {
        "method": facts.get("method") or _in(config, "method", "name"),
        "model": _in(config, "model", "name"),
        "data": _in(config, "data", "source"),
        "task": facts.get("task") or config.get("task"),
        "rounds": f"{spent.rounds} of {facts['rounds']}" if "rounds" in facts else None,
        "clients": None if clients is None else f"{clients}{per_round}",
        "ranks": listed(facts["levels"]) if facts.get("levels") else None,
        "seed": facts.get("seed"),
        "bytes up": human_bytes(spent.bytes_up) if spent.rounds else None,
        "bytes down": human_bytes(spent.bytes_down) if spent.rounds else None,
        "time": human_seconds(spent.seconds) if spent.rounds else None,
    }
    return [(key, plain(value)) for key, value in everything.items() if value is not None]


def _in(config: Mapping[str, Any], section: str, key: str) -> Any:
    inner = config.get(section)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _phases(taken: Mapping[str, float]) -> list[Phase]:
    whole = sum(taken.values())
    if not whole:
        return []
    rows = sorted(taken.items(), key=lambda item: -item[1])
    return [Phase(name, human_seconds(s), round(100 * s / whole, 1)) for name, s in rows]


def _client_line(row: ClientRow, metrics: Sequence[Wording], own: Mapping[str, Any]) -> ClientLine:
    measured = own[row.name].metrics if row.name in own else {}
    return ClientLine(
        name=plain(row.name),
        rank=" → ".join(map(str, row.ranks)) or "–",
        examples="–" if row.examples is None else str(row.examples),
        asked=row.asked,
        answered=row.answered,
        failed=len(row.failed),
        failed_rounds=happened.ranges(row.failed),
        loss=wording("loss").show(row.last_loss),
        own=[words.show(measured.get(words.metric)) for words in metrics],
        up=human_bytes(row.bytes_up) if row.answered else "–",
        down=human_bytes(row.bytes_down),
        seconds=human_seconds(row.seconds / row.answered) if row.answered else "–",
    )


def _notes(events: Sequence[Event], strange: Sequence[str]) -> list[str]:
    notes = []
    at_sites = [e for e in settled(events) if e["event"] == "evaluated" and e.get("where")]
    if any(event["where"] == "clients" for event in at_sites):
        counts = at_sites[-1].get("examples")
        pairs = sorted(counts.items(), key=lambda kv: (len(kv[0]), kv[0])) if counts else []
        over = ", ".join(f"{plain(n)} examples at rank {plain(rank)}" for rank, n in pairs)
        notes.append(
            "The prefixes were measured at the clients, on their own rows"
            + (f" (last: {over})." if over else ".")
        )
    if strange:
        notes.append(f"Kinds of events that this page does not know: {listed(strange)}.")
    return notes
