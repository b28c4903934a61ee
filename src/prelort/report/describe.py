"""The clients' data: a table for the terminal and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from prelort.data.federated import ClientRows, FederatedRows
from prelort.report.formatting import plain
from prelort.tasks.columns import class_names, class_order

MAX_LABELS = 20
"""Labels that colours can tell apart; with more, bars are coloured by rank."""


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
    """Save a bar for each client's training rows, and the clients' ranks.

    With at most 20 labels the bars are stacked and coloured by label, over a strip coloured by
    rank; otherwise they are coloured by rank. ``path`` ends with .png or .svg. Raises
    `OSError` if it cannot be written.
    """
    import altair as alt
    import pandas as pd

    from prelort.report.drawing import TITLE, save

    clients = rows.clients
    labels = _labels(rows, label_column)
    order = [plain(client.name) for client in clients]
    total = sum(len(client.train) for client in clients)
    width = min(max(340, 18 * len(clients)), 1200)
    label = alt.Axis(title=None, labelAngle=-90, labelLimit=150, labelOverlap=True)
    hidden = alt.Axis(labels=False, ticks=False, title=None)
    rank = alt.Color("rank:O", sort="descending", scale=alt.Scale(scheme="viridis", reverse=True))

    def x(axis: alt.Axis) -> alt.X:
        return alt.X("client:N", sort=order, axis=axis, scale=alt.Scale(paddingInner=0.15))

    y = alt.Y("sum(rows):Q", axis=alt.Axis(title="training rows", format=",d", tickMinStep=1))
    ranked = pd.DataFrame(
        [{"client": name, "rank": client.rank, "rows": len(client.train)}
         for name, client in zip(order, clients, strict=True)]
    )  # fmt: skip
    title = alt.TitleParams(f"{len(clients)} clients, {total:,} training rows", **TITLE)
    if label_column is None or not labels:
        bars = alt.Chart(ranked, title=title).mark_bar().encode(x=x(label), y=y, color=rank)
        save(bars.properties(width=width, height=300), path)
        return
    held = pd.DataFrame(
        [{"client": name, "label": _plain(text), "rows": counts[text], "order": place}
         for name, counts in zip(order, _counts(clients, label_column), strict=True)
         for place, text in enumerate(labels) if counts[text]]
    )  # fmt: skip
    names = [_plain(text) for text in labels]
    scheme = alt.Scale(scheme="tableau10" if len(names) <= 10 else "tableau20", domain=names[::-1])
    colour = alt.Color("label:N", scale=scheme, title=_plain(label_column))
    bars = alt.Chart(held, title=title).mark_bar()
    bars = bars.encode(x=x(hidden), y=y, color=colour, order="order:O")
    strip = alt.Chart(ranked).mark_rect().encode(x=x(label), color=rank)
    whole = alt.vconcat(
        bars.properties(width=width, height=300), strip.properties(width=width, height=14)
    )
    save(whole.resolve_scale(color="independent", x="shared"), path)


def _labels(rows: FederatedRows, label_column: str | None) -> Sequence[str]:
    """The labels to colour by, in their order; none if they are too many."""
    if label_column is None:
        return ()
    if rows.labels and label_column == rows.label_column:
        labels: Sequence[str] = rows.labels
    else:
        orders = [class_order(client.train, label_column, client.name) for client in rows.clients]
        labels = sorted({name for order in orders for name in order})
    return labels if len(labels) <= MAX_LABELS else ()


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
    return _short(plain(name))
