"""Drawing charts: lines over ranks and rounds, colours, scales, and files.

pandas and Altair are slow to import: import this module where charts are made.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from prelort.files import write_atomically
from prelort.report.formatting import MetricFormat, listing, plain

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart, without its faint yellow."""

SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right")
GREY = "#5c656e"
FONT = "system-ui, 'Noto Sans', 'Liberation Sans', 'DejaVu Sans', sans-serif"
TITLE: dict[str, Any] = {
    "anchor": "start", "frame": "group", "offset": 10, "fontSize": 13, "subtitleFontSize": 11,
    "subtitleColor": GREY,
}  # fmt: skip

LEGEND_WIDTH, LEGEND_SYMBOL, LETTER_WIDTH = 470, 30, 7
"""Pixels: of a chart's legend, of an entry's symbol, and of a letter of its name."""

MAX_BARS, MAX_BANDS, MAX_POINTS = 6, 5, 30
"""Series with error bars or bands, and points on a line: more would cover each other."""

LEAST_SPAN = 0.05
"""An axis shows at least this share of its values, lest rounding look like a trend."""


def lines(
    data: pd.DataFrame,
    names: Sequence[str],
    title: str,
    form: MetricFormat,
    *notes: str,
    x: str = "round",
    spread: str = "standard deviation",
) -> alt.LayerChart | None:
    """A line for each series of ``data``; None if no value is finite.

    Args:
        data: series, x, value, low and high (NaN: no spread), as stored.
        names: all series, in the order of their styles.
        title: of the chart.
        form: how a value is shown, and the scale of the y axis.
        notes: parts of the subtitle, to which what is left out is added.
        x: title of the x axis; for ``rank`` it is logarithmic, and a spread has bars, not bands.
        spread: what low and high are.
    """
    names, by_rank, remarks = list(map(plain, names)), x == "rank", list(notes)
    text = [form.show(value) for value in data["value"]]
    data = data.assign(shown=text, **{k: data[k] * form.factor for k in ("value", "low", "high")})
    frame = finite(data, "value")
    lost = [name for name in names if name in set(data["series"]) - set(frame["series"])]
    remarks += [f"not finite: {listing(lost)}"] if lost else []
    log = is_log([value for value in frame["value"] if value > 0 or not form.from_zero], form)
    frame = frame[(frame["value"] > 0) | (not log)]
    if not len(frame):
        return None
    series = [name for name in names if name in set(frame["series"])]
    several = len(series) > 1
    spreads = finite(frame, "low") if len(series) <= (MAX_BARS if by_rank else MAX_BANDS) else None
    spreads = frame[:0] if spreads is None else spreads[(spreads["low"] > 0) | (not log)]
    remarks += [f"{'bars' if by_rank else 'band'}: {spread}"] if len(spreads) else []
    values = [*frame["value"], *spreads["low"], *spreads["high"]]
    aside = dict.fromkeys(series, 1.0)
    if by_rank and several and len(spreads):  # lest the bars of a rank cover each other
        aside = {n: 2 ** (0.12 * (i / (len(series) - 1) - 0.5)) for i, n in enumerate(series)}
    frame, spreads = (
        part.assign(at=part["x"] * part["series"].map(aside)) for part in (frame, spreads)
    )
    at = x_axis(sorted(set(frame["x"])), x, by_rank)
    y = y_axis(values, form, log)
    colour = style("color", names, several)

    layers: list[alt.Chart] = []
    if len(spreads):
        bars = alt.Chart(spreads)
        bars = bars.mark_rule(clip=True) if by_rank else bars.mark_area(opacity=0.12, clip=True)
        layers.append(bars.encode(x=at, y="low:Q", y2="high:Q", color=colour))
    key = re.sub(r"\W", "_", title)  # Altair wants names that differ from chart to chart
    pick = alt.selection_point(name=f"pick_{key}", fields=["series"], bind="legend")
    zoom = alt.selection_interval(name=f"zoom_{key}", bind="scales", zoom="wheel![event.altKey]")
    opacity = alt.condition(pick, alt.value(1), alt.value(0.12)) if several else alt.value(1)
    few = frame.groupby("series").size().max() <= MAX_POINTS
    tip = [alt.Tooltip("series:N", title=" "), alt.Tooltip("x:Q", title=x),
           alt.Tooltip("shown:N", title=form.name)]  # fmt: skip
    both = alt.Chart(frame[["series", "x", "at", "value", "shown"]])
    both = both.encode(x=at, y=y, color=colour)
    line = both.mark_line(strokeWidth=2, clip=True).encode(opacity=opacity, order="x:Q")
    point = both.mark_point(filled=True, size=45 if few else 25, clip=True).encode(
        shape=style("shape", names, several),
        opacity=opacity if few else alt.value(0),  # points for the tooltips alone
        tooltip=tip,
    )
    layers += [line.add_params(zoom, *([pick] if several else [])), point]
    return titled(alt.layer(*layers), title, *remarks)


