"""Means, deviations and bootstrap intervals against other ways to compute them."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.report.spread import Spread, difference, spread, warning

numbers = st.floats(-1e6, 1e6)


@given(st.lists(numbers, min_size=2, max_size=20))
def test_mean_and_sample_deviation(values):
    found = spread(values)
    assert found.count == len(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6)


def test_of_few_or_diverged_values():
    assert spread([4.0]) == Spread(4.0, None, 1)
    assert spread([]) is None
    assert spread([1.0, math.inf]) == Spread(math.inf, None, 2)
    assert math.isnan(spread([1.0, math.nan]).mean)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4))
def test_interval_is_that_of_all_resamples(pairs):
    every = [statistics.fmean(drawn) for drawn in itertools.product(pairs, repeat=len(pairs))]
    low, high = np.quantile(every, [0.025, 0.975])
    found = difference(pairs)
    size = max(pairs) - min(pairs)
    assert found.mean == pytest.approx(statistics.fmean(pairs))
    assert found.low == pytest.approx(low, abs=0.08 * size + 1e-9)
    assert found.high == pytest.approx(high, abs=0.08 * size + 1e-9)
    assert difference(list(pairs)) == found


@pytest.mark.parametrize("pairs", [[1.0, 3.0], [0.5, -1.0, 4.0]])
def test_interval_of_up_to_three_pairs_is_their_range(pairs):
    found = difference(pairs)
    assert (found.low, found.high) == pytest.approx((min(pairs), max(pairs)))


def test_no_interval_of_one_pair_or_of_diverged_values():
    assert difference([2.0]).low is None
    assert difference([2.0, math.inf]).low is None
    assert difference([]) is None


def test_few_pairs_come_with_a_warning():
    assert "no interval" in warning(1)
    assert "10 distinct resamples" in warning(3)  # C(5, 3)
    assert "lowest to the highest" in warning(3)
    assert "35 distinct" in warning(4)
    assert "lowest" not in warning(4)
    assert warning(5) == ""
