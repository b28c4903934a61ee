"""One adapter's metrics over the clients that measured it, each on its own test rows."""

from __future__ import annotations

from prelort.federation.wire import EvaluateReply
from prelort.metrics import scores


class Pooled:
    """Loss and perplexity as if all test rows lay in one place; other metrics as means.

    Accuracy is exact that way too; macro_f1 and rouge_l are means over clients, weighted by their
    examples, which is not the metric of the rows together.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.clients = 0
        self._weight = 0
        self._nll = 0.0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, reply: EvaluateReply) -> None:
        """One client's reply. Without a loss it has measured nothing that could be pooled."""
        loss = reply.metrics.get("loss")
        if loss is None:
            return
        self.clients += 1
        self.examples += reply.examples
        self._weight += reply.weight
        self._nll += loss * reply.weight
        for name, value in reply.metrics.items():
            if value is not None:
                total, examples = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value * reply.examples, examples + reply.examples)

    def metrics(self) -> dict[str, float]:
        """Metric -> value; empty where nobody has measured."""
        values = {name: total / examples for name, (total, examples) in self._sums.items()}
        if self._weight:
            values["loss"] = self._nll / self._weight
            if "perplexity" in values:
                values["perplexity"] = scores.perplexity(self._nll, self._weight)
        return values
