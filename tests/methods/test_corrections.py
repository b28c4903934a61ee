"""Methods that correct the mean of the factors, against their papers' equations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

from prelort.adapters import Factors
from prelort.config import MethodConfig
from prelort.methods import build
from prelort.methods.fedrot_lora import rotated
from random_adapters import dense, random_adapter, same_bits, seeds
from reference import best_of_rank, weights_of
from rounds import (
    DIMENSIONS,
    RULES,
    R,
    aggregate,
    assert_near,
    clients_of,
    function_of,
    replies,
    start,
)

SPREAD = {"rtol": 2e-6, "atol": 2e-6}
"""Of float32 means against float64 ones."""
RANKS = [2, 8, 5, 2]
"""Of a round's clients; unequal examples come from `clients_of`."""

rules = pytest.mark.parametrize("rule", RULES, ids=str)
weightings = pytest.mark.parametrize("weights", ["examples", "uniform"])


def method_of(name, *, weights="examples", **options):
    return build(MethodConfig(name=name, weights=weights, options={name: options}), 7)


@weightings
@rules
def test_fedhl_adds_the_changes_to_the_whole_factors(weights, rule):
    method = method_of("fedhl", weights=weights)
    state = start(rule=rule)
    updates = replies(method, state, clients_of(RANKS))
    after = aggregate(method, state, updates)
    weight = weights_of(updates, weights)
    for name, old in state.adapter.layers.items():
        a, b = old.A.double().clone(), old.B.double().clone()
        for share, update in zip(weight, updates, strict=True):
            own = update.adapter.layers[name]
            a[: own.rank] += share / sum(weight) * (own.A.double() - old.A[: own.rank].double())
            b[:, : own.rank] += share / sum(weight) * (own.B - old.B[:, : own.rank]).double()
        torch.testing.assert_close(after.adapter.layers[name].A.double(), a, **SPREAD)
        torch.testing.assert_close(after.adapter.layers[name].B.double(), b, **SPREAD)


@weightings
def test_lora_fair_solves_for_the_correction_of_b(weights):
    """The stacked least squares problem, solved densely."""
    method, penalty = method_of("lora-fair", weights=weights, penalty=0.3), 0.3
    padded = method_of("zero-padding", weights=weights)
    state = start()
    updates = replies(method, state, clients_of(RANKS))
    after, means = (aggregate(m, state, updates).adapter for m in (method, padded))
    weight = weights_of(updates, weights)
    for name, mean in means.layers.items():
        products = sum(
            w
            / sum(weight)
            * (u.adapter.layers[name].B.double() @ u.adapter.layers[name].A.double())
            for w, u in zip(weight, updates, strict=True)
        )
        a, b = mean.A.double(), mean.B.double()
        left = torch.cat([a.T, penalty**0.5 * torch.eye(mean.rank, dtype=a.dtype)])
        right = torch.cat([(products - b @ a).T, torch.zeros(mean.rank, len(b), dtype=a.dtype)])
        expected = b + torch.linalg.lstsq(left, right).solution.T
        assert torch.equal(after.layers[name].A, mean.A)
        torch.testing.assert_close(after.layers[name].B.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_a", [True, False], ids=["by A", "by B"])
@given(seed=seeds)
def test_fedrot_lora_rotates_to_the_nearest_factors_of_the_same_product(by_a, seed):
    """No other rotation comes nearer, and a client that only rotated is undone."""
    mine, reference = (
        random_adapter([4] * len(DIMENSIONS), seed + k, dimensions=DIMENSIONS) for k in range(2)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, factors in mine.layers.items():
        aim, found = reference.layers[name], rotated(factors, reference.layers[name], by_a)
        torch.testing.assert_close(found.B @ found.A, factors.B @ factors.A, rtol=1e-4, atol=1e-4)
        q = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
        other = Factors(q.T @ factors.A, factors.B @ q)
        gap = [(f.A - aim.A).norm() if by_a else (f.B - aim.B).norm() for f in (found, other)]
        assert gap[0] <= gap[1] + 1e-5
        undone = rotated(Factors(q.T @ aim.A, aim.B @ q), aim, by_a)
        torch.testing.assert_close(undone.A, aim.A, rtol=1e-4, atol=1e-4)


def test_fedrot_lora_averages_rotated_factors_from_the_second_round_on():
    """By A and B in turn; in the first round B is zero, so nothing is rotated."""
    method, plain = method_of("fedrot-lora"), method_of("prelort")
    state = start()
    for number in range(3):
        updates = replies(method, state, clients_of(RANKS), seed=10 * number)
        expected = updates
        if number:
            expected = [
                replace(
                    u,
                    adapter=replace(
                        u.adapter,
                        layers={
                            name: rotated(f, state.adapter.layers[name].prefix(f.rank), number == 1)
                            for name, f in u.adapter.layers.items()
                        },
                    ),
                )
                for u in updates
            ]
        after = aggregate(method, state, updates)
        assert same_bits(after.adapter, aggregate(plain, state, expected).adapter)
        state = after


@rules
@weightings
def test_fedmomentum_keeps_the_function_of_fedex_lora_in_sorted_factors(weights, rule):
    """Of the same replies: an equal function, whose adapter is the best of the trained part."""
    method = method_of("fedmomentum", weights=weights, energy=1.0)
    exact = method_of("fedex-lora", weights=weights)
    state = start(rule=rule)
    updates = replies(method, state, clients_of(RANKS))
    sorted_state, mean_state = (aggregate(m, state, updates) for m in (method, exact))
    function = dense(exact.global_adapter(mean_state))
    assert_near(dense(method.global_adapter(sorted_state)), function)
    assert_near(dense(sorted_state.adapter), {n: best_of_rank(m, R) for n, m in function.items()})
    again = replies(method, sorted_state, clients_of(RANKS), seed=9)
    sent = [function_of(method.broadcast(sorted_state, u.client), u.adapter) for u in again]
    weight = weights_of(again, weights)
    mean = {
        n: sum(w / sum(weight) * f[n] for w, f in zip(weight, sent, strict=True)) for n in function
    }
    assert_near(dense(method.global_adapter(aggregate(method, sorted_state, again))), mean)
