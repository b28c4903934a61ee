"""Diagnostics in the reader, in the table and in the picture."""

import math
import re

import pytest
from test_plots import drawn_ticks, legend, texts_that_clash
from test_tables import cells, shown

from prelort.errors import PrelortError
from prelort.report.events import diagnostics, phases
from prelort.report.plots import diagnostic_curves, diagnostic_figure
from prelort.report.tables import diagnostics_markdown, diagnostics_table

LEVELS = ("2", "4", "8", "16")


def numbers(at, noise=0.5, collapse=1.0, layers=28, drift=0.4):
    """The diagnostics of a round: noise falls, and ranks collapse if they are to."""
    first = at == 1
    cuts = [0.9, 0.8, 0.6, 0.0]
    return {
        "layers": {"measured": layers, "of": 28},
        "aggregation_noise": noise * 0.9**at,
        "client_dispersion": 0.7,
        "initialization_noise": {"mean": None if first else 0.3, "max": None if first else 0.9},
        "client_drift": {"mean": None if first else drift * 0.8**at, "deviation": None},
        "truncation_noise": dict(zip(LEVELS, [c * collapse**at for c in cuts], strict=True)),
        "least_truncation_noise": dict(
            zip(LEVELS, [0.7 * c * collapse**at for c in cuts], strict=True)
        ),
        "effective_rank": 1 + 6 * collapse**at,
        "energy_share": dict(zip(LEVELS, [0.7, 0.15, 0.1, 0.05], strict=True)),
        "slot_energy": [0.5 * collapse ** (at * dimension / 4) for dimension in range(16)],
        "tail_kept": dict(zip(LEVELS, [1.0, 0.9, 0.5, 0.0625], strict=True)),
    }


@pytest.fixture
def make_diagnosed(make_run):
    def make(name, rounds=12, **more):
        events = make_run(name, {2: 27.0, 4: 24.0, 8: 22.0, 16: 21.0}, rounds=rounds)
        for event in events:
            if event["event"] == "aggregated":
                event["diagnostics"] = numbers(event["round"], **more)
                event["seconds"]["diagnose"] = 0.25
        return events

    return make


@pytest.fixture
def diagnosed_runs(make_diagnosed, make_run):
    return {
        "prelort": make_diagnosed("prelort"),
        "zero-padding": make_diagnosed("zero-padding", collapse=0.7),
        "fedsa-lora": make_run("fedsa-lora", {2: 27.0}),
        "flora": make_diagnosed("flora", noise=0.0),
    }


# Reading


def test_rounds_to_their_numbers(make_diagnosed):
    found = diagnostics(make_diagnosed("prelort"))
    assert list(found) == list(range(1, 13))
    assert found[3] == numbers(3)


def test_of_a_resumed_run_each_round_once(make_diagnosed):
    events = make_diagnosed("prelort")
    cut = next(i for i, e in enumerate(events) if e.get("round") == 7)
    before = [dict(e) for e in events[:cut]]
    for event in before:
        if event["event"] == "aggregated" and event["round"] > 4:
            event["diagnostics"] = {"aggregation_noise": "no longer counts"}
    again = next(i for i, e in enumerate(events) if e.get("round") == 5)
    log = [*before, {"event": "resumed", "round": 4}, *events[again:]]
    assert diagnostics(log) == diagnostics(events)
    end = next(i for i, e in enumerate(log) if e["event"] == "resumed") + 1
    assert list(diagnostics(log[:end])) == [1, 2, 3, 4]


def test_rounds_without_any_are_passed_over(make_run, make_diagnosed):
    assert diagnostics(make_run("old", {2: 27.0})) == {}
    events = make_diagnosed("prelort", rounds=3)
    for event in events:
        if event["event"] == "aggregated" and event["round"] < 3:
            event["diagnostics"] = {"failed": "RuntimeError: no"} if event["round"] == 1 else None
    assert list(diagnostics(events)) == [3]


def test_their_time_is_a_phase_where_it_was_taken(make_run, make_diagnosed):
    assert "diagnose" not in phases(make_run("old", {2: 27.0}))
    assert phases(make_diagnosed("prelort"))["diagnose"] == pytest.approx(12 * 0.25)


# The table


def test_the_last_rounds_numbers(diagnosed_runs):
    text = diagnostics_markdown(diagnosed_runs)
    head, rows = cells(text)
    assert head[1:] == [
        "noise of averaging", "noise of start", "client drift", "client spread",
        "cut to lowest", "best cut", "eff. rank", "tail kept",
    ]  # fmt: skip
    assert list(rows) == ["prelort", "zero-padding", "flora"]
    assert rows["prelort"] == ["0.14", "0.3", "0.027", "0.7", "0.9", "0.63", "7", "0.062"]
    assert rows["flora"][0] == "0"
    assert "**" not in "".join(rows["prelort"])  # these are no merits
    assert "After round 12, over 28 of 28 layers." in text


def test_the_terminal_says_the_same_within_80_columns(diagnosed_runs):
    text = shown(diagnostics_table(diagnosed_runs), colour=False)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert re.search(r"zero-padding +0\.14 +0\.3 +0\.027 +0\.7", text)
    assert "…" not in text


def test_what_is_not_defined_is_a_dash(make_diagnosed):
    runs = {"a": make_diagnosed("a", rounds=1, layers=1)}
    (found,) = diagnostics(runs["a"]).values()
    found["tail_kept"] = dict.fromkeys(LEVELS)
    text = diagnostics_markdown(runs)
    _, rows = cells(text)
    assert rows["a"][1:3] == ["–", "–"]
    assert rows["a"][-1] == "–"
    assert "After round 1, over 1 of 28 layers." in text


