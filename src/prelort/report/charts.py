"""The charts of a run or a study: one Altair definition each, for PNG, SVG and the page.

Every function returns None if there is nothing to show. pandas and Altair are slow to import:
import this module where charts are made.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import altair as alt
import pandas as pd

from prelort.report.drawing import (
    GREY,
    finite,
    is_log,
    lines,
    side_by_side,
    stacked,
    style,
    titled,
    y_axis,
)
from prelort.report.formatting import (
    MetricFormat,
    capital,
    human_bytes,
    human_seconds,
    listing,
    metric_format,
    plain,
    plural,
    ranges,
)
from prelort.report.results import AURAC, CONFIDENCE, Results, interval, last_round, mean_deviation

MAX_CLIENTS, MAX_CELLS = 100, 4000
"""Rows and cells of the heat map."""

SIZE_RATIO = 20.0
"""The axis of a diagnosed quantity is logarithmic if one value is this many times another."""

LOSS_TITLE = "Training loss by round"
FAR = 5.0
"""A difference this many times the median's makes the axis linear in the middle only."""

DIAGNOSTICS = (
    ("aggregation_noise", "", "Aggregation noise", "relative norm"),
    ("client_drift", "mean", "Client drift, mean over clients", "relative norm"),
    ("effective_rank", "", "Effective rank, mean over layers", "rank"),
    ("truncation_noise", "lowest", "Truncation noise, lowest rank", "relative norm"),
    ("truncation_noise", "rank", "Truncation noise by rank", "relative norm"),
    ("dimension_energy", "rank dimension", "Size of each rank dimension", "norm of its product"),
)
"""Quantity, where it is read (or what the x axis is, after the last round), titles."""


