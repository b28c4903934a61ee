"""Adapters in the server's memory: `ServerState.memory` holds tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prelort.adapters import LoraAdapter


def store(key: str, adapter: LoraAdapter) -> dict[str, Tensor]:
    """The factors of an adapter as tensors for the memory, under names that begin with ``key``."""
    return {f"{key}:{name}": tensor for name, tensor in adapter.bare().tensors().items()}


def recall(memory: Mapping[str, Tensor], key: str, like: LoraAdapter) -> LoraAdapter | None:
    """The adapter stored under ``key``, at the scale rule of ``like`` and with its layers only."""
    start = f"{key}:"
    tensors = {n.removeprefix(start): t for n, t in memory.items() if n.startswith(start)}
    return LoraAdapter.from_tensors(tensors, like.scale).select(like.layers) if tensors else None
