"""One matrix of laws over every registered method: to register a method is to have it tested.

Where a method honestly does otherwise, a table below names it with the reason.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from prelort.adapters import AdapterSchema, Factors, LoraAdapter, ScaleRule, peft_folder
from prelort.adapters.initial import draw_a
from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.experiment import checkpoint
from prelort.experiment.checkpoint import Checkpoint
from prelort.methods import REGISTRY, Broadcast, Client, Method, ServerState, Update, build, trait
from random_adapters import dense, random_adapter, same_bits
from reference import best_of_rank, mean_product, norm_weighted
from rounds import (
    DIMENSIONS,
    RULES,
    R,
    aggregate,
    assert_near,
    clients_of,
    function_of,
    replies,
    start,
    trained,
    untrained,
)

SEED = 7
"""Of the run: clients draw seeded factors from it."""
RANKS = [2, 8, 5]
PATTERN = (8, 5, 3)
"""The ranks of the layers where they differ."""

OPTIONS: dict[str, dict[str, Any]] = {
    "florist": {"energy": 1.0},
    "fedmomentum": {"energy": 1.0},
    "lora-fair": {"penalty": 1e-9},
}
"""Without what makes them more, or less, than the mean by intention."""

ONE_RANK_FOR_ALL = {"fedit"}
"""Its clients have one rank; it says so."""

ONE_RANK_FOR_LAYERS = {"fslora"}
"""Its R/r is one number for all layers; it says so."""

ONE_MULTIPLIER_FOR_LAYERS = {"fed-plora", "fedex-lora", "fedmomentum"}
"""A part of the dimensions counts as in the whole: under rslora, too, layers need one rank."""

SUMS = {"flora", "florist", "fedex-lora", "fedmomentum"}
"""Keep the exact sum of the products, with as many dimensions as it needs."""

CUTS = {"flexlora", "hlora", "raflora", "prelort-sorted", "fedrora"}
"""Cut the sum of the products to the global rank: each round has other rank dimensions."""

CORRECTS = {"lora-fair"}
"""Changes the mean of the factors by what their product misses."""

PRUNES = {"hetlora"}
"""Its clients may answer with fewer dimensions than they were sent."""

OWN_WEIGHTS = {"hetlora"}
"""Weighs by norms and not by examples."""

WHOLE = {"fed-plora", "fedit", "homogeneous-min", "homogeneous-max"} | SUMS
"""Every client starts from, and adds to, the whole global function, whatever its rank; of the
others a client of rank r has the global function of rank r."""

NEITHER = {"fslora"}
"""A client of a low rank trains a random sketch, which is the global function of no rank."""

OWN = {"fedrora"}
"""Each client has directions and magnitudes of its own."""

KEEPS_THE_REST = {"raflora", "prelort-sorted", "fedmomentum"}
"""Slots that nobody holds are mixed with those that somebody holds when the sum is cut."""

NO_PREFIXES = {"fedit", "fed-plora", "flora", "florist", "fslora"}
"""What their clients train has no prefixes, or is not part of the paper."""

every = pytest.mark.parametrize("name", REGISTRY)
rules = pytest.mark.parametrize("rule", RULES, ids=str)


def every_but(*tables: set[str]) -> pytest.MarkDecorator:
    """Every method but those of the tables."""
    left_out = set().union(*tables)
    return pytest.mark.parametrize("name", [name for name in REGISTRY if name not in left_out])


def refuses(name: str, own: int | tuple[int, ...], rule: ScaleRule) -> bool:
    """Whether the method cannot serve layers of these ranks under this rule."""
    scaled = rule.kind == "rslora" and name in ONE_MULTIPLIER_FOR_LAYERS
    return own == PATTERN and (name in ONE_RANK_FOR_LAYERS or scaled)


SHAPES = [(name, own, rule) for name in REGISTRY for own in (R, PATTERN) for rule in RULES]
every_shape = pytest.mark.parametrize(
    "name, own, rule", [shape for shape in SHAPES if not refuses(*shape)], ids=str
)


def method_of(name: str, weights: str = "examples") -> Method:
    options = {name: OPTIONS.get(name, {})}
    return build(MethodConfig(name=name, weights=weights, options=options), SEED)


def first_state(name: str, own: int | Sequence[int] = R, rule: ScaleRule = RULES[0]) -> ServerState:
    return untrained(own, rule, [R] if name in ONE_RANK_FOR_ALL else sorted(RANKS))


def served(name: str, ranks: Sequence[int] = RANKS) -> list[Client]:
    """Clients of these ranks, or of one where the method wants one."""
    return clients_of([R] * len(ranks) if name in ONE_RANK_FOR_ALL else ranks)


@functools.cache  # nothing changes a state: that is one of the laws
def after_rounds(
    name: str, rounds: int = 1, rule: ScaleRule = RULES[0], own: int | tuple[int, ...] = R
) -> tuple[Method, ServerState]:
    """The method, and a state to which it has come by itself from a true first one."""
    method, state = method_of(name), first_state(name, own, rule)
    for number in range(rounds):
        updates = replies(method, state, served(name), seed=1000 * number)
        state = aggregate(method, state, updates)
    return method, state


def assert_same_function(
    method: Method, one: ServerState, other: ServerState, tolerance: float = 1e-5
) -> None:
    first, second = method.global_adapter(one), method.global_adapter(other)
    assert_near(dense(first), dense(second), tolerance)
    for name, tensor in second.modules_to_save.items():
        torch.testing.assert_close(
            first.modules_to_save[name], tensor, rtol=tolerance, atol=tolerance
        )


def assert_same_state(one: ServerState, other: ServerState) -> None:
    assert same_bits(one.adapter, other.adapter)
    assert (one.round, one.adapter.scale) == (other.round, other.adapter.scale)
    assert one.memory.keys() == other.memory.keys()
    for name, tensor in one.memory.items():
        assert torch.equal(tensor, other.memory[name]), name


def assert_sound(state: ServerState, like: ServerState) -> None:
    """Finite float32 numbers in the shapes of the federation."""
    shapes = {n: t.shape for n, t in like.adapter.tensors().items()}
    assert {n: t.shape for n, t in state.adapter.tensors().items()} == shapes
    for name, tensor in (state.adapter.tensors() | dict(state.memory)).items():
        assert tensor.dtype == torch.float32, name
        assert bool(tensor.isfinite().all()), name


def random_replies(state: ServerState, ranks: Sequence[int]) -> list[Update]:
    """The same replies for every method, whatever it would have sent."""
    return [
        Update(
            client,
            random_adapter(client.rank, 50 + k, scale=state.adapter.scale, dimensions=DIMENSIONS),
            client.examples,
        )
        for k, client in enumerate(clients_of(ranks))
    ]


def test_the_tables_name_registered_methods():
    tables = (
        *(OPTIONS, ONE_RANK_FOR_ALL, ONE_RANK_FOR_LAYERS, ONE_MULTIPLIER_FOR_LAYERS, SUMS, CUTS),
        *(CORRECTS, PRUNES, OWN_WEIGHTS, WHOLE, NEITHER, OWN, KEEPS_THE_REST, NO_PREFIXES),
    )
    assert set(REGISTRY) >= {name for table in tables for name in table}
    client, state = Client("k", R, 1), start()
    assert {n for n in REGISTRY if method_of(n).objective(state, client).tail is not None} == PRUNES


# What a client receives


@every
@rules
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_broadcast_is_a_pure_function_and_fits_the_model(name, rule, rounds):
    method, state = after_rounds(name, rounds, rule)
    before = {n: t.clone() for n, t in (state.adapter.tensors() | dict(state.memory)).items()}
    schema = AdapterSchema.of(state.adapter)
    for client in served(name):
        sent, again = method.broadcast(state, client), method.broadcast(state, client)
        assert same_bits(sent.trainable, again.trainable)
        assert (sent.frozen is None) == (again.frozen is None)
        if sent.frozen is not None and again.frozen is not None:
            assert same_bits(sent.frozen, again.frozen)
            for layer, factors in sent.frozen.layers.items():
                assert (factors.A.shape[1], factors.B.shape[0]) == schema.layers[layer][:2]
        bare = [replace(s, trainable=LoraAdapter({}, rule), frozen=None) for s in (sent, again)]
        assert bare[0] == bare[1]
        schema.check(sent.trainable, sent.trainable.rank)
        assert sent.trainable.scale == rule
        assert method.objective(state, client).levels[-1] == sent.trainable.rank
    for n, tensor in (state.adapter.tensors() | dict(state.memory)).items():
        assert torch.equal(tensor, before[n])


@every
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_what_a_client_draws_by_itself_is_what_the_server_means(name, rounds):
    method, state = after_rounds(name, rounds)
    for client in served(name):
        sent = method.broadcast(state, client)
        for layer, factors in sent.trainable.layers.items():
            largest, d_in = state.adapter.layers[layer].rank, factors.A.shape[1]
            drawn = draw_a(sent.factor_seed, layer, largest, d_in)[: factors.rank]
            if sent.seeded_factors != "nothing":
                assert torch.equal(factors.A, drawn)
            if sent.seeded_factors == "A and B":
                assert not factors.B.any()


@every_shape
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_where_a_client_starts(name, rounds, own, rule):
    """At the global function itself, or at the global function of its rank."""
    method, state = after_rounds(name, rounds, rule, own)
    for client in served(name, [1, 3, 8]):
        if name in OWN or (name in NEITHER and client.rank < R):
            continue
        sent = method.broadcast(state, client)
        expected = method.global_adapter(state, None if name in WHOLE else client.rank)
        assert_near(function_of(sent), dense(expected), 1e-6)
        for module, tensor in expected.modules_to_save.items():
            assert torch.equal(sent.trainable.modules_to_save[module], tensor)


@every_but(set(REGISTRY) - ONE_RANK_FOR_LAYERS - ONE_MULTIPLIER_FOR_LAYERS)
@rules
def test_layers_of_different_ranks_are_refused_where_they_cannot_be_served(name, rule):
    """By the first broadcast to a client that does not hold all dimensions."""
    method, state = method_of(name), first_state(name, PATTERN, rule)
    if refuses(name, PATTERN, rule):
        with pytest.raises(ConfigError, match=f"'{name}' .*needs layers of one rank: leave"):
            method.broadcast(state, Client("k", 2, 1))
    else:
        method.broadcast(state, Client("k", 2, 1))


@every
def test_clients_of_different_ranks_are_served_or_refused(name):
    method, state = method_of(name), first_state(name)
    method.check(state, served(name))
    if name in ONE_RANK_FOR_ALL:
        for planned, ranks in ((state, RANKS), (replace(state, levels=(4, R)), [R])):
            with pytest.raises(ConfigError, match="needs one rank for all clients"):
                method.check(planned, clients_of(ranks))


@every
@pytest.mark.parametrize("kind", ["mean", "example", "step", "full+one"])
def test_nested_training_is_taken_or_refused(name, kind):
    """There are no prefixes to train where a client receives no prefix."""
    config = MethodConfig(name=name, objective=kind)
    if name in NO_PREFIXES:
        with pytest.raises(ConfigError, match=f"objective = '{re.escape(kind)}' is not part of"):
            build(config, SEED)
        return
    method, (_, state) = build(config, SEED), after_rounds(name)
    for client in served(name):
        objective = method.objective(state, client)
        rank = method.broadcast(state, client).trainable.rank
        assert objective.kind == kind
        assert objective.levels == tuple(level for level in (2, 5, 8) if level <= rank)


# What a round makes of the replies


@every_but(CORRECTS)
@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_at_equal_ranks(name, weights):
    """Of the same replies: FedIT's factors bit for bit, or the mean of the products."""
    state = start(levels=[R])
    updates = random_replies(state, [R, R, R])
    method = method_of(name, weights)
    after = aggregate(method, state, updates)
    if name in OWN_WEIGHTS:
        expected = norm_weighted(state.adapter, updates)
        for tensor, found in after.adapter.tensors().items():
            torch.testing.assert_close(found.double(), expected[tensor], rtol=2e-6, atol=2e-6)
    elif name in SUMS | CUTS:
        product = mean_product(updates, weights)
        cut = {layer: best_of_rank(matrix, R) for layer, matrix in product.items()}
        assert_near(dense(method.global_adapter(after)), cut if name in CUTS else product)
    else:
        assert same_bits(
            after.adapter, aggregate(method_of("fedit", weights), state, updates).adapter
        )


