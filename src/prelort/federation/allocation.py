"""Which rank a client has in which round, as far as the server decides it.

By a schedule, or by loss (Byun & Lee, arXiv 2406.17477): all start at the lowest rank; after the
first round, which asks every client, those with the best validation loss get the highest. What the
paper leaves open is read so: the share counts all clients, a client whose first round failed is not
raised, and the loss is one on rows that all share, where one place has the data of all. On its own
rows the client with the fewest topics is the best, whatever it has learned.
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

    def raised(self, losses: Mapping[str, float], clients: int) -> dict[str, int]:
        """The clients to raise, by their validation losses; equal ones by name."""
        count = max(1, round(self.share * clients))
        known = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        best = sorted(known, key=lambda name: (known[name], name))[:count]
        return dict.fromkeys(best, self.high)


@dataclass(frozen=True, slots=True)
class Allocation:
    """``schedule``: round (from 1) -> client -> its rank from that round on."""

    schedule: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    by_loss: ByLoss | None = None

    def asks_everyone(self, server_round: int) -> bool:
        """Whether a round must ask all clients: the one after which they are ranked."""
        return self.by_loss is not None and server_round == 1

    def after(self, server_round: int, losses: Mapping[str, float], clients: int) -> dict[str, int]:
        """The clients whose rank is to change once this round is over."""
        changed = dict(self.schedule.get(server_round + 1, {}))
        if self.by_loss is not None and self.asks_everyone(server_round):
            changed |= self.by_loss.raised(losses, clients)
        return changed

    def levels(self) -> set[int]:
        """The ranks that it may give."""
        planned = {rank for ranks in self.schedule.values() for rank in ranks.values()}
        return planned | ({self.by_loss.high} if self.by_loss is not None else set())
