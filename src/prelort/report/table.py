"""A table of texts, and how it is drawn in the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class Column:
    """A heading of one or two lines, a text for each row, and the rows with the best ones.

    ``prose``: whether the texts may be broken into lines.
    """

    heading: str
    texts: list[str]
    best: frozenset[int] = frozenset()
    prose: bool = False


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table before it is rendered; ``names`` are the headings of its rows."""

    title: str
    names: list[str]
    columns: list[Column]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A table for the terminal; what is wider than that goes on below, so that nothing is cut."""

    table: ResultTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The parts of the table, each with as many columns as fit."""
        left, title, unlimited = self.table.columns, self.table.title, options.update(width=10_000)
        while left:
            for count in range(len(left), 0, -1):
                notes = self.table.notes if count == len(left) else []
                part = to_rich(replace(self.table, title=title, columns=left[:count], notes=notes))
                if Measurement.get(console, unlimited, part).maximum <= options.max_width:
                    break
            yield part
            left, title = left[count:], ""


def to_rich(table: ResultTable) -> Table:
    """A table for a terminal of any width: four ranks and their costs fit into 80 columns."""
    rich = Table(
        title=Text(table.title) if table.title else None,
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
        rich.add_column(Text(column.heading), justify="right", no_wrap=not column.prose)
    for row, name in enumerate(table.names):
        texts = [Text(c.texts[row], style="bold" if row in c.best else "") for c in table.columns]
        rich.add_row(Text(name), *texts)
    return rich


def to_markdown(table: ResultTable) -> str:
    """A table as Markdown."""

    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    headings = [escaped(column.heading.replace("\n", " ")) for column in table.columns]
    lines = [f"**{escaped(table.title)}**", "", row(["", *headings])]
    lines.append("|---|" + "---:|" * len(headings))
    for number, name in enumerate(table.names):
        marks = ["**" if number in column.best else "" for column in table.columns]
        texts = [escaped(column.texts[number]) for column in table.columns]
        cells = (f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True))
        lines.append(row([escaped(name), *cells]))
    return "\n".join([*lines, *(f"\n{escaped(note)}" for note in table.notes)]) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no tables, emphasis, code, links or HTML in it."""
    return re.sub(r"([\\|*`]|(?<=\])\()", r"\\\1", text).replace("<", "&lt;")
