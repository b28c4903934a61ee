"""The charts of a run or a study: one Altair definition each, for PNG, SVG and the page.

Every builder returns None if there is nothing to show. Values that are not finite are left out and
named in the subtitle. pandas and Altair are slow to import: import this module where charts are
made.
"""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from prelort.errors import PrelortError
from prelort.files import write_atomically
from prelort.report.formatting import (
    capital,
    human_bytes,
    human_seconds,
    listing,
    metric_format,
    plain,
    plural,
)
from prelort.report.results import AURAC, CellResult, Results
from prelort.report.spread import CONFIDENCE, spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without its faint yellow."""

SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2])
GREY = "#5c656e"
FAILED = "#D55E00"
TITLE: dict[str, Any] = {
    "anchor": "start", "frame": "group", "offset": 10, "fontSize": 13, "subtitleFontSize": 11,
    "subtitleColor": GREY,
}  # fmt: skip

MAX_BARS, MAX_BANDS, MAX_POINTS = 6, 5, 30
"""Series with error bars or bands, and points on a line: more would cover each other."""

MAX_ROUNDS = 200
"""Points of a line that the data of a chart have: of more rounds every other one and so on."""

MAX_CLIENTS, MAX_CELLS = 100, 4000
"""Rows and cells of the heat map."""

LOG_RATIO = {"perplexity": 4.0, "loss": 20.0}
"""Metrics whose axis is logarithmic if one value is more than this many times another."""

SIZE_RATIO = 20.0
BASE_ROOM = 2.5
"""The base is drawn if the axis need not become longer than by this factor."""

LEAST_SPAN = 0.05
"""An axis shows at least this share of its values, lest rounding look like a trend."""

FAR = 5.0
"""A difference this many times the median's makes the axis linear in the middle only."""

DIAGNOSTICS = (
    ("aggregation_noise", "", "Aggregation noise", "relative norm"),
    ("client_drift", "mean", "Client drift, mean over clients", "relative norm"),
    ("effective_rank", "", "Effective rank, mean over layers", "rank"),
)


