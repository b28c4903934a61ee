from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from prelort import config
from prelort.config import Config
from prelort.data.federated import FederatedRows, load
from prelort.errors import ConfigError

Rows = list[dict[str, Any]]
Write = Callable[[str, Rows], str]


def configured(source: str, **values: Any) -> Config:
    data = {"source": source, **values.pop("data", {})}
    defaults = {"task": "classification", "partition": {"by": "iid", "clients": 4}}
    return config.check({**defaults, **values, "data": data})


def labelled(number: int, classes: Sequence[Any] = ("a", "b", "c")) -> Rows:
    return [{"text": f"t{i}", "label": classes[i % len(classes)], "id": i} for i in range(number)]


def ids(rows: Dataset) -> list[int]:
    return list(rows["id"][:])


def as_lists(rows: FederatedRows) -> list[Any]:
    clients = [(c.name, c.rank, ids(c.train), c.test and ids(c.test)) for c in rows.clients]
    return [clients, ids(rows.test), rows.labels]


def test_holds_out_a_share_of_each_client(write: Write) -> None:
    rows = load(configured(write("train", labelled(200)), data={"test_fraction": 0.3}))
    assert [(len(c.train), len(c.test)) for c in rows.clients] == [(35, 15)] * 4  # type: ignore[arg-type]
    everything = [i for c in rows.clients for i in ids(c.train)] + ids(rows.test)
    assert sorted(everything) == list(range(200))
    assert ids(rows.test) == [i for c in rows.clients for i in ids(c.test)]  # type: ignore[arg-type]
    assert rows.labels == ("a", "b", "c")
    assert rows.label_column == "label"
    assert rows.dropped == ()


@pytest.mark.parametrize(
    "task, row, other",
    [
        ("causal-lm", {"messages": [{"role": "user", "content": "a"}]}, "chat"),
        ("chat", {"prompt": "a", "completion": "b"}, "instruction"),
        ("instruction", {"prompt": [], "completion": []}, "chat"),
        ("classification", {"text": ["a"], "label": "b"}, None),
    ],
)
def test_says_which_task_reads_such_rows(
    write: Write, task: str, row: dict[str, Any], other: str | None
) -> None:
    with pytest.raises(ConfigError) as raised:
        load(configured(write("train", [row] * 8), task=task))
    assert str(raised.value).partition("; task = ")[2] == (
        f'"{other}" reads such rows' if other else ""
    )


def by_client(sizes: dict[str, int]) -> Rows:
    names = [name for name, size in sizes.items() for _ in range(size)]
    return [{"text": "t", "client": name, "id": i} for i, name in enumerate(names)]


def test_a_clients_held_out_rows_do_not_depend_on_the_others(write: Write) -> None:
    values: dict[str, Any] = {"task": "causal-lm", "partition": {}}
    held = []
    for name, others in (("one", 40), ("two", 20)):
        rows = load(configured(write(name, by_client({"a": 30, "b": others})), **values))
        (client,) = [c for c in rows.clients if c.name == "a"]
        assert client.test is not None
        held.append(ids(client.test))
    assert held[0] == held[1]


def test_a_client_of_one_row_is_left_out_where_one_must_be_held_out(write: Write) -> None:
    rows = [{"text": "t", "client": name} for name in "aaab"]
    values: dict[str, Any] = {
        "task": "causal-lm",
        "partition": {"min_examples": 1},
        "ranks": {"mix": "4*1"},
    }
    source = write("train", rows)
    loaded = load(configured(source, **values))
    assert [c.name for c in loaded.clients] == ["a"]
    assert [(d.name, d.rows, d.reason) for d in loaded.dropped] == [("b", 1, "too few rows")]
    given = load(configured(source, data={"test": write("test", rows)}, **values))
    assert [c.name for c in given.clients] == ["a", "b"]


@pytest.mark.parametrize("names", [("a", "b"), (1, 2)])
def test_natural_clients_own_the_rows_of_a_given_test_set_that_say_so(
    write: Write, names: tuple[Any, Any]
) -> None:
    train = [{"text": f"t{i}", "label": "xy"[i % 2], "who": names[i % 2]} for i in range(8)]
    test = [{"text": f"t{i}", "label": "xy"[i % 2], "who": (*names, 9)[i % 3]} for i in range(9)]
    values = {"partition": {"by": "column", "column": "who"}}
    loaded = load(configured(write("train", train), data={"test": write("test", test)}, **values))
    assert len(loaded.test) == 9  # nobody's rows count for the global adapter, too
    for client in loaded.clients:
        assert client.test is not None
        assert [str(who) for who in client.test["who"][:]] == [client.name] * 3
        assert len(client.train) == 4
    less = {"data": {"test": write("test", test), "max_test_examples": 4}, **values}
    drawn = load(configured(write("train", train), **less))
    own = [text for client in drawn.clients if client.test for text in client.test["text"][:]]
    assert set(own) <= set(drawn.test["text"][:])
    assert len(drawn.test) == 4


