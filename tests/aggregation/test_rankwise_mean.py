"""The mean of each rank dimension against plain float64 loops, and the laws it must keep."""

from __future__ import annotations

import weakref
from dataclasses import fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import LoraAdapter, ScaleRule
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.config import MethodConfig
from prelort.methods import Client, ServerState, Update, build
from random_adapters import random_adapter, same_bits, seeds
from reference import averaged, segment_wise, weights_of, zero_padded

R = 8
SPREAD = {"rtol": 2e-6, "atol": 2e-6}
"""Of float32 means against float64 ones."""
quick = settings(deadline=None, max_examples=40)
clients = st.lists(st.tuples(st.integers(1, R), st.integers(1, 1000)), min_size=1, max_size=6)
"""The rank and the number of examples of each client."""
FINISH = {"over_holders": segment_wise, "over_everyone": zero_padded}


def updates_of(pairs, seed=0, own=(R, R), dtype=torch.float32):
    """A reply of each rank; no layer exceeds its rank in the global adapter."""
    adapters = [
        random_adapter([min(rank, most) for most in own], seed + k, dtype=dtype)
        for k, (rank, _) in enumerate(pairs)
    ]
    return [
        Update(Client(f"k{k}", adapter.rank, examples), adapter, examples)
        for k, (adapter, (_, examples)) in enumerate(zip(adapters, pairs, strict=True))
    ]


def mean_of(updates, previous, finish="over_holders", dimensions=None):
    mean = RankwiseMean(previous)
    for k, update in enumerate(updates):
        mean.add(update.adapter, float(update.examples), dimensions and dimensions[k])
    return getattr(mean, finish)(previous)


def assert_close(adapter, expected, **tolerance):
    found = adapter.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name].double(), **tolerance, msg=name)


@pytest.mark.parametrize("finish", FINISH)
@quick
@given(pairs=clients, own=st.tuples(*[st.integers(1, R)] * 2), seed=seeds)
def test_prefixes_are_averaged_dimension_by_dimension(finish, pairs, own, seed):
    previous, updates = random_adapter(own, 1000), updates_of(pairs, seed, own)
    expected = FINISH[finish](previous, updates, "examples")
    assert_close(mean_of(updates, previous, finish), expected, **SPREAD)


@pytest.mark.parametrize(
    "finish, absent", [("over_holders", "nothing"), ("or_unchanged", "no change")]
)
@quick
@given(pairs=clients, seed=seeds)
def test_selected_dimensions_are_averaged_where_they_belong(finish, absent, pairs, seed):
    previous, updates = random_adapter(R, 1000), updates_of(pairs, seed)
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(R, generator=generator)[:rank].sort().values for rank, _ in pairs]
    chosen = [dict.fromkeys(previous.layers, dimensions) for dimensions in order]
    expected = averaged(previous, updates, weights_of(updates, "examples"), absent, chosen)
    assert_close(mean_of(updates, previous, finish, chosen), expected, **SPREAD)


def test_a_worked_example():
    """Two clients of ranks 1 and 2 with 1 and 3 examples, one layer of one input and output."""

    def adapter(*values):
        row = torch.tensor([values])
        tensors = {"x.lora_A.weight": row.T.contiguous(), "x.lora_B.weight": row}
        return LoraAdapter.from_tensors(tensors, ScaleRule())

    previous = adapter(0.0, 0.0, 7.0)
    for finish, expected in (("over_holders", [5.0, 4.0, 7.0]), ("over_everyone", [5.0, 3.0, 7.0])):
        mean = RankwiseMean(previous)
        mean.add(adapter(2.0), 1.0)
        mean.add(adapter(6.0, 4.0), 3.0)
        found = getattr(mean, finish)(previous).layers["x"]
        assert found.A.flatten().tolist() == found.B.flatten().tolist() == expected


@pytest.mark.parametrize("finish", [*FINISH, "or_unchanged"])
@quick
@given(counts=st.lists(st.integers(1, 1000), min_size=1, max_size=7), seed=seeds)
def test_the_mean_of_equal_replies_is_that_reply_bit_for_bit(finish, counts, seed):
    (update,), previous = updates_of([(R, 1)], seed), random_adapter(R, 1000)
    mean = RankwiseMean(previous)
    for examples in counts:
        mean.add(update.adapter, float(examples))
    assert same_bits(getattr(mean, finish)(previous), update.adapter)


@pytest.mark.parametrize("finish", [*FINISH, "or_unchanged"])
def test_dimensions_without_holders_keep_their_value(finish):
    """Zero-padding too: as zeros in both factors they could never learn again."""
    previous = random_adapter(R, 1000)
    result = mean_of(updates_of([(2, 1), (5, 2)]), previous, finish)
    for name, factors in result.layers.items():
        old = previous.layers[name]
        assert torch.equal(factors.A[5:], old.A[5:])
        assert torch.equal(factors.B[:, 5:], old.B[:, 5:])
        assert not torch.equal(factors.A[4], old.A[4])


# Memory


def tensors_in(found: object, seen: set[int]) -> int:
    """How many numbers the tensors that an object reaches hold."""
    if id(found) in seen or isinstance(found, str | int | float | type(None)):
        return 0
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        return found.numel()
    if isinstance(found, dict | list | tuple | set):
        inner = list(found.values() if isinstance(found, dict) else found)
    elif is_dataclass(found):
        inner = [getattr(found, field.name) for field in fields(found)]
    else:
        inner = list(getattr(found, "__dict__", {}).values())
    return sum(tensors_in(one, seen) for one in inner)


BOUND = {"prelort": 2.1, "zero-padding": 2.1, "replication": 3.2, "raflora": 8.5, "flexlora": 2.5}
"""In global adapters: the old one and what is summed. Sums of products are cut down to a layer's
smaller dimension, at twice that, which for these small layers is as much as the rank; in raFLoRA
for each of eight segments."""


@pytest.mark.parametrize("name", BOUND)
def test_the_servers_memory_is_bounded_whatever_the_ranks_and_however_many_reply(name):
    state = ServerState(random_adapter(R, 1000), levels=tuple(range(1, R + 1)))
    aggregator, sizes = build(MethodConfig(name=name), 0).aggregator(state), []
    updates = updates_of([(1 + k % R, 1 + k) for k in range(300)])
    while updates:
        reply = weakref.ref(updates[0].adapter.layers["wide"].A)
        aggregator.add(updates.pop(0))
        sizes.append(tensors_in(aggregator, set()))
        if name not in ("raflora", "flexlora"):
            assert reply() is None
    assert max(sizes) <= BOUND[name] * sum(t.numel() for t in state.adapter.tensors().values())
