"""A second path beside the base that does not learn: what is folded in for a round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.errors import AdapterError
from prelort.models.lora import (
    ADAPTER,
    FROZEN,
    extract,
    initial_adapter,
    install,
    lora_layers,
    schema,
    trainable,
)
from prelort.training.truncation import Truncation
from random_adapters import dense, same_bits
from tiny_models import adapted, base_model, logits, token_batch, trained_adapter

RULES = [ScaleRule("constant", 0.5), ScaleRule("rslora", 1.3)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)
NARROW, WIDE = 3, 30
"""Ranks of a fold: as two narrow products, and as one matrix, in every layer of the tiny models."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fold_of(model: PeftModel, rank: int, rule: ScaleRule, seed: int = 50) -> LoraAdapter:
    """A frozen adapter of any rank for every layer; it has no extras."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: Factors(
            0.2 * torch.randn(rank, d_in, generator=generator),
            0.2 * torch.randn(d_out, rank, generator=generator),
        )
        for name, (d_in, d_out, _) in schema(model).layers.items()
    }
    return LoraAdapter(layers, rule)


def by_hand(folder, parts: list[tuple[float, LoraAdapter]], batch=None) -> torch.Tensor:
    """Logits of the base with ``sum factor * s B A`` added to its weights, all in float64."""
    base = base_model(folder).double()
    with torch.no_grad():
        for factor, adapter in parts:
            for name, product in dense(adapter).items():
                layer = base.get_submodule(name)
                layer.weight += factor * (product.T if isinstance(layer, Conv1D) else product)
            for name, tensor in adapter.modules_to_save.items():
                base.get_parameter(name).copy_(tensor)
    return logits(base, batch)


def assert_narrow_or_wide(model: PeftModel, rank: int) -> None:
    """Guards the tests: each rank takes the branch that it is there for."""
    for layer in lora_layers(model).values():
        one_matrix = isinstance(layer.lora_B[FROZEN], nn.Identity)
        assert one_matrix == (rank == WIDE)


@rules
@pytest.mark.parametrize("rank", [NARROW, WIDE])
@pytest.mark.parametrize("scale_multiplier", [1.0, 2.5])
def test_the_output_is_base_plus_adapter_plus_fold(folder, rule, rank, scale_multiplier):
    model = adapted(folder, 8)
    adapter, fold = trained_adapter(model, rule), fold_of(model, rank, rule)

    install(model, adapter.prefix(5), frozen=fold, scale_multiplier=scale_multiplier)

    assert_narrow_or_wide(model, rank)
    found = logits(model)
    expected = by_hand(folder, [(scale_multiplier, adapter.prefix(5)), (1.0, fold)])
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    # Guards the comparison: it would see the fold, the gain, or the other scale left out.
    for wrong in (
        [(scale_multiplier, adapter.prefix(5))],
        [(scale_multiplier + 0.1, adapter.prefix(5)), (1.0, fold)],
        [(scale_multiplier, adapter.prefix(5)), (0.9, fold)],
    ):
        assert float((by_hand(folder, wrong) - found).abs().max()) > 1e-3


def test_layers_without_a_fold_are_left_alone(folder):
    model = adapted(folder, 4)
    rule = RULES[0]
    adapter, fold = trained_adapter(model, rule), fold_of(model, NARROW, rule)
    one = min(fold.layers)
    others = replace(fold, layers={one: fold.layers[one]})
    install(model, adapter, frozen=fold)  # all of them first: the rest must go again

    install(model, adapter, frozen=others)

    expected = by_hand(folder, [(1.0, adapter), (1.0, others)])
    torch.testing.assert_close(logits(model).double(), expected, **CLOSE)


def test_a_fold_of_no_slots_is_none(tiny_llama):
    model = adapted(tiny_llama, 4)
    adapter = trained_adapter(model)
    install(model, adapter)
    before = logits(model)
    empty = {n: Factors(f.A[:0], f.B[:, :0]) for n, f in fold_of(model, 1, RULES[0]).layers.items()}
    install(model, adapter, frozen=LoraAdapter(empty, RULES[0]))
    assert torch.equal(logits(model), before)
    assert all(list(layer.scaling) == [ADAPTER] for layer in lora_layers(model).values())


@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_taking_the_fold_out_gives_the_very_same_function_again(folder, rank):
    model = adapted(folder, 8)
    adapter = trained_adapter(model)
    weights = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    names = set(dict(model.named_modules()))
    install(model, adapter)
    before = logits(model)

    for _ in range(3):
        install(model, adapter, frozen=fold_of(model, rank, RULES[1]), scale_multiplier=3.0)
        assert float((logits(model) - before).abs().max()) > 1e-2
        install(model, adapter)
        assert torch.equal(logits(model), before)

    assert set(dict(model.named_modules())) == names
    for layer in lora_layers(model).values():
        assert list(layer.scaling) == [ADAPTER]
        assert list(layer.active_adapters) == [ADAPTER]
    # The head is the adapter's own part and was installed with it.
    now = {n: p for n, p in model.named_parameters() if n in weights}
    assert all(torch.equal(p, weights[n]) for n, p in now.items() if "modules_to_save" not in n)


@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_the_fold_is_neither_extracted_nor_trained(folder, rank):
    model = adapted(folder, 4)
    adapter = trained_adapter(model)
    install(model, adapter, frozen=fold_of(model, rank, RULES[0]))

    assert same_bits(extract(model, adapter.scale), adapter)
    a, b, modules_to_save = trainable(model)
    assert len(a) == len(b) == len(adapter.layers)
    assert len(modules_to_save) == len(adapter.modules_to_save)
    learning = {id(p) for p in [*a, *b, *modules_to_save]}
    assert learning == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("trains", ["A", "B", "AB"])
@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_what_does_not_learn_has_no_gradient_and_the_rest_that_of_the_folded_base(
    folder, trains, rank
):
    model = adapted(folder, 4)
    adapter, fold = trained_adapter(model), fold_of(model, rank, RULES[1])
    batch = token_batch()

    install(model, adapter, frozen=fold, trains=trains, scale_multiplier=1.5)
    model(**batch).logits.square().sum().backward()

    expected = gradients_by_hand(folder, adapter, fold, batch, scale_multiplier=1.5)
    for name, layer in lora_layers(model).items():
        for factor, own in (("A", layer.lora_A), ("B", layer.lora_B)):
            gradient = own[ADAPTER].weight.grad
            assert own[ADAPTER].weight.requires_grad == (factor in trains)
            if factor in trains:
                wanted = expected[f"{name}.{factor}"]
                spread = 1e-4 * float(wanted.abs().max())
                torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=spread)
            else:
                assert gradient is None
            for parameter in own[FROZEN].parameters():
                assert not parameter.requires_grad
                assert parameter.grad is None
    a, b, _ = trainable(model)
    learning = {id(p) for p in [*a, *b]}
    assert len(learning) == len(trains) * len(adapter.layers)


def gradients_by_hand(folder, adapter, fold, batch, scale_multiplier) -> dict[str, torch.Tensor]:
    """Of the same loss: the gradient of each weight matrix, by the chain rule, in float64."""
    base = base_model(folder).double()
    with torch.no_grad():
        for factor, part in ((scale_multiplier, adapter), (1.0, fold)):
            for name, product in dense(part).items():
                layer = base.get_submodule(name)
                layer.weight += factor * (product.T if isinstance(layer, Conv1D) else product)
        for name, tensor in adapter.modules_to_save.items():
            base.get_parameter(name).copy_(tensor)
    weights = {name: base.get_submodule(name).weight.requires_grad_() for name in adapter.layers}
    base.eval()(**batch).logits.square().sum().backward()
    found = {}
    for name, weight in weights.items():
        whole = weight.grad.T if isinstance(base.get_submodule(name), Conv1D) else weight.grad
        factors, scale = (
            adapter.layers[name],
            scale_multiplier * adapter.scale(adapter.layers[name].rank),
        )
        found[f"{name}.A"] = scale * factors.B.double().T @ whole
        found[f"{name}.B"] = scale * whole @ factors.A.double().T
    return found


@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_dropout_is_not_of_the_fold(tiny_llama, rank):
    """It stands for weights of the base: with B = 0, training sees base and fold and no noise."""
    model = adapted(tiny_llama, 4, dropout=0.5)
    rule = RULES[0]
    adapter, fold = initial_adapter(model, rule, seed=0), fold_of(model, rank, rule)
    install(model, adapter, frozen=fold)
    model.train()
    torch.testing.assert_close(logits(model).double(), by_hand(tiny_llama, [(1.0, fold)]), **CLOSE)
    install(model, trained_adapter(model, rule), frozen=fold)
    assert not torch.allclose(logits(model), logits(model))  # guards: the adapter's own is dropped


# Scales and truncations


@rules
@pytest.mark.parametrize("rank", [NARROW, WIDE])
def test_a_truncation_cuts_the_adapter_and_leaves_the_fold(folder, rule, rank):
    model = adapted(folder, 8)
    truncation = Truncation(model, rule)
    adapter, fold = trained_adapter(model, rule), fold_of(model, rank, rule)
    install(model, adapter, frozen=fold, scale_multiplier=1.5)
    for cut in (2, 5):
        with truncation.at(cut):
            found = logits(model)
        expected = by_hand(folder, [(1.5, adapter.prefix(cut)), (1.0, fold)])
        torch.testing.assert_close(found.double(), expected, **CLOSE)
    with truncation.at(0):
        found = logits(model)
    head = LoraAdapter({}, rule, adapter.modules_to_save)
    torch.testing.assert_close(found.double(), by_hand(folder, [(1.0, fold), (1.0, head)]), **CLOSE)
    with truncation.at(torch.tensor([2, 8, 0])):
        each = logits(model)
    with truncation.at(2):
        torch.testing.assert_close(each[0], logits(model)[0], rtol=1e-5, atol=1e-5)


# What does not fit


@pytest.mark.parametrize("how", ["surplus layer", "other d_in", "other d_out"])
def test_a_fold_that_does_not_fit_is_named_and_nothing_is_installed(folder, how):
    model = adapted(folder, 4)
    good = trained_adapter(model)
    install(model, good)
    before = logits(model)
    fold = fold_of(model, NARROW, RULES[0])
    layers, name = dict(fold.layers), min(fold.layers)
    a, b = layers[name].A, layers[name].B
    if how == "surplus layer":
        name = "elsewhere"
        layers[name] = Factors(a, b)
    elif how == "other d_in":
        layers[name] = Factors(torch.zeros(NARROW, a.shape[1] + 1), b)
    else:
        layers[name] = Factors(a, torch.zeros(b.shape[0] + 1, NARROW))
    with pytest.raises(AdapterError, match=rf"layer '{name}'") as refused:
        install(model, trained_adapter(model, seed=1), frozen=replace(fold, layers=layers))
    if how == "surplus layer":
        assert "is not in the base model" in str(refused.value)
    assert same_bits(extract(model, good.scale), good)
    assert torch.equal(logits(model), before)
