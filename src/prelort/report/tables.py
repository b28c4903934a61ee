"""The tables of a run or a study, for the terminal, Markdown and the page, from its data frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

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
from prelort.report.result_table import (
    Column,
    ResultTable,
    best_rows,
    difference_text,
    escaped,
    plain_column,
    scored,
    to_markdown,
    to_rich,
)
from prelort.report.results import AURAC, Results
from prelort.report.spread import CONFIDENCE, Difference, Spread, difference, spread, warning

BASE = "untuned base"

COSTS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("bytes ↓", "up", "bytes_up", human_bytes),
    ("bytes ↓", "down", "bytes_down", human_bytes),
    ("time ↓", "", "seconds", human_seconds),
    ("training ↓", "", "train_seconds", human_seconds),
    ("passes ↓", "", "passes", "{:,.0f}".format),
)
"""Two parts of a heading, column of `Results.overview`, format."""

DIAGNOSTICS = (
    ("noise of", "averaging", "aggregation_noise", ""),
    ("noise of", "start", "initialization_noise", "mean"),
    ("client", "drift", "client_drift", "mean"),
    ("client", "spread", "client_dispersion", ""),
    ("cut to", "lowest", "truncation_noise", "lowest"),
    ("best", "cut", "least_truncation_noise", "lowest"),
    ("eff.", "rank", "effective_rank", ""),
    ("tail", "kept", "tail_kept", "highest"),
)
"""Two parts of a heading, quantity, and where it is read (lowest or highest rank)."""


def terminal(results: Results) -> Group:
    """The tables for the terminal, and the cells without a result.

    With one seed all metrics, with several the first one.
    """
    metrics = results.metrics if len(results.seeds) == 1 else results.metrics[:1]
    found = [t for setting in results.settings for t in of_setting(results, setting, metrics)]
    unfinished: dict[str, list[str]] = {}
    for cell in results.cells:
        if not cell.history.finished and (cell.history.started or cell.reason):
            why = ": ".join(filter(None, [cell.status, cell.explanation]))
            unfinished.setdefault(why, []).append(cell.name)
    lines = []
    for why, names in unfinished.items():
        more = f" (and {plural(len(names) - 1, 'other')})" if len(names) > 1 else ""
        lines.append(Text(f"{names[0]}{more} {why}", "yellow"))
    return Group(*map(to_rich, [*found, *of_all_settings(results, metrics)]), *lines)


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
    for name, found in sections:
        if found:
            lines += ["", f"## {escaped(plain(name))}", "", "\n".join(map(to_markdown, found))]
    return "\n".join(lines).rstrip() + "\n"


def of_setting(
    results: Results, setting: str, metrics: Sequence[str] | None = None
) -> list[ResultTable]:
    """The tables of one setting; none before its first cell counts."""
    if not results.counted(setting):
        return []
    single = len(results.seeds) == 1
    found = []
    for metric in (results.metrics or ["loss"]) if metrics is None else (metrics or ["loss"]):
        words = metric_format(metric)
        found.append(
            _scores(results, setting, words, _costs(results, setting)[:3] if single else [])
        )
        if not single and len(results.methods) > 1:
            found.append(_differences(results, setting, words))
        found += _clients(results, setting, words)
    if not single:
        title = f"{plain(setting)}: cost of a run" if setting else "Cost of a run"
        note = (
            "Passes: forward passes of a batch in training, each with its backward pass. Training: "
            "seconds of all clients, one after the other. Times depend on the load of the machine."
        )
        names = list(map(plain, results.methods))
        costs = _costs(results, setting)
        found.append(ResultTable(f"{title}, mean over seeds", names, costs, [note]))
    return found


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
        plain_column("status", "", [cell.status for cell in cells]),
        plain_column("why", "", [cell.explanation or "–" for cell in cells]),
    ]
    title = f"Without a result: {len(cells)} of {plural(len(results.cells), 'run')}"
    return [ResultTable(title, [cell.name for cell in cells], columns, [])]


def diagnostics(results: Results, setting: str) -> list[ResultTable]:
    """What each method's last round did to the products; none if nothing was diagnosed."""
    frame = results.diagnostics[results.diagnostics["setting"] == setting]
    last = frame[frame["round"] == frame.groupby(["method", "seed"])["round"].transform("max")]
    if not len(last):
        return []
    values = last.groupby(["method", "quantity", "at"])["value"].mean().to_dict()
    methods = [method for method in results.methods if method in set(last["method"])]

    def value(method: str, quantity: str, at: str) -> float | None:
        if at in ("lowest", "highest"):
            levels = [int(key[2]) for key in values if key[:2] == (method, quantity)]
            at = str((min if at == "lowest" else max)(levels, default=""))
        number = values.get((method, quantity, at))
        return None if number is None else float(number)

    columns = []
    for over, under, quantity, at in DIAGNOSTICS:
        numbers = [value(method, quantity, at) for method in methods]
        texts = ["–" if number is None else f"{number:.2g}" for number in numbers]
        columns.append(plain_column(over, under, texts))  # no number is better than another
    layers = {
        f"{values[m, 'layers', 'measured']:.0f} of {values[m, 'layers', 'of']:.0f}" for m in methods
    }
    rounds = listing(sorted(set(last["round"])))
    notes = [
        "Norms relative to the global product (noise of averaging, spread: to the clients' mean). "
        "Cut: noise at the lowest rank, and the least possible. Tail: the highest segment.",
        f"After round {rounds}, over {' or '.join(sorted(layers))} layers.",
    ]
    return [ResultTable("Diagnostics of the last round", list(map(plain, methods)), columns, notes)]


