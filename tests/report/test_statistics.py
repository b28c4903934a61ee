"""Means, deviations and bootstrap intervals against other ways to compute them."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.report.results import interval, mean_deviation

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_mean_and_sample_deviation(values):
    mean, deviation = mean_deviation(values)
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert deviation == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


def test_of_few_or_diverged_values():
    nan = pytest.approx(math.nan, nan_ok=True)
    assert mean_deviation([4.0]) == (4.0, nan)
    assert mean_deviation([]) == (nan, nan)
    assert mean_deviation([1.0, math.inf]) == (math.inf, nan)
    assert mean_deviation([1.0, math.nan]) == (nan, nan)
    assert interval([2.0]) == (2.0, nan, nan)
    assert interval([2.0, math.inf]) == (math.inf, nan, nan)
    assert interval([]) == (nan, nan, nan)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4))
def test_interval_is_that_of_all_resamples(pairs):
    every = [statistics.fmean(drawn) for drawn in itertools.product(pairs, repeat=len(pairs))]
    low, high = np.quantile(every, [0.025, 0.975])
    found = interval(pairs)
    size = max(pairs) - min(pairs)
    assert found[0] == pytest.approx(statistics.fmean(pairs))
    assert found[1:] == pytest.approx((low, high), abs=0.08 * size + 1e-9)
    assert interval(list(pairs)) == found


@pytest.mark.parametrize("pairs", [[1.0, 3.0], [0.5, -1.0, 4.0]])
def test_interval_of_up_to_three_pairs_is_their_range(pairs):
    assert interval(pairs)[1:] == pytest.approx((min(pairs), max(pairs)))