def stacked(
    rounds: pd.DataFrame,
    names: Mapping[str, str],
    title: str,
    show: Callable[[float], str],
    axis: alt.Axis,
    *notes: str,
) -> alt.LayerChart | None:
    """Bars by round of the columns ``names`` (column -> series), one on top of the other."""
    data = rounds.melt("round", list(names), "series", "value")
    data = data.assign(
        series=data["series"].map(names), place=data["series"].map(list(names).index)
    )
    data = finite(data.assign(shown=list(map(show, data["value"]))), "value")
    if not len(data):
        return None
    x = alt.X("round:O", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    tip = [alt.Tooltip("series:N", title=" "), alt.Tooltip("round:O"), alt.Tooltip("shown:N")]
    bars = alt.Chart(data).mark_bar().encode(
        x=x, y=alt.Y("value:Q", axis=axis), order="place:Q", tooltip=tip,
        color=style("color", list(names.values()), True),
    )  # fmt: skip
    return titled(alt.layer(bars), title, *notes)


def style(channel: str, names: Sequence[str], legend: bool) -> Any:
    """The encoding of the series by colour or shape: the same for a name in every chart."""
    count = len(COLOURS)
    kind, values = {
        "color": (alt.Color, [COLOURS[i % count] for i in range(len(names))]),
        "shape": (alt.Shape, [SHAPES[(i + i // count) % count] for i in range(len(names))]),
    }[channel]
    longest = max(map(len, names), default=0)
    columns = max(LEGEND_WIDTH // (LEGEND_SYMBOL + LETTER_WIDTH * min(longest, 21)), 2)
    below = alt.Legend(title=None, orient="bottom", symbolOpacity=1, columns=columns)
    scale = alt.Scale(domain=list(map(plain, names)), range=values)
    return kind("series:N", scale=scale, legend=below if legend else None)


def is_log(values: Sequence[float], form: MetricFormat) -> bool:
    """Whether these values need a logarithmic axis."""
    if form.log_ratio is None or not values or min(values) <= 0:
        return False
    return max(values) > form.log_ratio * min(values)


def x_axis(ticks: Sequence[float], title: str, log: bool) -> alt.X:
    """Ranks with a tick at each, on a log2 axis, or whole rounds; the field is ``at``."""
    low, high = ticks[0], ticks[-1]
    if log:
        scale = alt.Scale(type="log", base=2, domain=[low / 2**0.25, high * 2**0.25], nice=False)
        axis = alt.Axis(title=title, format="d", values=list(ticks))
    else:
        margin = max(0.5, 0.03 * (high - low))
        scale = alt.Scale(domain=[low - margin, high + margin], nice=False)
        few = {"values": list(ticks), "labelOverlap": True} if len(ticks) < 15 else {"tickCount": 8}
        axis = alt.Axis(title=title, format="d", grid=False, tickMinStep=1, **few)
    return alt.X("at:Q", scale=scale, axis=axis)


def y_axis(values: Sequence[float], form: MetricFormat, log: bool) -> alt.Y:
    """An axis with a margin around the values; the field is ``value``."""
    title, low, high = form.title, min(values), max(values)
    if log:
        title, margin = f"{title}, log scale", (high / low) ** 0.05
        scale = alt.Scale(type="log", domain=[low / margin, high * margin], nice=False)
    elif form.from_zero:
        scale = alt.Scale(domain=[0, 1.08 * high if high > 0 else 1], nice=False)
    else:
        missing = max(0.0, LEAST_SPAN * max(abs(low), abs(high)) - (high - low))
        margin = 0.06 * (high - low) + missing / 2 or 0.5
        scale = alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)
    axis = alt.Axis(title=title, format=".6~g", tickCount=5 if log else 6)
    return alt.Y("value:Q", scale=scale, axis=axis)


def titled(chart: alt.LayerChart, title: str, *notes: str) -> alt.LayerChart:
    """The chart with its title, and notes below it."""
    text = textwrap.wrap("; ".join(filter(None, notes)), 62)
    return chart.properties(title=alt.TitleParams(title, subtitle=text, **TITLE))


def side_by_side(charts: Iterable[alt.LayerChart], columns: int, shared: bool) -> Any:
    """Charts in a grid, with one legend if they share their series."""
    sized = [chart.properties(width=360, height=290) for chart in charts]
    how = "shared" if shared else "independent"
    grid = alt.concat(*sized, columns=columns, spacing=28)
    return grid.resolve_scale(color=how, shape=how)


def finite(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows with a finite value in this column."""
    return frame.loc[[math.isfinite(value) for value in frame[column].astype(float)]]


def specification(chart: Any) -> dict[str, Any]:
    """The chart as Vega-Lite, with its data and the fonts and lines that all charts share."""
    grey = {"domainColor": "#8a929a", "tickColor": "#8a929a"}
    ink = {"labelColor": "#3a4148", "titleColor": "#3a4148", "titleFontWeight": "normal"}
    whole = (
        chart.configure(font=FONT, background="white", padding=12)
        .configure_view(stroke=None)
        .configure_axis(gridColor="#e3e6e9", labelFontSize=11, titleFontSize=12, **grey, **ink)
        .configure_legend(labelLimit=150, labelFontSize=12, symbolSize=80, symbolStrokeWidth=0)
    )
    with alt.data_transformers.enable("default", max_rows=None):
        return dict(whole.to_dict(validate=False))


def save(chart: alt.TopLevelMixin, path: Path) -> Path:
    """Write a chart as PNG or, by the suffix of ``path``, SVG. Raises `OSError`."""
    import vl_convert

    whole = specification(chart)
    if path.suffix == ".svg":
        data = vl_convert.vegalite_to_svg(whole).encode()
    else:
        data = vl_convert.vegalite_to_png(whole, scale=2)
    write_atomically(path, data)
    return path