def clients(results: Results) -> list[ResultTable]:
    """The clients of the one run in ``results``, lowest rank first; none before the first joins."""
    frame = results.clients
    if not len(frame):
        return []
    (cell,) = results.cells
    own = cell.client_metrics()
    loss = metric_format("loss")

    def column(over: str, key: str, show: Callable[[Any], str] = str, under: str = "") -> Column:
        texts = ["–" if value is None or value != value else show(value) for value in frame[key]]
        return plain_column(over, under, texts)

    columns = [
        column("rank", "ranks"),
        column("examples", "examples", "{:.0f}".format),
        column("asked", "asked"),
        column("replies", "replies"),
        column("failures", "failures"),
        column("last loss", "loss", loss.show),
    ]
    for words in map(metric_format, results.metrics if own else ()):
        values = [own[name].metrics.get(words.metric) if name in own else None
                  for name in frame["client"]]  # fmt: skip
        columns.append(
            plain_column(f"own {words.short}", words.arrow, list(map(words.show, values)))
        )
    columns += [
        column("bytes up", "bytes_up", human_bytes),
        column("time", "seconds", human_seconds),
    ]
    title = "Lowest rank first. Asked, replies, failures: rounds. Time: mean of a round."
    started = cell.history.started
    idle = (started.clients if started else 0) - int((frame["asked"] > 0).sum())
    notes = [f"{plural(idle, 'more client')} not asked so far."] if idle > 0 else []
    return [ResultTable(title, list(map(plain, frame["client"])), columns, notes)]


def phases(results: Results) -> list[ResultTable]:
    """Wall seconds by phase of the one run in ``results``; none before its first round ends."""
    (cell,) = results.cells
    seconds = {name: value for name, value in cell.history.seconds.items() if value > 0}
    whole = sum(seconds.values())
    if not whole:
        return []
    order = sorted(seconds, key=lambda name: -seconds[name])
    columns = [
        plain_column("wall time", "", [human_seconds(seconds[name]) for name in order]),
        plain_column("share", "", [f"{seconds[name] / whole:.0%}" for name in order]),
    ]
    return [ResultTable("Time by phase; train includes all messages", order, columns, [])]


