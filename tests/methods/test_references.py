"""Every method's server side against its paper's equations: plain loops and dense matrices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.initial import fresh
from prelort.config import MethodConfig
from prelort.methods import REGISTRY, Client, ServerState, Update, build
from prelort.methods.fedrot_lora import rotated
from random_adapters import dense, random_adapter, same_bits, seeds
from reference import (
    averaged,
    best_of_rank,
    federated_average,
    mean_product,
    modules_to_save,
    norm_weighted,
    partitioned_product,
    predicted_product,
    product,
    rank_of_energy,
    replicated,
    segment_wise,
    weights_of,
    zero_padded,
)
from rounds import (
    DIMENSIONS,
    LEVELS,
    RULES,
    R,
    aggregate,
    assert_near,
    clients_of,
    function_of,
    replies,
    start,
    untrained,
)

SPREAD = {"rtol": 2e-6, "atol": 2e-6}
"""Of float32 means against float64 ones."""
RANKS = [2, 8, 5, 2]
"""Of a round's clients; unequal examples come from `clients_of`."""
PATTERN = [8, 5, 3]
"""The ranks of the layers where they differ."""

rules = pytest.mark.parametrize("rule", RULES, ids=str)
layer_ranks = pytest.mark.parametrize("own", [R, PATTERN], ids=["one rank", "rank pattern"])
weightings = pytest.mark.parametrize("weights", ["examples", "uniform"])


def method_of(name, *, weights="examples", **options):
    return build(MethodConfig(name=name, weights=weights, options={name: options}), 7)


def assert_close(adapter: LoraAdapter, expected: dict) -> None:
    found = adapter.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), **SPREAD, msg=name)


def assert_modules(state: ServerState, updates, weights="examples"):
    """Of methods whose dimensions are compared as products."""
    for name, tensor in modules_to_save(updates, weights_of(updates, weights)).items():
        torch.testing.assert_close(state.adapter.modules_to_save[name].double(), tensor, **SPREAD)


def rounds_of(method, own, rule, *, rounds=2, state=None, ranks=RANKS):
    """(state, replies, next state) of rounds in a row; others take part in each."""
    state = state or start(own, rule)
    for number in range(rounds):
        turned = ranks[number:] + ranks[:number]
        clients = [replace(c, name=f"{c.name}-{number}") for c in clients_of(turned)]
        updates = replies(method, state, clients, seed=100 * number)
        after = aggregate(method, state, updates)
        yield state, updates, after
        state = after


# Slot by dimension


@rules
@layer_ranks
@weightings
@pytest.mark.parametrize("name", ["prelort", "zero-padding", "ffa-lora", "rolora", "fedsa-lora"])
def test_prefix_methods(name, own, rule, weights):
    """Two rounds: what a client did not train is in its reply as it was sent."""
    reference = zero_padded if name == "zero-padding" else segment_wise
    for state, updates, after in rounds_of(method_of(name, weights=weights), own, rule):
        assert_close(after.adapter, reference(state.adapter, updates, weights))


@rules
@layer_ranks
@weightings
@pytest.mark.parametrize("donors", ["highest", "holders"])
def test_replication(donors, own, rule, weights):
    for state, updates, after in rounds_of(
        method_of("replication", weights=weights, donors=donors), own, rule
    ):
        assert_close(after.adapter, replicated(state.adapter, updates, weights, donors))


@rules
@layer_ranks
def test_hetlora_weighs_by_the_norm_of_the_product(own, rule):
    for state, updates, after in rounds_of(method_of("hetlora"), own, rule):
        assert_close(after.adapter, norm_weighted(state.adapter, updates))


@pytest.mark.parametrize(
    "selection, rule, own",
    [
        ("uniform", RULES[0], R),
        ("uniform", RULES[1], R),
        ("uniform", RULES[0], PATTERN),
        ("in-turn", RULES[0], PATTERN),
        ("prefix", RULES[1], R),
    ],
    ids=str,
)
@weightings
def test_fed_plora_averages_each_module_over_those_who_drew_it(selection, rule, own, weights):
    method = method_of("fed-plora", weights=weights, selection=selection)
    for state, updates, after in rounds_of(method, own, rule, rounds=3):
        updates = updates[:2] if state.round == 2 else updates
        after = aggregate(method, state, updates)
        drawn = [method.modules(state, u.client) for u in updates]
        for update, modules in zip(updates, drawn, strict=True):
            for name, chosen in modules.items():
                rank = state.adapter.layers[name].rank
                assert len(set(chosen.tolist())) == min(update.client.rank, rank)
        shares = weights_of(updates, weights)
        assert_close(after.adapter, averaged(state.adapter, updates, shares, "nothing", drawn))


