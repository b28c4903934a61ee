import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.metrics.scores import (
    HIGHER_IS_BETTER,
    accuracy,
    aurac,
    macro_f1,
    perplexity,
    rouge_l,
)

finite = st.floats(-1e6, 1e6)
ranks = st.integers(1, 512)
labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(labels)
def test_accuracy_and_macro_f1_against_their_definitions(pairs):
    predicted, truth = [p for p, _ in pairs], [t for _, t in pairs]
    assert accuracy(predicted, truth) == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))
    f1 = []
    for label in set(predicted) | set(truth):
        hits = sum(p == t == label for p, t in pairs)
        f1.append(2 * hits / (predicted.count(label) + truth.count(label)))
    assert macro_f1(predicted, truth) == pytest.approx(sum(f1) / len(f1))


@pytest.mark.parametrize("score", [accuracy, macro_f1, rouge_l])
def test_scores_refuse_what_does_not_pair(score):
    with pytest.raises(ValueError, match="2 predictions for 1"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no predictions"):
        score([], [])


batch_sums = st.tuples(st.floats(0, 500), st.integers(1, 60))


@given(st.lists(batch_sums, min_size=1, max_size=8))
def test_perplexity_of_merged_batches_is_the_token_weighted_geometric_mean(batches):
    tokens = sum(n for _, n in batches)
    merged = perplexity(sum(nll for nll, _ in batches), tokens)
    log_mean = sum(n / tokens * (nll / n) for nll, n in batches)
    assert math.log(merged) == pytest.approx(log_mean, abs=1e-9)


def test_perplexity_at_the_edges():
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert perplexity(1e9, 2) == math.inf
    assert perplexity(math.inf, 2) == math.inf
    assert math.isnan(perplexity(math.nan, 2))
    with pytest.raises(ValueError, match="0 tokens"):
        perplexity(1.0, 0)


@given(st.dictionaries(ranks, finite, min_size=1, max_size=8))
def test_aurac_lies_between_the_extremes_whatever_the_order(values):
    area = aurac(values)
    assert min(values.values()) - 1e-6 <= area <= max(values.values()) + 1e-6
    assert aurac(dict(reversed(values.items()))) == area


@given(finite, finite, st.sets(ranks, min_size=2, max_size=8))
def test_aurac_of_a_line_in_log2_rank_is_its_middle(slope, offset, at):
    values = {rank: slope * math.log2(rank) + offset for rank in at}
    middle = (values[min(at)] + values[max(at)]) / 2
    assert aurac(values) == pytest.approx(middle, abs=1e-4, rel=1e-9)


def test_aurac_by_hand():
    # Spans of 1, 1 and 2 octaves: (1.5 + 3 + 2 * 5) / 4.
    assert aurac({2: 1.0, 4: 2.0, 8: 4.0, 32: 6.0}) == pytest.approx(14.5 / 4)
    assert aurac({8: 3.5}) == 3.5
    assert aurac({2: math.inf, 4: 1.0}) == math.inf


@pytest.mark.parametrize("values", [{}, {0: 1.0, 2: 1.0}])
def test_aurac_needs_ranks(values):
    with pytest.raises(ValueError, match="ranks of 1 or more"):
        aurac(values)


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat mat": precision 3/4, recall 3/6.
    f = 2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6)
    one = rouge_l(["the cat, a MAT"], ["the cat sat on the mat"])
    assert one == pytest.approx(100 * f)
    assert rouge_l(["the cat, a mat", ""], ["the cat sat on the mat", "x"]) == pytest.approx(50 * f)
    assert rouge_l(["same words"], ["same words"]) == pytest.approx(100)


def test_every_metric_of_the_configuration_has_a_direction():
    from prelort.config import EvaluationConfig

    annotation = str(EvaluationConfig.model_fields["metrics"].annotation)
    for name in ("accuracy", "macro_f1", "perplexity", "rouge_l"):
        assert name in annotation
        assert name in HIGHER_IS_BETTER
    assert not HIGHER_IS_BETTER["perplexity"]
    assert HIGHER_IS_BETTER["accuracy"]


def test_importing_the_scores_and_the_report_is_cheap():
    code = (
        "import sys, prelort.metrics.scores, prelort.report.tables, prelort.report.page,"
        " prelort.report.write, prelort.report.live\n"
        "heavy = {'torch', 'sklearn', 'nltk', 'rouge_score', 'pandas', 'altair', 'vl_convert'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
