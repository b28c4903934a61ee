"""One operation for each LoRA layer against PEFT's own forward and backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.adapters import ScaleRule
from prelort.models.fused_lora import LoraProduct, fused
from prelort.models.lora import ADAPTER, install, lora_layers, trainable
from prelort.training.truncation import Truncation
from tiny_models import adapted, token_batch, trained_adapter

RULE = ScaleRule("rslora", 1.3)


@settings(deadline=None, max_examples=30)
@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    rank=st.integers(1, 4),
    with_base=st.booleans(),
    with_bias=st.booleans(),
)
def test_the_product_and_its_gradients_are_those_of_the_formula(
    groups, rows, length, rank, with_base, with_bias
):
    """``y = x W' + bias + ((x A') * m) B'``, differentiated by autograd, in float64."""
    generator = torch.Generator().manual_seed(groups * 100 + rows * 10 + length)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(groups * rows, length, 5).requires_grad_()
    weight = random(3, 5) if with_base else None
    bias = random(3) if with_base and with_bias else None
    a, b = random(groups, rank, 5).requires_grad_(), random(groups, 3, rank).requires_grad_()
    mask = random(groups * rows, 1, rank)
    towards = random(groups * rows, length, 3)

    found = LoraProduct.apply(x, weight, bias, a, b, mask)
    gradients = torch.autograd.grad((found * towards).sum(), (x, a, b))

    of_row = torch.arange(groups).repeat_interleave(rows)
    middle = torch.einsum("nli,nri->nlr", x, a[of_row]) * mask
    expected = torch.einsum("nlr,nor->nlo", middle, b[of_row])
    if weight is not None:
        expected = expected + torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected)
    for name, mine, theirs in zip(
        "xAB", gradients, torch.autograd.grad((expected * towards).sum(), (x, a, b)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name)


def passes(model, truncation, ranks, *, fast):
    """Logits and the gradients of all that learns, once by PEFT and once by one operation."""
    batch = token_batch(rows=4)
    torch.manual_seed(5)
    context = truncation.fused(model) if fast else torch.enable_grad()
    with context, truncation.at(ranks, tuple(batch["input_ids"].shape)):
        logits = model(**batch).logits
        logits.float().square().sum().backward()
    gradients = [p.grad for parameters in trainable(model) for p in parameters]
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


def assert_same_passes(model, truncation, ranks, tolerance=2e-5):
    slow, slow_gradients = passes(model, truncation, ranks, fast=False)
    fast, fast_gradients = passes(model, truncation, ranks, fast=True)
    torch.testing.assert_close(fast, slow, rtol=tolerance, atol=tolerance)
    assert slow_gradients
    for mine, theirs in zip(fast_gradients, slow_gradients, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max()
        )


RANKS = {"whole": None, "one": 2, "none": 0, "each": torch.tensor([1, 8, 3, 0])}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_model_computes_the_same(name, ranks, request):
    """GPT-2 has transposed layers and flattens its tokens, BERT a head that is trained in full."""
    model = adapted(request.getfixturevalue(f"tiny_{name}"), 8)
    truncation = Truncation(model, RULE)
    install(model, trained_adapter(model, RULE))
    assert_same_passes(model, truncation, RANKS[ranks])


def test_a_frozen_path_a_scale_multiplier_and_dropout_before_the_adapter_count(tiny_llama):
    model = adapted(tiny_llama, 8, dropout=0.5)
    truncation = Truncation(model, RULE)
    frozen = trained_adapter(model, RULE, seed=3).prefix(5)
    install(model, trained_adapter(model, RULE), frozen=frozen, scale_multiplier=1.7)
    assert_same_passes(model, truncation, 4)
    model.train()
    slow, _ = passes(model, truncation, 4, fast=False)
    assert not torch.equal(slow, passes(model.eval(), truncation, 4, fast=False)[0])
    assert_same_passes(model.train(), truncation, 4)


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_factor_that_does_not_learn_has_no_gradient(tiny_llama, trains):
    model = adapted(tiny_llama, 8)
    truncation = Truncation(model, RULE)
    install(model, trained_adapter(model, RULE), trains=trains)
    assert_same_passes(model, truncation, None)
    with truncation.fused(model):
        model(**token_batch()).logits.sum().backward()
    for layer in lora_layers(model).values():
        assert (layer.lora_A[ADAPTER].weight.grad is None) == (trains == "B")
        assert (layer.lora_B[ADAPTER].weight.grad is None) == (trains == "A")


def test_autocast_and_a_base_in_another_type(tiny_llama):
    model = adapted(tiny_llama, 8)
    truncation = Truncation(model, RULE)
    install(model, trained_adapter(model, RULE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_passes(model, truncation, 4, tolerance=6e-2)
    for layer in lora_layers(model).values():
        layer.base_layer.to(torch.bfloat16)
    low = copy.deepcopy(model).to(torch.bfloat16)
    install(low, trained_adapter(model, RULE))  # factors are float32 again
    assert_same_passes(low, Truncation(low, RULE), 4, tolerance=6e-2)


def test_the_models_own_layers_are_back_afterwards_even_after_an_error(tiny_llama):
    model = adapted(tiny_llama, 8)
    truncation = Truncation(model, RULE)

    def broken(*_):
        raise RuntimeError("no factors")

    with pytest.raises(RuntimeError, match="no factors"), fused(model, broken):
        model(**token_batch())
    assert all("forward" not in vars(layer) for layer in lora_layers(model).values())
    with truncation.fused(model):
        pass
    assert all("forward" not in vars(layer) for layer in lora_layers(model).values())
