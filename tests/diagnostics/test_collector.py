"""The diagnostics of a round against dense float64 products, and the laws that they must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter
from prelort.config import MethodConfig
from prelort.diagnostics.collector import Collector
from prelort.diagnostics.sample import Budget
from prelort.methods import Broadcast, Client, Method, ServerState, Update, build
from prelort.methods.averaging import weighting
from random_adapters import dense, dense_norm, random_adapter, scale_rules, seeds

quick = settings(deadline=None, max_examples=25)
RANK = 6
ONE_RANK_FOR_LAYERS = {"fslora"}
ALL = [
    "prelort", "zero-padding", "replication", "hetlora", "fed-plora", "fslora", "flora", "florist",
    "flexlora", "hlora", "raflora", "ffa-lora", "rolora", "fedex-lora",
    "homogeneous-min", "homogeneous-max",
]  # fmt: skip
SAME = {"rel": 1e-5, "abs": 2e-6}
"""Numbers have six digits, and are 0 below 1e-6."""
ONE_LAYER = Budget(least=0.0, per_element=0.0)
"""Measures one layer a round."""

mixes = st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 300)), min_size=1, max_size=5)
"""Rank and number of examples of each client."""


@dataclass
class Played:
    """A round: everything that the diagnostics are a function of."""

    method: Method
    state: ServerState
    sent: list[Broadcast]
    updates: list[Update]
    after: ServerState
    weights: str = "examples"
    layers: list[str] = field(default_factory=lambda: ["wide", "tall"])

    def numbers(self, budget=Budget()):
        clients, weight = [u.client for u in self.updates], weighting(self.weights)
        collector = Collector(self.method, self.state, clients, weight, 0, budget)
        for sent, update in zip(self.sent, self.updates, strict=True):
            collector.add(sent, update)
        return collector.result(self.after)


def moved_by(broadcast, seed, step):
    """Training that moves what was received."""
    received = broadcast.trainable
    ranks = [factors.rank for factors in received.layers.values()]
    noise = random_adapter(ranks, seed + 7, scale=received.scale)
    layers = {
        name: Factors(
            f.A + step * noise.layers[name].A if "A" in broadcast.trains else f.A,
            f.B + step * noise.layers[name].B if "B" in broadcast.trains else f.B,
        )
        for name, f in received.layers.items()
    }
    return LoraAdapter(layers, received.scale, received.modules_to_save)


def play(
    name, mix, seed=0, *, scale=None, weights="examples", step=0.3, own=RANK, trained=moved_by
):
    """A round from a random state: of the method of this name, or of this one."""
    method = build(MethodConfig(name=name, weights=weights), 0) if isinstance(name, str) else name
    levels = tuple(sorted({rank for rank, _ in mix} | {RANK}))
    state = ServerState(random_adapter(own, seed, scale=scale), round=2, levels=levels)
    if name in ("flora", "florist", "fedex-lora"):
        # These have a memory after their first round only.
        state = replace(play_on(method, state, mix, seed + 100, step).after, round=2)
    return replace(play_on(method, state, mix, seed, step, trained), weights=weights)


def play_on(method, state, mix, seed=0, step=0.3, trained=moved_by):
    sent, updates, aggregator = [], [], method.aggregator(state)
    for index, (rank, examples) in enumerate(mix):
        client = Client(f"site-{index}", rank, examples)
        sent.append(method.broadcast(state, client))
        updates.append(Update(client, trained(sent[-1], seed + 10 * index, step), examples))
        aggregator.add(updates[-1])
    return Played(method, state, sent, updates, aggregator.result())


# Dense products


def times(factor, products):
    return {name: factor * product for name, product in products.items()}


def plus(*several):
    return {name: sum(products[name] for products in several) for name in several[0]}


def ratio(products, reference):
    whole = dense_norm(reference)
    return dense_norm(products) / whole if whole > 0 else None


def brute_force(played: Played) -> dict:
    """The formulas of docs/diagnostics.md, written down with d_out x d_in matrices."""

    def products(adapter):
        """Of the measured layers; zero for those that the adapter lacks."""
        found = dense(adapter) if adapter is not None else {}
        shapes = {n: (f.B.shape[0], f.A.shape[1]) for n, f in state.adapter.layers.items()}
        return {n: found.get(n, torch.zeros(shapes[n]).double()) for n in played.layers}

    method, state, after = played.method, played.state, played.after
    whole = method.global_adapter(after)
    before, now = products(method.global_adapter(state)), products(whole)
    weights = [weighting(played.weights)(u) for u in played.updates]
    shares = [weight / sum(weights) for weight in weights]
    functions, starts, moves = [], [], []
    for sent, update in zip(played.sent, played.updates, strict=True):
        received = times(sent.scale_multiplier, products(sent.trainable))
        product = times(sent.scale_multiplier, products(update.adapter))
        frozen = products(sent.frozen)
        functions.append(plus(product, frozen))
        starts.append(ratio(plus(received, frozen, times(-1, before)), before))
        moves.append(ratio(plus(product, times(-1, received)), before))
    mean = plus(*(times(p, w) for p, w in zip(shares, functions, strict=True)))
    apart = [dense_norm(plus(w, times(-1, mean))) ** 2 for w in functions]
    spread = math.sqrt(sum(p * a for p, a in zip(shares, apart, strict=True)))
    cuts, least, share = {}, {}, {}
    singular = [torch.linalg.svdvals(product).square() for product in now.values()]
    energy = sum(float(values.sum()) for values in singular)
    for low, high in segments(state.levels):
        cut = products(method.global_adapter(after, min(high, whole.rank)))
        cuts[str(high)] = ratio(plus(now, times(-1, cut)), now)
        least[str(high)] = math.sqrt(sum(float(v[high:].sum()) for v in singular) / energy)
        share[str(high)] = sum(float(v[low:high].sum()) for v in singular) / energy
    ranks = []
    for values in singular:
        p = values[values > 1e-30] / values.sum()
        ranks.append(math.exp(-float((p * p.log()).sum())))
    return {
        "aggregation_noise": ratio(plus(now, times(-1, mean)), mean),
        "client_dispersion": spread / dense_norm(mean),
        "initialization_noise": {"mean": np.mean(starts), "max": max(starts)},
        "client_drift": {"mean": np.mean(moves), "deviation": np.std(moves)},
        "truncation_noise": cuts,
        "least_truncation_noise": least,
        "effective_rank": np.mean(ranks),
        "energy_share": share,
    }


def segments(levels):
    return list(zip([0, *levels], levels, strict=False))


def assert_equals(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, **SAME), key


@quick
@given(name=st.sampled_from(ALL), mix=mixes, seed=seeds, scale=scale_rules, data=st.data())
def test_every_number_is_what_dense_matrices_say(name, mix, seed, scale, data):
    own = RANK
    if name not in ONE_RANK_FOR_LAYERS and scale.kind == "constant":
        own = list(data.draw(st.tuples(st.integers(1, RANK), st.just(RANK))))
    weights = data.draw(st.sampled_from(["examples", "uniform"]))
    played = play(name, mix, seed, scale=scale, weights=weights, own=own)
    assert_equals(played.numbers(), brute_force(played))


@pytest.mark.parametrize("name", ALL)
def test_every_method_of_three_clients(name):
    """All layers, and a sample: measured as if the model had these layers only."""
    played = play(name, [(2, 10), (4, 20), (RANK, 30)], 5)
    found = played.numbers()
    assert_equals(found, brute_force(played))
    assert found["layers"] == {"measured": 2, "of": 2}
    found = played.numbers(budget=ONE_LAYER)
    assert found["layers"] == {"measured": 1, "of": 2}
    names = ONE_LAYER.sample(played.state.adapter, [2, 4, RANK], 0, 2)
    assert_equals(found, brute_force(replace(played, layers=names)))


@quick
@given(mix=mixes, seed=seeds)
def test_dimensions_and_segments(mix, seed):
    played = play("prelort", mix, seed)
    found, now = played.numbers(), played.after.adapter
    energies = [
        2.0 * (f.A.double().norm(dim=1) * f.B.double().norm(dim=0)) for f in now.layers.values()
    ]
    assert found["dimension_energy"] == pytest.approx(
        torch.stack(energies).mean(0).tolist(), **SAME
    )
    for low, high in segments(played.state.levels):
        common = square = 0.0
        for name, factors in now.layers.items():
            new = factors.B[:, low:high].double() @ factors.A[low:high].double()
            held = torch.zeros_like(new)
            for j in range(low, high):
                holders = [u for u in played.updates if u.adapter.layers[name].rank > j]
                for u in holders:
                    p, f = u.examples / sum(h.examples for h in holders), u.adapter.layers[name]
                    held += p * torch.outer(f.B[:, j].double(), f.A[j].double())
            common += float((new * held).sum())
            square += float(held.square().sum())
        expected = pytest.approx(common / square, **SAME) if square else None
        assert found["tail_kept"][str(high)] == expected


# Laws


def agreeing(broadcast, seed, step):
    """Training that leads every client to the same rank dimensions."""
    received = broadcast.trainable
    goal = random_adapter(RANK, 77).prefix(received.rank)
    return LoraAdapter(goal.layers, received.scale, received.modules_to_save)


@quick
@given(mix=mixes, seed=seeds)
def test_what_is_kept_of_a_tail_on_which_its_holders_agree(mix, seed):
    """All of it by segment-wise averaging, the square of their share by zero-padding."""
    segment_wise = play("prelort", mix, seed, trained=agreeing).numbers()["tail_kept"]
    padded = play("zero-padding", mix, seed, trained=agreeing).numbers()["tail_kept"]
    total, ranks = sum(examples for _, examples in mix), sorted({rank for rank, _ in mix})
    for rank in ranks:
        share = sum(examples for own, examples in mix if own >= rank) / total
        assert segment_wise[str(rank)] == pytest.approx(1.0, rel=1e-5)
        assert padded[str(rank)] == pytest.approx(share**2, rel=1e-5)
    if ranks[-1] < RANK:
        assert padded[str(RANK)] is None  # nobody holds it


@quick
@given(mix=mixes, seed=seeds)
def test_methods_that_are_exact_have_no_noise(mix, seed):
    same = [(RANK, 1 + examples % 50) for _, examples in [*mix, (1, 1)]]
    assert play("ffa-lora", same, seed).numbers()["aggregation_noise"] < 1e-5
    assert play("fedit", same, seed).numbers()["aggregation_noise"] > 1e-3
    flora, plora = play("flora", mix, seed).numbers(), play("fed-plora", mix, seed).numbers()
    assert flora["aggregation_noise"] < 2e-6
    assert flora["initialization_noise"] == plora["initialization_noise"] == {"mean": 0, "max": 0}


@quick
@given(mix=mixes, seed=seeds)
def test_cuts_are_never_better_than_the_best(mix, seed):
    for name in ("prelort", "flexlora", "flora"):
        found = play(name, mix, seed).numbers()
        shares = list(found["energy_share"].values())
        assert min(shares) >= 0
        assert sum(shares) <= 1 + 1e-5
        for level, least in found["least_truncation_noise"].items():
            assert found["truncation_noise"][level] >= least - 2e-6


def test_a_small_difference_does_not_cancel():
    played = play("fedit", [(RANK, 1), (RANK, 2)], 1, step=1e-5)
    found, expected = (n["client_drift"]["mean"] for n in (played.numbers(), brute_force(played)))
    assert 1e-6 < expected < 1e-4
    assert found == pytest.approx(expected, rel=1e-3)


# What is undefined or unusual


def test_before_anything_is_learnt():
    """B = 0 at first: drift and noise of the start are relative to nothing."""
    state = ServerState(random_adapter(RANK, 1).scaled(0.0), levels=(2, RANK))
    found = play_on(build(MethodConfig(), 0), state, [(2, 1), (RANK, 1)]).numbers()
    assert found["client_drift"] == {"mean": None, "deviation": None}
    assert found["initialization_noise"] == {"mean": None, "max": None}
    assert found["aggregation_noise"] > 0
    assert found["effective_rank"] > 1
    state = replace(state, levels=(2, RANK))
    still = play_on(
        build(MethodConfig(), 0), state, [(2, 1)], trained=lambda sent, *_: sent.trainable
    )
    found = still.numbers()
    assert found["aggregation_noise"] is None
    assert found["effective_rank"] is None
    assert found["dimension_energy"] == [0.0] * RANK
    assert set(found["truncation_noise"].values()) == {None}
    assert set(found["tail_kept"].values()) == {None}


def test_too_many_dimensions_leave_out_the_clients():
    played = play("prelort", [(2, 3), (4, 3), (RANK, 4)], 2)
    expected, few = played.numbers(), Budget(dimensions=2 * RANK + 3)
    found = played.numbers(budget=few)
    for key in ("aggregation_noise", "client_dispersion"):
        assert found[key] is None
    assert found["client_drift"] == {"mean": None, "deviation": None}
    assert set(found["tail_kept"].values()) == {None}
    for key in ("truncation_noise", "least_truncation_noise", "effective_rank", "dimension_energy"):
        assert found[key] == expected[key]
    assert played.numbers(budget=Budget(dimensions=1))["layers"] == {"measured": 0, "of": 2}


def test_dimensions_that_moved_have_no_tail():
    """Random selections are not the first rank dimensions, so a position means nothing."""
    for name in ("fed-plora", "fslora", "flora"):
        found = play(name, [(1, 3), (2, 4)], 3).numbers()
        assert set(found["tail_kept"].values()) == {None}, name


def test_no_matrix_of_a_layers_size_is_ever_built():
    """A dense product of this layer would take 320 GB."""
    large = {"wide": (200_000, 200_000)}
    first, *trained = (
        random_adapter(rank, rank, dimensions=large, modules_to_save=False) for rank in (2, 1, 2)
    )
    state, method = ServerState(first, levels=(1, 2)), build(MethodConfig(), 0)
    updates = [Update(Client(f"site-{a.rank}", a.rank, 1), a, 1) for a in trained]
    sent = [method.broadcast(state, update.client) for update in updates]
    assert Played(method, state, sent, updates, state).numbers()["aggregation_noise"] > 0


# The sample of layers


LAYERS = {f"layer.{i}": (512, 512) for i in range(10)}


def big(seed=0):
    return random_adapter(16, seed, dimensions=LAYERS, modules_to_save=False)


def test_the_sample_moves_on_until_all_layers_were_measured():
    adapter, ranks, sample = big(), [16] * 20, Budget().sample
    assert sample(random_adapter(16, 0), ranks, 0, 0) == ["tall", "wide"]  # small: all of them
    rounds = [sample(adapter, ranks, 7, index) for index in range(12)]
    assert 1 <= len(rounds[0]) < 10
    assert {len(names) for names in rounds} == {len(rounds[0])}
    needed = math.ceil(10 / len(rounds[0]))
    assert {name for names in rounds[:needed] for name in names} == set(LAYERS)
    assert rounds != [sample(adapter, ranks, 8, index) for index in range(12)]
    # A checkpoint may give the layers in another order.
    turned = replace(big(1), layers=dict(reversed(adapter.layers.items())))
    assert rounds == [sample(turned, ranks, 7, index) for index in range(12)]
