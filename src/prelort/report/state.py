"""Where a run is, told by its events: what progress shows, apart from how it is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from prelort.report.events import Event
from prelort.report.wording import clock_time, human_seconds, plain, wording


@dataclass
class RunState:
    """One run so far. Times are seconds on whatever clock `absorb` is given."""

    name: str
    began: float
    rounds: int | None = None
    round: int = 0
    asked: int = 0
    answered: int = 0
    loss: float | None = None
    measured: str = ""  # at the lowest and highest prefix
    measured_short: str = ""  # at the highest only
    measured_round: int = -1
    left_out: list[str] = field(default_factory=list)
    ended: float | None = None
    _closed: bool = True  # no round is open
    _first: int = 0  # rounds done by an earlier process, which say nothing about the pace
    _paced_from: float | None = None  # when the first round began: what came before is no round
    _losses: list[tuple[float, float]] = field(default_factory=list)  # (loss, examples)

    def absorb(self, event: Event, now: float) -> None:
        """Take one event in; kinds that are not known change nothing."""
        kind = event["event"]
        if kind == "round_started":
            self.round, self.asked = int(event["round"]), len(event.get("clients", ()))
            self.answered, self._closed, self._losses, self.left_out = 0, False, [], []
            self._paced_from = now if self._paced_from is None else self._paced_from
        elif kind == "client_finished":
            self.answered += 1
            # Strict JSON writes a NaN as null, and state is read off logs, too.
            loss = math.nan if event["loss"] is None else float(event["loss"])
            self._losses.append((loss, float(event["examples"])))
            examples = sum(weight for _, weight in self._losses)
            self.loss = sum(loss * weight for loss, weight in self._losses) / max(examples, 1.0)
        elif kind == "client_failed":
            self.answered += 1
            self.left_out.append(f"{plain(event['client'])}: {plain(event.get('reason', '?'))}")
        elif kind == "aggregated":
            self._closed = True
            self.loss = event.get("loss", self.loss)
        elif kind == "evaluated":
            self.measured, self.measured_short = _measured(event)
            self.measured_round = int(event.get("round", 0))
        elif kind == "run_started":
            self.rounds = event.get("rounds", self.rounds)
        elif kind == "resumed":
            self.round = self._first = int(event["round"])
            self._closed, self.began, self._paced_from = True, now, None
        elif kind == "run_finished":
            self.round = int(event.get("round", self.round))
            self._closed, self.ended = True, now

    @property
    def done(self) -> float:
        """Rounds done, with the share of the present one's clients that have answered."""
        if self._closed:
            return float(self.round)
        return self.round - 1 + (self.answered / self.asked if self.asked else 0.0)

    def elapsed(self, now: float) -> float:
        """Seconds since the run began or was resumed, up to its end."""
        return (now if self.ended is None else self.ended) - self.began

    def left(self, now: float) -> float | None:
        """Seconds to go at the mean pace so far; None while there is none, or at the end."""
        if self.rounds is None or self._paced_from is None or self.ended is not None:
            return None
        if self.done <= self._first or self.done >= self.rounds:
            return None
        pace = (now - self._paced_from) / (self.done - self._first)
        return pace * (self.rounds - self.done)

    def parts(self, now: float, narrow: bool = False) -> list[str]:
        """What stands beside the bar; narrow for a terminal of 80 columns."""
        parts = [f"{'' if narrow else 'round '}{self.round}/{self.rounds or '?'}"]
        if self.ended is None and self.asked:
            parts.append(f"client {self.answered}/{self.asked}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.2f}")
        if self.measured:
            parts.append(self.measured_short if narrow else self.measured)
        left = self.left(now)
        remaining = f", {clock_time(left)} left" if left is not None else ""
        return [*parts, clock_time(self.elapsed(now)) + remaining]

    def line(self, now: float) -> str:
        """The round just done, as one line of plain text."""
        parts = [f"{self.name}: round {self.round}/{self.rounds or '?'}"]
        if self.asked:
            reasons = f" (left out {'; '.join(self.left_out)})" if self.left_out else ""
            parts.append(f"{self.answered - len(self.left_out)}/{self.asked} clients{reasons}")
        if self.loss is not None:
            parts.append(f"train loss {self.loss:.3f}")
        if self.measured and self.measured_round == self.round:
            parts.append(self.measured)
        parts.append(f"{human_seconds(self.elapsed(now))} so far")
        left = self.left(now)
        if left is not None:
            parts.append(f"about {human_seconds(left)} left")
        return ", ".join(parts)


def _measured(event: Event) -> tuple[str, str]:
    """'ppl 27.0@2 21.0@16' and 'ppl 21.0@16' of the first metric; the base's where it is there."""
    base = event.get("base")
    if base:
        name = next(iter(base))
        words, shown = wording(name), wording(name).show(base[name])
        return f"base {words.short} {shown}", f"base {shown}"
    prefixes = {int(rank): row for rank, row in event.get("prefixes", {}).items() if row}
    if not prefixes:
        return "", ""
    name = next(iter(prefixes[max(prefixes)]))
    words = wording(name)
    ends = dict.fromkeys([min(prefixes), max(prefixes)])
    values = [f"{words.show(prefixes[rank].get(name))}@{rank}" for rank in ends]
    return " ".join([words.short, *values]), f"{words.short} {values[-1]}"
