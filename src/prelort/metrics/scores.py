"""The scores themselves: plain numbers in, one number out.

scikit-learn and rouge_score are imported where they are used, because the command line imports
this module for its names and should start at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "macro_f1": True,
    "perplexity": False,
    "rouge_l": True,
    "loss": False,
}
"""The direction of every metric that is not a user's own."""


def higher_is_better(metric: str) -> bool:
    """The direction of a metric. Of a user's own, as scikit-learn's, an error or loss is low."""
    return HIGHER_IS_BETTER.get(metric, not metric.endswith(("loss", "error")))


def accuracy(predictions: Sequence[int], truth: Sequence[int]) -> float:
    """The share of predictions that are right, in 0..1; `ValueError` if the lengths differ or 0."""
    from sklearn.metrics import accuracy_score

    _check_pairs(predictions, truth)
    return float(accuracy_score(truth, predictions))


def macro_f1(predictions: Sequence[int], truth: Sequence[int]) -> float:
    """The unweighted mean of the classes' F1, in 0..1; `ValueError` if the lengths differ or 0.

    The mean goes over the classes that occur in the truth or in a prediction, so a class that
    the test set lacks and nobody predicts counts for nothing. A class that is never hit counts 0.
    """
    from sklearn.metrics import f1_score

    _check_pairs(predictions, truth)
    return float(f1_score(truth, predictions, average="macro", zero_division=0))


def perplexity(nll_sum: float, tokens: int) -> float:
    """The exponential of the mean negative log-likelihood per token (nats); inf if too large.

    Sums of several batches added up beforehand give the token-weighted perplexity of all of them.
    Raises `ValueError` where there are no tokens.
    """
    if tokens < 1:
        raise ValueError(f"perplexity of {tokens} tokens is not defined")
    try:
        return math.exp(nll_sum / tokens)
    except OverflowError:
        return math.inf


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure in 0..100 (Lin, 2004; library rouge_score, no stemming).

    The library's words are runs of a-z and 0-9 after lower-casing, so text in other scripts
    scores 0. Raises `ValueError` if the lengths differ or are 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_pairs(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    total = sum(
        float(scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure)
        for prediction, reference in zip(predictions, references, strict=True)
    )
    return 100.0 * total / len(predictions)


def aurac(values: Mapping[int, float]) -> float:
    """Area under the rank curve: the metric's mean over log2(rank), in the metric's own unit.

    ``values`` maps rank to metric. Trapezoids between neighbouring ranks, divided by the span, so
    that a metric that is the same at every rank is its own area. With one rank it is the value.
    Raises `ValueError` for no ranks or a rank below 1.
    """
    if not values or min(values) < 1:
        raise ValueError(f"the area needs ranks of 1 or more, not {sorted(values)}")
    ranks = sorted(values)
    if len(ranks) == 1:
        return float(values[ranks[0]])
    span = math.log2(ranks[-1]) - math.log2(ranks[0])
    area = 0.0
    for low, high in itertools.pairwise(ranks):
        share = (math.log2(high) - math.log2(low)) / span
        area += share * (values[low] / 2 + values[high] / 2)
    return area


def _check_pairs(predictions: Sequence[object], truth: Sequence[object]) -> None:
    if len(predictions) != len(truth):
        raise ValueError(f"{len(predictions)} predictions for {len(truth)} true values")
    if not predictions:
        raise ValueError("a score of no predictions is not defined")
