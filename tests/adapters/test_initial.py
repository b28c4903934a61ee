"""How dimensions begin: one matrix for everyone, of which a client draws what it is not sent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_fresh_has_the_shapes_the_drawn_a_zero_b_and_the_modules_to_save_as_they_are(rank):
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


# Filling up


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_dimension_with_one_factor_of_zeros_is_alive(zero):
    """Its other factor's gradient is not zero: it can learn, so it stays as it is."""
    adapter = random_adapter(3)
    for factors in adapter.layers.values():
        (factors.A[1] if zero == "A" else factors.B[:, 1]).zero_()
    assert same_bits(filled(adapter, adapter, 5), adapter)


@quick
@given(
    own=st.tuples(*[st.integers(1, 6)] * 2),
    more=st.tuples(*[st.integers(0, 4)] * 2),
    dead=st.sets(st.integers(0, 5)),
    seed=seeds,
)
def test_filled_draws_new_dimensions_and_those_that_could_never_learn(own, more, dead, seed):
    """A of these alone: the product stays."""
    old = random_adapter(own, 1)
    for factors in old.layers.values():
        zero = [j for j in dead if j < factors.rank]
        factors.A[zero], factors.B[:, zero] = 0.0, 0.0
    before = {name: tensor.clone() for name, tensor in old.tensors().items()}
    like = random_adapter([o + m for o, m in zip(own, more, strict=True)], 2)
    found = filled(old, like, seed)
    for name, factors in found.layers.items():
        rank, (d_in, _) = like.layers[name].rank, DIMENSIONS[name]
        expected = draw_a(seed, name, rank, d_in)
        for j in set(range(old.layers[name].rank)) - dead:
            expected[j] = old.layers[name].A[j]
        assert torch.equal(factors.A, expected)
        assert factors.B.shape == like.layers[name].B.shape
        torch.testing.assert_close(dense(found)[name], dense(old)[name], rtol=1e-12, atol=1e-12)
        factors.A.add_(1.0)
    assert found.modules_to_save is old.modules_to_save
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.tensors().items())
