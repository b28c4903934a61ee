"""How dimensions begin: one matrix for everyone, of which a client draws what it is not sent."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters.initial import draw_a, filled, fresh
from prelort.seeds import torch_generator
from random_adapters import DIMENSIONS, dense, random_adapter, seeds

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


def test_a_prefix_of_the_first_adapter_is_drawn_at_the_full_rank_and_cut():
    """What a client of a lower rank does, that is sent the seed alone."""
    whole = random_adapter(8)
    drawn = fresh(whole, 5)
    for name, (d_in, _) in DIMENSIONS.items():
        for rank in (1, 3, 8):
            cut = draw_a(5, name, 8, d_in)[:rank]
            assert torch.equal(drawn.prefix(rank).layers[name].A, cut)


# Filling up


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
