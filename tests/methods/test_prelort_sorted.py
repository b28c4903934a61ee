"""The rule of prelort-sorted: what a client would have changed in the dimensions that it lacks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import concatenate, distance
from prelort.aggregation.products import Segment
from prelort.config import MethodConfig
from prelort.methods import Client, ServerState, Update, build
from prelort.methods.prelort_sorted import multiplier
from rounds import aggregate

SIZE, R, LOW = 12, 4, 2
SCALE = ScaleRule("constant", 1.0)
ZERO = LoraAdapter({"layer": Factors(torch.eye(R, SIZE), torch.zeros(SIZE, R))}, SCALE)


def reply(*places, rank=R, length=1.0):
    """An adapter whose product is ``length`` at (place, j) for each dimension j."""
    b = torch.zeros(SIZE, rank)
    b[list(places), range(len(places))] = length
    return LoraAdapter({"layer": Factors(torch.eye(rank, SIZE), b)}, SCALE)


def after(adapters, start=ZERO):
    """The server's adapter after these replies of equal weight."""
    method = build(MethodConfig(name="prelort-sorted"), 0)
    updates = [Update(Client(f"k{i}", a.rank, 1), a, 1) for i, a in enumerate(adapters)]
    return aggregate(method, ServerState(start, levels=(LOW, R)), updates).adapter


def test_holders_who_agree_are_followed():
    same = [reply(0, 1, 2, 3), reply(0, 1, 2, 3), reply(0, 1, rank=LOW)]
    assert distance(after(same), same[0]) < 1e-5


def test_a_change_that_agrees_with_no_other_counts_once():
    """The others' missing changes are no change: the tail moves by a third of its only holder's."""
    alone = [reply(0, 1, 2, 3), reply(4, 5, rank=LOW), reply(6, 7, rank=LOW)]
    third = reply(0, 1, 2, 3, length=1 / 3)
    rest = concatenate([reply(4, 5, rank=LOW), reply(6, 7, rank=LOW)], [1 / 3, 1 / 3])
    assert distance(after(alone), concatenate([third, rest], [1.0, 1.0])) < 1e-5


def test_without_agreement_the_mean_over_all_rounds_is_that_over_all_clients():
    """Unbiased when few take part: with every subset of two of four clients once."""
    clients = [reply(0, 0, 2), reply(4, 4, rank=LOW), reply(6, rank=LOW), reply(8, rank=LOW)]
    rounds = [after(pair) for pair in itertools.combinations(clients, 2)]
    mean = concatenate(rounds, [1 / len(rounds)] * len(rounds))
    assert distance(mean, concatenate(clients, [1 / 4] * 4)) < 1e-5


def test_changes_against_each_other_do_not_turn_a_segment_round():
    opposite = [reply(0, 1, 2), reply(0, 1, 2, length=-0.9), reply(0, rank=LOW)]
    tail = after(opposite).layers["layer"]
    moved = (tail.B @ tail.A)[2, 2]
    assert moved == pytest.approx(0.1 / 3, rel=1e-4)  # two holders of three, mean change 0.05


def test_after_the_first_round_clients_agree_by_what_they_change_along_the_adapter():
    """Their noise is not counted: the tail follows its only holder, though most changes differ."""
    start = reply(0, 1, 2, 3)
    noisy = [_changed(start, 0.2, 4), _changed(start, 0.2, 6, rank=LOW)]
    assert _tail(after(noisy, start)) == pytest.approx([1.2, 1.2], abs=1e-5)


def test_clients_who_agree_off_the_adapter_alone_do_not_agree():
    """One lengthens what there is and one shortens it: the tail moves by half of its holder's."""
    start = reply(0, 1, 2, 3)
    contrary = [_changed(start, 0.2, 4), _changed(start, -0.2, 4, rank=LOW)]
    assert _tail(after(contrary, start)) == pytest.approx([1.1, 1.1], abs=1e-5)


def _changed(start, gain, place, rank=R):
    """The reply of a client that adds ``gain`` to each dimension, and noise at other places."""
    a, b = start.layers["layer"].A[:rank], start.layers["layer"].B[:, :rank] * (1 + gain)
    noise = torch.zeros(SIZE, rank)
    noise[place, 0] = noise[place + 1, 1] = 3.0
    return LoraAdapter({"layer": Factors(a, b + noise)}, SCALE)


def _tail(adapter):
    """What is left of the third and fourth dimension of ``reply(0, 1, 2, 3)``."""
    product = adapter.layers["layer"].B @ adapter.layers["layer"].A
    return [float(product[2, 2]), float(product[3, 3])]


@given(
    rho=st.floats(0, 1),
    weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=6),
    missing=st.floats(0, 20),
)
def test_a_multiplier_is_between_the_holders_share_and_all(rho, weights, missing):
    held = sum(weights)
    eta = multiplier(_segment(weights), held + missing, rho)
    share = held / (held + missing)
    assert share - 1e-9 <= eta <= 1 + 1e-9


@given(rho=st.floats(0, 0.99), holders=st.integers(1, 6), missing=st.integers(0, 6))
def test_the_prediction_is_the_best_linear_one(rho, holders, missing):
    """Equal weights: that of the covariance matrix of the changes, solved."""
    covariance = rho * np.ones((holders, holders)) + (1 - rho) * np.eye(holders)
    coefficients = np.linalg.solve(covariance, rho * np.ones(holders))
    expected = (holders + missing * coefficients.sum()) / (holders + missing)
    found = multiplier(_segment([1.0] * holders), float(holders + missing), rho)
    assert found == pytest.approx(expected, rel=1e-6)


def _segment(weights):
    segment = Segment(0, LOW)
    for weight in weights:
        segment.add(ZERO, weight)
    return segment
