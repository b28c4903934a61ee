"""Sorted prefixes: our extension of PreLort where clients of high rank are few (the tail problem).

Averaging dimensions lets a tail segment become whatever the one or two clients who hold it and
happen to take part have made of it. Here the server works on products, on changes, and sorts:

    Delta W  <-  Delta W + sum_j sum_{k: r_k >= j} (w_k / N_j) (P_kj - P_j)

    N_j = sum_{k: r_k >= j} w_k

with P_j = s B_j A_j the product of rank dimension j as it was broadcast and P_kj as client k
returned it. A dimension that a client lacks is no change there. The sum is a stack of factors; its
SVD at the global rank becomes the new adapter, the singular values split evenly. So the dimensions
are sorted by strength after every round, whoever trained them, and any prefix is the best
approximation of its rank.

Clients of a lower rank train at a higher rate, (R / r) ** 0.4 times the highest rank's
(`training.rank_exponent`): with one scale for all ranks, fewer dimensions move the function less.

With one rate for all and a holder of every dimension this is raFLoRA (arXiv 2602.13486): ours is
the rate by rank. The options span the family that was tried, each off by default since none of them
helped. ``step``: the mean of several changes is shorter than each of them, the more the less they
agree, and a step of a segment beyond its mean D can make up for that. With D_k the changes of its
holders, weighted as above,

    eta = min( mean_k |D_k|^2 / |D|^2 , m ) ** step,   m = N^2 / sum_k w_k^2

is 1 where all agree, and where one client holds a segment alone; step = 1/2 gives the mean change
the length of a single one (their root mean square), a step between goes part of the way. FedExP
(arXiv 2301.09604) extrapolates by half that ratio. m, the number of holders by weight, is what
unrelated changes give: those against each other are not stretched further. ``unchanged``: a
missing vote counts as 'no change' (a dimension's change times N_j's share of all weight to this
power). ``momentum`` of the server, ``averaging`` over rounds, and ``presence`` (the share of rounds
in which a client trains its prefix with the dimensions above it folded into its base).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.adapters.algebra import best_approximation, concatenate, squared_distance
from prelort.aggregation.products import Segment, SegmentSums, between, sum_products
from prelort.config import Section
from prelort.methods.averaging import Weighting, weighting
from prelort.methods.flexlora import cut
from prelort.methods.interface import Broadcast, Client, ServerState, Update
from prelort.methods.memory import recall, store
from prelort.methods.prefix import ProductMethod
from prelort.methods.selection import above, freeze
from prelort.seeds import numpy_generator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]

VELOCITY, AVERAGE = "velocity", "average"
"""Keys of the server's memory."""


class SortedOptions(Section):
    """``[method.options.prelort-sorted]``."""

    step: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    unchanged: Share = 0.0
    momentum: Decay = 0.0
    averaging: Decay = 0.0
    presence: Share = 0.0


class PreLortSorted(ProductMethod):
    """Changes averaged segment by segment as products, dimensions sorted by SVD."""

    name: ClassVar[str] = "prelort-sorted"
    summary: ClassVar[str] = "our extension: averages changes as products, sorts them by strength"
    paper: ClassVar[str] = "this project, after arXiv 2606.15963 and 2602.13486"
    Options: ClassVar[type[Section]] = SortedOptions
    rank_exponent: ClassVar[float] = 0.4

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix of the client's rank; in a share of the rounds, the rest frozen beside it."""
        whole, frozen = state.adapter, None
        drawn = numpy_generator(self.seed, "presence", client.name, state.round).random()
        if drawn < self.options.presence:
            frozen = freeze(whole, above(client.rank, whole))
        return Broadcast(between(whole, 0, client.rank), frozen=frozen)

    def aggregator(self, state: ServerState) -> Changes:
        """The mean change of each dimension, sorted into the new adapter."""
        weight = weighting(self.config.weights)
        return Changes(state, weight, self.options, self.seed)

    def global_adapter(
        self, state: ServerState, rank: int | None = None, layers: Collection[str] | None = None
    ) -> LoraAdapter:
        """The best approximation of this rank (None: the whole), averaged over rounds if asked."""
        own = state.adapter.select(layers)
        mean = recall(state.memory, AVERAGE, own)
        whole = own if mean is None else replace(mean, modules_to_save=own.modules_to_save)
        return whole if rank is None else between(whole, 0, rank)


