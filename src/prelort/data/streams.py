"""Independent random streams, one per purpose, all from the run's one seed."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """A generator for one purpose, e.g. ``generator(0, "partition")``.

    Streams of different purposes are independent, so that drawing more for one of them (another
    way to deal the rows) leaves the others (who has which rank) as they were.
    """
    keys = [zlib.crc32(word.encode()) for word in purpose]
    return np.random.default_rng(np.random.SeedSequence([seed, *keys]))
