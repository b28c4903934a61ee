"""What a run wrote down (``metrics.jsonl``), and what can be read off it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prelort.errors import PrelortError

Event = dict[str, Any]
"""One line: ``event`` names its kind; but for ``run_started`` it has a ``round``."""

Values = dict[str, float]
"""Metric to value."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The metrics of the global adapter at every rank prefix after a round."""

    round: int
    prefixes: dict[int, Values]

    def by_rank(self, metric: str) -> dict[int, float]:
        """Rank to value, lowest rank first; ranks that lack the metric are left out."""
        rows = sorted(self.prefixes.items())
        return {rank: values[metric] for rank, values in rows if metric in values}


@dataclass(frozen=True, slots=True)
class Totals:
    """What a run took, up to where it got."""

    rounds: int
    bytes_up: int
    bytes_down: int
    seconds: float
    finished: bool


def read(path: Path | str) -> list[Event]:
    """The events of a run, in the order written.

    A last line that is cut short, as a killed run leaves it, is passed over. Raises
    `PrelortError` where the file is missing, cannot be read, or has any other line that is not
    an event.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise PrelortError(f"metrics file {str(path)!r} cannot be read: {error.strerror}") from None
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError
        except ValueError:  # also what bad JSON and bad UTF-8 raise
            if number == len(lines):  # no newline came after it
                break
            raise PrelortError(f"{str(path)!r}, line {number}, is not an event of a run") from None
        events.append(event)
    return events


def is_finished(events: Iterable[Event]) -> bool:
    """Whether the run has come to its end."""
    return any(event["event"] == "run_finished" for event in events)


def settled(events: Iterable[Event]) -> list[Event]:
    """The events that count: a resumed run takes back what came after its checkpoint.

    A killed run may have begun the round that is done again on resuming; its lines are still in
    the file and would count twice.
    """
    kept: list[Event] = []
    for event in events:
        if event["event"] == "resumed":
            back = event.get("round", 0)
            kept = [e for e in kept if e.get("round", 0) <= back and e["event"] != "run_finished"]
        kept.append(event)
    return kept


def started(events: Iterable[Event]) -> Event:
    """The ``run_started`` event, or an empty one."""
    return next((e for e in events if e["event"] == "run_started"), {})


def evaluations(events: Iterable[Event]) -> list[Evaluation]:
    """The evaluations by round; of several of one round the last."""
    found = {
        e.get("round", 0): Evaluation(
            e.get("round", 0),
            {int(rank): _values(row) for rank, row in e.get("prefixes", {}).items()},
        )
        for e in settled(events)
        if e["event"] == "evaluated" and e.get("prefixes")
    }
    return [found[number] for number in sorted(found)]


def final_evaluation(events: Iterable[Event]) -> Evaluation | None:
    """The last evaluation, or None before the first."""
    found = evaluations(events)
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class AtClient:
    """What one client measured on its own rows: at its rank, over so many examples."""

    rank: int
    examples: int
    metrics: Values


def at_clients(events: Iterable[Event]) -> dict[str, AtClient]:
    """Client -> what it measured last; empty where clients were not asked to."""
    found = [e for e in settled(events) if e["event"] == "evaluated_at_clients"]
    rows = found[-1]["clients"] if found else {}
    return {
        name: AtClient(int(row["rank"]), int(row["examples"]), _values(row["metrics"]))
        for name, row in rows.items()
    }


def shortfall(events: Sequence[Event]) -> str:
    """Why the final evaluation is not of the run's last round; empty where it is."""
    final, rounds = final_evaluation(events), started(events).get("rounds")
    if final is None and at_clients(events):
        return "no global model: see what its clients measured"
    if final is None:
        return "not measured yet"
    if rounds is not None and final.round < rounds:
        return f"measured after round {final.round} of {rounds}"
    return ""


def base_row(events: Iterable[Event]) -> Values:
    """The untuned base's metrics; empty where the run did not measure them."""
    return next((_values(e["base"]) for e in events if e.get("base")), {})


def metrics_of(runs: Mapping[str, Sequence[Event]]) -> list[str]:
    """The metrics that the runs measured, in their order; ``loss`` only if there is no other."""
    names: dict[str, None] = {}
    for events in runs.values():
        names.update(dict.fromkeys(base_row(events)))
        for evaluation in evaluations(events):
            for values in evaluation.prefixes.values():
                names.update(dict.fromkeys(values))
    return [name for name in names if name != "loss"] or list(names)


def train_losses(events: Iterable[Event]) -> dict[int, float]:
    """Round to the mean training loss of its replies."""
    rounds = (e for e in settled(events) if e["event"] == "aggregated")
    return {e["round"]: float(e["loss"]) for e in rounds if e.get("loss") is not None}


def diagnostics(events: Iterable[Event]) -> dict[int, dict[str, Any]]:
    """Round to its diagnostics (docs/diagnostics.md); without rounds where they failed."""
    rounds = (e for e in settled(events) if e["event"] == "aggregated")
    found = {e["round"]: e.get("diagnostics") or {} for e in rounds}
    return {at: numbers for at, numbers in found.items() if numbers and "failed" not in numbers}


def totals(events: Iterable[Event]) -> Totals:
    """Bytes sent by clients (up) and to clients (down), wall seconds, and rounds completed.

    Of a finished run as it says itself; of a run that stopped, the sum over the rounds done.
    """
    counted = settled(events)
    rounds = {e["round"]: e for e in counted if e["event"] == "aggregated"}
    for event in reversed(counted):
        if event["event"] == "run_finished":
            up, down = int(event.get("bytes_up", 0)), int(event.get("bytes_down", 0))
            return Totals(int(event["round"]), up, down, float(event.get("seconds", 0.0)), True)
    seconds = sum(e.get("seconds", {}).get("total", 0.0) for e in rounds.values())
    measuring = ("evaluated", "evaluated_at_clients")
    seconds += sum(e.get("seconds", 0.0) for e in counted if e["event"] in measuring)
    return Totals(
        rounds=max(rounds, default=0),
        bytes_up=sum(e.get("bytes_up", 0) for e in rounds.values()),
        bytes_down=sum(e.get("bytes_down", 0) for e in rounds.values()),
        seconds=seconds,
        finished=False,
    )


def phases(events: Iterable[Event]) -> dict[str, float]:
    """Wall seconds by phase: clients' training with all messages, aggregation, evaluation.

    ``diagnose`` too, where it was done.
    """
    taken = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0}
    for event in settled(events):
        if event["event"] == "aggregated":
            seconds = event.get("seconds", {})
            for phase in ("train", "aggregate"):
                taken[phase] += seconds.get(phase, 0.0)
            if seconds.get("diagnose"):
                taken["diagnose"] = taken.get("diagnose", 0.0) + seconds["diagnose"]
        elif event["event"] in ("evaluated", "evaluated_at_clients"):
            taken["evaluate"] += event.get("seconds", 0.0)
    return taken


def _values(row: Mapping[str, Any]) -> Values:
    """Numbers as they are; a null, as strict JSON writes a NaN, is a NaN again."""
    return {name: math.nan if value is None else float(value) for name, value in row.items()}
