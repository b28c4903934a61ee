"""Means of products against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.aggregation.products import ProductSum, SegmentSums, along, between, sum_products
from prelort.errors import AdapterError
from random_adapters import dense, random_adapter, seeds
from rounds import assert_near

R = 9
quick = settings(deadline=None, max_examples=40)


def replies(pairs, seed):
    """Adapters of these ranks with their weights."""
    return [(random_adapter(rank, seed + k), float(w)) for k, (rank, w) in enumerate(pairs)]


@quick
@given(
    pairs=st.lists(st.tuples(st.integers(1, R), st.integers(0, 500)), max_size=15),
    seed=seeds,
)
def test_the_sum_is_the_weighted_mean_and_stays_small(pairs, seed):
    """The layers have 4 outputs and 3 inputs: what exceeds rank 8 is compressed."""
    sums, given_ = ProductSum(), replies(pairs, seed)
    for adapter, weight in given_:
        sums.add(adapter, weight)
        assert sum(part.rank for part in sums.parts) <= 2 * 4
    total = sum(weight for _, weight in given_)
    assert sums.total == total
    if not total:
        return
    mean = sums.mean()
    weighted = [(weight / total, adapter) for adapter, weight in given_]
    assert_near(
        dense(mean), {n: sum(w * dense(a)[n] for w, a in weighted) for n in ("wide", "tall")}
    )
    head = sum(w * a.modules_to_save["score.weight"] for w, a in weighted)
    torch.testing.assert_close(mean.modules_to_save["score.weight"], head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [1, 12])
def test_segments_are_averaged_over_their_holders(many):
    """Of a few replies, and of so many that the sums are compressed."""
    levels, before = [2, 5, 8], random_adapter(8, 9)
    sums, given_ = SegmentSums(levels, 8, before), replies([(8, 2), (5, 1), (2, 7)] * many, 4)
    for adapter, weight in given_:
        sums.add(adapter, weight)
    assert_segments(sums, given_, before)
    assert [(s.low, s.high) for s in sums.segments] == [(0, 2), (2, 5), (5, 8)]
    assert sums.segments[0].products.compressed == (many > 1)


def test_a_reply_between_two_levels_divides_a_segment():
    """Where it is not compressed yet."""
    before = random_adapter(8, 9, dimensions=(wide := {"wide": (40, 50), "tall": (30, 60)}))
    sums, given_ = SegmentSums([2], 8, before), []
    for k, (rank, weight) in enumerate([(8, 2.0), (3, 5.0), (6, 1.0)]):
        given_.append((random_adapter(rank, k, dimensions=wide), weight))
        sums.add(*given_[-1])
    assert [(s.low, s.high) for s in sums.segments] == [(0, 2), (2, 3), (3, 6), (6, 8)]
    assert [s.products.total for s in sums.segments] == [8, 8, 3, 2]
    assert_segments(sums, given_, before)
    for _ in range(40):
        sums.add(random_adapter(8, dimensions=wide), 1.0)
    with pytest.raises(AdapterError, match="rank 5 is not allowed: it would divide the rank dim"):
        sums.add(random_adapter(5, dimensions=wide), 1.0)


def assert_segments(sums, replies, before):
    """Means, squared weights and squared distances of each segment."""
    for segment in sums.segments:
        ends = segment.low, segment.high
        holders = [(dense(between(a, *ends)), w) for a, w in replies if a.rank >= segment.high]
        total = sum(w for _, w in holders)
        assert segment.products.total == total
        assert segment.squares == sum(w**2 for _, w in holders)
        old = dense(between(before, *ends))
        mean = {n: sum(w * p[n] for p, w in holders) / total for n in old}
        assert_near(dense(segment.products.mean()), mean)
        moved = sum(w**2 * float((p[n] - old[n]).square().sum()) for p, w in holders for n in old)
        assert segment.moved == pytest.approx(moved, rel=1e-5)
        unit = {n: p / p.norm() for n, p in sorted(old.items())}
        gains = [
            (torch.stack([((p[n] - old[n]) * u).sum() for n, u in unit.items()]), w)
            for p, w in holders
        ]
        assert torch.allclose(segment.gained, sum(w * g for g, w in gains).double(), rtol=1e-4)
        squares = sum(w**2 * float(g @ g) for g, w in gains)
        assert segment.gained_squares == pytest.approx(squares, rel=1e-4)


def test_nothing_is_gained_along_a_product_of_zero():
    before = random_adapter(3, scale=ScaleRule("constant", 2.0))
    wide, tall = before.layers["wide"], before.layers["tall"]
    layers = {"wide": Factors(wide.A, torch.zeros_like(wide.B)), "tall": tall}
    first, second = along(random_adapter(3, 1), LoraAdapter(layers, before.scale))
    assert first != 0  # tall, by name
    assert second == 0


def test_parts_keep_their_product_under_any_scale_rule():
    whole = random_adapter([8, 4], scale=ScaleRule("rslora", 3.0))
    parts = [between(whole, 0, 3), between(whole, 3, 5), between(whole, 5, 8)]
    assert [set(part.layers) for part in parts] == [{"wide", "tall"}, {"wide", "tall"}, {"wide"}]
    assert [set(part.modules_to_save) for part in parts] == [{"score.weight"}, set(), set()]
    assert_near(dense(sum_products(parts)), dense(whole))
