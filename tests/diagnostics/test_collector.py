"""The diagnostics of a round against dense float64 products, and the laws that they must keep."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.diagnostics.collector import Collector, sampled, segments
from prelort.diagnostics.rank_one_products import LayerDimensions, effective_rank
from prelort.methods import Broadcast, Client, ServerState, Update, build, diagnostics
from prelort.methods.averaging import weighting
from prelort.methods.prefix import PrefixMethod
from random_adapters import dense, dense_norm, random_adapter, scale_rules, seeds

quick = settings(deadline=None, max_examples=25)
RANK = 6
WITHOUT_LAYERS_OF_THEIR_OWN_RANK = {"fslora"}
ALL = [
    "prelort", "zero-padding", "replication", "hetlora", "fed-plora", "fslora", "flora", "florist",
    "flexlora", "hlora", "raflora", "ffa-lora", "rolora", "fedex-lora",
    "homogeneous-min", "homogeneous-max",
]  # fmt: skip
SAME = {"rel": 1e-5, "abs": 2e-6}
"""Numbers are told to six digits, and below 1e-6 as 0."""

mixes = st.lists(st.tuples(st.integers(1, RANK), st.integers(1, 300)), min_size=1, max_size=5)
"""Rank and number of examples of each client."""


@dataclass
class Played:
    """A round that was played: everything that the diagnostics are a function of."""

    method: PrefixMethod
    state: ServerState
    clients: list[Client]
    levels: tuple[int, ...]
    sent: list[Broadcast]
    updates: list[Update]
    after: ServerState
    weights: str

    def numbers(self, order=None, seed=0):
        weight = weighting(self.weights)
        collector = Collector(self.method, self.state, self.clients, self.levels, weight, seed)
        for index in order or range(len(self.updates)):
            collector.add(self.sent[index], self.updates[index])
        return collector.result(self.after)


def play(name, mix, seed=0, *, scale=None, weights="examples", step=0.3, own=RANK, trained=None):
    """A round from a random state, of clients whose training moves what they received."""
    method = name
    levels = tuple(sorted({rank for rank, _ in mix} | {RANK}))
    if isinstance(name, str):
        method = build(MethodConfig(name=name, weights=weights), levels, 0)
    state = ServerState(random_adapter(own, seed, scale=scale), round=2)
    if name in ("flora", "florist", "fedex-lora"):
        # These have a memory after their first round only.
        state = replace(play_on(method, state, mix, seed + 100, step)[2], round=2)
    sent, updates, after = play_on(method, state, mix, seed, step, trained)
    clients = [update.client for update in updates]
    return Played(method, state, clients, levels, sent, updates, after, weights)


def play_on(method, state, mix, seed, step, trained=None):
    sent, updates = [], []
    aggregator = method.aggregator(state)
    for index, (rank, examples) in enumerate(mix):
        client = Client(f"site-{index}", rank, examples)
        broadcast = method.broadcast(state, client)
        moved = (trained or moved_by)(broadcast, seed + 10 * index, step)
        sent.append(broadcast)
        updates.append(Update(client, moved, examples))
        aggregator.add(updates[-1])
    return sent, updates, aggregator.result()


def moved_by(broadcast, seed, step):
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


# Dense products


def times(factor, products):
    return {name: factor * product for name, product in products.items()}


def plus(*several):
    return {name: sum(products[name] for products in several) for name in several[0]}


def padded(adapter, like):
    """Dense products, zero for layers that the adapter lacks."""
    found = dense(adapter) if adapter is not None else {}
    return {name: found.get(name, torch.zeros_like(product)) for name, product in like.items()}


def ratio(products, reference):
    whole = dense_norm(reference)
    return dense_norm(products) / whole if whole > 0 else None


def brute_force(played: Played) -> dict:
    """The formulas of docs/diagnostics.md, written down with d_out x d_in matrices."""
    method, state, after = played.method, played.state, played.after
    before, now = dense(method.global_adapter(state)), dense(method.global_adapter(after))
    weights = [weighting(played.weights)(u) for u in played.updates]
    shares = [weight / sum(weights) for weight in weights]
    functions, starts, moves = [], [], []
    for sent, update in zip(played.sent, played.updates, strict=True):
        received = times(sent.scale_multiplier, dense(sent.trainable))
        product = times(sent.scale_multiplier, dense(update.adapter))
        frozen = padded(sent.frozen, before)
        functions.append(plus(product, frozen))
        starts.append(ratio(plus(received, frozen, times(-1, before)), before))
        moves.append(ratio(plus(product, times(-1, received)), before))
    mean = plus(*(times(p, w) for p, w in zip(shares, functions, strict=True)))
    apart = [dense_norm(plus(w, times(-1, mean))) ** 2 for w in functions]
    spread = math.sqrt(sum(p * a for p, a in zip(shares, apart, strict=True)))
    cuts, least, share = {}, {}, {}
    singular = [torch.linalg.svdvals(product).square() for product in now.values()]
    energy = sum(float(values.sum()) for values in singular)
    whole = method.global_adapter(after)
    for low, high in segments(played.levels):
        cut = dense(method.global_adapter(after, min(high, whole.rank)))
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


def assert_equals(found: dict, expected: dict) -> None:
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, **SAME), key


@quick
@given(name=st.sampled_from(ALL), mix=mixes, seed=seeds, scale=scale_rules, data=st.data())
def test_every_number_is_what_dense_matrices_say(name, mix, seed, scale, data):
    own = RANK
    if name not in WITHOUT_LAYERS_OF_THEIR_OWN_RANK and scale.kind == "constant":
        own = list(data.draw(st.tuples(st.integers(1, RANK), st.just(RANK))))
    weights = data.draw(st.sampled_from(["examples", "uniform"]))
    played = play(name, mix, seed, scale=scale, weights=weights, own=own)
    assert_equals(played.numbers(), brute_force(played))


@pytest.mark.parametrize("name", ALL)
def test_every_method_of_three_clients(name):
    played = play(name, [(2, 10), (4, 20), (RANK, 30)], 5)
    found = played.numbers()
    assert_equals(found, brute_force(played))
    assert found["layers"] == {"measured": 2, "of": 2}


@quick
@given(mix=mixes, seed=seeds)
def test_slots_and_segments(mix, seed):
    played = play("prelort", mix, seed)
    found, now = played.numbers(), played.after.adapter
    energies = [
        2.0 * (f.A.double().norm(dim=1) * f.B.double().norm(dim=0)) for f in now.layers.values()
    ]
    assert found["slot_energy"] == pytest.approx(torch.stack(energies).mean(0).tolist(), **SAME)
    weights = [float(u.examples) for u in played.updates]
    for low, high in segments(played.levels):
        common = square = 0.0
        for name, factors in now.layers.items():
            new = factors.B[:, low:high].double() @ factors.A[low:high].double()
            held = torch.zeros_like(new)
            for dimension in range(low, high):
                holders = [
                    (w, u.adapter.layers[name])
                    for w, u in zip(weights, played.updates, strict=True)
                    if u.adapter.layers[name].rank > dimension
                ]
                for w, f in holders:
                    p = w / sum(w for w, _ in holders)
                    held += p * torch.outer(f.B[:, dimension].double(), f.A[dimension].double())
            common += float((new * held).sum())
            square += float(held.square().sum())
        expected = pytest.approx(common / square, **SAME) if square else None
        assert found["tail_kept"][str(high)] == expected


# Laws


def agreeing(broadcast, seed, step):
    """Training that leads every client to the same slots."""
    goal = random_adapter(RANK, 77)
    received = broadcast.trainable
    return LoraAdapter(goal.prefix(received.rank).layers, received.scale, received.modules_to_save)


@quick
@given(mix=mixes, seed=seeds)
def test_zero_padding_keeps_the_square_of_the_holders_share(mix, seed):
    found = play("zero-padding", mix, seed, trained=agreeing).numbers()
    total = sum(examples for _, examples in mix)
    ranks = sorted({rank for rank, _ in mix})
    for rank in ranks:
        share = sum(examples for own, examples in mix if own >= rank) / total
        assert found["tail_kept"][str(rank)] == pytest.approx(share**2, rel=1e-5)
    if ranks[-1] < RANK:
        assert found["tail_kept"][str(RANK)] is None  # nobody holds it


@quick
@given(mix=mixes, seed=seeds)
def test_segment_wise_averaging_keeps_what_holders_agree_on(mix, seed):
    found = play("prelort", mix, seed, trained=agreeing).numbers()
    for rank, _ in mix:
        assert found["tail_kept"][str(rank)] == pytest.approx(1.0, rel=1e-5)


@quick
@given(seed=seeds, rank=st.integers(2, RANK))
def test_segment_wise_averaging_keeps_what_one_holder_has(seed, rank):
    found = play("prelort", [(1, 5), (rank, 3)], seed).numbers()
    assert found["tail_kept"][str(rank)] == pytest.approx(1.0, rel=1e-5)


@quick
@given(seed=seeds, name=st.sampled_from(["prelort", "zero-padding", "flora", "fed-plora"]))
def test_one_client_is_averaged_without_noise(seed, name):
    found = play(name, [(RANK, 3)], seed).numbers()
    assert found["aggregation_noise"] == 0.0
    assert found["client_dispersion"] == 0.0
    assert found["client_drift"]["deviation"] == 0.0
    assert found["initialization_noise"] == {"mean": 0.0, "max": 0.0}


@quick
@given(seed=seeds, examples=st.lists(st.integers(1, 50), min_size=2, max_size=5))
def test_one_a_for_all_makes_averages_exact(seed, examples):
    mix = [(RANK, count) for count in examples]
    assert play("ffa-lora", mix, seed).numbers()["aggregation_noise"] < 1e-5
    assert play("fedit", mix, seed).numbers()["aggregation_noise"] > 1e-3


@quick
@given(mix=mixes, seed=seeds)
def test_stacking_is_exact_and_folding_starts_at_the_global_function(mix, seed):
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
    found, expected = played.numbers(), brute_force(played)
    assert 1e-6 < expected["client_drift"]["mean"] < 1e-4
    assert found["client_drift"]["mean"] == pytest.approx(
        expected["client_drift"]["mean"], rel=1e-3
    )


def test_the_order_of_the_replies_does_not_matter(monkeypatch):
    monkeypatch.setattr(diagnostics, "DIGITS", 17)
    for seed in range(5):
        played = play("prelort", [(2, 10), (4, 7), (RANK, 3), (4, 1)], seed)
        assert played.numbers() == played.numbers([3, 1, 0, 2])


def test_numbers_have_six_digits():
    def leaves(value):
        inner = value.values() if isinstance(value, dict) else value
        return [x for v in inner for x in (leaves(v) if isinstance(v, dict | list) else [v])]

    numbers = leaves(play("prelort", [(2, 10), (RANK, 3)], 3).numbers())
    assert len(numbers) > 20
    assert all(float(f"{x:.6g}") == x for x in numbers if x is not None)


# What is not there, or is strange


def test_before_anything_is_learnt():
    """B = 0 at first: drift and noise of the start are relative to nothing."""
    state = ServerState(random_adapter(RANK, 1).scaled(0.0))
    method = build(MethodConfig(), (2, RANK), 0)
    sent, updates, after = play_on(method, state, [(2, 1), (RANK, 1)], 0, 0.3)
    clients = [update.client for update in updates]
    found = Played(method, state, clients, (2, RANK), sent, updates, after, "examples").numbers()
    assert found["client_drift"] == {"mean": None, "deviation": None}
    assert found["initialization_noise"] == {"mean": None, "max": None}
    assert found["aggregation_noise"] > 0
    assert found["effective_rank"] > 1


def test_products_that_stay_zero():
    played = play("prelort", [(2, 1), (4, 1)], trained=lambda sent, *_: sent.trainable.scaled(0.0))
    played.state = replace(played.state, adapter=played.state.adapter.scaled(0.0))
    played.after = replace(played.after, adapter=played.after.adapter.scaled(0.0))
    found = played.numbers()
    assert found["aggregation_noise"] is None
    assert found["effective_rank"] is None
    assert found["slot_energy"] == [0.0] * RANK
    assert set(found["truncation_noise"].values()) == {None}
    assert set(found["tail_kept"].values()) == {None}


def test_rank_one():
    played = play("prelort", [(1, 1), (1, 1)], own=1)
    played.levels = (1,)
    found = played.numbers()
    assert_equals(found, brute_force(played))
    assert found["effective_rank"] == 1.0
    assert found["truncation_noise"] == {"1": 0.0}


def test_an_adapter_without_layers():
    state = ServerState(LoraAdapter({}, ScaleRule(), {"score.weight": torch.ones(2, 3)}))
    method = build(MethodConfig(), (2, 4), 0)
    collector = Collector(method, state, [Client("a", 2, 1)], (2, 4), lambda update: 1.0, 0)
    collector.add(Broadcast(state.adapter), Update(Client("a", 2, 1), state.adapter, 1))
    found = collector.result(state)
    assert found["layers"] == {"measured": 0, "of": 0}
    assert found["aggregation_noise"] is None
    assert found["slot_energy"] == []
    assert found["truncation_noise"] == {"2": None, "4": None}


def test_no_reply_that_has_a_weight():
    state = ServerState(random_adapter(RANK, 1))
    method = build(MethodConfig(), (2, RANK), 0)
    found = Collector(method, state, [], (2, RANK), lambda update: 1.0, 0).result(state)
    assert found["aggregation_noise"] is None
    assert found["client_drift"]["mean"] is None
    assert found["tail_kept"] == {"2": None, "6": None}
    assert found["effective_rank"] > 1


def test_a_reply_without_weight_counts_for_nothing():
    played = play("prelort", [(2, 3), (4, 1), (RANK, 0)], 2)
    with np.errstate(all="raise"):
        found = played.numbers()
    assert_equals(found, brute_force(played))
    assert found["tail_kept"] == {
        "2": pytest.approx(1.0, abs=0.2),
        "4": pytest.approx(1.0),
        str(RANK): None,
    }


def test_a_level_above_all_layers():
    played = play("prelort", [(2, 3), (4, 1)], 2, own=4)
    assert played.levels == (2, 4, RANK)
    found = played.numbers()
    assert_equals(found, brute_force(played))
    assert found["truncation_noise"][str(RANK)] == 0.0
    assert found["tail_kept"][str(RANK)] is None


def test_layers_that_a_readout_lacks():
    class Narrow(PrefixMethod):
        name = "narrow"

        def global_adapter(self, state, rank=None):
            found = super().global_adapter(state, rank)
            return replace(found, layers={"wide": found.layers["wide"]})

    method = Narrow(MethodConfig(), (2, RANK), 0)
    found = play(method, [(2, 3), (RANK, 4)], 2).numbers()
    assert found["layers"] == {"measured": 2, "of": 2}
    assert found["aggregation_noise"] > 0
    assert all(math.isfinite(value) for value in found["truncation_noise"].values())


class Odd(PrefixMethod):
    """A global function of more slots than the adapter, some of its layers frozen at clients."""

    name = "odd"
    summary = paper = ""

    def global_adapter(self, state, rank=None):
        ranks = [9, 2] if rank is None else [min(rank, 9), min(rank, 2)]
        whole = random_adapter([9, 2], 31 + state.round)
        layers = {
            name: factors.prefix(most)
            for (name, factors), most in zip(whole.layers.items(), ranks, strict=True)
        }
        return LoraAdapter(layers, whole.scale)

    def broadcast(self, state, client):
        frozen = random_adapter([4, 4], 90 + client.rank)
        del frozen.layers["tall"]
        return Broadcast(state.adapter.prefix(client.rank), frozen, scale_multiplier=0.5)


def test_any_readout_will_do():
    played = play(Odd(MethodConfig(), (2, RANK), 0), [(2, 3), (RANK, 4)], 2)
    assert_equals(played.numbers(), brute_force(played))


class Whole(Odd):
    """A readout that needs all layers to be there."""

    def global_adapter(self, state, rank=None):
        assert len(state.adapter.layers) == 2
        return super().global_adapter(state, rank)


def test_a_readout_that_needs_all_layers_gets_them(monkeypatch):
    monkeypatch.setattr(diagnostics, "LEAST_BUDGET", 0.0)
    monkeypatch.setattr(diagnostics, "BUDGET_PER_ELEMENT", 0.0)
    played = play(Whole(MethodConfig(), (2, RANK), 0), [(2, 3), (RANK, 4)], 2)
    found = played.numbers()
    assert found["layers"] == {"measured": 1, "of": 2}
    assert found["aggregation_noise"] > 0


def test_a_client_that_prunes_itself():
    def pruned(broadcast, seed, step):
        moved = moved_by(broadcast, seed, step)
        return moved.prefix(max(1, moved.rank - 1))

    played = play("hetlora", [(2, 3), (4, 1), (RANK, 4)], 2, trained=pruned)
    assert_equals(played.numbers(), brute_force(played))


def test_replies_in_half_precision():
    def halved(broadcast, seed, step):
        return moved_by(broadcast, seed, step).to(torch.bfloat16)

    played = play("prelort", [(2, 3), (RANK, 4)], 2, trained=halved)
    assert_equals(played.numbers(), brute_force(played))


def test_too_many_slots_leave_out_the_clients(monkeypatch):
    played = play("prelort", [(2, 3), (4, 3), (RANK, 4)], 2)
    expected = played.numbers()
    monkeypatch.setattr(diagnostics, "MOST_SLOTS", 2 * RANK + 3)
    found = played.numbers()
    for key in ("aggregation_noise", "client_dispersion"):
        assert found[key] is None
    assert found["client_drift"] == {"mean": None, "deviation": None}
    assert set(found["tail_kept"].values()) == {None}
    for key in ("truncation_noise", "least_truncation_noise", "effective_rank", "slot_energy"):
        assert found[key] == expected[key]
    monkeypatch.setattr(diagnostics, "MOST_SLOTS", 1)
    assert played.numbers()["layers"] == {"measured": 0, "of": 2}


def test_replies_that_are_too_many_to_measure_are_not_kept(monkeypatch):
    """Else the server's memory would grow with the number of clients."""
    monkeypatch.setattr(diagnostics, "MOST_SLOTS", 5)
    state = ServerState(random_adapter(2, 0, modules_to_save=False))
    method = build(MethodConfig(), (1, 2), 0)
    collector = Collector(method, state, [], (1, 2), lambda update: 1.0, 0)
    kept = []
    for number in range(4):
        client = Client(f"site-{number}", 2, 1)
        trained = random_adapter(2, number, modules_to_save=False)
        collector.add(method.broadcast(state, client), Update(client, trained, 1))
        kept.append(len(collector.replies))
    assert kept == [1, 2, 0, 0]
    assert collector.result(state)["aggregation_noise"] is None


