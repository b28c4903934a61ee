"""The value that moves between server and clients: a LoRA adapter and its shape.

``W = W0 + s(r) * B @ A`` for each adapted layer, with A [r, d_in] and B [d_out, r] (Hu et al.,
arXiv 2106.09685). Rank dimension j of a layer is row j of A with column j of B; the first r rank
dimensions are again an adapter, at scale s(r).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from prelort.adapters.scale import ScaleRule
from prelort.errors import AdapterError

Trained = Literal["AB", "A", "B"]
"""The factors that learn."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The two factors of one layer: A [r, d_in] and B [d_out, r]."""

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"factors do not fit: A is {list(self.A.shape)}, B is {list(self.B.shape)}; "
                "they must be [rank, d_in] and [d_out, rank]"
            )

    @property
    def rank(self) -> int:
        """The number of rank dimensions."""
        return self.A.shape[0]

    def prefix(self, rank: int) -> Factors:
        """The first ``rank`` dimensions, or all where there are fewer, as views."""
        return Factors(self.A[:rank], self.B[:, :rank])

    def take(self, dimensions: Tensor) -> Factors:
        """The rank dimensions of these indices (int64 [count]), in their order, as copies."""
        return Factors(self.A[dimensions], self.B[:, dimensions])


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """Factors by layer name, one scale rule, and tensors trained in full (a classifier head).

    Layers may have different ranks; `rank` is the largest. The modules to save have no rank: every
    client trains all of them.
    """

    layers: Mapping[str, Factors]
    scale: ScaleRule
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max((factors.rank for factors in self.layers.values()), default=0)

    def prefix(self, rank: int) -> LoraAdapter:
        """The first ``rank`` dimensions of every layer, used at scale s(rank); views, no copies.

        Raises `AdapterError` unless 1 <= rank <= self.rank.
        """
        if not 1 <= rank <= self.rank:
            raise AdapterError(f"prefix rank {rank} is not allowed: use 1 to {self.rank}")
        layers = {name: factors.prefix(rank) for name, factors in self.layers.items()}
        return replace(self, layers=layers)

    def select(self, layers: Collection[str] | None) -> LoraAdapter:
        """The adapter with those of its layers that are named; None: all of them."""
        if layers is None:
            return self
        return replace(self, layers={n: f for n, f in self.layers.items() if n in layers})

    def bare(self) -> LoraAdapter:
        """The factors alone, without modules to save."""
        return replace(self, modules_to_save={})

    def scaled(self, factor: float) -> LoraAdapter:
        """The adapter whose product is ``factor`` times this one's: B is multiplied."""
        layers = {name: Factors(f.A, f.B * factor) for name, f in self.layers.items()}
        return replace(self, layers=layers)

    def to(self, dtype: torch.dtype) -> LoraAdapter:
        """The same adapter stored in another type."""
        layers = {n: Factors(f.A.to(dtype), f.B.to(dtype)) for n, f in self.layers.items()}
        modules = {name: tensor.to(dtype) for name, tensor in self.modules_to_save.items()}
        return LoraAdapter(layers, self.scale, modules)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under PEFT's names without its prefix, e.g. ``...q_proj.lora_A.weight``."""
        named: dict[str, Tensor] = {}
        for name, factors in self.layers.items():
            named[f"{name}.lora_A.weight"] = factors.A
            named[f"{name}.lora_B.weight"] = factors.B
        return named | dict(self.modules_to_save)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: ScaleRule) -> LoraAdapter:
        """The inverse of `tensors`.

        Raises `AdapterError` for a factor without its partner, factors that do not fit each other
        and other kinds of LoRA tensors.
        """
        a = _ending(tensors, ".lora_A.weight")
        b = _ending(tensors, ".lora_B.weight")
        for name in a.keys() ^ b.keys():
            missing = f"{name}.lora_B.weight" if name in a else f"{name}.lora_A.weight"
            raise AdapterError(f"tensor {missing!r} is missing")
        layers: dict[str, Factors] = {}
        for name in a:
            try:
                layers[name] = Factors(a[name], b[name])
            except AdapterError as error:
                raise AdapterError(f"layer {name!r}: {error}") from None
        modules_to_save = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
        for name in tensors:
            if ".lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise AdapterError(
                    f"tensor {name!r} is not supported: only plain LoRA factors "
                    "(lora_A.weight, lora_B.weight) and modules trained in full are"
                )
        return cls(layers, scale, modules_to_save)


@dataclass(frozen=True, slots=True)
class AdapterSchema:
    """The shapes of a federation's global adapter: what every message is checked against.

    ``layers``: name -> (d_in, d_out, largest rank); ``modules_to_save``: name -> shape.
    """

    layers: Mapping[str, tuple[int, int, int]]
    modules_to_save: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, adapter: LoraAdapter) -> AdapterSchema:
        """The schema whose largest ranks are those of ``adapter``."""
        layers = {n: (f.A.shape[1], f.B.shape[0], f.rank) for n, f in adapter.layers.items()}
        return cls(layers, {name: tuple(t.shape) for name, t in adapter.modules_to_save.items()})

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max((rank for _, _, rank in self.layers.values()), default=0)

    def layer_ranks(self, rank: int) -> dict[str, int]:
        """The rank of each layer in a client's adapter of this rank."""
        return {name: min(rank, largest) for name, (_, _, largest) in self.layers.items()}

    def check(self, adapter: LoraAdapter, rank: int) -> None:
        """Raise `AdapterError` for the first missing, surplus or mis-shaped tensor of ``adapter``.

        ``rank``: of the client whose adapter it is.
        """
        expected: dict[str, tuple[int, ...]] = dict(self.modules_to_save)
        for name, layer_rank in self.layer_ranks(rank).items():
            d_in, d_out, _ = self.layers[name]
            expected[f"{name}.lora_A.weight"] = (layer_rank, d_in)
            expected[f"{name}.lora_B.weight"] = (d_out, layer_rank)
        check_shapes(adapter.tensors(), expected)

    def digest(self) -> str:
        """A short hash of names and shapes, without the ranks (they differ between clients)."""
        layers = {name: shape[:2] for name, shape in self.layers.items()}
        text = json.dumps([sorted(layers.items()), sorted(self.modules_to_save.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `AdapterError` naming the first missing, surplus or mis-shaped tensor."""
    for name in sorted(expected.keys() - tensors.keys()):
        raise AdapterError(f"tensor {name!r} is missing")
    for name in sorted(tensors.keys() - expected.keys()):
        raise AdapterError(f"tensor {name!r} is surplus: the base model has no place for it")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise AdapterError(
                f"tensor {name!r} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            )


def _ending(tensors: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {n.removesuffix(suffix): t for n, t in tensors.items() if n.endswith(suffix)}
