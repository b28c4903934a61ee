"""The charts of a run or a study: one Altair definition each, for PNG, SVG and the page.

Every function returns None if there is nothing to show. pandas and Altair are slow to import:
import this module where charts are made.
"""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import pandas as pd

from prelort.report.drawing import (
    GREY,
    finite,
    is_log,
    lines,
    side_by_side,
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
)
from prelort.report.results import AURAC, CELL, Results
from prelort.report.spread import CONFIDENCE, spread

MAX_CLIENTS, MAX_CELLS = 100, 4000
"""Rows and cells of the heat map."""

LOG_RATIO = {"perplexity": 4.0, "loss": 20.0}
"""Metrics whose axis is logarithmic if one value is more than this many times another."""

SIZE_RATIO = 20.0
"""The same for sizes and times."""

LOSS_TITLE = "Training loss by round"
FAR = 5.0
"""A difference this many times the median's makes the axis linear in the middle only."""


def by_rank(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric at each rank prefix after the last round, a line for each method."""
    words = metric_format(metric)
    frame = _where(results.scores, setting, metric)
    frame = frame.loc[[at.isdigit() for at in frame["at"]]]
    # The rank of one method's stacked adapters must not squeeze the others' ranks.
    methods = frame.groupby("at")["method"].transform("nunique")
    rare = frame[3 * methods < frame["method"].nunique()]["at"].unique()
    frame = frame.loc[[at not in rare for at in frame["at"]]]
    data = _means(frame["method"], frame["at"].astype(int), frame["value"] * words.factor)
    if data["x"].nunique() < 2:
        return None  # the table says as much
    base = spread(list(results.base(setting, metric).values()))
    title = f"{capital(words.name)} at each rank prefix"
    remark = f"rank {listing(rare)}: see the table" if len(rare) else ""
    return lines(
        data, results.methods, title, words.direction, remark, x_title="rank prefix in use",
        log_x=True, base=base.mean * words.factor if base else None, **_of_metric(results, words),
    )  # fmt: skip


def by_round(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric by round: of one run at each rank, of several at the highest."""
    words = metric_format(metric)
    frame = _where(_counted(results.to_pandas(), results), setting, metric)
    frame = frame[frame["rank"] > 0]
    names, title = results.methods, f"{capital(words.name)} by round, highest rank"
    if single := len(results.cells) == 1:
        names = [f"rank {rank}" for rank in sorted(set(frame["rank"]))]
        title = f"{capital(words.name)} by round, each rank"
    else:
        frame = frame[frame["rank"] == frame.groupby(["method", "seed"])["rank"].transform("max")]
    series = frame["rank"].map("rank {}".format) if single else frame["method"]
    data = _means(series, frame["round"], frame["value"] * words.factor)
    if data["x"].nunique() < 3:
        return None
    return lines(data, names, title, words.direction, **_of_metric(results, words))


def training_loss(results: Results, setting: str) -> alt.LayerChart | None:
    """The training loss by round: of one run for each rank, of several the clients' mean."""
    words = metric_format("loss")
    tasks = {cell.history.started.task for cell in results.cells if cell.history.started}
    more = _of_metric(results, words)
    more["y_title"] = f"nats per {'example' if tasks == {'classification'} else 'token'}"
    if len(results.cells) > 1:
        frame = _where(_counted(results.rounds, results), setting)
        data = _means(frame["method"], frame["round"], frame["loss"])
        return lines(data, results.methods, LOSS_TITLE, "mean over clients", **more)
    frame = finite(_counted(results.replies, results), "loss")
    data = frame.groupby(["rank", "round"])["loss"].agg(["mean", "min", "max"]).reset_index()
    data = data.set_axis(["series", "x", "value", "low", "high"], axis=1)
    names = [f"rank {rank:.0f}" for rank in sorted(set(data["series"]))]
    data["series"] = data["series"].map("rank {:.0f}".format)
    more["mean"] = "mean over the clients of a rank"
    more["spread"] = f"{more['mean']}, band: lowest to highest"
    return lines(data, names, LOSS_TITLE, **more)


def differences(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each method's paired difference of the area to the reference: mean, interval, pairs."""
    words = metric_format(metric)

    def chosen(frame: pd.DataFrame, column: str) -> pd.DataFrame:
        """The differences of the area, in the unit that is shown."""
        frame = _where(frame, setting, metric)
        frame = finite(frame[frame["at"] == AURAC], column)
        shown = frame[["method"]].map(plain).rename(columns={"method": "series"})
        scaled = {key: frame[key].astype(float) * words.factor
                  for key in (column, "low", "high") if key in frame}  # fmt: skip
        shown = shown.assign(**scaled).rename(columns={column: "value"})
        return shown.assign(shown=shown["value"].map("{:+.3g}".format))

    means, pairs = chosen(results.summary, "difference"), chosen(results.differences, "value")
    if not len(means) or len(results.seeds) < 2:
        return None
    middle, most = means["value"].abs().median(), means["value"].abs().max()
    scale, ticks = alt.Scale(nice=True, zero=True), {}
    if middle > 0 and most > FAR * middle:
        scale = alt.Scale(type="symlog", constant=middle, nice=False)
        steps = [m * 10.0**e for e in range(math.floor(math.log10(middle)), 12) for m in (1, 2, 5)]
        steps = [step for step in steps if middle / 2 <= step <= 1.2 * most]
        ticks = {"values": [*(-step for step in steps), 0, *steps], "labelOverlap": True}
    side = "Right" if words.higher_is_better else "Left"
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
    note = f"{words.title}; mean, {CONFIDENCE:.0%} interval, and each seed"
    return titled(chart, "Difference in AURAC, paired by seed", note)


def traffic(results: Results) -> alt.LayerChart | None:
    """Bytes to and from all clients by round, of one run."""
    names = {"bytes_down": "down, to the clients", "bytes_up": "up, from the clients"}
    return lines(
        _melted(results.rounds, names), list(names.values()), "Bytes by round",
        "all clients of the round together", y_title="bytes", show=human_bytes, zero=True,
        format=".3~s",
    )  # fmt: skip


def time_by_phase(results: Results) -> alt.LayerChart | None:
    """Wall seconds of each phase by round, of one run."""
    names = {f"{phase}_seconds": phase for phase in ("train", "aggregate", "diagnose", "evaluate")}
    names = {key: phase for key, phase in names.items() if results.rounds[key].any()}
    return lines(
        _melted(results.rounds, names), list(names.values()), "Time by round",
        "wall seconds of each phase; train includes all messages", y_title="seconds",
        show=human_seconds, zero=True, log_ratio=SIZE_RATIO,
    )  # fmt: skip


def client_losses(results: Results) -> alt.LayerChart | None:
    """The training loss of each client in each round as a heat map, failures marked; of one run.

    Clients are sorted by rank. Many rounds are joined: the mean of their values.
    """
    frame = results.replies
    frame = frame[frame["failed"].astype(bool) | frame["steps"].notna()]
    if not len(frame):
        return None
    order = list(frame.sort_values(["rank", "client"])["client"].unique())
    names = order[:MAX_CLIENTS]
    first, last = int(frame["round"].min()), int(frame["round"].max())
    joined = math.ceil((last - first + 1) / max(20, MAX_CELLS // len(names)))
    frame = frame[frame["client"].isin(names)]
    start = first + (frame["round"] - first) // joined * joined
    good = [math.isfinite(loss) for loss in frame["loss"]]
    frame = frame.assign(start=start, loss=frame["loss"].where(good), bad=[not g for g in good])
    cells = frame.groupby(["client", "start"], as_index=False).agg({"loss": "mean", "bad": "sum"})
    cells = cells.assign(
        client=cells["client"].map(plain),
        low=cells["start"] - 0.5,
        high=cells["start"] + joined - 0.5,
        at=cells["start"] + (joined - 1) / 2,
        rounds=[f"{a}" if joined == 1 else f"{a} to {min(a + joined - 1, last)}"
                for a in cells["start"]],
    )  # fmt: skip
    x = alt.X(
        "low:Q",
        scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False),
        axis=alt.Axis(title="round", tickMinStep=1, format="d", grid=False),
    )
    axis = alt.Axis(title=None, labelLimit=150, grid=False)
    y = alt.Y("client:N", sort=list(map(plain, names)), axis=axis)
    losses = finite(cells, "loss")
    # One loss that exploded must not leave all others alike.
    domain = (
        [losses["loss"].min(), frame["loss"].quantile(0.98, "higher")] if len(losses) else [0, 1]
    )
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
    chart = alt.layer(
        alt.Chart(losses).mark_rect().encode(x=x, x2="high:Q", y=y, color=colour, tooltip=tip),
        cross.encode(x="at:Q", y=y, tooltip=tip),
    )
    notes = ["lowest rank first; ×: no usable reply, or a loss that is not finite"]
    notes += [f"each cell is the mean of {joined} rounds"] if joined > 1 else []
    notes += [f"the first {len(names)} of {len(order)} clients"] if len(order) > len(names) else []
    chart = titled(chart, "Training loss by client and round", *notes)
    return chart.properties(height=alt.Step(13))


def client_metrics(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each client's own metric at its rank, after the last round, and the mean of each rank."""
    words = metric_format(metric)
    frame = _where(_counted(results.client_metrics, results), setting, metric)
    frame = finite(_last(frame), "value")
    if not len(frame):
        return None
    frame = frame.assign(
        series=frame["method"].map(plain),
        client=frame["client"].map(plain),
        shown=frame["value"].map(words.show),
        value=frame["value"] * words.factor,
    )
    values = list(frame["value"])
    x = alt.X("rank:O", axis=alt.Axis(title="rank of the client", labelAngle=0, grid=False))
    y = y_axis(values, words.title, is_log(values, LOG_RATIO.get(metric)))
    several = frame["series"].nunique() > 1
    names = list(map(plain, results.methods))
    aside = {"xOffset": alt.XOffset("series:N", sort=names)} if several else {}
    colour = style("color", names, several)
    tip = [alt.Tooltip("series:N", title="method"), alt.Tooltip("client:N"),
           alt.Tooltip("shown:N", title=words.name), alt.Tooltip("rank:O"),
           alt.Tooltip("examples:Q"), alt.Tooltip("seed:N")]  # fmt: skip
    both = alt.Chart(frame).encode(x=x, color=colour, **aside)
    points = both.mark_point(filled=True, opacity=0.55, size=35)
    means = both.mark_tick(thickness=2.5, size=16).encode(y="mean(value):Q")
    return titled(
        alt.layer(points.encode(y=y, tooltip=tip), means),
        f"{capital(words.name)} of each client",
        f"on its own test examples, {words.direction}; bar: mean of the rank",
    )


def diagnostics(results: Results, setting: str) -> list[alt.LayerChart]:
    """What the rounds did to the products (docs/diagnostics.md), mean over seeds.

    By round: noise of aggregation and of truncation, drift, effective rank. After the last round:
    noise at each rank, and the size of each rank dimension.
    """
    frame = _where(results.diagnostics, setting)
    last, least = _last(frame), None
    charts: list[alt.LayerChart | None] = []
    for quantity, at, title, note, y_title in (
        ("aggregation_noise", "", "Aggregation noise", "", "relative norm"),
        ("client_drift", "mean", "Client drift, mean over clients", "", "relative norm"),
        ("effective_rank", "", "Effective rank, mean over layers", "", "rank"),
        ("truncation_noise", "lowest", "Truncation noise, lowest rank", "", "relative norm"),
        ("truncation_noise", "rank", "Truncation noise by rank",
         "after the last round; dotted: the least possible", "relative norm"),
        ("dimension_energy", "rank dimension", "Size of each rank dimension",
         "after the last round", "norm of its product"),
    ):  # fmt: skip
        by_place = at.startswith("rank")
        rows = last if by_place else frame
        rows = rows[rows["quantity"] == quantity]
        if at == "lowest":
            ranks = rows["at"].astype(int)
            rows = rows[ranks == ranks.groupby(rows["method"]).transform("min")]
        elif not by_place:
            rows = rows[rows["at"] == at]
        data = _means(
            rows["method"], rows["at" if by_place else "round"].astype(int), rows["value"]
        )
        sizes = data.groupby("series")["value"].max().to_dict()
        zero = [name for name in map(plain, results.methods) if sizes.get(name) == 0]
        notes = [note, f"0 throughout: {listing(zero)}" if zero else ""]
        if at == "rank":
            cuts = last[last["quantity"] == "least_truncation_noise"]
            least = _means(cuts["method"], cuts["at"].astype(int), cuts["value"])
        charts.append(
            lines(
                data.assign(low=math.nan, high=math.nan), results.methods, title, *notes,
                y_title=y_title, x_title=at if by_place else "round", log_x=at == "rank",
                show="{:.3g}".format, zero=True, log_ratio=SIZE_RATIO,
                dotted=least if at == "rank" else None,
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
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    parts = [plain(results.title), plain(setting), plural(len(results.seeds), "seed")]
    title = alt.TitleParams(
        ", ".join(filter(None, parts)), fontSize=12, fontWeight="normal", color=GREY,
        anchor="start", offset=16,
    )  # fmt: skip
    return side_by_side(shown, 3, len(results.cells) > 1).properties(title=title)


def diagnostics_overview(results: Results, setting: str) -> alt.ConcatChart | None:
    """All charts of `diagnostics` in one picture."""
    found = diagnostics(results, setting)
    return side_by_side(found, 3, True) if found else None


def _where(frame: pd.DataFrame, setting: str, metric: str | None = None) -> pd.DataFrame:
    """The rows of a setting and a metric."""
    frame = frame[frame["setting"] == setting]
    return frame if metric is None else frame[frame["metric"] == metric]


def _counted(frame: pd.DataFrame, results: Results) -> pd.DataFrame:
    """The rows of the cells that count."""
    cells = {(c.setting, c.method, c.seed) for s in results.settings for c in results.counted(s)}
    return frame.loc[[k in cells for k in zip(*(frame[c] for c in CELL), strict=True)]]


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last round of each cell."""
    return frame[frame["round"] == frame.groupby(["method", "seed"])["round"].transform("max")]


def _means(series: Any, x: Any, value: Any) -> pd.DataFrame:
    """Mean over seeds and a standard deviation to both sides, for each series and x."""
    columns = {"series": map(plain, series), "x": x, "value": value}
    frame = pd.DataFrame({key: list(values) for key, values in columns.items()})
    rows = []
    for (name, at), values in frame.groupby(["series", "x"], sort=False)["value"]:
        one = spread(list(values))
        if one is not None:
            apart = math.nan if one.deviation is None else one.deviation
            rows.append((name, at, one.mean, one.mean - apart, one.mean + apart))
    return pd.DataFrame(rows, columns=["series", "x", "value", "low", "high"])


def _melted(frame: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Columns of the rounds as series."""
    long = frame.melt("round", list(names), "series", "value").rename(columns={"round": "x"})
    return long.assign(series=long["series"].map(names), low=math.nan, high=math.nan)


def _of_metric(results: Results, words: MetricFormat) -> dict[str, Any]:
    """How a metric is drawn, and what its mean and spread are."""
    seeds = len(results.seeds)
    names = {"mean": "mean", "spread": "mean ± standard deviation"}
    return {
        "y_title": words.title,
        "show": lambda value: words.show(value / words.factor),
        "log_ratio": LOG_RATIO.get(words.metric),
        **{key: f"{name} over {seeds} seeds" for key, name in names.items() if seeds > 1},
    }
