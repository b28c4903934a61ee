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
    table = Table(title="The clients' data", show_footer=True)
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
    """Save a bar for each client's training rows, with its rank below.

    With at most 20 labels the bars are stacked and coloured by label, otherwise coloured by rank.
    ``path`` ends with .png or .svg. Raises `OSError` if it cannot be written.
    """
    import altair as alt
    import pandas as pd

    from prelort.report.drawing import TITLE, save

    labels = list(map(_plain, _labels(rows, label_column)))
    held = []
    for client in rows.clients:
        whole = Counter({"": len(client.train)})
        counts = _counts([client], label_column)[0] if label_column and labels else whole
        name = f"{plain(client.name)}, rank {client.rank}"
        for label, count in counts.items():
            held.append((name, client.rank, _plain(label), count))
    data = pd.DataFrame(held, columns=["client", "rank", "label", "rows"])
    axis = alt.Axis(title=None, labelAngle=-90, labelLimit=180, labelOverlap=True)
    scheme = "tableau10" if len(labels) <= 10 else "tableau20"
    colour = (
        alt.Color(
            "label:N", title=plain(label_column), sort=labels[::-1],
            scale=alt.Scale(scheme=scheme, domain=labels[::-1]),
        )
        if labels
        else alt.Color("rank:O", sort="descending", scale=alt.Scale(scheme="viridis", reverse=True))
    )  # fmt: skip
    total = sum(len(client.train) for client in rows.clients)
    title = alt.TitleParams(f"{len(rows.clients)} clients, {total:,} training rows", **TITLE)
    bars = alt.Chart(data, title=title).mark_bar().encode(
        x=alt.X("client:N", sort=list(data["client"].unique()), axis=axis),
        y=alt.Y("rows:Q", axis=alt.Axis(title="training rows", format=",d", tickMinStep=1)),
        color=colour,
    )  # fmt: skip
    width = min(max(340, 18 * len(rows.clients)), 1200)
    save(bars.properties(width=width, height=300), path)


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