def test_slots_that_moved_have_no_tail():
    """Random selections are not the first slots, so a position says nothing."""
    for name in ("fed-plora", "fslora", "flora"):
        found = play(name, [(1, 3), (2, 4)], 3).numbers()
        assert set(found["tail_kept"].values()) == {None}, name


def test_no_matrix_of_a_layers_size_is_ever_built():
    """A dense product of this layer would take 320 GB."""
    large = {"wide": (200_000, 200_000)}
    state = ServerState(random_adapter(2, 0, dimensions=large, modules_to_save=False))
    method = build(MethodConfig(), (1, 2), 0)
    collector = Collector(method, state, [], (1, 2), lambda update: 1.0, 0)
    for rank in (1, 2):
        client = Client(f"site-{rank}", rank, 1)
        trained = random_adapter(rank, rank, dimensions=large, modules_to_save=False)
        collector.add(method.broadcast(state, client), Update(client, trained, 1))
    assert collector.result(state)["aggregation_noise"] > 0


# The sample of layers


LAYERS = {f"layer.{i}": (512, 512) for i in range(10)}


def big(seed=0):
    return random_adapter(16, seed, dimensions=LAYERS, modules_to_save=False)


def test_small_adapters_are_measured_whole():
    assert sampled(random_adapter(16, 0), [16] * 20, 0, 0) == ["tall", "wide"]


