"""Each method's server side against slow references, and the laws it must keep."""

from __future__ import annotations

import weakref
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.config import MethodConfig
from prelort.methods import Broadcast, Client, ServerState, Update, build
from random_adapters import dense, random_adapter, same_bits, seeds
from reference import federated_average, segment_wise, zero_padded

quick = settings(deadline=None, max_examples=40)
SPREAD = {"rtol": 2e-6, "atol": 2e-6}
"""Of float32 means against float64 ones."""

METHODS = ["prelort", "zero-padding", "fedit"]
replies = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 1000)), min_size=1, max_size=6)
"""The rank and the number of examples of each client."""
weightings = st.sampled_from(["examples", "uniform"])


def state_of(rank=8, seed=1000, round_index=3):
    return ServerState(random_adapter(rank, seed), round=round_index)


def update(adapter, examples=1, name="k"):
    return Update(Client(name, adapter.rank, examples), adapter, examples)


def updates_of(pairs, seed=0, state=None, dtype=torch.float32):
    """A reply of each rank; a layer never has more slots than in the global adapter."""
    largest = [f.rank for f in (state or state_of()).adapter.layers.values()]
    return [
        update(
            random_adapter([min(rank, most) for most in largest], seed + k, dtype=dtype), examples
        )
        for k, (rank, examples) in enumerate(pairs)
    ]


def aggregate(name, state, updates, weights="examples"):
    levels = sorted({u.client.rank for u in updates})
    aggregator = build(MethodConfig(name=name, weights=weights), levels, 0).aggregator(state)
    for one in updates:
        aggregator.add(one)
    return aggregator.result()


def assert_close(adapter: LoraAdapter, expected: dict, **tolerance: float) -> None:
    found = adapter.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), **tolerance, msg=name)


# Against the equations


@quick
@given(pairs=replies, weights=weightings, own=st.tuples(*[st.integers(1, 8)] * 2), seed=seeds)
def test_prelort_is_the_mean_of_each_slot_over_its_holders(pairs, weights, own, seed):
    state = state_of(list(own))
    updates = updates_of(pairs, seed, state)
    result = aggregate("prelort", state, updates, weights)
    assert_close(result.adapter, segment_wise(state.adapter, updates, weights), **SPREAD)


@quick
@given(pairs=replies, weights=weightings, own=st.tuples(*[st.integers(1, 8)] * 2), seed=seeds)
def test_zero_padding_is_the_mean_of_padded_factors(pairs, weights, own, seed):
    state = state_of(list(own))
    updates = updates_of(pairs, seed, state)
    result = aggregate("zero-padding", state, updates, weights)
    assert_close(result.adapter, zero_padded(state.adapter, updates, weights), **SPREAD)


@quick
@given(pairs=replies, weights=weightings, rank=st.integers(1, 8), seed=seeds)
def test_at_equal_ranks_all_methods_are_weighted_federated_averaging(pairs, weights, rank, seed):
    state = state_of(rank)
    updates = updates_of([(rank, examples) for _, examples in pairs], seed, state)
    expected = federated_average(updates, weights)
    results = [aggregate(name, state, updates, weights).adapter for name in METHODS]
    for result in results:
        assert_close(result, expected, **SPREAD)
        assert same_bits(result, results[0])


def test_a_worked_example():
    """Two clients of ranks 1 and 2 with 1 and 3 examples, one layer of one input and output."""

    def adapter(*values):
        tensors = {
            "x.lora_A.weight": torch.tensor(values)[:, None],
            "x.lora_B.weight": torch.tensor(values)[None, :],
        }
        return LoraAdapter.from_tensors(tensors, ScaleRule())

    state = ServerState(adapter(0.0, 0.0, 7.0))
    updates = [update(adapter(2.0), 1), update(adapter(6.0, 4.0), 3)]
    segments = aggregate("prelort", state, updates).adapter.layers["x"]
    padded = aggregate("zero-padding", state, updates).adapter.layers["x"]
    assert segments.A.flatten().tolist() == segments.B.flatten().tolist() == [5.0, 4.0, 7.0]
    assert padded.A.flatten().tolist() == padded.B.flatten().tolist() == [5.0, 3.0, 7.0]


# Laws


@pytest.mark.parametrize("name", ["prelort", "zero-padding"])
@quick
@given(pairs=replies, data=st.data())
def test_the_order_of_replies_changes_nothing_but_rounding(name, pairs, data):
    updates = updates_of(pairs)
    other = data.draw(st.permutations(updates))
    first = aggregate(name, state_of(), updates).adapter
    assert_close(aggregate(name, state_of(), other).adapter, first.tensors(), **SPREAD)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("examples", [1, 3, 997])
def test_one_client_is_the_identity_bit_for_bit(name, examples):
    (only,) = updates_of([(8, examples)])
    assert same_bits(aggregate(name, state_of(), [only]).adapter, only.adapter)


