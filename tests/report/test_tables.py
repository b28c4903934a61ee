import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from prelort.errors import PrelortError
from prelort.report.tables import BASE, blocks, comparison_markdown, comparison_table


def cells(markdown):
    """The rows of the (first) Markdown table: name to cells."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return rows[0], {row[0]: row[1:] for row in rows[2:]}


def shown(table, width=80, colour=True):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=colour).print(table)
    return out.getvalue()


def test_markdown_has_the_base_first_and_the_best_bold(two_runs):
    head, rows = cells(comparison_markdown(two_runs))
    assert head[1:] == [
        "ppl ↓ rank 2", "ppl ↓ rank 4", "ppl ↓ rank 8", "ppl ↓ rank 16", "ppl ↓ AURAC",
        "bytes ↓ up", "bytes ↓ down", "time ↓",
    ]  # fmt: skip
    assert list(rows) == [BASE, "prelort", "zero-padding"]
    assert rows[BASE] == ["700.0"] * 5 + ["–"] * 3
    assert rows["prelort"][:4] == ["27.0", "**24.0**", "**22.0**", "**21.0**"]
    area = (27 / 2 + 24 + 22 + 21 / 2) / 3
    assert rows["prelort"][4] == f"**{area:.1f}**"
    assert rows["zero-padding"][:5] == ["**26.2**", "26.1", "26.1", "26.1", "26.1"]
    # Equal for both, so nothing is best.
    assert rows["prelort"][5:] == rows["zero-padding"][5:] == ["60 kB", "90 kB", "30 s"]


def test_terminal_table_says_the_same_within_80_columns(two_runs):
    table = comparison_table(two_runs)
    assert isinstance(table, Table)
    text = shown(table)
    assert max(len(line) for line in shown(table, colour=False).splitlines()) <= 80
    names = re.findall(r"untuned base|zero-padding|prelort", text)
    assert names == [BASE, "prelort", "zero-padding"]
    bold = re.findall(r"\x1b\[1m *([\d.]+)\x1b", text)
    assert bold == ["24.0", "22.0", "21.0", "23.3", "26.2"]
    assert "lower is better" in text
    assert "perplexity" in text
    assert "…" not in text


def test_higher_is_better_where_it_is(make_run):
    runs = {
        "a": make_run("a", {2: 0.673, 4: 0.7}, base=0.5, metric="accuracy"),
        "b": make_run("b", {2: 0.6, 4: 0.75}, base=0.65, metric="accuracy"),
    }
    head, rows = cells(comparison_markdown({"b": runs["b"]}))
    assert head[1] == "acc ↑ rank 2"
    assert rows[BASE][:3] == ["**65.0**", "65.0", "65.0"]  # worse than the base: it shows
    assert rows["b"][:3] == ["60.0", "**75.0**", "**67.5**"]
    text = comparison_markdown(runs)
    assert "accuracy (%) by rank prefix of the global adapter, higher is better" in text
    assert "untuned bases differ" in text
    assert "untuned bases differ" not in comparison_markdown({"a": runs["a"]})


def test_bold_goes_to_all_that_read_alike_and_never_to_a_diverged_run(make_run):
    runs = {
        "a": make_run("a", {2: 26.11, 4: float("inf")}),
        "b": make_run("b", {2: 26.12, 4: 25.0}),
        "c": make_run("c", {2: 30.0, 4: float("nan")}),
    }
    _, rows = cells(comparison_markdown(runs))
    assert [rows[name][0] for name in "abc"] == ["**26.1**", "**26.1**", "30.0"]
    assert [rows[name][1] for name in "abc"] == ["inf", "**25.0**", "nan"]


def several_metrics(events):
    for event in events:
        for row in [event.get("base", {}), *event.get("prefixes", {}).values()]:
            if row:
                row["macro_f1"] = row["accuracy"] / 2
    return events


def test_several_metrics_a_table_each(make_run):
    events = several_metrics(make_run("a", {2: 0.6, 4: 0.7}, base=0.5, metric="accuracy"))
    both = comparison_markdown({"a": events})
    assert both.count("| untuned base |") == 2
    assert both.index("acc ↑ rank 2") < both.index("F1 ↑ rank 2")
    text = shown(comparison_table({"a": events}), colour=False)
    assert text.count("untuned base") == 2
    assert "macro-F1 (%)" in text
    only = comparison_markdown({"a": events}, metric="macro_f1")
    assert only.count("| untuned base |") == 1
    assert "acc" not in only
    assert "loss ↓" in comparison_markdown({"a": events}, metric="loss")
    with pytest.raises(PrelortError, match="'rouge_l' was not measured: there is accuracy, loss"):
        comparison_table({"a": events}, metric="rouge_l")


def test_a_run_without_prefixes_leaves_the_others_their_area(two_runs, make_run):
    two_runs["flora"] = make_run("flora", {16: 22.4})
    _, rows = cells(comparison_markdown(two_runs))
    assert rows["flora"][:5] == ["–", "–", "–", "22.4", "–"]
    assert rows["prelort"][4] == "**23.3**"


def test_areas_are_over_the_ranks_that_all_runs_have(make_run):
    runs = {
        "a": make_run("a", {2: 40.0, 4: 30.0, 8: 20.0}),
        "b": make_run("b", {4: 28.0, 8: 24.0}),
    }
    text = comparison_markdown(runs)
    _, rows = cells(text)
    assert rows["a"][3] == "**25.0**"
    assert rows["b"][3] == "26.0"
    assert "AURAC over ranks 4 and 8" in text


def test_an_unfinished_run_is_marked_and_wins_no_cost(two_runs, make_run):
    stopped = make_run("prelort", {2: 27.0, 4: 24.0, 8: 22.0, 16: 21.0}, every=2)
    cut = next(i for i, e in enumerate(stopped) if e.get("round") == 6)
    two_runs["stopped"] = stopped[:cut]
    text = comparison_markdown(two_runs)
    head, rows = cells(text)
    assert "\\* stopped: measured after round 4 of 12." in text
    assert rows["stopped *"][5] == "25 kB"
    assert not any("**" in cell for cell in rows["stopped *"][5:])
    assert len(head) == 9


def test_nothing_measured_still_begins_with_the_base(make_run):
    events = make_run("prelort", {2: 27.0})[:1]
    _, rows = cells(comparison_markdown({"prelort": events}))
    assert list(rows) == [BASE, "prelort *"]
    assert "not measured yet" in shown(comparison_table({"prelort": events}), colour=False)
    assert next(iter(cells(comparison_markdown({}))[1])) == BASE


def test_names_cannot_break_the_table(make_run):
    events = make_run("x", {2: 27.0})
    name = "a|b [red]c\x1b[31m\nd"
    [block] = blocks({name: events})
    assert block.names[1] == "a|b [red]c [31m d"
    assert "a\\|b" in comparison_markdown({name: events})
    assert "[red]c" in shown(comparison_table({name: events}), width=120)
