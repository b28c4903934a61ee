"""The tables of a run or a study, from its data frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group

from prelort.report.formatting import (
    MetricFormat,
    capital,
    human_bytes,
    human_seconds,
    listing,
    metric_format,
    plain,
    plural,
)
from prelort.report.results import (
    AURAC,
    CONFIDENCE,
    Results,
    interval,
    last_round,
    mean_deviation,
)
from prelort.report.table import Column, Fitted, ResultTable, escaped, to_markdown, to_rich

if TYPE_CHECKING:
    import pandas as pd

BASE = "untuned base"

COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bytes ↓\nup", "bytes_up", human_bytes),
    ("bytes ↓\ndown", "bytes_down", human_bytes),
    ("time ↓", "seconds", human_seconds),
    ("training ↓", "train_seconds", human_seconds),
    ("passes ↓", "passes", "{:,.0f}".format),
)
"""Heading, column of `Results.overview`, format."""

DIAGNOSTICS = (
    ("noise of\naveraging", "aggregation_noise", ""),
    ("noise of\nstart", "initialization_noise", "mean"),
    ("client\ndrift", "client_drift", "mean"),
    ("client\nspread", "client_dispersion", ""),
    ("cut to\nlowest", "truncation_noise", "lowest"),
    ("best\ncut", "least_truncation_noise", "lowest"),
    ("eff.\nrank", "effective_rank", ""),
    ("tail\nkept", "tail_kept", "highest"),
)
"""Heading, quantity, and where it is read (lowest or highest rank)."""

FEW_PAIRS = 5
"""An interval of fewer pairs comes with a warning."""


def terminal(results: Results) -> Group:
    """The tables for the terminal, and the cells without a result.

    With one seed all metrics, with several the first one.
    """
    metrics = results.metrics if len(results.seeds) == 1 else results.metrics[:1]
    tables = [t for setting in results.settings for t in of_setting(results, setting, metrics)]
    tables += [*of_all_settings(results, metrics), *unfinished(results)]
    prose = [any(column.prose for column in table.columns) for table in tables]
    return Group(*(to_rich(t) if p else Fitted(t) for t, p in zip(tables, prose, strict=True)))


def markdown(results: Results) -> str:
    """All tables, with a heading for each setting."""
    lines = [f"# {escaped(plain(results.title))}", ""]
    lines += [f"{key}: {escaped(plain(value))}  " for key, value in results.facts.items()]
    sections = [
        (setting or "Results", [*of_setting(results, setting), *diagnostics(results, setting)])
        for setting in results.settings
    ]
    sections += [("All settings", of_all_settings(results))]
    sections += [("Without a result", unfinished(results))]
    for name, tables in sections:
        if tables:
            lines += ["", f"## {escaped(plain(name))}", "", "\n".join(map(to_markdown, tables))]
    return "\n".join(lines).rstrip() + "\n"


def of_setting(
    results: Results, setting: str, metrics: Sequence[str] | None = None
) -> list[ResultTable]:
    """The tables of one setting; none before its first cell counts."""
    if not results.counted(setting):
        return []
    single, costs = len(results.seeds) == 1, _costs(results, setting)
    known = [column for column in costs[:3] if {*column.texts} != {"–"}]
    tables = []
    for metric in (results.metrics if metrics is None else metrics) or ["loss"]:
        form = metric_format(metric)
        tables.append(_scores(results, setting, form, known if single else []))
        if not single and len(results.methods) > 1:
            tables.append(_differences(results, setting, form))
        tables += _client_scores(results, setting, form)
    if not single:
        title = f"{plain(setting)}: cost of a run" if setting else "Cost of a run"
        note = (
            "Passes: forward passes of a batch in training, each with its backward pass. Training: "
            "seconds of all clients, one after the other. Times depend on the load of the machine."
        )
        names = list(map(plain, results.methods))
        tables.append(ResultTable(f"{title}, mean over seeds", names, costs, [note]))
    return tables


def of_all_settings(results: Results, metrics: Sequence[str] | None = None) -> list[ResultTable]:
    """The differences of the area over all settings; none if there is only one."""
    if len(results.settings) < 2 or not len(results.scores):
        return []
    names = results.metrics if metrics is None else metrics
    return [_over_settings(results, metric_format(name)) for name in names]


def unfinished(results: Results) -> list[ResultTable]:
    """The cells without a result, and why; none if all are finished."""
    cells = [cell for cell in results.cells if not cell.history.finished]
    if not cells:
        return []
    columns = [
        Column("status", [cell.status for cell in cells]),
        Column("why", [cell.explanation or "–" for cell in cells], prose=True),
    ]
    title = f"Without a result: {len(cells)} of {plural(len(results.cells), 'run')}"
    return [ResultTable(title, [cell.name for cell in cells], columns)]


def diagnostics(results: Results, setting: str) -> list[ResultTable]:
    """What each method's last round did to the products; none if nothing was diagnosed."""
    last = last_round(results.select(results.diagnostics, setting))
    if not len(last):
        return []
    values = last.groupby(["method", "quantity", "at"])["value"].mean().to_dict()
    methods = [method for method in results.methods if method in set(last["method"])]

    def text(method: str, quantity: str, at: str) -> str:
        if at in ("lowest", "highest"):
            levels = [int(key[2]) for key in values if key[:2] == (method, quantity)]
            at = str((min if at == "lowest" else max)(levels, default=""))
        number = values.get((method, quantity, at))
        return "–" if number is None else f"{number:.2g}"

    columns = [
        Column(heading, [text(method, quantity, at) for method in methods])
        for heading, quantity, at in DIAGNOSTICS
    ]
    layers = {
        f"{values[m, 'layers', 'measured']:.0f} of {values[m, 'layers', 'of']:.0f}" for m in methods
    }
    notes = [
        "Norms relative to the global product (noise of averaging, spread: to the clients' mean). "
        "Cut: noise at the lowest rank, and the least possible. Tail: the highest segment.",
        f"After round {listing(sorted(set(last['round'])))}, over {' or '.join(sorted(layers))} "
        "layers.",
    ]
    return [ResultTable("Diagnostics of the last round", list(map(plain, methods)), columns, notes)]


