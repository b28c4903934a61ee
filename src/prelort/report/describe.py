"""The clients' data: a table for the terminal and a picture."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from prelort.data.federated import FederatedRows
from prelort.report.formatting import plain
from prelort.tasks.columns import class_names

MAX_LABELS = 20
"""Labels that colours can tell apart; with more, bars are coloured by rank."""


def summary(rows: FederatedRows, label_column: str | None = None) -> Table:
    """One line for each client: name, rank, training and test rows, and its labels.

    The entropy is that of the client's labels in bits: 0 for one label, log2(n) for n equal ones.
    """
    clients, counts = rows.clients, _counts(rows, label_column)
    ranks = sorted({client.rank for client in clients})

    def labels(of: Counter[str]) -> list[str]:
        return [str(len(of)), f"{_entropy(of):.2f}", escape(_most_frequent(of))] if counts else []

    whole = f"{sum(len(client.train) for client in clients):,}"
    total = ["all", f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0]), whole]
    total += [f"{len(rows.test):,}", *labels(sum(counts, Counter()))]
    heads = ("client", "rank", "rows", "test rows", "labels", "entropy", "most frequent")
    table = Table(title="The clients' data", show_footer=True)
    for head, footer in zip(heads, total, strict=False):
        text = head in ("client", "most frequent")
        table.add_column(
            head, footer, no_wrap=text, overflow="ellipsis", justify="left" if text else "right",
            max_width=32 if head == "client" else None,
        )  # fmt: skip
    for number, client in enumerate(clients):
        test = "-" if client.test is None else f"{len(client.test):,}"
        cells = [escape(client.name), str(client.rank), f"{len(client.train):,}", test]
        table.add_row(*cells, *(labels(counts[number]) if counts else []))
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

    counts = _counts(rows, label_column)
    names = rows.labels if rows.labels and label_column == rows.label_column else ()
    names = names or tuple(sorted(sum(counts, Counter())))
    if len(names) > MAX_LABELS:
        counts, names = [], ()
    labels = [_short(plain(name)) for name in names]
    bars_of_clients = [
        (f"{plain(client.name)}, rank {client.rank}", client.rank, _short(plain(label)), count)
        for number, client in enumerate(rows.clients)
        for label, count in (counts[number] if counts else {"": len(client.train)}).items()
    ]
    data = pd.DataFrame(bars_of_clients, columns=["client", "rank", "label", "rows"])
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


def _counts(rows: FederatedRows, column: str | None) -> list[Counter[str]]:
    """Each client's labels; none without a column."""
    if column is None:
        return []
    return [Counter(class_names(client.train, column, client.name)) for client in rows.clients]


def _entropy(counts: Counter[str]) -> float:
    total = counts.total()
    return sum(-n / total * math.log2(n / total) for n in counts.values() if n)


def _most_frequent(counts: Counter[str]) -> str:
    total = counts.total()
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    return ", ".join(f"{_short(name)} {100 * n / total:.0f} %" for name, n in top)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
