from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import AdapterSchema, LoraAdapter, ScaleRule
from prelort.errors import AdapterError
from random_adapters import random_adapter, ranks, same_bits, scale_rules, seeds

quick = settings(deadline=None, max_examples=40)


@quick
@given(data=st.data(), rank=ranks, rule=scale_rules, seed=seeds)
def test_a_prefix_of_a_prefix_is_the_shorter_prefix(data, rank, rule, seed):
    adapter = random_adapter([rank, max(1, rank - 2)], seed, scale=rule)
    long = data.draw(st.integers(1, rank))
    short = data.draw(st.integers(1, long))
    assert same_bits(adapter.prefix(long).prefix(short), adapter.prefix(short))


@quick
@given(rank=ranks, rule=scale_rules, seed=seeds)
def test_a_prefix_holds_views_of_the_first_dimensions_and_the_same_rule(rank, rule, seed):
    """Layers of a lower rank keep all of theirs."""
    adapter = random_adapter([9, 3], seed, scale=rule)
    prefix = adapter.prefix(rank)
    assert {name: f.rank for name, f in prefix.layers.items()} == {
        "wide": rank,
        "tall": min(rank, 3),
    }
    assert prefix.scale == rule
    for name, factors in prefix.layers.items():
        own = adapter.layers[name]
        assert torch.equal(factors.A, own.A[:rank])
        assert torch.equal(factors.B, own.B[:, :rank])
        assert factors.A.data_ptr() == own.A.data_ptr()
        assert factors.B.data_ptr() == own.B.data_ptr()
    assert torch.equal(
        prefix.modules_to_save["score.weight"], adapter.modules_to_save["score.weight"]
    )


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_prefix_that_does_not_exist_is_refused(rank):
    with pytest.raises(AdapterError, match=rf"rank {rank} is not allowed: use 1 to 8"):
        random_adapter(8).prefix(rank)


@quick
@given(rank=ranks, value=st.floats(0.01, 100))
def test_the_scale_of_a_prefix_follows_the_rule_at_its_own_rank(rank, value):
    assert ScaleRule("constant", value)(rank) == value
    assert ScaleRule("rslora", value)(rank) == pytest.approx(value / rank**0.5, rel=1e-15)
    for kind, power in (("constant", 1.0), ("rslora", 0.5)):
        rule = ScaleRule(kind, value)
        assert rule(0) == 0.0
        assert rule.lora_alpha(rank) / rank**power == pytest.approx(rule(rank), rel=1e-15)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_must_be_a_number_above_zero(value):
    with pytest.raises(AdapterError, match="must be above 0"):
        ScaleRule("constant", value)
    with pytest.raises(AdapterError, match="'alpha/r' is unknown"):
        ScaleRule("alpha/r", 1.0)  # type: ignore[arg-type]


@quick
@given(first=ranks, second=ranks, rule=scale_rules, seed=seeds)
def test_tensors_and_back_is_the_same_adapter(first, second, rule, seed):
    adapter = random_adapter([first, second], seed, scale=rule)
    again = LoraAdapter.from_tensors(adapter.tensors(), rule)
    assert same_bits(again, adapter)
    assert again.scale == rule
    assert again.layers.keys() == adapter.layers.keys()
    assert again.modules_to_save.keys() == adapter.modules_to_save.keys()
    assert {t.dtype for t in again.to(torch.float16).tensors().values()} == {torch.float16}
    assert list(again.select(["tall", "other"]).layers) == ["tall"]
    assert again.select(None) is again
    assert not again.bare().modules_to_save


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_without_its_partner_is_named(factor):
    tensors = random_adapter(2).tensors()
    del tensors[f"tall.{factor}.weight"]
    with pytest.raises(AdapterError, match=rf"'tall\.{factor}\.weight' is missing"):
        LoraAdapter.from_tensors(tensors, ScaleRule())


def test_partners_of_different_ranks_are_named():
    tensors = random_adapter(2).tensors() | {"tall.lora_A.weight": torch.zeros(3, 3)}
    with pytest.raises(AdapterError, match="layer 'tall': factors do not fit"):
        LoraAdapter.from_tensors(tensors, ScaleRule())


def test_a_schema_names_a_missing_tensor():
    adapter = random_adapter(4)
    less = adapter.select(["wide"])
    with pytest.raises(AdapterError, match=r"'tall\.lora_A\.weight' is missing"):
        AdapterSchema.of(adapter).check(less, 4)
    with pytest.raises(AdapterError, match=r"'score\.weight' is missing"):
        AdapterSchema.of(adapter).check(adapter.bare(), 4)


@pytest.mark.parametrize("surplus", ["other.lora_A.weight", "other.bias"])
def test_a_schema_names_a_surplus_tensor(surplus):
    adapter = random_adapter(4)
    tensors = adapter.tensors() | {surplus: torch.zeros(4, 5)}
    if "lora" in surplus:
        tensors["other.lora_B.weight"] = torch.zeros(5, 4)
    more = LoraAdapter.from_tensors(tensors, adapter.scale)
    with pytest.raises(AdapterError, match=rf"'{surplus}' is surplus"):
        AdapterSchema.of(adapter).check(more, 4)


def test_a_schema_names_a_tensor_of_another_rank_or_shape():
    adapter = random_adapter(4)
    schema = AdapterSchema.of(adapter)
    with pytest.raises(
        AdapterError, match=r"'wide\.lora_A\.weight' has shape \[4, 7\], expected \[2, 7\]"
    ):
        schema.check(adapter, 2)
    head = LoraAdapter(adapter.layers, adapter.scale, {"score.weight": torch.zeros(3, 2)})
    with pytest.raises(AdapterError, match=r"'score\.weight' has shape \[3, 2\]"):
        schema.check(head, 4)


def test_the_digest_tells_layers_and_shapes_apart_but_not_ranks():
    digest = AdapterSchema.of(random_adapter(4)).digest()
    assert AdapterSchema.of(random_adapter([2, 1], seed=5)).digest() == digest
    other = {"wide": (7, 4), "tall": (3, 5)}
    assert AdapterSchema.of(random_adapter(4, dimensions=other)).digest() != digest
    renamed = {"wide": (7, 4), "long": (3, 6)}
    assert AdapterSchema.of(random_adapter(4, dimensions=renamed)).digest() != digest
    assert AdapterSchema.of(random_adapter(4, modules_to_save=False)).digest() != digest
