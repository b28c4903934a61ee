from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.config import RanksConfig
from prelort.data.ranks import assign
from prelort.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def assigned(mix: str, clients: int, how: str = "in-order", seed: int = 0) -> list[int]:
    return assign(RanksConfig(mix=mix, assign=how), [10] * clients, seed)  # type: ignore[arg-type]


@given(weights=WEIGHTS, clients=st.integers(1, 60))
def test_a_mix_keeps_its_shares_and_every_rank(weights: list[int], clients: int) -> None:
    levels = [2**k for k in range(len(weights))]
    entries = zip(levels, weights, strict=True)
    mix = ", ".join(f"{rank}*{weight}/{sum(weights)}" for rank, weight in entries)
    counts = Counter(assigned(mix, clients))
    assert counts.total() == clients
    if clients >= len(levels):
        assert set(counts) == set(levels)
    if all(clients * weight >= sum(weights) for weight in weights):  # each gets one anyway
        for rank, weight in zip(levels, weights, strict=True):
            assert abs(counts[rank] - Fraction(clients * weight, sum(weights))) < 1


@given(seed=st.integers(0, 2**64))
def test_random_permutes_by_the_seed(seed: int) -> None:
    mix = "2*0.5, 8*0.25, 16*0.25"
    ranks = assigned(mix, 12, "random", seed)
    assert sorted(ranks) == [2] * 6 + [8] * 3 + [16] * 3
    assert assigned(mix, 12, "random", seed) == ranks


@pytest.mark.parametrize(
    "mix, ranks",
    [
        ("16, 4,8 ,4", [16, 4, 8, 4]),
        ("8*0.25, 2*0.75", [8, 2, 2, 2]),
        ("2*0.98, 4*0.01, 8*0.01", [2, 2, 4, 8]),  # a small share still has a client
        ("4*0.3333333, 8*0.6666667", [4, 8, 8, 8]),  # rounded shares
        ("4*0.5, 4*0.5", [4, 4, 4, 4]),
        ("2*0.375, 4*0.375, 8*0.25", [2, 2, 4, 8]),  # equal remainders: the first listed
    ],
)
def test_in_order_keeps_the_order_of_the_mix(mix: str, ranks: list[int]) -> None:
    assert assigned(mix, 4) == ranks


def test_by_size_gives_the_highest_rank_to_the_largest() -> None:
    config = RanksConfig(mix="2, 4, 8, 16", assign="by-size")
    assert assign(config, [5, 100, 5, 50], 0) == [4, 16, 2, 8]


@pytest.mark.parametrize(
    "mix, message",
    [
        ("4, 0, 8", "'0' is not a rank"),
        ("4, -2, 8", "'-2' is not a rank"),
        ("4, 2.5, 8", "'2.5' is not a rank"),
        ("4, , 8", "'' is not a rank"),
        ("", "'' is not a rank"),
        ("²*1", "'²' is not a rank"),
        ("4, 8", "2 ranks for 3 clients"),
        ("4", r"1 ranks for 3 clients \('4\*1' gives every client rank 4\)"),
        ("4, 8*0.5", "a list of ranks .* or a mix .*, not both"),
        ("4*0.5, 8*0.50001", r"the shares sum to 1\.00001"),
        ("4*0, 8*1", "'0' is not a share"),
        ("4*2, 8*0.5", "'2' is not a share"),
        ("4*half, 8*0.5", "'half' is not a share"),
        ("4*1/0, 8*0.5", "'1/0' is not a share"),
    ],
)
def test_a_wrong_mix_is_one_sentence(mix: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        assigned(mix, 3)
    assert repr(mix) in str(refusal.value)
