"""Which participants share masks and hold each other's shares."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

ALL = 100
"""Up to so many participants everyone is everyone's neighbour."""
DEGREE = 100
"""The number of neighbours with more participants; even."""


def neighbours(participants: Sequence[int]) -> dict[int, frozenset[int]]:
    """Each participant's neighbours: all others, or with many the nearest on a random circle.

    The circle with its nearest `DEGREE` neighbours is Bell et al.'s choice (2020, section 3): with
    random places, removing a share g of the participants disconnects the rest with probability at
    most ``n g^(DEGREE / 2)``.
    """
    if len(participants) <= ALL + 1:
        return {one: frozenset(participants) - {one} for one in participants}
    circle = list(participants)
    secrets.SystemRandom().shuffle(circle)
    count, reach = len(circle), DEGREE // 2
    return {
        one: frozenset(circle[(i + d) % count] for d in range(-reach, reach + 1) if d)
        for i, one in enumerate(circle)
    }


def is_complete(participants: int) -> bool:
    """Whether so many participants are all neighbours of each other."""
    return participants <= ALL + 1
