import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.report.formatting import (
    clock_time,
    human_bytes,
    human_seconds,
    listing,
    metric_format,
    plain,
    ranges,
)


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234, "1.23 kB"), (999_499, "999 kB"),
        (999_600, "1 MB"), (12_345_678, "12.3 MB"), (4.2e9, "4.2 GB"), (7e13, "70 TB"),
        (None, "–"),
    ],
)  # fmt: skip
def test_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.042, "0.042 s"), (9.94, "9.9 s"), (9.97, "10 s"), (30.1, "30 s"), (59.7, "1 min 00 s"),
        (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (12_000, "3 h 20 min"), (None, "–"),
        (math.nan, "–"),
    ],
)  # fmt: skip
def test_seconds(seconds, text):
    assert human_seconds(seconds) == text


def test_small_things():
    assert [clock_time(s) for s in (7.4, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    assert listing([2, 4, 8]) == "2, 4 and 8"
    assert listing([2]) == "2"
    assert listing([]) == ""
    assert plain("a\x1b[31m\r\nb") == "a [31m  b"


def test_values_are_shown_in_their_unit():
    assert metric_format("accuracy").show(0.6734) == "67.3"
    assert metric_format("perplexity").show(1234.5) == "1234"
    assert metric_format("perplexity").show(3.14159) == "3.14"
    assert metric_format("perplexity").show(math.inf) == "inf"
    assert metric_format("perplexity").show(2.5e9) == "2.5e+09"
    assert metric_format("perplexity").show(None) == "–"
    assert metric_format("perplexity").direction == "lower is better"
    assert metric_format("rouge_l").arrow == "↑"
    assert metric_format("my_metric").name == "my_metric"


@given(st.sets(st.integers(1, 60)))
def test_ranges_name_every_number_once(numbers):
    named = [part.split("–") for part in ranges(numbers).split(", ") if part]
    spans = [range(int(ends[0]), int(ends[-1]) + 1) for ends in named]
    assert [number for span in spans for number in span] == sorted(numbers)
