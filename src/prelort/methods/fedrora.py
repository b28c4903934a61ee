"""FedRoRA (Wang et al., arXiv 2609.00632): shared directions, personal magnitudes and selection.

Clients train ``Delta W_i = B~ S A~`` with unit columns of B~, unit rows of A~ and a diagonal S. The
server takes the SVD of the mean product and projects each client's own product on its directions:

    sum_i p_i Delta W_i = U Sigma V',    s_k^(i) = u_k' Delta W_i v_k                (eq. 8, 9)

Client i receives the r_i directions with the largest |s_k^(i)|, at these magnitudes (eq. 10-12). So
clients of one rank receive different adapters, and there is no global model. In the first round
each draws its directions, at magnitudes 1/sqrt(r_i).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from prelort.adapters import Factors
from prelort.config import Section
from prelort.methods.flexlora import FlexLora
from prelort.methods.interface import Aggregator, Broadcast, Client, ServerState, Update
from prelort.seeds import torch_generator

NEARLY_ZERO = 1e-6
"""The magnitude of an empty direction after the first round: with 0, B would not hold it."""


class FedRoraOptions(Section):
    """``[method.options.fedrora]``: the magnitudes' learning rate over that of the directions."""

    magnitude_rate_ratio: Annotated[float, Field(gt=0.0)] = 100.0


class FedRora(FlexLora):
    """Each client's own selection of the mean's singular directions, at its own magnitudes."""

    name: ClassVar[str] = "fedrora"
    summary: ClassVar[str] = "SVD of the mean product; each client has its own part and magnitudes"
    paper: ClassVar[str] = "FedRoRA, Wang et al. 2026, arXiv 2609.00632"
    Options: ClassVar[type[Section]] = FedRoraOptions
    personal: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The client's own directions: unit rows of A, and of B unit columns times magnitudes.

        A client that has not trained yet receives those of the mean product.
        """
        scale, layers = state.adapter.scale, {}
        for name, factors in state.adapter.layers.items():
            columns, magnitudes, rows = triples(factors)
            magnitudes = state.memory.get(_key(name, client.name), scale(factors.rank) * magnitudes)
            rank = min(client.rank, factors.rank)
            chosen = magnitudes.abs().topk(rank).indices.sort().values
            columns, magnitudes, rows = columns[:, chosen], magnitudes[chosen], rows[chosen]
            empty = magnitudes == 0
            generator = torch_generator(self.seed, "directions", client.name, name)
            rows = torch.where(empty[:, None], _unit_rows(rows, generator), rows)
            columns = torch.where(empty, _unit_rows(columns.T, generator).T, columns)
            of_empty = rank**-0.5 if state.round == 0 else NEARLY_ZERO
            magnitudes = torch.where(empty, of_empty, magnitudes)
            layers[name] = Factors(rows, columns * (magnitudes / scale(rank)))
        return Broadcast(
            replace(state.adapter, layers=layers),
            magnitude_rate_ratio=self.options.magnitude_rate_ratio,
        )

    def aggregator(self, state: ServerState) -> Personalised:
        """FlexLoRA's, and each client's magnitudes along the new directions."""
        return Personalised(state, super().aggregator(state))


class Personalised:
    """Keeps the round's replies, to project them on the directions of their mean."""

    def __init__(self, state: ServerState, mean: Aggregator) -> None:
        self.state = state
        self.mean = mean
        self.updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Fold in a reply's product, and keep it."""
        self.mean.add(update)
        self.updates.append(update)

    def result(self) -> ServerState:
        """The state after the round.

        Of a client without a reply in it, what is known along the old directions is projected.
        """
        after, memory = self.mean.result(), {}
        for name, factors in after.adapter.layers.items():
            columns, _, rows = triples(factors)
            old_columns, _, old_rows = triples(self.state.adapter.layers[name])
            for key, magnitudes in self.state.memory.items():
                if key.startswith(_key(name, "")):
                    known = Factors(old_rows, old_columns * magnitudes)
                    memory[key] = along(columns, rows, known)
            for update in self.updates:
                own = update.adapter.layers[name]
                found = update.adapter.scale(own.rank) * along(columns, rows, own)
                memory[_key(name, update.client.name)] = found
        return replace(after, memory=memory)


def triples(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Unit columns [d_out, r], magnitudes [r] and unit rows [r, d_in] of B A."""
    lengths = factors.B.norm(dim=0) * factors.A.norm(dim=1)
    return normalize(factors.B, dim=0), lengths, normalize(factors.A, dim=1)


def along(columns: Tensor, rows: Tensor, factors: Factors) -> Tensor:
    """The magnitudes u_k' B A v_k [R] of a product along directions (eq. 9).

    ``columns``: u_k [d_out, R]; ``rows``: v_k [R, d_in].
    """
    left, right = columns.double().T @ factors.B.double(), rows.double() @ factors.A.double().T
    return (left * right).sum(dim=1).float()


def _unit_rows(like: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn rows of length 1 in the shape, type and place of ``like``."""
    return normalize(torch.randn(like.shape, generator=generator), dim=1).to(like)


def _key(layer: str, client: str) -> str:
    """The name of a client's magnitudes in the memory; a layer's name has no colon."""
    return f"{layer}:{client}"