@every_shape
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_one_client_is_the_identity(name, rounds, own, rule):
    """Of the function; for a client of the highest rank."""
    method, state = after_rounds(name, rounds, rule, own)
    (client,) = clients_of([R])
    sent = method.broadcast(state, client)
    reply = trained(sent, 77)
    after = aggregate(method, state, [Update(client, reply, 3)])
    found = method.global_adapter(after)
    assert_near(dense(found), function_of(sent, reply))
    for module, tensor in reply.modules_to_save.items():
        assert torch.equal(found.modules_to_save[module], tensor)


@every
@rules
def test_the_order_of_replies_changes_nothing_but_rounding(name, rule):
    method, state = after_rounds(name, 1, rule)
    updates = replies(method, state, served(name), seed=50)
    expected = aggregate(method, state, updates)
    for order in ([2, 1, 0], [1, 2, 0], [1, 0, 2]):
        assert_same_function(
            method, aggregate(method, state, [updates[i] for i in order]), expected
        )


@every
def test_weights_are_relative_or_uniform(name):
    """Ten times all examples change nothing but rounding; without weights they change nothing."""
    method, state = after_rounds(name)
    updates = replies(method, state, served(name), seed=50)
    tenfold = [replace(u, examples=10 * u.examples) for u in updates]
    assert_same_function(
        method, aggregate(method, state, tenfold), aggregate(method, state, updates)
    )
    method = method_of(name, "uniform")
    others = [replace(u, examples=1 + u.examples**2) for u in updates]
    assert_same_state(aggregate(method, state, others), aggregate(method, state, updates))


