"""Every operation against the dense matrices that it never builds, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter, algebra
from prelort.errors import AdapterError
from random_adapters import (
    DIMENSIONS,
    dense,
    dense_norm,
    random_adapter,
    ranks,
    scale_rules,
    seeds,
)

quick = settings(deadline=None, max_examples=40)
pairs_of_ranks = st.tuples(ranks, ranks)


def adapters(draw, count, rule, seed):
    """``count`` float64 adapters, each layer at a rank of its own."""
    return [
        random_adapter(list(draw(pairs_of_ranks)), seed + k, scale=rule, dtype=torch.float64)
        for k in range(count)
    ]


@quick
@given(data=st.data(), rule=scale_rules, seed=seeds, count=st.integers(1, 4))
def test_concatenation_is_the_weighted_sum_of_products(data, rule, seed, count):
    parts = adapters(data.draw, count, rule, seed)
    weights = data.draw(st.lists(st.floats(-3, 3), min_size=count, max_size=count))
    stacked = algebra.concatenate(parts, weights)
    for name in DIMENSIONS:
        expected = sum(w * dense(part)[name] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(dense(stacked)[name], expected, rtol=1e-10, atol=1e-10)
        assert stacked.layers[name].rank == sum(part.layers[name].rank for part in parts)
    expected = sum(
        w * p.modules_to_save["score.weight"] for w, p in zip(weights, parts, strict=True)
    )
    torch.testing.assert_close(stacked.modules_to_save["score.weight"], expected)


def test_what_is_refused():
    with pytest.raises(AdapterError, match="1 adapters need as many weights, got 2"):
        algebra.concatenate([random_adapter(2)], [1.0, 2.0])
    with pytest.raises(AdapterError, match="0 adapters"):
        algebra.concatenate([], [])
    with pytest.raises(AdapterError, match="rank 0 is not allowed"):
        algebra.best_approximation(random_adapter(2), 0)
    other = random_adapter(2, dimensions={"wide": (7, 4)})
    with pytest.raises(AdapterError, match="layer 'tall'"):
        algebra.inner(random_adapter(2), other)
    with pytest.raises(AdapterError, match=r"tensor 'score\.weight'"):
        algebra.concatenate([random_adapter(2), random_adapter(2, modules_to_save=False)], [1, 1])


@quick
@given(data=st.data(), rule=scale_rules, seed=seeds)
def test_inner_product_norm_and_distance_equal_the_dense_ones(data, rule, seed):
    x, y = adapters(data.draw, 2, rule, seed)
    dx, dy = dense(x), dense(y)
    inner = float(sum((dx[n] * dy[n]).sum() for n in DIMENSIONS))
    difference = {n: dx[n] - dy[n] for n in DIMENSIONS}
    size = dense_norm(dx) * dense_norm(dy)
    assert algebra.inner(x, y) == pytest.approx(inner, rel=1e-10, abs=1e-12 * size)
    assert algebra.norm(x) == pytest.approx(dense_norm(dx), rel=1e-10)
    assert algebra.distance(x, y) == pytest.approx(dense_norm(difference), rel=1e-10)
    squared = algebra.squared_distance(x, y)
    assert squared == pytest.approx(dense_norm(difference) ** 2, rel=1e-9)


@quick
@given(rule=scale_rules, rank=ranks, seed=seeds, power=st.integers(4, 12))
def test_tiny_distances_do_not_drown_in_cancellation(rule, rank, seed, power):
    x = random_adapter(rank, seed, scale=rule, dtype=torch.float64, modules_to_save=False)
    step = random_adapter(rank, seed + 1, scale=rule, dtype=torch.float64, modules_to_save=False)
    layers = {n: Factors(f.A, f.B + 10.0**-power * step.layers[n].B) for n, f in x.layers.items()}
    y = LoraAdapter(layers, rule)
    expected = dense_norm({n: dense(x)[n] - dense(y)[n] for n in DIMENSIONS})
    # The dense difference itself is exact to about 1e-16 of |x|.
    assert algebra.distance(x, y) == pytest.approx(
        expected, rel=1e-6, abs=1e-14 * dense_norm(dense(x))
    )


@quick
@given(rule=scale_rules, own=pairs_of_ranks, rank=st.integers(1, 12), seed=seeds)
def test_the_best_approximation_is_the_truncated_svd(rule, own, rank, seed):
    adapter = random_adapter(list(own), seed, scale=rule, dtype=torch.float64)
    best = algebra.best_approximation(adapter, rank)
    for name, product in dense(adapter).items():
        u, s, vh = torch.linalg.svd(product)
        kept = min(rank, len(s))
        expected = u[:, :kept] @ torch.diag(s[:kept]) @ vh[:kept]
        torch.testing.assert_close(dense(best)[name], expected, rtol=1e-8, atol=1e-8)
        error = torch.linalg.matrix_norm(product - dense(best)[name])
        assert float(error) == pytest.approx(float(s[kept:].norm()), abs=1e-8)
        assert best.layers[name].rank == min(rank, adapter.layers[name].rank, *DIMENSIONS[name])
    assert best.scale == rule
    assert best.modules_to_save is adapter.modules_to_save


def test_the_best_approximation_splits_singular_values_evenly_and_in_falling_order():
    factors = algebra.best_approximation(random_adapter(4, dtype=torch.float64), 3).layers["wide"]
    sizes_a, sizes_b = factors.A.norm(dim=1), factors.B.norm(dim=0)
    torch.testing.assert_close(sizes_a, sizes_b)
    assert torch.equal(sizes_a, sizes_a.sort(descending=True).values)


@pytest.mark.parametrize("apart", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("way", ["Gram", "Householder"])
def test_factors_that_are_nearly_equal_have_an_exact_svd_either_way(way, apart, monkeypatch):
    """As the stacked replies of clients that all started from one adapter."""
    if way == "Householder":
        monkeypatch.setattr(algebra, "CONDITION", 0.0)
    generator = torch.Generator().manual_seed(1)

    def stacked(*shape):
        common = torch.randn(*shape, generator=generator)
        sizes = 10.0 ** -torch.arange(shape[0])[:, None]  # dimensions of very different lengths
        return torch.cat(
            [(common + apart * torch.randn(*shape, generator=generator)) * sizes for _ in range(4)]
        )

    factors = Factors(stacked(3, 60), stacked(3, 50).T)
    left, singular, right = algebra.factored_svd(factors)
    product = factors.B.double() @ factors.A.double()
    size = float(product.norm())
    assert float((left * singular @ right - product).norm()) < 1e-7 * size
    exact = torch.linalg.svdvals(product)[:12]
    torch.testing.assert_close(singular, exact, rtol=0, atol=1e-7 * size)
    for basis in (left.T, right):
        kept = basis[singular > 1e-6 * singular[0]]
        torch.testing.assert_close(kept @ kept.T, torch.eye(len(kept)).double(), rtol=0, atol=1e-6)


@quick
@given(own=ranks, rank=ranks, seed=seeds)
def test_triples_that_are_not_kept_are_not_made(own, rank, seed):
    factors = random_adapter(own, seed).layers["wide"]
    whole, part = algebra.factored_svd(factors), algebra.factored_svd(factors, lambda s: rank)
    count = min(rank, len(whole[1]))
    assert [tuple(t.shape) for t in part] == [(4, count), (count,), (count, 7)]
    torch.testing.assert_close(part[1], whole[1][:count], rtol=1e-12, atol=1e-12)
    expected = whole[0][:, :count] * whole[1][:count] @ whole[2][:count]
    torch.testing.assert_close(part[0] * part[1] @ part[2], expected, rtol=1e-9, atol=1e-9)


DEVICES = [torch.device("cpu", 0), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_svd_is_computed_on_another_device_and_comes_back(device, monkeypatch):
    adapter = random_adapter(6)
    expected = algebra.best_approximation(adapter, 3)
    moved, to = [], torch.Tensor.to

    def recorded(tensor, *arguments, **named):
        if arguments and arguments[0] == device:
            moved.append(tensor.shape)
        return to(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    with algebra.computing_on(device):
        found = algebra.best_approximation(adapter, 3)
    assert moved == [t.shape for f in adapter.layers.values() for t in (f.B, f.A)]
    for name, product in dense(found).items():
        assert found.layers[name].A.device == adapter.layers[name].A.device
        torch.testing.assert_close(product, dense(expected)[name], rtol=0, atol=1e-6)
    moved.clear()
    algebra.best_approximation(adapter, 3)
    assert moved == []
