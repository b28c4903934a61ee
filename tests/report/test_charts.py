import itertools
import math

import pytest

from prelort.report.charts import Series, line_chart, linear_ticks
from prelort.report.heat import heat_strip


def test_ticks_are_round_numbers():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(20.3, 31.7) == [25, 30]
    assert linear_ticks(0.0012, 0.0049) == [0.002, 0.003, 0.004]


def test_a_chart_places_low_values_low():
    chart = line_chart("t", "s", [Series("a", {1: 5.0, 2: 3.0, 3: 4.0})])
    (line,) = chart.lines
    heights = [dot.y for dot in line.dots]
    assert heights[1] > heights[2] > heights[0]
    assert line.dots[0].x == chart.left
    assert line.dots[-1].x == pytest.approx(chart.right)
    assert line.dots[1].text == "a, round 2: 3"
    assert chart.summary == "a: 5 at round 1, 4 at round 3"


def test_a_log_axis_of_ranks_has_a_tick_at_each():
    chart = line_chart("t", "s", [Series("a", {2: 9.0, 4: 8.0, 16: 2.0})], log_x=True, log_y=True)
    assert [tick.label for tick in chart.x_ticks] == ["2", "4", "16"]
    one, two, three = (tick.at for tick in chart.x_ticks)
    assert three - two == pytest.approx(2 * (two - one), abs=0.2)
    assert chart.subtitle == "s, log scale"


def test_labels_keep_their_distance():
    ranks = dict.fromkeys(range(1, 65), 1.0)
    chart = line_chart("t", "s", [Series("a", ranks)], log_x=True)
    places = [tick.at for tick in chart.x_ticks]
    assert min(b - a for a, b in itertools.pairwise(places)) > 14


def test_what_is_not_finite_is_left_out_and_said():
    chart = line_chart("t", "s", [Series("a", {1: 1.0, 2: math.nan, 3: math.inf, 4: 2.0})])
    assert len(chart.lines[0].dots) == 2
    assert chart.notes == ["2 values that are not finite are not drawn."]
    assert line_chart("t", "s", [Series("a", {1: math.nan})]) is None
    assert line_chart("t", "s", []) is None


@pytest.mark.parametrize("value", [0.0, 1e-12, -3.0, 1e12])
def test_one_value_is_a_chart_too(value):
    chart = line_chart("t", "s", [Series("a", {7: value})], from_zero=value >= 0)
    assert [tick.label for tick in chart.x_ticks] == ["7"]
    assert chart.y_ticks


def test_a_band_goes_there_and_back():
    band = {1: 1.0, 2: 2.0}, {1: 3.0, 2: 5.0}
    chart = line_chart("t", "s", [Series("a", {1: 2.0, 2: 3.0}, 0, *band)])
    assert chart.lines[0].band.count("L") == 3
    assert chart.lines[0].band.endswith("Z")
    assert chart.lines[0].dots[0].text == "a, round 1: 2 (1 to 3)"


def test_a_strip_has_a_cell_for_each_answer_and_failure():
    heat = heat_strip({"a": {1: 1.0, 3: 2.0}, "b": {2: math.nan}}, {"b": [3]}, "{:.1f}".format)
    a, b = heat.rows
    assert [cell.step for cell in a.cells] == [0, 7]
    assert [(cell.step, cell.failed) for cell in b.cells] == [(None, False), (None, True)]
    assert [cell.text for cell in b.cells] == ["b, round 2: not finite", "b, round 3: left out"]
    assert a.cells[1].x == b.cells[1].x > b.cells[0].x > a.cells[0].x
    assert heat_strip({"a": {}}, {}, str) is None


def test_a_strip_of_many_clients_shows_the_first_hundred():
    heat = heat_strip({f"c{n}": {1: float(n)} for n in range(300)}, {}, str)
    assert len(heat.rows) == 100
    assert heat.notes == ["The first 100 of 300 clients; the table has them all."]
