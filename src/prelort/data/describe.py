"""Each client's data: a table for the terminal and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from prelort.data.federated import ClientRows, FederatedRows
from prelort.tasks.columns import class_names, class_order

MAX_COLOURS = 20
"""Labels that colours can tell apart; with more, bars are coloured by rank."""
MAX_NAMES, MAX_BARS = 60, 600
"""Legible names and bars; of more clients, every so many is named, and drawn."""
BAR = 18
"""Pixels between two bars, as long as the picture is not wider than `MAX_WIDTH`."""
MIN_WIDTH, MAX_WIDTH = 320, 1200


def summary(rows: FederatedRows, label_column: str | None = None) -> Table:
    """One line per client: name, rank, training and test rows, and its labels.

    The entropy is that of the client's labels in bits: 0 for one label, log2(n) for n equal ones.
    """
    ranks = sorted({client.rank for client in rows.clients})
    table = Table(title="Data of each client", show_footer=True)
    table.add_column("client", "all", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("rank", "-".join(map(str, sorted({ranks[0], ranks[-1]}))), justify="right")
    table.add_column("rows", f"{sum(len(c.train) for c in rows.clients):,}", justify="right")
    table.add_column("test rows", f"{len(rows.test):,}", justify="right")
    counts: Sequence[Counter[str]] = [Counter() for _ in rows.clients]
    if label_column is not None:
        counts = _counts(rows.clients, label_column)
        number, entropy, frequent = _label_cells(sum(counts, Counter()))
        table.add_column("labels", number, justify="right")
        table.add_column("entropy", entropy, justify="right")
        table.add_column("most frequent", frequent, no_wrap=True, overflow="ellipsis")
    for client, count in zip(rows.clients, counts, strict=True):
        test = "-" if client.test is None else f"{len(client.test):,}"
        cells = [escape(client.name), str(client.rank), f"{len(client.train):,}", test]
        table.add_row(*cells, *(_label_cells(count) if label_column is not None else ()))
    if rows.dropped:
        lost = sum(dropped.rows for dropped in rows.dropped)
        table.caption = f"left out: {len(rows.dropped)} more with {lost:,} rows"
    return table


def picture(rows: FederatedRows, label_column: str | None, path: Path) -> None:
    """Save bars of each client's training rows, and the clients' ranks.

    With at most 20 labels the bars are stacked and coloured by label, over a strip coloured by
    rank; else they are coloured by rank. Of more than 600 clients, every so many is drawn.
    ``path``: a .png or .svg file.
    """
    import altair as alt  # not above: it takes half a second

    labels = _labels(rows, label_column)
    number, total = len(rows.clients), sum(len(client.train) for client in rows.clients)
    step = math.ceil(number / MAX_BARS)
    shown = rows.clients[::step]
    title = f"{number:,} clients{f' (one in {step} drawn)' * (step > 1)}, {total:,} training rows"
    width = min(max(BAR * len(shown), MIN_WIDTH), MAX_WIDTH)
    names = [client.name for client in shown[:: math.ceil(len(shown) / MAX_NAMES)]]
    axis = alt.Axis(values=names, labelAngle=-90, labelLimit=140, ticks=False)
    x = alt.X("client:N", sort=None, title=None, axis=axis)
    y = alt.Y("rows:Q", title="training rows", axis=alt.Axis(tickMinStep=1, format=","))
    rank = alt.Color("rank:O", title="rank", sort="descending").scale(scheme="viridis")
    values = [{"client": c.name, "rank": c.rank, "rows": len(c.train)} for c in shown]
    clients = alt.Data(values=values)
    if label_column is None or not labels:
        bars = alt.Chart(clients).mark_bar().encode(x=x, y=y, color=rank)
        chart: alt.TopLevelMixin = bars.properties(width=width, height=300)
    else:
        pieces = [
            {"client": client.name, "label": label, "rows": count[label], "order": number}
            for client, count in zip(shown, _counts(shown, label_column), strict=True)
            for number, label in enumerate(labels)
            if count[label]
        ]
        colours = alt.Scale(
            domain=list(labels), scheme="tableau10" if len(labels) <= 10 else "tableau20"
        )
        stack = alt.Chart(alt.Data(values=pieces)).mark_bar()
        stack = stack.encode(
            x=alt.X("client:N", sort=None, title=None, axis=None),
            y=y.stack("zero"),
            color=alt.Color("label:N", title=label_column, scale=colours),
            order="order:Q",
        )
        strip = alt.Chart(clients).mark_rect().encode(x=x, color=rank)
        chart = alt.vconcat(
            stack.properties(width=width, height=280), strip.properties(width=width, height=14)
        ).resolve_scale(color="independent")
    chart.properties(title=title).save(path, scale_factor=2)


def _labels(rows: FederatedRows, label_column: str | None) -> Sequence[str]:
    """The labels to colour by, in their order; none if they are too many."""
    if label_column is None:
        return ()
    if rows.labels and label_column == rows.label_column:
        labels: Sequence[str] = rows.labels
    else:
        orders = [class_order(client.train, label_column, client.name) for client in rows.clients]
        labels = sorted({name for order in orders for name in order})
    return labels if len(labels) <= MAX_COLOURS else ()


def _counts(clients: Sequence[ClientRows], column: str) -> list[Counter[str]]:
    return [Counter(class_names(client.train, column, client.name)) for client in clients]


def _label_cells(counts: Counter[str]) -> tuple[str, str, str]:
    """How many labels, their entropy, and the three most frequent."""
    total = counts.total()
    entropy = sum(-n / total * math.log2(n / total) for n in counts.values() if n)
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    frequent = ", ".join(f"{_short(name)} {100 * n / total:.0f} %" for name, n in top)
    return str(len(counts)), f"{entropy:.2f}", escape(frequent)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
