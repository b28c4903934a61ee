"""Ranks that the server allocates to clients, by a schedule or by loss.

By loss (Byun & Lee, arXiv 2406.17477): all clients start at the lowest rank and train in the first
round, after which those with the best validation loss get the highest rank. Our reading where the
paper is silent: the share is of all clients, a client whose first round failed is not raised, and
where one machine has all data the loss is on shared rows. On its own rows the client with the
fewest topics would be the best, whatever it has learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ByLoss:
    """Raise the best ``share`` of the clients to ``high`` after the first round."""

    high: int
    share: float

    def select(self, losses: Mapping[str, float], clients: int) -> dict[str, int]:
        """The clients to raise -> their new rank; clients of equal loss are in order of names."""
        count = max(1, round(self.share * clients))
        finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        best = sorted(finite, key=lambda name: (finite[name], name))[:count]
        return dict.fromkeys(best, self.high)


@dataclass(frozen=True, slots=True)
class Allocation:
    """``schedule``: round (from 1) -> client -> its rank from that round on."""

    schedule: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    by_loss: ByLoss | None = None

    def needs_all_clients(self, server_round: int) -> bool:
        """Whether all clients train in a round: after it they are ranked by loss."""
        return self.by_loss is not None and server_round == 1

    def after(self, server_round: int, losses: Mapping[str, float], clients: int) -> dict[str, int]:
        """Client -> its rank after this round, for those whose rank changes."""
        changed = dict(self.schedule.get(server_round + 1, {}))
        if self.by_loss is not None and self.needs_all_clients(server_round):
            changed |= self.by_loss.select(losses, clients)
        return changed

    def levels(self) -> set[int]:
        """All ranks that it may allocate."""
        planned = {rank for ranks in self.schedule.values() for rank in ranks.values()}
        return planned | ({self.by_loss.high} if self.by_loss is not None else set())
