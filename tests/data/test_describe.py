from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from prelort.data import describe
from prelort.data.federated import ClientRows, Dropped, FederatedRows


def rows_of(clients: dict[str, list[Any]]) -> FederatedRows:
    held = tuple(
        ClientRows(name, [4, 8][i % 2], Dataset.from_dict({"label": labels}), None)
        for i, (name, labels) in enumerate(clients.items())
    )
    test = Dataset.from_dict({"label": ["a"]})
    return FederatedRows(held, test, (), "label", (Dropped("tiny", 1, "too few rows"),))


def printed(rows: FederatedRows, label_column: str | None) -> dict[str, list[str]]:
    """The cells of each line of the table, by its first cell."""
    console = Console(width=160)
    with console.capture() as capture:
        console.print(describe.summary(rows, label_column))
    assert "left out: 1 more with 1 rows" in capture.get()
    lines = [line.strip("│").split("│") for line in capture.get().splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_summary_counts_rows_and_labels() -> None:
    lines = printed(rows_of({"x": ["a"] * 3 + ["b"], "[y]": ["c"] * 1200}), "label")
    assert lines["x"] == ["4", "4", "-", "2", "0.81", "a 75 %, b 25 %"]
    assert lines["[y]"] == ["8", "1,200", "-", "1", "0.00", "c 100 %"]
    assert lines["all"][:5] == ["4-8", "1,204", "1", "3", "0.03"]


def test_summary_without_labels_has_no_such_columns() -> None:
    assert printed(rows_of({"x": ["a"]}), None)["x"] == ["4", "1", "-"]


def bars(svg: str) -> list[tuple[str, str, int]]:
    """The client, label (or rank) and rows of each bar, from its description."""
    return [
        (client, colour, int(rows))
        for client, rows, colour in re.findall(
            r'aria-label="client: ([^;"]*); training rows: (\d+); (?:label|rank): ([^;"]*)', svg
        )
    ]


def test_picture_stacks_each_clients_labels_and_shows_its_rank(tmp_path: Path) -> None:
    clients = {"$x^$": ["a"] * 3 + ["b"], "y": ["b"] * 2}
    describe.picture(rows_of(clients), "label", tmp_path / "clients.svg")
    svg = (tmp_path / "clients.svg").read_text()
    assert sorted(bars(svg)) == [("$x^$", "a", 3), ("$x^$", "b", 1), ("y", "b", 2)]
    assert re.findall(r'aria-label="client: ([^;"]*); rank: (\d)', svg) == [
        ("$x^$", "4"),
        ("y", "8"),
    ]
    assert "2 clients, 6 training rows" in svg


@pytest.mark.parametrize("column", ["label", None])
def test_picture_colours_by_rank_without_labels_or_with_too_many(
    tmp_path: Path, column: str | None
) -> None:
    describe.picture(rows_of({"x": list(range(21)), "y": [1, 2]}), column, tmp_path / "c.svg")
    assert bars((tmp_path / "c.svg").read_text()) == [("x", "4", 21), ("y", "8", 2)]


def test_many_clients_make_a_picture_of_limited_size(tmp_path: Path) -> None:
    rows = rows_of({f"c{i}": ["a"] for i in range(2 * describe.MAX_BARS)})
    describe.picture(rows, None, tmp_path / "clients.svg")
    svg = (tmp_path / "clients.svg").read_text()
    assert len(bars(svg)) == describe.MAX_BARS
    assert "(one in 2 drawn)" in svg
    describe.picture(rows_of({"x": ["a"]}), None, tmp_path / "clients.png")
    width, height = struct.unpack(">II", (tmp_path / "clients.png").read_bytes()[16:24])
    assert 600 < width < 3000
    assert 600 < height < 1500
