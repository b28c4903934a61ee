"""Tables of runs and studies: content, marks, notes, and untrusted texts."""

import io
import math
import re
from dataclasses import replace

import pytest
from results_of import OTHER, REFERENCE, TWO, runs, study
from rich.console import Console

from histories import HOSTILE, round_diagnostics, run_history
from prelort.cli.screen import wide_console
from prelort.history import RunHistory
from prelort.report import tables
from prelort.report.results import CellResult, Results
from prelort.report.tables import BASE


def rows_of(table):
    """Row -> its texts, with ** around the best."""
    return {
        name: [f"**{c.texts[row]}**" if row in c.best else c.texts[row] for c in table.columns]
        for row, name in enumerate(table.names)
    }


def heads_of(table):
    return [column.heading.replace("\n", " ") for column in table.columns]


def terminal(results, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.terminal(results))
    return console.file.getvalue()


@pytest.fixture
def two_runs():
    return runs(
        **{
            "prelort": run_history(),
            "zero-padding": run_history(finals={2: 26.2, 4: 26.1, 8: 26.1, 16: 26.1}),
        }
    )


class TestOneSeed:
    def test_base_first_then_the_metric_at_each_rank_area_and_costs(self, two_runs):
        (table,) = tables.of_setting(two_runs, "")
        assert heads_of(table) == [
            "ppl ↓ rank 2", "ppl ↓ rank 4", "ppl ↓ rank 8", "ppl ↓ rank 16", "ppl ↓ AURAC",
            "bytes ↓ up", "bytes ↓ down", "time ↓",
        ]  # fmt: skip
        rows = rows_of(table)
        assert list(rows) == [BASE, "prelort", "zero-padding"]
        assert rows[BASE] == ["150.0"] * 5 + ["–"] * 3
        # The area by hand: (27 / 2 + 24 + 22 + 21 / 2) / 3.
        ours = ["27.0", "**24.0**", "**22.0**", "**21.0**", "**23.3**", "20 kB", "30 kB", "9.4 s"]
        assert rows["prelort"] == ours
        assert rows["zero-padding"][:2] == ["**26.2**", "26.1"]
        assert "lower is better" in table.title
        assert table.notes == []

    def test_terminal_and_markdown_have_the_same_texts_within_80_columns(self, two_runs):
        text = terminal(two_runs)
        assert "…" not in text
        assert re.search(r"prelort +27.0 +24.0 +22.0 +21.0 +23.3 +20 kB +30 kB +9.4 s", text)
        markdown = tables.markdown(two_runs)
        assert "| prelort | 27.0 | **24.0** | **22.0** | **21.0** | **23.3** | 20 kB |" in markdown

    def test_an_unfinished_run_is_marked_and_has_no_best_cost(self, two_runs):
        cells = [two_runs.cells[0], CellResult("", "b", 0, run_history(stop=2, every=2))]
        results = Results(cells, "prelort")
        (table,) = tables.of_setting(results, "")
        assert "b *" in table.names
        assert table.notes == ["* b: measured after round 2 of 4."]
        assert not any("**" in text for text in rows_of(table)["b *"][-3:])
        assert re.search("b, seed 0 +unfinished +after round 2 of 4", terminal(results, 120))

    def test_the_best_are_all_that_read_alike_and_never_a_diverged_run(self):
        results = runs(
            a=run_history(finals={2: 20.001, 4: math.nan}),
            b=run_history(finals={2: 20.0, 4: 30.0}),
            c=run_history(finals={2: 25.0, 4: math.inf}),
        )
        rows = rows_of(tables.of_setting(results, "")[0])
        assert [rows[name][0] for name in "abc"] == ["**20.0**", "**20.0**", "25.0"]
        assert [rows[name][1] for name in "abc"] == ["nan", "**30.0**", "inf"]

    def test_bases_that_differ_are_noted(self):
        results = runs(a=run_history(base=150.0), b=run_history(base=140.0))
        assert any("bases differ" in note for note in tables.of_setting(results, "")[0].notes)

    def test_clients_own_metrics_with_the_worst_client(self):
        own = {"asyncio": 4.0, "json": 9.0, "email": 5.0, "xml": 2.0}
        results = runs(prelort=run_history(finals={2: 27.0, 8: 22.0}, own=own))
        table = tables.of_setting(results, "")[1]
        assert heads_of(table) == [
            "ppl ↓ mean", "ppl ↓ worst", "ppl ↓ rank 2", "ppl ↓ rank 8",
        ]  # fmt: skip
        assert rows_of(table)["prelort"] == ["5.00", "9.00", "5.00", "5.00"]

    def test_nothing_measured_still_has_a_table(self):
        (table,) = tables.of_setting(runs(prelort=run_history(base=None, stop=1)), "")
        assert list(rows_of(table)) == [BASE, "prelort *"]
        assert "measured after round 0 of 4" in table.notes[0]
        assert tables.of_setting(runs(prelort=RunHistory()), "") == []