@rules
@weightings
def test_fslora_is_the_mean_of_the_masked_updates(rule, weights):
    method = method_of("fslora", weights=weights)
    for state, updates, after in rounds_of(method, R, rule):
        drawn = [method.sketch(state, u.client) for u in updates]
        shares = weights_of(updates, weights)
        expected = averaged(state.adapter, updates, shares, "no change", drawn)
        assert_close(after.adapter, expected)


@rules
def test_fslora_trains_its_sketch_at_r_over_r_k_times_the_scale(rule):
    """``s B S A`` with S = R/r on the drawn dimensions and zero elsewhere."""
    method, state = method_of("fslora"), start(rule=rule)
    for client in clients_of([1, 3, 8]):
        drawn = method.sketch(state, client)["wide"]
        mask = torch.zeros(R, dtype=torch.float64)
        mask[drawn] = R / client.rank
        factors = state.adapter.layers["wide"]
        expected = rule(R) * factors.B.double() @ torch.diag(mask) @ factors.A.double()
        found = function_of(method.broadcast(state, client))["wide"]
        torch.testing.assert_close(found, expected)


@weightings
@pytest.mark.parametrize("name, rank", [("homogeneous-min", 2), ("homogeneous-max", 8)])
@rules
def test_homogeneous_references_are_fedit_at_that_rank(name, rank, rule, weights):
    """Whatever the clients' ranks are."""
    method = method_of(name, weights=weights)
    fedit = method_of("fedit", weights=weights)
    for state, updates, after in rounds_of(method, R, rule):
        assert {u.adapter.rank for u in updates} == {rank}
        expected = federated_average(updates, weights)
        assert_close(method.global_adapter(after), expected)
        small = replace(state, adapter=state.adapter.prefix(rank))
        same = [replace(u, client=replace(u.client, rank=rank)) for u in updates]
        assert same_bits(method.global_adapter(after), aggregate(fedit, small, same).adapter)
        for factors, old in zip(
            after.adapter.layers.values(), state.adapter.layers.values(), strict=True
        ):
            assert torch.equal(factors.A[rank:], old.A[rank:])


@rules
@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
def test_with_one_trained_factor_the_mean_of_the_products_is_exact(name, rule):
    """FFA-LoRA trains B in each round, RoLoRA B and A in turn."""
    method = method_of(name)
    for number, (state, updates, after) in enumerate(rounds_of(method, R, rule, ranks=[8, 8, 8])):
        assert_near(dense(after.adapter), mean_product(updates, "examples"))
        trained = "A" if name == "rolora" and number % 2 else "B"
        for layer, factors in after.adapter.layers.items():
            old = state.adapter.layers[layer]
            assert torch.equal(factors.A, old.A) == (trained == "B")
            assert torch.equal(factors.B, old.B) == (trained == "A")


# Product by product


@rules
@layer_ranks
@weightings
def test_flora_adds_up_the_mean_products_of_all_rounds(own, rule, weights):
    method, total = method_of("flora", weights=weights), None
    for _, updates, after in rounds_of(method, own, rule, rounds=3, state=untrained(own, rule)):
        mean = mean_product(updates, weights)
        total = mean if total is None else {n: total[n] + mean[n] for n in mean}
        assert_near(dense(method.global_adapter(after)), total)
        assert_modules(after, updates, weights)
        for rank in (1, 3, 8):
            cut = {name: best_of_rank(matrix, rank) for name, matrix in total.items()}
            assert_near(dense(method.global_adapter(after, rank)), cut)