def by_rank(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric at each rank prefix after the last round, a line for each method."""
    form = metric_format(metric)
    frame = results.select(results.scores, setting, metric)
    frame = frame.loc[[at.isdigit() for at in frame["at"]]]
    # The rank of one method's stacked adapters must not squeeze the others' ranks.
    methods = frame.groupby("at")["method"].transform("nunique")
    rare = frame[3 * methods < frame["method"].nunique()]["at"].unique()
    frame = frame.loc[[at not in rare for at in frame["at"]]]
    data = _means(frame["method"], frame["at"].astype(int), frame["value"])
    if data["x"].nunique() < 2:
        return None  # the table has the one value
    title = f"{capital(form.name)} at each rank prefix"
    notes = [form.direction, f"rank {listing(rare)}: see the table" if len(rare) else ""]
    notes.append(_seeds(results))
    if bases := list(results.base(setting, metric).values()):
        notes.append(f"untuned base {form.show(mean_deviation(bases)[0])}")
    return lines(data, results.methods, title, form, *notes, x="rank")


def by_round(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric by round: of one run at each rank, of several at the highest."""
    form = metric_format(metric)
    frame = results.select(results.to_pandas(), setting, metric)
    frame = frame[frame["rank"] > 0]
    if len(results.cells) == 1:
        names, where = [f"rank {rank}" for rank in sorted(set(frame["rank"]))], "each rank"
        series = frame["rank"].map("rank {}".format)
    else:
        names, where = results.methods, "highest rank"
        frame = frame[frame["rank"] == frame.groupby(["method", "seed"])["rank"].transform("max")]
        series = frame["method"]
    data = _means(series, frame["round"], frame["value"])
    if data["x"].nunique() < 3:
        return None
    title = f"{capital(form.name)} by round, {where}"
    return lines(data, names, title, form, form.direction, _seeds(results))


def training_loss(results: Results, setting: str) -> alt.LayerChart | None:
    """The training loss by round: of one run for each rank, of several the clients' mean."""
    tasks = {cell.history.started.task for cell in results.cells if cell.history.started}
    unit = f"nats per {'example' if tasks == {'classification'} else 'token'}"
    if any(":" in task for task in tasks):  # whose losses may be anything
        unit = ""
    form = replace(metric_format("loss"), unit=unit)
    if len(results.cells) > 1:
        frame = results.select(results.rounds, setting)
        data = _means(frame["method"], frame["round"], frame["loss"])
        notes = ["mean over clients", _seeds(results)]
        return lines(data, results.methods, LOSS_TITLE, form, *notes)
    frame = finite(results.select(results.replies, setting), "loss")
    data = frame.groupby(["rank", "round"])["loss"].agg(["mean", "min", "max"]).reset_index()
    data = data.set_axis(["series", "x", "value", "low", "high"], axis=1)
    names = [f"rank {rank:.0f}" for rank in sorted(set(data["series"]))]
    data["series"] = data["series"].map("rank {:.0f}".format)
    note = "mean over the clients of a rank"
    return lines(data, names, LOSS_TITLE, form, note, spread="lowest to highest")


def differences(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each method's paired difference of the area to the reference: mean, interval, pairs."""
    form = metric_format(metric)
    pairs = results.select(results.differences, setting, metric)
    pairs = pairs[pairs["at"] == AURAC]
    pairs = pairs.assign(series=pairs["method"].map(plain), value=pairs["value"] * form.factor)
    columns = ["series", "value", "low", "high"]
    groups = pairs.groupby("series", sort=False)["value"]
    means = pd.DataFrame([(name, *interval(list(v))) for name, v in groups], columns=columns)
    pairs, means = (
        finite(frame, "value").assign(shown=lambda one: one["value"].map("{:+.3g}".format))
        for frame in (pairs[["series", "value"]], means)
    )
    if not len(means) or len(results.seeds) < 2:
        return None
    middle, most = means["value"].abs().median(), means["value"].abs().max()
    scale, ticks = alt.Scale(nice=True, zero=True), {}
    if middle > 0 and most > FAR * middle:
        scale = alt.Scale(type="symlog", constant=middle, nice=False)
        steps = [m * 10.0**e for e in range(math.floor(math.log10(middle)), 12) for m in (1, 2, 5)]
        steps = [step for step in steps if middle / 2 <= step <= 1.2 * most]
        ticks = {"values": [*(-step for step in steps), 0, *steps], "labelOverlap": True}
    side = "Right" if form.higher_is_better else "Left"
    title = f"{side} of 0: better than {plain(results.reference)}"
    x = alt.X("value:Q", scale=scale, axis=alt.Axis(title=title, format=".4~g", **ticks))
    names = [name for name in map(plain, results.methods) if name in set(means["series"])]
    y = alt.Y("series:N", sort=names, axis=alt.Axis(title=None, labelLimit=180, grid=False))
    colour = style("color", results.methods, False)
    tip = [alt.Tooltip("series:N", title="method"), alt.Tooltip("shown:N", title="difference")]
    bars = alt.Chart(finite(means, "low")).mark_rule(strokeWidth=2.5)
    ends = [alt.Tooltip("low:Q", format="+.3~g"), alt.Tooltip("high:Q", format="+.3~g")]
    points = alt.Chart(means).mark_point(filled=True, opacity=1, size=60)
    shape = style("shape", results.methods, False)
    ticks_of_pairs = alt.Chart(pairs).mark_tick(thickness=1.5, size=10, opacity=0.8)
    chart = alt.layer(
        alt.Chart(pd.DataFrame({"value": [0]})).mark_rule(color=GREY).encode(x=x),
        bars.encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, color=colour),
        ticks_of_pairs.encode(x=x, y=y, color=colour, tooltip=tip),
        points.encode(x=x, y=y, color=colour, shape=shape, tooltip=[*tip, *ends]),
    )
    note = f"{form.title}; mean, {CONFIDENCE:.0%} interval, and each seed"
    return titled(chart, "Difference in AURAC, paired by seed", note)


def traffic(results: Results) -> alt.LayerChart | None:
    """Bytes to and from all clients by round, of one run."""
    names = {"bytes_down": "down, to the clients", "bytes_up": "up, from the clients"}
    axis = alt.Axis(title="bytes", format=".3~s")
    note = "all clients of the round together"
    return stacked(results.rounds, names, "Bytes by round", human_bytes, axis, note)


def time_by_phase(results: Results) -> alt.LayerChart | None:
    """Wall seconds of each phase by round, of one run."""
    names = {f"{phase}_seconds": phase for phase in ("train", "aggregate", "diagnose", "evaluate")}
    names = {key: phase for key, phase in names.items() if results.rounds[key].any()}
    axis = alt.Axis(title="seconds", format=".6~g")
    note = "wall seconds of each phase; train includes all messages"
    return stacked(results.rounds, names, "Time by round", human_seconds, axis, note)


def client_losses(results: Results) -> alt.LayerChart | None:
    """The training loss of each client in each round as a heat map, failures marked; of one run.

    Clients are sorted by rank. Many rounds are joined: the mean of their values.
    """
    frame = results.replies
    frame = frame[frame["failed"].astype(bool) | frame["loss"].notna()]
    if not len(frame):
        return None
    names = list(frame.sort_values(["rank", "client"])["client"].unique())
    count, names = len(names), names[:MAX_CLIENTS]
    first, last = int(frame["round"].min()), int(frame["round"].max())
    joined = math.ceil((last - first + 1) / max(20, MAX_CELLS // len(names)))
    frame = frame[frame["client"].isin(names)]
    start = first + (frame["round"] - first) // joined * joined
    loss = frame["loss"].astype(float)  # None, where no client has replied, becomes NaN
    good = [math.isfinite(value) for value in loss]
    frame = frame.assign(start=start, loss=loss.where(good), bad=[not g for g in good])
    cells = frame.groupby(["client", "start"], as_index=False).agg({"loss": "mean", "bad": "sum"})
    rounds = [ranges(range(a, min(a + joined, last + 1))) for a in cells["start"]]
    cells = cells.assign(client=cells["client"].map(plain), rounds=rounds)
    x = alt.X("start:O", axis=alt.Axis(title="round", labelAngle=0, labelOverlap=True))
    order = list(map(plain, names))
    y = alt.Y("client:N", sort=order, axis=alt.Axis(title=None, labelLimit=150, grid=False))
    losses = finite(cells, "loss")
    # One loss that exploded must not make all others look the same.
    high = frame["loss"].quantile(0.98, "higher")
    domain = [losses["loss"].min(), high] if len(losses) else [0, 1]
    colour = alt.Color(
        "loss:Q",
        scale=alt.Scale(scheme="viridis", reverse=True, domain=domain, clamp=True),
        legend=alt.Legend(title="loss (nats)", orient="top", gradientLength=180),
    )
    tip = [alt.Tooltip("client:N"), alt.Tooltip("rounds:N", title="round"),
           alt.Tooltip("loss:Q", format=".4~g"),
           alt.Tooltip("bad:Q", title="failures")]  # fmt: skip
    cross = alt.Chart(cells[cells["bad"] > 0]).mark_point(
        shape="cross", angle=45, size=35, color="#D55E00", filled=True, opacity=1
    )
    both = [alt.Chart(losses).mark_rect().encode(color=colour), cross]
    chart = alt.layer(*(part.encode(x=x, y=y, tooltip=tip) for part in both))
    notes = ["lowest rank first; ×: no usable reply, or a loss that is not finite"]
    notes += [f"each cell is the mean of {joined} rounds"] if joined > 1 else []
    notes += [f"the first {len(names)} of {count} clients"] if count > len(names) else []
    chart = titled(chart, "Training loss by client and round", *notes)
    return chart.properties(height=alt.Step(13))


def client_metrics(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each client's own metric at its rank, after the last round, and the mean of each rank."""
    form = metric_format(metric)
    frame = results.select(results.client_metrics, setting, metric)
    frame = finite(last_round(frame), "value")
    if not len(frame):
        return None
    frame = frame.assign(
        series=frame["method"].map(plain),
        client=frame["client"].map(plain),
        shown=frame["value"].map(form.show),
        value=frame["value"] * form.factor,
    )
    values = list(frame["value"])
    x = alt.X("rank:O", axis=alt.Axis(title="rank of the client", labelAngle=0, grid=False))
    y = y_axis(values, form, is_log(values, form))
    several = frame["series"].nunique() > 1
    names = list(map(plain, results.methods))
    aside = {"xOffset": alt.XOffset("series:N", sort=names)} if several else {}
    colour = style("color", names, several)
    tip = [alt.Tooltip("series:N", title="method"), alt.Tooltip("client:N"),
           alt.Tooltip("shown:N", title=form.name), alt.Tooltip("rank:O"),
           alt.Tooltip("examples:Q"), alt.Tooltip("seed:N")]  # fmt: skip
    both = alt.Chart(frame).encode(x=x, color=colour, **aside)
    points = both.mark_point(filled=True, opacity=0.55, size=35)
    means = both.mark_tick(thickness=2.5, size=16).encode(y="mean(value):Q")
    return titled(
        alt.layer(points.encode(y=y, tooltip=tip), means),
        f"{capital(form.name)} of each client",
        f"on its own test examples, {form.direction}; bar: mean of the rank",
    )


def diagnostics(results: Results, setting: str) -> list[alt.LayerChart]:
    """What the rounds did to the products (docs/diagnostics.md), mean over seeds.

    By round: noise of aggregation and of truncation, drift, effective rank. After the last round:
    noise at each rank, and the size of each rank dimension.
    """
    frame = results.select(results.diagnostics, setting)
    last = last_round(frame)
    charts = []
    for quantity, at, title, unit in DIAGNOSTICS:
        by_place = at.startswith("rank")
        rows = last if by_place else frame
        rows = rows[rows["quantity"] == quantity]
        if at == "lowest":
            ranks = rows["at"].astype(int)
            rows = rows[ranks == ranks.groupby(rows["method"]).transform("min")]
        elif not by_place:
            rows = rows[rows["at"] == at]
        data = _means_without_spread(rows, "at" if by_place else "round")
        if at == "rank":
            least = _means_without_spread(last[last["quantity"] == "least_truncation_noise"], "at")
            data = data.drop(columns=["low", "high"]).merge(
                least[["series", "x", "value"]], "left", ["series", "x"], suffixes=("", "_least")
            )
            data = data.assign(low=data["value_least"], high=data["value"])
        sizes = data.groupby("series")["value"].max().to_dict()
        zero = [name for name in map(plain, results.methods) if sizes.get(name) == 0]
        notes = ["after the last round" if by_place else ""]
        notes += [f"0 throughout: {listing(zero)}"] if zero else []
        form = MetricFormat(quantity, unit, unit, True, log_ratio=SIZE_RATIO, from_zero=True)
        charts.append(
            lines(
                data, results.methods, title, form, *notes,
                x=at if by_place else "round", spread="down to the least possible",
            )
        )  # fmt: skip
    return [chart for chart in charts if chart is not None]


def overview(results: Results, setting: str) -> alt.ConcatChart | None:
    """The first metric side by side: at each rank, by round, and the paired differences."""
    panels: list[alt.LayerChart | None] = []
    for metric in results.metrics[:1]:
        panels += [by_rank(results, setting, metric)]
        panels += [by_round(results, setting, metric) or training_loss(results, setting)]
        panels += [differences(results, setting, metric)]
    drawn = [panel for panel in panels if panel is not None]
    if not drawn:
        return None
    parts = [plain(results.title), plain(setting), plural(len(results.seeds), "seed")]
    title = alt.TitleParams(
        ", ".join(filter(None, parts)), fontSize=12, fontWeight="normal", color=GREY,
        anchor="start", offset=16,
    )  # fmt: skip
    return side_by_side(drawn, 3, len(results.cells) > 1).properties(title=title)


def diagnostics_overview(results: Results, setting: str) -> alt.ConcatChart | None:
    """All charts of `diagnostics` in one picture."""
    charts = diagnostics(results, setting)
    return side_by_side(charts, 3, True) if charts else None


def _means(series: Any, x: Any, value: Any) -> pd.DataFrame:
    """Mean over seeds and a standard deviation to both sides, for each series and x."""
    columns = {"series": map(plain, series), "x": x, "value": value}
    frame = pd.DataFrame({key: list(values) for key, values in columns.items()})
    rows = []
    for (name, at), values in frame.groupby(["series", "x"], sort=False)["value"]:
        mean, deviation = mean_deviation(list(values))
        rows.append((name, at, mean, mean - deviation, mean + deviation))
    return pd.DataFrame(rows, columns=["series", "x", "value", "low", "high"])


def _means_without_spread(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    data = _means(rows["method"], rows[x].astype(int), rows["value"])
    return data.assign(low=math.nan, high=math.nan)


def _seeds(results: Results) -> str:
    seeds = len(results.seeds)
    return f"mean over {seeds} seeds" if seeds > 1 else ""
