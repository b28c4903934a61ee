"""How the pictures look: colours, scales and ticks. Axes are matplotlib's, values as shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prelort.report.wording import Wording

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow (faint on
# white). The markers say the same once more, and are hollow from the eighth run on.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
GREY = "#555555"

LOG_SPAN = 4.0
"""Perplexities of which one is more than so many times another are drawn on a log axis."""

SIZE_SPAN = 20.0
"""Sizes of which one is more than so many times another are drawn on a log axis."""

BASE_ROOM = 2.5
"""The base is drawn as a line if the axis need not become more than so many times as long."""

LEAST_SPAN = 0.05
"""An axis shows at least this share of its values' size, lest rounding look like a trend."""


def style(index: int) -> dict[str, Any]:
    """Colour, marker and line of the run with this number."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 6.5,
        "markerfacecolor": colour if index < len(COLOURS) else "white",
        "linewidth": 2.0,
    }


def wants_log(values: Sequence[float], words: Wording) -> bool:
    """Whether these values of a metric need a log axis."""
    return words.metric == "perplexity" and bool(values) and max(values) > LOG_SPAN * min(values)


def has_room(values: Sequence[float], base: float, log: bool) -> bool:
    """Whether the base fits without pressing the runs' curves into a small part of the axis."""
    if not math.isfinite(base) or not values:
        return math.isfinite(base)
    runs = [math.log(v) if log else v for v in values]
    at = math.log(base) if log else base
    # Curves that hardly differ have no scale of their own: a tenth of their height is one.
    span = max(max(runs) - min(runs), 0.1 * abs(max(runs)))
    return max(*runs, at) - min(*runs, at) <= BASE_ROOM * span


def rank_axis(axes: Any, ranks: Sequence[int]) -> None:
    """Log2, with a tick at each rank and nowhere else."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(ranks[0] / 2**0.25, ranks[-1] * 2**0.25)
    axes.set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("rank prefix in use (log scale)")


def round_axis(axes: Any, remark: str = "") -> None:
    """Whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(f"round ({remark})" if remark else "round")


def value_axis(axes: Any, values: Sequence[float], words: Wording) -> None:
    """The metric with its unit and direction; log where it wants that."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    log = wants_log(values, words)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif values:
        low, high = min(values), max(values)
        missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
        if missing > 0:
            axes.set_ylim(low - missing / 2, high + missing / 2)
    axes.set_ylabel(f"{words.title}, {words.direction}{', log scale' if log else ''}")


def size_axis(axes: Any, values: Sequence[float], label: str) -> None:
    """Sizes of something: from 0, or on a log axis where they are of several magnitudes.

    Zeros have no place on a log axis and are not drawn there.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    above = [value for value in values if value > 0]
    if above and max(above) > SIZE_SPAN * min(above):
        axes.set_yscale("log", nonpositive="mask")
        decades = math.log10(max(above) / min(above))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if decades < 3 else (1,), numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{label}, log scale")
    else:
        axes.set_ylim(0, 1.08 * max(above, default=1.0))
        axes.set_ylabel(label)


def finish(axes: Any, title: str) -> None:
    """Title, light grid, no box."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=10)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
