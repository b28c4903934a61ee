"""The numbers of a study against values worked out by hand, its tables and its page."""

import csv
import io
import itertools
import math
import statistics

import pytest
from rich.console import Console
from test_page import Page

from prelort.report.compared import files, page, plots, tables
from prelort.report.compared.grid import AT_CLIENTS, AURAC, Cell, Grid
from prelort.report.compared.progress import CellsProgress
from prelort.report.compared.spread import Spread, difference, spread, warning_of
from prelort.report.wording import wording

PERPLEXITY, ACCURACY = wording("perplexity"), wording("accuracy")
FLAGSHIP = {
    0: {2: 30.0, 4: 26.0, 8: 22.0},
    1: {2: 31.0, 4: 27.0, 8: 23.0},
    2: {2: 35.0, 4: 29.0, 8: 23.0},
}
OTHER = {
    0: {2: 31.0, 4: 30.0, 8: 29.0},
    1: {2: 30.0, 4: 30.0, 8: 30.0},
    2: {2: 36.0, 4: 34.0, 8: 32.0},
}
# Areas over log2(rank): (v2 / 2 + v4 + v8 / 2) / 2.
AREAS = {"prelort": [26.0, 27.0, 29.0], "zero-padding": [30.0, 30.0, 34.0]}


@pytest.fixture
def grid_of(make_run):
    """A grid of these finals: method -> seed -> rank -> value, the same in every setting."""

    def make(finals, settings=("",), *, seeds=(0, 1, 2), extra=(), metric="perplexity", base=150.0):
        cells = [
            Cell(s, m, seed, f"cells/{m}/seed-{seed}",
                 make_run(m, curve, base=base, seed=seed, rounds=4, every=1, metric=metric), 160)
            for s, (m, curves) in itertools.product(settings, finals.items())
            for seed, curve in curves.items()
        ]  # fmt: skip
        names = list(dict.fromkeys([*finals, *(cell.method for cell in extra)]))
        return Grid(names, seeds, settings, "prelort", [*cells, *extra])

    return make


@pytest.fixture
def two(grid_of):
    return grid_of({"prelort": FLAGSHIP, "zero-padding": OTHER})


class TestSpread:
    def test_is_mean_and_sample_deviation(self):
        found = spread([1.0, 2.0, 6.0])
        assert (found.mean, found.count) == (3.0, 3)
        assert found.deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
        assert spread([4.0]) == Spread(4.0, None, 1)
        assert spread([]) is None
        assert spread([1.0, math.inf]) == Spread(math.inf, None, 2)

    def test_the_interval_of_up_to_three_pairs_is_their_range(self):
        for pairs in ([1.0, 3.0], [0.5, -1.0, 4.0]):
            found = difference(pairs)
            assert found.mean == statistics.fmean(pairs)
            assert (found.low, found.high) == pytest.approx((min(pairs), max(pairs)))

    def test_the_interval_of_many_pairs_is_that_of_their_means_distribution(self):
        pairs = [float(n % 10) for n in range(200)]  # s.d. of the mean: 2.87 / sqrt(200)
        found = difference(pairs)
        half = 1.96 * statistics.pstdev(pairs) / math.sqrt(len(pairs))
        assert (found.low, found.high) == pytest.approx((4.5 - half, 4.5 + half), abs=0.03)

    def test_the_same_pairs_have_the_same_interval(self):
        pairs = [0.3, 0.9, 1.4, -0.2, 0.8, 0.1]
        first = difference(pairs)
        difference([5.0, 6.0, 9.0, 1.0])
        assert difference(list(pairs)) == first

    def test_there_is_none_of_one_pair_or_of_what_diverged(self):
        assert difference([2.0]).low is None
        assert difference([2.0, math.inf]).low is None
        assert difference([]) is None

    def test_few_pairs_are_warned_of(self):
        assert "no interval" in warning_of(1)
        assert "10 different resamples" in warning_of(3)  # C(5, 3)
        assert "lowest and the highest" in warning_of(3)
        assert "35 different" in warning_of(4)
        assert "lowest" not in warning_of(4)
        assert warning_of(5) == ""


