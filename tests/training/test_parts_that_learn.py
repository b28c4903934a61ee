"""Training one factor only, at a scale multiplier, beside a fold: what moves and what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench import Bench

from prelort.adapters import LoraAdapter
from prelort.adapters.algebra import concatenate
from prelort.methods.objective import plain


@pytest.fixture
def bench(folder):
    return Bench(folder, rank=4)


def moved(before: LoraAdapter, after: LoraAdapter, kind: str) -> set[str]:
    """The layers in which this factor is no longer what it was, bit for bit."""
    return {
        name
        for name, factors in before.layers.items()
        if not torch.equal(getattr(factors, kind), getattr(after.layers[name], kind))
    }


@pytest.mark.parametrize("trains", ["A", "B", "AB"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_the_factors_that_learn_move(bench, trains, optimizer):
    """Weight decay would move whatever the optimiser holds, gradient or not."""
    _, trained = bench.train(trains=trains, optimizer=optimizer, weight_decay=0.1)
    everything = set(bench.start.layers)
    assert moved(bench.start, trained, "A") == (everything if "A" in trains else set())
    assert moved(bench.start, trained, "B") == (everything if "B" in trains else set())


@pytest.mark.parametrize("rank", [2, 30], ids=["two products", "one matrix"])
def test_the_loss_beside_a_fold_is_that_of_the_sum(bench, rank):
    """At rate zero, nearly: of one adapter that holds both, at one scale."""
    fold = bench.fold(rank, size=1.0)  # enough for the loss to show it
    saved = bench.start.modules_to_save
    both = concatenate([bench.start, replace(fold, modules_to_save=saved)], [1.5, 1.0])
    both = replace(both, modules_to_save=saved)

    def loss(adapter=None, **how):
        return bench.train(adapter, learning_rate=1e-12, **how)[0].loss

    expected = loss(both, objective=plain(both.rank))
    assert loss(frozen=fold, scale_multiplier=1.5) == pytest.approx(expected, rel=5e-6)
    for wrong in ({"scale_multiplier": 1.5}, {"frozen": fold}):
        assert loss(**wrong) != pytest.approx(expected, rel=2e-5)