def test_the_sample_moves_on_until_all_layers_were_measured():
    adapter, ranks = big(), [16] * 20
    rounds = [sampled(adapter, ranks, 7, index) for index in range(12)]
    assert 1 <= len(rounds[0]) < 10
    assert {len(names) for names in rounds} == {len(rounds[0])}
    needed = math.ceil(10 / len(rounds[0]))
    assert {name for names in rounds[:needed] for name in names} == set(LAYERS)
    assert rounds == [sampled(big(1), ranks, 7, index) for index in range(12)]
    assert rounds != [sampled(adapter, ranks, 8, index) for index in range(12)]
    # The dictionary's order is another after a checkpoint.
    turned = replace(adapter, layers=dict(reversed(adapter.layers.items())))
    assert rounds[3] == sampled(turned, ranks, 7, 3)


def test_the_sample_keeps_to_its_budget():
    for clients in (1, 3, 10, 40):
        names = sampled(big(), [16] * clients, 0, 0)
        dimensions = 16 * clients + 32
        cost = len(names) * 1024 * dimensions**2 / 2
        sent = 10 * 1024 * 16 * clients
        budget = max(diagnostics.LEAST_BUDGET, diagnostics.BUDGET_PER_ELEMENT * sent)
        assert cost <= budget or len(names) == 1
        assert len(names) == 10 or cost + 1024 * dimensions**2 / 2 > budget


