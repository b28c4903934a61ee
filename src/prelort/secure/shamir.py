"""Shamir's secret sharing (Communications of the ACM 22, 1979) of 32 bytes.

A secret is the value at 0 of a random polynomial of degree ``threshold - 1`` over a prime field; a
share is its value at the holder's number. Any ``threshold`` shares determine the polynomial, fewer
are consistent with every secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from prelort.errors import PrelortError

PRIME = 2**256 + 297
"""The smallest prime above 2^256: every 32 bytes are an element of its field."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """A share for each holder, by their numbers (distinct, from 1).

    Raises `ValueError` for a secret of another length, or a threshold that no holders reach.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(holders) or min(holders) < 1:
        raise ValueError(f"cannot share {len(secret)} bytes: {threshold} of {len(holders)} holders")
    polynomial = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    shares: dict[int, bytes] = {}
    for holder in holders:
        value = 0
        for coefficient in polynomial:
            value = (value + coefficient) * holder % PRIME
        value = (value + int.from_bytes(secret)) % PRIME
        shares[holder] = value.to_bytes(SHARE_BYTES)
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret that these shares determine, by Lagrange's interpolation at 0.

    Raises `PrelortError` if it is no secret of 32 bytes: a share is wrong, or they are too few.
    """
    secret = 0
    for holder, share in shares.items():
        above, below = 1, 1
        for other in shares:
            if other != holder:
                above = above * other % PRIME
                below = below * (other - holder) % PRIME
        secret += int.from_bytes(share) * above * pow(below, -1, PRIME)
    try:
        return (secret % PRIME).to_bytes(SECRET_BYTES)
    except OverflowError:
        raise PrelortError("a share of a secret is wrong") from None
