"""Several adapters in one model, each for its own rows of a batch.

A batch consists of groups of equally many rows, one after the other; group g goes through adapter
``owners[g]`` and each row is truncated at a rank of its own. The base model's weights are used once
for all. Factors are padded with zeros to one rank, which the truncations never let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prelort.adapters import Factors, LoraAdapter, Trained
from prelort.models.fused_lora import fused
from prelort.models.lora import ADAPTER, FROZEN, lora_layers, saved_module_places
from prelort.training.truncation import Truncation

K = TypeVar("K")


def stackable(model: nn.Module) -> bool:
    """Whether several adapters can share the model.

    Nothing must be folded into its base, and modules trained in full must be linear layers.
    """
    folded = any(FROZEN in layer.lora_A for layer in lora_layers(model).values())
    modules = [module for module, _ in saved_module_places(model).values()]
    return not folded and all(type(module) is nn.Linear for module in modules)


class AdapterStack:
    """The numbers of several adapters as matrices, and a `stackable` model that uses them.

    ``factors`` [adapters, numbers of A and B that learn] and ``modules_to_save`` [adapters, numbers
    trained in full]: what is done to all clients is done to a matrix, and what belongs to one
    client is a row. ``ranks``: those of the adapters, whose scales ``scale_multipliers`` multiply.
    """

    def __init__(
        self,
        model: nn.Module,
        truncation: Truncation,
        adapters: Sequence[LoraAdapter],
        *,
        trains: Trained = "AB",
        scale_multipliers: Sequence[float] | None = None,
    ) -> None:
        self._model = model
        self._truncation = truncation
        self._adapters = list(adapters)
        self._owners: Tensor | None = None
        self.ranks = [adapter.rank for adapter in adapters]
        self.device = next(iter(lora_layers(model).values())).lora_A[ADAPTER].weight.device
        self._scale_multipliers = torch.tensor(
            scale_multipliers or [1.0] * len(adapters), device=self.device
        )
        padded = {
            (name, factor): _padded([getattr(a.layers[name], factor) for a in adapters])
            for name in adapters[0].layers
            for factor in "AB"
        }
        learning = {key: t for key, t in padded.items() if key[1] in trains}
        self.factors, views = _as_rows(learning, len(adapters), self.device)
        self._learning = list(views.values())
        self._tensors = {key: t.to(self.device) for key, t in padded.items()} | views
        saved = {
            name: _padded([a.modules_to_save[name] for a in adapters])
            for name in adapters[0].modules_to_save
        }
        self.modules_to_save, self._saved = _as_rows(saved, len(adapters), self.device)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model compute with these adapters; forward passes must be inside `rows`."""
        with fused(self._model, self._factors_of), self._linear_modules():
            yield

    @contextmanager
    def rows(self, owners: Sequence[int], ranks: Tensor, length: int) -> Iterator[None]:
        """Set the adapters of the next batch's rows: group g has those of ``owners[g]``.

        ``ranks`` int64 [rows]: the truncation of each row (0: the base). ``length``: tokens a row.
        """
        everyone = list(owners) == list(range(len(self._adapters)))
        self._owners = None if everyone else torch.tensor(owners, device=self.device)
        with self._truncation.at(ranks, (len(ranks), length)):
            yield

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of `factors` and `modules_to_save`, which are then reset."""
        return (
            _take_gradients(self._learning, self.factors),
            _take_gradients(self._saved.values(), self.modules_to_save),
        )

    def adapter(self, index: int) -> LoraAdapter:
        """One adapter as it is now, at its own rank: float32 copies on the CPU."""
        like = self._adapters[index]
        layers = {
            name: Factors(
                _copy(self._tensors[name, "A"][index][: factors.rank]),
                _copy(self._tensors[name, "B"][index][:, : factors.rank]),
            )
            for name, factors in like.layers.items()
        }
        saved = {name: _copy(tensor[index]) for name, tensor in self._saved.items()}
        return LoraAdapter(layers, like.scale, saved)

    def pairs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """A and B of each layer of one adapter, padded with zeros."""
        names = self._adapters[index].layers
        return [(self._tensors[n, "A"][index], self._tensors[n, "B"][index]) for n in names]

    def _factors_of(
        self, name: str, layer: LoraLayer, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = (self._of_groups(self._tensors[name, factor]) for factor in "AB")
        rank = a.shape[1]
        mask = self._truncation.mask(shape[:-1], rank, a)
        assert mask is not None  # `rows` always sets ranks
        scales = self._of_groups(self._scale_multipliers) * self._adapters[0].scale(rank)
        # As the mask: one number for each row, or for each token of each row.
        scales = scales.repeat_interleave(len(mask) // len(scales))
        return a, b, mask * scales.view(-1, *[1] * (mask.ndim - 1))

    def _of_groups(self, tensor: Tensor) -> Tensor:
        return tensor if self._owners is None else tensor.index_select(0, self._owners)

    @contextmanager
    def _linear_modules(self) -> Iterator[None]:
        """Linear layers that are trained in full, each group with its adapter's own weights."""
        by_module: dict[nn.Module, dict[str, Tensor]] = {}
        for name, (module, attribute) in saved_module_places(self._model).items():
            by_module.setdefault(module, {})[attribute] = self._saved[name]
        for module, tensors in by_module.items():
            module.forward = self._linear(tensors)
        try:
            yield
        finally:
            for module in by_module:
                del module.forward

    def _linear(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight = self._of_groups(tensors["weight"])
            y = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
            if "bias" in tensors:
                y = y + self._of_groups(tensors["bias"])[:, None]
            return y.view(*x.shape[:-1], weight.shape[1])

        return forward


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Float32 [len, *largest shape] on the CPU, smaller ones padded with zeros at their ends."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    padded = torch.zeros(len(tensors), *shape)
    for row, tensor in zip(padded, tensors, strict=True):
        row[tuple(slice(0, size) for size in tensor.shape)] = tensor.detach()
    return padded


def _as_rows(
    tensors: Mapping[K, Tensor], adapters: int, device: torch.device
) -> tuple[Tensor, dict[K, Tensor]]:
    """One matrix with a row for each adapter, and the tensors as views of it that learn."""
    sizes = [tensor[0].numel() for tensor in tensors.values()]
    values = torch.zeros(adapters, sum(sizes), device=device)
    views: dict[K, Tensor] = {}
    for (name, tensor), columns in zip(
        tensors.items(), torch.split(values, sizes, dim=1), strict=True
    ):
        view = columns.view(tensor.shape)
        view.copy_(tensor)
        views[name] = nn.Parameter(view)
    return values, views


def _take_gradients(views: Iterable[Tensor], like: Tensor) -> Tensor:
    gradients = []
    for view in views:
        gradient = torch.zeros_like(view) if view.grad is None else view.grad
        gradients.append(gradient.reshape(len(view), -1))
        view.grad = None
    return torch.cat(gradients, dim=1) if gradients else torch.zeros_like(like)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