def by_rank(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric at each rank prefix after the last round, a line for each method."""
    words = metric_format(metric)
    scores = results.scores
    chosen = scores[(scores["setting"] == setting) & (scores["metric"] == metric)]
    chosen = chosen.loc[[at.isdigit() for at in chosen["at"]]]
    # The rank of one method's stacked adapters must not squeeze the others' ranks.
    counts = chosen.groupby("at")["method"].nunique().to_dict()
    rare = [at for at, count in counts.items() if 3 * count < chosen["method"].nunique()]
    remark = f"rank {listing(rare)}: see the table" if rare else ""
    chosen = chosen.loc[[at not in rare for at in chosen["at"]]]
    lines = _means(chosen["method"], chosen["at"].astype(int), chosen["value"] * words.factor)
    if lines["x"].nunique() < 2:
        return None  # the table says as much
    base = spread(list(results.base(setting, metric).values()))
    return _lines(
        lines,
        results.methods,
        f"{capital(words.name)} at each rank prefix",
        "; ".join(filter(None, [words.direction, remark])),
        x_title="rank prefix in use",
        y_title=words.title,
        show=lambda value: words.show(value / words.factor),
        log_ratio=LOG_RATIO.get(metric),
        log_x=True,
        base=base.mean * words.factor if base else None,
        **_over_seeds(results),
    )


def by_round(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """The metric by round: of one run at each rank, of several at the highest."""
    words = metric_format(metric)
    frame = _of(results.to_pandas(), results, setting)
    frame = frame[(frame["metric"] == metric) & (frame["rank"] > 0)]
    single = len(results.cells) == 1
    ranks = sorted(set(frame["rank"]))
    if not single:
        frame = frame[frame["rank"] == frame.groupby(["method", "seed"])["rank"].transform("max")]
    names = frame["rank"].map("rank {}".format) if single else frame["method"]
    lines = _means(names, frame["round"], frame["value"] * words.factor)
    if lines["x"].nunique() < 3:
        return None
    return _lines(
        lines,
        [f"rank {rank}" for rank in ranks] if single else results.methods,
        f"{capital(words.name)} by round, " + ("each rank" if single else "highest rank"),
        words.direction,
        y_title=words.title,
        show=lambda value: words.show(value / words.factor),
        log_ratio=LOG_RATIO.get(metric),
        **_over_seeds(results),
    )


def training_loss(results: Results, setting: str) -> alt.LayerChart | None:
    """The training loss by round: of one run for each rank, of several the clients' mean."""
    words = metric_format("loss")
    tasks = {cell.history.started.task for cell in results.cells if cell.history.started}
    unit = "example" if tasks == {"classification"} else "token"
    if len(results.cells) > 1:
        frame = _of(results.rounds, results, setting)
        lines, names = _means(frame["method"], frame["round"], frame["loss"]), results.methods
        notes = {"subtitle": "mean over clients", **_over_seeds(results)}
    else:
        frame = _of(results.replies, results, setting)
        frame = _finite(frame, "loss")
        groups = frame.groupby(["rank", "round"])["loss"].agg(["mean", "min", "max"]).reset_index()
        groups = groups.set_axis(["series", "x", "value", "low", "high"], axis=1)
        names = [f"rank {rank:.0f}" for rank in sorted(set(groups["series"]))]
        lines = groups.assign(series=groups["series"].map("rank {:.0f}".format))
        mean = "mean over the clients of a rank"
        notes = {"mean": mean, "spread": f"{mean}, band: lowest to highest"}
    return _lines(
        lines,
        names,
        "Training loss by round",
        y_title=f"nats per {unit}",
        show=words.show,
        log_ratio=LOG_RATIO["loss"],
        **notes,
    )


def differences(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each method's paired difference of the area to the reference: mean, interval, pairs."""
    words = metric_format(metric)

    def chosen(frame: pd.DataFrame) -> pd.DataFrame:
        rows = (frame["setting"] == setting) & (frame["metric"] == metric)
        return frame[rows & (frame["at"] == AURAC) & (frame["method"] != results.reference)]

    summary = chosen(results.summary)
    summary = _finite(summary, "difference")
    pairs = chosen(results.differences)
    pairs = _finite(pairs[pairs["method"].isin(summary["method"])], "value")
    if not len(summary) or len(results.seeds) < 2:
        return None
    names = [plain(name) for name in results.methods if name in set(summary["method"])]
    sizes = [abs(mean) * words.factor for mean in summary["difference"]]
    middle = statistics.median(sizes)
    scale = alt.Scale(nice=True, zero=True)
    ticks: dict[str, Any] = {"tickCount": 6}
    if middle > 0 and max(sizes) > FAR * middle:
        scale = alt.Scale(type="symlog", constant=middle, nice=False)
        steps = [m * 10.0**e for e in range(math.floor(math.log10(middle)), 12) for m in (1, 2, 5)]
        steps = [step for step in steps if middle / 2 <= step <= 1.2 * max(sizes)]
        ticks = {"values": [*(-step for step in steps), 0, *steps], "labelOverlap": True}
    better = "right" if words.higher_is_better else "left"
    title = f"{capital(better)} of 0: better than {plain(results.reference)}"
    means = [
        {
            "series": plain(row.method),
            "value": row.difference * words.factor,
            "low": row.low * words.factor,
            "high": row.high * words.factor,
            "shown": f"{row.difference * words.factor:+.3g}",
            "interval": f"{row.low * words.factor:+.3g} to {row.high * words.factor:+.3g}",
        }
        for row in summary.itertuples()
    ]
    whole = [mean for mean in means if math.isfinite(mean["low"])]
    points = [
        {"series": plain(p.method), "value": p.value * words.factor, "seed": p.seed,
         "shown": f"{p.value * words.factor:+.3g}"}
        for p in pairs.itertuples()
    ]  # fmt: skip
    axis = alt.X("value:Q", scale=scale, axis=alt.Axis(title=title, format=".4~g", **ticks))
    y = alt.Y("series:N", sort=names, axis=alt.Axis(title=None, labelLimit=180, grid=False))
    colour = _style("color", alt.Color, list(map(plain, results.methods)), False)
    tip = [alt.Tooltip("series:N", title="method"), alt.Tooltip("shown:N", title="difference")]
    layers = [
        alt.Chart(frame_of([{"value": 0}])).mark_rule(color=GREY).encode(x=axis),
        alt.Chart(frame_of(whole))
        .mark_rule(strokeWidth=2.5)
        .encode(x=alt.X("low:Q", scale=scale), x2="high:Q", y=y, color=colour),
        alt.Chart(frame_of(points))
        .mark_tick(thickness=1.5, size=10, opacity=0.8)
        .encode(x=axis, y=y, color=colour, tooltip=[*tip, alt.Tooltip("seed:N")]),
        alt.Chart(frame_of(means))
        .mark_point(filled=True, opacity=1, size=60)
        .encode(
            x=axis,
            y=y,
            color=colour,
            shape=_style("shape", alt.Shape, list(map(plain, results.methods)), False),
            tooltip=[*tip, alt.Tooltip("interval:N", title=f"{CONFIDENCE:.0%} interval")],
        ),
    ]
    subtitle = f"{words.title}; mean, {CONFIDENCE:.0%} interval, and each seed"
    return _titled(alt.layer(*layers), "Difference in AURAC, paired by seed", subtitle)


def traffic(results: Results, setting: str) -> alt.LayerChart | None:
    """Bytes to and from all clients by round, of one run."""
    frame = _of(results.rounds, results, setting)
    names = {"bytes_down": "down, to the clients", "bytes_up": "up, from the clients"}
    return _lines(
        _melted(frame, names),
        list(names.values()),
        "Bytes by round",
        "all clients of the round together",
        y_title="bytes",
        show=human_bytes,
        zero=True,
        format=".3~s",
    )


def time_by_phase(results: Results, setting: str) -> alt.LayerChart | None:
    """Wall seconds of each phase by round, of one run."""
    frame = _of(results.rounds, results, setting)
    phases = [p for p in ("train", "aggregate", "diagnose", "evaluate")
              if frame[f"{p}_seconds"].any()]  # fmt: skip
    return _lines(
        _melted(frame, {f"{phase}_seconds": phase for phase in phases}),
        phases,
        "Time by round",
        "wall seconds of each phase; train includes all messages",
        y_title="seconds",
        show=human_seconds,
        zero=True,
        log_ratio=SIZE_RATIO,
    )


def client_losses(results: Results, setting: str) -> alt.LayerChart | None:
    """The training loss of each client in each round as a heat map, failures marked; one run.

    Clients are sorted by rank. Many rounds are joined (the mean of their values).
    """
    frame = _of(results.replies, results, setting)
    frame = frame[frame["failed"].astype(bool) | frame["loss"].notna()]
    if not len(frame):
        return None
    order = frame.groupby("client")["rank"].max().fillna(math.inf)
    names = sorted(order.index, key=lambda name: (order[name], name))[:MAX_CLIENTS]
    first, last = int(frame["round"].min()), int(frame["round"].max())
    joined = math.ceil((last - first + 1) / max(20, MAX_CELLS // len(names)))
    frame = frame[frame["client"].isin(names)]
    frame = frame.assign(start=first + (frame["round"] - first) // joined * joined)
    finite = sorted(loss for loss in frame["loss"] if math.isfinite(loss))
    # One loss that exploded must not leave all others alike.
    domain = [finite[0], finite[math.ceil(0.98 * (len(finite) - 1))]] if finite else [0.0, 1.0]
    show, cells = metric_format("loss").show, []
    for (client, start), group in frame.groupby(["client", "start"]):
        losses = [loss for loss in group["loss"] if math.isfinite(loss)]
        mean = statistics.fmean(losses) if losses else None
        failures = int(group["failed"].sum())
        end = start + joined - 1
        cells.append({
            "client": plain(client),
            "from": start - 0.5,
            "to": end + 0.5,
            "middle": (start + end) / 2,
            "rounds": str(start) if joined == 1 else f"{start} to {min(end, last)}",
            "loss": mean,
            "shown": show(mean) if losses else "–" if failures else "not finite",
            "failures": failures,
        })  # fmt: skip
    x = alt.X(
        "from:Q",
        scale=alt.Scale(domain=[first - 0.5, last + 0.5], nice=False),
        axis=alt.Axis(title="round", tickMinStep=1, format="d", grid=False),
    )
    axis = alt.Axis(title=None, labelLimit=150, grid=False)
    y = alt.Y("client:N", sort=list(map(plain, names)), axis=axis)
    colour = alt.Color(
        "loss:Q",
        scale=alt.Scale(scheme="viridis", reverse=True, domain=domain, clamp=True),
        legend=alt.Legend(title="loss (nats)", orient="top", gradientLength=180),
    )
    tip = [alt.Tooltip("client:N"), alt.Tooltip("rounds:N", title="round"),
           alt.Tooltip("shown:N", title="loss"), alt.Tooltip("failures:Q")]  # fmt: skip
    layers = [
        alt.Chart(frame_of([c for c in cells if c["loss"] is not None]))
        .mark_rect()
        .encode(x=x, x2="to:Q", y=y, color=colour, tooltip=tip),
        alt.Chart(frame_of([c for c in cells if c["failures"]]))
        .mark_point(shape="cross", angle=45, size=35, color=FAILED, filled=True, opacity=1)
        .encode(x=alt.X("middle:Q"), y=y, tooltip=tip),
    ]
    notes = ["lowest rank first; ×: no usable reply"]
    if joined > 1:
        notes.append(f"each cell is the mean of {joined} rounds")
    if len(order) > len(names):
        notes.append(f"the first {len(names)} of {len(order)} clients")
    chart = _titled(alt.layer(*layers), "Training loss by client and round", "; ".join(notes))
    return chart.properties(height=alt.Step(13))


def client_metrics(results: Results, setting: str, metric: str) -> alt.LayerChart | None:
    """Each client's own metric at its rank, after the last round, and the mean of each rank."""
    words = metric_format(metric)
    frame = _of(results.client_metrics, results, setting)
    frame = _finite(frame[frame["metric"] == metric], "value")
    frame = frame[frame["round"] == frame.groupby(["method", "seed"])["round"].transform("max")]
    if not len(frame):
        return None
    methods = [plain(method) for method in results.methods if method in set(frame["method"])]
    rows = [
        {"series": plain(r.method), "rank": r.rank, "client": plain(r.client), "seed": r.seed,
         "value": r.value * words.factor, "shown": words.show(r.value), "examples": r.examples}
        for r in frame.itertuples()
    ]  # fmt: skip
    values = [row["value"] for row in rows]
    log = _is_log(values, LOG_RATIO.get(metric))
    x = alt.X("rank:O", axis=alt.Axis(title="rank of the client", labelAngle=0, grid=False))
    y = alt.Y("value:Q", scale=_scale(values, log), axis=_axis(words.title, log))
    more = {"xOffset": alt.XOffset("series:N", sort=methods)} if len(methods) > 1 else {}
    every = list(map(plain, results.methods))
    colour = _style("color", alt.Color, every, len(methods) > 1)
    tip = [alt.Tooltip("series:N", title="method"), alt.Tooltip("client:N"),
           alt.Tooltip("shown:N", title=words.name), alt.Tooltip("rank:O"),
           alt.Tooltip("examples:Q"), alt.Tooltip("seed:N")]  # fmt: skip
    chart = alt.layer(
        alt.Chart()
        .mark_point(filled=True, opacity=0.55, size=35)
        .encode(x=x, y=y, color=colour, tooltip=tip, **more),
        alt.Chart()
        .mark_tick(thickness=2.5, size=16)
        .encode(x=x, y=alt.Y("mean(value):Q"), color=colour, **more),
        data=frame_of(rows),
    )
    subtitle = f"on its own test examples, {words.direction}; bar: mean of the rank"
    return _titled(chart, f"{capital(words.name)} of each client", subtitle)


def diagnostics(results: Results, setting: str) -> list[alt.LayerChart]:
    """What the rounds did to the products (docs/diagnostics.md), mean over seeds.

    By round: noise of aggregation and of truncation, drift, effective rank. After the last round:
    noise at each rank, and the energy of each rank dimension.
    """
    frame = results.diagnostics
    frame = frame[(frame["setting"] == setting) & (frame["quantity"] != "layers")]
    if not len(frame):
        return []
    methods = results.methods

    def lines(rows: pd.DataFrame, x: Any, title: str, subtitle: str, y: str, **more: Any) -> Any:
        found = _means(rows["method"], x, rows["value"]).assign(low=math.nan, high=math.nan)
        sizes = found.groupby("series")["value"].max().to_dict()
        zero = [name for name in map(plain, methods) if sizes.get(name) == 0]
        notes = [subtitle, f"0 throughout: {listing(zero)}" if zero else ""]
        return _lines(found, methods, title, "; ".join(filter(None, notes)), y_title=y,
                      show="{:.3g}".format, zero=True, log_ratio=SIZE_RATIO, **more)  # fmt: skip

    charts = []
    for quantity, at, title, y in DIAGNOSTICS:
        rows = frame[(frame["quantity"] == quantity) & (frame["at"] == at)]
        charts.append(lines(rows, rows["round"], title, "", y))
    cuts = frame[frame["quantity"] == "truncation_noise"]
    cuts = cuts.assign(rank=cuts["at"].astype(int))
    lowest = cuts[cuts["rank"] == cuts.groupby("method")["rank"].transform("min")]
    remark = f"at rank {listing(sorted(set(lowest['rank'])))}"
    charts.append(
        lines(lowest, lowest["round"], "Truncation noise, lowest rank", remark, "relative norm")
    )
    last = frame[frame["round"] == frame.groupby(["method", "seed"])["round"].transform("max")]
    cuts, least = (
        last[last["quantity"] == q] for q in ("truncation_noise", "least_truncation_noise")
    )
    least = _means(least["method"], least["at"].astype(int), least["value"])
    charts.append(
        lines(cuts, cuts["at"].astype(int), "Truncation noise by rank",
              "after the last round; dotted: the least possible", "relative norm",
              x_title="rank", log_x=True, dotted=least)
    )  # fmt: skip
    energy = last[last["quantity"].isin(["dimension_energy", "slot_energy"])]
    charts.append(
        lines(energy, energy["at"].astype(int), "Size of each rank dimension",
              "after the last round", "norm of its product", x_title="rank dimension")
    )  # fmt: skip
    return [chart for chart in charts if chart is not None]


def overview(results: Results, setting: str) -> alt.HConcatChart | None:
    """The first metric side by side: at each rank, by round, and the paired differences."""
    panels: list[alt.LayerChart | None] = []
    for metric in results.metrics[:1]:
        panels += [by_rank(results, setting, metric)]
        panels += [by_round(results, setting, metric) or training_loss(results, setting)]
        panels += [differences(results, setting, metric)]
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    chart = _side_by_side(shown, shared=len(results.cells) > 1)
    parts = [setting, plural(len(results.methods), "method"), plural(len(results.seeds), "seed")]
    starts = [cell.history.started for cell in results.cells if cell.history.started]
    for texts in (
        {start.task for start in starts},
        {plural(start.clients, "client") for start in starts},
        {plural(start.rounds, "round") for start in starts},
    ):
        parts += texts if len(texts) == 1 else []
    title = ", ".join(plain(part) for part in parts if part)
    return chart.properties(
        title=alt.TitleParams(title, fontSize=12, fontWeight="normal", color=GREY, anchor="start",
                              offset=16)
    )  # fmt: skip


def diagnostics_overview(results: Results, setting: str) -> alt.ConcatChart | None:
    """All charts of `diagnostics` in one picture."""
    found = diagnostics(results, setting)
    return _side_by_side(found, columns=3, shared=True, width=330) if found else None


def save(chart: alt.TopLevelMixin, path: Path) -> Path:
    """Write a chart as PNG or, by the suffix of ``path``, SVG. Raises `PrelortError`."""
    import vl_convert

    whole = specification(chart)
    if path.suffix == ".svg":
        data = vl_convert.vegalite_to_svg(whole).encode()
    else:
        data = vl_convert.vegalite_to_png(whole, scale=2)
    try:
        write_atomically(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise PrelortError(f"chart {str(path)!r} cannot be written: {reason}") from None
    return path


def specification(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, with its data and the fonts and lines that all charts share."""
    font = "system-ui, 'Noto Sans', 'Liberation Sans', 'DejaVu Sans', sans-serif"
    whole = (
        chart.configure(font=font, background="white", padding=12)
        .configure_view(stroke=None)
        .configure_axis(
            gridColor="#e3e6e9",
            domainColor="#8a929a",
            tickColor="#8a929a",
            labelColor="#3a4148",
            titleColor="#3a4148",
            titleFontWeight="normal",
            labelFontSize=11,
            titleFontSize=12,
        )
        .configure_legend(labelFontSize=12, labelLimit=260, symbolSize=80, symbolStrokeWidth=0)
    )
    with alt.data_transformers.enable("default", max_rows=None):
        return dict(whole.to_dict(validate=False))


def _lines(
    data: pd.DataFrame,
    names: Sequence[str],
    title: str,
    subtitle: str = "",
    *,
    y_title: str,
    show: Callable[[float], str],
    x_title: str = "round",
    log_x: bool = False,
    log_ratio: float | None = None,
    zero: bool = False,
    base: float | None = None,
    dotted: pd.DataFrame | None = None,
    mean: str = "",
    spread: str = "",
    format: str = ".6~g",
) -> alt.LayerChart | None:
    """Lines of ``data`` (series, x, value, low, high), a style for each of ``names``.

    ``log_ratio``: the y axis is logarithmic if values differ by more than this factor. ``zero``:
    else it begins at 0. ``base``: the value of a horizontal rule. ``dotted``: thin lines beside
    those of ``data``. ``mean`` and ``spread``: what the values and low and high are.
    """
    names = [plain(name) for name in names]
    notes = [subtitle]
    step = math.ceil(data["x"].nunique() / MAX_ROUNDS)
    if step > 1:
        data = data[(data["x"].max() - data["x"]) % step == 0]
        notes.append(f"every {step} rounds")
    finite = _finite(data, "value")
    diverged = [n for n in names if n in set(data["series"]) - set(finite["series"])]
    positive = [value for value in finite["value"] if value > 0]
    log = _is_log(positive if zero else list(finite["value"]), log_ratio)
    if log:
        finite = finite[finite["value"] > 0]
    if not len(finite):
        return None
    series = [name for name in names if name in set(finite["series"])]
    spread_shown = "bars" if log_x and len(series) <= MAX_BARS else ""
    spread_shown = "band" if not log_x and len(series) <= MAX_BANDS else spread_shown
    values = list(finite["value"])
    layers: list[alt.Chart] = []
    notes += [f"not finite: {listing(diverged)}"] if diverged else []
    has_spread = bool(spread_shown) and finite["low"].map(math.isfinite).any()
    if has_spread:
        ends = [*finite["low"], *finite["high"]]
        values += [end for end in ends if math.isfinite(end) and (end > 0 or not log)]
    notes.append(spread if has_spread else mean)
    rows = []
    for row in finite.itertuples():
        aside = 0.12 * (series.index(row.series) / max(len(series) - 1, 1) - 0.5)
        dodge = 2**aside if has_spread and log_x and len(series) > 1 else 1
        item = {"series": row.series, "x": row.x, "at": row.x * dodge, "value": row.value}
        item["shown"] = show(row.value)
        if math.isfinite(row.low) and (row.low > 0 or not log):
            item |= {"low": row.low, "high": row.high}
            item["range"] = f"{show(row.low)} to {show(row.high)}"
        rows.append(item)
    beside = [{"series": row.series, "at": row.x, "value": row.value}
              for row in (dotted.itertuples() if dotted is not None else ())
              if row.value > 0 or not log]  # fmt: skip
    values += [row["value"] for row in beside]
    base_rows = []
    if base is not None and math.isfinite(base):
        if _has_room(values, base, log):
            base_rows = [{"value": base, "text": f"untuned base {show(base)}"}]
            values.append(base)
        else:
            notes.append(f"untuned base {show(base)} (off the scale)")
    ticks = sorted({row["x"] for row in rows})
    margin = 2**0.25 if log_x else max(0.5, 0.03 * (ticks[-1] - ticks[0]))
    ends = (
        [ticks[0] / margin, ticks[-1] * margin]
        if log_x
        else [ticks[0] - margin, ticks[-1] + margin]
    )
    x = alt.X(
        "at:Q",
        scale=alt.Scale(domain=ends, nice=False, **({"type": "log", "base": 2} if log_x else {})),
        axis=alt.Axis(
            title=x_title,
            format="d",
            grid=log_x,
            **({"values": ticks} if log_x else {"tickMinStep": 1, "tickCount": 8}),
        ),
    )
    axis = _axis(f"{y_title}, log scale" if log else y_title, log, format)
    scale = _scale(values, log, zero)
    y = alt.Y("value:Q", scale=scale, axis=axis)
    several = len(series) > 1
    name = re.sub(r"\W", "_", title)
    pick = alt.selection_point(name=f"pick_{name}", fields=["series"], bind="legend")
    zoom = alt.selection_interval(name=f"zoom_{name}", bind="scales", zoom="wheel![event.altKey]")
    opacity = alt.condition(pick, alt.value(1), alt.value(0.12)) if several else alt.value(1)
    colour = _style("color", alt.Color, names, several)
    shape = _style("shape", alt.Shape, names, several)
    dash = _style("strokeDash", alt.StrokeDash, names, several)
    tip = [alt.Tooltip("series:N", title=" "), alt.Tooltip("x:Q", title=x_title.split(" ")[0]),
           alt.Tooltip("shown:N", title=y_title)]  # fmt: skip
    if has_spread:
        tip.append(alt.Tooltip("range:N", title="range"))
        low, high = alt.Y("low:Q", scale=scale), alt.Y2("high:Q")
        spreads = alt.Chart(frame_of([row for row in rows if "low" in row]))
        bars = spread_shown == "bars"
        mark = spreads.mark_rule(clip=True) if bars else spreads.mark_area(opacity=0.12, clip=True)
        layers.append(mark.encode(x=x, y=low, y2=high, color=colour))
    if base_rows:
        rule = alt.Chart(frame_of(base_rows))
        layers += [
            rule.mark_rule(color=GREY, strokeDash=[5, 3], clip=True).encode(y=y),
            rule.mark_text(color=GREY, align="left", dy=-6).encode(
                y=y, x=alt.value(4), text="text:N"
            ),
        ]
    frame = frame_of(rows)
    line = alt.Chart(frame).mark_line(strokeWidth=2, clip=True)
    line = line.encode(x=x, y=y, color=colour, strokeDash=dash, opacity=opacity, order="x:Q")
    few = max(sum(row["series"] == name for row in rows) for name in series) <= MAX_POINTS
    point = alt.Chart(frame).mark_point(filled=True, size=45 if few else 25, clip=True)
    visible = opacity if few else alt.value(0)  # points for the tooltips alone
    point = point.encode(x=x, y=y, color=colour, shape=shape, opacity=visible, tooltip=tip)
    if beside:
        thin = alt.Chart(frame_of(beside)).mark_line(strokeWidth=1.3, strokeDash=[2, 2], clip=True)
        layers.append(thin.encode(x=x, y=y, color=colour))
    layers += [line.add_params(zoom, *([pick] if several else [])), point]
    return _titled(alt.layer(*layers), title, "; ".join(filter(None, notes)))


def _style(channel: str, kind: Any, names: Sequence[str], legend: bool) -> Any:
    """The encoding of the series by colour, shape or dash: the same for a name in every chart."""
    ranges: dict[str, list[Any]] = {
        "color": [COLOURS[i % len(COLOURS)] for i in range(len(names))],
        "shape": [SHAPES[(i + i // len(COLOURS)) % len(SHAPES)] for i in range(len(names))],
        "strokeDash": [DASHES[i // len(COLOURS) % len(DASHES)] for i in range(len(names))],
    }
    scale = alt.Scale(domain=list(names), range=ranges[channel])
    shown = alt.Legend(title=None, orient="bottom", columns=5, symbolOpacity=1)
    return kind("series:N", scale=scale, legend=shown if legend else None)


def _is_log(values: Sequence[float], ratio: float | None) -> bool:
    """Whether these values need a logarithmic axis."""
    if ratio is None or not values or min(values) <= 0:
        return False
    return max(values) > ratio * min(values)


def _has_room(values: Sequence[float], base: float, log: bool) -> bool:
    """Whether the base fits without squeezing the curves into a small part of the axis."""
    if log and base <= 0:
        return False
    curves = [math.log(v) if log else v for v in values]
    at = math.log(base) if log else base
    # Curves that hardly differ have no scale of their own: a tenth of their height is one.
    span = max(max(curves) - min(curves), 0.1 * abs(max(curves)))
    return max(*curves, at) - min(*curves, at) <= BASE_ROOM * span


def _scale(values: Sequence[float], log: bool, zero: bool = False) -> alt.Scale:
    """The y scale with a margin around the values."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.05
        return alt.Scale(type="log", domain=[low / margin, high * margin], nice=False)
    if zero:
        return alt.Scale(domain=[0, 1.08 * high if high > 0 else 1], nice=False)
    missing = max(0.0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low))
    margin = 0.06 * (high - low) + missing / 2 or 0.5
    return alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)


def _axis(title: str, log: bool, format: str = ".6~g") -> alt.Axis:
    return alt.Axis(title=title, format=format, tickCount=5 if log else 6)


def _titled(chart: alt.LayerChart, title: str, subtitle: str) -> alt.LayerChart:
    lines = textwrap.wrap(subtitle, 62)
    return chart.properties(title=alt.TitleParams(title, subtitle=lines, **TITLE))


def _side_by_side(
    charts: Iterable[alt.LayerChart], *, shared: bool, columns: int | None = None, width: int = 380
) -> Any:
    """Charts in a row or a grid, with one legend if they share their series."""
    sized = [
        chart if isinstance(chart.height, alt.Step) else chart.properties(width=width, height=290)
        for chart in charts
    ]
    row = (
        alt.hconcat(*sized, spacing=28) if columns is None else alt.concat(*sized, columns=columns)
    )
    how = "shared" if shared else "independent"
    return row.resolve_scale(color=how, shape=how, strokeDash=how)


def frame_of(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a frame: Altair copies lists of values again and again, but no frames."""
    return pd.DataFrame(list(rows))


def _of(frame: pd.DataFrame, results: Results, setting: str) -> pd.DataFrame:
    """The rows of the cells of a setting that count."""
    counted = {(cell.method, cell.seed) for cell in results.counted(setting)}
    keys = zip(frame["setting"], frame["method"], frame["seed"], strict=True)
    return frame.loc[[s == setting and (m, seed) in counted for s, m, seed in keys]]


def _finite(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame.loc[[math.isfinite(value) for value in frame[column]]]


def _means(series: Any, x: Any, value: Any) -> pd.DataFrame:
    """Mean over seeds and a standard deviation to both sides, for each series and x."""
    frame = pd.DataFrame({"series": [plain(name) for name in series], "x": list(x),
                          "value": list(value)})  # fmt: skip
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


def _over_seeds(results: Results) -> dict[str, Any]:
    seeds = len(results.seeds)
    names = {"mean": "mean", "spread": "mean ± standard deviation"}
    return {key: f"{name} over {seeds} seeds" for key, name in names.items() if seeds > 1}


def of_cell(results: Results, cell: CellResult) -> Results:
    """One cell as results of its own."""
    return Results([cell], cell.method, metric=results.metric)
