"""A table of results: its texts, and how the terminal and Markdown show them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from prelort.report.formatting import MetricFormat
from prelort.report.spread import Difference, Spread


@dataclass(frozen=True, slots=True)
class Column:
    """A column: a heading of two parts, and a text per row, the best ones marked."""

    over: str
    under: str
    texts: list[str]
    best: list[bool]


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table before it is rendered; ``names`` are the headings of its rows."""

    title: str
    names: list[str]
    columns: list[Column]
    notes: list[str]


def plain_column(over: str, under: str, texts: Sequence[str]) -> Column:
    """A column in which no row is best."""
    return Column(over, under, list(texts), [False] * len(texts))


def scored(words: MetricFormat, under: str, means: Sequence[Spread | None]) -> Column:
    """A column of a metric's means; the best are marked."""
    texts = [mean_text(words, mean) for mean in means]
    values = [None if mean is None else mean.mean for mean in means]
    best = best_rows(values, texts, words.higher_is_better)
    return Column(f"{words.short} {words.arrow}", under, texts, best)


def mean_text(words: MetricFormat, mean: Spread | None) -> str:
    """``44.4 ± 0.3``; without a deviation for one value."""
    if mean is None:
        return "–"
    text = words.show(mean.mean)
    if mean.deviation is None or not math.isfinite(mean.mean):
        return text
    return f"{text} ± {mean.deviation * words.factor:.{_digits(mean.mean * words.factor)}f}"


def difference_text(words: MetricFormat, apart: Difference | None) -> str:
    """``+1.25 [+0.40, +2.10]``."""
    if apart is None:
        return "–"
    mean = apart.mean * words.factor
    if not math.isfinite(mean):
        return str(mean)
    if apart.low is None or apart.high is None:
        return f"{mean:+.{_digits(mean)}f}"
    low, high = apart.low * words.factor, apart.high * words.factor
    digits = _digits(max(map(abs, [mean, low, high])))
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _digits(value: float) -> int:
    """Decimals of a value of this size, as `MetricFormat.show` has them."""
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2


def best_rows(values: Sequence[float | None], texts: Sequence[str], highest: bool) -> list[bool]:
    """Which rows to mark: those with the text of the best one, unless all numbers read alike."""
    numbers = {i: v for i, v in enumerate(values) if v is not None}
    finite = {i: v for i, v in numbers.items() if math.isfinite(v)}
    if not finite or len({texts[i] for i in numbers}) < 2:
        return [False] * len(texts)
    winner = (max if highest else min)(finite, key=finite.__getitem__)
    return [i in finite and texts[i] == texts[winner] for i in range(len(texts))]


def to_rich(table: ResultTable) -> Table:
    """A table for the terminal: four ranks and their costs fit into 80 columns."""
    rich = Table(
        title=Text(table.title),
        title_justify="left",
        title_style="bold",
        caption=Text("\n".join(table.notes)) if table.notes else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    rich.add_column("", no_wrap=True)
    for column in table.columns:
        heading = Text(f"{column.over}\n{column.under}".rstrip())
        rich.add_column(heading, justify="right")
    for row, name in enumerate(table.names):
        texts = [Text(c.texts[row], style="bold" if c.best[row] else "") for c in table.columns]
        rich.add_row(Text(name), *texts)
    return rich


def to_markdown(table: ResultTable) -> str:
    """A table as Markdown."""
    headings = [f"{c.over} {c.under}".rstrip() for c in table.columns]
    lines = [f"**{escaped(table.title)}**", "", _row(["", *map(escaped, headings)])]
    lines.append("|---|" + "---:|" * len(headings))
    for row, name in enumerate(table.names):
        texts = [escaped(column.texts[row]) for column in table.columns]
        marked = [
            f"**{t}**" if c.best[row] else t for t, c in zip(texts, table.columns, strict=True)
        ]
        lines.append(_row([escaped(name), *marked]))
    for note in table.notes:
        lines += ["", escaped(note)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no tables, emphasis, code, links or HTML in it."""
    return re.sub(r"([\\|*`]|(?<=\])\()", r"\\\1", text).replace("<", "&lt;")