def _scores(
    results: Results, setting: str, words: MetricFormat, costs: Sequence[Column]
) -> ResultTable:
    """The metric at each rank and its area; with one seed the costs beside it."""
    found = _of_metric(results, setting, words)
    base = results.base(setting, words.metric)
    places = [str(rank) for rank in results.ranks(setting, words.metric)]
    columns = []
    for at in [*places, AURAC]:
        means = [spread(list(base.values()))]
        for method in results.methods:
            row = found.get((method, at))
            own = None
            if row is not None and row.seeds:
                own = Spread(row.mean, _none(row.deviation), row.seeds)
            means.append(own)
        columns.append(scored(words, at if at == AURAC else f"rank {at}", means))
    remarks = _remarks(results, setting)
    names = [BASE, *(plain(m) + (" *" if m in remarks else "") for m in results.methods)]
    notes = [f"* {plain(method)}: {remark}." for method, remark in remarks.items()]
    notes += _general_notes(results, setting, words)
    seeds = len(results.seeds)
    title = f"{_heading(setting, words)} by rank prefix of the global adapter, "
    if seeds > 1:
        title += f"mean ± standard deviation over {seeds} seeds, "
        if any(any(column.best) for column in columns):
            notes.insert(0, "Bold: the best mean, whatever the spread.")
    beside = [Column(c.over, c.under, ["–", *c.texts], [False, *c.best]) for c in costs]
    return ResultTable(title + words.direction, names, [*columns, *beside], notes)


def _differences(results: Results, setting: str, words: MetricFormat) -> ResultTable:
    found = _of_metric(results, setting, words)
    others = [method for method in results.methods if method != results.reference]
    columns, counts = [], set()
    for at in results.places(setting, words.metric):
        rows = [found[method, at] for method in others]
        counts |= {row.pairs for row in rows}
        texts = [
            difference_text(
                words,
                Difference(r.difference, _none(r.low), _none(r.high), r.pairs) if r.pairs else None,
            )
            for r in rows
        ]
        columns.append(plain_column("difference", _place(at), texts))
    title = f"{_heading(setting, words)}: difference to {plain(results.reference)}, paired by seed"
    return ResultTable(
        title, list(map(plain, others)), columns, _explanation(results, words, counts)
    )


def _over_settings(results: Results, words: MetricFormat) -> ResultTable:
    """Each setting's difference of the area, and the mean over settings, paired by seed."""
    frame = results.differences
    frame = frame[(frame["metric"] == words.metric) & (frame["at"] == AURAC)]
    pairs = frame.set_index(["method", "setting", "seed"])["value"].to_dict()
    others = [method for method in results.methods if method != results.reference]

    def of(method: str, setting: str) -> list[float]:
        return [value for key, value in pairs.items() if key[:2] == (method, setting)]

    columns = [
        plain_column(
            "difference",
            plain(setting),
            [difference_text(words, difference(of(method, setting))) for method in others],
        )
        for setting in results.settings
    ]
    means: list[list[float]] = []
    for method in others:
        keys = {s: [(method, setting, s) for setting in results.settings] for s in results.seeds}
        complete = [[pairs[key] for key in k] for k in keys.values() if all(i in pairs for i in k)]
        means.append([sum(values) / len(values) for values in complete])
    texts = [difference_text(words, difference(values)) for values in means]
    columns.append(plain_column("difference", "all settings", texts))
    title = f"{capital(words.title)}, AURAC: difference to {plain(results.reference)}, by setting"
    notes = _explanation(results, words, {len(values) for values in means})
    notes.append(
        "All settings: the mean over settings for each seed, then the interval over seeds."
    )
    return ResultTable(title, list(map(plain, others)), columns, notes)


def _clients(results: Results, setting: str, words: MetricFormat) -> list[ResultTable]:
    """Clients' own metrics: mean, worst, and the mean of the clients of each rank."""
    frame = results.client_metrics
    frame = frame[(frame["setting"] == setting) & (frame["metric"] == words.metric)]
    counted = {(cell.method, cell.seed) for cell in results.counted(setting)}
    runs = {
        key: run[run["round"] == run["round"].max()]
        for key, run in frame.groupby(["method", "seed"], sort=False)
        if key in counted
    }
    methods = [method for method in results.methods if any(key[0] == method for key in runs)]
    if not methods:
        return []

    def column(under: str, of_run: Callable[[Any], Any]) -> Column:
        values = {key: list(of_run(run)) for key, run in runs.items()}
        means = [
            spread([v for key, some in values.items() if key[0] == m for v in some])
            for m in methods
        ]
        return scored(words, under, means)

    def at_rank(rank: int) -> Callable[[Any], list[float]]:
        return lambda run: _mean(run[run["rank"] == rank]["value"])

    worst = min if words.higher_is_better else max
    columns = [column("mean", lambda run: _mean(run["value"]))]
    columns.append(column("worst", lambda run: [worst(run["value"])]))
    columns += [column(f"rank {rank}", at_rank(rank)) for rank in sorted(set(frame["rank"]))]
    title = (
        f"{_heading(setting, words)} of the clients, each at its rank on its own test examples, "
    )
    notes = ["Means over clients, all with the same weight."]
    return [ResultTable(title + words.direction, list(map(plain, methods)), columns, notes)]


