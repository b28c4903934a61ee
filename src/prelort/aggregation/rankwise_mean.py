"""The weighted mean of each slot over the clients that hold it, folded in one reply at a time.

The factor-space methods differ only in what they make of the slots that a client lacks, so they
share this accumulator. Its memory is A of one global adapter and at most twice its B, however many
clients reply.

Accumulators can be merged, so that edge aggregators can add up their clients' replies and send one
partial mean each (`SlotMean.to_tensors`) to the server, which merges these (`SlotMean.merge`):

- Segment-wise, zero-padding, Fed-PLoRA, FSLoRA, FedIT, and replication with all holders as donors
  are one `RankwiseMean` each and differ in how it is finished. So is HetLoRA: a client's weight is the
  norm of its own product, which does not depend on the others.
- Replication with the highest ranks as donors keeps two, since it must know the donors' mean apart
  from that of the others, and who is a donor is known at the end only. Two partial rounds merge
  pair by pair if their highest ranks are equal; otherwise the lower one's donors become others.
- FedEx-LoRA needs a `ProductSum` beside it, and methods that average products need that alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prelort.adapters import Factors, LoraAdapter, ScaleRule
from prelort.adapters.adapter import check_shapes
from prelort.adapters.algebra import same_layers, zeros
from prelort.errors import AdapterError


class RankwiseMean:
    """Running weighted means in float32: ``mean += (w / W) * (value - mean)`` for each slot.

    W is the weight that the slot has received, the new reply's included. The running form makes
    one client's mean that client, and the mean of equal clients that value, bit for bit.

    Each number of a reply is read once; B is kept by width (`Columns`). The ``over_...`` methods
    finish in the accumulator's own memory: after one of them it is used up.
    """

    def __init__(self, like: LoraAdapter) -> None:
        bare = zeros(like)
        self.total = 0.0
        self.held = {
            name: torch.zeros(f.rank, dtype=torch.float64) for name, f in like.layers.items()
        }
        """Layer name -> weight [rank] that each slot has received."""
        self._rows = {name: factors.A for name, factors in bare.layers.items()}
        self._columns = {n: Columns(f.B.shape[0], f.rank) for n, f in bare.layers.items()}
        self._modules_to_save = dict(bare.modules_to_save)
        self._scale = like.scale
        self._scratches: dict[torch.Size, Tensor] = {}
        self._used_up = False

    @property
    def mean(self) -> LoraAdapter:
        """The means so far, in the accumulator's own memory; zero where nobody held a slot."""
        layers = {n: Factors(a, self._columns[n].whole().mean) for n, a in self._rows.items()}
        return LoraAdapter(layers, self._scale, self._modules_to_save)

    def add(
        self, adapter: LoraAdapter, weight: float, dimensions: Mapping[str, Tensor] | None = None
    ) -> None:
        """Fold in the slots that ``adapter`` has; extras are held by everyone.

        They are the first ones, or those of the indices ``dimensions`` (layer -> int64 [rank]).
        """
        self._must_be_open()
        if weight == 0:
            return
        self.total += weight
        for name, factors in adapter.layers.items():
            if dimensions is None or _are_first(dimensions[name]):
                self._add_first(name, factors, weight)
            else:
                self._add_at(name, factors, weight, dimensions[name])
        self._add_extras(adapter.modules_to_save, weight)

    def _add_first(self, name: str, factors: Factors, weight: float) -> None:
        """In place, on views: nothing is copied."""
        held = self.held[name][: factors.rank]
        held += weight
        _move(self._rows[name][: factors.rank], factors.A, _step(weight, held)[:, None])
        self._columns[name].add(factors.B, weight)

    def _add_at(self, name: str, factors: Factors, weight: float, dimensions: Tensor) -> None:
        held, rows = self.held[name], self._rows[name]
        held[dimensions] += weight
        # Through scratch memory, once for all layers: fresh memory costs more than the arithmetic.
        own = self._scratch(factors.A.shape)
        torch.index_select(rows, 0, dimensions, out=own)
        _move(own, factors.A, _step(weight, held[dimensions])[:, None])
        rows.index_copy_(0, dimensions, own)
        # Columns are scattered into a matrix of full width, whose other columns take no step:
        # reading and writing single columns of the mean costs several times as much.
        mean, steps = self._columns[name].steps(dimensions, weight)
        wide = self._scratch(mean.shape)
        wide.scatter_(1, dimensions.expand(factors.B.shape), factors.B.float())
        _move(mean, wide, steps[None, :])

    def _scratch(self, shape: torch.Size) -> Tensor:
        """A float32 matrix of finite numbers."""
        if shape not in self._scratches:
            self._scratches[shape] = torch.zeros(shape)
        return self._scratches[shape]

    def _add_extras(self, modules_to_save: Mapping[str, Tensor], weight: float) -> None:
        for name, tensor in modules_to_save.items():
            _move(self._modules_to_save[name], tensor, weight / self.total)

    def merge(self, other: RankwiseMean) -> None:
        """Fold in what another accumulator has seen, as if its replies had been added here.

        Associative and commutative but for rounding; an empty one changes nothing, and merging
        into an empty one copies, bit for bit. ``other`` may have fewer slots, or more that nobody
        held. Raises `AdapterError` where its layers or held slots have no place here.
        """
        self._must_be_open()
        if other.total == 0:
            return
        given = other.mean
        same_layers([self.mean, given])
        counts = {name: _held_prefix(held) for name, held in other.held.items()}
        for name, count in counts.items():
            if count > len(self.held[name]):
                raise AdapterError(
                    f"layer {name!r}: a partial mean of {count} slots does not fit into "
                    f"{len(self.held[name])}"
                )
        self.total += other.total
        for name, count in counts.items():
            held, weight = self.held[name][:count], other.held[name][:count]
            held += weight
            theirs = given.layers[name].prefix(count)
            _move(self._rows[name][:count], theirs.A, _step(weight, held)[:, None])
            self._columns[name].add(theirs.B, weight)
        self._add_extras(given.modules_to_save, other.total)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, contiguous, of the slots up to the last one that is held.

        ``mean:<tensor of the adapter>`` float32, ``held:<layer>`` float64 [slots], ``total``
        float64 [].
        """
        tensors = {"total": torch.tensor(self.total, dtype=torch.float64)}
        whole, layers = self.mean, {}
        for name, held in self.held.items():
            count = _held_prefix(held)
            layers[name] = whole.layers[name].prefix(count)
            tensors[f"held:{name}"] = held[:count].clone()
        partial = LoraAdapter(layers, whole.scale, whole.modules_to_save)
        return tensors | {f"mean:{n}": t.contiguous() for n, t in partial.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scale: ScaleRule) -> RankwiseMean:
        """The inverse of `to_tensors`. Raises `AdapterError` naming what is missing or wrong."""
        means = {n.removeprefix("mean:"): t for n, t in tensors.items() if n.startswith("mean:")}
        adapter = LoraAdapter.from_tensors(means, scale)
        expected = {"total": (), **{f"held:{n}": (f.rank,) for n, f in adapter.layers.items()}}
        weights = {name: t for name, t in tensors.items() if not name.startswith("mean:")}
        check_shapes(weights, expected)
        for name, weight in weights.items():
            if not bool(((weight >= 0) & weight.isfinite()).all()):
                raise AdapterError(f"tensor {name!r} has a weight that is below 0 or not finite")
        partial = cls(adapter)
        partial.total = float(weights["total"])
        for name, factors in adapter.layers.items():
            held = weights[f"held:{name}"].to(torch.float64, copy=True)
            partial.held[name] = held
            partial._rows[name].copy_(factors.A)
            partial._columns[name].add(factors.B, held)
        partial._modules_to_save = {
            n: t.to(torch.float32, copy=True) for n, t in adapter.modules_to_save.items()
        }
        return partial

    def over_holders(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over its holders; a slot that nobody held keeps its previous value."""
        mean = self._finished()
        self._keep_unheld(mean, previous)
        return self._like(mean, previous)

    def over_everyone(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over all replies, where a client that lacks it counts as zero.

        A slot that nobody held keeps its previous value: as zeros it could never learn again.
        """
        mean = self._finished()
        for name, factors in mean.layers.items():
            share = self._share(name)
            factors.A.mul_(share[:, None])
            factors.B.mul_(share[None, :])
        self._keep_unheld(mean, previous)
        return self._like(mean, previous)

    def or_unchanged(self, previous: LoraAdapter) -> LoraAdapter:
        """Each slot's mean over all replies, where a client that lacks it votes for no change."""
        mean = self._finished()
        for name, factors in mean.layers.items():
            old, share = previous.layers[name], self._share(name)
            torch.lerp(old.A.float(), factors.A, share[:, None], out=factors.A)
            torch.lerp(old.B.float(), factors.B, share[None, :], out=factors.B)
        return self._like(mean, previous)

    def _share(self, name: str) -> Tensor:
        """The share [rank] of the weight that holds each slot of a layer."""
        return (self.held[name] / self.total).to(torch.float32)

    def _keep_unheld(self, mean: LoraAdapter, previous: LoraAdapter) -> None:
        for name, factors in mean.layers.items():
            nobody = (self.held[name] == 0).nonzero().flatten()
            if len(nobody):
                old = previous.layers[name].take(nobody)
                factors.A[nobody], factors.B[:, nobody] = old.A.float(), old.B.float()

    def _like(self, mean: LoraAdapter, previous: LoraAdapter) -> LoraAdapter:
        modules_to_save = mean.modules_to_save if self.total > 0 else dict(previous.modules_to_save)
        return LoraAdapter(mean.layers, previous.scale, modules_to_save)

    def _finished(self) -> LoraAdapter:
        """The means, for one use: they are given away."""
        self._must_be_open()
        mean, self._used_up = self.mean, True
        self._rows, self._columns, self._scratches = {}, {}, {}
        return mean

    def _must_be_open(self) -> None:
        if self._used_up:
            raise RuntimeError("this mean has been finished: start a new one for the next round")


class Columns:
    """The running mean of one layer's B [d_out, rank], kept apart by the width of what is added.

    A prefix of B's columns is spread over memory in short pieces, and folding it in takes two to
    five times as long as a whole matrix. So replies of each width have a mean of their own, a whole
    matrix with one weight, as long as all of them together are no more than twice the full width;
    beyond that a reply joins the next wider one. `whole` makes them one.
    """

    def __init__(self, rows: int, rank: int) -> None:
        self.rows = rows
        self.rank = rank
        self.parts: dict[int, Part] = {}

    def add(self, columns: Tensor, weight: float | Tensor) -> None:
        """Fold in the first columns [d_out, width]; of one weight, or each of its own [width]."""
        if width := columns.shape[1]:
            self._part(width).add(columns, weight)

    def _part(self, width: int) -> Part:
        """The part that takes in columns of this width."""
        if width not in self.parts:
            narrow = sum(part for part in self.parts if part < self.rank)
            if width < self.rank and narrow + width > self.rank:
                width = min((part for part in self.parts if part > width), default=self.rank)
            if width not in self.parts:
                self.parts[width] = Part(torch.zeros(self.rows, width))
        return self.parts[width]

    def steps(self, dimensions: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """The mean at full width, to be moved by the caller, and how far: [rank], float32.

        These columns have just been given this weight; the others take no step.
        """
        part = self._part(self.rank)
        held = part.weights()
        held[dimensions] += weight
        steps = torch.zeros(self.rank)
        steps[dimensions] = _step(weight, held[dimensions])
        return part.mean, steps

    def whole(self) -> Part:
        """All in one part of full width; the others are folded into it and freed."""
        part = self._part(self.rank)
        for width in sorted(self.parts.keys() - {self.rank}, reverse=True):
            narrow = self.parts.pop(width)
            part.add(narrow.mean, narrow.weights())
        return part


class Part:
    """A running mean of columns [d_out, width] and their weight: one number while they share it."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean
        self.weight: float | Tensor = 0.0

    def weights(self) -> Tensor:
        """The weight of each column, float64 [width], to be changed in place."""
        if not isinstance(self.weight, Tensor):
            self.weight = torch.full((self.mean.shape[1],), self.weight, dtype=torch.float64)
        return self.weight

    def add(self, columns: Tensor, weight: float | Tensor) -> None:
        """Fold in the first columns."""
        width = columns.shape[1]
        one_weight = not isinstance(weight, Tensor) and not isinstance(self.weight, Tensor)
        if one_weight and width == self.mean.shape[1]:
            self.weight += weight
            _move(self.mean, columns, weight / self.weight)
        else:
            held = self.weights()[:width]
            held += weight
            _move(self.mean[:, :width], columns, _step(weight, held)[None, :])


def _step(weight: float | Tensor, held: Tensor) -> Tensor:
    """``weight / held`` in float32; 0 where both are."""
    return (weight / held.clamp(min=1e-300)).to(torch.float32)


def _held_prefix(held: Tensor) -> int:
    """The number of slots up to the last one that has a weight."""
    return int(held.nonzero().max()) + 1 if bool(held.any()) else 0


def _are_first(dimensions: Tensor) -> bool:
    """Whether these indices are 0, 1, 2, ..."""
    return torch.equal(dimensions, torch.arange(len(dimensions)))


def _move(mean: Tensor, value: Tensor, step: Tensor | float) -> None:
    """``mean += step * (value - mean)`` in place; exact for step 1 and for value == mean."""
    mean.lerp_(value.to(mean.dtype), step)