class TestGrid:
    def test_areas_and_differences_are_paired_by_seed(self, two):
        for method, areas in AREAS.items():
            assert two.values("", method, "perplexity", AURAC) == pytest.approx(
                dict(enumerate(areas))
            )
        assert two.pairs("", "zero-padding", "perplexity", AURAC) == pytest.approx(
            {0: 4, 1: 3, 2: 5}
        )
        assert two.pairs("", "zero-padding", "perplexity", 2) == {0: 1.0, 1: -1.0, 2: 1.0}

    def test_a_seed_that_one_of_them_lacks_is_no_pair(self, grid_of):
        grid = grid_of({"prelort": FLAGSHIP, "zero-padding": {2: OTHER[2], 7: OTHER[0]}})
        assert grid.pairs("", "zero-padding", "perplexity", 8) == {2: 9.0}

    def test_over_settings_a_seed_counts_once(self, grid_of, make_run):
        grid = grid_of({"prelort": FLAGSHIP, "zero-padding": OTHER}, ("a", "b"))
        worse = {seed: {rank: v + 2 for rank, v in c.items()} for seed, c in OTHER.items()}
        cells = [
            Cell("b", "zero-padding", c.seed, "", make_run("zero-padding", worse[c.seed]), 1)
            if (c.setting, c.method) == ("b", "zero-padding")
            else c
            for c in grid.cells
        ]
        grid = Grid(grid.methods, grid.seeds, grid.settings, "prelort", cells)
        assert grid.pairs("b", "zero-padding", "perplexity", AURAC) == pytest.approx(
            {0: 6, 1: 5, 2: 7}
        )
        found = grid.pairs_of_all("zero-padding", "perplexity", AURAC)
        assert found == pytest.approx({0: 5, 1: 4, 2: 6})
        fewer = Grid(grid.methods, grid.seeds, grid.settings, "prelort", cells[:-1])
        assert fewer.pairs_of_all("zero-padding", "perplexity", AURAC).keys() == {0, 1}

    def test_an_unfinished_cell_does_not_count(self, two, make_run):
        half = make_run("zero-padding", OTHER[1])[:-1]
        cells = [
            Cell("", c.method, c.seed, "", half) if (c.method, c.seed) == ("zero-padding", 1) else c
            for c in two.cells
        ]
        grid = Grid(two.methods, two.seeds, two.settings, "prelort", cells)
        assert grid.values("", "zero-padding", "perplexity", 2).keys() == {0, 2}
        assert cells[4].status == "stopped"
        assert "zero-padding, seed 1 | stopped | after round 12 of 12" in tables.markdown(grid, "x")

    def test_costs_are_means_over_the_cells(self, two):
        costs = two.costs("", "prelort")
        assert (costs.bytes_up, costs.bytes_down) == (5000 * 4, 7500 * 4)
        assert costs.passes == 160
        assert costs.train_seconds == pytest.approx(4 * 5 * 0.4)
        assert two.costs("", "unheard of") is None

    def test_a_method_that_trained_on_other_clients_is_named(self, two, make_run):
        other = [
            {**e, "client": "nobody"} if e["event"] == "client_finished" and e["round"] == 2 else e
            for e in make_run("zero-padding", OTHER[1], rounds=4)
        ]
        cells = [*two.cells[:4], Cell("", "zero-padding", 1, "", other), two.cells[5]]
        grid = Grid(two.methods, two.seeds, two.settings, "prelort", cells)
        assert two.unlike("") == []
        assert grid.unlike("") == ["zero-padding"]
        assert "Zero-padding did not train on the same clients' batches" in tables.markdown(
            grid, "x"
        )

    def test_without_a_global_model_there_is_what_clients_measured(self, grid_of, make_run):
        events = [e for e in make_run("fedsa-lora", {8: 1.0}) if e["event"] != "evaluated"]
        own = {c: {"rank": 8, "examples": 4, "metrics": {"perplexity": p}}
               for c, p in (("x", 20.0), ("y", 30.0))}  # fmt: skip
        events.insert(-1, {"event": "evaluated_at_clients", "round": 12, "clients": own})
        grid = grid_of({"prelort": FLAGSHIP}, extra=[Cell("", "fedsa-lora", 0, "", events)])
        assert grid.values("", "fedsa-lora", "perplexity", AT_CLIENTS) == {0: 25.0}
        assert grid.values("", "fedsa-lora", "perplexity", AURAC) == {}
        text = tables.markdown(grid, "x")
        assert "| fedsa-lora * | – | – | – | – | 25.0 |" in text
        assert "fedsa-lora: no global model" in text