@rules
@layer_ranks
@pytest.mark.parametrize("energy", [0.6, 0.8, 0.95, 1.0])
def test_florist_keeps_the_fewest_triples_that_hold_the_energy(energy, own, rule):
    method = method_of("florist", energy=energy)
    total, kept = None, set()
    for _, updates, after in rounds_of(method, own, rule, state=untrained(own, rule)):
        mean = mean_product(updates, "examples")
        ranks = {name: rank_of_energy(matrix, energy) for name, matrix in mean.items()}
        cut = {name: best_of_rank(matrix, ranks[name]) for name, matrix in mean.items()}
        first = total is None
        total = cut if first else {n: total[n] + cut[n] for n in cut}
        whole = method.global_adapter(after)
        assert_near(dense(whole), total)
        if first:
            assert {name: f.rank for name, f in whole.layers.items()} == ranks
        kept |= set(ranks.values())
    assert len(kept) > 1  # guards: each layer has a rank of its own


@rules
@layer_ranks
@weightings
@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_flexlora_gives_every_rank_the_best_approximation_of_the_mean(name, own, rule, weights):
    method = method_of(name, weights=weights)
    for _, updates, after in rounds_of(method, own, rule):
        mean = mean_product(updates, weights)
        assert_modules(after, updates, weights)
        largest = {layer: f.rank for layer, f in after.adapter.layers.items()}
        for rank in (None, *range(1, R + 1)):
            ranks = {layer: min(rank or R, most) for layer, most in largest.items()}
            cut = {layer: best_of_rank(matrix, ranks[layer]) for layer, matrix in mean.items()}
            assert_near(dense(method.global_adapter(after, rank)), cut)
            if rank is not None:
                sent = method.broadcast(after, Client("k", rank, 1))
                assert_near(function_of(sent), cut)
                assert {layer: f.rank for layer, f in sent.trainable.layers.items()} == ranks


@rules
@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_the_factors_are_singular_vectors_with_the_values_on_one_side(name, rule):
    """``B = U S, A = V'`` (FlexLoRA) or ``B = U, A = S V'`` (HLoRA), up to signs."""
    method, state = method_of(name), start(rule=rule)
    updates = replies(method, state, clients_of(RANKS))
    after = aggregate(method, state, updates).adapter
    for layer, mean in mean_product(updates, "examples").items():
        u, s, vh = torch.linalg.svd(mean / rule(R), full_matrices=False)
        a, b = after.layers[layer].A.double(), after.layers[layer].B.double()
        if name == "flexlora":
            left, right = u[:, :R] * s[:R], vh[:R]
        else:
            left, right = u[:, :R], s[:R, None] * vh[:R]
        signs = torch.sign((b * left).sum(dim=0))
        torch.testing.assert_close(b * signs, left, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a * signs[:, None], right, rtol=1e-4, atol=1e-4)


@rules
@layer_ranks
@weightings
def test_fedrora_projects_what_clients_trained_on_the_directions_of_the_mean(own, rule, weights):
    """In the second round two of the four clients are away."""
    method, state = method_of("fedrora", weights=weights), untrained(own, rule)
    known: dict[tuple[str, str], torch.Tensor] = {}
    for number, count in enumerate([4, 2]):
        updates = replies(method, state, clients_of(RANKS)[:count], seed=10 * number)
        state = aggregate(method, state, updates)
        assert_modules(state, updates, weights)
        expected: dict[str, dict[str, torch.Tensor]] = {}
        for layer, mean in mean_product(updates, weights).items():
            most = state.adapter.layers[layer].rank
            u, _, vh = torch.linalg.svd(mean, full_matrices=False)
            u, vh = u[:, :most], vh[:most]
            known |= {(layer, one.client.name): product(one.adapter, layer) for one in updates}
            for client in clients_of(RANKS):
                s = (u.T @ known[layer, client.name] @ vh.T).diag()
                known[layer, client.name] = u @ s.diag() @ vh
                chosen = s.abs().argsort(descending=True)[: min(client.rank, most)]
                own_part = (u[:, chosen] * s[chosen]) @ vh[chosen]
                expected.setdefault(client.name, {})[layer] = own_part
        for client in clients_of(RANKS):
            sent = method.broadcast(state, client)
            assert_near(function_of(sent), expected[client.name])
            for factors in sent.trainable.layers.values():
                torch.testing.assert_close(factors.A.norm(dim=1), torch.ones(factors.rank))
        for one, other in itertools.combinations(expected.values(), 2):
            assert all(float((one[layer] - other[layer]).norm()) > 0.1 for layer in one)


