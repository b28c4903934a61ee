"""Metrics of one adapter pooled over clients, each of which measured its own test examples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prelort.adapters import LoraAdapter
from prelort.federation.messages import EvaluateReply
from prelort.metrics import scores


class PooledMetrics:
    """Loss and perplexity as if all test rows were in one place; other metrics as means.

    Accuracy is exact that way too; macro_f1 and rouge_l are means over clients, weighted by their
    examples, which is not the metric of the rows together.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.clients = 0
        self._weight = 0
        self._nll = 0.0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, reply: EvaluateReply, metrics: Mapping[str, float | None]) -> None:
        """The metrics in one client's reply. Without a loss there is nothing to pool."""
        loss = metrics.get("loss")
        if loss is None:
            return
        self.clients += 1
        self.examples += reply.examples
        self._weight += reply.weight
        self._nll += loss * reply.weight
        for name, value in metrics.items():
            if value is not None:
                total, examples = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value * reply.examples, examples + reply.examples)

    def metrics(self) -> dict[str, float]:
        """Metric -> value; empty where no client has measured."""
        values = {name: total / examples for name, (total, examples) in self._sums.items()}
        if self._weight:
            values["loss"] = self._nll / self._weight
            if "perplexity" in values:
                values["perplexity"] = scores.perplexity(self._nll, self._weight)
        return values


def prefix_groups(adapters: Mapping[int, LoraAdapter]) -> list[list[int]]:
    """The ranks in groups: the first of a group's adapters, and those that are prefixes of it.

    Rank 0 stands for the base: a prefix of any adapter with the same modules to save.
    """
    groups: list[list[int]] = []
    for rank in sorted(adapters, reverse=True):
        for group in groups:
            if _is_prefix(adapters[rank], rank, adapters[group[0]]):
                group.append(rank)
                break
        else:
            groups.append([rank])
    return groups


def _is_prefix(adapter: LoraAdapter, rank: int, whole: LoraAdapter) -> bool:
    if adapter.scale != whole.scale or not _equal(adapter.modules_to_save, whole.modules_to_save):
        return False
    return rank == 0 or _equal(adapter.tensors(), whole.prefix(rank).tensors())


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(t, others[n]) for n, t in some.items())
