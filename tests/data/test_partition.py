from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st

from prelort.config import PartitionConfig
from prelort.data.partition import Part, partition
from prelort.errors import ConfigError

SCHEMES = ("iid", "dirichlet", "quantity", "shards")


def rows_of(labels: Sequence[Any], column: str = "label") -> Dataset:
    return Dataset.from_dict({column: list(labels), "row": list(range(len(labels)))})


def config(**values: Any) -> PartitionConfig:
    return PartitionConfig(**{"min_examples": 2, **values})


def sizes(parts: Sequence[Part]) -> list[int]:
    return [len(part.indices) for part in parts]


def histogram(parts: Sequence[Part], labels: Sequence[Any]) -> list[Counter[Any]]:
    return [Counter(labels[i] for i in part.indices) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    by=st.sampled_from(SCHEMES),
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    clients=st.integers(1, 12),
    min_examples=st.integers(1, 5),
    alpha=st.floats(1e-6, 1e6),
    shards=st.integers(1, 3),
    seed=st.integers(0, 2**64),
)
def test_every_row_has_one_client_with_a_minimum_and_by_the_seed(
    by: str,
    labels: list[int],
    clients: int,
    min_examples: int,
    alpha: float,
    shards: int,
    seed: int,
) -> None:
    needed = clients * max(min_examples, shards if by == "shards" else 0)
    settings_ = config(
        by=by, clients=clients, min_examples=min_examples, alpha=alpha, shards_per_client=shards
    )
    rows = rows_of(labels)
    if len(labels) < needed:
        with pytest.raises(ConfigError, match=f"there are {len(labels)}"):
            partition(rows, settings_, "label", seed)
        return
    parts = partition(rows, settings_, "label", seed)
    assert len({part.name for part in parts}) == len(parts) == clients
    assert sorted(i for part in parts for i in part.indices) == list(range(len(labels)))
    assert min(sizes(parts)) >= min_examples
    assert all(list(part.indices) == sorted(part.indices) for part in parts)
    assert partition(rows, settings_, "label", seed) == parts


def _mean_entropy(parts: Sequence[Part], labels: Sequence[int]) -> float:
    entropies = []
    for counts in histogram(parts, labels):
        total = counts.total()
        entropies.append(-sum(n / total * math.log(n / total) for n in counts.values()))
    return float(np.mean(entropies))


def test_dirichlet_is_more_even_with_a_larger_alpha() -> None:
    labels = [i % 5 for i in range(2000)]
    mean = [
        _mean_entropy(
            partition(rows_of(labels), config(by="dirichlet", clients=10, alpha=a), "label", 0),
            labels,
        )
        for a in (0.05, 1.0, 1000.0)
    ]
    assert mean[0] < 0.7 < mean[1] < 1.5 < mean[2] <= math.log(5)


def test_quantity_is_uneven_in_size_but_not_in_label() -> None:
    labels = [i % 2 for i in range(4000)]
    parts = partition(rows_of(labels), config(by="quantity", clients=5, alpha=0.5), None, 3)
    assert max(sizes(parts)) > 3 * min(sizes(parts))
    for counts in histogram(parts, labels):
        if counts.total() >= 300:
            assert abs(counts[0] / counts.total() - 0.5) < 0.12


def test_shards_give_each_client_few_labels() -> None:
    labels = [i % 10 for i in range(1000)]
    parts = partition(
        rows_of(labels), config(by="shards", clients=10, shards_per_client=2), "label", 0
    )
    assert sizes(parts) == [100] * 10
    assert all(len(counts) <= 2 for counts in histogram(parts, labels))


def test_column_gives_one_client_per_value_largest_first_then_by_name() -> None:
    parts = partition(rows_of(["b", "a", "b", "c", "a", "c", "c"], "client"), config(), None, 0)
    assert parts == [Part("c", (3, 5, 6)), Part("a", (1, 4)), Part("b", (0, 2))]


def test_column_names_are_those_of_a_class_label_or_digits() -> None:
    features = Features({"kind": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"kind": [1, 0, 1, 0]}, features=features)
    assert {p.name for p in partition(rows, config(column="kind"), None, 0)} == {"cat", "dog"}
    numbers = partition(rows_of([7, 7, 12, 12], "id"), config(column="id"), None, 0)
    assert [part.name for part in numbers] == ["12", "7"]


@pytest.mark.parametrize("name", ["client", "Client", "CLIENT_ID"])
def test_a_column_of_clients_is_found_by_its_name(name: str) -> None:
    rows = Dataset.from_dict({"label": range(8), name: ["a", "b"] * 4})
    assert [part.name for part in partition(rows, config(), "label", 0)] == ["a", "b"]


@pytest.mark.parametrize("by", ["dirichlet", "shards"])
def test_the_configured_column_goes_before_the_label(by: str) -> None:
    rows = Dataset.from_dict({"label": [0] * 40, "kind": [i % 2 for i in range(40)]})
    settings_ = config(by=by, clients=4, alpha=0.01, column="kind", shards_per_client=1)
    kinds = rows["kind"][:]
    parts = partition(rows, settings_, "label", 0)
    assert any(len(counts) == 1 for counts in histogram(parts, kinds))


@pytest.mark.parametrize(
    "values, label, message",
    [
        ({"by": "iid", "clients": 6, "min_examples": 2}, None, "needs 12 rows"),
        ({"by": "shards", "clients": 5, "shards_per_client": 3}, "label", "needs 15 rows"),
        ({"by": "dirichlet", "clients": 2}, None, "needs a label"),
        (
            {"by": "dirichlet", "clients": 2, "column": "lable"},
            "label",
            "'lable' is not a column: .* 'label', 'row'",
        ),
        ({"by": "column", "column": "who"}, None, "'who' is not a column"),
        ({"by": "column"}, None, r"partition\.column is not set.* 'label'"),
        ({"by": "column", "column": "row"}, None, "0 of the 10 values of column 'row'"),
        (
            {"by": "column", "column": "label", "clients": 3, "min_examples": 4},
            None,
            "2 of the 2 values of column 'label'",
        ),
    ],
)
def test_a_wrong_partition_is_one_sentence(
    values: dict[str, Any], label: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(rows_of([i % 2 for i in range(10)]), config(**values), label, 0)


@pytest.mark.parametrize("missing", [None, ""])
def test_names_the_row_without_a_client(missing: str | None) -> None:
    rows = rows_of(["a", "a", missing, "b"], "client")
    with pytest.raises(ConfigError, match="row 3 has no value in column 'client'"):
        partition(rows, config(), None, 0)


def test_auto_keeps_natural_clients_and_else_deals_evenly() -> None:
    natural = rows_of(["a", "a", "b", "b"], "client")
    assert [part.name for part in partition(natural, config(by="auto"), None, 0)] == ["a", "b"]
    named = rows_of(["a", "a", "b", "b"], "who")
    by_name = partition(named, config(by="auto", column="who"), None, 0)
    assert [part.name for part in by_name] == ["a", "b"]
    plain = rows_of(["x"] * 100, "text")
    assert sizes(partition(plain, config(by="auto"), None, 0)) == [7] * 4 + [6] * 12
    assert sizes(partition(plain, config(by="auto", clients=5), None, 0)) == [20] * 5
    for by in ("iid", "quantity"):
        assert len(partition(plain, config(by=by), None, 0)) == 16
    assert sizes(partition(rows_of(["x"] * 5, "text"), config(by="auto"), None, 0)) == [3, 2]
