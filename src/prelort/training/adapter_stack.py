"""Several adapters in one model, each for its own rows of a batch.

A batch consists of groups of equally many rows, one after the other; group g goes through adapter
``owners[g]`` and each row is truncated at a rank of its own. The base model's weights are used once
for all. Factors are padded with zeros to one rank, which the truncations never let through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prelort.adapters import Factors, LoraAdapter, Trained
from prelort.models.fused_lora import fused, linear_by_group
from prelort.models.lora import ADAPTER, FROZEN, lora_layers, saved_module_places
from prelort.training.runtime import ModelRuntime
from prelort.training.truncation import Truncation

Key = tuple[str, str]
"""A tensor's name: of a layer and A or B, or of a module trained in full and nothing."""


def stackable(runtime: ModelRuntime) -> bool:
    """Whether several adapters can share the model.

    Nothing must be folded into its base, modules trained in full must be linear layers, all layers
    on one device, and each must see the rows of the batch.
    """
    model = runtime.model
    devices = {parameter.device for parameter in model.parameters()}
    folded = any(FROZEN in layer.lora_A for layer in lora_layers(model).values())
    modules = [module for module, _ in saved_module_places(model).values()]
    return (
        not folded
        and len(devices) == 1
        and all(type(module) is nn.Linear for module in modules)
        and runtime.by_example()
    )


class AdapterStack:
    """The tensors of several adapters that learn, and a `stackable` model that uses them.

    They are three matrices with a row for each adapter: A and B (those that ``trains`` names) and
    the modules to save. One backward pass gives the gradients of all rows, and each row is a
    parameter of its client's own optimiser. ``scale_multipliers`` multiply the scales of the
    adapters, whose ``ranks`` may differ.
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
        factors = {
            (name, factor): _padded([getattr(a.layers[name], factor) for a in adapters])
            for name in adapters[0].layers
            for factor in "AB"
        }
        saved = {
            (name, ""): _padded([a.modules_to_save[name] for a in adapters])
            for name in adapters[0].modules_to_save
        }
        learning = [
            {key: tensor for key, tensor in factors.items() if key[1] == factor in trains}
            for factor in "AB"
        ]
        self._matrices = [_Matrix(tensors, self) for tensors in (*learning, saved)]
        self._rows = [
            [nn.Parameter(matrix.values.detach()[index]) for matrix in self._matrices]
            for index in range(len(adapters))
        ]
        self._fixed = {
            key: tensor.to(self.device) for key, tensor in factors.items() if key[1] not in trains
        }
        self._tensors = self._views()

    def trainable(
        self, index: int
    ) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """One adapter's parameters, as `models.lora.trainable` has them: a row of each matrix."""
        a, b, saved = ([row] if row.numel() else [] for row in self._rows[index])
        return a, b, saved

    def hand_out_gradients(self) -> None:
        """Give each parameter of `trainable` its gradient, and begin a new step."""
        for number, matrix in enumerate(self._matrices):
            gradient = matrix.values.grad
            for index, rows in enumerate(self._rows):
                rows[number].grad = None if gradient is None else gradient[index]
            matrix.values.grad = None

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
        self._tensors = self._views()
        with self._truncation.at(ranks, (len(ranks), length)):
            yield

    def adapter(self, index: int) -> LoraAdapter:
        """One adapter as it is now, at its own rank: float32 copies on the CPU."""
        like, tensors = self._adapters[index], self._views()
        layers = {
            name: Factors(
                _copy(tensors[name, "A"][index][: factors.rank]),
                _copy(tensors[name, "B"][index][:, : factors.rank]),
            )
            for name, factors in like.layers.items()
        }
        saved = {name: _copy(tensors[name, ""][index]) for name in like.modules_to_save}
        return LoraAdapter(layers, like.scale, saved)

    def pairs(self, index: int) -> list[tuple[Tensor, Tensor]]:
        """A and B of each layer of one adapter, padded with zeros."""
        tensors = self._views()
        names = self._adapters[index].layers
        return [(tensors[n, "A"][index], tensors[n, "B"][index]) for n in names]

    def _views(self) -> dict[Key, Tensor]:
        """The stacked tensors [adapters, ...] as parts of the matrices, for one backward pass."""
        a, b, saved = (matrix.views() for matrix in self._matrices)
        return self._fixed | a | b | saved

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

    def _linear_modules(self) -> AbstractContextManager[None]:
        """Linear layers that are trained in full, each group with its adapter's own weights."""
        names: dict[nn.Linear, dict[str, str]] = {}
        for name, (module, attribute) in saved_module_places(self._model).items():
            assert isinstance(module, nn.Linear)  # `stackable`
            names.setdefault(module, {})[attribute] = name

        def weights_of(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
            own = {
                attribute: self._of_groups(self._tensors[name, ""])
                for attribute, name in names[module].items()
            }
            return own["weight"], own.get("bias")

        return linear_by_group(names, weights_of)


class _Matrix:
    """Stacked tensors [adapters, ...] in one matrix [adapters, numbers] that learns."""

    def __init__(self, tensors: Mapping[Key, Tensor], stack: AdapterStack) -> None:
        self._shapes = {key: tensor.shape for key, tensor in tensors.items()}
        self._sizes = [tensor[0].numel() for tensor in tensors.values()]
        flat = [tensor.flatten(1) for tensor in tensors.values()]
        values = torch.cat([torch.zeros(len(stack.ranks), 0), *flat], dim=1)
        self.values = nn.Parameter(values.to(stack.device))

    def views(self) -> dict[Key, Tensor]:
        """The tensors, as parts of the matrix."""
        parts = torch.split(self.values, self._sizes, dim=1) if self._sizes else ()
        return {
            key: part.view(shape)
            for (key, shape), part in zip(self._shapes.items(), parts, strict=True)
        }


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Float32 [len, *largest shape] on the CPU, smaller ones padded with zeros at their ends."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    padded = torch.zeros(len(tensors), *shape)
    for row, tensor in zip(padded, tensors, strict=True):
        row[tuple(slice(0, size) for size in tensor.shape)] = tensor.detach()
    return padded


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