@pytest.mark.parametrize("name", METHODS)
@quick
@given(counts=st.lists(st.integers(1, 1000), min_size=2, max_size=7), seed=seeds)
def test_equal_clients_are_one_bit_for_bit(name, counts, seed):
    adapter = random_adapter(8, seed)
    updates = [update(adapter, examples) for examples in counts]
    assert same_bits(aggregate(name, state_of(), updates).adapter, adapter)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_replies_give_the_same_bits(name):
    updates = updates_of([(8, 3), (8, 7), (8, 11)])
    first, second = (aggregate(name, state_of(), updates).adapter for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("name", ["prelort", "zero-padding"])
@quick
@given(pairs=replies, factor=st.integers(2, 1000))
def test_weights_times_a_constant_change_nothing_but_rounding(name, pairs, factor):
    scaled = [(rank, examples * factor) for rank, examples in pairs]
    first = aggregate(name, state_of(), updates_of(pairs)).adapter
    assert_close(aggregate(name, state_of(), updates_of(scaled)).adapter, first.tensors(), **SPREAD)


def test_uniform_weights_do_not_look_at_the_number_of_examples():
    few, many = updates_of([(4, 1), (8, 1)]), updates_of([(4, 900), (8, 2)])
    for name in ("prelort", "zero-padding"):
        first = aggregate(name, state_of(), few, "uniform").adapter
        assert same_bits(first, aggregate(name, state_of(), many, "uniform").adapter)


def test_slots_that_nobody_held_keep_their_value_under_prelort():
    state = state_of(8)
    result = aggregate("prelort", state, updates_of([(2, 1), (5, 2)])).adapter
    for name, factors in result.layers.items():
        old = state.adapter.layers[name]
        assert torch.equal(factors.A[5:], old.A[5:])
        assert torch.equal(factors.B[:, 5:], old.B[:, 5:])
        assert not torch.equal(factors.A[4], old.A[4])


def test_slots_that_nobody_held_keep_their_value_under_zero_padding():
    """As zeros in both factors they could never learn again."""
    state = state_of(8)
    result = aggregate("zero-padding", state, updates_of([(2, 1), (5, 2)])).adapter
    for name, factors in result.layers.items():
        old = state.adapter.layers[name]
        assert torch.equal(factors.A[5:], old.A[5:])
        assert torch.equal(factors.B[:, 5:], old.B[:, 5:])
        assert not torch.equal(factors.A[4], old.A[4])


def test_a_segment_of_one_holder_is_that_holders_under_prelort():
    small, large = updates_of([(2, 5), (6, 1)])
    result = aggregate("prelort", state_of(6), [small, large]).adapter
    for name, factors in result.layers.items():
        held = large.adapter.layers[name]
        assert torch.equal(factors.A[2:], held.A[2:])
        assert torch.equal(factors.B[:, 2:], held.B[:, 2:])


@quick
@given(low=st.integers(1, 999), high=st.integers(1, 999))
def test_zero_padding_keeps_p_of_a_tail_and_p_squared_of_its_product(low, high):
    small, large = updates_of([(2, low), (8, high)])
    share = high / (low + high)
    padded = aggregate("zero-padding", state_of(), [small, large]).adapter
    full = aggregate("prelort", state_of(), [small, large]).adapter
    for name, factors in padded.layers.items():
        held = large.adapter.layers[name]
        torch.testing.assert_close(factors.A[2:], share * held.A[2:])
        torch.testing.assert_close(factors.B[:, 2:], share * held.B[:, 2:])

    def tail(adapter):
        cut = adapter.prefix(2)
        return {n: dense(adapter)[n] - dense(cut)[n] for n in adapter.layers}

    for name, product in tail(padded).items():
        expected = share**2 * tail(large.adapter)[name]
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tail(full)[name], tail(large.adapter)[name])


def test_extras_are_averaged_over_everyone_by_every_method():
    updates = updates_of([(2, 1), (8, 3)])
    first, second = (u.adapter.modules_to_save["score.weight"] for u in updates)
    for name in ("prelort", "zero-padding"):
        head = aggregate(name, state_of(), updates).adapter.modules_to_save["score.weight"]
        torch.testing.assert_close(head, 0.25 * first + 0.75 * second)


@pytest.mark.parametrize("name", METHODS)
def test_the_result_is_the_next_round_of_the_same_federation(name):
    state = replace(state_of(8), memory={"momentum": torch.ones(2)})
    result = aggregate(name, state, updates_of([(8, 1), (8, 2)]))
    assert result.round == state.round + 1
    assert result.memory == state.memory
    assert result.adapter.scale == state.adapter.scale


