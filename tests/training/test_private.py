"""DP-SGD: the gradients of single examples, their clipping, their noise, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import WORK, Bench, assert_close, distance, settings_of, without_dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from audit import audited_epsilon
from prelort.errors import ConfigError
from prelort.methods.objective import FULL_SHARE, nested, plain
from prelort.models.lora import install, trainable
from prelort.privacy.accounting import Budget
from prelort.privacy.example import NoisyGradients
from prelort.tasks.interface import Example
from prelort.training import private
from prelort.training.private import ExampleGradients, PrivateSteps, clipped_sums
from prelort.training.steps import Assignment

LEVELS = (2, 4, 8)
ALL_OF_THEM = NoisyGradients(clip=1e6, multiplier=0.0, rate=1.0)


@pytest.fixture
def still(folder):
    """Each model in turn, without dropout."""
    bench = Bench(folder)
    without_dropout(bench.model)
    return bench


@pytest.fixture
def llama(tiny_llama):
    return Bench(tiny_llama)


def steps_of(bench, noise=ALL_OF_THEM, objective=None, **changes):
    work = Assignment(**{**WORK, "objective": objective or plain(bench.rank)})
    return PrivateSteps(bench.runtime, bench.examples, settings_of(**changes), work, noise)


def one_by_one(bench, passes):
    """The gradients of each example of a batch: a backward pass for each, by PEFT's own layers."""
    learning = [p for group in trainable(bench.model) for p in group]
    found = []
    for row, example in enumerate(passes[0].examples):
        batch = bench.runtime.collate([example])
        for part in passes:
            rank = part.ranks
            rank = int(rank[row]) if isinstance(rank, torch.Tensor) else rank
            with bench.runtime.truncation.at(rank):
                (bench.runtime.task.losses(bench.model, batch).sum() * part.weight[row]).backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in learning])
        bench.model.zero_grad(set_to_none=True)
    return [torch.stack(own) for own in zip(*found, strict=True)]


