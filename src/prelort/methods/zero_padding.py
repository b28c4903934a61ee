"""Zero-padding: the baseline that fills a client's missing dimensions with zeros.

    A_j = sum_{k: r_k >= j} w_k A_{k,j} / sum_k w_k                     (likewise B_j)

A dimension held by a share p of the weight keeps p of each factor, so p^2 of its product: what the
high-rank clients learned is diluted. A dimension that no reply of a round holds keeps its value (as
zeros in both factors it could never learn again). Widely used as a baseline (e.g. in FLoRA,
arXiv 2409.05976).
"""

from __future__ import annotations

from typing import ClassVar

from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.methods.averaging import Finish
from prelort.methods.prefix import PrefixMethod


class ZeroPadding(PrefixMethod):
    """Pad every reply with zeros to the global rank and average."""

    name: ClassVar[str] = "zero-padding"
    summary: ClassVar[str] = "missing dimensions count as zeros in a plain average (baseline)"
    paper: ClassVar[str] = "baseline of FLoRA, Wang et al. 2024, arXiv 2409.05976, and others"
    finish: ClassVar[Finish] = RankwiseMean.over_everyone
