"""Who holds what: a table for the terminal and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.markup import escape
from rich.table import Table

from prelort.data.federated import ClientRows, FederatedRows
from prelort.tasks.columns import class_names, class_order

MOST_COLOURS = 20
"""Labels that can be told apart by colour; with more, bars are coloured by rank."""
BAR = 0.85
"""The width of a bar, where 1 leaves no gap."""
MOST_NAMES = 60
"""Clients whose names can be read below their bars; with more, every so many is named."""
Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity, from 0 to 1."""


def summary(rows: FederatedRows, label_column: str | None = None) -> Table:
    """One line a client: name, rank, training and test rows, and what its labels are.

    The entropy is that of the client's labels in bits: 0 for one label, log2(n) for n equal ones.
    """
    table = Table(title="Who holds what", show_footer=True)
    table.add_column("client", "all", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("rank", _ranks_text(rows.clients), justify="right")
    table.add_column("rows", f"{sum(len(c.train) for c in rows.clients):,}", justify="right")
    table.add_column("test rows", f"{len(rows.test):,}", justify="right")
    if label_column is not None:
        everyone: Counter[str] = sum(_counts(rows.clients, label_column), Counter())
        table.add_column("labels", f"{len(everyone)}", justify="right")
        table.add_column("entropy", f"{_entropy(everyone):.2f}", justify="right")
        most = escape(_most_frequent(everyone))
        table.add_column("most frequent", most, no_wrap=True, overflow="ellipsis")
    for client in rows.clients:
        test = "-" if client.test is None else f"{len(client.test):,}"
        cells = [escape(client.name), str(client.rank), f"{len(client.train):,}", test]
        if label_column is not None:
            (counts,) = _counts([client], label_column)
            cells += [f"{len(counts)}", f"{_entropy(counts):.2f}", escape(_most_frequent(counts))]
        table.add_row(*cells)
    if rows.dropped:
        lost = sum(dropped.rows for dropped in rows.dropped)
        table.caption = f"left out: {len(rows.dropped)} more with {lost:,} rows"
    return table


def picture(rows: FederatedRows, label_column: str | None, path: Path) -> None:
    """Save bars of each client's training rows, and the clients' ranks.

    With at most 20 labels the bars are stacked and coloured by label, over a strip coloured by
    rank; else they are coloured by rank. The suffix of ``path`` chooses the format (.png, .pdf,
    .svg).
    """
    clients = rows.clients
    labels = _labels(rows, label_column)
    width = min(max(5.0 + 0.26 * len(clients), 7.0), 18.0)
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    if label_column is not None and labels:
        bars, strip = figure.subplots(2, 1, sharex=True, height_ratios=(14, 1))
        _stack(bars, labels, _counts(clients, label_column), label_column)
        _colour_by_rank(strip, clients, [1] * len(clients), "outside right lower")
        strip.set_ylim(0, 1)
        strip.spines[:].set_visible(False)
        strip.set_yticks([0.5], ["rank"])
        strip.tick_params(axis="both", length=0)
        bars.tick_params(axis="x", bottom=False)
    else:
        bars = strip = figure.subplots()
        heights = [len(client.train) for client in clients]
        _colour_by_rank(bars, clients, heights, "outside right upper")
    total = sum(len(client.train) for client in clients)
    bars.set_title(f"{len(clients)} clients, {total:,} training rows")
    bars.set_ylabel("training rows")
    bars.yaxis.set_major_locator(MaxNLocator(integer=True))
    bars.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bars.grid(axis="y", alpha=0.3)
    bars.set_axisbelow(True)
    bars.spines[["top", "right"]].set_visible(False)
    named = range(0, len(clients), math.ceil(len(clients) / MOST_NAMES))
    texts = [_plain(clients[i].name) for i in named]
    strip.set_xticks(list(named), texts, rotation=90, fontsize=8)
    strip.set_xlim(-0.6, len(clients) - 0.4)
    figure.savefig(path, dpi=150)


def _stack(axes: Axes, labels: Sequence[str], counts: Sequence[Counter[str]], title: str) -> None:
    """A bar a client, in pieces by label, and the legend."""
    colours = colormaps["tab10" if len(labels) <= 10 else "tab20"]
    bottom = [0] * len(counts)
    patches: list[Patch] = []
    for number, label in enumerate(labels):
        heights = [count[label] for count in counts]
        _bars(axes, heights, bottom, [colours(number)])
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        patches.append(Patch(color=colours(number), label=_plain(label)))
    # In the order of the stack, the topmost first.
    axes.figure.legend(handles=patches[::-1], title=_plain(title), loc="outside right upper")


def _colour_by_rank(
    axes: Axes, clients: Sequence[ClientRows], heights: Sequence[int], place: str
) -> None:
    """A bar a client in the colour of its rank, and the legend."""
    levels = sorted({client.rank for client in clients})
    shades = colormaps["viridis_r"].resampled(max(len(levels), 2))
    colours = {rank: shades(number) for number, rank in enumerate(levels)}
    _bars(axes, heights, [0] * len(heights), [colours[c.rank] for c in clients])
    patches = [Patch(color=colours[rank], label=str(rank)) for rank in reversed(levels)]
    axes.figure.legend(handles=patches, title="rank", loc=place)


def _bars(
    axes: Axes, heights: Sequence[int], bottom: Sequence[int], colours: Sequence[Colour]
) -> None:
    """A bar a client, all as one artist: `Axes.bar` would take milliseconds for each."""
    half = BAR / 2
    corners = [
        [(x - half, low), (x - half, low + high), (x + half, low + high), (x + half, low)]
        for x, (high, low) in enumerate(zip(heights, bottom, strict=True))
    ]
    bars = PolyCollection(corners, facecolors=list(colours))
    bars.sticky_edges.y.append(0)
    axes.add_collection(bars)
    axes.autoscale_view()


def _labels(rows: FederatedRows, label_column: str | None) -> Sequence[str]:
    """The labels to colour by, in their order; none if they are too many."""
    if label_column is None:
        return ()
    if rows.labels and label_column == rows.label_column:
        labels: Sequence[str] = rows.labels
    else:
        orders = [class_order(client.train, label_column, client.name) for client in rows.clients]
        labels = sorted({name for order in orders for name in order})
    return labels if len(labels) <= MOST_COLOURS else ()


def _counts(clients: Sequence[ClientRows], column: str) -> list[Counter[str]]:
    return [Counter(class_names(client.train, column, client.name)) for client in clients]


def _entropy(counts: Counter[str]) -> float:
    total = counts.total()
    return sum(-n / total * math.log2(n / total) for n in counts.values() if n)


def _most_frequent(counts: Counter[str]) -> str:
    total = counts.total()
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    return ", ".join(f"{_short(name)} {100 * n / total:.0f} %" for name, n in top)


def _ranks_text(clients: Sequence[ClientRows]) -> str:
    ranks = [client.rank for client in clients]
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _plain(name: str) -> str:
    """A short name whose dollar signs matplotlib does not take for formulas."""
    return _short(name).replace("$", r"\$")
