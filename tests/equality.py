"""Equality of values that may hold NaN, which is equal to itself here."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any


def equal(one: Any, other: Any) -> bool:
    """Whether two events, histories or plain values are of the same types and contents."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
