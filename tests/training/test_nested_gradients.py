"""The nested objectives train what they say: gradients against models that are cut by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gradients import (
    assert_same_gradients,
    combined,
    cut,
    labelled_batch,
    masked,
)

from prelort.adapters import ScaleRule
from prelort.methods.objective import nested
from prelort.models.lora import install
from prelort.training.truncation import Truncation
from tiny_models import adapted, trained_adapter

RULES = [ScaleRule("constant", 0.7), ScaleRule("rslora", 1.3)]
rules = pytest.mark.parametrize("rule", RULES, ids=str)
ends = {"llama": "q_proj", "gpt2": "c_attn", "bert": "query"}
WEIGHTS = {2: 1.0, 4: 2.0, 8: 5.0}
LEVELS = tuple(WEIGHTS)


def prepared(folder, rule, **settings):
    model = adapted(folder, 8, **settings)
    adapter = trained_adapter(model, rule)
    install(model, adapter)
    return model, adapter, Truncation(model, rule)


def expected(model, adapter, batch):
    """The weighted mean of the gradients of the models truncated by hand."""
    total, rows = sum(WEIGHTS.values()), len(batch["input_ids"])
    return combined(
        [(w / total, cut(model, adapter, batch, [level] * rows)) for level, w in WEIGHTS.items()]
    )


@rules
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "rank_pattern"])
def test_the_gradient_of_mean_is_the_mean_of_the_gradients_of_truncated_models(
    folder, rule, pattern
):
    settings = {"rank_pattern": {ends[folder.name]: 3}} if pattern else {}
    model, adapter, truncation = prepared(folder, rule, **settings)
    batch, objective = labelled_batch(), nested("mean", 8, LEVELS, level_weights=WEIGHTS)
    passes = objective.passes(3, torch.Generator())
    found = combined([(p.weight, masked(model, truncation, batch, p.ranks)) for p in passes])
    assert_same_gradients(found, expected(model, adapter, batch))


@rules
def test_a_row_trains_its_own_truncation_only(folder, rule):
    model, adapter, truncation = prepared(folder, rule)
    batch = labelled_batch()
    found = masked(model, truncation, batch, torch.tensor([2, 8, 4]))
    assert_same_gradients(found, cut(model, adapter, batch, [2, 8, 4]))


@rules
@pytest.mark.parametrize("kind", ["example", "step", "full+one"])
def test_over_all_its_draws_a_sampled_objective_expects_the_gradient_of_mean(
    tiny_llama, rule, kind
):
    """Exactly: every draw is enumerated, with its probability."""
    model, adapter, truncation = prepared(tiny_llama, rule)
    batch = labelled_batch(rows=2)
    objective = nested(kind, 8, LEVELS, level_weights=WEIGHTS)
    weights = dict(zip(objective.levels, objective.weights, strict=True))
    parts = []
    if kind == "example":
        for pair in itertools.product(LEVELS, repeat=2):
            probability = math.prod(weights[level] for level in pair)
            parts.append((probability, masked(model, truncation, batch, torch.tensor(pair))))
    elif kind == "step":
        for level in LEVELS:
            parts.append((weights[level], masked(model, truncation, batch, level)))
    else:
        parts.append((weights[8], masked(model, truncation, batch, 8)))
        below = weights[2] + weights[4]
        for level in (2, 4):
            drawn = weights[level] / below  # with this probability, at the weight `below`
            parts.append((drawn * below, masked(model, truncation, batch, level)))
    assert_same_gradients(combined(parts), expected(model, adapter, batch))