class TestTables:
    def test_means_with_deviation_best_in_bold(self, two):
        text = tables.markdown(two, "first")
        row = "| prelort | **32.0 ± 2.6** | **27.3 ± 1.5** | **22.7 ± 0.6** | **27.3 ± 1.5** |"
        assert row in text
        assert "| untuned base | 150.0 ± 0.0 |" in text
        assert "mean ± standard deviation over 3 seeds, lower is better" in text

    def test_differences_say_which_way_is_worse(self, two):
        text = tables.markdown(two, "first")
        assert "+4.00 [+3.00, +5.00]" in text
        assert "above 0 the method is worse" in text
        assert "3 pairs make 10 different resamples" in text

    def test_of_a_metric_where_higher_is_better(self, grid_of):
        finals = {
            "prelort": {0: {2: 0.5, 8: 0.7}, 1: {2: 0.5, 8: 0.75}},
            "zero-padding": {0: {2: 0.45, 8: 0.65}, 1: {2: 0.5, 8: 0.7}},
        }
        grid = grid_of(finals, seeds=(0, 1), metric="accuracy", base=0.1)
        text = tables.markdown(grid, "x")
        assert "above 0 the method is better" in text
        assert "| zero-padding | -2.50 [-5.00, +0.00] | -5.00 [-5.00, -5.00] |" in text
        assert "72.5 ± 3.5" in text

    def test_one_seed_has_neither_deviation_nor_interval(self, grid_of):
        grid = grid_of({"prelort": {0: FLAGSHIP[0]}, "zero-padding": {0: OTHER[0]}}, seeds=(0,))
        text = tables.markdown(grid, "x")
        assert "| zero-padding | +1.00 | +4.00 | +7.00 | +4.00 |" in text
        assert "With fewer than two pairs there is no interval" in text
        assert "±" not in text.replace("mean ± standard", "")

    def test_cells_without_a_result_say_why(self, grid_of):
        extra = [Cell("", "fedit", seed, reason="it needs\none rank") for seed in (0, 1, 2)]
        grid = grid_of({"prelort": FLAGSHIP}, extra=extra)
        text = tables.markdown(grid, "x")
        assert "Cells without a result: 3 of 6 cells" in text
        assert "| fedit, seed 2 | failed | it needs one rank |" in text
        assert "* fedit: 0 of 3 seeds." in text.replace("\\", "")
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(tables.terminal(grid))
        assert "fedit, seed 0 (and 2 others) failed: it needs one rank" in console.export_text()

    def test_before_the_first_result_there_is_still_a_table(self, grid_of):
        grid = grid_of({}, extra=[Cell("", "prelort", 0)])
        assert "| prelort, seed 0 | not begun | – |" in tables.markdown(grid, "x")
        Page(page.render(grid, "x", "", {}))


def test_csv_files_read_back_are_the_events(two):
    rows = list(csv.DictReader(io.StringIO(files.measurements(two))))
    found = {
        (r["method"], int(r["seed"]), int(r["rank"])): float(r["value"])
        for r in rows
        if r["metric"] == "perplexity" and r["round"] == "4"
    }
    assert found == {
        (method, seed, rank): pytest.approx(value)
        for method, finals in (("prelort", FLAGSHIP), ("zero-padding", OTHER))
        for seed, curve in finals.items()
        for rank, value in curve.items()
    }
    summary = {(r["method"], r["at"]): r for r in csv.DictReader(io.StringIO(files.summary(two)))
               if r["metric"] == "perplexity"}  # fmt: skip
    row = summary["zero-padding", "AURAC"]
    assert float(row["difference"]) == pytest.approx(4.0)
    assert (row["seeds"], row["pairs"]) == ("3", "3")
    assert summary["prelort", "AURAC"]["difference"] == ""


HOSTILE = '<script>alert("x")</script>|**'


@pytest.mark.parametrize("metric", ["macro_f1", "rouge_l"])
def test_a_metric_whose_key_is_not_its_name_is_shown(grid_of, metric):
    grid = grid_of({"prelort": FLAGSHIP, "zero-padding": OTHER}, metric=metric)
    assert wording(metric).name != metric
    rows = tables.markdown(grid, "x").splitlines()
    assert all(
        "–" not in row for row in rows if row.startswith(("| prelort |", "| zero-padding |"))
    )
    assert not any("not measured" in row for row in rows)
    assert len(Page(page.render(grid, "x", "", {})).of("figure")) == 3
    ranks, *_ = plots.figure(grid, "").axes
    assert len(ranks.containers) == 2


def test_the_page_is_whole_and_escapes_what_it_is_given(grid_of):
    extra = [Cell("", HOSTILE, 0, reason="<img src=x>")]
    grid = grid_of({"prelort": FLAGSHIP, "zero-padding": OTHER}, extra=extra)
    found = Page(page.render(grid, HOSTILE, f"# {HOSTILE}", {"torch": "2"}))
    assert not found.of("script")
    assert not found.of("img")
    assert {"prelort", "zero-padding", HOSTILE} <= set(found.texts)
    assert "6 of 7 cells finished" in found.texts
    assert len(found.of("figure")) == 3  # by rank, by round, training loss