class Changes:
    """The sum of each segment's products; a change is scaled when its holders are known."""

    def __init__(
        self,
        state: ServerState,
        weight: Weighting,
        options: SortedOptions,
        seed: int,
    ) -> None:
        self.state = state
        self.weight = weight
        self.options = options
        self.seed = seed
        before = state.adapter if options.step > 0 else None
        self.sums = SegmentSums(state.levels, state.adapter.rank, before)

    def add(self, update: Update) -> None:
        """Fold in a reply's product, segment by segment."""
        self.sums.add(update.adapter, self.weight(update))

    def result(self) -> ServerState:
        """The state after the round; its adapter is the old one where no reply had a weight."""
        state, old, memory = self.state, self.state.adapter, dict(self.state.memory)
        if self.sums.total == 0:
            return state.advanced(state.adapter)
        moved, modules_to_save = self._moved()
        if self.options.momentum > 0:
            moved, velocity = _with_momentum(moved, old, memory, self.options.momentum)
            memory |= store(VELOCITY, velocity)
        adapter = cut(
            replace(moved, modules_to_save=modules_to_save), old, "even", self.seed, state.round
        )
        if self.options.averaging > 0:
            memory |= store(AVERAGE, _averaged(adapter, memory, self.options.averaging))
        return state.advanced(adapter, memory)

    def _moved(self) -> tuple[LoraAdapter, Mapping[str, Tensor]]:
        """The stack of the old product plus every dimension's change, and the modules to save.

        A dimension takes ``eta`` times its holders' mean and keeps ``1 - eta`` of its old product,
        which is nothing by default: then it is left out, since dimensions of zeros make the SVD
        slow.
        """
        old, parts = self.state.adapter, []
        modules_to_save: Mapping[str, Tensor] = {}
        for segment in self.sums.segments:
            before = between(old, segment.low, segment.high).to(torch.float32)
            mean = segment.products.mean()
            if mean is None:
                parts.append(before)
                continue
            eta = stretch(segment, mean, self.options.step)
            eta *= (segment.products.total / self.sums.total) ** self.options.unchanged
            parts += [mean] if eta == 1 else [before.scaled(1 - eta), mean.scaled(eta)]
            modules_to_save = mean.modules_to_save or modules_to_save
        return sum_products(parts), modules_to_save


def stretch(segment: Segment, mean: LoraAdapter, step: float) -> float:
    """Eta: how many times its mean change a segment moves that somebody holds.

    After FedExP (arXiv 2301.09604); 1 where nothing has moved, or ``before`` is not known.
    """
    if segment.before is None:
        return 1.0
    held, moved = segment.products.total, squared_distance(mean, segment.before)
    ratio = min(segment.moved / held / moved, held**2 / segment.squares) if moved > 0 else 1.0
    return float(ratio**step)


def _with_momentum(
    moved: LoraAdapter, old: LoraAdapter, memory: Mapping[str, Tensor], decay: float
) -> tuple[LoraAdapter, LoraAdapter]:
    """``old + (1 - decay) v``, and ``v = decay v_before + change`` cut to three times the rank."""
    before, bare = recall(memory, VELOCITY, old), old.bare()
    change = concatenate([moved, bare], [1.0, -1.0])
    total = change if before is None else concatenate([before, change], [decay, 1.0])
    velocity = best_approximation(total, 3 * old.rank)
    return concatenate([bare, velocity], [1.0, 1.0 - decay]), velocity


def _averaged(adapter: LoraAdapter, memory: Mapping[str, Tensor], decay: float) -> LoraAdapter:
    """The running mean of the rounds' products, cut to the global rank."""
    before, bare = recall(memory, AVERAGE, adapter), adapter.bare()
    if before is None:
        return bare
    return best_approximation(concatenate([before, bare], [decay, 1.0 - decay]), adapter.rank)
