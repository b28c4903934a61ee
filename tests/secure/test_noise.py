"""Noise that clients add: its law, what it protects, and that enough of it is in every sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parties import Parties
from scipy.stats import chisquare, kstest

from prelort.errors import ConfigError, PrelortError
from prelort.secure import noise, ring
from prelort.secure.messages import Noise

PHI = NormalDist().cdf
REACH = 80
"""The integers that a test looks at, to both sides."""


def rounded(deviation: float) -> np.ndarray:
    """The probabilities of a rounded Gaussian number."""
    edges = [PHI((k - 0.5) / deviation) for k in range(-REACH, REACH + 2)]
    return np.diff(edges)


def delta_of(law: np.ndarray, shift: int, epsilon: float) -> float:
    """The delta of adding an integer noise of this law, where one client moves the sum so far."""
    return float(np.maximum(law - math.exp(epsilon) * np.roll(law, shift), 0.0).sum())


def delta_of_gaussian(deviation: float, shift: int, epsilon: float) -> float:
    """Balle & Wang, arXiv 1805.06530, theorem 8."""
    z = deviation / shift
    return PHI(0.5 / z - epsilon * z) - math.exp(epsilon) * PHI(-0.5 / z - epsilon * z)


@pytest.mark.parametrize("shares", [1, 2, 5])
@pytest.mark.parametrize("shift, epsilon", [(1, 0.1), (3, 0.5), (8, 2.0)])
def test_a_sum_of_shares_is_as_private_as_the_gaussian_mechanism(
    shares: int, shift: int, epsilon: float
) -> None:
    """Already at two steps a share, and not at fewer shares."""
    law, promised = rounded(2.0), delta_of_gaussian(2.0 * math.sqrt(shares), shift, epsilon)
    total = law
    for _ in range(shares - 1):
        assert delta_of(total, shift, epsilon) > 1.01 * promised
        total = np.convolve(total, law, mode="same")
    assert 0.8 * promised < delta_of(total, shift, epsilon) <= promised + 1e-15


def test_shares_are_rounded_gaussian_numbers() -> None:
    few, count = noise.gaussian(2.0, 100_001).view(np.int64), 100_001
    found = np.bincount(np.clip(few, -7, 7) + 7, minlength=15)
    law = rounded(2.0)[REACH - 7 : REACH + 8]
    law[[0, -1]] += (1 - law.sum()) / 2
    assert few.size == count
    assert chisquare(found, law * count).pvalue > 1e-6
    many = noise.gaussian(noise.STEPS, 100_000).view(np.int64) / noise.STEPS
    assert kstest(many, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(many[:50_000], many[50_000:])[0, 1]) < 0.03


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(0.01, 100.0))
def test_a_change_has_at_most_the_clip_norm_once_it_is_rounded(
    seed: int, clip: float, weight: float
) -> None:
    generator, bits = np.random.default_rng(seed), math.ceil(math.log2(60 / clip))
    blocks = [generator.normal(size=n) * generator.choice([1e-3, 1.0]) for n in (30, 200)]
    terms = Noise(clip=clip, deviation=1.0)
    factor = noise.clipping(terms, blocks, weight, bits)
    words = np.concatenate([ring.quantise(block, weight * factor, bits) for block in blocks])
    assert np.linalg.norm(words.view(np.int64).astype(float)) <= math.ldexp(clip, bits)
    assert factor <= 1


def test_a_clip_norm_below_the_rounding_is_refused() -> None:
    with pytest.raises(PrelortError, match=r"privacy\.clip = 0\.001 is lost in rounding"):
        noise.clipping(Noise(clip=1e-3, deviation=1.0), [np.ones(10**4)], 1.0, 4)
    with pytest.raises(ConfigError, match="no room for values"):
        noise.fraction_bits(Noise(clip=1e18, deviation=1e18), 100)


RANKS = (2, 2, 2, 4, 4, 4, 4)
LENGTHS = (4000,) * 5
TERMS = Noise(clip=0.5, deviation=3.0)


@pytest.mark.parametrize("gone", [[], [7], [6, 7], [1, 7]], ids=str)
def test_every_sum_has_the_noise_that_was_promised_whoever_drops_out(gone: Sequence[int]) -> None:
    """Of seven clients five must stay, so of the four with rank 4 two, or ``min_holders``."""
    parties = Parties(RANKS, threshold=0.7, min_holders=2, lengths=LENGTHS, noise=TERMS)
    parties.bits = noise.fraction_bits(TERMS, len(RANKS))
    parties.values = {i: [np.zeros(4000)] * (rank + 1) for i, rank in enumerate(RANKS, start=1)}
    parties.keys().shares().masked(without=gone).revealed()
    opened = [ring.dequantise(words, parties.bits) for words in parties.server.open()]
    for block, values in enumerate(opened):
        holders = sum(block in parties.blocks[i] for i in parties.vectors)
        fewest = 5 if block <= 2 else 2
        expected = TERMS.deviation * math.sqrt(holders / fewest)
        assert float(np.std(values)) == pytest.approx(expected, rel=0.06)
        assert holders >= fewest


def test_a_client_that_would_stand_out_is_clipped() -> None:
    """Its change of norm 1e4 becomes one of the clip norm, in the direction that it had."""
    parties = Parties(RANKS, threshold=0.7, noise=TERMS.model_copy(update={"deviation": 1e-7}))
    assert parties.server.keys_request(1).noise is not None
    parties.bits = noise.fraction_bits(parties.server.keys_request(1).noise, len(RANKS))
    parties.weights = dict.fromkeys(parties.weights, 1.0)
    for i, values in parties.values.items():
        parties.values[i] = [np.zeros_like(block) for block in values]
    parties.values[1][1][:] = 50.0
    parties.keys().shares().masked().revealed()
    opened = [ring.dequantise(words, parties.bits) for words in parties.server.open()]
    np.testing.assert_allclose(opened[1], 0.5 / math.sqrt(5), rtol=1e-5)
    assert np.linalg.norm(np.concatenate(opened)) == pytest.approx(0.5, rel=1e-5)
