"""How slots begin: one matrix for everyone, of which a client draws what it is not sent."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors
from prelort.adapters.initial import draw_a, filled, fresh
from prelort.seeds import torch_generator
from random_adapters import DIMENSIONS, dense, random_adapter, same_bits, seeds

quick = settings(deadline=None, max_examples=40)


def test_a_draw_is_a_function_of_seed_and_layer_alone():
    torch.manual_seed(1)
    first = draw_a(3, "layers.0.q", 4, 6)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(draw_a(3, "layers.0.q", 4, 6), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw_a(4, "layers.0.q", 4, 6), first)
    assert not torch.equal(draw_a(3, "layers.1.q", 4, 6), first)


def test_a_draw_is_what_it_was_for_every_run_so_far():
    """Written out: a change here would change every run, and no two versions would agree."""
    generator = torch_generator(7, "initial adapter", "layers.0.q")
    expected = torch.empty(5, 9).uniform_(-1 / 3, 1 / 3, generator=generator)
    found = draw_a(7, "layers.0.q", 5, 9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("d_in", [4, 64, 900])
def test_a_draw_is_uniform_in_the_bound_of_its_inputs(d_in):
    drawn, bound = draw_a(0, "x", 2000, d_in), 1 / math.sqrt(d_in)
    assert 0.99 * bound < float(drawn.max()) <= bound
    assert -bound <= float(drawn.min()) < -0.99 * bound
    assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_prefix_of_the_first_adapter_is_drawn_at_the_full_rank_and_cut():
    """What a client of a lower rank does, that is sent the seed alone."""
    whole = random_adapter(8)
    drawn = fresh(whole, 5)
    for name, (d_in, _) in DIMENSIONS.items():
        for rank in (1, 3, 8):
            cut = draw_a(5, name, 8, d_in)[:rank]
            assert torch.equal(drawn.prefix(rank).layers[name].A, cut)


# A whole adapter


@pytest.mark.parametrize("rank", [1, 8, (2, 5)])
def test_fresh_has_the_shapes_the_drawn_a_zero_b_and_the_extras_as_they_are(rank):
    like = random_adapter(rank)
    found = fresh(like, 11)
    assert found.scale == like.scale
    assert found.modules_to_save is like.modules_to_save
    for name, factors in like.layers.items():
        made = found.layers[name]
        assert torch.equal(made.A, draw_a(11, name, factors.rank, factors.A.shape[1]))
        assert made.B.shape == factors.B.shape
        assert not made.B.any()
        assert made.A.dtype == made.B.dtype == torch.float32


def test_fresh_looks_at_shapes_only():
    assert same_bits(
        fresh(random_adapter(4, 0, modules_to_save=False), 1),
        fresh(random_adapter(4, 9, modules_to_save=False), 1),
    )


# Filling up


def with_dead_slots(adapter, dimensions):
    """The adapter in which both factors of these slots are zero."""
    layers = {}
    for name, factors in adapter.layers.items():
        a, b = factors.A.clone(), factors.B.clone()
        a[dimensions], b[:, dimensions] = 0.0, 0.0
        layers[name] = Factors(a, b)
    return replace(adapter, layers=layers)


@quick
@given(
    own=st.tuples(*[st.integers(1, 6)] * 2), more=st.tuples(*[st.integers(0, 4)] * 2), seed=seeds
)
def test_filled_keeps_the_old_slots_and_draws_the_new_ones(own, more, seed):
    adapter = random_adapter(own, 1)
    like = random_adapter([o + m for o, m in zip(own, more, strict=True)], 2)
    found = filled(adapter, like, seed)
    for name, factors in found.layers.items():
        old, target = adapter.layers[name], like.layers[name]
        drawn = draw_a(seed, name, target.rank, target.A.shape[1])
        assert factors.A.shape == target.A.shape
        assert factors.B.shape == target.B.shape
        assert torch.equal(factors.A[: old.rank], old.A)
        assert torch.equal(factors.B[:, : old.rank], old.B)
        assert torch.equal(factors.A[old.rank :], drawn[old.rank :])
        assert not factors.B[:, old.rank :].any()
    assert found.modules_to_save is adapter.modules_to_save


@quick
@given(dead=st.sets(st.integers(0, 3)), seed=seeds)
def test_filled_draws_the_slots_that_could_never_learn_and_no_others(dead, seed):
    dimensions = torch.tensor(sorted(dead), dtype=torch.int64)
    adapter = with_dead_slots(random_adapter(4, 1), dimensions)
    found = filled(adapter, random_adapter(6), seed)
    for name, factors in found.layers.items():
        drawn = draw_a(seed, name, 6, factors.A.shape[1])
        for dimension in range(4):
            expected = drawn[dimension] if dimension in dead else adapter.layers[name].A[dimension]
            assert torch.equal(factors.A[dimension], expected)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_slot_with_one_factor_of_zeros_is_alive(zero):
    """Its other factor's gradient is not zero: it can learn, so it stays as it is."""
    adapter = random_adapter(3)
    for factors in adapter.layers.values():
        (factors.A[1] if zero == "A" else factors.B[:, 1]).zero_()
    assert same_bits(filled(adapter, adapter, 5), adapter)


@quick
@given(own=st.integers(1, 5), more=st.integers(0, 4), dead=st.sets(st.integers(0, 4)), seed=seeds)
def test_filling_does_not_change_the_product(own, more, dead, seed):
    dimensions = torch.tensor(
        sorted(dimension for dimension in dead if dimension < own), dtype=torch.int64
    )
    adapter = with_dead_slots(random_adapter(own, 3), dimensions)
    found = filled(adapter, random_adapter(own + more), seed)
    for name, product in dense(adapter).items():
        torch.testing.assert_close(dense(found)[name], product, rtol=1e-12, atol=1e-12)


def test_filling_does_not_change_what_it_was_given():
    adapter = with_dead_slots(random_adapter(3), torch.tensor([1]))
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    found = filled(adapter, random_adapter(5), 0)
    for factors in found.layers.values():
        factors.A.add_(1.0)
        factors.B.add_(1.0)
    assert all(torch.equal(tensor, before[n]) for n, tensor in adapter.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_filled_is_kept_in_float32(dtype):
    adapter = random_adapter(2, dtype=dtype)
    found = filled(adapter, random_adapter(4), 0)
    for name, factors in found.layers.items():
        assert factors.A.dtype == factors.B.dtype == torch.float32
        assert torch.equal(factors.A[:2], adapter.layers[name].A.float())
