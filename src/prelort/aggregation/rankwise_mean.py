"""The weighted mean of each rank dimension over the clients that hold it, one reply at a time.

Rank dimension j of a layer is row j of A with column j of B. The methods that average factors
differ only in what they make of the dimensions that a client lacks, so they share this accumulator.
It takes the memory of one global adapter, however many clients reply.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter
from prelort.adapters.algebra import zeros


class RankwiseMean:
    """Running weighted means in float32: ``mean += (w / W) * (value - mean)``, by rank dimension.

    W is the weight that the dimension has received, the new reply's included. The running form
    makes the mean of one client that client, and the mean of equal clients that value, bit for bit.

    `over_holders`, `over_everyone` and `or_unchanged` finish the mean in its own memory, which
    becomes the new adapter: afterwards every call raises `RuntimeError`.
    """

    def __init__(self, like: LoraAdapter) -> None:
        self.total = 0.0
        """The weight of all replies."""
        self.weights = {
            name: torch.zeros(f.rank, dtype=torch.float64) for name, f in like.layers.items()
        }
        """Layer name -> the weight of each rank dimension's holders, float64 [rank]."""
        self._mean: LoraAdapter | None = zeros(like)

    def add(
        self, adapter: LoraAdapter, weight: float, dimensions: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fold in one reply.

        Args:
            adapter: the client's factors, A [r, d_in] and B [d_out, r] of each layer, and its
                modules to save, which everyone holds.
            weight: at least 0; a reply of weight 0 changes nothing.
            dimensions: by layer, the indices of the reply's rank dimensions, int64 [r]; without,
                they are the first r.
        """
        mean = self._open()
        if weight == 0:
            return
        self.total += weight
        for name, factors in adapter.layers.items():
            target, weights = mean.layers[name], self.weights[name]
            index = None if dimensions is None else dimensions[name]
            if index is None or torch.equal(index, torch.arange(factors.rank)):
                weights = weights[: factors.rank]
                weights += weight
                _move(target.prefix(factors.rank), factors, weight / weights)
            else:
                weights[index] += weight
                columns = index.expand(factors.B.shape)
                part = Factors(target.A.index_select(0, index), target.B.gather(1, columns))
                _move(part, factors, weight / weights[index])
                target.A.index_copy_(0, index, part.A)
                target.B.scatter_(1, columns, part.B)
        for name, tensor in adapter.modules_to_save.items():
            mean.modules_to_save[name].lerp_(tensor.float(), weight / self.total)

    def add_sums(
        self,
        previous: LoraAdapter,
        changes: LoraAdapter,
        weights: Mapping[str, Tensor],
        total: float,
    ) -> None:
        """Take the sums of a whole round, where there are no single replies.

        Args:
            previous: the adapter of which each client received a part.
            changes: ``sum_k w_k (x_k - previous)`` over each rank dimension's holders, float64, in
                the shapes of ``previous``.
            weights: layer name -> the weight of each rank dimension's holders, float64 [rank].
            total: the weight of all clients, above 0.

        Raises `RuntimeError` if a reply was added before.
        """
        mean = self._open()
        if self.total > 0:
            raise RuntimeError("sums of a round cannot be added to single replies")
        self.total = total
        for name, factors in mean.layers.items():
            self.weights[name].copy_(weights[name])
            held = weights[name].where(weights[name] > 0, torch.inf)
            old, change = previous.layers[name], changes.layers[name]
            factors.A.copy_(old.A + change.A / held[:, None])
            factors.B.copy_(old.B + change.B / held)
        for name, tensor in mean.modules_to_save.items():
            tensor.copy_(previous.modules_to_save[name] + changes.modules_to_save[name] / total)

    def over_holders(self, previous: LoraAdapter) -> LoraAdapter:
        """Each dimension's mean over its holders; one without holders keeps its previous value."""
        mean = self._finish(previous)
        self._keep_unheld(mean, previous)
        return mean

    def over_everyone(self, previous: LoraAdapter) -> LoraAdapter:
        """Each dimension's mean over all replies, where lacking it counts as zero.

        A dimension without holders keeps its previous value: as zeros it could never learn again.
        """
        mean = self._finish(previous)
        for name, factors in mean.layers.items():
            share = self.share(name)
            factors.A.mul_(share[:, None])
            factors.B.mul_(share)
        self._keep_unheld(mean, previous)
        return mean

    def or_unchanged(self, previous: LoraAdapter) -> LoraAdapter:
        """Each dimension's mean over all replies, where lacking it counts as no change."""
        mean = self._finish(previous)
        for name, factors in mean.layers.items():
            old, share = previous.layers[name], self.share(name)
            torch.lerp(old.A.float(), factors.A, share[:, None], out=factors.A)
            torch.lerp(old.B.float(), factors.B, share, out=factors.B)
        return mean

    def share(self, name: str) -> Tensor:
        """The share of the weight that holds each rank dimension of a layer: float32 [rank]."""
        return (self.weights[name] / self.total).float()

    def _keep_unheld(self, mean: LoraAdapter, previous: LoraAdapter) -> None:
        for name, factors in mean.layers.items():
            unheld = (self.weights[name] == 0).nonzero().flatten()
            if len(unheld):
                old = previous.layers[name].take(unheld)
                factors.A[unheld], factors.B[:, unheld] = old.A.float(), old.B.float()

    def _open(self) -> LoraAdapter:
        if self._mean is None:
            raise RuntimeError("this mean has been finished: start a new one for the next round")
        return self._mean

    def _finish(self, previous: LoraAdapter) -> LoraAdapter:
        mean, self._mean = self._open(), None
        modules = mean.modules_to_save if self.total > 0 else previous.modules_to_save
        return LoraAdapter(mean.layers, previous.scale, modules)


def _move(mean: Factors, value: Factors, step: Tensor) -> None:
    """``mean += step * (value - mean)`` in place; exact for step 1 and for value == mean."""
    step = step.float()
    mean.A.lerp_(value.A.float(), step[:, None])
    mean.B.lerp_(value.B.float(), step)
