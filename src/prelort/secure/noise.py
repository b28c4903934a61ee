"""Differential privacy in the ring: each client clips, and adds its share of the sum's noise.

A share is a Gaussian number rounded to an integer of the ring. The sum of such shares over any
clients is a Gaussian number of their variances' sum, redistributed to the integers around it: with
u the density of a sum of m uniform numbers of [-1/2, 1/2], the integer k comes from y with
probability u(k - y). These add up to 1, so this is post-processing, and the sum is as private as
the Gaussian mechanism. The law of the rounded sum differs from that by the aliasing of densities
that are sampled at integers: for shares of at least s steps by less than exp(-pi^2 s^2), the same
term as for sums of discrete Gaussians (Kairouz, Liu & Steinke, arXiv 2102.06387, theorem 5).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from prelort.errors import PrelortError
from prelort.secure import ring
from prelort.secure.messages import Noise
from prelort.secure.ring import Values, Words

STEPS = 2.0**20
"""The least standard deviation of a share, in steps of the ring."""
TAIL = 10.0
"""No sum of shares is so many standard deviations from zero."""


def fraction_bits(noise: Noise, clients: int) -> int:
    """The f at which the share of each of so many clients has `STEPS`.

    Raises `ConfigError` where a sum would not fit the ring.
    """
    bits = math.ceil(math.log2(STEPS * math.sqrt(clients) / noise.deviation))
    room = ring.fraction_bits(1.0, largest_sum(noise, clients))
    return min(room, max(bits, ring.MIN_FRACTION_BITS))


def largest_sum(noise: Noise, clients: int) -> float:
    """A number that no sum over so many clients exceeds, whatever share of the noise each adds."""
    return clients * noise.clip + TAIL * noise.deviation * math.sqrt(clients)


def clipping(noise: Noise, blocks: Collection[Values], weight: float, bits: int) -> float:
    """The factor that shortens a client's weighted change to the clip norm, rounding included.

    Args:
        noise: of the round.
        blocks: the change, each float64 [n].
        weight: of the client.
        bits: fraction bits of the ring. Rounding n values lengthens them by sqrt(n) / 2 steps.

    Raises `PrelortError` where the clip norm is below that.
    """
    rounding = math.ldexp(math.sqrt(sum(block.size for block in blocks)) / 2, -bits)
    if noise.clip <= rounding:
        raise PrelortError(f"privacy.clip = {noise.clip:g} is lost in rounding: raise it")
    norm = weight * math.sqrt(sum(float(np.square(block).sum()) for block in blocks))
    return min(1.0, (noise.clip - rounding) / norm) if norm > 0 else 1.0


def fewest(senders: Iterable[Iterable[int]], lost: int, min_holders: int) -> dict[int, int]:
    """Block -> the fewest clients over whom its sum may be opened.

    Args:
        senders: the blocks of each client that is to send a vector.
        lost: how many of them may drop out.
        min_holders: fewer than these open no sum.
    """
    counts = Counter(block for blocks in senders for block in blocks)
    return {block: max(count - lost, min_holders) for block, count in counts.items()}


def gaussian(deviation: float, count: int) -> Words:
    """Rounded Gaussian numbers in the ring, from the system's generator.

    By Box and Muller's method with 64 random bits for each number: tails reach 9.5 deviations.
    """
    pairs = (count + 1) // 2
    bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64).reshape(2, pairs)
    uniform = np.ldexp(bits.astype(np.float64) + 0.5, -64)
    radius = deviation * np.sqrt(-2.0 * np.log(uniform[0]))
    angle = 2.0 * math.pi * uniform[1]
    both = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
    words: Words = np.rint(both).astype(np.int64).view(np.uint64)
    return words
