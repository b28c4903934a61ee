"""The federation's one scale rule: a function of the rank of the prefix in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prelort.errors import AdapterError


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """The factor s(r) in ``W = W0 + s(r) * B @ A`` for a prefix of rank r.

    ``constant``: s(r) = value, so that a prefix is the same function with its tail removed.
    ``rslora``: s(r) = value / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
    Never a function of the client: factors of clients with different scales cannot be averaged.
    """

    kind: Literal["constant", "rslora"] = "constant"
    value: float = 2.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "rslora"):
            raise AdapterError(f"scale rule {self.kind!r} is unknown: use 'constant' or 'rslora'")
        if not (math.isfinite(self.value) and self.value > 0):
            raise AdapterError(f"scale {self.value!r} is not allowed: it must be above 0")

    def __call__(self, rank: int) -> float:
        """s(rank); 0 for the empty prefix."""
        if rank <= 0:
            return 0.0
        return self.value if self.kind == "constant" else self.value / math.sqrt(rank)

    def lora_alpha(self, rank: int) -> float:
        """PEFT's ``lora_alpha`` that gives s(rank) at this rank."""
        return self.value * rank if self.kind == "constant" else self.value

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"
