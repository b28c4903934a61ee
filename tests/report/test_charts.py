"""Charts: valid Vega-Lite with the right data, for one run and for many, and PNG and SVG files."""

import json
import math
import struct
import warnings

import altair as alt
import pytest
from results_of import TWO, runs, study

from histories import FINALS, round_diagnostics, run_history
from prelort.history import RunHistory
from prelort.report import charts, drawing


def spec(chart):
    """The chart as validated Vega-Lite."""
    whole = drawing.specification(chart)
    # Raises where the schema is violated; the data are slow to check.
    alt.Chart.from_dict({**whole, "datasets": {}})
    assert "NaN" not in json.dumps(whole)
    return whole


def rows(chart, *keys):
    """The rows of the data that have these keys, of all layers, each data set once."""
    found = [row for data in spec(chart)["datasets"].values() for row in data]
    return [row for row in found if all(row.get(key) is not None for key in keys)]


def points(chart):
    """Series -> x -> displayed value of the lines."""
    curves = {}
    for row in rows(chart, "series", "x", "value"):
        curves.setdefault(row["series"], {})[row["x"]] = row["value"]
    return curves


def subtitle(chart):
    return " ".join(spec(chart)["title"]["subtitle"])


def encodings(whole, channel):
    """The encodings of a channel in all layers."""
    found = [whole] if isinstance(whole, dict) else []
    for part in found:
        if channel in part.get("encoding", {}):
            yield part["encoding"][channel]
        for key in ("layer", "hconcat", "concat", "vconcat"):
            for inner in part.get(key, ()):
                yield from encodings(inner, channel)


def scale(chart, channel="y"):
    return next(e["scale"] for e in encodings(spec(chart), channel) if "scale" in e)


@pytest.fixture
def single():
    return runs(prelort=run_history(every=1, rounds=12))


class TestByRank:
    def test_has_the_final_values_on_a_log2_axis_with_a_tick_at_each_rank(self, single):
        chart = charts.by_rank(single, "", "perplexity")
        assert points(chart) == {"prelort": FINALS}
        (x, *_) = encodings(spec(chart), "x")
        assert x["axis"]["values"] == [2, 4, 8, 16]
        assert x["scale"]["type"] == "log"
        assert x["scale"]["base"] == 2
        assert "untuned base 150.0" in subtitle(chart)

    def test_several_seeds_have_their_mean_and_deviation(self):
        chart = charts.by_rank(study(TWO), "", "perplexity")
        assert points(chart)["prelort"][2] == 32.0
        (bar,) = [r for r in rows(chart, "low", "x") if (r["series"], r["x"]) == ("prelort", 2)][:1]
        assert bar["high"] - 32.0 == pytest.approx(math.sqrt(7))
        assert "mean over 3 seeds" in subtitle(chart)
        assert "bars: standard deviation" in subtitle(chart)

    def test_values_over_decades_have_a_log_axis_and_diverged_runs_are_named(self):
        results = runs(
            a=run_history(finals={2: 20.0, 4: 19.0}),
            far=run_history(finals={2: 3e5, 4: 2e3}),
            lost=run_history(finals={2: math.nan, 4: math.inf}),
        )
        chart = charts.by_rank(results, "", "perplexity")
        assert scale(chart)["type"] == "log"
        assert set(points(chart)) == {"a", "far"}
        assert "not finite: lost" in subtitle(chart)

    def test_the_rank_of_one_stacked_method_does_not_squeeze_the_others(self):
        named = {f"method {n}": run_history() for n in range(4)}
        results = runs(**named, flora=run_history(finals={**FINALS, 384: 20.0}))
        chart = charts.by_rank(results, "", "perplexity")
        assert 384 not in points(chart)["flora"]
        assert "rank 384: see the table" in subtitle(chart)

    def test_eighteen_methods_look_different(self):
        results = runs(**{f"method {n}": run_history() for n in range(18)})
        whole = spec(charts.by_rank(results, "", "perplexity"))
        ranges = [next(encodings(whole, c))["scale"]["range"] for c in ("color", "shape")]
        assert len(set(zip(*ranges, strict=True))) == 18


class TestByRound:
    def test_one_run_has_a_line_for_each_rank(self, single):
        found = points(charts.by_round(single, "", "perplexity"))
        assert list(found) == ["rank 2", "rank 4", "rank 8", "rank 16"]
        assert found["rank 16"][12] == 21.0
        assert len(found["rank 16"]) == 13

    def test_several_runs_have_a_line_each_at_the_highest_rank(self):
        results = study(TWO, every=1)
        found = points(charts.by_round(results, "", "perplexity"))
        assert found["prelort"][4] == pytest.approx((22 + 23 + 23) / 3)
        assert charts.by_round(study(TWO), "", "perplexity") is None  # measured at both ends only

    def test_training_loss_of_one_run_has_its_clients_range(self):
        results = runs(a=run_history(finals={2: 27.0, 8: 22.0}))
        chart = charts.training_loss(results, "")
        first = [
            row for row in rows(chart, "low", "x") if (row["series"], row["x"]) == ("rank 2", 1)
        ]
        # asyncio, json and xml: 3 + 3.2 * 0.7 + 0, 0.2 and 0.4
        assert (first[0]["low"], first[0]["value"], first[0]["high"]) == pytest.approx(
            (5.24, 5.44, 5.64)
        )
        assert "lowest to highest" in subtitle(chart)

    def test_bytes_and_time(self):
        results = runs(a=run_history(failures={2: ["xml"]}))
        bars = {(r["series"], r["round"]): r["value"] for r in rows(charts.traffic(results))}
        assert bars["up, from the clients", 2] == 4000
        assert bars["down, to the clients", 2] == 7500
        phases = {row["series"] for row in rows(charts.time_by_phase(results))}
        assert phases == {"train", "aggregate", "evaluate"}


