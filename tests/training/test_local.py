"""One client's training: deterministic, and what plain PEFT and the formulas say."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from bench import RULE, Bench, assert_close, distance, settings_of, without_dropout
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from prelort.adapters import peft_folder
from prelort.errors import PrelortError
from prelort.methods.objective import nested, plain
from prelort.models.lora import ADAPTER, extract, install
from prelort.training.steps import Assignment, LocalSteps
from random_adapters import same_bits
from tiny_models import base_model, kind_of, ragged_examples

LEVELS = (2, 4, 8)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return Bench(tiny_llama)


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return Bench(tiny_bert)


@pytest.fixture
def still(folder):
    """Each model in turn, without dropout."""
    bench = Bench(folder)
    without_dropout(bench.model)
    return bench


# Determinism


@pytest.mark.parametrize("change", [{"seed": 1}, {"client": "other"}, {"round_index": 1}])
def test_truncations_depend_on_seed_client_and_round(llama, change):
    settings = {"objective": nested("example", 8, LEVELS), "shuffle": False, "local_steps": 6}
    settings |= {"schedule": "constant", "rounds": 2}
    first, second = llama.train(**settings)[1], llama.train(**settings, **change)[1]
    assert distance(first, second) > 1e-4


# Identity with plain PEFT


def plain_peft(bench, tmp_path, steps, batch_size, make_optimizer, *, clip=None):
    """A loop that anybody would write, on the exported adapter: the losses, and the adapter."""
    peft_folder.save(bench.start, tmp_path, bench.model.peft_config[ADAPTER])
    base = base_model(bench.folder)
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    model.train()
    without_dropout(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, position = make_optimizer(parameters), [], 0
    for _ in range(steps):
        chosen = bench.examples[position : position + batch_size]
        position = (position + batch_size) % len(bench.examples)
        longest = max(len(e.input_ids) for e in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(chosen):
            ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
            mask[row, : len(example.input_ids)] = 1
        labels = (
            torch.tensor([e.labels for e in chosen])
            if kind_of(bench.folder) == "classification"
            else ids.masked_fill(mask == 0, -100)
        )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, extract(model, RULE)


SETTINGS = {
    "sgd": (
        {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0},
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        None,
    ),
    "sgd, momentum, decay, clipped": (
        {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
        1.0,
    ),
    "adamw, decay, clipped": (
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5},
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
        0.5,
    ),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_one_round_is_what_plain_peft_training_does(still, settings, fused, tmp_path):
    changes, make_optimizer, clip = SETTINGS[settings]
    steps, batch_size = 5, 5  # the last batch of an epoch is smaller
    bench = still
    bench.examples = bench.examples[:10]
    losses, expected = plain_peft(bench, tmp_path, steps, batch_size, make_optimizer, clip=clip)
    result, found = bench.train(
        local_steps=steps,
        batch_size=batch_size,
        shuffle=False,
        schedule="constant",
        fused=fused,
        **changes,
    )
    assert result.loss == pytest.approx(sum(losses) / steps, rel=1e-6)
    assert result.steps == steps
    # Adam divides by the gradient's own size, so that the rounding of a tiny one counts in full.
    tolerance = 1e-6 if "sgd" in settings else 1e-3 if fused else 1e-5
    assert_close(found, expected, tolerance)
    assert distance(found, bench.start) > 2e-3


# Objective


def batch_of(bench, size):
    return bench.runtime.task.collate(bench.examples[:size], 0)


@pytest.mark.parametrize("kind", ["plain", "mean", "example", "step", "full+one"])
def test_the_reported_loss_is_the_objective(llama, kind):
    """At a rate of nothing, over many batches: the weighted mean of the losses per token."""
    objective = nested(kind, 8, LEVELS, full_share=0.5)
    exact = kind in ("plain", "mean")
    result, _ = llama.train(
        objective=objective,
        local_steps=2 if exact else 120,
        batch_size=12,
        shuffle=False,
        learning_rate=1e-12,
    )
    install(llama.model, llama.start)
    batch, losses = batch_of(llama, 12), {}
    for level in objective.levels:
        with torch.no_grad(), llama.runtime.truncation.at(level):
            losses[level] = float(llama.runtime.task.losses(llama.model, batch).sum())
    expected = sum(w * losses[r] for r, w in zip(objective.levels, objective.weights, strict=True))
    expected /= llama.runtime.task.weight(batch)
    spread = (max(losses.values()) - min(losses.values())) / llama.runtime.task.weight(batch)
    assert result.loss == pytest.approx(expected, abs=1e-5 if exact else 0.2 * spread)
    assert exact or spread > 0.01


# Accumulation


@pytest.mark.parametrize("kind", ["plain", "mean"])
def test_two_batches_of_four_are_one_batch_of_eight(still, kind):
    bench = still
    settings = {
        "shuffle": False,
        "objective": nested(kind, 8, LEVELS),
        "examples": ragged_examples(bench.folder, 24),
    }
    one, found = bench.train(batch_size=8, **settings)
    two, expected = bench.train(batch_size=4, gradient_accumulation=2, **settings)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert_close(found, expected, 1e-6)
    _, other = bench.train(batch_size=4, **settings)
    assert distance(found, other) > 1e-4


def test_examples_of_like_length_share_a_batch_of_a_step(llama):
    settings = settings_of(batch_size=3, gradient_accumulation=3)
    work = Assignment("k", 0, 1, 0, plain(8))
    passes = LocalSteps(llama.examples[:8], settings, work).next(llama.runtime)
    lengths = [[len(example.input_ids) for example in part.examples] for (part,) in passes]
    assert [len(own) for own in lengths] == [3, 3, 2]
    every = sorted((len(e.input_ids) for e in llama.examples[:8]), reverse=True)
    assert len(set(every)) > 3
    assert [*chain(*lengths)] == every


# Schedules


@contextmanager
def recorded_rates():
    """The rates of every optimiser step, a list for each parameter group."""
    rates: list[list[float]] = []

    def record(optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield rates
    finally:
        handle.remove()


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rounds_with_sgd_are_one_uninterrupted_run(llama, schedule, warmup):
    settings = {"schedule": schedule, "warmup": warmup}
    with recorded_rates() as whole:
        _, expected = llama.train(local_steps=12, **settings)
    adapter = llama.start
    with recorded_rates() as parts:
        for index in range(4):
            _, adapter = llama.train(
                adapter=adapter, local_steps=3, round_index=index, rounds=4, **settings
            )
    assert parts == whole
    assert same_bits(adapter, expected)


def test_the_rates_are_those_of_the_schedules(llama):
    def rates(**settings):
        with recorded_rates() as found:
            for index in range(2):
                llama.train(local_steps=5, round_index=index, rounds=2, **settings)
        return [rate / 0.05 for rate, _ in found]

    steps = range(10)
    assert rates(schedule="constant") == pytest.approx([1.0] * 10)
    assert rates(schedule="linear") == pytest.approx([1 - t / 10 for t in steps])
    cosine = [0.5 * (1 + math.cos(math.pi * t / 10)) for t in steps]
    assert rates(schedule="cosine") == pytest.approx(cosine)
    warm = [0.0, 0.5, *[0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]]
    assert rates(schedule="cosine", warmup=0.2) == pytest.approx(warm)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_has_a_rate_of_its_own(bert, optimizer):
    settings = {"optimizer": optimizer, "schedule": "linear", "rounds": 2, "round_index": 1}
    with recorded_rates() as rates:
        _, adapter = bert.train(head_learning_rate=1e-9, **settings)
    assert rates[0] == pytest.approx([0.05 / 2, 0.05 / 2, 1e-9 / 2])
    _, common = bert.train(**settings)
    for name, head in adapter.modules_to_save.items():
        assert float((head - bert.start.modules_to_save[name]).abs().max()) < 1e-7
        assert (
            float((common.modules_to_save[name] - bert.start.modules_to_save[name]).abs().max())
            > 1e-4
        )
    for name, factors in adapter.layers.items():
        assert not torch.equal(factors.B, bert.start.layers[name].B)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_b_learns_at_the_rate_of_pefts_lora_plus(llama, optimizer):
    """Three steps on the same batch, with decay."""
    examples, settings = llama.examples[:4], {"schedule": "constant", "max_grad_norm": 0.0}
    settings |= {"learning_rate": 0.01, "b_rate_ratio": 4.0, "weight_decay": 0.1}
    _, found = llama.train(
        examples=examples, optimizer=optimizer.__name__.lower(), shuffle=False, **settings
    )
    install(llama.model, llama.start)
    theirs = create_loraplus_optimizer(
        llama.model, optimizer, lr=0.01, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    batch = llama.runtime.task.collate(examples, 0)
    llama.model.train()
    for _ in range(3):
        losses = llama.runtime.task.losses(llama.model, batch)
        (losses.sum() / llama.runtime.task.weight(batch)).backward()
        theirs.step()
        theirs.zero_grad()
    expected = extract(llama.model, RULE)
    assert distance(found, llama.start) > 1e-3
    assert_close(found, expected, 1e-4)


# Ways to compute


@pytest.mark.parametrize("kind", ["mean", "full+one"])
def test_all_truncations_of_a_batch_in_one_pass_are_those_one_by_one(still, kind):
    settings = {"objective": nested(kind, 8, LEVELS), "gradient_accumulation": 2}
    one, expected = still.train(**settings)
    merged, found = still.train(batch_truncations=True, **settings)
    assert merged.loss == pytest.approx(one.loss, rel=1e-5)
    assert_close(found, expected, 2e-5)


# What goes wrong


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_that_is_not_finite_is_an_error_with_its_step(llama, optimizer):
    reason = r"loss became (nan|inf) at local step 2 of 5: lower training.learning_rate$"
    with pytest.raises(PrelortError, match=reason):
        llama.train(optimizer=optimizer, learning_rate=1e30, local_steps=5, max_grad_norm=0)


def test_a_client_that_cannot_go_on_says_why(llama):
    with pytest.raises(PrelortError, match=r"timed out after 0 s at local step 1 of 3"):
        llama.train(timeout=0.0)
    with pytest.raises(PrelortError, match=r"was cancelled at local step 1 of 3"):
        llama.train(stopped=lambda: True)
    with pytest.raises(PrelortError, match="client 'k' has no training examples"):
        llama.train(examples=[])
