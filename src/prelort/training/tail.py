"""HetLoRA's tail: the slots that a client may do without (arXiv 2401.06432)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prelort.methods.objective import TailPenalty
from prelort.models.lora import ADAPTER, lora_layers


def tail_penalty(model: nn.Module, tail: TailPenalty, rank: int) -> Tensor:
    """``sum over layers of |B[:, q:]|_F |A[q:]|_F`` of what is installed, q = tail.cut(rank)."""
    cut = tail.cut(rank)
    norms: list[Tensor] = []
    for layer in lora_layers(model).values():
        a, b = layer.lora_A[ADAPTER].weight[cut:], layer.lora_B[ADAPTER].weight[:, cut:]
        norms.append(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return torch.stack(norms).sum()


def tail_norm(model: nn.Module, tail: TailPenalty, rank: int) -> float:
    """The value of `tail_penalty`, without gradients."""
    with torch.no_grad():
        return float(tail_penalty(model, tail, rank))


def pruned_rank(model: nn.Module, tail: TailPenalty, rank: int, before: float) -> int:
    """The rank after self-pruning: cut where training has made the tail smaller than ``before``."""
    cut = tail.cut(rank)
    if rank > cut >= tail.lowest and tail_norm(model, tail, rank) < before:
        return cut
    return rank
