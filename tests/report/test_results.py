"""The data frames of results: values worked out by hand, and the kept studies' numbers again."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from results_of import AREAS, REFERENCE, TWO, runs, study

from histories import FINALS, START, round_diagnostics, run_history, troubled_events
from prelort.events import Evaluated, RunFinished, RunStarted
from prelort.history import RunHistory
from prelort.report.results import AT_CLIENTS, AURAC, CellResult, Results

KEPT = Path(__file__).parents[2] / "benchmarks" / "results" / "studies"


def values(frame, **where):
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return list(frame["value"])


class TestScores:
    def test_areas_and_differences_are_paired_by_seed(self):
        results = study(TWO)
        for method, areas in AREAS.items():
            assert values(results.scores, method=method, metric="perplexity", at=AURAC) == areas
        apart = {"method": "zero-padding", "metric": "perplexity"}
        assert values(results.differences, at=AURAC, **apart) == [4, 3, 5]
        assert values(results.differences, at="2", **apart) == [1, -1, 1]
        assert set(results.differences["method"]) == {"zero-padding"}

    def test_a_seed_that_only_one_method_has_is_no_pair(self):
        results = study({"prelort": REFERENCE, "zero-padding": {2: {8: 32.0}, 7: {8: 1.0}}})
        assert values(results.differences, at="8", metric="perplexity") == [9.0]

    def test_area_is_over_the_ranks_that_all_have_and_one_rank_is_left_aside(self):
        results = runs(
            prelort=run_history(finals={2: 30.0, 4: 20.0, 8: 20.0}),
            wide=run_history(finals={4: 10.0, 8: 20.0}),
            narrow=run_history(finals={2: 25.0}),
        )
        assert results.shared_ranks("", "perplexity") == [4, 8]
        assert values(results.scores, method="prelort", at=AURAC) == [20.0]
        assert values(results.scores, method="wide", at=AURAC) == [15.0]
        assert values(results.scores, method="narrow", at=AURAC) == []
        assert results.places("", "perplexity") == ["2", "4", "8", AURAC]

    def test_clients_own_metrics_are_a_mean_over_clients(self):
        history = run_history(finals={}, own={"json": 3.0, "xml": 9.0})
        results = runs(**{"fedsa-lora": history})
        assert values(results.scores, at=AT_CLIENTS) == [6.0]
        assert results.metrics == ["perplexity"]
        assert results.places("", "perplexity") == [AT_CLIENTS]
        assert results.cells[0].shortfall.startswith("no global model")
        assert set(results.client_metrics["client"]) == {"json", "xml"}

    def test_with_several_seeds_only_finished_cells_count(self):
        results = study(TWO)
        half = replace(results.cells[4], history=run_history("zero-padding", stop=2, every=1))
        cells = [*results.cells[:4], half, *results.cells[5:]]
        assert [c.seed for c in Results(cells, "prelort").counted("", "zero-padding")] == [0, 2]
        alone = Results([half], "zero-padding")
        assert alone.counted("") == [half]
        assert half.shortfall == "measured after round 2 of 4"
        assert len(alone.scores)


class TestFrames:
    def test_every_value_is_in_the_long_frame(self):
        results = runs(prelort=run_history(rounds=3, every=1))
        frame = results.to_pandas()
        assert list(frame.columns) == [
            "setting", "method", "seed", "round", "rank", "metric", "value",
        ]  # fmt: skip
        assert len(frame) == 2 + 4 * len(FINALS) * 2  # base; rounds 0 to 3, two metrics
        assert values(frame, round=3, rank=16, metric="perplexity") == [21.0]

    def test_rounds_have_bytes_and_seconds(self):
        frame = runs(prelort=run_history(failures={2: ["xml"]}, own={"xml": 1.0})).rounds
        assert list(frame["replies"]) == [5, 4, 5, 5]
        assert list(frame["bytes_up"]) == [5000, 4000, 5000, 5000]
        assert list(frame["evaluate_seconds"]) == pytest.approx([0, 0, 0, 0.8])
        assert list(frame["seconds"]) == pytest.approx([2.1, 2.1, 2.1, 2.9])

    def test_clients_are_a_row_each_lowest_rank_first(self):
        results = Results(
            [CellResult("", "prelort", 3, RunHistory.of(troubled_events()))], "prelort"
        )
        rows = {row.client: row for row in results.clients.itertuples()}
        north = rows["clinic-north"]
        assert (north.ranks, north.sampled, north.replies, north.failures) == ("2 → 4", 4, 3, 0)
        assert (north.examples, north.bytes_up, north.seconds) == (40, 3000, 0.5)
        assert north.loss == pytest.approx(2 / 3)
        south = rows["clinic-south"]
        assert (south.replies, south.failures) == (2, 1)
        assert math.isnan(south.loss)
        assert math.isnan(rows["late-comer"].seconds)
        assert list(results.clients["client"])[-1] == "clinic-south"

    def test_diagnostics_by_round_quantity_and_place(self):
        frame = runs(prelort=run_history(diagnostics=round_diagnostics)).diagnostics
        numbers = round_diagnostics(2)
        second = frame[frame["round"] == 2]
        assert values(second, quantity="aggregation_noise") == [numbers["aggregation_noise"]]
        assert values(second, quantity="truncation_noise", at="4") == [0.8]
        assert values(second, quantity="dimension_energy") == numbers["dimension_energy"]
        assert values(frame, round=1, quantity="client_drift") == []  # 0 / 0

    def test_overview_says_where_each_cell_is_and_what_it_cost(self):
        done, half = run_history(), run_history(stop=2)
        cells = [
            CellResult("", "prelort", 0, done),
            CellResult("", "prelort", 1, half),
            CellResult("", "flora", 0, half, reason="out of memory"),
            CellResult("", "flora", 1, RunHistory()),
        ]
        frame = Results(cells, "prelort").overview
        assert list(frame["status"]) == ["finished", "unfinished", "failed", "not started"]
        assert list(frame["rounds"]) == [4, 2, 2, 0]
        assert frame["passes"][0] == done.passes == 4 * 5 * 8
        assert frame["train_seconds"][0] == pytest.approx(4 * 5 * 0.4)
        assert frame["seconds"][0] == pytest.approx(4 * 2.1 + 2 * 0.5)

    def test_other_work_than_the_references_is_named(self):
        results = runs(
            prelort=run_history(), same=run_history("same"), less=run_history(failures={1: ["xml"]})
        )
        assert results.mismatched("") == ["less"]

    def test_nothing_measured_makes_empty_frames(self):
        results = runs(prelort=RunHistory())
        assert results.metrics == []
        for frame in (results.to_pandas(), results.scores, results.summary, results.replies,
                      results.clients, results.diagnostics, results.differences):  # fmt: skip
            assert len(frame) == 0
            assert "method" in frame.columns


class TestSummary:
    def test_by_hand(self):
        frame = study(TWO).summary
        rows = {(row.method, row.at): row for row in frame.itertuples()
                if row.metric == "perplexity"}  # fmt: skip
        assert len(frame) == 2 * 4
        assert rows["prelort", "2"].mean == 32.0
        assert rows["prelort", "2"].deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
        row = rows["zero-padding", AURAC]
        assert (row.difference, row.low, row.high, row.pairs) == (4, 3, 5, 3)
        assert rows["prelort", AURAC].pairs == 0

    @pytest.mark.parametrize("name", ["settings-python", "claim-agnews"])
    def test_reproduces_the_kept_numbers_of_a_study(self, name):
        kept = pd.read_csv(KEPT / name / "summary.csv", keep_default_na=False)
        kept = kept[kept["at"] != AT_CLIENTS].reset_index(drop=True)
        results = of_kept(KEPT / name, kept["metric"][0])
        key = ["setting", "method", "metric", "at"]
        assert results.summary[key].to_numpy().tolist() == kept[key].to_numpy().tolist()
        for column in ("seeds", "mean", "deviation", "pairs", "difference", "low", "high"):
            expected = pd.to_numeric(kept[column])
            assert list(pd.to_numeric(results.summary[column])) == pytest.approx(
                list(expected), rel=1e-12, nan_ok=True
            )


def of_kept(folder, metric):
    """A kept study as histories: its measurements as evaluations."""
    cells = pd.read_csv(folder / "cells.csv", keep_default_na=False)
    measured = pd.read_csv(folder / "measurements.csv", keep_default_na=False)
    by_cell = dict(iter(measured.groupby(["setting", "method", "seed"])))
    found = []
    for cell in cells.itertuples():
        history, rounds = RunHistory(), int(cell.rounds)
        history.apply(RunStarted(0, cell.method, "x", cell.seed, rounds, 1, (4,), time=START))
        for number, rows in by_cell[cell.setting, cell.method, cell.seed].groupby("round"):
            prefixes, base = defaultdict(dict), {}
            for row in rows.itertuples():
                target = base if row.rank in ("base", "0") else prefixes[int(row.rank)]
                target[row.metric] = float(row.value)
            history.apply(Evaluated(int(number), dict(prefixes), 0.1, base or None, time=START))
        if cell.status == "finished":
            history.apply(RunFinished(rounds, time=START))
        found.append(CellResult(cell.setting, cell.method, cell.seed, history))
    return Results(found, "prelort", metric=metric)