def test_limits_draw_by_the_seed(write: Write) -> None:
    train, test = write("train", labelled(200)), write("test", labelled(100))
    limits = {"test": test, "max_train_examples": 50, "max_test_examples": 30}
    drawn = [load(configured(train, data=limits, seed=seed)) for seed in (0, 0, 1)]
    assert sum(len(c.train) for c in drawn[0].clients) == 50
    assert len(drawn[0].test) == 30
    assert as_lists(drawn[0]) == as_lists(drawn[1])
    assert ids(drawn[0].test) != ids(drawn[2].test)
    used = [sorted(i for c in rows.clients for i in ids(c.train)) for rows in drawn]
    assert used[0] != used[2]
    assert ids(drawn[0].test) != list(range(30))


def test_a_limit_on_held_out_rows_leaves_every_client_its_share(write: Write) -> None:
    rows = load(configured(write("train", labelled(400)), data={"max_test_examples": 10}))
    sizes = [len(client.test or ()) for client in rows.clients]
    assert sorted(sizes) == [2, 2, 3, 3]
    assert ids(rows.test) == [i for c in rows.clients for i in ids(c.test)]  # type: ignore[arg-type]
    uneven = by_client({"a": 800, "b": 200, "c": 10})
    rows = load(
        configured(
            write("uneven", uneven), task="causal-lm", partition={}, data={"max_test_examples": 20}
        )
    )
    assert {c.name: len(c.test or ()) for c in rows.clients} == {"a": 15, "b": 4, "c": 1}
    few = load(configured(write("train", labelled(400)), data={"max_test_examples": 2}))
    assert len(few.test) == 2
    assert sum(client.test is None for client in few.clients) == 2


def test_by_size_looks_at_the_training_rows(write: Write) -> None:
    rows = [{"text": "t", "client": name} for name in "a" * 10 + "b" * 40 + "c" * 20]
    source = write("train", rows)
    ranks = {"mix": "2, 4, 8", "assign": "by-size"}
    values: dict[str, Any] = {"task": "causal-lm", "partition": {}, "ranks": ranks}
    loaded = load(configured(source, **values))
    assert {c.name: c.rank for c in loaded.clients} == {"b": 8, "c": 4, "a": 2}


def test_the_embedded_text_has_each_clients_test_rows() -> None:
    rows = load(config.check({"partition": {"min_examples": 1}}))
    assert len(rows.clients) >= 10
    for client in rows.clients:
        assert set(client.train["client"][:]) == {client.name}
        assert client.test is not None
        assert set(client.test["client"][:]) == {client.name}
    assert len(rows.test) == sum(len(c.test or ()) for c in rows.clients)
    fewer = load(config.check({"partition": {"clients": 3}}))
    assert set(fewer.test["client"][:]) == {client.name for client in fewer.clients}
    assert {dropped.reason for dropped in fewer.dropped} >= {"more than partition.clients"}
    iid = load(config.check({"partition": {"by": "iid", "clients": 5}}))
    assert all(client.test is None for client in iid.clients)
    assert len(set(iid.test["client"][:])) >= 10


@pytest.mark.parametrize(
    "train, test, labels",
    [
        ([10, 9, 2], [9], ("2", "9", "10")),  # numbers in their order
        ([0, 1], ["1", "0"], ("0", "1")),  # text digits and numbers are the same
    ],
)
def test_classes_are_in_order(
    write: Write, train: list[Any], test: list[Any], labels: tuple[str, ...]
) -> None:
    data = {"test": write("test", labelled(4, test))}
    assert load(configured(write("train", labelled(40, train)), data=data)).labels == labels


def test_a_class_label_keeps_its_order(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "a"])})
    rows = {"text": ["t"] * 20, "label": [0, 2] * 10}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert load(configured(str(tmp_path / "saved"))).labels == ("no", "a")


def test_classes_are_those_of_the_data_set_not_of_the_rows_that_were_drawn(write: Write) -> None:
    # One row of class z, which is not drawn, or held out, for some seed.
    path = write("train", [*labelled(7), {"text": "t", "label": "z", "id": 7}])
    for seed in range(5):
        data = {"test_fraction": 0.5, "max_train_examples": 6}
        values = {"partition": {"by": "iid", "clients": 1}, "data": data, "ranks": {"mix": "4"}}
        assert load(configured(path, seed=seed, **values)).labels == ("a", "b", "c", "z")


ONE = [{"text": "t", "label": "a"}]