class TestSeveralSeeds:
    def test_means_with_deviation_and_separate_costs(self):
        scores, apart, costs = tables.of_setting(study(TWO), "")
        rows = rows_of(scores)
        assert rows["prelort"][0] == "**32.0 ± 2.6**"
        assert rows["zero-padding"][-1] == "31.3 ± 2.3"
        assert "over 3 seeds" in scores.title
        assert "whatever the spread" in scores.notes[0]
        assert rows_of(costs)["prelort"] == ["20 kB", "30 kB", "9.4 s", "8 s", "160"]
        assert rows_of(apart) == {
            "zero-padding": ["+0.33 [-1.00, +1.00]", "+4.00 [+3.00, +5.00]",
                             "+7.67 [+7.00, +9.00]", "+4.00 [+3.00, +5.00]"]
        }  # fmt: skip
        assert "above 0 the method is worse" in apart.notes[0]
        assert "3 pairs" in apart.notes[1]

    def test_missing_seeds_are_counted_and_unfinished_cells_explained(self):
        results = study(TWO)
        bad = replace(results.cells[5], history=RunHistory(), reason="out of\x1b[31m memory")
        results = replace(results, cells=[*results.cells[:5], bad])
        scores = tables.of_setting(results, "")[0]
        assert "* zero-padding: 2 of 3 seeds." in scores.notes
        (table,) = tables.unfinished(results)
        assert rows_of(table) == {"zero-padding, seed 2": ["failed", "out of [31m memory"]}
        assert re.search(r"failed +out of \[31m memory", terminal(results, 120))
        assert tables.unfinished(study(TWO)) == []

    def test_over_settings_a_seed_counts_once_with_its_mean(self):
        results = study(TWO, ("a", "b"))
        worse = {seed: {n: v + 2 for n, v in curve.items()} for seed, curve in OTHER.items()}
        shifted = study({"zero-padding": worse}, ("b",)).cells
        results = replace(results, cells=[*results.cells[:9], *shifted])
        (table,) = tables.of_all_settings(results)
        assert heads_of(table) == ["difference a", "difference b", "difference all settings"]
        assert rows_of(table)["zero-padding"] == [
            "+4.00 [+3.00, +5.00]", "+6.00 [+5.00, +7.00]", "+5.00 [+4.00, +6.00]",
        ]  # fmt: skip
        fewer = replace(results, cells=results.cells[:-1])
        (table,) = tables.of_all_settings(fewer)
        assert rows_of(table)["zero-padding"][-1] == "+4.50 [+4.00, +5.00]"
        assert tables.of_all_settings(study(TWO)) == []
        assert "## All settings" in tables.markdown(results)

    def test_other_batches_than_the_references_are_noted(self):
        results = study(TWO)
        lost = run_history("zero-padding", OTHER[0], failures={1: ["xml"]})
        cells = [*results.cells[:3], replace(results.cells[3], history=lost), *results.cells[4:]]
        notes = tables.of_setting(replace(results, cells=cells), "")[0].notes
        assert any(note.startswith("Zero-padding did not train on the same") for note in notes)


