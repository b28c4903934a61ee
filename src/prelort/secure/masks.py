"""Masks from a stream cipher, added to the blocks that both sides of a pair hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from prelort.secure.ring import Words


def stream(key: bytes, count: int) -> Words:
    """``count`` elements of ChaCha20's key stream (RFC 8439); a key is used for one stream."""
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(encryptor.update(bytes(8 * count)), dtype="<u8")
    return words.astype(np.uint64, copy=False)


def positions(blocks: Iterable[int], lengths: Sequence[int]) -> dict[int, slice]:
    """Where each block is in a vector of these blocks."""
    found: dict[int, slice] = {}
    start = 0
    for block in blocks:
        found[block] = slice(start, start + lengths[block])
        start += lengths[block]
    return found


def shared(first: Iterable[int], second: Iterable[int]) -> list[int]:
    """The blocks that both hold, rising: those that their common mask covers."""
    return sorted({*first} & {*second})


def add_mask(
    vector: Words,
    places: Mapping[int, slice],
    key: bytes,
    covered: Sequence[int],
    *,
    negative: bool,
) -> None:
    """Add the key's stream to the ``covered`` blocks of a vector, in place, or subtract it.

    ``places``: of the vector's blocks.
    """
    own = [places[block] for block in covered]
    words = stream(key, sum(place.stop - place.start for place in own))
    start = 0
    for place in own:
        part = words[start : start + place.stop - place.start]
        start += len(part)
        if negative:
            vector[place] -= part
        else:
            vector[place] += part
