"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is shared, B and the head stay with the client.

Each client trains both factors; only A travels and is averaged, for mixed ranks (our extension)
each row over the clients that hold it. There is no global model: only the clients can measure
theirs, on their own rows.
"""

from __future__ import annotations

from typing import ClassVar

from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod


class FedSaLora(PrefixMethod):
    """Shared A, personal B."""

    name: ClassVar[str] = "fedsa-lora"
    summary: ClassVar[str] = "only A is shared; B and the head are each client's own"
    paper: ClassVar[str] = "FedSA-LoRA, Guo et al. 2024, arXiv 2410.01463"
    one_scale: ClassVar[bool] = False
    personal: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The first rows of A; the client completes them with its own B."""
        return Broadcast(state.adapter.prefix(client.rank), personal=True)
