"""Noise and samples that nobody can predict: from the operating system's generator."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Normal = Callable[[torch.Size], Tensor]
"""Draws standard normal numbers of a shape, float64."""


def system_normal(shape: torch.Size) -> Tensor:
    """Standard normal numbers, float64, from `os.urandom`: 52 random bits each, inverted.

    A seeded generator would let whoever knows the seed subtract the noise.
    """
    bits = torch.frombuffer(bytearray(os.urandom(8 * math.prod(shape)) or b"\0"), dtype=torch.int64)
    bits = bits[: math.prod(shape)]
    # Half a step from 0 and from 1, which float64 has exactly at 52 bits: no number is infinite.
    uniform = ((bits >> 12) + 2**51).double().add(0.5).mul(2.0**-52)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal.reshape(shape)


def poisson_sample(clients: Sequence[T], rate: float) -> list[T]:
    """Each client with probability ``rate``, in their order; there may be none."""
    draw = random.SystemRandom().random
    return [client for client in clients if draw() < rate]
