"""Several adapters side by side in one model, each for its own rows of a batch.

A batch consists of groups of equally many rows, one after the other; group g goes through adapter
``owners[g]`` and each row is truncated at a rank of its own. The base model's weights are used once
for all. Factors are padded with zeros to one rank, which the truncations never let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

    Nothing must be folded into its base, and what is trained in full must be linear layers.
    """
    folded = any(FROZEN in layer.lora_A for layer in lora_layers(model).values())
    return not folded and saved_modules_are_linear(model)


def saved_modules_are_linear(model: nn.Module) -> bool:
    """Whether all that is trained in full are linear layers, which a `Stack` can tell apart."""
    return all(type(module) is nn.Linear for module, _ in saved_module_places(model).values())


class Stack:
    """The adapters' numbers that learn, one row for each adapter, and the model that uses them.

    The model must be `stackable`; for one adapter alone something may be folded into its base.

    ``factors`` [adapters, numbers of A and B] and ``modules_to_save`` [adapters, numbers trained in full]:
    what is done to all clients is done to a matrix, and what belongs to one client is a row.
    ``scale_multipliers`` multiply the scale of each adapter.
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
        device = next(iter(lora_layers(model).values())).lora_A[ADAPTER].weight.device
        self._gains = torch.tensor(scale_multipliers or [1.0] * len(adapters), device=device)
        tensors = {
            name: _stacked([_factor(a, name) for a in adapters], device)
            for name in _factor_names(adapters[0])
        }
        learning = {name: t for name, t in tensors.items() if name[1] in trains}
        self.factors, learnt = _as_rows(learning, len(adapters), device)
        self._learning = list(learnt.values())
        self._tensors = tensors | learnt
        modules_to_save = {
            n: _stacked([a.modules_to_save[n] for a in adapters], device)
            for n in adapters[0].modules_to_save
        }
        self.modules_to_save, self._modules_to_save = _as_rows(
            modules_to_save, len(adapters), device
        )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the model compute with these adapters while it lasts; only inside `rows`."""
        with ExitStack() as both:
            both.enter_context(fused(self._model, self._factors_of))
            both.enter_context(self._heads())
            yield

    @contextmanager
    def rows(self, owners: Sequence[int], ranks: Tensor, length: int) -> Iterator[None]:
        """Say whose the rows of the next batch are: group g those of adapter ``owners[g]``.

        ``ranks`` int64 [rows]: the truncation of each row (0: the base). ``length``: tokens a row.
        """
        every = list(owners) == list(range(len(self._adapters)))
        device = self._gains.device
        self._owners = None if every else torch.tensor(owners, device=device)
        with self._truncation.at(ranks, (len(ranks), length)):
            yield

    def take_gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of `factors` and `modules_to_save`; they are forgotten here."""
        return _taken(self._learning, self.factors), _taken(
            self._modules_to_save.values(), self.modules_to_save
        )

    def adapter(self, index: int) -> LoraAdapter:
        """One adapter as it is now, at its own rank: float32 copies on the CPU."""
        like = self._adapters[index]
        layers = {
            name: Factors(
                _own(self._tensors[name, "A"][index][: factors.rank]),
                _own(self._tensors[name, "B"][index][:, : factors.rank]),
            )
            for name, factors in like.layers.items()
        }
        modules_to_save = {
            name: _own(tensor[index]) for name, tensor in self._modules_to_save.items()
        }
        return LoraAdapter(layers, like.scale, modules_to_save)

    def pair(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """One adapter's A and B of each layer, padded with zeros."""
        names = self._adapters[index].layers
        return [(self._tensors[n, "A"][index], self._tensors[n, "B"][index]) for n in names]

    def _factors_of(
        self, name: str, layer: LoraLayer, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self._of_groups(self._tensors[name, "A"]), self._of_groups(self._tensors[name, "B"])
        rank = a.shape[1]
        mask = self._truncation.mask(shape[:-1], rank, a)
        assert mask is not None  # `rows` always says ranks
        scale_multipliers = self._of_groups(self._gains) * self._adapters[0].scale(rank)
        # As the mask: one number for each row, or for each token of each row.
        spread = scale_multipliers.repeat_interleave(len(mask) // len(scale_multipliers))
        return a, b, mask * spread.view(-1, *[1] * (mask.ndim - 1))

    def _of_groups(self, tensor: Tensor) -> Tensor:
        return tensor if self._owners is None else tensor.index_select(0, self._owners)

    @contextmanager
    def _heads(self) -> Iterator[None]:
        """Linear layers that are trained in full, each group with its adapter's own weights."""
        by_module: dict[nn.Module, dict[str, Tensor]] = {}
        for name, (module, attribute) in saved_module_places(self._model).items():
            by_module.setdefault(module, {})[attribute] = self._modules_to_save[name]
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


def _factor_names(adapter: LoraAdapter) -> list[tuple[str, str]]:
    return [(name, factor) for name in adapter.layers for factor in "AB"]


def _factor(adapter: LoraAdapter, name: tuple[str, str]) -> Tensor:
    factors = adapter.layers[name[0]]
    return factors.A if name[1] == "A" else factors.B


def _stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Float32 [len, *largest shape], smaller ones padded with zeros at their ends."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stacked = torch.zeros(len(tensors), *shape, device=device)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[tuple(slice(0, size) for size in tensor.shape)] = tensor.detach()
    return stacked


def _as_rows(
    tensors: Mapping[K, Tensor], adapters: int, device: torch.device
) -> tuple[Tensor, dict[K, Tensor]]:
    """One matrix with a row for each adapter, and the tensors as views of it that learn."""
    sizes = {name: tensor[0].numel() for name, tensor in tensors.items()}
    values = torch.zeros(adapters, sum(sizes.values()), device=device)
    leaves: dict[K, Tensor] = {}
    start = 0
    for name, tensor in tensors.items():
        leaf = values[:, start : start + sizes[name]].view(tensor.shape)
        leaf.copy_(tensor)
        leaves[name] = nn.Parameter(leaf)
        start += sizes[name]
    return values, leaves


def _taken(leaves: Iterable[Tensor], like: Tensor) -> Tensor:
    found = []
    for leaf in leaves:
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        found.append(gradient.reshape(len(leaf), -1))
        leaf.grad = None
    return torch.cat(found, dim=1) if found else torch.zeros_like(like)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
