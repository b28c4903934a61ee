"""FedHL (Peng et al., arXiv 2505.18494): changes from the truncated start, added to the whole.

A client of rank r trains the first r rank dimensions of the global adapter, and the server adds
what it changed to the global adapter that was never truncated:

    A  <-  A + sum_k p_k (A_k - A_k^0)                              (likewise B)

so a dimension that a client lacks is no change. The paper chooses the weights p_k to minimise its
bound on the drift of the gradients; the bound's constants were not at hand, so they are the
configured weights here (our reading).
"""

from __future__ import annotations

from typing import ClassVar

from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.methods.averaging import Finish
from prelort.methods.prefix import PrefixMethod


class FedHL(PrefixMethod):
    """Average the changes of the factors, a missing one counting as none."""

    name: ClassVar[str] = "fedhl"
    summary: ClassVar[str] = "adds changes of truncated factors to the whole global adapter"
    paper: ClassVar[str] = "FedHL, Peng et al. 2025, arXiv 2505.18494"
    finish: ClassVar[Finish] = RankwiseMean.or_unchanged
