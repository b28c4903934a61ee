"""An adapter's values in blocks: the modules to save, then one block for each rank dimension.

A rank dimension's block has row j of each A and column j of each B, by the tensors' names. So a
client sends the blocks of what it holds, and each block's sum is over its holders: a client of low
rank need not send the zeros of the dimensions that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
MODULES = 0
"""The block of the modules to save; rank dimension j (from 0) is block j + 1."""


def blocks_of(dimensions: Iterable[int]) -> tuple[int, ...]:
    """The blocks of a client that holds these rank dimensions."""
    return (MODULES, *(j + 1 for j in dimensions))


def split(tensors: Mapping[str, Array], rank: int) -> list[Array]:
    """The blocks of an adapter of ``rank``, each of shape [n]; ``tensors`` are by PEFT's names."""
    return [np.concatenate(parts) if parts else np.zeros(0) for parts in _views(tensors, rank)]


def lengths(shapes: Mapping[str, Sequence[int]], rank: int) -> tuple[int, ...]:
    """The number of values of each block of an adapter with these shapes."""
    empty = {name: np.broadcast_to(np.zeros(()), shape) for name, shape in shapes.items()}
    return tuple(sum(part.size for part in parts) for parts in _views(empty, rank))


def join(blocks: Sequence[Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """The inverse of `split`."""
    tensors = {name: np.zeros(shape) for name, shape in shapes.items()}
    for block, parts in zip(blocks, _views(tensors, len(blocks) - 1), strict=True):
        start = 0
        for part in parts:
            part[:] = block[start : start + part.size]
            start += part.size
    return tensors


def _views(tensors: Mapping[str, Array], rank: int) -> Iterator[list[Array]]:
    """The parts of each block, as views of shape [n] into the tensors."""
    names = sorted(tensors)
    yield [tensors[name].reshape(-1) for name in names if ".lora_" not in name]
    for j in range(rank):
        rows = []
        for name in names:
            if name.endswith(".lora_A.weight") and j < tensors[name].shape[0]:
                rows.append(tensors[name][j])
            elif name.endswith(".lora_B.weight") and j < tensors[name].shape[1]:
                rows.append(tensors[name][:, j])
        yield rows