class TestDiagnostics:
    def test_numbers_of_the_last_round(self):
        results = runs(
            **{
                "prelort": run_history(rounds=12, diagnostics=round_diagnostics),
                "fedsa-lora": run_history(),
                "flora": run_history(
                    rounds=12, diagnostics=lambda number: round_diagnostics(number, noise=0.0)
                ),
            }
        )
        (table,) = tables.diagnostics(results, "")
        assert heads_of(table) == [
            "noise of averaging", "noise of start", "client drift", "client spread",
            "cut to lowest", "best cut", "eff. rank", "tail kept",
        ]  # fmt: skip
        rows = rows_of(table)
        assert list(rows) == ["prelort", "flora"]
        assert rows["prelort"] == ["0.14", "0.3", "0.027", "0.7", "0.9", "0.63", "7", "0.062"]
        assert rows["flora"][0] == "0"
        assert "After round 12, over 28 of 28 layers." in table.notes


def test_markdown_shows_hostile_names_as_text():
    name = f"a|b*c`d`[x](y) {HOSTILE} \x1b[31m"
    text = tables.markdown(replace(runs(**{name: run_history()}), title=name))
    assert "\x1b" not in text
    assert "<script" not in text
    assert r"a\|b\*c\`d\`[x]\(y) &lt;script>" in text
    tops = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in tops}) == 1


def test_client_table_has_own_metrics_and_who_was_not_sampled():
    results = runs(prelort=run_history(own={"json": 3.0}, failures={2: ["xml"]}))
    (table,) = tables.clients(results)
    row = rows_of(table)["json"]
    assert heads_of(table)[-3:] == ["own ppl ↓", "bytes up", "time"]
    assert row == ["8", "102", "4", "4", "0", "3.97", "3.00", "4 kB", "0.4 s"]
    assert rows_of(table)["xml"][4] == "1"
    assert tables.clients(runs(prelort=RunHistory())) == []


def test_phases_have_their_share():
    (table,) = tables.phases(runs(prelort=run_history()))
    assert rows_of(table) == {
        "train": ["8 s", "85%"], "evaluate": ["1 s", "11%"], "aggregate": ["0.4 s", "4%"],
    }  # fmt: skip
    assert tables.phases(runs(prelort=RunHistory())) == []


def test_the_sentence_of_a_study_claims_no_more_than_the_seeds_show():
    def sentence(finals, reference):
        return tables.summary(replace(study(finals), reference=reference), "")

    best = "prelort has the best mean perplexity over the ranks (AURAC 27.3"
    assert sentence(TWO, "prelort") == f"{best})."
    assert sentence(TWO, "zero-padding") == f"{best}, zero-padding 31.3)."
    mixed = {**TWO, "zero-padding": {**REFERENCE, 0: {2: 29.0, 4: 25.0, 8: 21.0}}}
    assert sentence(mixed, "prelort").endswith("interval of the difference includes 0.")
    assert sentence({"prelort": REFERENCE}, "prelort") == ""


def test_who_holds_what_counts_clients_and_examples_of_each_rank():
    (table,) = tables.holders(study(TWO), "")
    counts, examples, shares = (column.texts for column in table.columns)
    replies = study(TWO).cells[0].history.clients.values()
    trained = [one for one in replies if one.last]
    assert sum(map(int, counts)) == len(trained)
    assert sum(int(text.replace(",", "")) for text in examples) == sum(
        one.last.examples for one in trained
    )
    assert table.names == sorted({f"rank {one.rank}" for one in trained}, key=lambda n: int(n[5:]))
    assert len(shares) == len(table.names)


def test_no_interval_is_broken_in_a_pipe(capsys):
    ranks = {seed: {rank: 900.0 / rank + seed for rank in (2, 4, 8, 16, 32)} for seed in range(6)}
    others = {
        seed: {rank: 2 * value for rank, value in curve.items()} for seed, curve in ranks.items()
    }
    wide_console().print(tables.terminal(study({"prelort": ranks, "a-long-name-for-one": others})))
    (row,) = re.findall("^ *a-long-name.*\\[.*", capsys.readouterr().out, re.MULTILINE)
    assert len(re.findall(r"\[\+\d+\.\d+, \+\d+\.\d+\]", row)) == 6


@pytest.mark.parametrize("width", [40, 60, 80])
def test_nothing_is_cut_on_a_narrow_screen(width):
    results = study(TWO)
    text = terminal(results, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for table in tables.of_setting(results, "", ["perplexity"]):
        for column in table.columns:
            assert all(one in text for one in column.texts)
