"""Random adapters and their dense products, for tests that compare with brute force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule

DIMENSIONS = {"wide": (7, 4), "tall": (3, 6)}
"""Layer -> (d_in, d_out)."""

scale_rules = st.builds(
    ScaleRule, st.sampled_from(["constant", "rslora"]), st.sampled_from([0.1, 0.7, 2.0, 16.0])
)
seeds = st.integers(0, 2**31)
ranks = st.integers(1, 9)


def random_adapter(
    rank: int | Sequence[int],
    seed: int = 0,
    *,
    scale: ScaleRule | None = None,
    dtype: torch.dtype = torch.float32,
    dimensions: Mapping[str, tuple[int, int]] = DIMENSIONS,
    modules_to_save: bool = True,
) -> LoraAdapter:
    """An adapter of normal numbers: one rank for all layers, or one for each."""
    generator = torch.Generator().manual_seed(seed)
    each = [rank] * len(dimensions) if isinstance(rank, int) else list(rank)
    layers = {}
    for (name, (d_in, d_out)), layer_rank in zip(dimensions.items(), each, strict=True):
        a = torch.randn(layer_rank, d_in, generator=generator).to(dtype)
        b = torch.randn(d_out, layer_rank, generator=generator).to(dtype)
        layers[name] = Factors(a, b)
    head = (
        {"score.weight": torch.randn(2, 3, generator=generator).to(dtype)}
        if modules_to_save
        else {}
    )
    return LoraAdapter(layers, scale or ScaleRule(), head)


def dense(adapter: LoraAdapter) -> dict[str, Tensor]:
    """The matrix ``s(r) B A`` of every layer, in float64."""
    return {
        name: adapter.scale(f.rank) * f.B.double() @ f.A.double()
        for name, f in adapter.layers.items()
    }


def dense_norm(products: Mapping[str, Tensor]) -> float:
    """The Frobenius norm over all layers."""
    return float(sum(p.square().sum() for p in products.values()).sqrt())


def same_bits(x: LoraAdapter, y: LoraAdapter) -> bool:
    """Whether two adapters have the same tensors, bit for bit and in the same types."""
    a, b = x.tensors(), y.tensors()
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape)
        and torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n in a
    )
