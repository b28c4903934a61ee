"""The cells of a study and what was measured in them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prelort.metrics.scores import aurac
from prelort.report.events import (
    Event,
    at_clients,
    base_row,
    evaluations,
    final_evaluation,
    is_finished,
    metrics_of,
    settled,
    started,
    totals,
    train_losses,
)
from prelort.report.tables import shared_ranks

AURAC: Literal["AURAC"] = "AURAC"

AT_CLIENTS: Literal["at clients"] = "at clients"

Place = int | Literal["AURAC", "at clients"]
"""Where a metric is read: at a rank prefix, as the area under the rank curve, or as the mean over
the clients of what each measured on its own rows at its own rank."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: its events so far, what it has computed, and why it has failed if it has.

    ``folder``: where it is, as text. ``passes``: forward (and backward) passes in training.
    """

    setting: str
    method: str
    seed: int
    folder: str = ""
    events: Sequence[Event] = ()
    passes: int = 0
    reason: str = ""

    @property
    def finished(self) -> bool:
        """Whether it has a result; only then it counts."""
        return is_finished(self.events)

    @property
    def status(self) -> Literal["finished", "failed", "stopped", "not begun"]:
        """Where it stands."""
        if self.finished:
            return "finished"
        if self.reason:
            return "failed"
        return "stopped" if started(self.events) else "not begun"

    @property
    def train_seconds(self) -> float:
        """Seconds that clients have trained, one after the other."""
        replies = (e for e in settled(self.events) if e["event"] == "client_finished")
        return sum(float(event.get("seconds", 0.0)) for event in replies)

    def curve(self, metric: str) -> dict[int, float]:
        """Rank to the metric after the last round; empty without a global model or a result."""
        final = final_evaluation(self.events) if self.finished else None
        return final.by_rank(metric) if final is not None else {}

    def own(self, metric: str) -> float | None:
        """The mean over clients of what they measured on their own rows; None if none did."""
        found = at_clients(self.events).values() if self.finished else ()
        values = [one.metrics[metric] for one in found if metric in one.metrics]
        return statistics.fmean(values) if values else None

    def by_round(self, metric: str) -> dict[int, dict[int, float]]:
        """Rank to (round to the metric)."""
        found = [(one.round, one.by_rank(metric)) for one in evaluations(self.events)]
        ranks = sorted({rank for _, curve in found for rank in curve})
        return {rank: {at: curve[rank] for at, curve in found if rank in curve} for rank in ranks}

    def trained_on(self) -> dict[int, list[tuple[str, int, int]]]:
        """Round to (client, examples, steps) of its replies."""
        rounds: dict[int, list[tuple[str, int, int]]] = {}
        for event in settled(self.events):
            if event["event"] == "client_finished":
                facts = (str(event["client"]), int(event["examples"]), int(event["steps"]))
                rounds.setdefault(int(event["round"]), []).append(facts)
        return {number: sorted(facts) for number, facts in sorted(rounds.items())}


@dataclass(frozen=True, slots=True)
class Grid:
    """All cells of a study. ``settings`` is one empty name where there are none."""

    methods: Sequence[str]
    seeds: Sequence[int]
    settings: Sequence[str]
    reference: str
    cells: Sequence[Cell]
    metric: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """What all cells have in common, in words."""

    def finished(self, setting: str, method: str | None = None) -> list[Cell]:
        """The cells of a setting that have a result, of one method or all, by seed."""
        wanted = self.methods if method is None else (method,)
        return [
            cell
            for cell in self.cells
            if cell.setting == setting and cell.method in wanted and cell.finished
        ]

    def metrics(self) -> list[str]:
        """The metrics that were measured, the one asked for first."""
        found = metrics_of({str(i): cell.events for i, cell in enumerate(self.cells)})
        return sorted(found, key=lambda name: name != self.metric)

    def ranks(self, setting: str, metric: str) -> list[int]:
        """All ranks that the metric was measured at."""
        return sorted({rank for cell in self.finished(setting) for rank in cell.curve(metric)})

    def places(self, setting: str, metric: str) -> list[Place]:
        """Where the metric can be read: at the ranks, as the area, and at clients if any did."""
        own = any(cell.own(metric) is not None for cell in self.finished(setting))
        return [*self.ranks(setting, metric), AURAC, *([AT_CLIENTS] if own else [])]

    def values(self, setting: str, method: str, metric: str, at: Place) -> dict[int, float]:
        """Seed to the metric of the cells that have it.

        The area is over the ranks that all the setting's cells were measured at.
        """
        cells = self.finished(setting, method)
        if at == AT_CLIENTS:
            own = {cell.seed: cell.own(metric) for cell in cells}
            return {seed: value for seed, value in own.items() if value is not None}
        curves = {cell.seed: cell.curve(metric) for cell in cells}
        if at != AURAC:
            return {seed: curve[at] for seed, curve in curves.items() if at in curve}
        shared = self.shared_ranks(setting, metric)
        return {
            seed: aurac({rank: curve[rank] for rank in shared})
            for seed, curve in curves.items()
            if shared and set(shared) <= set(curve)
        }

    def shared_ranks(self, setting: str, metric: str) -> list[int]:
        """The ranks that the area is over."""
        return shared_ranks([cell.curve(metric) for cell in self.finished(setting)])

    def base(self, setting: str, metric: str) -> dict[int, float]:
        """Seed to the untuned base's metric; the seed draws the test rows."""
        rows = {cell.seed: base_row(cell.events) for cell in self.finished(setting)}
        return {seed: row[metric] for seed, row in rows.items() if metric in row}

    def pairs(self, setting: str, method: str, metric: str, at: Place) -> dict[int, float]:
        """Seed to the method's metric less the reference's, of the seeds that both have."""
        own = self.values(setting, method, metric, at)
        other = self.values(setting, self.reference, metric, at)
        return {seed: own[seed] - other[seed] for seed in own if seed in other}

    def pairs_of_all(self, method: str, metric: str, at: Place) -> dict[int, float]:
        """Seed to the difference's mean over the settings, of the seeds that all settings have."""
        found = [self.pairs(setting, method, metric, at) for setting in self.settings]
        seeds = [seed for seed in self.seeds if all(seed in pairs for pairs in found)]
        return {seed: statistics.fmean(pairs[seed] for pairs in found) for seed in seeds}

    def history(
        self, setting: str, method: str, metric: str, rank: int | None = None
    ) -> dict[int, list[float]]:
        """Round to the metric of each seed at a rank, or at each cell's highest."""
        rounds: dict[int, list[float]] = {}
        for cell in self.finished(setting, method):
            curves = cell.by_round(metric)
            for at, value in curves.get(
                max(curves, default=0) if rank is None else rank, {}
            ).items():
                rounds.setdefault(at, []).append(value)
        return dict(sorted(rounds.items()))

    def losses(self, setting: str, method: str) -> dict[int, list[float]]:
        """Round to the mean training loss of each seed."""
        rounds: dict[int, list[float]] = {}
        for cell in self.finished(setting, method):
            for at, loss in train_losses(cell.events).items():
                rounds.setdefault(at, []).append(loss)
        return dict(sorted(rounds.items()))

    def costs(self, setting: str, method: str) -> Costs | None:
        """What a run of a method took, as means over its finished cells."""
        cells = self.finished(setting, method)
        if not cells:
            return None
        spent = [totals(cell.events) for cell in cells]
        return Costs(
            bytes_up=statistics.fmean(one.bytes_up for one in spent),
            bytes_down=statistics.fmean(one.bytes_down for one in spent),
            passes=statistics.fmean(cell.passes for cell in cells),
            train_seconds=statistics.fmean(cell.train_seconds for cell in cells),
            seconds=statistics.fmean(one.seconds for one in spent),
        )

    def unlike(self, setting: str) -> list[str]:
        """The methods that did not train on what the reference trained on, with the same seed.

        Same means: in each round the same clients, with as many examples and steps.
        """
        reference = {
            cell.seed: cell.trained_on() for cell in self.finished(setting, self.reference)
        }
        return [
            method
            for method in self.methods
            if any(
                cell.seed in reference and cell.trained_on() != reference[cell.seed]
                for cell in self.finished(setting, method)
            )
        ]


@dataclass(frozen=True, slots=True)
class Costs:
    """Means over the runs of a method."""

    bytes_up: float
    bytes_down: float
    passes: float
    train_seconds: float
    seconds: float
