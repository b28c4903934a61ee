"""Training one factor only, with a gain, beside a fold: what moves and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prelort import tasks
from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.algebra import concatenate
from prelort.adapters.initial import fresh
from prelort.config import TrainingConfig
from prelort.methods.objective import nested, plain
from prelort.models.lora import ADAPTER, FROZEN, extract, install, lora_layers
from prelort.tasks.interface import Example
from prelort.training.local import Assignment, TrainResult, train
from prelort.training.truncation import Truncation
from random_adapters import same_bits
from tiny_models import adapted, kind_of, logits, trained_adapter

RULE = ScaleRule("rslora", 1.3)


class Bench:
    """One model on which a client trains for a few steps."""

    def __init__(self, folder, rank=4):
        self.model = adapted(folder, rank)
        self.truncation = Truncation(self.model, RULE)
        self.task = tasks.get("causal-lm" if kind_of(folder) == "causal" else "classification")
        self.start = trained_adapter(self.model, RULE)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(2, 256, (8, 6), generator=generator).tolist()
        label = kind_of(folder) == "classification"
        self.examples = [Example(ids, i % 3 if label else ids) for i, ids in enumerate(rows)]

    def fold(self, rank, seed=7):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            name: Factors(
                0.2 * torch.randn(rank, f.A.shape[1], generator=generator),
                0.2 * torch.randn(f.B.shape[0], rank, generator=generator),
            )
            for name, f in self.start.layers.items()
        }
        return LoraAdapter(layers, RULE)

    def train(
        self,
        adapter=None,
        objective=None,
        *,
        frozen=None,
        trains="AB",
        scale_multiplier=1.0,
        **config,
    ):
        """The result and the trained adapter."""
        defaults = {"local_steps": 3, "batch_size": 4, "learning_rate": 0.05, "optimizer": "sgd"}
        install(
            self.model,
            adapter or self.start,
            frozen=frozen,
            trains=trains,
            scale_multiplier=scale_multiplier,
        )
        result: TrainResult = train(
            self.model,
            self.truncation,
            self.task,
            self.examples,
            TrainingConfig(**(defaults | config)),
            Assignment("k", 0, 1, 0, objective or plain(4)),
            pad_id=0,
        )
        return result, extract(self.model, RULE)


@pytest.fixture
def bench(folder):
    return Bench(folder)


def moved(before: LoraAdapter, after: LoraAdapter, kind: str) -> set[str]:
    """The layers in which this factor is no longer what it was, bit for bit."""
    return {
        name
        for name, factors in before.layers.items()
        if not torch.equal(getattr(factors, kind), getattr(after.layers[name], kind))
    }


@pytest.mark.parametrize("trains", ["A", "B", "AB"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_the_factors_that_learn_move(bench, trains, optimizer):
    """Weight decay would move whatever the optimiser holds, gradient or not."""
    _, trained = bench.train(trains=trains, optimizer=optimizer, weight_decay=0.1)
    everything = set(bench.start.layers)
    assert moved(bench.start, trained, "A") == (everything if "A" in trains else set())
    assert moved(bench.start, trained, "B") == (everything if "B" in trains else set())


def test_with_b_of_zeros_a_alone_cannot_learn(bench):
    """Why the methods that take turns begin with B."""
    begun = fresh(bench.start, 3)
    assert not moved(begun, bench.train(begun, trains="A")[1], "A")
    assert moved(begun, bench.train(begun, trains="B")[1], "B") == set(begun.layers)


@pytest.mark.parametrize("rank", [2, 30], ids=["two products", "one matrix"])
def test_the_fold_is_trained_around_and_stays_as_it_is(bench, rank):
    fold = bench.fold(rank)
    copies = {name: tensor.clone() for name, tensor in fold.tensors().items()}
    install(bench.model, bench.start, frozen=fold)
    before = [
        [p.clone() for part in (layer.lora_A, layer.lora_B) for p in part[FROZEN].parameters()]
        for layer in lora_layers(bench.model).values()
    ]

    _, trained = bench.train(frozen=fold, optimizer="adamw", weight_decay=0.1)

    after = [
        [p for part in (layer.lora_A, layer.lora_B) for p in part[FROZEN].parameters()]
        for layer in lora_layers(bench.model).values()
    ]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
        assert all(p.grad is None for p in new)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in fold.tensors().items())
    _, alone = bench.train(optimizer="adamw", weight_decay=0.1)
    assert not same_bits(alone, trained)  # guards: it is trained around


def test_equal_arguments_give_equal_bits_with_a_fold_too(bench):
    first = bench.train(frozen=bench.fold(2), scale_multiplier=1.5)
    bench.train(frozen=bench.fold(30, seed=8))
    second = bench.train(frozen=bench.fold(2), scale_multiplier=1.5)
    assert first[0].loss == second[0].loss
    assert same_bits(first[1], second[1])


def test_a_round_with_a_fold_leaves_nothing_for_the_next(bench):
    plain_before = bench.train()
    bench.train(frozen=bench.fold(30), trains="B", scale_multiplier=2.0)
    plain_after = bench.train()
    assert plain_before[0].loss == plain_after[0].loss
    assert same_bits(plain_before[1], plain_after[1])


@pytest.mark.parametrize("rank", [2, 30], ids=["two products", "one matrix"])
def test_the_loss_beside_a_fold_is_that_of_the_sum(bench, rank):
    """At rate zero, nearly: of one adapter that holds both, at one scale."""
    fold = bench.fold(rank).scaled(10)  # enough for the loss to show it
    both = concatenate(
        [bench.start, replace(fold, modules_to_save=bench.start.modules_to_save)], [1.5, 1.0]
    )
    both = replace(both, modules_to_save=bench.start.modules_to_save)
    expected = bench.train(both, plain(both.rank), learning_rate=1e-12)[0].loss

    def loss(**how):
        return bench.train(learning_rate=1e-12, **how)[0].loss

    assert loss(frozen=fold, scale_multiplier=1.5) == pytest.approx(expected, rel=5e-6)
    for wrong in ({"scale_multiplier": 1.5}, {"frozen": fold}):
        assert loss(**wrong) != pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", ["mean", "example", "step", "full+one"])
def test_nested_training_works_on_one_factor_beside_a_fold(bench, kind):
    objective = nested(kind, 4, (2, 4), full_share=0.5)
    _, trained = bench.train(objective=objective, frozen=bench.fold(2), trains="B")
    assert not moved(bench.start, trained, "A")
    assert moved(bench.start, trained, "B") == set(bench.start.layers)


def test_gradient_checkpointing_works_beside_a_fold(tiny_llama):
    found = []
    for on in (False, True):
        bench = Bench(tiny_llama)
        found.append(bench.train(frozen=bench.fold(2), gradient_checkpointing=on)[1])
    for name, tensor in found[0].tensors().items():
        torch.testing.assert_close(found[1].tensors()[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_is_measured_after_training_is_the_trained_adapter_beside_the_fold(bench):
    fold = bench.fold(2)
    _, trained = bench.train(frozen=fold, scale_multiplier=1.5)
    bench.model.eval()
    there = logits(bench.model)
    install(bench.model, trained, frozen=fold, scale_multiplier=1.5)
    assert torch.equal(logits(bench.model), there)
    assert next(iter(lora_layers(bench.model).values())).scaling[ADAPTER] == RULE(4) * 1.5