@rules
def test_fedroras_clients_begin_with_directions_of_their_own(rule):
    """At magnitudes 1/sqrt(r); later an empty direction counts nearly nothing, and can learn."""
    method, state = method_of("fedrora"), untrained(rule=rule)
    own = [method.broadcast(state, client).trainable.layers for client in clients_of([5, 5])]
    for one, other in zip(own[0].values(), own[1].values(), strict=True):
        torch.testing.assert_close(one.A.norm(dim=1), torch.ones(5))
        torch.testing.assert_close(rule(5) * one.B.norm(dim=0), torch.full((5,), 5**-0.5))
        assert float((one.A @ other.A.T).abs().max()) < 0.99
    updates = replies(method, state, clients_of([2]))
    after = aggregate(method, state, updates)
    sent = method.broadcast(after, Client("new", R, 1))
    assert_near(function_of(sent), mean_product(updates, "examples"))
    for factors in sent.trainable.layers.values():
        assert factors.rank == R
        assert bool((factors.B != 0).any(dim=0).all())


@rules
@pytest.mark.parametrize("name", ["flexlora", "hlora", "raflora"])
def test_a_round_of_few_directions_leaves_dimensions_that_can_learn(name, rule):
    """A product of rank 2 in eight dimensions: the same function, and none has two zero factors."""
    method, state = method_of(name), untrained(rule=rule)
    updates = replies(method, state, clients_of([2]))
    after = aggregate(method, state, updates).adapter
    assert_near(dense(after), mean_product(updates, "examples"))
    for factors in after.layers.values():
        assert factors.rank == R
        assert not ((factors.A == 0).all(dim=1) & (factors.B == 0).all(dim=0)).any()


@rules
@layer_ranks
@weightings
@pytest.mark.parametrize("ranks", [[2, 8, 5, 2], [2, 5, 5], [2], [8, 8]], ids=str)
def test_raflora_averages_each_partition_over_its_holders(ranks, own, rule, weights):
    """Also where a level is absent: its partition keeps the old product."""
    method, state = method_of("raflora", weights=weights), start(own, rule)
    for number in range(2):
        before = state
        updates = replies(method, state, clients_of(ranks), seed=10 * number)
        state = aggregate(method, before, updates)
        expected = partitioned_product(before.adapter, updates, LEVELS, weights)
        cut = {
            name: best_of_rank(matrix, state.adapter.layers[name].rank)
            for name, matrix in expected.items()
        }
        assert_near(dense(state.adapter), cut)
        assert_modules(state, updates, weights)
        for rank in (1, 2, 5):
            ranks_of = {name: min(rank, f.rank) for name, f in state.adapter.layers.items()}
            cut = {name: best_of_rank(m, ranks_of[name]) for name, m in expected.items()}
            assert_near(function_of(method.broadcast(state, Client("k", rank, 1))), cut)


@rules
@layer_ranks
@weightings
def test_prelort_sorted_adds_the_mean_change_of_the_function(weights, own, rule):
    """Three rounds; in all but the first there are dimensions that nobody holds."""
    method, state = method_of("prelort-sorted", weights=weights), start(own, rule)
    for number, ranks in enumerate([RANKS, [5, 2], [2, 5, 5]]):
        updates = replies(method, state, clients_of(ranks), seed=10 * number)
        expected = predicted_product(state.adapter, updates, LEVELS, weights)
        most = {n: f.rank for n, f in state.adapter.layers.items()}
        state = aggregate(method, state, updates)
        assert_near(
            dense(state.adapter), {n: best_of_rank(m, most[n]) for n, m in expected.items()}
        )
        assert_modules(state, updates, weights)


@pytest.mark.parametrize("rule, own", [(RULES[0], R), (RULES[1], R), (RULES[0], PATTERN)], ids=str)
@weightings
def test_fedex_lora_is_the_mean_of_the_clients_whole_functions(rule, own, weights):
    """Over three rounds, with everything that was frozen at the clients counted in."""
    method, function = method_of("fedex-lora", weights=weights), None
    for state, updates, after in rounds_of(method, own, rule, rounds=3):
        whole = dense(state.adapter)
        function = whole if function is None else function  # the global one, in float64
        expected = {name: torch.zeros_like(matrix) for name, matrix in function.items()}
        for weight, update in zip(weights_of(updates, weights), updates, strict=True):
            for name, matrix in function.items():
                # A client of rank r trains the first r dimensions; all else is frozen.
                rank, most = update.adapter.layers[name].rank, state.adapter.layers[name].rank
                own_part = product(update.adapter, name) * rule(most) / rule(rank)
                frozen = matrix - product(state.adapter, name, 0, rank)
                expected[name] += weight * (own_part + frozen)
        function = {n: m / sum(weights_of(updates, weights)) for n, m in expected.items()}
        assert_near(dense(method.global_adapter(after)), function)
        assert_close(after.adapter, segment_wise(state.adapter, updates, weights))
        for rank in (1, 4):
            cut = {name: best_of_rank(matrix, rank) for name, matrix in function.items()}
            assert_near(dense(method.global_adapter(after, rank)), cut)