def _mean(values: Any) -> list[float]:
    return [float(sum(values) / len(values))] if len(values) else []


def _costs(results: Results, setting: str) -> list[Column]:
    """Means over the cells that count; unfinished ones are never the best: they are cheap."""
    counted = {(cell.method, cell.seed) for cell in results.counted(setting)}
    frame = results.overview[results.overview["setting"] == setting]
    keys = zip(frame["method"], frame["seed"], strict=True)
    frame = frame.loc[[key in counted for key in keys]]
    groups = dict(iter(frame.groupby("method")))
    columns = []
    for over, under, key, show in COSTS:
        values: list[float | None] = []
        texts = []
        for method in results.methods:
            rows = groups.get(method)
            mean = (
                float(rows[key].mean()) if rows is not None and (rows["rounds"] > 0).all() else None
            )
            texts.append("–" if mean is None else show(mean))
            finished = rows is not None and (rows["status"] == "finished").all()
            values.append(mean if finished else None)
        columns.append(Column(over, under, texts, best_rows(values, texts, False)))
    return columns


def _remarks(results: Results, setting: str) -> dict[str, str]:
    """Method -> what its row leaves out."""
    remarks: dict[str, str] = {}
    seeds = len(results.seeds)
    for method in results.methods:
        cells = results.counted(setting, method)
        shortfalls = list(filter(None, (cell.shortfall for cell in cells)))
        parts = [f"{len(cells)} of {plural(seeds, 'seed')}"] if 1 < seeds > len(cells) else []
        parts += shortfalls[:1]
        if parts:
            remarks[method] = ", ".join(parts)
    return remarks


def _general_notes(results: Results, setting: str, words: MetricFormat) -> list[str]:
    notes = []
    ranks = results.ranks(setting, words.metric)
    shared = results.shared_ranks(setting, words.metric)
    if shared != ranks:
        over = f"rank{'s' if len(shared) > 1 else ''} {listing(shared)}" if shared else "no rank"
        notes.append(f"AURAC over {over}: not every run was measured at every rank.")
    # Rounding differs between batch sizes and machines; another model or test set differs more.
    bases: dict[int, list[float]] = {}
    for cell in results.counted(setting):
        if words.metric in cell.history.base:
            bases.setdefault(cell.seed, []).append(cell.history.base[words.metric])
    if any(not math.isclose(v, b[0], rel_tol=1e-3) for b in bases.values() for v in b):
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


def _explanation(results: Results, words: MetricFormat, counts: Iterable[int]) -> list[str]:
    """How to read differences."""
    reference = plain(results.reference)
    notes = [
        f"The method less {reference} with the same seed: above 0 the method is "
        f"{'better' if words.higher_is_better else 'worse'}. In brackets the {CONFIDENCE:.0%} "
        "percentile bootstrap interval of the mean."
    ]
    fewest = min((count for count in counts if count), default=0)
    return [*notes, *filter(None, [warning(fewest)])]


def _of_metric(
    results: Results, setting: str, words: MetricFormat
) -> Mapping[tuple[str, str], Any]:
    """(Method, place) -> its row of the summary."""
    frame = results.summary
    frame = frame[(frame["setting"] == setting) & (frame["metric"] == words.metric)]
    return {(row.method, row.at): row for row in frame.itertuples()}


def _none(value: float | None) -> float | None:
    """None for the NaN that a data frame has in its place."""
    return None if value is None or math.isnan(value) else value


def _heading(setting: str, words: MetricFormat) -> str:
    return f"{plain(setting)}: {words.title}" if setting else capital(words.title)


def _place(at: str) -> str:
    return f"rank {at}" if at.isdigit() else at
