"""FedIT: federated averaging of LoRA factors (Zhang et al., arXiv 2305.05644).

    A = sum_k p_k A_k,   B = sum_k p_k B_k,   p_k = n_k / sum n          (all ranks equal)

The mean of the factors is not the factor of the mean product; the difference is the method's
aggregation noise. Defined for one rank only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from prelort.errors import ConfigError
from prelort.methods.interface import Client, ServerState
from prelort.methods.objective import Objective, plain
from prelort.methods.prefix import PrefixMethod


class FedIT(PrefixMethod):
    """Weighted mean of A and of B, all clients at one rank."""

    name: ClassVar[str] = "fedit"
    summary: ClassVar[str] = "plain federated averaging of A and B; all clients have one rank"
    paper: ClassVar[str] = "FedIT, Zhang et al. 2023, arXiv 2305.05644"
    may_nest: ClassVar[bool] = False

    def check(self, state: ServerState, clients: Sequence[Client]) -> None:
        """Raise `ConfigError` where ranks differ."""
        ranks = sorted({*state.levels, *(client.rank for client in clients)})
        if len(ranks) > 1:
            raise ConfigError(
                f"method 'fedit' needs one rank for all clients, but they have {ranks}: "
                "set ranks.mix to one rank, or use a method for mixed ranks such as 'prelort'"
            )

    def objective(self, state: ServerState, client: Client) -> Objective:
        """Ordinary LoRA training."""
        return plain(client.rank)
