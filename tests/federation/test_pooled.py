import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prelort.adapters import LoraAdapter
from prelort.federation import wire
from prelort.federation.pooled import PooledMetrics, together
from small_federation import AGREEMENT, make_adapter


def reply(examples: int, weight: int) -> wire.EvaluateReply:
    facts = AGREEMENT.header(4).model_dump()
    return wire.EvaluateReply(
        **facts, client="a", round=1, examples=examples, weight=weight, metrics={}
    )


counts = st.integers(1, 50)


@given(
    st.lists(st.tuples(counts, counts, st.floats(0, 5), st.floats(0, 1)), min_size=1, max_size=6)
)
def test_it_is_as_if_all_rows_lay_in_one_place(sites: list[tuple[int, int, float, float]]) -> None:
    pool = PooledMetrics()
    for examples, weight, loss, accuracy in sites:
        metrics = {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}
        pool.add(reply(examples, weight), metrics)
    rows = sum(examples for examples, *_ in sites)
    tokens = sum(weight for _, weight, *_ in sites)
    loss = sum(weight * loss for _, weight, loss, _ in sites) / tokens
    found = pool.metrics()
    assert found["loss"] == pytest.approx(loss)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    assert found["accuracy"] == pytest.approx(sum(e * a for e, _, _, a in sites) / rows)
    assert (pool.examples, pool.clients) == (rows, len(sites))


def test_who_has_measured_nothing_counts_nothing() -> None:
    pool = PooledMetrics()
    pool.add(reply(5, 5), {})
    pool.add(reply(5, 5), {"loss": None, "perplexity": None})
    assert (pool.metrics(), pool.examples, pool.clients) == ({}, 0, 0)


def test_a_metric_that_only_some_could_measure_is_theirs() -> None:
    pool = PooledMetrics()
    pool.add(reply(10, 10), {"loss": 1.0, "rouge_l": 40.0})
    pool.add(reply(30, 30), {"loss": 2.0, "rouge_l": None})
    assert pool.metrics() == {"loss": 1.75, "rouge_l": 40.0}


class TestTogether:
    whole = make_adapter(8)

    def test_prefixes_of_one_adapter_travel_as_one(self) -> None:
        adapters = {rank: self.whole.prefix(rank) for rank in (2, 4, 8)}
        assert together({0: self.whole, **adapters}) == [[8, 4, 2, 0]]

    def test_others_travel_on_their_own(self) -> None:
        adapters = {2: make_adapter(2, seed=5), 4: self.whole.prefix(4), 8: self.whole}
        adapters[1] = adapters[2].prefix(1)
        adapters = {rank: with_extras_of(self.whole, one) for rank, one in adapters.items()}
        assert together(adapters) == [[8, 4], [2, 1]]

    def test_the_base_goes_only_with_its_own_extras(self) -> None:
        assert together({0: make_adapter(8, seed=3), 4: self.whole.prefix(4)}) == [[4], [0]]


def with_extras_of(whole: LoraAdapter, adapter: LoraAdapter) -> LoraAdapter:
    return LoraAdapter(adapter.layers, adapter.scale, whole.modules_to_save)
