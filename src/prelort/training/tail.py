"""HetLoRA's tail: the last rank dimensions, which a client may prune (arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from prelort.methods.objective import TailPenalty
from prelort.models.lora import factors_of

Pairs = Iterable[tuple[Tensor, Tensor]]
"""A [r, d_in] and B [d_out, r] of each layer."""


def pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """A and B of each layer of the installed adapter."""
    return [(factors.A, factors.B) for factors in factors_of(model).values()]


def tail_penalty(factors: Pairs, tail: TailPenalty, rank: int) -> Tensor:
    """``sum over layers of |B[:, q:]|_F |A[q:]|_F``, q = tail.cut(rank)."""
    cut = tail.cut(rank)
    norms = [
        torch.linalg.vector_norm(a[cut:]) * torch.linalg.vector_norm(b[:, cut:]) for a, b in factors
    ]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).sum()


def tail_norm(factors: Pairs, tail: TailPenalty, rank: int) -> float:
    """The value of `tail_penalty`, without gradients."""
    with torch.no_grad():
        return float(tail_penalty(factors, tail, rank))


def pruned_rank(factors: Pairs, tail: TailPenalty, rank: int, before: float) -> int:
    """The rank after self-pruning: cut if training has made the tail smaller than ``before``."""
    cut = tail.cut(rank)
    if rank > cut >= tail.lowest and tail_norm(factors, tail, rank) < before:
        return cut
    return rank