def test_the_page_has_the_settings_and_their_differences(grid_of):
    grid = grid_of({"prelort": FLAGSHIP, "zero-padding": OTHER}, ("dirichlet 0.1", "iid"))
    found = Page(page.render(grid, "x", "", {}))
    assert {"dirichlet 0.1", "iid", "All settings", "finished: 12 cells"} <= set(found.texts)


class TestPicture:
    def test_a_method_that_is_far_off_does_not_press_the_others_into_a_point(self, grid_of):
        def off(by):
            return {
                seed: {rank: value + by for rank, value in curve.items()}
                for seed, curve in FLAGSHIP.items()
            }

        near = {f"near {by}": off(by) for by in (-1, 1, 2)}
        *_, apart = plots.figure(grid_of({"prelort": FLAGSHIP, **near}), "").axes
        assert apart.get_xscale() == "linear"
        far = {**near, "far": off(500)}
        *_, apart = plots.figure(grid_of({"prelort": FLAGSHIP, **far}), "").axes
        assert apart.get_xscale() == "symlog"
        places = apart.transData.transform([[-1, 0], [1, 0], [2, 0], [500, 0]])[:, 0]
        width = places[-1] - places[0]
        assert places[1] - places[0] > 0.2 * width
        ticks = [float(label.get_text()) for label in apart.get_xticklabels()]
        assert {0, 10, 100} <= set(ticks)

    def test_shows_curves_and_paired_differences(self, two):
        ranks, rounds, apart = plots.figure(two, "").axes
        bars = {b.get_label(): b for b in ranks.containers}
        line = bars["prelort"].lines[0]
        assert list(line.get_ydata()) == pytest.approx([32.0, 82 / 3, 68 / 3])
        middle = [one for one in rounds.lines if len(one.get_xdata()) == 5]
        assert len(middle) == 2
        assert [t.get_text() for t in apart.get_yticklabels()] == ["zero-padding"]
        points = [sorted(one.get_xdata()) for one in apart.lines]
        assert [3.0, 4.0, 5.0] in [pytest.approx(p) for p in points if len(p) == 3]
        assert "← better   worse → than prelort" in apart.get_xlabel()

    def test_can_be_written_for_every_number_of_methods(self, grid_of, tmp_path):
        for count in (1, 2, 19):
            names = ["prelort", *(f"method {n}" for n in range(1, count))]
            grid = grid_of(dict.fromkeys(names, FLAGSHIP))
            path = plots.picture(grid, "", tmp_path / f"{count}.png")
            assert path.read_bytes().startswith(b"\x89PNG")
        looks = [plots._look(index) for index in range(19)]
        keys = [(look["color"], look["markerfacecolor"], look.get("linestyle")) for look in looks]
        assert len(set(keys)) == 19


class TestProgress:
    def lines(self, **options):
        out, now = io.StringIO(), [0.0]
        console = Console(file=out, width=200, force_terminal=False)
        return out, now, CellsProgress(console, 4, clock=lambda: now[0], **options)

    def test_tells_each_cell_and_the_time_left(self):
        out, now, progress = self.lines()
        with progress:
            progress.kept(1)
            progress.began("a")
            now[0] = 10.0
            progress.ended("a", "")
            progress.began("b")
            progress.ended("b", "it [broke]")
        told = out.getvalue().splitlines()
        assert told[0] == "1 of 4 cells are finished already"
        assert told[1] == "a: finished in 10 s; 2 of 4 cells, about 20 s left"
        assert told[2] == "b: failed: it [broke]"

    def test_counts_what_of_a_cell_is_done_in_this_process(self):
        _, now, progress = self.lines()
        with progress:
            progress.kept(2)
            progress.began("a")
            progress.heard("a", {"event": "run_started", "round": 0, "rounds": 10})
            progress.heard("a", {"event": "resumed", "round": 6, "rounds": 10})
            now[0] = 20.0
            progress.heard("a", {"event": "aggregated", "round": 8})
            # 0.2 of a cell took 20 s; 0.2 of it and one more cell are left.
            assert progress._left == pytest.approx(120.0)

    def test_quiet_says_nothing(self):
        out, _, progress = self.lines(quiet=True)
        with progress:
            progress.kept(1)
            progress.began("a")
            progress.ended("a", "why")
        assert out.getvalue() == ""

    def test_draws_bars_on_a_terminal(self):
        out = io.StringIO()
        console = Console(file=out, width=120, force_terminal=True)
        with CellsProgress(console, 2) as progress:
            progress.began("one cell")
            progress.heard("one cell", {"event": "run_started", "round": 0, "rounds": 4})
            progress.heard("one cell", {"event": "aggregated", "round": 1})
            progress._bars.refresh()
        assert "round 1 of 4" in out.getvalue()
        assert "0 of 2 cells" in out.getvalue()