def test_of_a_reply_only_copies_of_the_sample_are_kept():
    state = ServerState(big())
    method = build(MethodConfig(), (16,), 0)
    clients = [Client(f"site-{i}", 16, 1) for i in range(20)]
    collector = Collector(method, state, clients, (16,), lambda update: 1.0, 0)
    update = Update(clients[0], big(1), 1)
    tensors = [weakref.ref(tensor) for tensor in update.adapter.tensors().values()]
    collector.add(method.broadcast(state, clients[0]), update)
    del update
    assert all(reference() is None for reference in tensors)
    (reply,) = collector.replies
    assert list(reply.trained.layers) == collector.names
    assert len(collector.names) < 10


def test_a_sample_is_measured_as_if_the_model_had_these_layers_only(monkeypatch):
    monkeypatch.setattr(diagnostics, "LEAST_BUDGET", 0.0)
    monkeypatch.setattr(diagnostics, "BUDGET_PER_ELEMENT", 0.0)
    for name in ALL:
        played = play(name, [(2, 10), (4, 20), (RANK, 30)], 5)
        found = played.numbers()
        assert found["layers"] == {"measured": 1, "of": 2}, name
        (layer,) = sampled(played.state.adapter, [2, 4, RANK], 0, 2)
        names = [layer]
        method = played.method
        part = {
            "state": diagnostics.part(played.state, names),
            "after": diagnostics.part(played.after, names),
            "sent": [
                replace(
                    one,
                    trainable=diagnostics.only(one.trainable, names),
                    frozen=one.frozen and diagnostics.only(one.frozen, names),
                )
                for one in played.sent
            ],
            "updates": [
                replace(u, adapter=diagnostics.only(u.adapter, names)) for u in played.updates
            ],
        }
        assert list(method.global_adapter(part["after"]).layers) == names
        assert_equals(found, brute_force(replace(played, **part)))