def summary(results: Results, setting: str) -> str:
    """One sentence: which method has the best area; empty for one method or without a result."""
    if len(results.methods) < 2 or not results.metrics:
        return ""
    form = metric_format(results.metrics[0])
    rows = results.summary
    rows = rows[(rows["setting"] == setting) & (rows["metric"] == form.metric)]
    rows = rows[(rows["at"] == AURAC) & rows["mean"].map(math.isfinite)].set_index("method")
    if len(rows) < 2:
        return ""
    best = rows["mean"].idxmax() if form.higher_is_better else rows["mean"].idxmin()
    text = f"{plain(best)} has the best mean {form.title} over the ranks"
    text += f" ({AURAC} {form.show(rows['mean'][best])}"
    reference = results.reference
    if best != reference and reference in rows.index:
        text += f", {plain(reference)} {form.show(rows['mean'][reference])}"
        low, high = rows["low"][best], rows["high"][best]
        if low <= 0 <= high:
            return text + f"), but the {CONFIDENCE:.0%} interval of the difference includes 0."
    return text + ")."


def holders(results: Results, setting: str) -> list[ResultTable]:
    """How many clients and examples there are of each rank, in the reference's first run."""
    frame = results.select(results.clients, setting).dropna(subset=["examples", "ranks"])
    frame = frame[frame["method"] == results.reference]
    if not len(frame):
        return []
    frame = frame[frame["seed"] == frame["seed"].iloc[0]]
    frame = frame.assign(rank=frame["ranks"].str.split().str[-1].astype(int))
    groups = frame.groupby("rank")["examples"].agg(["size", "sum"])
    columns = [
        Column("clients", [str(size) for size in groups["size"]]),
        Column("examples", [f"{examples:,.0f}" for examples in groups["sum"]]),
        Column("share", [f"{share:.0%}" for share in groups["sum"] / groups["sum"].sum()]),
    ]
    names = [f"rank {rank}" for rank in groups.index]
    notes = [f"The clients that trained with {plain(results.reference)}."]
    if len(results.seeds) > 1:
        notes = [f"{notes[0][:-1]} and seed {frame['seed'].iloc[0]}."]
    return [ResultTable("Who holds what", names, columns, notes)]