@pytest.mark.parametrize(
    "train, test, values, message",
    [
        (labelled(40), [{"text": "t", "label": "z"}], {}, r"data\.test: row 1 .* 'z'"),
        (labelled(40), [{"text": "t"}], {}, r"data\.test has no column 'label'"),
        (labelled(40, ["a"]), None, {}, r"one class only, 'a' in column 'label'"),
        ([*ONE, {"text": "t"}], None, {}, "row 2 has no value in column 'label'"),
        ([*ONE, {"label": "b"}], None, {}, "row 2 has no value in column 'text'"),
        ([{"words": "t", "label": "a"}], None, {}, r"data\.text_column is not set"),
        (labelled(40), [*ONE, {"text": ["t"], "label": "b"}], {}, r"data\.test: row 2 has list"),
        (labelled(40), None, {"ranks": {"mix": "2, 4"}}, "2 ranks for 4 clients"),
        (labelled(7), None, {}, "needs 8 rows, 2 for each client, and there are 7"),
        (labelled(40), None, {"data": {"label_column": "topic"}}, "'topic' is not a column"),
        (ONE, None, {"task": "causal-lm", "partition": {}}, "there are 1 rows, at least 2 are"),
    ],
)
def test_wrong_data_are_one_sentence(
    write: Write, train: Rows, test: Rows | None, values: dict[str, Any], message: str
) -> None:
    data = dict(values.get("data", {}))
    if test is not None:
        data["test"] = write("test", test)
    with pytest.raises(ConfigError, match=message):
        load(configured(write("train", train), **{**values, "data": data}))


# Validation rows


def validated(source: str, fraction: float, *, seed: int = 0, **data: Any) -> FederatedRows:
    values = {"source": source, "validation_fraction": fraction, **data}
    return load(config.check({"seed": seed, "data": values, "ranks": {"mix": "2*0.5, 8*0.5"}}))


def ids_of(rows: Dataset | None) -> list[int]:
    return [] if rows is None else ids(rows)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.9])
def test_validation_rows_are_a_share_of_the_training_rows(write: Write, fraction: float) -> None:
    source = write("train", by_client({"a": 40, "b": 25, "c": 10}))
    before, after = validated(source, 0.0), validated(source, fraction)
    for old, new in zip(before.clients, after.clients, strict=True):
        train, validation = ids(new.train), ids_of(new.validation)
        assert old.validation is None
        assert ids_of(new.test) == ids_of(old.test)
        assert sorted(train + validation) == ids(old.train)
        size = min(max(round(fraction * len(old.train)), 1), len(old.train) - 1)
        assert len(validation) == size
        assert train == sorted(train)  # their order is kept
        assert new.rank == old.rank
    assert ids(after.test) == ids(before.test)


def test_the_seed_and_the_clients_name_decide_which_rows_are_held_out(write: Write) -> None:
    sizes = {"a": 40, "b": 25}
    source, test = write("train", by_client(sizes)), write("test", by_client({"a": 1}))
    other = write("other", by_client({"a": 40, "b": 20}))

    def held(source: str, seed: int, **data: Any) -> list[int]:
        (client,) = [c for c in validated(source, 0.3, seed=seed, **data).clients if c.name == "a"]
        return ids_of(client.validation)

    first = held(source, 0, test=test)
    assert first == held(source, 0, test=test) == held(other, 0, test=test)
    assert first != held(source, 1, test=test)
    assert first not in (list(range(12)), list(range(28, 40)))  # a file may be sorted
    (client,) = [c for c in validated(source, 0.0, test_fraction=0.3).clients if c.name == "a"]
    assert first != ids_of(client.test)  # another draw than that of the test rows


@pytest.mark.parametrize("fraction, least", [(0.0, 2), (0.01, 3), (0.99, 3)])
def test_each_part_has_a_row_or_the_client_is_left_out(
    write: Write, fraction: float, least: int
) -> None:
    sizes = {"a": 4, "b": 3, "c": 2, "d": 1}
    rows = validated(write("train", by_client(sizes)), fraction)
    assert [c.name for c in rows.clients] == [name for name in sizes if sizes[name] >= least]
    assert {d.name for d in rows.dropped} == set(sizes) - {c.name for c in rows.clients}
    for client in rows.clients:
        assert len(client.train) >= 1
        assert client.test is not None
        assert (client.validation is None) == (fraction == 0)


# Real data


@pytest.mark.real_data
@pytest.mark.parametrize(
    "source, test, classes, sizes",
    [
        ("banking77/train.csv", "banking77/test.csv", 77, (10_003, 3_080)),
        ("sst2/train.tsv", "sst2/dev.tsv", 2, (67_349, 872)),
        ("ag_news/train.jsonl", "ag_news/test.jsonl", 4, (4_000, 7_600)),
    ],
)
def test_deals_real_classes(
    shared: Path, source: str, test: str, classes: int, sizes: tuple[int, int]
) -> None:
    folder = shared / "data"
    partition = {"by": "dirichlet", "clients": 20}
    rows = load(
        configured(str(folder / source), data={"test": str(folder / test)}, partition=partition)
    )
    assert len(rows.labels) == classes
    assert (sum(len(c.train) for c in rows.clients), len(rows.test)) == sizes