# Parts


def test_slots_that_are_there_are_found_again():
    whole = random_adapter(RANK, 3).layers["wide"]
    dimensions = LayerDimensions()
    assert dimensions.add(whole, known=True).tolist() == list(range(RANK))
    assert dimensions.find(whole.prefix(3)).tolist() == [0, 1, 2]
    assert dimensions.find(whole.take(torch.tensor([4, 1]))).tolist() == [4, 1]
    other = random_adapter(2, 4).layers["wide"]
    mixed = Factors(torch.cat([other.A, whole.A[5:]]), torch.cat([other.B, whole.B[:, 5:]], dim=1))
    assert dimensions.find(mixed).tolist() == [RANK, RANK + 1, 5]
    assert dimensions.find(mixed).tolist() == [RANK, RANK + 1, 5]
    assert dimensions.count == RANK + 2
    assert dimensions.find(Factors(other.A, torch.zeros_like(other.B))) is None
    # Same A, other B in one number: another slot.
    almost = whole.take(torch.tensor([2]))
    almost.B[-1, 0] += 1
    assert dimensions.find(almost).tolist() == [RANK + 2]


def test_effective_rank_of_equal_and_of_single_energies():
    assert effective_rank(np.array([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(np.array([5.0, 0.0])) == pytest.approx(1.0)
    assert segments((4, 2, 8)) == [(0, 2), (2, 4), (4, 8)]
