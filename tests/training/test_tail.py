"""HetLoRA's penalty on the last rank dimensions, and the rule by which a client prunes itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bench import RULE, Bench
from hypothesis import given
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.initial import fresh
from prelort.methods.objective import TailPenalty, plain
from prelort.models.lora import ADAPTER, install, lora_layers, trainable
from prelort.training.tail import pairs, pruned_rank, tail_norm, tail_penalty
from tiny_models import adapted, trained_adapter

PATTERNS = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
TAIL = TailPenalty(0.1, 0.5, 1)


def by_hand(adapter: LoraAdapter, cut: int) -> float:
    """``sum |B[:, q:]|_F |A[q:]|_F`` over the layers, entry by entry in float64."""
    total = 0.0
    for factors in adapter.layers.values():
        a = sum(x * x for row in factors.A.double()[cut:].tolist() for x in row)
        b = sum(x * x for row in factors.B.double()[:, cut:].tolist() for x in row)
        total += math.sqrt(a) * math.sqrt(b)
    return total


def installed(folder, rank=8, **settings):
    model = adapted(folder, rank, **settings)
    adapter = trained_adapter(model, RULE)
    install(model, adapter)
    return model, adapter


# The cut


@given(rank=st.integers(2, 300), keep=st.floats(0.001, 0.999))
def test_the_cut_leaves_a_dimension_and_leaves_out_at_least_one(rank, keep):
    assert 1 <= TailPenalty(1.0, keep, 1).cut(rank) <= rank - 1


# The penalty


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.99])
def test_the_penalty_is_the_tails_norms_by_brute_force(folder, keep):
    model, adapter = installed(folder)
    tail = TailPenalty(0.1, keep, 1)
    found = float(tail_penalty(pairs(model), tail, 8).detach())
    assert found == pytest.approx(by_hand(adapter, tail.cut(8)), rel=1e-5)
    assert tail_norm(pairs(model), tail, 8) == found
    assert found > 1


def test_a_layer_without_a_tail_adds_nothing(folder):
    model, adapter = installed(folder, rank_pattern={PATTERNS[folder.name]: 3})
    penalty = tail_penalty(pairs(model), TAIL, 8)
    assert float(penalty.detach()) == pytest.approx(by_hand(adapter, 4), rel=1e-5)
    penalty.backward()
    for name, layer in lora_layers(model).items():
        short = name.endswith(PATTERNS[folder.name])
        for own in (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight):
            assert bool(own.grad.isfinite().all())
            assert bool(own.grad.any()) != short


def test_its_gradient_is_finite_where_b_is_zero(folder):
    """As in the first round. The root of a sum of squares has none at zero."""
    model = adapted(folder, 8)
    install(model, fresh(trained_adapter(model, RULE), 0))
    penalty = tail_penalty(pairs(model), TAIL, 8)
    assert float(penalty.detach()) == 0.0
    penalty.backward()
    for parameter in [*trainable(model)[0], *trainable(model)[1]]:
        assert bool(parameter.grad.isfinite().all())


# In training


def with_tail(weight):
    return replace(plain(8), tail=TailPenalty(weight, 0.5, 1))


@pytest.fixture(scope="module")
def bench(tiny_llama):
    return Bench(tiny_llama)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_one_of_the_loss_and_one_of_the_penalty(bench, accumulation):
    """Once a step and not once a batch; the reported loss is without it."""
    settings = {"gradient_accumulation": accumulation, "batch_size": 8 // accumulation}
    settings |= {"local_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0}
    bare, moved = bench.train(**settings)
    result, found = bench.train(objective=with_tail(0.3), **settings)

    assert result.loss == bare.loss
    install(bench.model, bench.start)
    tail_penalty(pairs(bench.model), with_tail(0.3).tail, 8).backward()
    for name, layer in lora_layers(bench.model).items():
        for kind, own in (("A", layer.lora_A), ("B", layer.lora_B)):
            expected = getattr(moved.layers[name], kind) - 0.1 * 0.3 * own[ADAPTER].weight.grad
            torch.testing.assert_close(getattr(found.layers[name], kind), expected)


# The rule


def shrunk(adapter: LoraAdapter, factor: float, cut: int) -> LoraAdapter:
    """The tail's B times a factor."""
    layers = {}
    for name, factors in adapter.layers.items():
        b = factors.B.clone()
        b[:, cut:] *= factor
        layers[name] = Factors(factors.A, b)
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("factor, rank", [(0.99, 4), (0.0, 4), (1.0, 8), (1.01, 8)])
def test_it_cuts_where_the_tail_is_smaller_than_before(tiny_llama, factor, rank):
    model, adapter = installed(tiny_llama)
    before = tail_norm(pairs(model), TAIL, 8)
    install(model, shrunk(adapter, factor, 4))
    assert pruned_rank(pairs(model), TAIL, 8, before) == rank


@pytest.mark.parametrize("lowest, rank", [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_it_never_cuts_below_the_lowest_rank(tiny_llama, lowest, rank):
    model, _ = installed(tiny_llama)
    assert pruned_rank(pairs(model), TailPenalty(0.1, 0.5, lowest), 8, before=1e9) == rank