def clients(results: Results) -> list[ResultTable]:
    """The clients of the one run in ``results``, lowest rank first; none before the first joins."""
    frame = results.clients
    if not len(frame):
        return []
    (cell,) = results.cells
    own = cell.client_metrics()

    def column(heading: str, key: str, show: Callable[[Any], str] = str) -> Column:
        values = [None if value is None or value != value else value for value in frame[key]]
        return Column(heading, ["–" if value is None else show(value) for value in values])

    columns = [
        column("rank", "ranks"),
        column("examples", "examples", "{:.0f}".format),
        *(column(key, key) for key in ("sampled", "replies", "failures")),
        column("last loss", "loss", metric_format("loss").show),
    ]
    for form in map(metric_format, results.metrics if own else ()):
        values = [own[name].metrics.get(form.metric) if name in own else None
                  for name in frame["client"]]  # fmt: skip
        columns.append(Column(f"own {form.short}\n{form.arrow}", list(map(form.show, values))))
    columns += [
        column("bytes up", "bytes_up", human_bytes),
        column("time", "seconds", human_seconds),
    ]
    title = "Lowest rank first. Sampled, replies, failures: rounds. Time: mean of a round."
    idle = cell.history.started.clients if cell.history.started else 0
    idle -= int((frame["sampled"] > 0).sum())
    notes = [f"{plural(idle, 'more client')} not sampled so far."] if idle > 0 else []
    return [ResultTable(title, list(map(plain, frame["client"])), columns, notes)]


def phases(results: Results) -> list[ResultTable]:
    """Wall seconds by phase of the one run in ``results``; none before its first round ends."""
    (cell,) = results.cells
    seconds = {name: value for name, value in cell.history.seconds.items() if value > 0}
    if not seconds:
        return []
    order, whole = sorted(seconds, key=lambda name: -seconds[name]), sum(seconds.values())
    columns = [
        Column("wall time", [human_seconds(seconds[name]) for name in order]),
        Column("share", [f"{seconds[name] / whole:.0%}" for name in order]),
    ]
    return [ResultTable("Time by phase; train includes all messages", order, columns)]


def _scores(
    results: Results, setting: str, form: MetricFormat, costs: Sequence[Column]
) -> ResultTable:
    """The metric at each rank and its area; with one seed the costs beside it."""
    values = _values(results, results.scores, setting, form.metric)
    base = list(results.base(setting, form.metric).values())
    columns = [
        _score_column(
            form, at, [base, *(values.get((method, at), []) for method in results.methods)]
        )
        for at in [*map(str, results.ranks(setting, form.metric)), AURAC]
    ]
    remarks = _remarks(results, setting)
    names = [BASE, *(plain(m) + (" *" if m in remarks else "") for m in results.methods)]
    notes = [f"* {plain(method)}: {remark}." for method, remark in remarks.items()]
    notes += _general_notes(results, setting, form)
    seeds = len(results.seeds)
    title = f"{_heading(setting, form)} by rank prefix of the global adapter, "
    if seeds > 1:
        title += f"mean ± standard deviation over {seeds} seeds, "
        if any(column.best for column in columns):
            notes.insert(0, "Bold: the best mean, whatever the spread.")
    # The base has no costs.
    columns += [Column(c.heading, ["–", *c.texts], frozenset(i + 1 for i in c.best)) for c in costs]
    return ResultTable(title + form.direction, names, columns, notes)


def _differences(results: Results, setting: str, form: MetricFormat) -> ResultTable:
    """The paired differences to the reference at each place."""
    pairs = _values(results, results.differences, setting, form.metric)
    others = [method for method in results.methods if method != results.reference]
    places = results.places(setting, form.metric)
    rows = {at: [pairs.get((method, at), []) for method in others] for at in places}
    columns = [_difference_column(form, _place(at), pairs_at) for at, pairs_at in rows.items()]
    counts = [len(values) for pairs_at in rows.values() for values in pairs_at]
    title = f"{_heading(setting, form)}: difference to {plain(results.reference)}, paired by seed"
    notes = _explanation(results, form, counts)
    return ResultTable(title, list(map(plain, others)), columns, notes)