@every
@rules
@pytest.mark.parametrize("present", [[2, 2], [5, 2], [8], [3]], ids=str)
def test_a_rank_level_that_is_absent(name, present, rule):
    """Everything stays finite and in shape, and a dimension that nobody trained keeps its value."""
    method, state = after_rounds(name, 1, rule)
    for number in range(2):
        clients = served(name, present)
        sent = [method.broadcast(state, client) for client in clients]
        updates = [
            Update(client, trained(s, number + k), client.examples)
            for k, (client, s) in enumerate(zip(clients, sent, strict=True))
        ]
        after = aggregate(method, state, updates)
        assert_sound(after, state)
        assert_sound(
            ServerState(method.global_adapter(after, 2)),
            ServerState(method.global_adapter(after, 2)),
        )
        if name not in CUTS | {"fedmomentum"}:
            assert_untrained_dimensions_stay(state, after, sent)
        state = after


def assert_untrained_dimensions_stay(
    state: ServerState, after: ServerState, sent: Sequence[Broadcast]
) -> None:
    for layer, old in state.adapter.layers.items():
        new = after.adapter.layers[layer]
        for j in range(old.rank):
            if any(holds(s.trainable.layers.get(layer), old, j) for s in sent):
                continue
            assert torch.equal(new.A[j], old.A[j])
            assert torch.equal(new.B[:, j], old.B[:, j])


