"""The step of prelort-sorted: how far the mean change is stretched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import distance, norm
from prelort.config import MethodConfig
from prelort.methods import Client, ServerState, Update, build
from rounds import aggregate

SIZE = 12
SCALE = ScaleRule("constant", 1.0)


def one(direction, length):
    """An adapter of rank 4 whose product is ``length`` at one place of the diagonal."""
    a, b = torch.zeros(4, SIZE), torch.zeros(SIZE, 4)
    a[0, direction] = b[direction, 0] = 1.0
    return LoraAdapter({"layer": Factors(a, b * length)}, SCALE)


def after(start, adapters, examples=None, **options):
    """The server's adapter after these replies."""
    method = build(MethodConfig(name="prelort-sorted", options={"prelort-sorted": options}), 0)
    counts = examples or [1] * len(adapters)
    updates = [
        Update(Client(f"k{i}", adapter.rank, count), adapter, count)
        for i, (adapter, count) in enumerate(zip(adapters, counts, strict=True))
    ]
    return aggregate(method, ServerState(start, levels=(4,)), updates).adapter


@pytest.mark.parametrize("many", [2, 3, 4])
@pytest.mark.parametrize("step, power", [(None, 0.0), (0.5, 0.5), (0.4, 0.4), (0.0, 0.0)])
def test_the_mean_of_unrelated_changes_is_stretched_towards_the_length_of_one(many, step, power):
    """From 1 / sqrt(m) of it, with a step of 1/2 all the way; by default not at all."""
    start = one(0, 0.0)
    options = {} if step is None else {"step": step}
    found = after(start, [one(1 + k, 2.0) for k in range(many)], **options)
    assert norm(found) == pytest.approx(2.0 / math.sqrt(many) * many**power, rel=1e-5)


def test_changes_against_each_other_are_stretched_no_further_than_unrelated_ones():
    """Two clients cancel each other but for 1 % of their change: 100 times the mean is too far."""
    start = one(0, 0.0)
    found = after(start, [one(1, 2.0), one(1, -1.96)], step=0.5)
    assert norm(found) == pytest.approx(0.02 * math.sqrt(2), rel=1e-4)


def test_hands_are_counted_by_weight():
    """One client that outweighs the others counts for little more than one."""
    found = after(one(0, 0.0), [one(1, 1.0), one(1, -0.9)], examples=[9, 1], step=0.5)
    assert norm(found) == pytest.approx(0.81 * math.sqrt(100 / 82), rel=1e-5)


def test_replies_that_changed_nothing_leave_all_as_it_was():
    start = one(0, 3.0)
    assert distance(after(start, [start, start], step=0.5), start) < 1e-6


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    places=st.lists(st.integers(1, 3), min_size=6, max_size=6),
)
def test_the_step_is_never_longer_than_the_clients_own(lengths, places):
    """Nor shorter than the mean of their changes."""
    start = one(0, 1.0)
    adapters = [one(place, length) for place, length in zip(places, lengths, strict=False)]
    own = math.sqrt(sum(distance(adapter, start) ** 2 for adapter in adapters) / len(adapters))
    plain = distance(after(start, adapters, step=0.0), start)
    moved = distance(after(start, adapters, step=0.5), start)
    assert plain * (1 - 1e-4) - 1e-5 <= moved <= own * (1 + 1e-4) + 1e-5
