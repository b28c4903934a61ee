"""The results of a run or a study as data frames, from which tables, charts and files are made."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prelort.events import ClientMetrics
from prelort.history import RunHistory
from prelort.metrics.scores import aurac
from prelort.report.formatting import plain

if TYPE_CHECKING:
    import pandas as pd

AURAC = "AURAC"
"""The place of a score that is the area under the rank curve."""

AT_CLIENTS = "at clients"
"""The place of a score that is the mean over clients, each at its rank on its own examples."""

CELL = ("setting", "method", "seed")

CONFIDENCE = 0.95
RESAMPLES = 10_000
BOOTSTRAP_SEED = 0
"""The same numbers give the same interval."""


def mean_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n - 1) of one metric over seeds.

    The mean of no values is NaN, as is the deviation of fewer than two, or of values that diverged.
    """
    mean = sum(values) / len(values) if values else math.nan
    if not math.isfinite(mean):
        return mean, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def interval(pairs: Sequence[float]) -> tuple[float, float, float]:
    """The mean of paired differences and the ends of its percentile bootstrap interval.

    Pairs are drawn with replacement (Efron 1979). n pairs have C(2n - 1, n) distinct resamples, and
    the interval of up to three pairs is the range of the differences: it is too narrow for few
    pairs. The ends are NaN for fewer than two pairs, and where the mean is not finite.
    """
    mean, _ = mean_deviation(pairs)
    if len(pairs) < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan
    return mean, *_bootstrap(tuple(pairs))


