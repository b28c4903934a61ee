"""Algebra of scaled products ``s B A`` that never builds a d_out x d_in matrix.

Everything works on factors: inner products and norms by Gram matrices (r x r), sums by
concatenation, the best approximation of a rank by QR of the factors and an r x r SVD. Computed in
float64, since norms of differences cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from prelort.adapters.adapter import Factors, LoraAdapter
from prelort.errors import AdapterError

_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Let `factored_svd` compute on this device within the block, one layer at a time.

    The rest stays where the factors are: a mean touches each number once, and moving it takes as
    long as averaging it.
    """
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def concatenate(adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> LoraAdapter:
    """The adapter whose product is ``sum_k weights[k] * s(r_k) B_k A_k``, exactly.

    Its rank is the sum of the ranks (FLoRA's stacking, arXiv 2409.05976, eq. 5); weights and scales
    go into B alone. Modules to save are summed with the same weights. Raises `AdapterError` for
    different layers, or for a number of weights that is not that of the adapters.
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    rule = adapters[0].scale
    same_layers(adapters)
    layers: dict[str, Factors] = {}
    for name in adapters[0].layers:
        parts = [adapter.layers[name] for adapter in adapters]
        total = sum(part.rank for part in parts)
        scaled = [
            part.B * (weight * adapter.scale(part.rank) / rule(total))
            for part, adapter, weight in zip(parts, adapters, weights, strict=True)
        ]
        layers[name] = Factors(torch.cat([part.A for part in parts]), torch.cat(scaled, dim=1))
    modules_to_save = {
        name: sum(
            (w * a.modules_to_save[name] for a, w in zip(adapters, weights, strict=True)),
            start=torch.zeros_like(adapters[0].modules_to_save[name]),
        )
        for name in adapters[0].modules_to_save
    }
    return LoraAdapter(layers, rule, modules_to_save)


def inner(x: LoraAdapter, y: LoraAdapter) -> float:
    """The Frobenius inner product of the two scaled products, summed over layers."""
    same_layers([x, y])
    # By name: layers that come from a file or a message have any order, and sums round.
    return sum(layer_inner(x, y, name) for name in sorted(x.layers))


def layer_inner(x: LoraAdapter, y: LoraAdapter, name: str) -> float:
    """``<s B_x A_x, s B_y A_y> = s_x s_y tr((B_x' B_y)(A_y A_x'))`` of one layer."""
    fx, fy = x.layers[name], y.layers[name]
    gram_b = fx.B.double().T @ fy.B.double()
    gram_a = fx.A.double() @ fy.A.double().T
    return x.scale(fx.rank) * y.scale(fy.rank) * float((gram_b * gram_a).sum())


def norm(x: LoraAdapter) -> float:
    """The Frobenius norm of the scaled product over all layers."""
    return math.sqrt(max(inner(x, x), 0.0))


def squared_distance(x: LoraAdapter, y: LoraAdapter) -> float:
    """``|x|^2 - 2<x,y> + |y|^2`` of two scaled products, clipped at 0.

    Three Gram matrices and no QR, for differences that are not small: 1e-16 of the larger square is
    lost. `distance` is exact for small ones.
    """
    return max(inner(x, x) - 2 * inner(x, y) + inner(y, y), 0.0)


def distance(x: LoraAdapter, y: LoraAdapter) -> float:
    """The Frobenius norm of the difference of two scaled products.

    Through QR of the stacked B, so that small differences are not lost to cancellation as in
    ``|x|^2 - 2<x,y> + |y|^2``.
    """
    stacked = concatenate([a.bare().to(torch.float64) for a in (x, y)], [1.0, -1.0])
    norms = [
        stacked.scale(f.rank) * float((torch.linalg.qr(f.B).R @ f.A).norm())
        for _, f in sorted(stacked.layers.items())
    ]
    return math.hypot(*norms)


Split = Literal["even", "B", "A"]
"""Where the singular values go: their roots to both factors, all to B, or all to A."""


def best_approximation(adapter: LoraAdapter, rank: int, split: Split = "even") -> LoraAdapter:
    """The adapter of this rank whose product is nearest in Frobenius norm (Eckart-Young).

    Rank dimensions are in falling order, so that a prefix of the result is the best approximation
    of its own rank (constant scale rule). No layer exceeds its own rank, d_in or d_out. Raises
    `AdapterError` for a rank below 1.
    """
    if rank < 1:
        raise AdapterError(f"rank {rank} is not allowed: use at least 1")
    layers: dict[str, Factors] = {}
    for name, factors in adapter.layers.items():
        triples = factored_svd(factors, lambda singular: rank)
        layers[name] = _from_svd(*triples, adapter, name, split)
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save)


def compress(adapter: LoraAdapter, energy: float = 1.0) -> LoraAdapter:
    """The adapter with the fewest rank dimensions of each layer that keep this share of its energy.

    Energy is the sum of the squared singular values of the layer's product. With 1 nothing is lost
    but rounding in the factors' own type. Each layer keeps one dimension at least.
    """
    layers: dict[str, Factors] = {}
    for name, factors in adapter.layers.items():
        smallest = torch.finfo(factors.A.dtype).eps

        def kept(singular: Tensor, smallest: float = smallest) -> int:
            if energy < 1:
                shares = singular.square().cumsum(0) / singular.square().sum().clamp(min=1e-300)
                return max(1, int((shares < energy - 1e-12).sum()) + 1)
            return max(1, int((singular > smallest * singular.max().clamp(min=1e-300)).sum()))

        layers[name] = _from_svd(*factored_svd(factors, kept), adapter, name, "even")
    return LoraAdapter(layers, adapter.scale, adapter.modules_to_save)


def _from_svd(
    left: Tensor,
    singular: Tensor,
    right: Tensor,
    adapter: LoraAdapter,
    name: str,
    split: Split,
) -> Factors:
    """Singular triples of a layer's product as factors at the scale of their number."""
    factors = adapter.layers[name]
    values = singular * (adapter.scale(factors.rank) / adapter.scale(len(singular)))
    to_a, to_b = {
        "even": (values.sqrt(), values.sqrt()),
        "A": (values, torch.ones_like(values)),
        "B": (torch.ones_like(values), values),
    }[split]
    dtype = factors.A.dtype
    # Contiguous whatever the linear algebra returned, as factors are everywhere else.
    a, b = to_a[:, None] * right, left * to_b
    return Factors(a.to(dtype).contiguous(), b.to(dtype).contiguous())


def factored_svd(
    factors: Factors, kept: Callable[[Tensor], int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of ``B A`` (unscaled) as U [d_out, q], S [q], V' [q, d_in] in float64.

    q = min(rank, d_in, d_out), or the number that ``kept`` returns for all singular values. By QR
    of both factors and an SVD of the small core. Q is never formed, but applied to the few triples
    that are kept. Computed on the device of `computing_on`, returned on that of the factors.
    """
    home = factors.A.device
    device = _DEVICE.get() or home
    times_b, r_b = _qr(factors.B.to(device))
    times_a, r_a = _qr(factors.A.to(device).T)
    u, singular, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    count = len(singular) if kept is None else min(kept(singular), len(singular))
    left, right = times_b(u[:, :count]), times_a(vh[:count].T).T
    return left.to(home), singular[:count].to(home), right.to(home)


Times = Callable[[Tensor], Tensor]
"""Multiplies Q of a QR decomposition with columns [rank, count]: [d, count]."""


def _qr(tall: Tensor) -> tuple[Times, Tensor]:
    """Q as a function of columns, and R of a matrix [d, rank]; computed in float64."""
    if tall.dtype != torch.float64 and (factorised := _gram_qr(tall.double())) is not None:
        return factorised
    packed, sizes = torch.geqrf(tall.double())
    count = len(sizes)

    def times(columns: Tensor) -> Tensor:
        padded = columns.new_zeros(packed.shape[0], columns.shape[1])
        padded[:count] = columns
        return torch.ormqr(packed[:, :count], sizes, padded)

    return times, packed[:count].triu()


CONDITION = 3e4
"""The largest condition number (bounded by Frobenius norms) for QR by the Gram matrix."""


def _gram_qr(tall: Tensor) -> tuple[Times, Tensor] | None:
    """QR by Cholesky's decomposition of the Gram matrix; None where that is not exact enough.

    It takes half the time of Householder's. Q is orthonormal up to the square of the condition
    number times 1e-16, which within `CONDITION` is 1e-7 at worst and below the rounding of float32
    factors; columns are brought to length 1 first, so that only their directions count.
    """
    gram = tall.T @ tall
    sizes = gram.diagonal().sqrt()
    if tall.shape[0] < tall.shape[1] or not bool((sizes > 0).all()):
        return None
    factor, failed = torch.linalg.cholesky_ex(gram / sizes / sizes[:, None], upper=True)
    if bool(failed):
        return None
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(sizes)).to(factor), upper=True)
    if not float(factor.norm() * inverse.norm()) < CONDITION:
        return None
    return lambda columns: tall @ ((inverse @ columns) / sizes[:, None]), factor * sizes


def zeros(like: LoraAdapter) -> LoraAdapter:
    """A contiguous float32 adapter of zeros of the same shapes."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)

    layers = {name: Factors(empty(f.A), empty(f.B)) for name, f in like.layers.items()}
    modules_to_save = {name: empty(tensor) for name, tensor in like.modules_to_save.items()}
    return LoraAdapter(layers, like.scale, modules_to_save)


def same_layers(adapters: Sequence[LoraAdapter]) -> None:
    """Raise `AdapterError` naming a layer or module to save that not all adapters have."""
    first = adapters[0]
    for other in adapters[1:]:
        for name in first.layers.keys() ^ other.layers.keys():
            raise AdapterError(f"layer {name!r} is in one adapter and not in another")
        for name in first.modules_to_save.keys() ^ other.modules_to_save.keys():
            raise AdapterError(f"tensor {name!r} is in one adapter and not in another")
