"""Attacks on a round, to try defences with: tests and `benchmarks/studies/robustness.py` use them.

A model attack gets what the attackers have honestly changed and returns what they send instead.
Label flips and backdoors poison the attackers' data, after which they train honestly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from prelort.methods.interface import Method, ServerState, Update
from prelort.robustness.aggregator import Changes, copied, parts
from prelort.seeds import torch_generator

Attack = Callable[[Tensor, Generator], Tensor]
"""From the attackers' changes of a tensor, float64 [attackers, ...], to those that they send."""


def sign_flip(changes: Tensor, generator: Generator) -> Tensor:
    """Five times the opposite."""
    return -5 * changes


def scaling(changes: Tensor, generator: Generator) -> Tensor:
    """Twenty times the change, as if no one else had trained."""
    return 20 * changes


def noise(changes: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise of twenty times the change's size."""
    drawn = torch.randn(changes.shape, generator=generator, dtype=changes.dtype)
    size = float(changes.square().mean().sqrt())
    return 20 * size * drawn


def collusion(changes: Tensor, generator: Generator) -> Tensor:
    """All send their mean, moved by 1.5 deviations in each coordinate, at their mean norm.

    "A little is enough" (Baruch et al., arXiv 1902.06156), with the norm kept within the usual.
    """
    mean = changes.mean(dim=0)
    moved: Tensor = mean - 1.5 * changes.std(dim=0, correction=0) * mean.sign()
    usual = float(changes.flatten(1).norm(dim=1).mean())
    return (moved * (usual / max(float(moved.norm()), 1e-300))).expand_as(changes)


ATTACKS: dict[str, Attack] = {
    "sign flip": sign_flip,
    "scaling": scaling,
    "noise": noise,
    "collusion": collusion,
}


def attacked(
    attack: Attack,
    updates: Sequence[Update],
    method: Method,
    state: ServerState,
    seed: int,
    above: int = -1,
) -> list[Update]:
    """What the attackers send instead of these updates.

    ``above``: only rank dimensions above this one are attacked, and with -1 everything.
    """
    generator = torch_generator(seed, "attack", state.round)
    highest = max(updates, key=lambda update: update.adapter.rank)
    sent = method.broadcast(state, highest.client).trainable
    adapters = [copied(update.adapter) for update in updates]
    for part in parts([update.adapter.rank for update in updates]):
        before = part.of(sent)
        if before and part.high > above:
            changes = Changes(before, [part.of(adapters[holder]) for holder in part.holders])
            changes.replace(lambda change: attack(change, generator))
    pairs = zip(updates, adapters, strict=True)
    return [replace(update, adapter=adapter) for update, adapter in pairs]