@lru_cache(maxsize=4096)  # the same numbers are in tables, files and charts
def _bootstrap(pairs: tuple[float, ...]) -> tuple[float, float]:
    import numpy as np
    from scipy.stats import bootstrap  # slow to import

    ends = bootstrap(
        (np.asarray(pairs, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return float(ends.low), float(ends.high)


@dataclass(frozen=True, slots=True, repr=False)
class CellResult:
    """One run: its history so far, and the reason if it failed.

    ``config``: the run's configuration as read from TOML; keys may be missing.
    """

    setting: str
    method: str
    seed: int
    history: RunHistory
    folder: Path | None = None
    reason: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<CellResult {self.name}: {self.status}>"

    @property
    def name(self) -> str:
        """Setting, method and seed."""
        return plain(", ".join([*filter(None, [self.setting, self.method]), f"seed {self.seed}"]))

    @property
    def status(self) -> Literal["finished", "failed", "unfinished", "not started"]:
        """The state of the run."""
        if self.history.finished:
            return "finished"
        if self.reason:
            return "failed"
        started = self.history.started or self.history.evaluations
        return "unfinished" if started else "not started"

    @property
    def explanation(self) -> str:
        """Why there is no result: the reason or the progress; empty if the run is finished."""
        started = self.history.started
        if self.reason or started is None or self.history.finished:
            return plain(self.reason)
        return f"after round {self.history.done} of {started.rounds}"

    @property
    def shortfall(self) -> str:
        """Why the final evaluation is not one of the last round; empty if it is."""
        final, started = self.history.final, self.history.started
        if final is None and self.history.client_evaluations:
            return "no global model: see the clients' own metrics"
        if final is None:
            return "not measured yet"
        if started is not None and final.round < started.rounds:
            return f"measured after round {final.round} of {started.rounds}"
        return ""

    def curve(self, metric: str) -> dict[int, float]:
        """Rank -> the metric in the last evaluation, in the order of the ranks."""
        final = self.history.final
        prefixes = sorted(final.prefixes.items()) if final is not None else []
        return {rank: metrics[metric] for rank, metrics in prefixes if metric in metrics}

    def client_metrics(self) -> dict[str, ClientMetrics]:
        """Client -> its last metrics on its own test examples."""
        evaluations = self.history.client_evaluations
        return evaluations[max(evaluations)].clients if evaluations else {}


@dataclass(frozen=True, repr=False)
class Results:
    """The cells of a study, or the one run, and the facts that they share.

    Its frames are computed once: treat them as read-only. ``reference``: the method that the
    others are compared to. ``metric``: the one shown first. ``configuration``: the TOML of the
    run or study. ``folder``: where it is; the cells' folders are in it.
    """

    cells: Sequence[CellResult]
    reference: str
    title: str = ""
    metric: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    configuration: str = ""
    folder: Path = Path()

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the cells."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def settings(self) -> list[str]:
        """The settings, in the order of the cells; one empty name if there are none."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of the cells."""
        return list(dict.fromkeys(cell.seed for cell in self.cells))

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that were measured, `metric` first; ``loss`` only if there is no other."""
        names: dict[str, None] = {}
        for cell in self.cells:
            names |= dict.fromkeys(cell.history.metrics())
            for client in cell.client_metrics().values():
                names |= dict.fromkeys(client.metrics)
        chosen = [name for name in names if name != "loss"] or list(names)
        return sorted(chosen, key=lambda name: name != self.metric)

    def counted(self, setting: str, method: str | None = None) -> list[CellResult]:
        """The cells of a setting (and method) whose scores count.

        With several seeds only finished ones do, as a mean over runs of unequal length means
        nothing; with one seed every cell counts with what it has measured so far.
        """
        single = len(self.seeds) == 1
        return [
            cell
            for cell in self.cells
            if cell.setting == setting
            and method in (None, cell.method)
            and (cell.history.finished or (single and cell.status != "not started"))
        ]

    def __repr__(self) -> str:
        finished = sum(cell.history.finished for cell in self.cells)
        methods = ", ".join(self.methods)
        return f"<Results {self.title!r}: {methods}; {finished} of {len(self.cells)} runs finished>"

    def select(self, frame: pd.DataFrame, setting: str, metric: str | None = None) -> pd.DataFrame:
        """The rows of a setting (and metric) of the cells whose scores count."""
        counted = {(setting, cell.method, cell.seed) for cell in self.counted(setting)}
        keys = zip(*(frame[column] for column in CELL), strict=True)
        frame = frame.loc[[key in counted for key in keys]]
        return frame if metric is None else frame[frame["metric"] == metric]

    def to_pandas(self) -> pd.DataFrame:
        """Every measured value: setting, method, seed, round, rank (0: base), metric, value."""
        columns = ("round", "rank", "metric", "value")
        return self._stack(columns, lambda cell: cell.history.to_pandas().itertuples(index=False))

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row for each finished round: replies, failures, loss, bytes, seconds by phase."""
        columns = RunHistory().rounds_to_pandas().columns
        return self._stack(
            columns, lambda cell: cell.history.rounds_to_pandas().itertuples(index=False)
        )

    @cached_property
    def replies(self) -> pd.DataFrame:
        """A row for each client sampled in a round; loss etc. are NaN without a reply."""
        columns = ("round", "client", "rank", "failed", "loss", "examples", "steps", "seconds",
                   "bytes_up")  # fmt: skip

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            for number, record in sorted(cell.history.rounds.items()):
                for name in dict.fromkeys([*record.clients, *record.replies, *record.failures]):
                    if (reply := record.replies.get(name)) is not None:
                        yield (number, name, reply.rank, False, reply.loss, reply.examples,
                               reply.steps, reply.seconds, reply.bytes_up)  # fmt: skip
                    else:
                        failure = record.failures.get(name)
                        rank = failure.rank if failure is not None else None
                        yield (number, name, rank, failure is not None, *[None] * 5)

        return self._stack(columns, rows)

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row for each client of each cell, lowest rank first.

        ``ranks``: as text, with every change; None where they are hidden. ``sampled``, ``replies``,
        ``failures``: rounds. ``loss``: of the last reply, nats. ``bytes_up``: in total.
        ``seconds``: mean of a round.
        """
        columns = ("client", "ranks", "examples", "sampled", "replies", "failures", "loss",
                   "bytes_up", "seconds")  # fmt: skip
        rounds = dict(iter(self.replies.groupby([*CELL, "client"])))

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            records = cell.history.clients.values()
            for record in sorted(records, key=lambda one: (one.rank or math.inf, one.name)):
                key = (cell.setting, cell.method, cell.seed, record.name)
                sampled = rounds.get(key, self.replies[:0])
                replies = sampled[sampled["steps"].notna()]
                ranks = [*sampled["rank"].dropna().astype(int), *filter(None, [record.rank])]
                changes = " → ".join(str(rank) for rank, _ in itertools.groupby(ranks)) or None
                last = record.last
                examples, loss = (last.examples, last.loss) if last else (None, None)
                counts = (examples, len(sampled), len(replies), int(sampled["failed"].sum()))
                totals = (replies["bytes_up"].sum(), replies["seconds"].mean())
                yield record.name, changes, *counts, loss, *totals

        return self._stack(columns, rows)

    @cached_property
    def client_metrics(self) -> pd.DataFrame:
        """Clients' own metrics: round, client, rank, examples, metric, value after the cell."""

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            for number, event in sorted(cell.history.client_evaluations.items()):
                for name, one in event.clients.items():
                    for metric, value in one.metrics.items():
                        yield number, name, one.rank, one.examples, metric, value

        columns = ("round", "client", "rank", "examples", "metric", "value")
        return self._stack(columns, rows)

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        """Diagnostics (docs/diagnostics.md): setting, method, seed, round, quantity, at, value.

        ``at`` is a rank, the number of a rank dimension, ``mean`` or ``max``, or empty.
        """

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            for number, record in sorted(cell.history.rounds.items()):
                numbers = (record.stats.diagnostics if record.stats else None) or {}
                for quantity, values in numbers.items() if "failed" not in numbers else ():
                    if isinstance(values, list):
                        values = dict(enumerate(values, start=1))
                    for at, value in (values if isinstance(values, dict) else {"": values}).items():
                        if value is not None:  # 0 / 0
                            yield number, quantity, str(at), float(value)

        return self._stack(("round", "quantity", "at", "value"), rows)

    @cached_property
    def overview(self) -> pd.DataFrame:
        """A row for each cell: its status and what it cost."""
        columns = ("status", "reason", "folder", "rounds", "bytes_up", "bytes_down", "passes",
                   "train_seconds", "seconds")  # fmt: skip

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            run = cell.history
            cost = (run.done, run.bytes_up, run.bytes_down, run.passes, run.client_seconds)
            folder = str(cell.folder or "")
            yield (cell.status, cell.reason, folder, *cost, sum(run.seconds.values()))

        return self._stack(columns, rows)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The final values of the cells that count: setting, method, seed, metric, at, value.

        ``at``: a rank, `AURAC` over the ranks that all cells of the setting have, or `AT_CLIENTS`.
        """
        shared = {
            (setting, metric): _common_ranks([cell.curve(metric) for cell in self.counted(setting)])
            for setting in self.settings
            for metric in self.metrics
        }

        def rows(cell: CellResult) -> Iterator[tuple[Any, ...]]:
            for metric in self.metrics if cell in self.counted(cell.setting, cell.method) else ():
                curve, ranks = cell.curve(metric), shared[cell.setting, metric]
                yield from ((metric, str(rank), value) for rank, value in curve.items())
                if ranks and set(ranks) <= curve.keys():
                    yield metric, AURAC, aurac({rank: curve[rank] for rank in ranks})
                at_clients = [client.metrics[metric] for client in cell.client_metrics().values()
                              if metric in client.metrics]  # fmt: skip
                if at_clients:
                    yield metric, AT_CLIENTS, mean_deviation(at_clients)[0]

        return self._stack(("metric", "at", "value"), rows)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Scores less the reference's of the same setting and seed: columns of `scores`."""
        same = self.scores["method"] == self.reference
        paired = ["setting", "seed", "metric", "at"]
        frame = self.scores[~same].merge(self.scores[same], on=paired, suffixes=("", "_reference"))
        frame["value"] = frame["value"] - frame["value_reference"]
        return frame[[*CELL, "metric", "at", "value"]]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """A row for each setting, metric, method and place, in that order.

        ``seeds``, ``mean`` and ``deviation`` (sample standard deviation) of the scores; ``pairs``,
        ``difference``, ``low`` and ``high`` (95 % bootstrap interval) of the paired differences.
        """
        import pandas as pd

        by = ["setting", "method", "metric", "at"]
        scores = self.scores.groupby(by)["value"].agg(list).to_dict()
        pairs = self.differences.groupby(by)["value"].agg(list).to_dict()
        rows = []
        for setting, metric, method in itertools.product(self.settings, self.metrics, self.methods):
            for at in self.places(setting, metric):
                key = (setting, method, metric, at)
                values, paired = scores.get(key, []), pairs.get(key, [])
                mean = (len(values), *mean_deviation(values))
                rows.append((*key, *mean, self.reference, len(paired), *interval(paired)))
        columns = [*by, "seeds", "mean", "deviation", "reference", "pairs", "difference"]
        return pd.DataFrame(rows, columns=[*columns, "low", "high"])

    def ranks(self, setting: str, metric: str) -> list[int]:
        """All ranks at which the metric was measured."""
        return sorted({rank for cell in self.counted(setting) for rank in cell.curve(metric)})

    def shared_ranks(self, setting: str, metric: str) -> list[int]:
        """The ranks of the area under the rank curve: those of all cells that have several."""
        return _common_ranks([cell.curve(metric) for cell in self.counted(setting)])

    def places(self, setting: str, metric: str) -> list[str]:
        """Where the metric has scores: ranks, `AURAC`, `AT_CLIENTS`."""
        places = set(self.select(self.scores, setting, metric)["at"])
        ranks = map(str, self.ranks(setting, metric))
        return [*ranks, *(place for place in (AURAC, AT_CLIENTS) if place in places)]

    def base(self, setting: str, metric: str) -> dict[int, float]:
        """Seed -> the untuned base model's metric (the seed chooses the test examples)."""
        values: dict[int, float] = {}
        for cell in self.counted(setting):
            if metric in cell.history.base:
                values.setdefault(cell.seed, cell.history.base[metric])
        return values

    def mismatched(self, setting: str) -> list[str]:
        """Methods whose clients did not train on what the reference's trained on.

        In each round the same clients should train on equally many examples and steps.
        """
        work = self.select(self.replies, setting)
        work = work[work["steps"].notna()]
        columns = ["round", "client", "examples", "steps"]
        trained = {
            key: set(rows[columns].itertuples(index=False, name=None))
            for key, rows in work.groupby(["method", "seed"], sort=False)
        }
        differing = (
            method
            for (method, seed), rows in trained.items()
            if trained.get((self.reference, seed), rows) != rows
        )
        return list(dict.fromkeys(differing))

    def _stack(
        self, columns: Iterable[str], rows: Callable[[CellResult], Iterable[Sequence[Any]]]
    ) -> pd.DataFrame:
        """One frame of the rows of all cells, each after its setting, method and seed."""
        import pandas as pd

        every = [
            (cell.setting, cell.method, cell.seed, *row)
            for cell in self.cells
            for row in rows(cell)
        ]
        return pd.DataFrame(every, columns=[*CELL, *columns])


def last_round(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last round of each method and seed."""
    return frame[frame["round"] == frame.groupby(["method", "seed"])["round"].transform("max")]


def _common_ranks(curves: Sequence[Mapping[int, float]]) -> list[int]:
    """The ranks that all curves have; curves of one rank are ignored if others are longer."""
    wide = [set(curve) for curve in curves if len(curve) > 1] or [set(c) for c in curves if c]
    return sorted(set.intersection(*wide)) if wide else []
