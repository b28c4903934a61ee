"""The differentially private mean of a round (McMahan et al., arXiv 1710.06963, with mixed ranks).

Each client's change c_k of what it was sent is clipped as a whole, all layers and modules together,
to the norm C, and a rank dimension that the client lacks is no change:

    S = sum_k c_k min(1, C / |c_k|) + N(0, (z C)^2)
    new_j = old_j + S_j / (q n_j)

q is the probability that a client takes part and n_j the number of clients of the federation that
hold rank dimension j. Both are known before the round, so the sensitivity of S is C, whoever came;
a mean over those that came would have another one. Every client counts the same.

The clip norm follows the median of the changes' norms (Andrew et al., arXiv 1905.03871, eq. 4):
each client adds whether it is below C, which costs a share of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prelort.adapters.algebra import zeros
from prelort.errors import ConfigError
from prelort.methods import trait
from prelort.methods.averaging import needing_only_sums
from prelort.methods.interface import Client, Method, ServerState, Update
from prelort.methods.parts import trained_part, without_zeros
from prelort.privacy.noise import Normal

QUANTILE = 0.5
"""The share of changes below the clip norm that adaptation aims at."""
CLIP_STEP = 0.3
"""How far the logarithm of the clip norm moves in a round, times how far it is off (eta_C)."""
COUNT_NOISE = 3.0
"""The noise multiplier of the count below the clip norm, times that of the whole release: the
changes then get 1 / sqrt(1 - 1 / 9) = 1.06 times its noise."""
CLIP = "privacy.clip"
"""The clip norm's name in the server's memory."""


@dataclass(frozen=True, slots=True)
class Mechanism:
    """Clip norm at the start, noise multiplier z, sampling probability q, whether C adapts."""

    clip: float
    noise_multiplier: float
    rate: float
    adaptive: bool

    def multipliers(self) -> tuple[float, float]:
        """The noise multipliers of the changes and of the count, which compose to the whole's.

        Andrew et al., theorem 1: z^-2 = z_changes^-2 + z_count^-2.
        """
        z = self.noise_multiplier
        if not self.adaptive:
            return z, math.inf
        return z / math.sqrt(1 - COUNT_NOISE**-2), z * COUNT_NOISE


class PrivateMean:
    """The aggregator of a round under differential privacy, for methods that average factors.

    The method decides as ever what becomes of a dimension that only some clients hold
    (`Averaging.result`).

    Args:
        method: one that `check_method` accepts.
        state: before the round.
        clients: all of the federation, whether they are sampled or not.
        mechanism: of this run.
        normal: draws standard normal numbers.
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        clients: Sequence[Client],
        mechanism: Mechanism,
        normal: Normal,
    ) -> None:
        self.averaging = needing_only_sums(method.aggregator(state))
        self.method = method
        self.state = state
        self.clients = clients
        self.mechanism = mechanism
        self.normal = normal
        self.clip = float(state.memory[CLIP]) if CLIP in state.memory else mechanism.clip
        self.sum = zeros(state.adapter)
        self.above_or_below = 0.0
        """Half the number of clients whose change is within the clip norm, less half the others."""

    def add(self, update: Update) -> None:
        """Fold in a client's clipped change."""
        sent = self.method.broadcast(self.state, update.client).trainable
        old = sent.prefix(update.adapter.rank).tensors()
        change = {n: t.double() - old[n].double() for n, t in update.adapter.tensors().items()}
        norm = math.sqrt(sum(float(t.square().sum()) for t in change.values()))
        share = min(1.0, self.clip / norm) if norm > 0 else 1.0
        for name, tensor in self.sum.tensors().items():
            part = change[name]
            # The client's rank dimensions are the first rows of A and the first columns of B.
            tensor[tuple(slice(0, size) for size in part.shape)] += (share * part).float()
        self.above_or_below += 0.5 if norm <= self.clip else -0.5

    def result(self) -> ServerState:
        """The state after the round, with noise on all that is trained."""
        noise, count_noise = self.mechanism.multipliers()
        expected = self.mechanism.rate * len(self.clients)
        untrained = _UNTRAINED[self.method.broadcast(self.state, self.clients[0]).trains]
        for name, tensor in self.sum.tensors().items():
            if not name.endswith(untrained):
                tensor += (self.normal(tensor.shape) * (noise * self.clip)).float()
        assert self.averaging is not None
        self.averaging.add_sums(self.sum, self._expected_holders(), expected)
        after = self.averaging.result()
        memory = dict(after.memory)
        if self.mechanism.adaptive:
            # One client changes the count by 1/2 at most.
            count = self.above_or_below + 0.5 * count_noise * float(self.normal(torch.Size([])))
            below = min(max(count / expected + 0.5, 0.0), 1.0)
            clip = self.clip * math.exp(-CLIP_STEP * (below - QUANTILE))
            memory[CLIP] = torch.tensor(clip, dtype=torch.float64)
        return replace(after, memory=memory)

    def _expected_holders(self) -> dict[str, Tensor]:
        """Layer -> the expected number of holders of each rank dimension, float64 [rank]."""
        # What is broadcast, not the client's own rank: a reference trains all clients at another.
        sent = [self.method.broadcast(self.state, client).trainable for client in self.clients]
        ranks = torch.tensor([adapter.rank for adapter in sent])
        return {
            name: (ranks[:, None] > torch.arange(factors.rank)).sum(0) * self.mechanism.rate
            for name, factors in self.state.adapter.layers.items()
        }


def check_method(method: Method, state: ServerState, clients: Sequence[Client]) -> None:
    """Raise `ConfigError` unless the server needs only the sum of changes of one adapter's parts.

    Args:
        method: of the run.
        state: before a round.
        clients: whose changes are summed.
    """
    probe = without_zeros(state)
    averaging = needing_only_sums(method.aggregator(probe))
    selects = averaging is not None and averaging.dimensions_of is not None
    if averaging is None or selects or trait(method, "personal"):
        raise ConfigError(
            f"[privacy] is not possible with method {method.name!r}, whose server needs more than "
            "the sum of the clients' changes: use prelort, zero-padding, fedit, ffa-lora or rolora"
        )
    for client in clients:
        trained_part(method, probe, client, probe.adapter, "privacy.epsilon")


_UNTRAINED = {"AB": (), "A": (".lora_B.weight",), "B": (".lora_A.weight",)}
"""What is trained -> the ends of the names of the tensors that are not."""
