"""The picture of one setting of a study: rank curves, the way there, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prelort.report.axes import (
    COLOURS,
    GREY,
    finish,
    has_room,
    rank_axis,
    round_axis,
    style,
    value_axis,
    wants_log,
)
from prelort.report.compared.grid import AURAC, Grid
from prelort.report.compared.spread import CONFIDENCE, Spread, difference, spread
from prelort.report.plots import LEGEND_COLUMNS, save
from prelort.report.wording import Wording, capital, plain, wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 6
"""With more methods their bars would cover each other."""

ASIDE = 0.12
"""How far apart the first and the last method's bars of a rank stand, in powers of two."""

FAR = 5.0
"""A difference that many times the median's needs an axis that is linear in the middle only."""

Curve = Mapping[int, Spread]
"""Rank or round to the mean over seeds."""


def picture(grid: Grid, setting: str, path: Path) -> Path:
    """Write the picture of `figure` as a PNG. Raises `PrelortError` where that cannot be."""
    return save(figure(grid, setting), path)


def figure(grid: Grid, setting: str) -> Figure:
    """The first metric of a setting that has a result, 15 inches wide.

    Left: at every rank prefix, mean over seeds, with few methods bars of one standard deviation.
    Middle: by round at the highest rank, or the training loss where nothing was measured on the
    way. Right: the difference of each method's area to the reference's, with its interval and every
    pair.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    words = wording(grid.metrics()[0])
    methods = [method for method in grid.methods if grid.finished(setting, method)]
    looks = {method: _look(index) for index, method in enumerate(grid.methods)}
    legend_rows = math.ceil((len(methods) + 1) / (LEGEND_COLUMNS + 1))
    height = 4.4 + 0.25 * legend_rows + 0.16 * max(0, len(methods) - 8)
    layout = ConstrainedLayoutEngine(wspace=0.05)
    whole = Figure(figsize=(15, height), dpi=150, layout=layout)
    FigureCanvasAgg(whole)
    left, middle, right = whole.subplots(1, 3, width_ratios=(1.1, 1, 0.9))
    _draw_ranks(left, grid, setting, words, methods, looks)
    _draw_rounds(middle, grid, setting, words, methods, looks)
    _draw_differences(right, grid, setting, words, methods, looks)
    seeds = f"{len(grid.seeds)} seed{'s' if len(grid.seeds) != 1 else ''}"
    whole.suptitle(", ".join(filter(None, [plain(setting), seeds])), fontsize=10, color=GREY)
    whole.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=LEGEND_COLUMNS + 1,
        frameon=False,
    )
    return whole


def _draw_ranks(
    axes: Any,
    grid: Grid,
    setting: str,
    words: Wording,
    methods: Sequence[str],
    looks: Mapping[str, dict[str, Any]],
) -> None:
    values: list[float] = []
    ranks = grid.ranks(setting, words.metric)
    for index, method in enumerate(methods):
        found = {
            rank: list(grid.values(setting, method, words.metric, rank).values()) for rank in ranks
        }
        curve = _curve(found, words)
        deviations = [one.deviation or 0.0 for one in curve.values()]
        means = [one.mean for one in curve.values()]
        if not curve:
            continue
        if len(methods) > MOST_BARS:
            axes.plot(list(curve), means, label=plain(method), **looks[method])
            values += means
            continue
        # Side by side, lest the bars cover each other.
        aside = 2 ** (ASIDE * (index - (len(methods) - 1) / 2) / max(len(methods) - 1, 1))
        places = [rank * aside for rank in curve]
        axes.errorbar(
            places, means, yerr=deviations, label=plain(method), capsize=3, **looks[method]
        )
        values += [m + sign * d for m, d in zip(means, deviations, strict=True) for sign in (-1, 1)]
    base = spread(list(grid.base(setting, words.metric).values()))
    positive = [value for value in values if value > 0 or not wants_log(values, words)]
    if base is not None:
        at, text = base.mean * words.factor, f"untuned base: {words.show(base.mean)}"
        if has_room(positive, at, wants_log(positive, words)):
            axes.axhline(at, color=GREY, linestyle=(0, (5, 3)), linewidth=1.4, label=text)
            positive.append(at)
        else:
            axes.plot([], [], " ", label=f"{text} (off the scale)")
    if ranks:
        rank_axis(axes, ranks)
    value_axis(axes, positive, words)
    bars = " ± s.d." if len(methods) <= MOST_BARS else ""
    finish(axes, f"{capital(words.name)} at each rank prefix, mean{bars}")


def _draw_rounds(
    axes: Any,
    grid: Grid,
    setting: str,
    words: Wording,
    methods: Sequence[str],
    looks: Mapping[str, dict[str, Any]],
) -> None:
    measured = {m: _curve(grid.history(setting, m, words.metric), words) for m in methods}
    if any(len(curve) > 2 for curve in measured.values()):
        values = _draw_curves(axes, measured, looks)
        value_axis(axes, values, words)
        finish(axes, f"{capital(words.name)} by round at the highest rank")
    else:
        loss = wording("loss")
        losses = {m: _curve(grid.losses(setting, m), loss) for m in methods}
        _draw_curves(axes, losses, looks)
        axes.set_ylabel("nats")
        finish(axes, "Training loss by round, mean over clients")
    round_axis(axes, "mean over seeds")


def _draw_curves(
    axes: Any, curves: Mapping[str, Curve], looks: Mapping[str, dict[str, Any]]
) -> list[float]:
    values: list[float] = []
    for method, curve in curves.items():
        means = [one.mean for one in curve.values()]
        marks = {"markersize": 4 if len(curve) <= 30 else 0}
        axes.plot(list(curve), means, **looks[method] | marks)
        values += means
    return values


def _draw_differences(
    axes: Any,
    grid: Grid,
    setting: str,
    words: Wording,
    methods: Sequence[str],
    looks: Mapping[str, dict[str, Any]],
) -> None:
    rivals = [method for method in methods if method != grid.reference]
    axes.axvline(0, color=GREY, linewidth=1.2)
    shown: list[str] = []
    means: list[float] = []
    for method in rivals:
        found = [
            apart * words.factor
            for apart in grid.pairs(setting, method, words.metric, AURAC).values()
            if math.isfinite(apart)
        ]
        mean = difference(found)
        if mean is None:
            continue
        row, colour = len(shown), looks[method]["color"]
        shown.append(method)
        means.append(abs(mean.mean))
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [row, row], color=colour, linewidth=2.4)
        axes.plot(found, [row] * len(found), "|", color=colour, markersize=9)
        axes.plot([mean.mean], [row], **looks[method] | {"linestyle": ""})
    middle = statistics.median(means) if means else 0.0
    if middle > 0 and max(means) > FAR * middle:
        # A method that is far off must not press the others into a point.
        axes.set_xscale("symlog", linthresh=middle, linscale=2)
        low, high = axes.get_xlim()
        powers = [10.0**k for k in range(math.floor(math.log10(middle)), 12)]
        near = [step * power for power in powers for step in (1, 2, 5)]
        sizes = [size for size in near if middle / 2 <= size <= 2 * middle]
        sizes += [power for power in powers if power > 2 * middle]
        ticks = [0.0, *sizes, *(-size for size in sizes)]
        shown_ticks = [tick for tick in ticks if low <= tick <= high]
        axes.set_xticks(shown_ticks, [f"{tick:g}" for tick in shown_ticks])
        axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [plain(method) for method in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    worse, better = "worse →", "← better"
    if words.higher_is_better:
        worse, better = "← worse", "better →"
    sides = f"{better}   {worse}" if not words.higher_is_better else f"{worse}   {better}"
    unit = f" ({words.unit})" if words.unit else ""
    axes.set_xlabel(f"{sides} than {plain(grid.reference)}{unit}")
    finish(axes, f"Difference in AURAC, {CONFIDENCE:.0%} interval")


def _curve(found: Mapping[int, Sequence[float]], words: Wording) -> dict[int, Spread]:
    """The finite means in the unit that is shown."""
    curve: dict[int, Spread] = {}
    for at, values in found.items():
        one = spread([value * words.factor for value in values])
        if one is not None and math.isfinite(one.mean):
            curve[at] = one
    return curve


def _look(index: int) -> dict[str, Any]:
    """Colour and marker of a method; from the fifteenth on its line is dashed."""
    return style(index) | ({"linestyle": "--"} if index >= 2 * len(COLOURS) else {})
