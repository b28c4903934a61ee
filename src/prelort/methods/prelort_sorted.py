"""Sorted prefixes: our extension of PreLort, for rounds in which few clients hold the top ranks.

Federated averaging of what clients change, as functions and not as factors. With P_k^0 = s B_k A_k
the product that client k received, P_k the product that it returned, and p_k its share of the
round's weight, the server would do

    Delta W  <-  Delta W + sum_k p_k (P_k - P_k^0)

if every client held every rank dimension. What would a client have changed in a segment that it
lacks? The changes D_k = P_k - P_k^0 of the clients in one segment have a common part and parts of
their own, D_k = mu + e_k, and the agreement of two clients is

    rho = |mu|^2 / (|mu|^2 + E |e|^2)

The best linear prediction of a change that was not made, from the m holders of the segment, is
m rho / (1 + (m - 1) rho) times their mean change (Goldberger 1962; the Spearman-Brown formula). So
a segment whose holders have the share pi of the weight moves by its holders' mean change times

    eta = pi + (1 - pi) m rho / (1 + (m - 1) rho)

rho = 0 means that a missing change is no change, rho = 1 that everyone would have done as the
holders did (PreLort's segment-wise mean; in products raFLoRA). It is measured in every round, so
there is no hyperparameter: from the inner products of the holders' changes along the adapter as it
was broadcast, one number <D_k, P> / |P| for each layer (`agreement`). Most of a client's change is
the noise of a few optimiser steps, in any direction and different for clients with the same data.
It hides what they agree on, and does little harm; so whole changes are compared in the first round
alone, when P is zero.

The sum is a stack of factors; its SVD at the global rank becomes the new adapter, the singular
values split evenly. So the dimensions are sorted by strength after every round, whoever trained
them, and every prefix is the best approximation of its rank.

Clients of a lower rank train at a higher rate, (R / r) ** 0.4 times the highest rank's
(`training.rank_exponent`): with one scale for all ranks, fewer dimensions move the function less.
Each step sees the client's whole prefix and one shorter one, so that short prefixes stand alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from prelort.adapters import LoraAdapter
from prelort.adapters.algebra import squared_distance
from prelort.aggregation.products import Segment, SegmentSums, between, sum_products
from prelort.methods.averaging import AveragingProducts, weighting
from prelort.methods.flexlora import cut
from prelort.methods.interface import ServerState
from prelort.methods.objective import Kind
from prelort.methods.prefix import ProductMethod


class PreLortSorted(ProductMethod):
    """Changes averaged as functions, missing ones predicted, dimensions sorted by SVD."""

    name: ClassVar[str] = "prelort-sorted"
    summary: ClassVar[str] = "our extension: averages changes as functions, sorts dimensions"
    paper: ClassVar[str] = "this project, after arXiv 2606.15963 and 2602.13486"
    default_objective: ClassVar[Kind] = "full+one"
    rank_exponent: ClassVar[float] = 0.4

    def aggregator(self, state: ServerState) -> AveragingProducts[SegmentSums]:
        """The mean change of the function, sorted into the new adapter.

        The multiplier of a segment is known when all replies are in.
        """
        old = state.adapter

        def finish(sums: SegmentSums) -> ServerState:
            means = {
                i: s.products.mean() for i, s in enumerate(sums.segments) if s.products.total > 0
            }
            rho = agreement([(sums.segments[i], mean) for i, mean in means.items()])
            parts: list[LoraAdapter] = []
            for index, segment in enumerate(sums.segments):
                before = between(old, segment.low, segment.high).to(torch.float32)
                if index not in means:
                    parts.append(before)
                    continue
                mean, eta = means[index], multiplier(segment, sums.total, rho)
                # Dimensions times zero would only make the SVD slow.
                parts += [mean] if eta == 1 else [before.scaled(1 - eta), mean.scaled(eta)]
            moved = replace(sum_products(parts), modules_to_save=means[0].modules_to_save)
            return state.advanced(cut(moved, old, "even", self.seed, state.round))

        sums = SegmentSums(state.levels, old.rank, before=old)
        return AveragingProducts(state, weighting(self.config.weights), sums, finish)


def agreement(means: Sequence[tuple[Segment, LoraAdapter]]) -> float:
    """Rho: the mean inner product of two clients' changes, relative to their mean square.

    Of the changes along the adapter as it was broadcast; where no segment has two holders and a
    product, of the whole changes. Between 0 and 1; 0 where no segment has two holders, or nothing
    has moved.

    Args:
        means: the segments with a holder, each with the mean of its holders' products.
    """
    gained = [(s, float(s.gained @ s.gained), s.gained_squares) for s, _ in means]
    rho = _pooled(gained)
    if rho is None:
        rho = _pooled([(s, _moved_together(s, mean), s.moved) for s, mean in means])
    return min(max(rho or 0.0, 0.0), 1.0)


def _pooled(segments: Sequence[tuple[Segment, float, float]]) -> float | None:
    """The mean agreement over segments; None if none has one.

    Each segment with several holders has an estimate of its own; they are averaged by the weight of
    their pairs of holders, since they differ by little more than their noise.

    Args:
        segments: each with |sum_k w_k D_k|^2 and sum_k w_k^2 |D_k|^2.
    """
    agreeing = pairs = 0.0
    for segment, together, single in segments:
        weight = segment.products.total**2 - segment.squares
        if weight > 0 and single > 0:
            agreeing += (together - single) / (single / segment.squares)
            pairs += weight
    return agreeing / pairs if pairs > 0 else None


def _moved_together(segment: Segment, mean: LoraAdapter) -> float:
    """|sum_k w_k D_k|^2 of the holders' whole changes."""
    assert segment.before is not None
    return segment.products.total**2 * squared_distance(mean, segment.before)


def multiplier(segment: Segment, total: float, rho: float) -> float:
    """Eta: how many times its holders' mean change a segment moves.

    Args:
        segment: with at least one holder; m is the number of holders by weight,
            (sum w)^2 / sum w^2.
        total: the weight of all clients of the round.
        rho: their `agreement`.
    """
    share = segment.products.total / total
    holders = segment.products.total**2 / segment.squares
    return share + (1 - share) * holders * rho / (1 + (holders - 1) * rho)