@pytest.mark.parametrize("name", METHODS)
def test_neither_the_state_nor_a_reply_is_changed(name):
    state, updates = state_of(8), updates_of([(8, 1), (8, 2)])
    adapters = [state.adapter, *(u.adapter for u in updates)]
    before = [{n: t.clone() for n, t in a.tensors().items()} for a in adapters]
    aggregate(name, state, updates)
    for adapter, tensors in zip(adapters, before, strict=True):
        assert all(torch.equal(t, tensors[n]) for n, t in adapter.tensors().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_reply_of_weight_zero_says_nothing(name):
    (real,) = updates_of([(8, 5)])
    empty = update(random_adapter(8, 77), 0)
    for order in ([empty, real], [real, empty]):
        assert same_bits(aggregate(name, state_of(), order).adapter, real.adapter)
    assert same_bits(aggregate(name, state_of(), [empty]).adapter, state_of().adapter)


# Precision and memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["prelort", "zero-padding"])
def test_half_precision_replies_are_accumulated_in_float32(name, dtype):
    pairs = [(2 + 3 * (k % 3), 1 + k) for k in range(60)]
    half = updates_of(pairs, dtype=dtype)
    upcast = [replace(u, adapter=u.adapter.to(torch.float32)) for u in half]
    result = aggregate(name, state_of(), half).adapter
    assert same_bits(result, aggregate(name, state_of(), upcast).adapter)
    assert {t.dtype for t in result.tensors().values()} == {torch.float32}
    reference = segment_wise if name == "prelort" else zero_padded
    assert_close(result, reference(state_of().adapter, half, "examples"), rtol=1e-5, atol=1e-5)


def test_a_state_in_half_precision_is_kept_in_float32():
    state = ServerState(random_adapter(8, dtype=torch.bfloat16))
    result = aggregate("prelort", state, updates_of([(2, 1)], state=state)).adapter
    for name, factors in result.layers.items():
        assert torch.equal(factors.A[2:], state.adapter.layers[name].A[2:].float())


def tensors_in(found: object, seen: set[int] | None = None) -> int:
    """How many numbers the tensors that an object reaches hold."""
    seen = set() if seen is None else seen
    if id(found) in seen or isinstance(found, str | int | float | type(None)):
        return 0
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        return found.numel()
    if isinstance(found, dict):
        inner = list(found.values())
    elif isinstance(found, list | tuple | set):
        inner = list(found)
    elif is_dataclass(found):
        inner = [getattr(found, field.name) for field in fields(found)]
    else:
        inner = list(getattr(found, "__dict__", {}).values())
    return sum(tensors_in(one, seen) for one in inner)


@pytest.mark.parametrize("name", METHODS)
def test_the_servers_memory_does_not_grow_with_the_number_of_replies(name):
    state = state_of(8)
    aggregator = build(MethodConfig(name=name), [8], 0).aggregator(state)
    sizes = []
    for seed in range(20):
        one = update(random_adapter(8, seed))
        gone = weakref.ref(one.adapter.layers["wide"].A)
        aggregator.add(one)
        del one
        assert gone() is None
        sizes.append(tensors_in(aggregator))
    assert len(set(sizes)) == 1
    # The old adapter, the running mean, and one weight for each slot.
    assert sizes[0] <= 2 * state.adapter.num_parameters + 2 * 8


@pytest.mark.parametrize("name", ["prelort", "zero-padding", "replication", "raflora", "flexlora"])
def test_the_servers_memory_is_bounded_whatever_the_ranks(name):
    """300 replies of all ranks, against ten."""
    state, levels = state_of(8), list(range(1, 9))
    sizes = []
    for count in (10, 300):
        aggregator = build(MethodConfig(name=name), levels, 0).aggregator(state)
        updates = updates_of([(levels[k % 8], 1 + k) for k in range(count)])
        most = 0
        while updates:
            aggregator.add(updates.pop(0))
            most = max(most, tensors_in(aggregator))
        sizes.append(most)
    assert max(sizes) <= BOUND[name] * state.adapter.num_parameters


BOUND = {"prelort": 2.6, "zero-padding": 2.6, "replication": 3.6, "raflora": 8.5, "flexlora": 2.5}
"""Global adapters: the old one and what is summed. Sums of products are cut down to a layer's
smaller dimension, at twice that, which for these small layers is as much as the rank; in raFLoRA
for each of eight segments."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_broadcast_is_the_prefix_in_the_states_own_memory(name, rank):
    state = state_of(8 if name != "fedit" else rank)
    method = build(MethodConfig(name=name), [rank], 0)
    broadcast = method.broadcast(state, Client("k", rank, 1))
    sent = broadcast.trainable
    assert broadcast == Broadcast(sent)  # nothing folded in, drawn or kept by the client
    assert same_bits(sent, state.adapter.prefix(rank))
    for layer, factors in sent.layers.items():
        own = state.adapter.layers[layer]
        assert factors.A.untyped_storage().data_ptr() == own.A.untyped_storage().data_ptr()
        assert factors.B.untyped_storage().data_ptr() == own.B.untyped_storage().data_ptr()
    assert sent.modules_to_save["score.weight"] is state.adapter.modules_to_save["score.weight"]