@pytest.mark.parametrize("kind", ["plain", "mean", "full+one", "step", "example"])
def test_the_gradients_of_examples_are_those_of_each_alone(still, kind):
    install(still.model, still.start)
    objective = nested(kind, 8, LEVELS, full_share=FULL_SHARE.get(kind))
    steps = steps_of(still, objective=objective)
    for passes in steps.next(still.runtime):
        with steps.gradients.installed():
            found = steps.gradients.of(passes)
        for one, expected in zip(found, one_by_one(still, passes), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trains", ["AB", "B"])
def test_without_noise_and_clipping_it_trains_as_ever(still, trains):
    """On examples of one length, all of them at each step."""
    ids = torch.randint(2, 256, (12, 6), generator=torch.Generator().manual_seed(0)).tolist()
    label = (lambda i, row: i % 3) if still.folder.name == "bert" else (lambda i, row: row)
    still.examples = [Example(row, label(i, row)) for i, row in enumerate(ids)]
    how = {"trains": trains, "gradient_accumulation": 3, "weight_decay": 0.1}
    _, expected = still.train(**how)
    for changes in ({}, {"gradient_checkpointing": True}):
        _, found = still.train(noise=ALL_OF_THEM, **how, **changes)
        assert_close(found, expected, 1e-5)


def test_a_folded_adapter_and_a_tail_are_no_example(llama):
    """Neither is part of the noise: the frozen path has no gradient, the penalty no data."""
    how = {"frozen": llama.fold(3), "gradient_accumulation": 3, "batch_size": 4}
    llama.examples = [replace(e, input_ids=[5, 6, 7], labels=[5, 6, 7]) for e in llama.examples]
    assert_close(llama.train(noise=ALL_OF_THEM, **how)[1], llama.train(**how)[1], 1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.integers(0, 5), st.floats(1e-6, 1e6))
def test_one_example_moves_the_sum_by_the_clip_norm_at_most(seed, clip, left_out, size):
    generator = torch.Generator().manual_seed(seed)
    gradients = [size * torch.randn(6, *shape, generator=generator) for shape in [(3, 4), (7,)]]
    rest = [index for index in range(6) if index != left_out]
    whole = clipped_sums([g.clone() for g in gradients], clip)
    without = clipped_sums([g[rest].clone() for g in gradients], clip)
    gap = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(whole, without, strict=True)))
    own = math.sqrt(sum(float(g[left_out].square().sum()) for g in gradients))
    assert gap == pytest.approx(min(clip, own), rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_whose_gradient_is_not_finite_adds_nothing(value):
    gradients = [torch.ones(2, 3), torch.ones(2, 4)]
    gradients[0][1, 2] = value
    expected = clipped_sums([torch.ones(1, 3), torch.ones(1, 4)], 0.5)
    assert all(map(torch.equal, clipped_sums(gradients, 0.5), expected))


def test_gradients_whose_squares_are_no_float32_numbers_are_clipped_too() -> None:
    small = [torch.full((2, 1000), 1e-23), torch.full((2, 10), -1e-23)]
    sums = clipped_sums(small, 1e-28)
    norm = math.hypot(*(float(total.double().norm()) for total in sums))
    assert norm == pytest.approx(2e-28, rel=1e-5, abs=0)  # two clipped examples, which are equal


def test_the_noise_is_the_clip_norm_times_the_multiplier_over_the_expected_examples(llama):
    """Of every number that learns, in each step; not of the batch that came."""
    noise = NoisyGradients(clip=1e-3, multiplier=50.0, rate=0.25)
    how = {"noise": noise, "learning_rate": 1.0, "max_grad_norm": 0.0, "local_steps": 1}
    changes = []
    for _ in range(20):
        trained = llama.train(**how, schedule="constant")[1].tensors()
        changes.append(
            torch.cat([(trained[n] - t).flatten() for n, t in llama.start.tensors().items()])
        )
    each = torch.stack(changes)
    expected = 1e-3 * 50.0 / (0.25 * len(llama.examples))
    assert float(each.std()) == pytest.approx(expected, rel=0.02)
    assert float(each.std(dim=0).min()) > 0.2 * expected  # no number is left out
    assert abs(float(torch.corrcoef(each[:2])[0, 1])) < 0.1  # nor is noise used twice


def test_examples_are_drawn_independently_with_one_probability(llama):
    steps = steps_of(llama, replace(ALL_OF_THEM, rate=0.3), batch_size=2)
    count = len(llama.examples)
    index = {id(example): i for i, example in enumerate(llama.examples)}
    drawn = np.zeros((1500, count))
    for row in drawn:
        batches = steps.next(llama.runtime)
        assert all(len(passes[0].examples) <= 2 for passes in batches)
        row[[index[id(e)] for passes in batches for e in passes[0].examples]] = 1
    assert np.all(np.abs(drawn.mean(0) - 0.3) < 0.06)
    assert drawn.sum(1).var() == pytest.approx(count * 0.3 * 0.7, rel=0.2)  # of a fixed size: 0


def test_a_truncation_does_not_depend_on_who_else_is_drawn(llama, monkeypatch):
    """The server knows the seed: other rows' ranks would tell it of a row that is missing."""
    objective = nested("example", 8, LEVELS)
    ranks = []
    for drawn in ([0, 3, 7, 9], [3, 9], [3, 4, 5, 6, 9]):
        monkeypatch.setattr(private, "poisson_sample", lambda all_, rate, drawn=drawn: drawn)
        steps = steps_of(llama, objective=objective, batch_size=2)
        found = []
        for _ in range(3):
            parts = [p for passes in steps.next(llama.runtime) for p in passes]
            each = dict(zip(drawn, torch.cat([p.ranks for p in parts]).tolist(), strict=True))
            found.append((each[3], each[9]))
        ranks.append(found)
    assert ranks[0] == ranks[1] == ranks[2]
    assert len({*ranks[0]}) > 1


def test_nothing_comes_from_the_seed(tiny_bert):
    """Noise, batches and dropout: the server knows the seed."""
    bench = Bench(tiny_bert)
    one, other = (bench.train(noise=ALL_OF_THEM)[1] for _ in range(2))  # dropout alone
    assert distance(one, other) > 1e-6
    without_dropout(bench.model)
    one, other = (bench.train(noise=replace(ALL_OF_THEM, rate=0.5))[1] for _ in range(2))
    assert distance(one, other) > 1e-6


def audited(bench, multiplier, canaries=600):
    """The audit of one step: a canary's gradient has a coordinate of its own."""
    took_part = np.random.default_rng(0).random(canaries) < 0.5
    bench.examples = [Example([5], [5], 0, str(i)) for i in np.flatnonzero(took_part)]
    steps = steps_of(bench, NoisyGradients(1.0, multiplier, 1.0), batch_size=64)

    def gradients(passes):
        rows = torch.tensor([int(example.reference) for example in passes[0].examples])
        return [5.0 * torch.nn.functional.one_hot(rows, canaries).float()]  # clipped to 1

    learns = nn.Parameter(torch.zeros(canaries))
    steps.gradients.learning, steps.gradients.of = [learns], gradients
    steps.backward()
    return audited_epsilon(learns.grad.numpy(), took_part, canaries // 2)


def test_an_audit_finds_no_more_than_is_claimed_and_more_if_the_noise_is_broken(llama):
    noise = Budget(3.0, 1e-5, releases=1, rate=1.0).noise_multiplier()
    assert 0.0 < audited(llama, noise) < 3.0
    assert audited(llama, noise / 5) > 3.0


class TestModels:
    def check(self, bench):
        install(bench.model, bench.start)
        ExampleGradients(bench.runtime, settings_of()).check(bench.examples[:3])

    def test_those_whose_examples_are_independent_pass(self, still):
        self.check(still)

    def test_a_layer_that_looks_at_other_rows_is_found(self, llama):
        module = next(m for m in llama.model.modules() if type(m).__name__ == "LlamaRMSNorm")
        module.register_forward_hook(lambda m, i, out: out + out.mean(0, keepdim=True))
        with pytest.raises(ConfigError, match="depends on the others of its batch"):
            self.check(llama)

    def test_batch_normalisation_is_refused(self, llama):
        llama.model.add_module("norm", nn.BatchNorm1d(4))
        with pytest.raises(ConfigError, match="batch normalisation mixes examples"):
            self.check(llama)

    def test_experts_of_one_parameter_are_refused(self, tiny_moe):
        bench = Bench(tiny_moe, target_parameters=("experts.down_proj",))
        with pytest.raises(ConfigError, match=r"with lora\.target_parameters: all examples"):
            self.check(bench)

    def test_modules_that_are_not_linear_are_refused(self, tiny_llama):
        bench = Bench(tiny_llama, modules_to_save=("norm",))
        with pytest.raises(ConfigError, match="with a LlamaRMSNorm that is trained in full"):
            self.check(bench)

    def test_layers_that_do_not_see_the_rows_are_refused(self, llama):
        llama.runtime.truncation.by_example = False  # what a trial has found, as with DeBERTa
        with pytest.raises(ConfigError, match="its layers do not see the rows of the batch"):
            self.check(llama)
