"""Fixed-point numbers and shared secrets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.errors import ConfigError, PrelortError
from prelort.secure import blocks, ring, shamir

secrets_of_32_bytes = st.binary(min_size=32, max_size=32)


@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0.001, 1e7)), min_size=1, max_size=30))
def test_sums_in_the_ring_are_sums_up_to_half_a_step_each(
    clients: list[tuple[float, float]],
) -> None:
    total = sum(weight for _, weight in clients)
    bits = ring.fraction_bits(total, 50.0)
    words = [ring.quantise(np.array([value, -50.0]), weight, bits) for value, weight in clients]
    found, lowest = ring.dequantise(np.sum(words, axis=0, dtype=np.uint64), bits)
    rounding = 1e-15 * total * 50.0 * len(clients)  # float64's, in what is compared with
    bound = ring.error_bound(len(clients), bits) + rounding
    assert abs(found - sum(value * weight for value, weight in clients)) <= bound
    assert abs(lowest + 50.0 * total) <= bound


def test_values_that_the_ring_has_no_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="no room for values up to 1e"):
        ring.fraction_bits(1e9, 1e10)


@given(secrets_of_32_bytes, st.integers(1, 7), st.data())
def test_any_shares_up_to_the_threshold_restore_the_secret(
    secret: bytes, threshold: int, data: st.DataObject
) -> None:
    holders = data.draw(
        st.lists(st.integers(1, 10_000), min_size=threshold, max_size=9, unique=True)
    )
    shares = shamir.split(secret, holders, threshold)
    chosen = data.draw(st.permutations(holders))[:threshold]
    assert shamir.combine({holder: shares[holder] for holder in chosen}) == secret


@given(secrets_of_32_bytes, secrets_of_32_bytes)
def test_one_share_too_few_fits_every_secret(secret: bytes, other: bytes) -> None:
    """The share that the last holder would have to have exists for any other secret."""
    shares = shamir.split(secret, [3, 5, 9], 3)
    known = {3: shares[3], 5: shares[5]}
    assert value_at(0, known) != secret.rjust(33, b"\0")
    needed = value_at(9, {0: other.rjust(33, b"\0"), **known})
    assert shamir.combine({**known, 9: needed}) == other


def value_at(x: int, points: dict[int, bytes]) -> bytes:
    """The polynomial of lowest degree through these points, at x."""
    value = 0
    for i, y in points.items():
        term = int.from_bytes(y)
        for j in points.keys() - {i}:
            term = term * (x - j) * pow(i - j, -1, shamir.PRIME) % shamir.PRIME
        value += term
    return (value % shamir.PRIME).to_bytes(33)


def test_wrong_shares_and_impossible_thresholds_are_refused() -> None:
    with pytest.raises(PrelortError, match="a share of a secret is wrong"):
        shamir.combine({1: (shamir.PRIME - 1).to_bytes(33)})  # above all that 32 bytes can be
    for holders, threshold in (([1, 2], 3), ([0, 1], 2)):
        with pytest.raises(ValueError, match="cannot share"):
            shamir.split(bytes(32), holders, threshold)


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2)])
def test_blocks_are_the_adapter_in_another_order(ranks: Sequence[int]) -> None:
    """Also where a layer has fewer rank dimensions, so that the last blocks are shorter."""
    shapes = {
        **{f"q{i}.lora_A.weight": (rank, 3 + i) for i, rank in enumerate(ranks)},
        **{f"q{i}.lora_B.weight": (2, rank) for i, rank in enumerate(ranks)},
        "head.weight": (2, 3),
    }
    count = itertools.count(1.0)
    tensors = {
        name: np.array([next(count) for _ in range(int(np.prod(shape)))]).reshape(shape)
        for name, shape in shapes.items()
    }
    parts = blocks.split(tensors, 4)
    assert tuple(map(len, parts)) == blocks.lengths(shapes, 4)
    back = blocks.join(parts, shapes)
    assert all(np.array_equal(back[name], tensors[name]) for name in shapes)
    prefix = {
        n: t[:2] if "lora_A" in n else t[:, :2] if "lora_B" in n else t for n, t in tensors.items()
    }
    assert all(map(np.array_equal, blocks.split(prefix, 2), parts))
