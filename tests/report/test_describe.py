from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from prelort.data import describe
from prelort.data.federated import ClientRows, Dropped, FederatedRows


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


def test_summary_without_labels_has_no_such_columns() -> None:
    lines = printed(rows_of({"x": ["a"]}), None)
    assert line(lines, "x") == ["x", "4", "1", "-"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def legends(figure: Figure) -> dict[str, list[str]]:
    return {
        legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()]
        for legend in figure.legends
    }


def boxes(axes: Axes) -> list[tuple[float, float, tuple[float, ...]]]:
    """Left edge, top and colour of each bar."""
    return [
        (round(path.vertices[:, 0].min(), 3), path.vertices[:, 1].max(), tuple(colour))
        for bars in axes.collections
        for path, colour in zip(
            bars.get_paths(), itertools.cycle(bars.get_facecolor()), strict=False
        )
    ]


@pytest.mark.parametrize("number", [1, 5, 100])
def test_picture_stacks_each_clients_labels(
    tmp_path: Path, figures: list[Figure], number: int
) -> None:
    clients = {f"c{i}": ["a"] * (i + 1) + ["b"] * 2 for i in range(number)}
    describe.picture(rows_of(clients), "label", tmp_path / "who.png")
    (figure,) = figures
    bars, strip = figure.axes
    assert legends(figure)["label"] == ["b", "a"]
    assert legends(figure)["rank"] == (["8", "4"] if number > 1 else ["4"])
    tops: dict[float, float] = {}
    for left, top, _ in boxes(bars):
        tops[left] = max(top, tops.get(left, 0.0))
    assert sorted(tops.values()) == [i + 3 for i in range(number)]
    assert bars.get_ylim()[0] == 0
    assert bars.get_ylim()[1] >= number + 2
    assert len(boxes(strip)) == number
    assert len(strip.get_xticks()) <= describe.MOST_NAMES
    header = (tmp_path / "who.png").read_bytes()[:24]
    width, height = struct.unpack(">II", header[16:])
    assert 1000 <= width <= 2700
    assert 500 <= height <= 1000


def test_picture_colours_by_rank_where_labels_are_too_many(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = rows_of({"x": list(range(21)), "y": [1, 2], "z": [3]})
    describe.picture(rows, "label", tmp_path / "many.svg")
    describe.picture(rows, None, tmp_path / "none.png")
    for figure in figures:
        (bars,) = figure.axes
        assert legends(figure) == {"rank": ["8", "4"]}
        assert [top for _, top, _ in boxes(bars)] == [21, 2, 1]
        colours = [colour for _, _, colour in boxes(bars)]
        assert colours[0] == colours[2] != colours[1]


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path) -> None:
    describe.picture(rows_of({"$x^$": ["$\\no$"], "y": ["b"]}), "label", tmp_path / "who.png")