@pytest.mark.parametrize("kept", [1, 3])
@rules
def test_fedex_lora_cuts_its_residual_to_the_nearest_of_a_rank(kept, rule):
    whole, cut = method_of("fedex-lora"), method_of("fedex-lora", residual_rank=kept)
    state = start(rule=rule)
    updates = replies(whole, state, clients_of(RANKS))
    exact, near = aggregate(whole, state, updates), aggregate(cut, state, updates)
    factors = dense(exact.adapter)
    assert same_bits(exact.adapter, near.adapter)
    for name, matrix in dense(whole.global_adapter(exact)).items():
        expected = factors[name] + best_of_rank(matrix - factors[name], kept)
        found = dense(cut.global_adapter(near))
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


# The identities between methods


pairs = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=5)
"""The rank and the number of examples of each client."""
identity = settings(deadline=None, max_examples=20)


def drawn_updates(state, ranks_and_examples, seed):
    """Random replies of these ranks, not what any method would send."""
    return [
        Update(
            Client(f"k{k}", rank, examples),
            random_adapter(
                [min(rank, f.rank) for f in state.adapter.layers.values()],
                seed + k,
                scale=state.adapter.scale,
                dimensions=DIMENSIONS,
            ),
            examples,
        )
        for k, (rank, examples) in enumerate(ranks_and_examples)
    ]


@identity
@given(clients=pairs, own=st.tuples(*[st.integers(1, 8)] * 3), seed=seeds)
def test_segment_wise_is_zero_padding_divided_by_the_share_that_holds_a_slot(clients, own, seed):
    """RB-LoRA's column weights N / N_j times the padded mean."""
    state = start(list(own))
    updates = drawn_updates(state, clients, seed)
    padded = aggregate(method_of("zero-padding"), state, updates).adapter
    segments = aggregate(method_of("prelort"), state, updates).adapter
    everyone = sum(u.examples for u in updates)
    for name, factors in padded.layers.items():
        for j in range(factors.rank):
            held = sum(u.examples for u in updates if u.adapter.layers[name].rank > j)
            if held:
                found, scale = segments.layers[name], everyone / held
                torch.testing.assert_close(found.A[j], scale * factors.A[j], **SPREAD)
                torch.testing.assert_close(found.B[:, j], scale * factors.B[:, j], **SPREAD)


@identity
@given(clients=pairs, seed=seeds)
def test_with_all_holders_as_donors_replication_is_segment_wise(clients, seed):
    state = start(PATTERN)
    updates = drawn_updates(state, clients, seed)
    copied = aggregate(method_of("replication", donors="holders"), state, updates).adapter
    assert same_bits(copied, aggregate(method_of("prelort"), state, updates).adapter)


# No dense matrix on the server


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("name", REGISTRY)
def test_the_server_never_makes_a_matrix_of_a_layers_size(name):
    """Two rounds of what the server does, with d_in = d_out = 600 and ranks up to 8."""
    side, ranks = 600, [8, 8, 8] if name == "fedit" else [2, 8, 5]
    random = random_adapter(R, dimensions={"one": (side, side), "two": (side, side)})
    method, state = method_of(name), ServerState(fresh(random, 7), levels=LEVELS)
    clients = clients_of(ranks)
    for number in range(2):
        with Largest() as asking:
            for client in clients:
                method.broadcast(state, client)
        updates = replies(method, state, clients, seed=10 * number)
        with Largest() as aggregating:
            state = aggregate(method, state, updates)
        with Largest() as reading:
            for rank in (None, 2, 8):
                method.global_adapter(state, rank)
        for part in (asking, aggregating, reading):
            assert part.numbers < side * side
        assert aggregating.numbers >= side * 2  # something was recorded


# Corrections of the mean of the factors


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
