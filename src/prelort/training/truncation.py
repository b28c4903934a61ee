"""Truncating the installed adapter to a prefix, for a whole batch or for each example.

A hook between A and B of every LoRA layer multiplies the r-dimension by a row of a small table:
dimension j of a truncation rho is kept if j < rho, at the scale s(rho) / s(rank of the layer). The
base layer is not touched, so quantised bases, mixed precision and gradient checkpointing keep
working, and an untruncated pass costs nothing. The product of stacked experts is added to their
weights, which all rows share: there one row of the table holds for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from prelort.adapters import ScaleRule
from prelort.errors import ConfigError
from prelort.models import expert_lora
from prelort.models.fused_lora import fused
from prelort.models.lora import ADAPTER, lora_layers


def _one_group(weight: Tensor) -> Tensor:
    return weight[None]


class Truncation:
    """The truncation in use, for the LoRA layers of one model.

    Stays valid when another adapter is installed. `detach` removes the hooks.
    """

    def __init__(self, model: nn.Module, scale: ScaleRule) -> None:
        self.by_example: bool | None = None
        """`ModelRuntime.by_example`, once that was tried."""
        self.own_gradients = False
        """Whether `ExampleGradients.check` has passed."""
        self.separates: bool | None = None
        """Whether `ModelRuntime.check_packing` found examples of a row independent, once tried."""
        self._scale = scale
        self._ranks: int | Tensor | None = None
        self._tokens: tuple[int, int] | None = None
        self._tables: dict[tuple[int, torch.device], Tensor] = {}
        self._masks: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        layers = lora_layers(model).values()
        self._stacks = [layer for layer in layers if isinstance(layer, ParamWrapper)]
        self._handles = [
            layer.lora_A[ADAPTER].register_forward_hook(self._hook)
            for layer in layers
            if not isinstance(layer, ParamWrapper)
        ]
        for layer in self._stacks:
            layer.forward = partial(self._through_experts, layer)

    @contextmanager
    def fused(
        self, model: nn.Module, groups_of: Callable[[Tensor], Tensor] = _one_group
    ) -> Iterator[None]:
        """Compute each LoRA layer in one operation, truncated as by the hooks.

        Faster, and the same but for rounding (`prelort.models.fused_lora`). ``groups_of``: from a
        factor to those of groups of rows [groups, *shape].
        """

        def factors_of(
            name: str, layer: LoraLayer, shape: torch.Size
        ) -> tuple[Tensor, Tensor, Tensor]:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            scale = torch.full((), layer.scaling[ADAPTER], dtype=a.dtype, device=a.device)
            mask = self.mask(shape[:-1], a.shape[0], a)
            return groups_of(a), groups_of(b), scale if mask is None else mask * scale

        with fused(model, factors_of):
            yield

    @contextmanager
    def at(
        self, ranks: int | Tensor | None, tokens: tuple[int, int] | None = None
    ) -> Iterator[None]:
        """Truncate every forward pass inside; keep the backward pass inside too.

        ``ranks``: None (the whole adapter), one rank for the batch (0: the base model), or an
        int64 tensor [batch], or [rows, length] for each token. ``tokens``: batch and length of the
        batch (0: any), needed where a model flattens them to one dimension before its linear
        layers.
        """
        before = self._ranks, self._tokens, self._masks
        self._ranks, self._tokens, self._masks = ranks, tokens, {}
        try:
            yield
        finally:
            self._ranks, self._tokens, self._masks = before

    def detach(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        for layer in self._stacks:
            del layer.forward

    def mask(self, rows: torch.Size, rank: int, like: Tensor) -> Tensor | None:
        """The factors of ``A x`` [*rows, rank], None where nothing is cut.

        Type and device are those of ``like``. Raises `ConfigError` where each example has its own
        truncation and a layer's rows are not the batch's.
        """
        if self._ranks is None:
            return None
        mask = self._row(rank, like)
        if mask.ndim == 1:
            return mask
        if mask.ndim == 3:
            if rows.numel() == mask.shape[:2].numel():
                return mask.view(*rows, mask.shape[2])
        elif rows[0] == mask.shape[0]:
            return mask.view(mask.shape[0], *[1] * (len(rows) - 1), mask.shape[1])
        if self._tokens is not None and len(rows) == 1:
            batch, length = self._tokens
            length = length or rows[0] // batch
            if rows[0] == batch * length:
                return mask.repeat_interleave(length, dim=0)
        raise ConfigError(
            f"method.objective = 'example' does not work with this model: a layer sees "
            f"{list(rows)} rows for a batch of {mask.shape[0]}; use 'step' or 'mean'"
        )

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        mask = self.mask(output.shape[:-1], output.shape[-1], output)
        return None if mask is None else output * mask

    def _through_experts(self, layer: ParamWrapper, *arguments: Any, **named: Any) -> Tensor:
        mask = None
        if self._ranks is not None:
            mask = self._row(layer.r[ADAPTER], layer.lora_A[ADAPTER].weight)
            if mask.ndim > 1:
                raise ConfigError(
                    "method.objective = 'example' does not work with lora.target_parameters: all "
                    "examples of a batch share an expert's weights; use 'step' or 'mean'"
                )
        return expert_lora.forward(layer, mask, *arguments, **named)

    def _row(self, rank: int, like: Tensor) -> Tensor:
        """The factors of the ranks in use: [rank], or [*ranks, rank]; made once a pass."""
        key = (rank, like.device, like.dtype)
        if key not in self._masks:
            ranks = self._ranks
            table = self._table(rank, like.device)
            if isinstance(ranks, Tensor):
                index: int | Tensor = ranks.to(like.device).clamp(max=rank)
            else:
                index = min(int(ranks or 0), rank)
            self._masks[key] = table[index].to(like.dtype)
        return self._masks[key]

    def _table(self, rank: int, device: torch.device) -> Tensor:
        """[rank + 1, rank]: row rho keeps the first rho dimensions at s(rho) / s(rank)."""
        key = (rank, device)
        if key not in self._tables:
            table = torch.tril(torch.ones(rank + 1, rank), diagonal=-1)
            scales = [self._scale(rho) / self._scale(rank) for rho in range(rank + 1)]
            self._tables[key] = (table * torch.tensor(scales)[:, None]).to(device)
        return self._tables[key]
