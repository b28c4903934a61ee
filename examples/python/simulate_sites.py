"""Simulate sites: which rank each machine affords, uneven shares of a data set, own metrics."""

import numpy as np
from transformers import EvalPrediction

import prelort
from prelort import Federation
from prelort.config import PartitionConfig

# Of toys, as the embedded model is one: for a real one, such as 8GB and 24GB.
machines = {"laptop": "11.5MB", "desktop": "12MB", "server": "16MB"}
settings = {"data": {"max_length": 64}, "training": {"batch_size": 4}}

config = Federation("embedded", **settings).config
plans = [prelort.plan(config, memory=memory, ranks=[2, 4, 8, 16]) for memory in machines.values()]
ranks = [min(plan.largest.rank, 16) if plan.largest else 1 for plan in plans]
print(dict(zip(machines, ranks, strict=True)))


def next_token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of tokens that the model finds most likely where they come."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"token_accuracy": float(np.mean((guesses == labels)[labels != -100]))}


federation = Federation(
    "embedded",
    datasets=[{"text": f"class C{n}:\n    size = {n}\n"} for n in range(90)],
    partition=PartitionConfig(by="quantity", clients=3, alpha=2.0, min_examples=6),
    ranks=ranks,
    compute_metrics=next_token_accuracy,
    **settings,
)
result = federation.run(rounds=2, out="runs/sites")
print(result.to_pandas().query("metric == 'token_accuracy' and round > 0"))
