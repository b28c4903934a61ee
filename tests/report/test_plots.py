import itertools
import math
import sys

import pytest

from prelort.errors import PrelortError
from prelort.report.axes import COLOURS, MARKERS, has_room, style, wants_log
from prelort.report.plots import rank_curves, rank_figure
from prelort.report.wording import wording

PERPLEXITY, ACCURACY = wording("perplexity"), wording("accuracy")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn_ticks(axis):
    """Labels of the ticks in view; matplotlib lists others too, but does not draw them."""
    low, high = sorted(axis.get_view_interval())
    labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for at, label in labels if low <= at <= high]


def texts_that_clash(figure):
    """Texts that leave the figure, and pairs of texts that overlap."""
    figure.canvas.draw()
    found = [*figure.texts, figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        found += [axes._left_title, axes.xaxis.label, axes.yaxis.label]
        found += [*drawn_ticks(axes.xaxis), *drawn_ticks(axes.yaxis)]
    boxes = {t: t.get_window_extent() for t in found if t.get_text().strip()}
    whole = figure.bbox
    outside = [
        t.get_text()
        for t, b in boxes.items()
        if b.x0 < 0 or b.y0 < 0 or b.x1 > whole.x1 or b.y1 > whole.y1
    ]
    pairs = [
        (a.get_text(), b.get_text())
        for a, b in itertools.combinations(boxes, 2)
        if boxes[a].overlaps(boxes[b])
    ]
    return outside + pairs


def test_writes_a_png(tmp_path, two_runs):
    path = rank_curves(two_runs, tmp_path / "ranks.png")
    assert path == tmp_path / "ranks.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_left_panel_shows_the_metric_at_the_ranks(two_runs):
    figure = rank_figure(two_runs)
    left, right = figure.axes
    prelort, padding = (line for line in left.lines if len(line.get_xdata()))
    assert list(prelort.get_xdata()) == [2, 4, 8, 16]
    assert list(prelort.get_ydata()) == pytest.approx([27, 24, 22, 21])
    assert list(padding.get_ydata()) == pytest.approx([26.2, 26.1, 26.1, 26.1])
    assert left.get_xscale() == "log"
    assert left.get_yscale() == "linear"
    assert [t.get_text() for t in left.get_xticklabels()] == ["2", "4", "8", "16"]
    assert left.get_ylabel() == "perplexity, lower is better"
    assert legend(figure) == ["prelort", "zero-padding", "untuned base: 700.0 (off the scale)"]
    assert left.get_ylim()[1] < 30  # the base does not squash the curves
    assert figure._suptitle.get_text() == "causal-lm, 16 clients, 12 rounds, seed 0"
    # Measured at the beginning and the end only: the right panel is the training loss.
    assert [len(line.get_xdata()) for line in right.lines] == [12, 12]
    assert right.get_ylabel() == "nats per token"


def test_right_panel_shows_the_ends_by_round_where_they_were_measured(make_run):
    figure = rank_figure({"prelort": make_run("prelort", {2: 27.0, 4: 24.0, 16: 21.0}, every=3)})
    right = figure.axes[1]
    top, bottom = right.lines
    assert list(top.get_xdata()) == [0, 3, 6, 9, 12]
    assert (top.get_ydata()[-1], top.get_linestyle()) == (pytest.approx(21.0), "-")
    assert (bottom.get_ydata()[-1], bottom.get_linestyle()) == (pytest.approx(27.0), ":")
    assert right.get_xlabel() == "round (solid: rank 16, dotted: rank 2)"
    assert right.get_yscale() == "log"  # 700 to 21


def test_base_near_the_curves_is_a_dashed_line_and_percent_is_shown(make_run):
    accuracy = {2: 0.673, 4: 0.689, 8: 0.708, 16: 0.739}
    figure = rank_figure({"a": make_run("a", accuracy, base=0.6, metric="accuracy")})
    left = figure.axes[0]
    assert list(left.lines[0].get_ydata()) == pytest.approx([67.3, 68.9, 70.8, 73.9])
    assert list(left.lines[1].get_ydata()) == pytest.approx([60.0, 60.0])
    assert left.lines[1].is_dashed()
    assert left.get_ylim()[0] < 60
    assert legend(figure) == ["a", "untuned base: 60.0"]
    assert left.get_ylabel() == "accuracy (%), higher is better"


def many(make_run, **more):
    finals = {
        "prelort": {2: 27.0, 4: 24.0, 8: 22.0, 16: 21.0},
        "zero-padding": {2: 26.2, 4: 26.1, 8: 26.1, 16: 26.1},
        "flora": {16: 22.4},
        "diverging": {2: math.inf, 4: 25.2, 8: 24.0, 16: 23.0},
        "fedit (everyone at rank 16)": {2: 206.0, 4: 90.0, 8: 35.0, 16: 17.8},
        **{f"another-{i}": {2: 30.0 + i, 4: 25.0 + i, 8: 23.3, 16: 21.7} for i in range(5)},
    }
    return {name: make_run(name, values, **more) for name, values in finals.items()}


@pytest.mark.parametrize("every", [0, 3])
def test_nothing_overlaps_or_leaves_the_picture(make_run, two_runs, every):
    accuracy = make_run("a", {8: 0.123456, 9: 0.1234561}, base=0.1, metric="accuracy", every=every)
    for runs in (many(make_run, every=every), two_runs, {"a": accuracy}):
        assert texts_that_clash(rank_figure(runs)) == []


def test_the_check_for_overlaps_finds_one(two_runs):
    figure = rank_figure(two_runs)
    figure.axes[1].set_title("A title that is far too long for its panel " * 2, loc="left")
    assert texts_that_clash(figure)


def test_many_runs_a_log_axis_and_a_diverged_one(make_run):
    figure = rank_figure(many(make_run))
    left = figure.axes[0]
    assert left.get_yscale() == "log"
    assert left.get_ylabel() == "perplexity, lower is better, log scale"
    assert "diverging (diverged)" in legend(figure)
    assert list(left.lines[3].get_xdata()) == [4, 8, 16]
    looks = {(s["color"], s["marker"], s["markerfacecolor"]) for s in map(style, range(14))}
    assert len(looks) == 14
    assert len(COLOURS) == len(MARKERS)


def test_an_unfinished_run_says_so(make_run):
    events = make_run("prelort", {2: 27.0, 16: 21.0}, every=4)
    cut = next(i for i, e in enumerate(events) if e.get("round") == 6)
    assert legend(rank_figure({"prelort": events[:cut]}))[0] == (
        "prelort (measured after round 4 of 12)"
    )


def test_flat_curves_do_not_look_like_trends(make_run):
    figure = rank_figure({"a": make_run("a", {2: 26.101, 4: 26.1, 8: 26.1})})
    low, high = figure.axes[0].get_ylim()
    assert high - low > 1.2


def test_metric_can_be_chosen_and_must_exist(two_runs, make_run):
    assert rank_figure(two_runs, "loss").axes[0].get_ylabel() == "loss (nats), lower is better"
    with pytest.raises(PrelortError, match="'accuracy'"):
        rank_figure(two_runs, "accuracy")
    with pytest.raises(PrelortError, match="nothing to draw"):
        rank_figure({"a": make_run("a", {2: 27.0})[:1]})


def test_a_path_that_cannot_be_written_is_named(tmp_path, two_runs):
    with pytest.raises(PrelortError, match=r"gone.*cannot be written: No such file"):
        rank_curves(two_runs, tmp_path / "gone" / "ranks.png")


def test_room_and_log():
    assert not has_room([21.0, 27.0], 700.0, log=False)
    assert has_room([21.0, 27.0], 30.0, log=False)
    assert has_room([17.8, 206.0], 734.0, log=True)
    assert not has_room([26.1, 26.1], 40.0, log=False)
    assert has_room([26.1, 26.1], 28.0, log=False)
    assert not has_room([26.1], math.inf, log=False)
    assert wants_log([20.0, 81.0], PERPLEXITY)
    assert not wants_log([20.0, 79.0], PERPLEXITY)
    assert not wants_log([1.0, 81.0], ACCURACY)