class TestDifferences:
    def test_mean_interval_and_every_pair(self):
        chart = charts.differences(study(TWO), "", "perplexity")
        (mean,) = list(rows(chart, "low", "shown"))[:1]
        assert (mean["value"], mean["low"], mean["high"]) == (4, 3, 5)
        assert sorted({row["value"] for row in rows(chart, "shown")}) == [3, 4, 5]
        assert charts.differences(runs(a=run_history(), b=run_history()), "", "perplexity") is None

    def test_a_method_that_is_far_off_does_not_squeeze_the_others(self):
        near = {f"near {n}": {0: {2: 31.0 + n}, 1: {2: 32.0 + n}} for n in range(3)}
        finals = {"prelort": {0: {2: 30.0}, 1: {2: 30.0}}, **near}
        far = study({**finals, "far": {0: {2: 9e3}, 1: {2: 9e3}}})
        scales = [e["scale"]["type"] for e in
                  encodings(spec(charts.differences(far, "", "perplexity")), "x")
                  if "type" in e.get("scale", {})]  # fmt: skip
        assert set(scales) == {"symlog"}
        assert "type" not in scale(charts.differences(study(finals), "", "perplexity"), "x")


class TestClients:
    def test_heat_map_has_a_cell_for_each_reply_and_marks_failures(self):
        history = run_history(failures={2: ["xml"]}, loss=lambda n, place, rank: n + place)
        found = rows(charts.client_losses(runs(a=history)), "client", "rounds")
        assert len([row for row in found if row["loss"] is not None]) == 4 * 5 - 1
        assert {(r["client"], r["rounds"]) for r in found if r["bad"]} == {("xml", "2")}
        nothing = run_history(clients=["json"], rounds=1, failures={1: ["json"]})
        assert [row["bad"] for row in rows(charts.client_losses(runs(a=nothing)), "bad")] == [1]

    def test_heat_map_of_many_rounds_and_clients_stays_small(self):
        names = [f"client-{n:03d}" for n in range(120)]
        history = run_history(clients=names, rounds=100, finals={2: 1.0})
        chart = charts.client_losses(runs(a=history))
        assert len(rows(chart, "loss")) <= charts.MAX_CELLS
        assert "first 100 of 120 clients" in subtitle(chart)
        assert "mean of 3 rounds" in subtitle(chart)

    def test_own_metrics_by_rank(self):
        history = run_history(own={"json": 3.0, "xml": 9.0})
        found = rows(charts.client_metrics(runs(a=history), "", "perplexity"), "client")
        assert {(row["client"], row["value"]) for row in found} == {("json", 3.0), ("xml", 9.0)}
        assert charts.client_metrics(runs(a=run_history()), "", "perplexity") is None


class TestDiagnostics:
    def test_six_charts_with_the_rounds_numbers(self):
        results = runs(
            a=run_history(rounds=12, diagnostics=round_diagnostics),
            none=run_history(rounds=12, diagnostics=lambda n: round_diagnostics(n, noise=0.0)),
        )
        noise, drift, rank, lowest, cuts, energy = charts.diagnostics(results, "")
        assert points(noise)["a"][12] == pytest.approx(0.5 * 0.9**12)
        assert "0 throughout: none" in subtitle(noise)
        assert 1 not in points(drift)["a"]
        assert points(rank)["a"][3] == 7
        assert points(lowest)["a"][5] == 0.9
        assert points(cuts)["a"] == {2: 0.9, 4: 0.8, 8: 0.6, 16: 0.0}
        assert {row["x"]: row["low"] for row in rows(cuts, "low")}[2] == pytest.approx(0.63)
        assert len(points(energy)["a"]) == 16

    def test_undefined_numbers_leave_the_charts_that_have_some(self):
        def empty(number):
            levels = dict.fromkeys(("2", "4"))
            return {"layers": {"measured": 0, "of": 0}, "aggregation_noise": None,
                    "client_drift": {"mean": None}, "effective_rank": 1.0, "dimension_energy": [],
                    "truncation_noise": levels, "least_truncation_noise": levels}  # fmt: skip

        assert len(charts.diagnostics(runs(a=run_history(diagnostics=empty)), "")) == 1
        assert charts.diagnostics(runs(a=run_history()), "") == []


@pytest.mark.parametrize("count", [1, 2, 18])
def test_pictures_of_any_number_of_methods(tmp_path, count):
    results = runs(**{f"method {n}": run_history(every=1) for n in range(count)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Altair complains about parameters with the same name
        path = drawing.save(charts.overview(results, ""), tmp_path / "rank_curves.png")
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG")
    assert 1500 < width < 3200
    assert 600 < height < 1400


def test_svg_and_names_as_text(tmp_path):
    results = runs(**{"<script>x": run_history(), "b": run_history()})
    path = drawing.save(charts.by_rank(results, "", "perplexity"), tmp_path / "chart.svg")
    text = path.read_text()
    assert text.startswith("<svg")
    assert "<script" not in text
    assert "&lt;script&gt;x" in text


def test_nothing_measured_has_no_charts():
    empty = runs(a=RunHistory())
    assert charts.overview(empty, "") is None
    assert charts.diagnostics_overview(empty, "") is None
    assert charts.training_loss(empty, "") is None
    for build in (charts.traffic, charts.time_by_phase, charts.client_losses):
        assert build(empty) is None