def _over_settings(results: Results, form: MetricFormat) -> ResultTable:
    """Each setting's difference of the area, and the mean over settings, paired by seed."""
    frame = results.differences
    frame = frame[(frame["metric"] == form.metric) & (frame["at"] == AURAC)]
    others = [method for method in results.methods if method != results.reference]
    rows: dict[str, list[list[float]]] = {name: [] for name in results.settings}
    means = []
    for method in others:
        table = frame[frame["method"] == method].pivot(
            index="seed", columns="setting", values="value"
        )
        table = table.reindex(columns=results.settings)
        for setting in results.settings:
            rows[setting].append(list(table[setting].dropna()))
        means.append(list(table.dropna().mean(axis=1)))
    columns = [_difference_column(form, plain(setting), values) for setting, values in rows.items()]
    columns.append(_difference_column(form, "all settings", means))
    title = f"{capital(form.title)}, AURAC: difference to {plain(results.reference)}, by setting"
    notes = _explanation(results, form, map(len, means))
    notes += ["All settings: the mean over settings for each seed, then the interval over seeds."]
    return ResultTable(title, list(map(plain, others)), columns, notes)


def _client_scores(results: Results, setting: str, form: MetricFormat) -> list[ResultTable]:
    """Clients' own metrics: mean, worst, and the mean of the clients of each rank."""
    frame = last_round(results.select(results.client_metrics, setting, form.metric))
    methods = [method for method in results.methods if method in set(frame["method"])]
    if not methods:
        return []

    def column(place: str, rows: pd.DataFrame, summarise: str = "mean") -> Column:
        runs = rows.groupby(["method", "seed"])["value"]
        values = runs.agg(lambda one: one.agg(summarise, skipna=False))  # a diverged one counts
        lists = values.groupby("method").agg(list)
        return _score_column(form, place, [lists.get(method, []) for method in methods])

    columns = [
        column("mean", frame),
        column("worst", frame, "min" if form.higher_is_better else "max"),
        *(column(str(rank), rows) for rank, rows in frame.groupby("rank")),
    ]
    title = f"{_heading(setting, form)} of the clients, each at its rank on its own test examples, "
    notes = ["Means over clients, all with the same weight."]
    return [ResultTable(title + form.direction, list(map(plain, methods)), columns, notes)]


def _costs(results: Results, setting: str) -> list[Column]:
    """Mean costs of the cells that count; unfinished ones, which are cheap, are never the best."""
    groups = results.select(results.overview, setting).groupby("method")
    begun = {method for method, rows in groups if (rows["rounds"] > 0).all()}
    finished = {method for method, rows in groups if (rows["status"] == "finished").all()}
    columns = []
    for heading, key, show in COSTS:
        means = groups[key].mean().to_dict()
        texts = [show(means[m]) if m in begun else "–" for m in results.methods]
        comparable = [means[m] if m in begun & finished else None for m in results.methods]
        columns.append(Column(heading, texts, _best(comparable, texts, False)))
    return columns


def _remarks(results: Results, setting: str) -> dict[str, str]:
    """Method -> which seeds or rounds its row lacks."""
    remarks: dict[str, str] = {}
    seeds = len(results.seeds)
    for method in results.methods:
        cells = results.counted(setting, method)
        parts = [f"{len(cells)} of {plural(seeds, 'seed')}"] if 1 < seeds > len(cells) else []
        parts += list(filter(None, (cell.shortfall for cell in cells)))[:1]
        if parts:
            remarks[method] = ", ".join(parts)
    return remarks


