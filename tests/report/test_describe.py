from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from prelort.data.federated import ClientRows, Dropped, FederatedRows
from prelort.report import describe

pytestmark = pytest.mark.usefixtures("pictures")


def rows_of(clients: dict[str, list[Any]], ranks: list[int] | None = None) -> FederatedRows:
    test = Dataset.from_dict({"label": ["a"]})
    held = tuple(
        ClientRows(name, (ranks or [4, 8])[i % 2], Dataset.from_dict({"label": labels}), None)
        for i, (name, labels) in enumerate(clients.items())
    )
    dropped = (Dropped("tiny", 1, "too few rows"),)
    return FederatedRows(held, test, (), "label", dropped)


def printed(rows: FederatedRows, label_column: str | None) -> list[str]:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(describe.summary(rows, label_column))
    return capture.get().splitlines()


def line(lines: list[str], name: str) -> list[str]:
    (found,) = [text for text in lines if text.startswith("│ " + name)]
    return [cell.strip() for cell in found.strip("│").split("│")]


def test_summary_counts_rows_and_labels() -> None:
    lines = printed(rows_of({"x": ["a"] * 3 + ["b"], "[y]": ["c"] * 1200}), "label")
    assert line(lines, "x") == ["x", "4", "4", "-", "2", "0.81", "a 75 %, b 25 %"]
    assert line(lines, "[y]") == ["[y]", "8", "1,200", "-", "1", "0.00", "c 100 %"]
    assert line(lines, "all")[:6] == ["all", "4-8", "1,204", "1", "3", "0.03"]
    assert lines[-1].strip() == "left out: 1 more with 1 rows"


def test_picture_names_clients_labels_and_ranks(tmp_path: Path) -> None:
    rows = rows_of({"hospital": ["<b>"] * 3, "$x^$": ["$\\no$", "<b>"]})
    describe.picture(rows, "label", tmp_path / "clients.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "clients.svg").read_text())
    for text in ("hospital, rank 4", "$x^$, rank 8", "&lt;b&gt;", "$\\no$",
                 "2 clients, 5 training rows"):  # fmt: skip
        assert text in texts


def test_picture_is_coloured_by_rank_if_there_are_too_many_labels(tmp_path: Path) -> None:
    rows = rows_of({"x": list(range(21)), "y": [1, 2], "z": [3]})
    describe.picture(rows, "label", tmp_path / "many.svg")
    describe.picture(rows, None, tmp_path / "none.svg")
    many, none = (tmp_path / "many.svg").read_text(), (tmp_path / "none.svg").read_text()
    assert many == none
    fills = re.findall(r'aria-roledescription="bar"[^>]*fill="([^"]*)"', many)
    assert fills[0] == fills[2] != fills[1]
