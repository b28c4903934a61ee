"""Initial factors: A drawn at random, B zero, so that the adapter changes nothing yet."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from prelort.adapters.adapter import Factors, LoraAdapter
from prelort.seeds import torch_generator


def draw_a(seed: int, layer: str, rank: int, d_in: int) -> Tensor:
    """A of one layer, [rank, d_in] float32, uniform in +-1/sqrt(d_in) as PEFT and nn.Linear do.

    The same arguments give the same numbers on every machine, so a client can draw A itself instead
    of receiving it. Draw at the full rank and cut: fewer rows are other draws.
    """
    generator = torch_generator(seed, "initial adapter", layer)
    # Kaiming with a = sqrt(5) is this bound.
    bound = 1 / math.sqrt(d_in)
    return torch.empty((rank, d_in)).uniform_(-bound, bound, generator=generator)


def fresh(like: LoraAdapter, seed: int) -> LoraAdapter:
    """``like`` with drawn A and zero B; its modules to save are kept."""
    layers = {
        name: Factors(
            draw_a(seed, name, f.rank, f.A.shape[1]),
            torch.zeros(f.B.shape, dtype=torch.float32),
        )
        for name, f in like.layers.items()
    }
    return replace(like, layers=layers)


def filled(adapter: LoraAdapter, like: LoraAdapter, seed: int) -> LoraAdapter:
    """``adapter`` at the ranks of ``like``: A of the new rank dimensions is drawn, their B is zero.

    A dimension whose A and B are both zero is drawn too: it could never learn, since each factor's
    gradient is a multiple of the other.
    """
    layers: dict[str, Factors] = {}
    for name, target in like.layers.items():
        own = adapter.layers[name]
        a = draw_a(seed, name, target.rank, target.A.shape[1])
        b = torch.zeros(target.B.shape, dtype=torch.float32)
        alive = (own.A != 0).any(dim=1) | (own.B != 0).any(dim=0)
        a[: own.rank] = torch.where(alive[:, None], own.A.float(), a[: own.rank])
        b[:, : own.rank] = own.B
        layers[name] = Factors(a, b)
    return replace(adapter, layers=layers)
