"""PreLort: prefix-nested LoRA for mixed ranks (Waseem et al., arXiv 2606.15963).

Server: the distinct client ranks 0 = rho_0 < rho_1 < ... < rho_M = R cut the global adapter into
segments (rho_{m-1}, rho_m]. Each segment of A (rows) and of B (columns) becomes the weighted mean
over the clients that hold it:

    A_j = sum_{k: r_k >= j} w_k A_{k,j} / sum_{k: r_k >= j} w_k        (likewise B_j)

A segment that nobody trained this round keeps its value; a missing segment is never a zero.
Client: receives the prefix of its rank, and trains it under several rank truncations
(`prelort.methods.objective`).

The paper's equations were not at hand: segment-wise averaging and training under truncations are
the abstract's words, while the weights (examples) and the sum over truncations are our reading.
"""

from __future__ import annotations

from typing import ClassVar

from prelort.methods.objective import Kind
from prelort.methods.prefix import PrefixMethod


class PreLort(PrefixMethod):
    """The segment-wise aggregation of `PrefixMethod`, with the prefix-nested objective.

    Ablations: ``method.objective = "plain"`` is segment-wise aggregation alone; zero-padding with
    ``method.objective = "example"`` is nested training alone.
    """

    name: ClassVar[str] = "prelort"
    summary: ClassVar[str] = (
        "prefix-nested training, each rank segment averaged over the clients that hold it"
    )
    paper: ClassVar[str] = "PreLort, Waseem et al. 2026, arXiv 2606.15963"
    default_objective: ClassVar[Kind] = "example"
