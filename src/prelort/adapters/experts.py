"""A mixture's experts as PEFT keeps them: two matrices for all experts of a parameter.

transformers has the experts of a layer in parameters [experts, d_out, d_in], which PEFT adapts as
they are (``target_parameters``). Its A is [experts * r, d_in], expert after expert; its B is
[d_out, r * experts], rank dimension after rank dimension. In a `LoraAdapter` each expert is a layer
of its own, ``<parameter>.<index>``, so that a prefix, a mean and a product are those of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from prelort.adapters.adapter import Factors
from prelort.adapters.scale import ScaleRule


def join(experts: Sequence[Factors], scale: ScaleRule) -> tuple[Tensor, Tensor]:
    """PEFT's A [experts * r, d_in] and B [d_out, r * experts] of all experts.

    r is the largest rank of an expert; those of a lower one get zeros, and B the factor
    s(own rank) / s(r), so that all compute at the scale s(r) what they did at their own.
    """
    if len(experts) == 1:
        return experts[0].A, experts[0].B
    rank = max(factors.rank for factors in experts)
    padded = [_padded(factors, rank, scale) for factors in experts]
    b = torch.stack([factors.B for factors in padded], dim=2)
    return torch.cat([factors.A for factors in padded]), b.flatten(1)


def split(a: Tensor, b: Tensor, count: int) -> list[Factors]:
    """The inverse of `join` for ``count`` experts of one rank, as views."""
    if count == 1:
        return [Factors(a, b)]
    of_a, of_b = a.view(count, -1, a.shape[1]), b.view(len(b), -1, count)
    return [Factors(*both) for both in zip(of_a.unbind(0), of_b.unbind(2), strict=True)]


def of_parameters(
    layers: Mapping[str, Factors], parameters: Sequence[str]
) -> dict[str, list[Factors]]:
    """The experts of each parameter in their order; a layer that is no expert is alone."""
    grouped: dict[str, dict[int, Factors]] = {}
    for name, factors in layers.items():
        parameter = parameter_of(name, parameters)
        index = 0 if parameter == name else int(name.rpartition(".")[2])
        grouped.setdefault(parameter, {})[index] = factors
    return {name: [own[index] for index in sorted(own)] for name, own in grouped.items()}


def parameter_of(layer: str, parameters: Sequence[str]) -> str:
    """The parameter that an expert is a part of; of any other layer its own name."""
    parameter = layer.rpartition(".")[0]
    return parameter if parameter in parameters else layer


def peft_layer(name: str, parameters: Sequence[str]) -> str:
    """PEFT's name of a layer: for one of the adapted ``parameters`` that of the wrapper around it.

    The wrappers of several parameters of a module are nested, the first one innermost.
    ``parameters`` are in the model's order.
    """
    if name not in parameters:
        return name
    module = name.rpartition(".")[0]
    of_module = [own for own in parameters if own.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(of_module) - 1 - of_module.index(name))


def _padded(factors: Factors, rank: int, scale: ScaleRule) -> Factors:
    missing = rank - factors.rank
    if missing == 0:
        return factors
    b = factors.B * (scale(factors.rank) / scale(rank))
    return Factors(F.pad(factors.A, (0, 0, 0, missing)), F.pad(b, (0, missing)))
