"""RoLoRA (Chen et al., arXiv 2409.02346): rounds train B and A in turn.

While one factor is frozen and the same for all, the mean of the other is exact, so neither round
has aggregation noise. B goes first: with B = 0, A has no gradient. For mixed ranks, our extension:
prefixes, and each dimension averaged over the clients that hold it. Clients keep nothing between
rounds, so both factors travel down, and only the trained one up.
"""

from __future__ import annotations

from typing import ClassVar

from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod


class RoLora(PrefixMethod):
    """Alternating factors, segment-wise mean of the one that was trained."""

    name: ClassVar[str] = "rolora"
    summary: ClassVar[str] = "rounds train B and A in turn, so that each average is exact"
    paper: ClassVar[str] = "RoLoRA, Chen et al. 2024, arXiv 2409.02346"

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix; rounds 1, 3, 5, ... train B, the others A."""
        prefix = state.adapter.prefix(client.rank)
        return Broadcast(prefix, trains="B" if state.round % 2 == 0 else "A")