def holds(sent: Factors | None, old: Factors, j: int) -> bool:
    """Whether a client received dimension j: no two dimensions have the same row of A."""
    return sent is not None and bool((old.A[j] == sent.A).all(dim=1).any())


@every_but(set(REGISTRY) - PRUNES)
def test_a_client_that_prunes_itself_answers_with_fewer_slots(name):
    method, state = after_rounds(name)
    updates = replies(method, state, served(name))
    pruned = replace(updates[1], adapter=updates[1].adapter.prefix(R - 1))
    after = aggregate(method, state, [updates[0], pruned, updates[2]])
    assert_sound(after, state)
    new, old = after.adapter.layers["wide"], state.adapter.layers["wide"]
    assert torch.equal(new.A[R - 1], old.A[R - 1])
    assert not torch.equal(new.A[R - 2], old.A[R - 2])


# What is kept and what is left


@every
@rules
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_saved_state_goes_on_as_the_other_does(tmp_path: Path, name, rounds, rule):
    method, state = after_rounds(name, rounds, rule)
    state = replace(state, ranks={"site-0": 3})
    path = checkpoint.save(Checkpoint(state, SEED, "base", 0), tmp_path)
    loaded = checkpoint.load(path).state
    assert_same_state(loaded, state)
    assert loaded.ranks == state.ranks
    futures = []
    for before in (state, loaded):
        updates = replies(method, before, served(name), seed=50)
        futures.append(aggregate(method, before, updates))
    assert_same_state(*futures)
    for rank in (None, 3):
        assert same_bits(*(method.global_adapter(future, rank) for future in futures))


@every
@rules
@pytest.mark.parametrize("rounds", [0, 2])
def test_global_adapters_have_their_rank_and_survive_a_peft_folder(
    tmp_path: Path, name, rounds, rule
):
    method, state = after_rounds(name, rounds, rule)
    template = LoraConfig(target_modules=list(DIMENSIONS), modules_to_save=["score"])
    for rank in (None, 1, 3, 5, R):
        found = method.global_adapter(state, rank)
        assert 1 <= found.rank <= (rank or max(f.rank for f in found.layers.values()))
        assert found.scale == rule
        assert found.layers.keys() == state.adapter.layers.keys()
        for module, tensor in state.adapter.modules_to_save.items():
            assert torch.equal(found.modules_to_save[module], tensor)
        for layers in (["tall"], ["square", "wide"]):
            part = method.global_adapter(state, rank, layers)
            assert set(part.layers) == set(layers)
            assert same_bits(part, found.select(layers))
        peft_folder.save(found, tmp_path / f"rank-{rank}", template)
        loaded, _ = peft_folder.load(tmp_path / f"rank-{rank}")
        assert same_bits(loaded, found)
    whole = method.global_adapter(state)
    assert_near(dense(method.global_adapter(state, whole.rank)), dense(whole))


@pytest.mark.parametrize("name", sorted({*REGISTRY} - {"fslora", "fedsa-lora"}))
def test_under_rslora_one_clients_mean_is_its_function_or_is_refused(name: str) -> None:
    """FSLoRA's clients train a random sketch, FedSA-LoRA has no global function."""
    method = build(MethodConfig(name=name), 0)
    state = untrained(rule=ScaleRule("rslora", 3.0))
    client = clients_of([2])[0]
    if trait(method, "one_scale"):
        with pytest.raises(ConfigError, match=r"rslora|needs one rank"):
            method.check(state, [client])
        return
    method.check(state, [client])
    (reply,) = replies(method, state, [client])
    expected = function_of(method.broadcast(state, client), reply.adapter)
    assert_near(dense(method.global_adapter(aggregate(method, state, [reply]))), expected, 1e-4)