def test_an_adapter_without_layers(make_diagnosed):
    runs = {"a": make_diagnosed("a", rounds=2)}
    for event in runs["a"]:
        if "diagnostics" in event:
            found = event["diagnostics"]
            found |= dict.fromkeys(["aggregation_noise", "effective_rank", "client_dispersion"])
            for key in ("client_drift", "initialization_noise", "truncation_noise"):
                found[key] = dict.fromkeys(found[key])
            for key in ("least_truncation_noise", "tail_kept", "energy_share"):
                found[key] = dict.fromkeys(found[key])
            found["slot_energy"] = []
    _, rows = cells(diagnostics_markdown(runs))
    assert set(rows["a"]) == {"–"}
    assert texts_that_clash(diagnostic_figure(runs)) == []


def test_nothing_diagnosed_is_said(make_run, tmp_path):
    runs = {"old": make_run("old", {2: 27.0})}
    with pytest.raises(PrelortError, match="no run was diagnosed"):
        diagnostics_table(runs)
    with pytest.raises(PrelortError, match="nothing to draw"):
        diagnostic_curves(runs, tmp_path / "d.png")


# The picture


def test_writes_a_png(tmp_path, diagnosed_runs):
    path = diagnostic_curves(diagnosed_runs, tmp_path / "diagnostics.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PrelortError, match=r"gone.*cannot be written: No such file"):
        diagnostic_curves(diagnosed_runs, tmp_path / "gone" / "diagnostics.png")


def drawn(axes):
    return [line for line in axes.lines if len(line.get_xdata())]


def test_the_panels(diagnosed_runs):
    figure = diagnostic_figure(diagnosed_runs)
    noise, truncation, drift, effective, cuts, dimensions = figure.axes
    assert legend(figure) == ["prelort", "zero-padding", "flora"]

    prelort, *_ = drawn(noise)
    assert list(prelort.get_xdata()) == list(range(1, 13))
    assert list(prelort.get_ydata()) == pytest.approx([0.5 * 0.9**at for at in range(1, 13)])
    assert noise.get_xlabel() == "round (0 throughout: flora)"
    assert noise.get_yscale() == "linear"
    assert list(drawn(drift)[0].get_xdata()) == list(range(2, 13))  # of round 1 there is none

    solid, dotted, *_ = drawn(truncation)
    assert (solid.get_linestyle(), dotted.get_linestyle()) == ("-", ":")
    assert solid.get_ydata()[0] == pytest.approx(0.9)
    assert dotted.get_ydata()[0] == pytest.approx(0.6)  # rank 8: at 16 nothing is lost
    assert truncation.get_xlabel() == "round (solid: rank 2, dotted: rank 8)"
    assert truncation.get_yscale() == "log"  # 0.9 to 0.9 * 0.7^12

    assert effective.get_ylim()[0] == 0
    assert [t.get_text() for t in cuts.get_xticklabels()] == ["2", "4", "8", "16"]
    cut, best, *_ = drawn(cuts)
    assert list(cut.get_ydata()) == pytest.approx([0.9, 0.8, 0.6, 0.0])
    assert list(best.get_ydata()) == pytest.approx([0.63, 0.56, 0.42, 0.0])
    assert dimensions.get_yscale() == "log"
    assert list(drawn(dimensions)[0].get_xdata()) == list(range(1, 17))


def test_a_run_looks_as_in_the_other_picture(diagnosed_runs):
    """Though one between them has nothing to draw."""
    figure = diagnostic_figure(diagnosed_runs)
    colours = [line.get_color() for line in drawn(figure.axes[0])]
    assert colours == ["#0072B2", "#D55E00", "#CC79A7"]
    handles = figure.legends[0].legend_handles
    assert [handle.get_color() for handle in handles] == colours


def test_a_sample_of_the_layers_is_said(make_diagnosed):
    figure = diagnostic_figure({"prelort": make_diagnosed("prelort", layers=3)})
    assert figure._suptitle.get_text() == (
        "causal-lm, 16 clients, 12 rounds, seed 0; each round measured on 3 of 28 layers"
    )


@pytest.mark.parametrize("rounds", [1, 2, 12, 100])
@pytest.mark.parametrize("count", [1, 3, 11])
def test_nothing_overlaps_or_leaves_the_picture(make_diagnosed, rounds, count):
    runs = {
        f"a-method-of-some-length-{i}": make_diagnosed(
            "m",
            rounds,
            noise=0.0 if i % 3 == 1 else 0.3 * 4.0**-i,
            collapse=1.0 - i / 12,
            drift=2.0**-i,
        )
        for i in range(count)
    }
    assert texts_that_clash(diagnostic_figure(runs)) == []


def test_values_that_are_nothing_do_not_spoil_a_log_axis(make_diagnosed):
    runs = {"a": make_diagnosed("a"), "b": make_diagnosed("b", noise=1e-5)}
    for event in runs["a"]:
        if event.get("round") in (4, 5) and "diagnostics" in event:
            event["diagnostics"]["aggregation_noise"] = 0.0
    noise = diagnostic_figure(runs).axes[0]
    assert noise.get_yscale() == "log"
    assert noise.get_xlabel() == "round"
    low, high = noise.get_ylim()
    assert 1e-7 < low < 1e-5 < 0.5 < high
    assert math.isfinite(high)


@pytest.mark.parametrize("rounds", [1, 2, 3, 40])
def test_rounds_are_whole_and_alike_in_all_panels(make_diagnosed, rounds):
    figure = diagnostic_figure({"a": make_diagnosed("a", rounds=rounds)})
    figure.canvas.draw()
    for axes in figure.axes[:4]:
        labels = [label.get_text() for label in drawn_ticks(axes.xaxis)]
        assert all(re.fullmatch(r"\d+", label) for label in labels), labels
        assert axes.get_xlim() == figure.axes[0].get_xlim()
