"""FFA-LoRA (Sun et al., arXiv 2403.12313): A is drawn once and frozen, only B is trained.

With one A for all the mean of the products is the product of the mean, ``B = sum_k p_k B_k``: no
aggregation noise, and half the traffic. A is a function of the run's seed, so each client draws it
and only B travels. For mixed ranks, our extension: a client has the first r rows of A, and each
column of B is averaged over the clients that hold it.
"""

from __future__ import annotations

from typing import ClassVar

from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod


class FfaLora(PrefixMethod):
    """Frozen A, segment-wise mean of B."""

    name: ClassVar[str] = "ffa-lora"
    summary: ClassVar[str] = "A is frozen and the same for all, B is averaged exactly"
    paper: ClassVar[str] = "FFA-LoRA, Sun et al. 2024, arXiv 2403.12313"

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The prefix; A is the run's first one, which the client can draw."""
        prefix = state.adapter.prefix(client.rank)
        return Broadcast(prefix, trains="B", seeded_factors="A", factor_seed=self.seed)
