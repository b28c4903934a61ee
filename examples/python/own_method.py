"""A method of your own, in one class, against a published one."""

from prelort import Federation
from prelort.adapters import LoraAdapter
from prelort.aggregation.rankwise_mean import RankwiseMean
from prelort.methods import PrefixMethod
from prelort.methods.averaging import weighting


class HalfStep(PrefixMethod):
    """Segment-wise averaging of which the server takes only half of each round's change."""

    name = "half-step"
    summary = "half of a segment-wise average's change"
    paper = "an example"
    default_objective = "example"

    def aggregator(self, state):
        """What aggregates a round's replies."""
        return HalfStepRound(state, weighting(self.config.weights))


class HalfStepRound:
    """One round: the mean over the holders of each rank dimension, and half of the way there."""

    def __init__(self, state, weight):
        self.state, self.weight = state, weight
        self.mean = RankwiseMean(state.adapter)

    def add(self, update):
        """Take in one client's reply."""
        self.mean.add(update.adapter, self.weight(update))

    def result(self):
        """The state after the round."""
        old = self.state.adapter.tensors()
        new = self.mean.over_holders(self.state.adapter).tensors()
        half = {name: (old[name] + new[name]) / 2 for name in old}
        return self.state.advanced(LoraAdapter.from_tensors(half, self.state.adapter.scale))


rows = [{"text": f"for i in range({n}):\n    print(i)\n"} for n in range(80)]
federation = Federation("embedded", datasets={"a": rows[:40], "b": rows[40:]}, ranks=[2, 8])
results = federation.compare(["prelort", HalfStep], rounds=2, out="runs/own-method")
print(results.summary[["method", "at", "mean"]].to_string(index=False))