def _general_notes(results: Results, setting: str, form: MetricFormat) -> list[str]:
    notes = []
    shared = results.shared_ranks(setting, form.metric)
    if shared != results.ranks(setting, form.metric):
        over = f"rank{'s' if len(shared) > 1 else ''} {listing(shared)}" if shared else "no rank"
        notes.append(f"AURAC over {over}: not every run was measured at every rank.")
    # Rounding differs between batch sizes and machines; another model or test set differs more.
    bases = results.base(setting, form.metric)
    if any(
        not math.isclose(cell.history.base[form.metric], bases[cell.seed], rel_tol=1e-3)
        for cell in results.counted(setting)
        if form.metric in cell.history.base
    ):
        notes.append(
            "The runs' untuned bases differ: they do not share a model or test data, and the base "
            "shown is the first one's."
        )
    if len(results.seeds) > 1 and (mismatched := results.mismatched(setting)):
        notes.append(
            f"{capital(listing(map(plain, mismatched)))} did not train on the same clients' "
            f"batches as {plain(results.reference)}: clients failed, or an override changed that."
        )
    return notes


def _explanation(results: Results, form: MetricFormat, counts: Iterable[int]) -> list[str]:
    """How to read the differences, and how far to trust them."""
    notes = [
        f"The method less {plain(results.reference)} with the same seed: above 0 the method is "
        f"{'better' if form.higher_is_better else 'worse'}. In brackets the {CONFIDENCE:.0%} "
        "percentile bootstrap interval of the mean."
    ]
    pairs = min((count for count in counts if count), default=0)
    if pairs < 2:
        notes.append("With fewer than two pairs there is no interval: run more seeds.")
    elif pairs < FEW_PAIRS:
        resamples = math.comb(2 * pairs - 1, pairs)
        reach = ": it is the range from the lowest to the highest difference" if pairs < 4 else ""
        notes.append(
            f"{pairs} pairs have {resamples} distinct resamples, so the interval is too narrow"
            f"{reach}. Read it as a range, and run more seeds for a claim."
        )
    return notes


def _values(
    results: Results, frame: pd.DataFrame, setting: str, metric: str
) -> Mapping[tuple[str, str], list[float]]:
    """(Method, place) -> the values of all seeds."""
    frame = results.select(frame, setting, metric)
    return dict(frame.groupby(["method", "at"])["value"].agg(list))


def _score_column(form: MetricFormat, place: str, rows: Sequence[Sequence[float]]) -> Column:
    """A column of a metric's means over each row's values, ``44.4 ± 0.3``; the best are marked."""
    texts = []
    for values in rows:
        mean, deviation = mean_deviation(values)
        spread = f"{deviation * form.factor:.{_digits(mean * form.factor)}f}"
        text = form.show(mean) if math.isnan(deviation) else f"{form.show(mean)} ± {spread}"
        texts.append(text if values else "–")
    means = [mean_deviation(values)[0] if values else None for values in rows]
    best = _best(means, texts, form.higher_is_better)
    return Column(f"{form.short} {form.arrow}\n{_place(place)}", texts, best)


def _difference_column(form: MetricFormat, place: str, rows: Sequence[Sequence[float]]) -> Column:
    """A column of mean differences, ``+1.25 [+0.40, +2.10]``."""
    texts = []
    for pairs in rows:
        values = [value * form.factor for value in interval(pairs)]
        values = [value for value in values if not math.isnan(value)] or values[:1]
        digits = _digits(max(map(abs, values)))
        mean, *ends = (f"{value:+.{digits}f}" for value in values)
        texts.append((mean + (f" [{', '.join(ends)}]" if ends else "")) if pairs else "–")
    return Column(f"difference\n{place}", texts)


def _digits(value: float) -> int:
    """Number of decimals of a value of this size, as in `MetricFormat.show`."""
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2


def _best(values: Sequence[float | None], texts: Sequence[str], highest: bool) -> frozenset[int]:
    """Rows to mark: those that read like the best one, unless all numbers read the same."""
    numbers = {i: v for i, v in enumerate(values) if v is not None}
    finite = {i: v for i, v in numbers.items() if math.isfinite(v)}
    if not finite or len({texts[i] for i in numbers}) < 2:
        return frozenset()
    winner = (max if highest else min)(finite, key=finite.__getitem__)
    return frozenset(i for i in finite if texts[i] == texts[winner])


def _heading(setting: str, form: MetricFormat) -> str:
    return f"{plain(setting)}: {form.title}" if setting else capital(form.title)


def _place(at: str) -> str:
    return f"rank {at}" if at.isdigit() else at
