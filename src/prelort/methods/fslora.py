"""FSLoRA (Fang et al., arXiv 2501.19389): federated sketching LoRA.

A client of rank r trains ``B S A``, S a random diagonal matrix with r of R entries at R/r and the
others 0: the dimensions that are not drawn are left out of the forward pass (Fed-PLoRA folds them
in). The server averages the *updates* over all participants, so a dimension that a client did not
draw counts as unchanged:

    x_j <- x_j + sum_{k: j in S_k} p_k (x_k,j - x_j),   sum_k p_k = 1

The paper sends the whole adapter; the client needs the drawn dimensions only, so only these travel.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.errors import ConfigError
from prelort.methods.averaging import Averaging, weighting
from prelort.methods.interface import Broadcast, Client, ServerState
from prelort.methods.prefix import PrefixMethod
from prelort.methods.selection import scale_multiplier_of, select, take, uniform


class FsLora(PrefixMethod):
    """Random sketches of the global adapter, averaged updates."""

    name: ClassVar[str] = "fslora"
    summary: ClassVar[str] = "clients train random sketches; absent dimensions count as unchanged"
    paper: ClassVar[str] = "FSLoRA, Fang et al. 2025, arXiv 2501.19389"
    one_scale: ClassVar[bool] = False
    may_nest: ClassVar[bool] = False

    def sketch(self, state: ServerState, client: Client) -> dict[str, Tensor]:
        """The drawn dimensions of one client and round, by layer."""
        return select(uniform, self.seed, state.round, client, state.adapter)

    def broadcast(self, state: ServerState, client: Client) -> Broadcast:
        """The drawn dimensions at R/r times their scale.

        Raises `ConfigError` where layers differ in rank, since one R/r is not all layers' then.
        """
        whole = state.adapter
        if len({factors.rank for factors in whole.layers.values()}) > 1:
            raise ConfigError(
                "method 'fslora' needs layers of one rank: leave lora.rank_pattern out"
            )
        multiplier = scale_multiplier_of(whole, client.rank, self.name) * whole.rank / client.rank
        return Broadcast(take(whole, self.sketch(state, client)), scale_multiplier=multiplier)

    def aggregator(self, state: ServerState) -> Averaging:
        """The mean of the updates."""
        return Averaging(
            state,
            weighting(self.config.weights),
            RankwiseMean.or_unchanged,
            dimensions_of=lambda client: self.sketch(state, client),
        )
