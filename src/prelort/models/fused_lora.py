"""LoRA layers as one operation each, for one adapter or for several at once.

PEFT computes ``base(x) + B(A(dropout(x))) * s`` as some ten operations on tensors of the layer's
width, forwards and backwards. `LoraProduct` writes the adapter's part into the base layer's output
and its gradient into the base layer's, and scales in the narrow middle:

    y = x W' + ((x A_g') * m) B_g'        rows of group g use the factors A_g, B_g

PEFT's own forward pass stays the reference: the results are equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prelort.models.lora import ADAPTER, FROZEN, lora_layers

FactorsOf = Callable[[str, LoraLayer, torch.Size], tuple[Tensor, Tensor, Tensor]]
"""For a layer (name, module) and the shape of its input: A [groups, r, d_in], B [groups, d_out, r]
and the scale m of each rank dimension, which must broadcast to ``[*input.shape[:-1], r]``."""


class LoraProduct(torch.autograd.Function):
    """``x W' + bias + ((x A') * m) B'`` with W frozen; without W only the last term.

    x [..., d_in] in as many groups of equally many rows, one after the other, as A [groups, r,
    d_in] and B [groups, d_out, r] have. m broadcasts to [..., r]. All of one type.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """[..., d_out]."""
        groups, rank, d_in = a.shape
        grouped = x.reshape(groups, -1, d_in)
        middle = torch.bmm(grouped, a.transpose(1, 2)).view(*x.shape[:-1], rank).mul_(mask)
        narrow = middle.view(groups, -1, rank)
        if weight is None:
            y = torch.bmm(narrow, b.transpose(1, 2))
        else:
            y = F.linear(grouped, weight, bias).baddbmm_(narrow, b.transpose(1, 2))
        context.save_for_backward(grouped, weight, a, b, narrow, mask)
        context.shape = x.shape
        # Not a view, which could not be changed in place, as some models do.
        output: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], b.shape[1]])
        return output

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, A and B; the base layer does not learn."""
        grouped, weight, a, b, narrow, mask = context.saved_tensors
        of_x, _, _, of_a, of_b, _ = context.needs_input_grad
        groups, rank = a.shape[:2]
        g = gradient.reshape(groups, -1, b.shape[1])
        db = torch.bmm(g.transpose(1, 2), narrow) if of_b else None
        dx = da = None
        if of_x or of_a:
            middle = torch.bmm(g, b).view(*context.shape[:-1], rank).mul_(mask)
            dz = middle.view(groups, -1, rank)
            da = torch.bmm(dz.transpose(1, 2), grouped) if of_a else None
            if of_x:
                dx = torch.bmm(dz, a) if weight is None else torch.matmul(g, weight)
                dx = dx if weight is None else dx.baddbmm_(dz, a)
                dx = dx.view(context.shape)
        return dx, None, None, da, db, None


@contextmanager
def fused(model: nn.Module, factors_of: FactorsOf) -> Iterator[None]:
    """Let the model's LoRA layers compute by `LoraProduct`, except stacks of experts.

    Quantised, transposed and other base layers keep their own forward pass; dropout before the
    adapter, autocast and a frozen path beside it work as in PEFT.
    """
    layers = {n: m for n, m in lora_layers(model).items() if not isinstance(m, ParamWrapper)}
    with _forwards({layer: _forward(name, layer, factors_of) for name, layer in layers.items()}):
        yield


@contextmanager
def linear_by_group(
    modules: Iterable[nn.Linear], weights_of: Callable[[nn.Linear], tuple[Tensor, Tensor | None]]
) -> Iterator[None]:
    """Let linear layers compute with weights of their own for each group of rows.

    ``weights_of``: a layer's weights [groups, d_out, d_in], and biases [groups, d_out] if it has.
    """

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = weights_of(module)
        y = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
        if bias is not None:
            y = y + bias[:, None]
        return y.view(*x.shape[:-1], weight.shape[1])

    with _forwards({module: partial(forward, module) for module in modules}):
        yield


@contextmanager
def _forwards(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Let modules compute by these functions, and afterwards as they did before."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward
            else:
                module.forward = own


def _forward(name: str, layer: LoraLayer, factors_of: FactorsOf) -> Callable[..., Tensor]:
    base, dropout = layer.base_layer, layer.lora_dropout[ADAPTER]

    def forward(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        a, b, mask = factors_of(name, layer, x.shape)
        dropped = layer.training and getattr(dropout, "p", 0) > 0
        if _plain(base, x, a) and not dropped and FROZEN not in layer.lora_A:
            return _product(x, base.weight, base.bias, a, b, mask)
        y: Tensor = base(x, *arguments, **named)
        kind = y.dtype
        x = x.to(a.dtype)
        if FROZEN in layer.lora_A:
            second = layer.lora_B[FROZEN](layer.lora_A[FROZEN](x))
            y = y + second * layer.scaling[FROZEN]
        x = dropout(x)
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, a, b, mask = x.to(low), a.to(low), b.to(low), mask.to(low)
        y = y + _product(x, None, None, a, b, mask)
        return y.to(kind)

    return forward


def _product(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, mask: Tensor
) -> Tensor:
    y: Tensor = LoraProduct.apply(x, weight, bias, a, b, mask)  # type: ignore[no-untyped-call]
    return y


def _plain(base: nn.Module, x: Tensor, a: Tensor) -> bool:
    """Whether base layer and adapter are of one type, so that both go into one operation."""
    return (
        type(base) is nn.Linear
        and base.weight.dtype == x.dtype == a.dtype
        and not base.weight.requires_grad
        and not torch.is_autocast_enabled(x.device.type)
    )
