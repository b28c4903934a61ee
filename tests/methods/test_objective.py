from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.config import MethodConfig
from prelort.errors import ConfigError
from prelort.methods import Client, build
from prelort.methods.objective import Objective, Pass, configured, nested, plain
from rounds import start

quick = settings(deadline=None, max_examples=40)
LEVELS = (2, 4, 8, 16)
SAMPLED = ["example", "step", "full+one"]
NESTED = ["mean", *SAMPLED]


def passes(objective, batch=6, seed=0):
    return objective.passes(batch, torch.Generator().manual_seed(seed))


# Weights


@quick
@given(kind=st.sampled_from(NESTED), rank=st.integers(1, 20), share=st.none() | st.floats(0.0, 1.0))
def test_the_clients_rank_is_always_the_last_level_and_weights_sum_to_one(kind, rank, share):
    objective = nested(kind, rank, LEVELS, full_share=share)
    assert objective.levels == (*(level for level in LEVELS if level < rank), rank)
    assert sum(objective.weights) == pytest.approx(1.0)
    if share is not None and len(objective.levels) > 1:
        assert objective.weights[-1] == pytest.approx(share)
        assert len(set(objective.weights[:-1])) == 1


def test_the_sampled_kinds_give_the_full_rank_half_of_the_weight_by_default():
    for kind in SAMPLED:
        assert configured(MethodConfig(objective=kind), 8, LEVELS).weights == (0.25, 0.25, 0.5)
    even = configured(MethodConfig(objective="mean"), 8, LEVELS).weights
    assert even == pytest.approx((1 / 3,) * 3)


def test_the_truncations_can_be_others_than_the_ranks_of_the_clients():
    config = MethodConfig(objective="mean", truncations=(16, 4), level_weights={"4": 3, "8": 1})
    with pytest.raises(ConfigError, match=r"'8' is not a rank level: the levels are 16, 4"):
        configured(config, 8, [8])
    config = MethodConfig(objective="mean", truncations=(16, 4))
    assert configured(config, 8, [8]).levels == (4, 8)  # its own rank is always one
    assert configured(config, 2, [2]).levels == (2,)
    assert configured(config, 16, [2, 16]).levels == (4, 16)


@pytest.mark.parametrize("key", ["3", "32", "two", "-2", "2.0", "²", ""])
def test_a_weight_for_what_is_no_level_is_an_error(key):
    config = MethodConfig(objective="mean", level_weights={"2": 1.0, key: 1.0})
    with pytest.raises(ConfigError, match=rf"'{key}' is not a rank level: .* 2, 4, 8, 16"):
        configured(config, 8, LEVELS)


def test_weights_that_leave_nothing_to_train_are_an_error():
    config = MethodConfig(objective="mean", level_weights={"8": 1.0, "2": 0.0})
    assert configured(config, 8, LEVELS).weights == (0.0, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"nothing to train for a client of rank 4.*\[2, 4\]"):
        configured(config, 4, LEVELS)


# Passes


def test_with_one_truncation_there_is_one_pass_with_nothing_cut():
    assert nested("plain", 8, LEVELS) == plain(8)
    full = nested("full+one", 8, LEVELS, full_share=1.0)
    for objective in (plain(8), full, *(nested(kind, 2, LEVELS) for kind in NESTED)):
        assert passes(objective) == [Pass(None)]
    (one,) = passes(nested("full+one", 8, LEVELS, full_share=0.0))
    assert one.ranks in (2, 4)


def drawn(objective: Objective, steps: int, batch: int = 8, seed: int = 0) -> Counter[int]:
    """How much weight each level received over many steps, in examples."""
    generator = torch.Generator().manual_seed(seed)
    counts: Counter[int] = Counter()
    for _ in range(steps):
        for one in objective.passes(batch, generator):
            ranks = one.ranks if isinstance(one.ranks, torch.Tensor) else [one.ranks] * batch
            for rank in map(int, ranks):
                counts[rank] += one.weight
    return counts


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("weights", [{2: 1, 4: 2, 8: 1, 16: 4}, {2: 3, 16: 1}])
def test_on_average_every_level_gets_its_weight(kind, weights):
    """Within four standard errors of the number of independent draws."""
    objective, steps, batch = nested(kind, 16, LEVELS, level_weights=weights), 2000, 8
    counts = drawn(objective, steps, batch, seed=3)
    independent = steps * (batch if kind == "example" else 1)
    for level, weight in zip(objective.levels, objective.weights, strict=True):
        share = counts[level] / (steps * batch)
        error = 4 * (weight * (1 - weight) / independent) ** 0.5
        assert abs(share - weight) <= error + 1e-12, (kind, level)


@pytest.mark.parametrize(
    "kind, rank, passes",
    [("plain", 16, 1), ("example", 16, 1), ("step", 16, 1), ("full+one", 16, 2), ("mean", 16, 4),
     ("mean", 4, 2), ("full+one", 2, 1), ("mean", 2, 1)],
)  # fmt: skip
def test_the_passes_of_a_batch_are_known_beforehand(kind, rank, passes):
    objective = nested(kind, rank, LEVELS)
    assert objective.passes_per_batch == passes
    generator = torch.Generator().manual_seed(9)
    for batch in (1, 3, 8):
        assert len(objective.passes(batch, generator)) == passes


# What each method makes of the configuration


def test_prelort_trains_per_example_by_default_and_the_others_plainly():
    client = Client("k", 8, 5)
    state = start(levels=LEVELS)
    for name, default in (("prelort", "example"), ("zero-padding", "plain"), ("fedit", "plain")):
        objective = build(MethodConfig(name=name), 0).objective(state, client)
        assert objective.kind == default
        if name != "fedit":
            config = MethodConfig(name=name, objective="mean")
            assert build(config, 0).objective(state, client) == nested("mean", 8, LEVELS)
