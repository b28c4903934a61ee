"""What the methods that average products have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.aggregation.products import rescaled
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod


class ProductMethod(PrefixMethod):
    """The global adapter's slots are singular triples in falling order; clients get the first."""

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The best approximation of the client's rank."""
        return Broadcast(self.global_adapter(state, client.rank))

    def global_adapter(self, state: ServerState, rank: int | None = None) -> LoraAdapter:
        """The best approximation of this rank (None: the whole)."""
        return state.adapter if rank is None else rescaled(state.adapter, rank)


def remembered(memory: Mapping[str, Tensor], key: str, like: LoraAdapter) -> LoraAdapter | None:
    """The adapter that the server's memory holds under ``key``, without extras."""
    start = f"{key}:"
    tensors = {n.removeprefix(start): t for n, t in memory.items() if n.startswith(start)}
    return LoraAdapter.from_tensors(tensors, like.scale) if tensors else None


def memorised(key: str, adapter: LoraAdapter) -> dict[str, Tensor]:
    """The factors of an adapter as the server's memory keeps them under ``key``."""
    bare = replace(adapter, modules_to_save={})
    return {f"{key}:{name}": tensor for name, tensor in bare.tensors().items()}
